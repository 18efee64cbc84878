import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
import torchio as tio
from matplotlib.colors import to_rgb

import config
import pictures
from examples import legendTexts, makePrediction, makeTable


@pytest.fixture(autouse=True)
def closeFigures():
    yield
    plt.close('all')


def writePatient(folder, label=None, **volumes):
    """Write a patient of 12 x 16 x 6 voxels and return its row of the file list.

    Without volumes it has t1ce, t2 and flair with most brain in slice 1, and a label if one is given.
    """
    image = np.zeros((12, 16, 6))
    image[2:10, 3:13, 1] = np.arange(100, 108)[:, None]
    image[4:8, 5:9, 2:5] = 50
    volumes = volumes or {name: image * factor for factor, name in enumerate(('t1ce', 't2', 'flair'), start=1)}
    paths = dict.fromkeys(['t1', 't1ce', 't2', 'flair', 'seg'])
    for name, volume in (volumes | ({} if label is None else {'seg': label})).items():
        paths[name] = str(folder / f'BraTS2021_00001_{name}.nii.gz')
        nib.save(nib.Nifti1Image(volume.astype(np.int16), np.eye(4)), paths[name])
    return pd.Series(paths, name='BraTS2021_00001')


def test_plotSample_showsTheSliceWithMostTumor(tmp_path):
    """The slice has most tumor, not most brain; labels 1, 2, 4 become classes 1, 2, 3, named, counted and colored."""
    label = np.zeros((12, 16, 6))
    label[4:7, 6, 3] = (1, 2, 4)
    label[4, 6, 4] = 4
    figure = pictures.plotSample(writePatient(tmp_path, label))
    assert figure.get_suptitle() == 'BraTS2021_00001, axial slice 3 of 6'
    assert [panel.get_title() for panel in figure.axes] == ['t1ce', 't2', 'flair', 'classes over flair']
    image, classes = figure.axes[3].images
    assert sorted(classes.get_array().compressed()) == [1, 2, 3] and image.get_array().max() == 150  # flair
    texts = ['necrotic core, 1 voxels', 'edema, 1 voxels', 'enhancing tumor, 2 voxels']  # of the whole volume
    assert legendTexts(figure.axes[3]) == texts
    expected = [to_rgb(color) for color in config.CLASS_COLORS[1:]]
    assert [patch.get_facecolor()[:3] for patch in figure.axes[3].get_legend().get_patches()] == expected
    assert np.allclose(classes.to_rgba(np.arange(1, 4))[:, :3], expected)


def test_plots_withoutSegmentationShowMostBrain(tmp_path):
    """Without a segmentation the slice has most brain, and there are no panels of classes."""
    paths = writePatient(tmp_path)
    for plot, title in ((pictures.plotSample, ', no segmentation'), (pictures.plotModalities, '')):
        figure = plot(paths)
        assert figure.get_suptitle() == f'BraTS2021_00001, axial slice 1 of 6{title}'
        assert [panel.get_title() for panel in figure.axes] == ['t1ce', 't2', 'flair']


def test_plotSample_frontRightIsTopRight(tmp_path):
    """A voxel at the patient's front right is drawn up and to the right."""
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


def makeModalities():
    """Return volumes (12, 16, 6) of all modalities, each with a value of its own, and seg with 1, 2, 4 in slice 3."""
    brain = np.zeros((12, 16, 6))
    brain[2:10, 3:13, 1:5] = 1
    volumes = {name: brain * value for name, value in (('t1', 10), ('t1ce', 20), ('t2', 30), ('flair', 40))}
    seg = np.zeros((12, 16, 6))
    seg[3:6, 6, 3] = (1, 2, 4)
    seg[3:9, 6:9, 2] = 2  # most tumor, but of one class
    return volumes | {'seg': seg}


