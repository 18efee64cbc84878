import numpy as np
import pytest
import surface_distance
import torch

import metrics

SHAPE = (12, 12, 60)
RULE = 'surface-distance'


def _volume(*boxes, value=2):
    """A volume of background with boxes of one class; a box is three (first, last + 1)."""
    volume = np.zeros(SHAPE, np.int64)
    for box in boxes:
        volume[tuple(slice(*ends) for ends in box)] = value
    return volume


def _cube(at, length=4):
    """A box 4 x 4 x `length` (64 voxels for 4: a lesion that counts) that begins at `at` along the last axis."""
    return (4, 8), (4, 8), (at, at + length)


def _scoreWT(y, yhat, spacing=(1, 1, 1)):
    return metrics.scoreLesions(y, yhat, spacing).loc['WT'].tolist()


def test_scoreLesions_perfect():
    """A lesion found as it is scores Dice 1 and 0 mm: truth is not changed by the dilation that matches it."""
    y = _volume(_cube(10))
    assert _scoreWT(y, y) == [1, 0, 0, 0]


def test_scoreLesions_nearIslandsAreOneLesion():
    """Six voxels apart the dilations meet: one lesion of 128 voxels, of which 64 are found: Dice 2/3, none missed."""
    y, yhat = _volume(_cube(10), _cube(20)), _volume(_cube(10))
    dice, hd95, missed, falsePositive = _scoreWT(y, yhat)
    assert dice == pytest.approx(2 * 64 / (128 + 64)) and (missed, falsePositive) == (0, 0) and hd95 < 20


def test_scoreLesions_farIslandsAreTwo():
    """Seven voxels apart they are two lesions; one is found, one missed: Dice 1/2, (0 + 374) / 2 mm."""
    y, yhat = _volume(_cube(10), _cube(21)), _volume(_cube(10))
    assert _scoreWT(y, yhat) == [0.5, 187, 1, 0]


def test_scoreLesions_dilatesWith18Neighbours():
    """Three steps of 18 neighbours reach (3, 3, 0) from a corner, which 6 do not, but not (3, 3, 3), which 26 do."""
    y = _volume(((2, 6), (2, 6), (10, 14)))
    reached, missed = _volume(((8, 9), (8, 9), (13, 14))), _volume(((8, 9), (8, 9), (16, 17)))
    assert metrics.scoreLesions(y, reached).loc['WT', ['missed', 'falsePositive']].tolist() == [0, 0]
    assert metrics.scoreLesions(y, missed).loc['WT', ['missed', 'falsePositive']].tolist() == [1, 1]


def test_scoreLesions_partsAreConnectedByCorners():
    """Two predicted voxels that share only a corner are one false positive, two with a gap are two."""
    y = _volume(_cube(10))
    touching = y + _volume(((1, 2), (1, 2), (40, 41)), ((2, 3), (2, 3), (41, 42)))
    apart = y + _volume(((1, 2), (1, 2), (40, 41)), ((2, 3), (2, 3), (42, 43)))
    assert _scoreWT(y, touching) == [0.5, 187, 0, 1]
    assert _scoreWT(y, apart) == [pytest.approx(1 / 3), pytest.approx(2 * 374 / 3), 0, 2]


def test_scoreLesions_partsAreNotDilated():
    """A prediction four voxels beside the lesion does not touch its dilation: missed, and a false positive."""
    y, yhat = _volume(_cube(10)), _volume(_cube(17))
    assert _scoreWT(y, yhat) == [0, 374, 1, 1]


def test_scoreLesions_touchingTheDilationIsEnough():
    """Three voxels beside it belongs to the lesion: Dice 0, but a distance, and neither missed nor false."""
    y, yhat = _volume(_cube(10)), _volume(_cube(16))
    dice, hd95, missed, falsePositive = _scoreWT(y, yhat)
    assert (dice, missed, falsePositive) == (0, 0, 0) and hd95 == pytest.approx(6)


def test_scoreLesions_takesTheUnionOfWholeParts():
    """Two parts touch one lesion of 160 voxels: their union of 64 + 96, a slab outside included, is scored."""
    y = _volume(_cube(10, 10))
    yhat = _volume(_cube(10), _cube(16, 6))
    assert _scoreWT(y, yhat)[0] == pytest.approx(2 * (64 + 64) / (160 + 64 + 96))


def test_scoreLesions_aPartMayServeSeveralLesions():
    """One bar of 18 slices over two lesions is scored against each as a whole: Dice 128 / (64 + 288) twice."""
    y, yhat = _volume(_cube(10), _cube(24)), _volume(_cube(10, 18))
    dice, _, missed, falsePositive = _scoreWT(y, yhat)
    assert dice == pytest.approx(2 * 64 / (64 + 288)) and (missed, falsePositive) == (0, 0)


def test_scoreLesions_nothingPredicted():
    """Each lesion without a part counts 0 and 374 mm."""
    assert _scoreWT(_volume(_cube(10), _cube(30)), _volume()) == [0, 374, 2, 0]


def test_scoreLesions_oneStrayVoxelHalves():
    """One voxel that touches no dilation is a false positive and halves a perfect score."""
    y = _volume(_cube(10))
    assert _scoreWT(y, y + _volume(((0, 1), (0, 1), (50, 51)))) == [0.5, 187, 0, 1]


def test_scoreLesions_fiftyCubicMillimetresDoNotCount():
    """A lesion of 50 mm3 leaves everything: missed it is no loss, found no false positive; one of 51 counts."""
    y = _volume(((3, 8), (3, 8), (10, 12)))
    assert y.astype(bool).sum() == 50
    assert _scoreWT(y, _volume()) == [1, 0, 0, 0]
    assert _scoreWT(y, y) == [1, 0, 0, 0]
    assert _scoreWT(y, _volume(((3, 4), (3, 4), (14, 15)))) == [1, 0, 0, 0]
    y[3, 3, 12] = 2
    assert _scoreWT(y, _volume()) == [0, 374, 1, 0]


