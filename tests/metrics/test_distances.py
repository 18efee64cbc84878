import numpy as np
import pytest
import surface_distance
import torch
from monai.metrics import compute_hausdorff_distance
from scipy import ndimage

import metrics
from metrics import distances

OTHER_RULE = 'surface-distance'


def _voxels(shape, *places):
    mask = np.zeros(shape, bool)
    for place in places:
        mask[place] = True
    return mask


def _masks(kind, seed):
    """Return two random masks of a kind, neither empty, and a spacing."""
    generator = np.random.default_rng([seed, len(kind)])
    shape = tuple(generator.integers(3, 16, 3))
    masks = []
    for _ in range(2):
        if kind == 'noise':
            mask = generator.random(shape) < generator.uniform(0.05, 0.9)
        elif kind == 'points':
            mask = generator.random(shape) < 0.02
        else:
            smooth = ndimage.gaussian_filter(generator.standard_normal(shape), 1.5)
            mask = smooth > np.quantile(smooth, generator.uniform(0.4, 0.95))
        mask[tuple(generator.integers(0, shape))] = True
        masks.append(mask)
    return *masks, np.ones(3) if seed % 2 else generator.uniform(0.4, 4, 3).round(2)


def _robust(truth, prediction, spacing):
    return surface_distance.compute_robust_hausdorff(
        surface_distance.compute_surface_distances(truth, prediction, spacing), 95
    )


@pytest.mark.parametrize('rule', ['challenge', 'surface-distance'])
@pytest.mark.parametrize(('axis', 'expected'), [(0, 2 * 1.0), (1, 2 * 2.5), (2, 2 * 4.0)])
def test_hausdorff95_ofTwoVoxels(rule, axis, expected):
    """The distance of two voxels two steps apart along an axis is twice the spacing of that axis."""
    place = [0, 0, 0]
    place[axis] = 2
    shape = (3, 3, 3)
    truth, prediction = _voxels(shape, (0, 0, 0)), _voxels(shape, tuple(place))
    assert metrics.hausdorff95(truth, prediction, (1.0, 2.5, 4.0), rule) == pytest.approx(expected)


def test_hausdorff95_interpolatesThePercentile():
    """For eleven voxels at 0 to 10 mm from the predicted one, the 95th percentile is 9.5 mm."""
    truth, prediction = _voxels((1, 1, 11), (0, 0, slice(None))), _voxels((1, 1, 11), (0, 0, 0))
    assert metrics.hausdorff95(truth, prediction, (1, 1, 1)) == pytest.approx(9.5)


def test_hausdorff95_surfaceIsAcrossFaces():
    """The surface of a cube of 5 voxels that fills the volume is its shell, edges and corners included."""
    cube = np.ones((5, 5, 5), bool)
    middle = _voxels((5, 5, 5), (2, 2, 2))
    # the shell has 98 voxels, 8 of them corners at sqrt(12) mm; the 4.85 (5 %) farthest are all corners
    assert metrics.hausdorff95(cube, middle, (1, 1, 1)) == pytest.approx(np.sqrt(12))
    inner = _voxels((5, 5, 5), (slice(1, 4),) * 3)
    # the surface of the inner cube is 1 mm from the shell, the 8 corners of the shell are sqrt(3) mm from it
    assert metrics.hausdorff95(cube, inner, (1, 1, 1)) == pytest.approx(np.sqrt(3))


@pytest.mark.parametrize(('rule', 'penalty'), [('challenge', 373.12866), ('surface-distance', 374.0)])
def test_hausdorff95_ofEmptyMasks(rule, penalty):
    """HD95 is 0 if both masks are empty and the rule's constant if one is, whatever the spacing."""
    full, empty = np.ones((3, 4, 5), bool), np.zeros((3, 4, 5), bool)
    assert metrics.hausdorff95(empty, empty, (9, 9, 9), rule) == 0
    assert metrics.hausdorff95(full, empty, (9, 9, 9), rule) == penalty
    assert metrics.hausdorff95(empty, full, (9, 9, 9), rule) == penalty
    assert metrics.hausdorff95(full, full, (9, 9, 9), rule) == 0


@pytest.mark.parametrize('kind', ['noise', 'points', 'smooth'])
def test_hausdorff95_equalsMonai(kind):
    """On 80 random pairs of masks with random spacing it equals MONAI's to 1e-4 mm."""
    for seed in range(80):
        truth, prediction, spacing = _masks(kind, seed)
        expected = compute_hausdorff_distance(
            torch.from_numpy(prediction)[None, None],
            torch.from_numpy(truth)[None, None],
            include_background=True,
            percentile=95,
            spacing=list(spacing),
        )
        assert metrics.hausdorff95(truth, prediction, spacing) == pytest.approx(expected.item(), abs=1e-4), seed


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.parametrize('kind', ['noise', 'points', 'smooth'])
def test_hausdorff95_equalsSurfaceDistance(kind):
    """On 40 random pairs of masks with random spacing it equals the package's to 1e-6 mm under its rule."""
    for seed in range(40):
        truth, prediction, spacing = _masks(kind, seed)
        expected = _robust(truth, prediction, spacing)
        found = metrics.hausdorff95(truth, prediction, spacing, rule='surface-distance')
        assert found == pytest.approx(expected, abs=1e-6), seed