def test_plotModalities_showsEveryFile(tmp_path):
    """Each modality file is a panel with its own intensities and a caption; what config leaves out is marked."""
    paths = writePatient(tmp_path, **makeModalities())
    for config.MODALITIES, unused in ((('t1ce', 't2', 'flair'), ['t1']), (('t1', 'flair'), ['t1ce', 't2'])):
        panels = pictures.plotModalities(paths).axes[:4]
        titles = [f'{name} (not used)' if name in unused else name for name in ('t1', 't1ce', 't2', 'flair')]
        assert [panel.get_title() for panel in panels] == titles
        assert [panel.images[0].get_array().max() for panel in panels] == [10, 20, 30, 40]
        assert [panel.get_xlabel().split()[0] for panel in panels] == ['anatomy;', 'enhancing', 'edema', 'edema']


def test_plotModalities_showsClassesAndRegions(tmp_path):
    """Slice 3 has all classes; each class is shown alone with its label, and each region with its classes."""
    figure = pictures.plotModalities(writePatient(tmp_path, **makeModalities()))
    assert figure.get_suptitle() == 'BraTS2021_00001, axial slice 3 of 6'
    panels = figure.axes[4:]
    titles = ['1 = necrotic core', '2 = edema', '3 = enhancing tumor', 'WT = 1 + 2 + 3', 'TC = 1 + 3', 'ET = 3']
    assert [panel.get_title() for panel in panels] == titles
    shown = [sorted(panel.images[1].get_array().compressed().tolist()) for panel in panels]
    assert shown == [[1], [2], [3], [1, 2, 3], [1, 3], [3]]
    assert [panel.images[0].get_array().max() for panel in panels] == [40] * 6  # over flair
    captions = ['label 1 in the files', 'label 2 in the files', 'label 4 in the files']
    assert [panel.get_xlabel() for panel in panels] == [*captions, 'whole tumor', 'tumor core', 'enhancing tumor']


def test_plotModalities_drawsWithoutTumor(tmp_path):
    """Without tumor in the segmentation no class is drawn; a t1 of another shape is refused with patient and file."""
    volumes = makeModalities()
    figure = pictures.plotModalities(writePatient(tmp_path, **volumes | {'seg': volumes['seg'] * 0}))
    assert [panel.images[1].get_array().count() for panel in figure.axes[4:]] == [0] * 6
    with pytest.raises(ValueError, match=r'BraTS2021_00001: .*_t1\.nii\.gz has \(12, 16, 5\)'):
        pictures.plotModalities(writePatient(tmp_path, **volumes | {'t1': volumes['t1'][..., :5]}))


def test_plotPlanes_showsTheFullestSliceOfEachPlane(tmp_path):
    """Slices of (W, H), (W, D) and (H, D) with most tumor; front, top and the patient's right are named."""
    config.PLANES = ('axial', 'coronal', 'sagittal')
    label = np.zeros((12, 16, 6))
    label[5:8, 6, 2:5] = 4
    label[5, 6:8, 3] = 1
    paths = writePatient(tmp_path, label)
    flair = np.asarray(nib.load(paths['flair']).dataobj)
    figure = pictures.plotPlanes(paths)
    titles = ['axial, slice 3 of 6', 'coronal, slice 6 of 16', 'sagittal, slice 5 of 12']
    assert [panel.get_title() for panel in figure.axes] == titles
    for panel, values, classes in zip(
        figure.axes,
        (flair[:, :, 3], flair[:, 6], flair[5]),
        (label[:, :, 3], label[:, 6], label[5]),
        strict=True,
    ):
        shown, drawn = (image.get_array() for image in panel.images)
        assert shown.sum() == values.sum() and drawn.count() == np.count_nonzero(classes)
    sides = [[text.get_text() for text in panel.texts] for panel in figure.axes]
    assert sides == [['front', 'R'], ['top', 'R'], ['top', 'front']]


def test_figures_drawABrainOfOneVoxel(tmp_path):
    """A brain and a tumor of a single voxel are drawn like others."""
    config.PLANES = ('axial', 'coronal', 'sagittal')
    label = np.zeros((12, 16, 6))
    label[5, 6, 3] = 4
    paths = writePatient(tmp_path, label)
    for name in ('t1ce', 't2', 'flair'):
        nib.save(nib.Nifti1Image((label > 0) * np.int16(7), np.eye(4)), paths[name])
    for plot in (pictures.plotSample, pictures.plotModalities, pictures.plotPlanes):
        plot(paths).canvas.draw()


