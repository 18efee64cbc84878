import numpy as np
import pytest
import surface_distance
import torch

import metrics
from metrics.lesions import matchLesions

SHAPE = (12, 12, 60)


def _volume(*boxes, value=2):
    """Return a volume of background with boxes of one class; a box is three pairs (start, stop)."""
    volume = np.zeros(SHAPE, np.int64)
    for box in boxes:
        volume[tuple(slice(*ends) for ends in box)] = value
    return volume


def _cube(at, length=4):
    """Return a box of 4 x 4 x `length` voxels (64 for 4: a scored lesion) that starts at `at` along the last axis."""
    return (4, 8), (4, 8), (at, at + length)


def _box(*starts, length=1):
    """Return a box of 1 x 1 x `length` voxels."""
    return *((start, start + 1) for start in starts[:2]), (starts[2], starts[2] + length)


LESION, CORNERS = [_cube(10)], [((0, 4), (0, 4), (0, 4)), ((8, 12), (8, 12), (56, 60))]
TO_DILATE, OF_50 = [((2, 6), (2, 6), (10, 14))], [((3, 8), (3, 8), (10, 12))]


@pytest.mark.parametrize(
    ('truth', 'prediction', 'dice', 'hd95', 'missed', 'falsePositive'),
    [
        pytest.param(LESION, LESION, 1, 0, 0, 0, id='perfect: scored without the dilation'),
        pytest.param([], [], 1, 0, 0, 0, id='both empty'),
        pytest.param([], [_cube(10), _cube(30)], 0, 374, 0, 2, id='empty truth'),
        pytest.param([_cube(10), _cube(30)], [], 0, 374, 2, 0, id='empty prediction'),
        pytest.param([_cube(10), _cube(20)], LESION, 2 / 3, None, 0, 0, id='six voxels apart: one lesion of 128'),
        pytest.param([_cube(10), _cube(21)], LESION, 1 / 2, 187, 1, 0, id='seven voxels apart: two lesions'),
        pytest.param(TO_DILATE, [_box(8, 8, 13)], 0, None, 0, 0, id='(3, 3, 0) from a corner: 6 would not reach'),
        pytest.param(TO_DILATE, [_box(8, 8, 16)], 0, 374, 1, 1, id='(3, 3, 3) from a corner: 26 would reach'),
        pytest.param(LESION, [*LESION, _box(0, 0, 50)], 1 / 2, 187, 0, 1, id='one false positive voxel'),
        pytest.param(LESION, [*LESION, _box(1, 1, 40), _box(2, 2, 41)], 1 / 2, 187, 0, 1, id='corner: one component'),
        pytest.param(LESION, [*LESION, _box(1, 1, 40), _box(2, 2, 42)], 1 / 3, 748 / 3, 0, 2, id='a gap: two'),
        pytest.param(LESION, [_cube(17)], 0, 374, 1, 1, id='four voxels away: components are not dilated'),
        pytest.param(LESION, [_cube(16)], 0, 6, 0, 0, id='three voxels away: a match'),
        pytest.param([_cube(10, 10)], [_cube(10), _cube(16, 6)], 256 / 320, None, 0, 0, id='union of 64 + 96, whole'),
        pytest.param([_cube(10), _cube(24)], [_cube(10, 18)], 128 / 352, None, 0, 0, id='a bar over two lesions'),
        pytest.param([_cube(10), _cube(24, 2)], [_cube(10, 16)], 128 / 320, None, 0, 0, id='a bar, one is too small'),
        pytest.param(CORNERS, CORNERS[:1], 1 / 2, 187, 1, 0, id='dilations leave the volume: two lesions'),
        pytest.param(OF_50, [], 1, 0, 0, 0, id='50 mm3: no false negative'),
        pytest.param(OF_50, OF_50, 1, 0, 0, 0, id='50 mm3: not scored'),
        pytest.param(OF_50, [_box(3, 3, 14)], 1, 0, 0, 0, id='50 mm3: its match is no false positive'),
        pytest.param([*OF_50, _box(3, 3, 12)], [], 0, 374, 1, 0, id='51 mm3: scored'),
    ],
)
def test_scoreLesions_isHandCounted(truth, prediction, dice, hd95, missed, falsePositive):
    """Dice, HD95 (None: not counted) and numbers of false lesions of WT are those counted by hand."""
    row = metrics.scoreLesions(_volume(*truth), _volume(*prediction)).loc['WT']
    assert row['dice'] == pytest.approx(dice) and row['hd95'] == pytest.approx(
        hd95 if hd95 is not None else row['hd95']
    )
    assert row[['missed', 'falsePositive']].tolist() == [missed, falsePositive]


def test_scoreLesions_measuresInCubicMillimetres():
    """26 voxels are not scored at 1 mm3 and are at 2 mm3: the limit is in mm3, not in voxels."""
    y = _volume(((4, 6), (4, 5), (10, 23)))
    for spacing, expected in (((1, 1, 1), [1, 0, 0, 0]), ((2, 1, 1), [0, 374, 1, 0])):
        assert metrics.scoreLesions(y, _volume(), spacing).loc['WT'].tolist() == expected


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_scoreLesions_distanceEqualsSurfaceDistances():
    """The HD95 of a single lesion equals that of the surface-distance package, with the same spacing."""
    y, yhat = _volume(_cube(10, 10)), _volume(_cube(12, 11), ((2, 7), (5, 6), (15, 19)))
    yhat[np.random.default_rng(0).random(SHAPE) < 0.3] = 0  # ragged, so that the two rules differ
    spacing = (1.0, 1.5, 2.0)
    assert metrics.hausdorff95(y > 0, yhat > 0, spacing) != metrics.hausdorff95(
        y > 0, yhat > 0, spacing, 'surface-distance'
    )
    distances = surface_distance.compute_surface_distances(y > 0, yhat > 0, spacing)
    expected = surface_distance.compute_robust_hausdorff(distances, 95)
    assert metrics.scoreLesions(y, yhat, spacing).loc['WT', 'hd95'] == pytest.approx(expected, abs=1e-6)


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
