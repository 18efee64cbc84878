import numpy as np
import pytest
import surface_distance
import torch

import metrics
from metrics.lesions import matchLesions

SHAPE = (12, 12, 60)
RULE = 'surface-distance'


def _volume(*boxes, value=2):
    """Return a volume of background with boxes of one class; a box is three pairs (start, stop)."""
    volume = np.zeros(SHAPE, np.int64)
    for box in boxes:
        volume[tuple(slice(*ends) for ends in box)] = value
    return volume


def _cube(at, length=4):
    """Return a box of 4 x 4 x `length` voxels (64 for 4: a scored lesion) that starts at `at` along the last axis."""
    return (4, 8), (4, 8), (at, at + length)


def _scoreWT(y, yhat, spacing=(1, 1, 1)):
    return metrics.scoreLesions(y, yhat, spacing).loc['WT'].tolist()


def test_scoreLesions_ofAPerfectPrediction():
    """A perfect prediction scores Dice 1 and 0 mm: the lesion is scored without its dilation."""
    y = _volume(_cube(10))
    assert _scoreWT(y, y) == [1, 0, 0, 0]


def test_scoreLesions_closeIslandsAreOneLesion():
    """Islands six voxels apart are one lesion of 128 voxels; with 64 of them found its Dice is 2/3."""
    y, yhat = _volume(_cube(10), _cube(20)), _volume(_cube(10))
    dice, hd95, missed, falsePositive = _scoreWT(y, yhat)
    assert dice == pytest.approx(2 * 64 / (128 + 64)) and (missed, falsePositive) == (0, 0) and hd95 < 20


def test_scoreLesions_distantIslandsAreTwoLesions():
    """Islands seven voxels apart are two lesions; with one of them found Dice is 1/2 and HD95 (0 + 374) / 2 mm."""
    y, yhat = _volume(_cube(10), _cube(21)), _volume(_cube(10))
    assert _scoreWT(y, yhat) == [0.5, 187, 1, 0]


def test_scoreLesions_dilatesWith18Neighbours():
    """Three dilations with 18 neighbours reach (3, 3, 0) from a corner (6 would not) but not (3, 3, 3) (26 would)."""
    y = _volume(((2, 6), (2, 6), (10, 14)))
    inside, outside = _volume(((8, 9), (8, 9), (13, 14))), _volume(((8, 9), (8, 9), (16, 17)))
    assert metrics.scoreLesions(y, inside).loc['WT', ['missed', 'falsePositive']].tolist() == [0, 0]
    assert metrics.scoreLesions(y, outside).loc['WT', ['missed', 'falsePositive']].tolist() == [1, 1]


def test_scoreLesions_componentsConnectAcrossCorners():
    """Two predicted voxels that share only a corner are one false positive, two with a gap are two."""
    y = _volume(_cube(10))
    touching = y + _volume(((1, 2), (1, 2), (40, 41)), ((2, 3), (2, 3), (41, 42)))
    apart = y + _volume(((1, 2), (1, 2), (40, 41)), ((2, 3), (2, 3), (42, 43)))
    assert _scoreWT(y, touching) == [0.5, 187, 0, 1]
    assert _scoreWT(y, apart) == [pytest.approx(1 / 3), pytest.approx(2 * 374 / 3), 0, 2]


def test_scoreLesions_componentsAreNotDilated():
    """A component four voxels from the lesion does not touch its dilation: a false negative and a false positive."""
    y, yhat = _volume(_cube(10)), _volume(_cube(17))
    assert _scoreWT(y, yhat) == [0, 374, 1, 1]


def test_scoreLesions_touchingTheDilationIsAMatch():
    """A component three voxels from the lesion matches it: Dice 0, a measured distance, nothing false."""
    y, yhat = _volume(_cube(10)), _volume(_cube(16))
    dice, hd95, missed, falsePositive = _scoreWT(y, yhat)
    assert (dice, missed, falsePositive) == (0, 0, 0) and hd95 == pytest.approx(6)


def test_scoreLesions_takesTheUnionOfWholeComponents():
    """Two components match a lesion of 160 voxels: all of their 64 + 96 voxels count, those outside included."""
    y = _volume(_cube(10, 10))
    yhat = _volume(_cube(10), _cube(16, 6))
    assert _scoreWT(y, yhat)[0] == pytest.approx(2 * (64 + 64) / (160 + 64 + 96))


def test_scoreLesions_aComponentMayMatchSeveralLesions():
    """One bar of 18 slices over two lesions is compared whole with each: Dice 128 / (64 + 288) twice."""
    y, yhat = _volume(_cube(10), _cube(24)), _volume(_cube(10, 18))
    dice, _, missed, falsePositive = _scoreWT(y, yhat)
    assert dice == pytest.approx(2 * 64 / (64 + 288)) and (missed, falsePositive) == (0, 0)


def test_scoreLesions_ofAnEmptyPrediction():
    """Each lesion without a match counts Dice 0 and 374 mm."""
    assert _scoreWT(_volume(_cube(10), _cube(30)), _volume()) == [0, 374, 2, 0]