def test_plotModalities_readsDecathlon(tmp_path):
    """The modalities of a 4-D file are read by their index: flair, t1, t1ce, t2."""
    volumes = makeModalities()
    paths = dict.fromkeys(['t1', 't1ce', 't2', 'flair'], str(tmp_path / 'imagesTr' / 'BRATS_001.nii.gz'))
    paths['seg'] = str(tmp_path / 'labelsTr' / 'BRATS_001.nii.gz')
    stack = np.stack([volumes[name] for name in ('flair', 't1', 't1ce', 't2')], axis=-1)
    for path, volume in ((paths['t1'], stack), (paths['seg'], np.minimum(volumes['seg'], 3))):
        (tmp_path / path).parent.mkdir()
        nib.save(nib.Nifti1Image(volume.astype(np.int16), np.eye(4)), path)
    figure = pictures.plotModalities(pd.Series(paths, name='BRATS_001'))
    assert [panel.images[0].get_array().max() for panel in figure.axes[:4]] == [10, 20, 30, 40]
    assert figure.axes[4].get_xlabel() == 'label 2 in the files'  # necrotic core


def test_plotTransforms_splitsACompose():
    """Each transform inside a Compose and its OneOf is a column and is applied: a flip with p = 0 flips both axes."""
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
    assert legendTexts(figure) == ['necrotic core', 'edema', 'enhancing tumor']
    assert flip.probability == 0 and flip.flip_probability == 0  # the caller's transform is unchanged


def test_plotTransforms_outlinesTheLabelOfEachColumn():
    """Around (1, 2) as stored, around (6, 5) when flipped; the random state of the run stays as it was."""
    flip = tio.RandomFlip(axes=(0, 1), flip_probability=1, include=['x1', 'x2', 'x3', 'y'])
    image, label = torch.rand(3, 8, 8), torch.zeros(8, 8, dtype=torch.int64)
    label[1, 2] = 3
    before = torch.get_rng_state()
    figure = pictures.plotTransforms(image, label, {'as stored': None, 'flip': flip})
    assert torch.equal(torch.get_rng_state(), before)
    for panel, center in zip(figure.axes[:2], [(1, 2), (6, 5)], strict=True):
        (outline,) = panel.collections
        box = outline.get_paths()[0].get_extents()
        assert ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2) == center


def test_plotTransforms_drawsAPatchFullOfTumor():
    """A patch that is tumor up to its edges is drawn with the window of its brain, and one class has no outline."""
    image = torch.linspace(-1, 1, 64).reshape(1, 8, 8).repeat(3, 1, 1)
    label = torch.full((8, 8), 2)
    figure = pictures.plotTransforms(image, label, {'as stored': None})
    figure.canvas.draw()
    assert not figure.axes[0].collections
    low, high = figure.axes[0].images[0].get_clim()
    assert -1 < low < -0.9 and 0.9 < high < 1
    label[2:5, 2:5] = 3
    assert len(pictures.plotTransforms(image, label, {'as stored': None}).axes[0].collections) == 2


def test_plotPrediction_countsTheErrors():
    """Two false negatives, three false positives and one wrong class are drawn and counted."""
    figure = pictures.plotPrediction(*makePrediction(), title='patient 7')
    assert figure.get_suptitle() == 'patient 7, axial slice 2 of 4'
    assert [panel.get_title() for panel in figure.axes[:4]] == ['flair', 'truth', 'prediction', 'errors']
    errors, *_, errorsBelow = figure.axes[3:]
    assert np.bincount(errors.images[1].get_array().compressed()).tolist() == [0, 2, 3, 1]
    expected = ['false negative, 2 pixels', 'false positive, 3 pixels', 'wrong class, 1 pixels']
    assert legendTexts(errorsBelow) == expected
    expected = ['necrotic core, 1 pixels', 'edema, 1 pixels', 'enhancing tumor, 2 pixels']
    assert legendTexts(figure.axes[5]) == expected