def test_hausdorff95_rulesDiffer():
    """On 120 random pairs with 1 mm voxels the rules differ by 0.4 mm on average and by up to 1 mm (docs/scores.md)."""
    pairs = [_masks(kind, seed) for kind in ('noise', 'points', 'smooth') for seed in range(1, 80, 2)]
    differences = [abs(metrics.hausdorff95(*pair) - metrics.hausdorff95(*pair, rule=OTHER_RULE)) for pair in pairs]
    assert [np.mean(differences), np.max(differences)] == pytest.approx([0.4, 1], abs=0.02)


@pytest.mark.parametrize('spacing', [(1, 1, 1), (0.7, 1.3, 5)])
def test_cornerAreas_equalThePackagesTable(spacing):
    """The area of each of the 256 patterns of eight voxels equals the entry of the surface-distance package."""
    expected = surface_distance.lookup_tables.create_table_neighbour_code_to_surface_area(spacing)
    isIn = np.arange(256)[:, None] >> np.arange(8) & 1  # which voxels each code holds
    expectedCode = isIn @ surface_distance.lookup_tables.ENCODE_NEIGHBOURHOOD_3D_KERNEL.ravel()
    np.testing.assert_allclose(distances._cornerAreas(spacing), expected[expectedCode], rtol=1e-12)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.parametrize('spacing', [(1, 1, 1), (0.7, 1.3, 5.0)])
def test_hausdorff95_equalsReferencesOnTumors(spacing):
    """On two ellipsoids with ragged edges, most of which are close together, both rules equal their references."""
    generator = np.random.default_rng(0)
    grid = np.indices((30, 34, 32))
    masks = []
    for shift in (0, 2):
        away = sum(((axis - 15 - shift) / radius) ** 2 for axis, radius in zip(grid, (9, 11, 10), strict=True))
        masks.append(away + 0.2 * generator.standard_normal(away.shape) < 1)
    tensors = [torch.from_numpy(mask)[None, None] for mask in masks]
    monai = compute_hausdorff_distance(*tensors, include_background=True, percentile=95, spacing=list(spacing))
    assert metrics.hausdorff95(*masks, spacing) == pytest.approx(monai.item(), abs=1e-4)
    found = metrics.hausdorff95(*masks, spacing, rule='surface-distance')
    assert found == pytest.approx(_robust(*masks, spacing), abs=1e-6)


@pytest.mark.parametrize('rule', ['challenge', 'surface-distance'])
def test_hausdorff95_isInvariant(rule):
    """Swapping the masks, moving both, or permuting axes and spacing does not change the result."""
    for seed in range(10):
        truth, prediction, spacing = _masks('smooth', seed)
        found = metrics.hausdorff95(truth, prediction, spacing, rule)
        assert metrics.hausdorff95(prediction, truth, spacing, rule) == pytest.approx(found)
        moved = [np.pad(mask, ((2, 1), (0, 3), (4, 0))) for mask in (truth, prediction)]
        assert metrics.hausdorff95(*moved, spacing, rule) == pytest.approx(found)
        turned = [mask.transpose(2, 0, 1) for mask in (truth, prediction)]
        assert metrics.hausdorff95(*turned, spacing[[2, 0, 1]], rule) == pytest.approx(found)


def test_hausdorff95_pooledCountsBothDirections():
    """Eleven voxels at 0 to 10 mm from the predicted one, and that at 0 mm: of the twelve distances 9.45 mm."""
    truth, prediction = _voxels((1, 1, 11), (0, 0, slice(None))), _voxels((1, 1, 11), (0, 0, 0))
    assert metrics.hausdorff95(truth, prediction, (1, 1, 1), 'pooled') == pytest.approx(9.45)
    assert metrics.hausdorff95(prediction, truth, (5, 5, 2), 'pooled') == pytest.approx(18.9)
    empty = np.zeros((1, 1, 11), bool)
    assert metrics.hausdorff95(empty, truth, rule='pooled') == 373 and metrics.hausdorff95(empty, empty) == 0