def test_scoreLesions_measuresInCubicMillimetres():
    """26 voxels of 2 mm3 are 52 mm3 and count; the 50 mm3 are not voxels."""
    y = _volume(((4, 6), (4, 5), (10, 23)))
    assert _scoreWT(y, _volume()) == [1, 0, 0, 0]
    assert _scoreWT(y, _volume(), spacing=(2, 1, 1)) == [0, 374, 1, 0]


def test_scoreLesions_aSmallLesionsPartMayServeALargeOne():
    """A bar over a small and a large lesion is scored against the large one only."""
    y = _volume(_cube(10), _cube(24, 2))
    dice, _, missed, falsePositive = _scoreWT(y, _volume(_cube(10, 16)))
    assert dice == pytest.approx(2 * 64 / (64 + 256)) and (missed, falsePositive) == (0, 0)


def test_scoreLesions_emptyTruth():
    """Both empty give Dice 1 and 0 mm; parts where there is no tumor at all 0 and 374 mm."""
    assert _scoreWT(_volume(), _volume()) == [1, 0, 0, 0]
    assert _scoreWT(_volume(), _volume(_cube(10), _cube(30))) == [0, 374, 0, 2]


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_scoreLesions_distanceIsSurfaceDistances():
    """The HD95 of the only lesion is that of the package surface-distance, with the voxel's size."""
    y, yhat = _volume(_cube(10, 10)), _volume(_cube(12, 11), ((2, 7), (5, 6), (15, 19)))
    yhat[np.random.default_rng(0).random(SHAPE) < 0.3] = 0  # ragged, or both rules would agree
    spacing = (1.0, 1.5, 2.0)
    assert metrics.hausdorff95(y > 0, yhat > 0, spacing) != metrics.hausdorff95(y > 0, yhat > 0, spacing, RULE)
    distances = surface_distance.compute_surface_distances(y > 0, yhat > 0, spacing)
    expected = surface_distance.compute_robust_hausdorff(distances, 95)
    assert _scoreWT(y, yhat, spacing)[1] == pytest.approx(expected, abs=1e-6)


def test_scoreLesions_regionsFromClasses():
    """Classes 1 and 3 make TC, 3 ET, all three WT; tensors are taken, and any order of axes gives the same."""
    y = _volume(_cube(10), value=1) + _volume(_cube(14), value=3) + _volume(_cube(18), value=2)
    yhat = np.where(y == 3, 1, y)
    table = metrics.scoreLesions(torch.from_numpy(y), torch.from_numpy(yhat))
    assert list(table.index) == ['WT', 'TC', 'ET']
    assert list(table.columns) == ['dice', 'hd95', 'missed', 'falsePositive']
    assert table.loc['WT'].tolist() == table.loc['TC'].tolist() == [1, 0, 0, 0]
    assert table.loc['ET'].tolist() == [0, 374, 1, 0]
    turned = metrics.scoreLesions(y.transpose(2, 0, 1), yhat.transpose(2, 0, 1))
    assert (turned == table).all(axis=None)


def test_scoreLesions_atTheBorder():
    """Lesions in opposite corners of the volume, dilated beyond it, are two; found they score 1."""
    y = _volume(((0, 4), (0, 4), (0, 4)), ((8, 12), (8, 12), (56, 60)))
    assert _scoreWT(y, y) == [1, 0, 0, 0]
    assert _scoreWT(y, y * (np.arange(60) < 30)) == [0.5, 187, 1, 0]


def test_scoreLesions_refusesOtherThanVolumes():
    """Two axes, other shapes and labels that are not classes are refused with what was found."""
    with pytest.raises(ValueError, match='three axes'):
        metrics.scoreLesions(np.zeros((4, 4), int), np.zeros((4, 4), int))
    with pytest.raises(ValueError, match='yhat reaches from 0 to 4'):
        metrics.scoreLesions(_volume(), _volume(_cube(10), value=4))


def test_countStray_handCounted():
    """Five slices, tumor on the third: the end of the part that reaches there counts voxels, the loose one a part."""
    y, yhat = np.zeros((2, 5, 6, 6), np.int64)
    y[2, 2, 2] = 1
    yhat[2, 2, 2], yhat[3, 2, 2:4] = 1, 2  # found, with two voxels too many on the next slice
    yhat[0, 5, 5], yhat[1, 4, 4] = 3, 2  # one part across a corner, on the two slices before
    table = metrics.countStray(torch.from_numpy(y), torch.from_numpy(yhat))
    assert table.columns.tolist() == ['tumorFree', 'predicted', 'voxels', 'components']
    assert table.loc['slice'].tolist() == [4, 3, 4, 1] and table.loc['patient'].tolist() == [0, 0, 0, 0]


def test_countStray_tumorFreePatient():
    """Without any tumor everything predicted is stray, of the slices and of the patient; tables may be summed."""
    y, yhat = np.zeros((2, 5, 6, 6), np.int64)
    yhat[0, 0, 0] = yhat[4, 1, 1] = 1
    table = metrics.countStray(y, yhat)
    assert table.loc['slice'].tolist() == [5, 2, 2, 2] and table.loc['patient'].tolist() == [1, 1, 2, 2]
    total = table + metrics.countStray(y, y)
    assert total.loc['slice'].tolist() == [10, 2, 2, 2] and total.loc['patient'].tolist() == [2, 1, 2, 2]
