import itertools

import matplotlib

matplotlib.use('Agg')

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
import torchio as tio
from matplotlib.colors import to_rgb
from PIL import Image

import config
import gifs
import pictures


@pytest.fixture(autouse=True)
def closeFigures():
    yield
    plt.close('all')


def makePrediction():
    """Gives x (4, 3, 20, 24), y and yhat (4, 20, 24): brain in slices 1 and 2, all kinds of error in slice 2."""
    x, y = torch.full((4, 3, 20, 24), -1.0), torch.zeros(4, 20, 24, dtype=torch.int64)
    x[1:3, :, 2:18, 3:21] = torch.linspace(-0.9, 1, 16)[:, None]
    y[1, 5, 5] = 1
    y[2, 10:14, 10] = torch.tensor([1, 2, 3, 3])
    yhat = y.clone()
    yhat[2, 10:12, 10] = 0  # two missed
    yhat[2, 12, 10] = 2  # one of the wrong class
    yhat[2, 3:6, 4] = 2  # three wrongly added
    return x, y, yhat


def writePatient(folder, label=None):
    """Writes a patient of 12 x 16 x 6 voxels and gives its row of the file list; most brain in slice 1."""
    image = np.zeros((12, 16, 6), np.int16)
    image[2:10, 3:13, 1] = np.arange(100, 108)[:, None]
    image[4:8, 5:9, 2:5] = 50
    paths = {'t1': None, 'seg': None}
    for channel, name in enumerate(('t1ce', 't2', 'flair')):
        paths[name] = str(folder / f'BraTS2021_00001_{name}.nii.gz')
        nib.save(nib.Nifti1Image(image * (channel + 1), np.eye(4)), paths[name])
    if label is not None:
        paths['seg'] = str(folder / 'BraTS2021_00001_seg.nii.gz')
        nib.save(nib.Nifti1Image(label.astype(np.uint8), np.eye(4)), paths['seg'])
    return pd.Series(paths, name='BraTS2021_00001')


def legendTexts(legend):
    return [text.get_text() for text in legend.get_texts()]


def readGif(path):
    """Gives the frames of a GIF as RGB uint8 (frames, rows, columns, 3), and what the file says of time and loops."""
    with Image.open(path) as gif:
        frames = []
        for number in range(gif.n_frames):
            gif.seek(number)
            frames.append(np.asarray(gif.convert('RGB')))
        return np.stack(frames), gif.info


def tint(color, grey):
    """Gives the color of a class of 60 % opacity over a grey of 0 to 1, uint8."""
    return np.rint(255 * (0.6 * np.array(to_rgb(color)) + 0.4 * grey)).astype(int).tolist()


def test_plotSample_showsTheSliceWithMostTumor(tmp_path):
    """The slice is the one with most tumor, not the one with most brain; labels 1, 2, 4 become classes 1, 2, 3."""
    label = np.zeros((12, 16, 6))
    label[4:7, 6, 3] = (1, 2, 4)
    label[4, 6, 4] = 4
    figure = pictures.plotSample(writePatient(tmp_path, label))
    assert figure.get_suptitle() == 'BraTS2021_00001, axial slice 3 of 6'
    assert [panel.get_title() for panel in figure.axes] == ['t1ce', 't2', 'flair', 'classes over flair']
    classes = figure.axes[3].images[1].get_array()
    assert sorted(classes.compressed()) == [1, 2, 3]
    assert figure.axes[3].images[0].get_array().max() == 150  # flair


def test_plotSample_legendNamesTheClasses(tmp_path):
    """The legend has the three tumor classes with their voxels in the whole volume, in the colors of config."""
    label = np.zeros((12, 16, 6))
    label[4:7, 6, 3] = (1, 2, 4)
    label[4, 6, 4] = 4
    panel = pictures.plotSample(writePatient(tmp_path, label)).axes[3]
    legend = panel.get_legend()
    assert legendTexts(legend) == ['necrotic core, 1 voxels', 'edema, 1 voxels', 'enhancing tumor, 2 voxels']
    expected = [to_rgb(color) for color in config.CLASS_COLORS[1:]]
    assert [patch.get_facecolor()[:3] for patch in legend.get_patches()] == expected
    assert np.allclose(panel.images[1].to_rgba(np.arange(1, 4))[:, :3], expected)


def test_plotSample_withoutSegmentationShowsMostBrain(tmp_path):
    """A patient without a segmentation gets the slice with most brain, and no panel of classes."""
    figure = pictures.plotSample(writePatient(tmp_path))
    assert figure.get_suptitle() == 'BraTS2021_00001, axial slice 1 of 6, no segmentation'
    assert len(figure.axes) == 3