@pytest.mark.parametrize(('tolerance', 'within'), [(0, 1), (0.5, 1), (1, 2), (2.4, 3), (100, 11)])
def test_surfaceDice_isTheMeanOfBothFractions(tolerance, within):
    """Of eleven voxels some are within the tolerance of the predicted one, which is one of them: the mean of both."""
    truth, prediction = _voxels((1, 1, 11), (0, 0, slice(None))), _voxels((1, 1, 11), (0, 0, 0))
    expected = pytest.approx((within / 11 + 1) / 2)
    assert metrics.surfaceDice(truth, prediction, tolerance) == expected
    assert metrics.surfaceDice(prediction, truth, tolerance) == expected


def test_surfaceDice_measuresInMmAlongEachAxis():
    """A mask moved by one voxel lies within a tolerance from the spacing of that axis on."""
    cube = _voxels((7, 7, 7), (slice(2, 4), slice(2, 4), slice(2, 4)))
    for axis, spacing in enumerate((1.0, 2.5, 4.0)):
        moved = np.roll(cube, 2, axis)  # no common voxel: half of the surface is one voxel away, half two
        assert metrics.surfaceDice(cube, moved, 0.99 * spacing, (1.0, 2.5, 4.0)) == 0
        assert metrics.surfaceDice(cube, moved, spacing, (1.0, 2.5, 4.0)) == pytest.approx(1 / 2)


def test_surfaceDice_surfaceIncludesTheBorder():
    """A mask that fills the volume has its shell as surface: of 98 voxels, none is the middle one of the other."""
    cube, middle = np.ones((5, 5, 5), bool), _voxels((5, 5, 5), (2, 2, 2))
    assert metrics.surfaceDice(cube, middle, 0.5) == 0  # the middle is within the cube, not on its surface
    assert metrics.surfaceDice(cube, middle, 2) == pytest.approx((6 / 98 + 1) / 2)


@pytest.mark.parametrize('rule', ['challenge', 'surface-distance'])
def test_surfaceDice_ofEmptyMasks(rule):
    """1 if both masks are empty, 0 if one is, 1 of a mask with itself."""
    full, empty = np.ones((3, 4, 5), bool), np.zeros((3, 4, 5), bool)
    found = [metrics.surfaceDice(*pair, 1, rule=rule) for pair in ((empty, empty), (full, empty), (empty, full))]
    assert found == [1, 0, 0] and metrics.surfaceDice(full, full, 0, rule=rule) == 1


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.parametrize('kind', ['noise', 'points', 'smooth'])
def test_surfaceDice_equalsSurfaceDistance(kind):
    """On 40 random pairs of masks with random spacing, at four tolerances, it equals the package's under its rule."""
    for seed in range(40):
        truth, prediction, spacing = _masks(kind, seed)
        surfaces = surface_distance.compute_surface_distances(truth, prediction, spacing)
        for tolerance in (0.5, 1.0, 2.001, 6.501):
            expected = surface_distance.compute_surface_dice_at_tolerance(surfaces, tolerance)
            found = metrics.surfaceDice(truth, prediction, tolerance, spacing, rule='surface-distance')
            assert found == pytest.approx(expected, abs=1e-9), (seed, tolerance)


def test_surfaceDice_refusesBadArguments():
    """A negative tolerance, an unknown rule and other masks raise an error that names what was found."""
    mask = np.ones((2, 2, 2), bool)
    with pytest.raises(ValueError, match='tolerance is -1; 0 mm or more'):
        metrics.surfaceDice(mask, mask, -1)
    with pytest.raises(ValueError, match="rule is 'pooled'"):
        metrics.surfaceDice(mask, mask, 1, rule='pooled')
    with pytest.raises(ValueError, match='truth is int64'):
        metrics.surfaceDice(mask.astype(np.int64), mask, 1)
    with pytest.raises(ValueError, match='2 axes'):
        metrics.surfaceDice(mask[0], mask[0], 1, (1, 1), rule='surface-distance')


def test_hausdorff95_refusesBadArguments():
    """Other shapes or dtypes, a bad spacing and an unknown rule raise an error that names what was found."""
    mask = np.ones((2, 2, 2), bool)
    with pytest.raises(ValueError, match=r'prediction bool \(2, 2, 1\)'):
        metrics.hausdorff95(mask, mask[:, :, :1], (1, 1, 1))
    with pytest.raises(ValueError, match='truth is int64'):
        metrics.hausdorff95(mask.astype(np.int64), mask, (1, 1, 1))
    for spacing in ((1, 1), (1, 0, 1), (1, -1, 1), (1, np.nan, 1)):
        with pytest.raises(ValueError, match=r'spacing is .*; 3 numbers above 0'):
            metrics.hausdorff95(mask, mask, spacing)
    with pytest.raises(ValueError, match="rule is 'other'"):
        metrics.hausdorff95(mask, mask, (1, 1, 1), rule='other')
    with pytest.raises(ValueError, match='2 axes'):
        metrics.hausdorff95(mask[0], mask[0], (1, 1), rule='surface-distance')
