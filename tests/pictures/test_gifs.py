import itertools

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

import config
import pictures
from examples import makePrediction


def readGif(path):
    """Return the frames of a GIF as RGB uint8 (frames, rows, columns, 3), and its metadata."""
    with Image.open(path) as gif:
        frames = []
        for number in range(gif.n_frames):
            gif.seek(number)
            frames.append(np.asarray(gif.convert('RGB')))
        return np.stack(frames), gif.info


def tint(color, grey):
    """Return a class color of 60 % opacity over a grey of 0 to 1 as [red, green, blue], 0 to 255."""
    return np.rint(255 * (0.6 * np.array(to_rgb(color)) + 0.4 * grey)).astype(int).tolist()


def test_makeGifs_hasAFramePerSliceWithBrain(tmp_path):
    """Two slices with brain are two frames of 80 ms in an endless loop, and no temporary file is left."""
    (path,) = pictures.makeGifs(*makePrediction(), folder=tmp_path / 'new', name='p7')
    assert path == tmp_path / 'new' / 'p7_axial.gif'
    frames, info = readGif(path)
    assert len(frames) == 2
    assert (info['duration'], info['loop']) == (80, 0)
    assert [file.name for file in path.parent.iterdir()] == ['p7_axial.gif']


def test_makeGifs_drawsEachClassInItsColor(tmp_path):
    """Each voxel of truth and prediction has the color of its class over the grey of the image."""
    x, y, yhat = makePrediction()
    frames, _ = readGif(pictures.makeGifs(x, y, yhat, tmp_path)[0])
    pitch = frames.shape[2] // 3
    image, truth, prediction = (frames[:, 15 : 15 + 18, start : start + 16] for start in (0, pitch, 2 * pitch))
    assert np.ptp(image, axis=-1).max() == 0  # the image is grey
    for panel, classes in ((truth, y), (prediction, yhat)):
        cropped = classes[1:3, 2:18, 3:21].numpy()
        for number, column, up in itertools.product(range(2), range(16), range(18)):
            pixel, grey = panel[number, 17 - up, column].tolist(), image[number, 17 - up, column, 0]
            color = config.CLASS_COLORS[cropped[number, column, up]]
            expected = tint(color, grey / 255) if cropped[number, column, up] else [grey] * 3
            assert np.allclose(pixel, expected, atol=1)


@pytest.mark.parametrize(
    ('view', 'voxel'), [('axial', (1, 17, 20)), ('coronal', (2, 17, 20)), ('sagittal', (2, 17, 20))]
)
def test_makeGifs_frontRightTopIsTopRight(tmp_path, view, voxel):
    """The voxel at the right, front and top end of the brain is in the upper right corner of each view."""
    x, y, _ = makePrediction()
    y[:] = 0
    y[voxel] = 3
    (path,) = pictures.makeGifs(x, None, y, tmp_path, views=(view,))
    frames, _ = readGif(path)
    width, height = {'axial': (16, 18), 'coronal': (16, 2), 'sagittal': (18, 2)}[view]
    pitch = frames.shape[2] // 2  # without y there are two panels
    panel = frames[:, 15 : 15 + height, pitch : pitch + width]
    isColored = np.ptp(panel, axis=-1) > 0
    assert np.argwhere(isColored.any(0)).tolist() == [[0, width - 1]]


def test_makeGifs_withoutBrainHasOneFrame(tmp_path):
    """A volume without brain is one frame of its middle slice, or of the slice with predicted tumor."""
    x, empty = torch.full((5, 3, 8, 9), -1.0), torch.zeros(5, 8, 9, dtype=torch.int64)
    frames, _ = readGif(pictures.makeGifs(x, empty, empty, tmp_path)[0])
    assert len(frames) == 1
    yhat = empty.clone()
    yhat[3, 4, 4] = 1
    frames, _ = readGif(pictures.makeGifs(x, empty, yhat, tmp_path)[0])
    assert len(frames) == 1
    pixel = frames[0, 15, 2 * (frames.shape[2] // 3)].tolist()
    assert np.allclose(pixel, tint(config.CLASS_COLORS[1], 0), atol=1)


def test_makeGifs_refusesWrongInput(tmp_path):
    """Shapes that do not agree, an unknown class and an unknown view are refused by name; nothing is written."""
    x, y, yhat = makePrediction()
    for arguments, named in (
        ((x, y, yhat[1:]), 'prediction'),
        ((x, y * 4, yhat), 'truth'),
        ((x, y, yhat, tmp_path / 'gifs', 'p', ['top']), 'top'),
    ):
        with pytest.raises(ValueError, match=named):
            pictures.makeGifs(*arguments, **({} if len(arguments) > 3 else {'folder': tmp_path / 'gifs'}))
    assert not (tmp_path / 'gifs').exists()