def test_plotSample_frontRightIsTopRight(tmp_path):
    """A voxel at the patient's front right lies in the last row (drawn on top) and the last column."""
    label = np.zeros((12, 16, 6))
    label[9, 12, 1] = 4  # the brain's last voxel to the right and to the front
    panel = pictures.plotSample(writePatient(tmp_path, label)).axes[3]
    (row,), (column,) = np.nonzero(panel.images[1].get_array().filled(0))
    rows, columns = panel.images[1].get_array().shape
    assert (row / rows, column / columns) > (0.5, 0.5)
    assert [image.origin for image in panel.images] == ['lower', 'lower']
    assert panel.images[0].get_array()[row, column] == 3 * 107  # the image lies as the classes do
    x, y = panel.transData.transform((column, row)) - panel.transData.transform((columns / 2, rows / 2))
    assert x > 0 and y > 0  # on the screen, to the right and up


def test_plotTransforms_takesAComposeApart():
    """Each leaf of a Compose and of its OneOf is a column, and happens: a flip with p = 0 flips both axes."""
    keys = {'include': ['x1', 'x2', 'x3', 'y'], 'label_keys': ['y']}
    flip = tio.RandomFlip(axes=(0, 1), flip_probability=0, p=0, **keys)
    noise = tio.RandomNoise(std=0, include=['x1', 'x2', 'x3'])
    transform = tio.Compose([tio.OneOf({flip: 1, noise: 0}, p=0, **keys)], **keys)
    image, label = torch.arange(3 * 8 * 8).reshape(3, 8, 8).float(), torch.zeros(8, 8, dtype=torch.int64)
    label[1, 2] = 1
    figure = pictures.plotTransforms(image, label, transform)
    assert [panel.get_title() for panel in figure.axes[:3]] == ['as stored', 'Flip', 'Noise']
    assert [figure.axes[row * 3].get_ylabel() for row in range(3)] == ['t1ce', 't2', 'flair']
    assert np.array_equal(figure.axes[3].images[0].get_array(), image[1].T)
    assert np.array_equal(figure.axes[4].images[0].get_array(), image[1].T.flip(0, 1))
    assert legendTexts(figure.legends[0]) == ['necrotic core', 'edema', 'enhancing tumor']
    assert flip.probability == 0 and flip.flip_probability == 0  # the caller's transform stays as it was


def test_plotTransforms_outlinesTheLabelOfEachColumn():
    """The outline of a column is that of its own label: around (1, 2) as stored, around (6, 5) when flipped."""
    flip = tio.Flip(axes=(0, 1), include=['x1', 'x2', 'x3', 'y'])
    image, label = torch.rand(3, 8, 8), torch.zeros(8, 8, dtype=torch.int64)
    label[1, 2] = 3
    figure = pictures.plotTransforms(image, label, {'as stored': None, 'flip': flip})
    for panel, center in zip(figure.axes[:2], [(1, 2), (6, 5)], strict=True):
        (outline,) = panel.collections
        box = outline.get_paths()[0].get_extents()
        assert ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2) == center


def test_plotTransforms_leavesTheRandomStateAlone():
    """A run draws the same numbers whether or not a figure was made on the way."""
    transform = {'noise': tio.RandomNoise(include=['x1', 'x2', 'x3'])}
    before = torch.get_rng_state()
    pictures.plotTransforms(torch.rand(3, 8, 8, generator=torch.Generator()), torch.zeros(8, 8).long(), transform)
    assert torch.equal(torch.get_rng_state(), before)


def test_plotCurves_marksTheBestEpoch():
    """The mark lies at the epoch of the least validation loss, also where a row number is not the epoch."""
    history = pd.DataFrame({'epoch': [4, 5, 6, 7], 'trainLoss': [4, 3, 2, 1], 'valLoss': [4, np.nan, 2, 3]})
    panel = pictures.plotCurves(history).axes[0]
    assert [list(line.get_ydata()) for line in panel.lines[:1]] == [[4, 3, 2, 1]]
    assert (list(panel.lines[2].get_xdata()), list(panel.lines[2].get_ydata())) == ([6], [2])
    assert legendTexts(panel.get_legend()) == ['training', 'validation', 'best: 2 in epoch 6']
    assert panel.get_yscale() == 'linear'


def test_plotCurves_logarithmicFromAFactorOf10():
    """Losses that fall by more than 10 get a logarithmic scale; a loss of zero never does."""
    history = pd.DataFrame({'epoch': [0, 1], 'trainLoss': [1, 0.09], 'valLoss': [1, 1]})
    assert pictures.plotCurves(history).axes[0].get_yscale() == 'log'
    assert pictures.plotCurves(history.assign(valLoss=0.0)).axes[0].get_yscale() == 'linear'