def test_scoreLesions_aFalsePositiveVoxelHalves():
    """One voxel that touches no dilation is a false positive and halves a perfect score."""
    y = _volume(_cube(10))
    assert _scoreWT(y, y + _volume(((0, 1), (0, 1), (50, 51)))) == [0.5, 187, 0, 1]


def test_scoreLesions_fiftyCubicMillimetresAreNotScored():
    """A lesion of 50 mm3 is no false negative and its match no false positive; one of 51 mm3 is scored."""
    y = _volume(((3, 8), (3, 8), (10, 12)))
    assert y.astype(bool).sum() == 50
    assert _scoreWT(y, _volume()) == [1, 0, 0, 0]
    assert _scoreWT(y, y) == [1, 0, 0, 0]
    assert _scoreWT(y, _volume(((3, 4), (3, 4), (14, 15)))) == [1, 0, 0, 0]
    y[3, 3, 12] = 2
    assert _scoreWT(y, _volume()) == [0, 374, 1, 0]


def test_scoreLesions_measuresInCubicMillimetres():
    """26 voxels are not scored at 1 mm3 and are at 2 mm3: the limit is in mm3, not in voxels."""
    y = _volume(((4, 6), (4, 5), (10, 23)))
    assert _scoreWT(y, _volume()) == [1, 0, 0, 0]
    assert _scoreWT(y, _volume(), spacing=(2, 1, 1)) == [0, 374, 1, 0]


def test_scoreLesions_aMatchOfASmallLesionMayMatchALargeOne():
    """A bar over a small and a large lesion is compared with the large one only."""
    y = _volume(_cube(10), _cube(24, 2))
    dice, _, missed, falsePositive = _scoreWT(y, _volume(_cube(10, 16)))
    assert dice == pytest.approx(2 * 64 / (64 + 256)) and (missed, falsePositive) == (0, 0)


def test_scoreLesions_ofAnEmptyTruth():
    """With both empty Dice is 1 and HD95 0 mm; with components in the prediction Dice is 0 and HD95 374 mm."""
    assert _scoreWT(_volume(), _volume()) == [1, 0, 0, 0]
    assert _scoreWT(_volume(), _volume(_cube(10), _cube(30))) == [0, 374, 0, 2]


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_scoreLesions_distanceEqualsSurfaceDistances():
    """The HD95 of a single lesion equals that of the surface-distance package, with the same spacing."""
    y, yhat = _volume(_cube(10, 10)), _volume(_cube(12, 11), ((2, 7), (5, 6), (15, 19)))
    yhat[np.random.default_rng(0).random(SHAPE) < 0.3] = 0  # ragged, so that the two rules differ
    spacing = (1.0, 1.5, 2.0)
    assert metrics.hausdorff95(y > 0, yhat > 0, spacing) != metrics.hausdorff95(y > 0, yhat > 0, spacing, RULE)
    distances = surface_distance.compute_surface_distances(y > 0, yhat > 0, spacing)
    expected = surface_distance.compute_robust_hausdorff(distances, 95)
    assert _scoreWT(y, yhat, spacing)[1] == pytest.approx(expected, abs=1e-6)


def test_scoreLesions_makesRegionsOfClasses():
    """TC is classes 1 and 3, ET is 3, WT all three, for tensors and for arrays in any order of axes."""
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
    """Lesions in opposite corners, whose dilations leave the volume, are two lesions."""
    y = _volume(((0, 4), (0, 4), (0, 4)), ((8, 12), (8, 12), (56, 60)))
    assert _scoreWT(y, y) == [1, 0, 0, 0]
    assert _scoreWT(y, y * (np.arange(60) < 30)) == [0.5, 187, 1, 0]


def test_scoreLesions_refusesOtherThanVolumes():
    """Two axes, other shapes and other values raise an error that names what was found."""
    with pytest.raises(ValueError, match='three axes'):
        metrics.scoreLesions(np.zeros((4, 4), int), np.zeros((4, 4), int))
    with pytest.raises(ValueError, match=r'y has the shape \(12, 12, 60\), yhat \(12, 12, 59\)'):
        metrics.scoreLesions(_volume(), _volume()[:, :, 1:])
    with pytest.raises(ValueError, match='yhat has values from 0 to 4'):
        metrics.scoreLesions(_volume(), _volume(_cube(10), value=4))


def test_matchLesions_isHandCounted():
    """Two lesions of 64 and 32 voxels, three components: one matches the first, one both, one none."""
    truth = _volume(_cube(10), _cube(24, 2)) > 0
    prediction = _volume(((4, 5), (4, 5), (10, 11)), ((7, 8), (7, 8), (12, 25)), ((0, 1), (0, 1), (50, 52))) > 0
    match = matchLesions(truth, prediction)
    assert match.box == (slice(0, 8), slice(0, 8), slice(10, 52))
    assert match.lesionSizes.tolist() == [64, 32] and match.isScored.tolist() == [True, False]
    # components are numbered in the order of their first voxels
    assert match.componentSizes.tolist() == [2, 1, 13]
    assert match.isMatched.tolist() == [[False, True, True], [False, False, True]]
    assert ((match.lesions > 0) == truth[match.box]).all() and ((match.components > 0) == prediction[match.box]).all()
