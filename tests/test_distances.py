import numpy as np
import pytest
import surface_distance
import torch
from monai.metrics import compute_hausdorff_distance
from scipy import ndimage

import distances
import metrics


def _voxels(shape, *places):
    mask = np.zeros(shape, bool)
    for place in places:
        mask[place] = True
    return mask


def _masks(kind, seed):
    """Two masks of one of several kinds, neither empty, and a spacing, drawn from a seed."""
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
    """Two single voxels two apart along an axis lie twice that axis's spacing apart, at the border of the volume."""
    place = [0, 0, 0]
    place[axis] = 2
    shape = (3, 3, 3)
    truth, prediction = _voxels(shape, (0, 0, 0)), _voxels(shape, tuple(place))
    assert metrics.hausdorff95(truth, prediction, (1.0, 2.5, 4.0), rule) == pytest.approx(expected)


def test_hausdorff95_interpolatesThePercentile():
    """Eleven voxels at 0 to 10 mm from the one predicted: the 95th percentile lies at 9.5 mm."""
    truth, prediction = _voxels((1, 1, 11), (0, 0, slice(None))), _voxels((1, 1, 11), (0, 0, 0))
    assert metrics.hausdorff95(truth, prediction, (1, 1, 1)) == pytest.approx(9.5)


def test_hausdorff95_surfaceIsAcrossFaces():
    """A cube of 5 in the corner of a volume that it fills: its surface is the shell, its middle 1 mm inside it."""
    cube = np.ones((5, 5, 5), bool)
    middle = _voxels((5, 5, 5), (2, 2, 2))
    # 98 voxels of the shell: 6 at 2 mm, ..., 8 corners at sqrt(12); of all, 5 % are 4.85, so a corner decides
    assert metrics.hausdorff95(cube, middle, (1, 1, 1)) == pytest.approx(np.sqrt(12))
    inner = _voxels((5, 5, 5), (slice(1, 4),) * 3)
    # each inner voxel that shows a face lies 1 mm from the shell; of the shell 8 of 98 corners lie sqrt(3) away
    assert metrics.hausdorff95(cube, inner, (1, 1, 1)) == pytest.approx(np.sqrt(3))


@pytest.mark.parametrize(('rule', 'lost'), [('challenge', 373.12866), ('surface-distance', 374.0)])
def test_hausdorff95_emptyRules(rule, lost):
    """Both empty give 0, one empty the rule's constant, whatever the shape and spacing."""
    full, empty = np.ones((3, 4, 5), bool), np.zeros((3, 4, 5), bool)
    assert metrics.hausdorff95(empty, empty, (9, 9, 9), rule) == 0
    assert metrics.hausdorff95(full, empty, (9, 9, 9), rule) == lost
    assert metrics.hausdorff95(empty, full, (9, 9, 9), rule) == lost
    assert metrics.hausdorff95(full, full, (9, 9, 9), rule) == 0


@pytest.mark.parametrize('kind', ['noise', 'points', 'smooth'])
def test_hausdorff95_equalsMonai(kind):
    """On 80 random pairs, borders touched and spacings drawn, it is MONAI's to 1e-4 mm."""
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
    """On 40 random pairs, borders touched and spacings drawn, its rule gives the package's number to 1e-6 mm."""
    for seed in range(40):
        truth, prediction, spacing = _masks(kind, seed)
        expected = _robust(truth, prediction, spacing)
        found = metrics.hausdorff95(truth, prediction, spacing, rule='surface-distance')
        assert found == pytest.approx(expected, abs=1e-6), seed


@pytest.mark.parametrize('spacing', [(1, 1, 1), (0.7, 1.3, 5)])
def test_cornerAreas_equalSurfaceDistances(spacing):
    """The area of each of the 256 ways in which eight voxels can meet is that of the package's table."""
    expected = surface_distance.lookup_tables.create_table_neighbour_code_to_surface_area(spacing)
    isIn = np.arange(256)[:, None] >> np.arange(8) & 1  # the voxels of each of our codes
    theirs = isIn @ surface_distance.lookup_tables.ENCODE_NEIGHBOURHOOD_3D_KERNEL.ravel()
    np.testing.assert_allclose(distances._cornerAreas(spacing), expected[theirs], rtol=1e-12)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.parametrize('spacing', [(1, 1, 1), (0.7, 1.3, 5.0)])
def test_hausdorff95_equalsOnTumors(spacing):
    """On two ellipsoids with ragged edges, most of which lie close together, both rules are their references'."""
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
def test_hausdorff95_isSymmetricAndMoves(rule):
    """Swapping truth and prediction, moving both, or turning the axes with the spacing changes nothing."""
    for seed in range(10):
        truth, prediction, spacing = _masks('smooth', seed)
        found = metrics.hausdorff95(truth, prediction, spacing, rule)
        assert metrics.hausdorff95(prediction, truth, spacing, rule) == pytest.approx(found)
        moved = [np.pad(mask, ((2, 1), (0, 3), (4, 0))) for mask in (truth, prediction)]
        assert metrics.hausdorff95(*moved, spacing, rule) == pytest.approx(found)
        turned = [mask.transpose(2, 0, 1) for mask in (truth, prediction)]
        assert metrics.hausdorff95(*turned, spacing[[2, 0, 1]], rule) == pytest.approx(found)


def test_hausdorff95_refuses():
    """Masks of other shapes or dtypes, a bad spacing and an unknown rule are refused with what was found."""
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
