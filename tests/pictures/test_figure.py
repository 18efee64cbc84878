import itertools

import numpy as np
from matplotlib.colors import to_rgb

import config
from pictures import figure


def test_cropBox_keepsAMargin():
    """Rows 5 to 6 and columns 1 to 8, with a margin of 2, are rows 3 to 8 and columns 0 to 9; nothing is the whole."""
    mask = np.zeros((12, 10), bool)
    assert figure.cropBox(mask) == (slice(0, 12), slice(0, 10))
    mask[5, 1] = mask[6, 8] = True
    assert figure.cropBox(mask, margin=2) == (slice(3, 9), slice(0, 10))
    assert figure.cropBox(mask, margin=0) == (slice(5, 7), slice(1, 9))


def test_foreground_isAboveTheBackground():
    """The lowest intensity of a stretched image is background, wherever it lies; a constant image has no brain."""
    volume = np.array([[0.5, -1.0], [0.0, -0.9]])
    assert figure.foreground(volume).tolist() == [[True, False], [True, True]]
    assert not figure.foreground(np.full((2, 2), -1.0)).any()


def test_displayWindow_isPercentilesInsideTheMask():
    """Of 0 to 100 in the mask black and white are 1 and 99; an empty mask has a window of 1."""
    volume = np.concatenate([np.arange(101.0), np.full(50, 1000.0)])
    assert figure.displayWindow(volume, volume <= 100) == (1, 99)
    assert figure.displayWindow(np.full(4, -1.0), np.zeros(4, bool)) == (-1, 0)


def test_mostInformativeSlice_takesTheFirstVolumeThatHasAny():
    """The fullest slice of the first volume that is not empty; the middle slice if all are empty."""
    empty, some = np.zeros((5, 3, 3)), np.zeros((5, 3, 3))
    some[1, 0, 0] = some[4, 0, :2] = 1
    assert figure.mostInformativeSlice(empty, some, np.ones((5, 3, 3))) == 4
    assert figure.mostInformativeSlice(empty, empty) == 2


def test_unpackPrediction_takesFlairOrTheFirstChannel():
    """Flair is shown if the channels are those of `config`, else the first channel by its number."""
    x, y = np.arange(4).repeat(8).reshape(1, 4, 2, 4), np.zeros((1, 2, 4), int)
    volume, modality, classes = figure.unpackPrediction(x[:, :3], None, y)
    assert (volume.max(), modality, list(classes)) == (2, 'flair', ['prediction'])
    volume, modality, classes = figure.unpackPrediction(x, y, y)
    assert (volume.max(), modality, list(classes)) == (0, 'channel 0', ['truth', 'prediction'])


def test_countText_warnsBelowTen():
    """Nine patients are few, ten are enough; without a caution neither is."""
    assert figure.countText(1, 'it says little') == '1 patient (so few that it says little)'
    assert figure.countText(9, 'it says little') == '9 patients (so few that it says little)'
    assert figure.countText(10, 'it says little') == '10 patients' and figure.countText(9) == '9 patients'


def test_classColors_areDistinctForEveryone():
    """With and without color blindness (Machado 2009) classes differ by 35 in CIELAB from each other and from grey."""
    config.NO_CLASSES = 5
    machado = {
        'normal': np.eye(3),
        'protanopia': [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]],
        'deuteranopia': [[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]],
    }
    colors = np.array([to_rgb(color) for color in config.CLASS_COLORS[1:]])
    greys = np.linspace(0, 1, 21)[:, None].repeat(3, axis=1)
    for matrix in machado.values():
        classes, grey = (toLab(np.clip(toLinear(kind) @ np.transpose(matrix), 0, 1)) for kind in (colors, greys))
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(classes, 2)) > 35
        assert np.linalg.norm(classes[:, None] - grey, axis=-1).min() > 35


def test_classColors_areLegibleOnADarkPage():
    """Each color has a contrast (WCAG) of 3 on the dark report, and that of the cavity one of 2 on white."""
    config.NO_CLASSES = 5
    luminance = [toLinear(np.array(to_rgb(color))) @ [0.2126, 0.7152, 0.0722] for color in config.CLASS_COLORS[1:]]
    dark = toLinear(np.array(to_rgb('#181e27'))) @ [0.2126, 0.7152, 0.0722]
    assert min((each + 0.05) / (dark + 0.05) for each in luminance) > 3
    assert 1.05 / (luminance[-1] + 0.05) > 2


def toLinear(color):
    return np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)


def toLab(linear):
    toXyz = np.array([[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]])
    xyz = linear @ toXyz.T / toXyz.sum(1)
    root = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * root[:, 1] - 16, 500 * (root[:, 0] - root[:, 1]), 200 * (root[:, 1] - root[:, 2])], axis=1)