def test_plotCurves_marksTheDropsOfTheLearningRate():
    """A line stands where the rate is lower than an epoch before, with the new rate, and nowhere else."""
    history = pd.DataFrame({'epoch': range(4), 'trainLoss': 1, 'valLoss': 1, 'learnRate': [1e-3, 1e-3, 5e-4, 5e-4]})
    panel = pictures.plotCurves(history).axes[0]
    assert [list(line.get_xdata()) for line in panel.lines[3:]] == [[2, 2]]
    assert [text.get_text() for text in panel.texts] == ['rate 0.0005']


def test_plotCurves_refusesNoEpochs():
    """Neither an empty history nor one without a column is drawn."""
    empty = pd.DataFrame({'epoch': [], 'trainLoss': [], 'valLoss': []})
    for history in (empty, pd.DataFrame({'epoch': [1], 'trainLoss': [1]})):
        with pytest.raises(ValueError, match='history'):
            pictures.plotCurves(history)


def test_plotPrediction_countsTheErrors():
    """Two missed, three wrongly added and one of the wrong class are drawn and counted as such."""
    figure = pictures.plotPrediction(*makePrediction(), title='patient 7')
    assert figure.get_suptitle() == 'patient 7, axial slice 2 of 4'
    assert [panel.get_title() for panel in figure.axes[:4]] == ['flair', 'truth', 'prediction', 'errors']
    errors, *_, errorsBelow = figure.axes[3:]
    assert np.bincount(errors.images[1].get_array().compressed()).tolist() == [0, 2, 3, 1]
    expected = ['missed, 2 pixels', 'wrongly added, 3 pixels', 'wrong class, 1 pixels']
    assert legendTexts(errorsBelow.get_legend()) == expected
    expected = ['necrotic core, 1 pixels', 'edema, 1 pixels', 'enhancing tumor, 2 pixels']
    assert legendTexts(figure.axes[5].get_legend()) == expected


def test_plotPrediction_withoutTruthShowsThePrediction():
    """Without y there are image and prediction, in the slice with most predicted tumor."""
    x, _, yhat = makePrediction()
    yhat[1, 4:14, 4] = 1
    figure = pictures.plotPrediction(x, None, yhat)
    assert [panel.get_title() for panel in figure.axes[:2]] == ['flair', 'prediction']
    assert figure.get_suptitle() == 'Prediction, axial slice 1 of 4'


def test_plotPrediction_drawsWhereNothingIs():
    """A volume without brain or tumor is drawn whole, in its middle slice."""
    x, y = torch.full((5, 3, 8, 9), -1.0), torch.zeros(5, 8, 9, dtype=torch.int64)
    figure = pictures.plotPrediction(x, y, y)
    assert figure.get_suptitle() == 'Prediction, axial slice 2 of 5'
    assert figure.axes[0].images[0].get_array().shape == (9, 8)  # W x H, transposed


@pytest.mark.parametrize('shape', [(40, 10), (20, 24), (10, 40)])
def test_plotPrediction_legendsLieOnTheFigure(shape):
    """No legend is cut off by the figure's edge or overlaps a panel, be the brain wide or tall."""
    x, y = torch.ones(1, 3, *shape), torch.zeros(1, *shape, dtype=torch.int64)
    x[..., 0, 0] = 0
    figure = pictures.plotPrediction(x, y, y, title='patient 7')
    figure.canvas.draw()
    panels, below = figure.axes[:4], figure.axes[5:]
    for panel, legend in zip(panels[1:], (axes.get_legend().get_window_extent() for axes in below), strict=True):
        assert legend.x0 >= 0 and legend.x1 <= figure.bbox.x1 and legend.y0 >= 0
        assert legend.y1 <= panel.get_window_extent().y0


def test_makeGifs_hasAFramePerSliceWithBrain(tmp_path):
    """The file has two frames of 80 ms for two slices with brain, loops without end, and lies there whole."""
    (path,) = gifs.makeGifs(*makePrediction(), folder=tmp_path / 'new', name='p7')
    assert path == tmp_path / 'new' / 'p7_axial.gif'
    frames, info = readGif(path)
    assert len(frames) == 2
    assert (info['duration'], info['loop']) == (80, 0)
    assert [file.name for file in path.parent.iterdir()] == ['p7_axial.gif']