def test_plotPrediction_drawsWhatIsMissing():
    """Without y the slice has most predicted tumor; of a volume without brain or tumor the middle slice is drawn."""
    x, _, yhat = makePrediction()
    yhat[1, 4:14, 4] = 1
    figure = pictures.plotPrediction(x, None, yhat)
    assert [panel.get_title() for panel in figure.axes[:2]] == ['flair', 'prediction']
    assert figure.get_suptitle() == 'Prediction, axial slice 1 of 4'
    x, y = torch.full((5, 3, 8, 9), -1.0), torch.zeros(5, 8, 9, dtype=torch.int64)
    figure = pictures.plotPrediction(x, y, y)
    assert figure.get_suptitle() == 'Prediction, axial slice 2 of 5'
    assert figure.axes[0].images[0].get_array().shape == (9, 8)  # W x H, transposed


def makeTumor(number):
    """Return x, y, yhat of a tumor of `number` pixels in slice 1: class 3 in truth, class 2 in the prediction."""
    x, y = torch.full((3, 3, 12, 12), -1.0), torch.zeros(3, 12, 12, dtype=torch.int64)
    x[:, :, 2:10, 2:10] = torch.linspace(0, 1, 8)
    y[1, 3 : 3 + number, 4] = 3
    return x, y, torch.where(y == 3, 2, 0)


def test_plotCases_findsBestMedianAndWorst():
    """Of five patients those with the mean Dice 0.8, 0.5 and 0.2 are shown in this order; only they are predicted."""
    table = makeTable(WT=[0.5, 0.9, 0.1, 0.6, 0.4], TC=[0.5, 0.8, 0.2, 0.6, 0.4], ET=[0.5, 0.7, 0.3, 0.6, 0.4])
    predicted = []
    figure = pictures.plotCases(
        table, lambda patient: predicted.append(patient) or makeTumor('abcde'.index(patient) + 1)
    )
    assert predicted == ['b', 'a', 'c']
    texts = [panel.texts[0].get_text() for panel in figure.axes[::3]]
    assert texts[0] == 'best:\nb\n\nDice\nWT  0.900\nTC  0.800\nET  0.700\nmean  0.800\n\naxial slice 1'
    assert texts[1].startswith('median:\na\n') and texts[2].startswith('worst:\nc\n')


def test_plotCases_showsTruthAndPrediction():
    """The middle panel of a row has the classes of the truth, the right one those of the prediction."""
    table = makeTable(WT=[0.9, 0.1], TC=[0.9, 0.1], ET=[0.9, 0.1])
    figure = pictures.plotCases(table, {'a': makeTumor(2), 'b': (*makeTumor(5), 'probability')})
    truth, prediction = (panel.images[1].get_array() for panel in figure.axes[4:6])  # of b, the worst
    assert (truth.compressed().tolist(), prediction.compressed().tolist()) == ([3] * 5, [2] * 5)
    assert [panel.get_title() for panel in figure.axes[1:3]] == ['truth over flair', 'prediction over flair']
    assert np.array_equal(figure.axes[4].images[0].get_array(), figure.axes[5].images[0].get_array())
    assert legendTexts(figure) == list(config.CLASS_NAMES[1:])
    assert len(figure.axes) == 6  # of two patients none is the median


def test_plotCases_refusesATableWithoutItsRegions():
    """A single patient is not called best or worst; a table without ET is refused."""
    figure = pictures.plotCases(makeTable(WT=[0.9], TC=[0.9], ET=[0.9]), {'a': makeTumor(2)})
    assert figure.axes[0].texts[0].get_text().startswith('the only patient:\na\n')
    with pytest.raises(ValueError, match='No patient'):
        pictures.plotCases(makeTable(WT=[0.9], TC=[0.9]), {})
