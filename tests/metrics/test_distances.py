import numpy as np
import pytest
import surface_distance
import torch
from monai.metrics import compute_hausdorff_distance
from scipy import ndimage

import metrics

PENALTIES = {'challenge': 373.12866, 'surface-distance': 374, 'pooled': 373}
LINE = np.ones((1, 1, 11), bool)


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
    for shift in (0, 2):
        if kind == 'noise':
            mask = generator.random(shape) < generator.uniform(0.05, 0.9)
        elif kind == 'points':
            mask = generator.random(shape) < 0.02
        elif kind == 'smooth':
            smooth = ndimage.gaussian_filter(generator.standard_normal(shape), 1.5)
            mask = smooth > np.quantile(smooth, generator.uniform(0.4, 0.95))
        else:  # an ellipsoid with a ragged edge, close to the other
            grid = np.moveaxis(np.indices((30, 34, 32)), 0, -1)
            mask = (((grid - 15 - shift) / (9, 11, 10)) ** 2).sum(-1) + generator.normal(0, 0.2, grid.shape[:3]) < 1
        mask[tuple(generator.integers(0, shape))] = True
        masks.append(mask)
    return *masks, np.ones(3) if seed % 2 else generator.uniform(0.4, 4, 3).round(2)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.parametrize(('kind', 'numPairs'), [('noise', 80), ('points', 80), ('smooth', 80), ('tumor', 4)])
def test_distances_equalTheReferences(kind, numPairs):
    """On random pairs with random spacing HD95 equals MONAI's to 1e-4 mm, by the other rule surface-distance's to 1e-6.

    So does the surface Dice of that rule, at four tolerances.
    """
    for seed in range(numPairs):
        truth, prediction, spacing = _masks(kind, seed)
        tensors = [torch.from_numpy(mask)[None, None] for mask in (prediction, truth)]
        expected = compute_hausdorff_distance(*tensors, include_background=True, percentile=95, spacing=list(spacing))
        assert metrics.hausdorff95(truth, prediction, spacing) == pytest.approx(expected.item(), abs=1e-4), seed
        if seed < 40:
            surfaces = surface_distance.compute_surface_distances(truth, prediction, spacing)
            expected = surface_distance.compute_robust_hausdorff(surfaces, 95)
            found = metrics.hausdorff95(truth, prediction, spacing, 'surface-distance')
            assert found == pytest.approx(expected, abs=1e-6), seed
            for tolerance in (0.5, 1.0, 2.001, 6.501):
                expected = surface_distance.compute_surface_dice_at_tolerance(surfaces, tolerance)
                found = metrics.surfaceDice(truth, prediction, tolerance, spacing, 'surface-distance')
                assert found == pytest.approx(expected, abs=1e-9), (seed, tolerance)


@pytest.mark.parametrize('rule', PENALTIES)
def test_distances_ofEmptyMasks(rule):
    """Both empty is perfect; one empty has the rule's constant, whatever the spacing, and a surface Dice of 0."""
    full, empty, spacing = np.ones((3, 4, 5), bool), np.zeros((3, 4, 5), bool), (9, 9, 9)
    pairs = ((full, full), (empty, empty), (full, empty), (empty, full))
    assert [metrics.hausdorff95(*pair, spacing, rule) for pair in pairs] == [0, 0, PENALTIES[rule], PENALTIES[rule]]
    if rule != 'pooled':
        assert [metrics.surfaceDice(*pair, 0, spacing, rule) for pair in pairs] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        ({'prediction': np.ones((2, 2, 1), bool)}, r'prediction bool \(2, 2, 1\)'),
        ({'truth': np.ones((2, 2, 2), int)}, 'truth is int64'),
        *[
            ({'spacing': spacing}, 'spacing is .*; 3 numbers above 0')
            for spacing in ((1, 1), (1, 0, 1), (1, np.nan, 1))
        ],
        ({'rule': 'other'}, "rule is 'other'"),
        ({'truth': LINE[0], 'prediction': LINE[0], 'spacing': (1, 1), 'rule': 'surface-distance'}, '2 axes'),
    ],
)
def test_distances_refuseBadArguments(change, words):
    """Other shapes or dtypes, a bad spacing and an unknown rule raise an error that names what was found."""
    mask = np.ones((2, 2, 2), bool)
    given = {'truth': mask, 'prediction': mask} | change
    with pytest.raises(ValueError, match=words):
        metrics.hausdorff95(**given)
    with pytest.raises(ValueError, match=words):
        metrics.surfaceDice(tolerance=1, **given)