def test_makeGifs_givesEachClassItsColor(tmp_path):
    """Truth and prediction have their classes' colors over the image's grey at each voxel, and nowhere else."""
    x, y, yhat = makePrediction()
    frames, _ = readGif(gifs.makeGifs(x, y, yhat, tmp_path)[0])
    pitch = frames.shape[2] // 3
    image, truth, prediction = (frames[:, 15 : 15 + 18, start : start + 16] for start in (0, pitch, 2 * pitch))
    assert np.ptp(image, axis=-1).max() == 0  # the image is grey
    for panel, classes in ((truth, y), (prediction, yhat)):
        cropped = classes[1:3, 2:18, 3:21].numpy()
        for number, column, up in itertools.product(range(2), range(16), range(18)):
            pixel, grey = panel[number, 17 - up, column].tolist(), image[number, 17 - up, column, 0]
            kind = cropped[number, column, up]
            expected = [grey] * 3 if kind == 0 else tint(config.CLASS_COLORS[kind], grey / 255)
            assert np.allclose(pixel, expected, atol=1)


@pytest.mark.parametrize(
    ('view', 'voxel'), [('axial', (1, 17, 20)), ('coronal', (2, 17, 20)), ('sagittal', (2, 17, 20))]
)
def test_makeGifs_frontRightTopIsTopRight(tmp_path, view, voxel):
    """The last voxel of the brain to the right, front and top lies in the upper right corner of each view."""
    x, y, _ = makePrediction()
    y[:] = 0
    y[voxel] = 3
    (path,) = gifs.makeGifs(x, None, y, tmp_path, views=(view,))
    frames, _ = readGif(path)
    width, height = {'axial': (16, 18), 'coronal': (16, 2), 'sagittal': (18, 2)}[view]
    pitch = frames.shape[2] // 2
    panel = frames[:, 15 : 15 + height, pitch : pitch + width]
    isColored = np.ptp(panel, axis=-1) > 0
    assert np.argwhere(isColored.any(0)).tolist() == [[0, width - 1]]


def test_makeGifs_withoutTruthHasTwoPanels(tmp_path):
    """Without y the frames are a third narrower than with it."""
    x, y, yhat = makePrediction()
    withTruth, _ = readGif(gifs.makeGifs(x, y, yhat, tmp_path, 'a')[0])
    without, _ = readGif(gifs.makeGifs(x, None, yhat, tmp_path, 'b')[0])
    assert without.shape[2] * 3 == withTruth.shape[2] * 2


def test_makeGifs_withoutBrainHasOneFrame(tmp_path):
    """A volume of background alone gives a GIF of its middle slice; tumor predicted there is never cropped."""
    x, empty = torch.full((5, 3, 8, 9), -1.0), torch.zeros(5, 8, 9, dtype=torch.int64)
    frames, _ = readGif(gifs.makeGifs(x, empty, empty, tmp_path)[0])
    assert len(frames) == 1
    yhat = empty.clone()
    yhat[3, 4, 4] = 1
    frames, _ = readGif(gifs.makeGifs(x, empty, yhat, tmp_path)[0])
    assert len(frames) == 1
    pixel = frames[0, 15, 2 * (frames.shape[2] // 3)].tolist()
    assert np.allclose(pixel, tint(config.CLASS_COLORS[1], 0), atol=1)


def test_makeGifs_refusesWhatItCannotDraw(tmp_path):
    """Shapes that do not agree, a class without a color and an unknown view are named, and nothing is written."""
    x, y, yhat = makePrediction()
    for arguments, named in (
        ((x, y, yhat[1:]), 'prediction'),
        ((x, y * 4, yhat), 'truth'),
        ((x, y, yhat, tmp_path / 'gifs', 'p', ['top']), 'top'),
    ):
        with pytest.raises(ValueError, match=named):
            gifs.makeGifs(*arguments, **({} if len(arguments) > 3 else {'folder': tmp_path / 'gifs'}))
    assert not (tmp_path / 'gifs').exists()


def test_classColors_stayApartForEveryEye():
    """Without red or green cones (Machado 2009) the classes differ by 35 in CIELAB from each other and from grey."""
    machado = {
        'normal': np.eye(3),
        'protanopia': [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]],
        'deuteranopia': [[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]],
    }
    colors = np.array([to_rgb(color) for color in config.CLASS_COLORS[1:]])
    greys = np.linspace(0, 1, 21)[:, None].repeat(3, axis=1)
    for matrix in machado.values():
        seen, dull = (toLab(np.clip(toLinear(kind) @ np.transpose(matrix), 0, 1)) for kind in (colors, greys))
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 35
        assert np.linalg.norm(seen[:, None] - dull, axis=-1).min() > 35


def toLinear(color):
    return np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)


def toLab(linear):
    toXyz = np.array([[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]])
    xyz = linear @ toXyz.T / toXyz.sum(1)
    root = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * root[:, 1] - 16, 500 * (root[:, 0] - root[:, 1]), 200 * (root[:, 1] - root[:, 2])], axis=1)