def test_surfaceDice_refusesOtherTolerancesAndRules():
    """A negative tolerance, and the pooled rule of the HD95, are refused."""
    with pytest.raises(ValueError, match='tolerance is -1; 0 mm or more'):
        metrics.surfaceDice(LINE, LINE, -1)
    with pytest.raises(ValueError, match="rule is 'pooled'"):
        metrics.surfaceDice(LINE, LINE, 1, rule='pooled')


@pytest.mark.parametrize('rule', ['challenge', 'surface-distance'])
@pytest.mark.parametrize(('axis', 'expected'), [(0, 2 * 1.0), (1, 2 * 2.5), (2, 2 * 4.0)])
def test_hausdorff95_ofTwoVoxels(rule, axis, expected):
    """The distance of two voxels two steps apart along an axis is twice the spacing of that axis."""
    truth = _voxels((3, 3, 3), (0, 0, 0))
    prediction = np.roll(truth, 2, axis)
    assert metrics.hausdorff95(truth, prediction, (1.0, 2.5, 4.0), rule) == pytest.approx(expected)


def test_hausdorff95_interpolatesThePercentile():
    """For eleven voxels at 0 to 10 mm from the predicted one it is 9.5 mm, or 9.45 of the twelve pooled distances."""
    prediction = _voxels(LINE.shape, (0, 0, 0))
    assert metrics.hausdorff95(LINE, prediction) == pytest.approx(9.5)
    assert metrics.hausdorff95(LINE, prediction, rule='pooled') == pytest.approx(9.45)
    assert metrics.hausdorff95(prediction, LINE, (5, 5, 2), 'pooled') == pytest.approx(18.9)


def test_hausdorff95_surfaceIsAcrossFaces():
    """The surface of a cube of 5 voxels that fills the volume is its shell, edges and corners included."""
    cube = np.ones((5, 5, 5), bool)
    middle = _voxels((5, 5, 5), (2, 2, 2))
    # the shell has 98 voxels, 8 of them corners at sqrt(12) mm; the 4.85 (5 %) farthest are all corners
    assert metrics.hausdorff95(cube, middle, (1, 1, 1)) == pytest.approx(np.sqrt(12))
    inner = _voxels((5, 5, 5), (slice(1, 4),) * 3)
    # the surface of the inner cube is 1 mm from the shell, the 8 corners of the shell are sqrt(3) mm from it
    assert metrics.hausdorff95(cube, inner, (1, 1, 1)) == pytest.approx(np.sqrt(3))


def test_hausdorff95_rulesDiffer():
    """On 120 random pairs with 1 mm voxels the rules differ by 0.4 mm on average and by up to 1 mm (docs/scores.md)."""
    pairs = [_masks(kind, seed) for kind in ('noise', 'points', 'smooth') for seed in range(1, 80, 2)]
    found = np.array(
        [[metrics.hausdorff95(*pair, rule) for rule in ('challenge', 'surface-distance')] for pair in pairs]
    )
    differences = np.abs(found[:, 0] - found[:, 1])
    assert [np.mean(differences), np.max(differences)] == pytest.approx([0.4, 1], abs=0.02)


@pytest.mark.parametrize(('tolerance', 'within'), [(0, 1), (0.5, 1), (1, 2), (2.4, 3), (100, 11)])
def test_surfaceDice_isTheMeanOfBothFractions(tolerance, within):
    """Of eleven voxels some are within the tolerance of the predicted one, which is one of them: the mean of both."""
    prediction, expected = _voxels(LINE.shape, (0, 0, 0)), pytest.approx((within / 11 + 1) / 2)
    assert metrics.surfaceDice(LINE, prediction, tolerance) == expected
    assert metrics.surfaceDice(prediction, LINE, tolerance) == expected


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
