"""Check properties that the scores have for any masks."""

import numpy as np
import pytest
import surface_distance
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from monai.metrics import compute_dice, compute_hausdorff_distance

import config
import metrics

SIDES = st.tuples(st.integers(2, 9), st.integers(2, 9), st.integers(2, 9))
SPACINGS = st.tuples(*[st.sampled_from([0.5, 1.0, 1.25, 3.0])] * 3)


def pairs(elements):
    """Return a strategy for two integer arrays of the same shape, often sparse."""
    return SIDES.flatmap(
        lambda shape: st.tuples(*[arrays(np.uint8, shape, elements=elements, fill=st.sampled_from([0, 1]))] * 2)
    )


CLASSES, MASKS = pairs(st.integers(0, 3)), pairs(st.integers(0, 1))
many = settings(max_examples=60, deadline=None)


@many
@given(CLASSES, SPACINGS)
def test_scorePatient_staysWithinItsBounds(pair, spacing):
    """Fractions are 0 to 1, distances at most the volume's diagonal or the challenge's constant; nothing is NaN."""
    table = metrics.scorePatient(*pair, spacing)
    fractions = table[['dice', 'sensitivity', 'specificity', 'precision']].to_numpy()
    assert (fractions >= 0).all() and (fractions <= 1).all()
    diagonal = np.linalg.norm(np.multiply(pair[0].shape, spacing))
    assert ((table.hd95 <= diagonal) | (table.hd95 == 373.12866)).all() and (table.hd95 >= 0).all()


@many
@given(CLASSES, SPACINGS)
def test_scorePatient_isSymmetric(pair, spacing):
    """Swapping truth and prediction keeps Dice and HD95 and swaps sensitivity and precision."""
    there, back = metrics.scorePatient(*pair, spacing), metrics.scorePatient(*pair[::-1], spacing)
    np.testing.assert_allclose(there[['dice', 'hd95']], back[['dice', 'hd95']], rtol=1e-12)
    np.testing.assert_allclose(there.sensitivity, back.precision)


@many
@given(CLASSES)
def test_scorePatient_ofAPerfectPrediction(pair):
    """Any segmentation compared with itself scores 1 and 0 mm."""
    table = metrics.scorePatient(pair[0], pair[0])
    assert (table[['dice', 'sensitivity', 'precision', 'specificity']] == 1).all(axis=None) and (table.hd95 == 0).all()


@many
@given(CLASSES, st.tuples(*[st.integers(0, 4)] * 3), SPACINGS)
def test_scorePatient_isTheSameAnywhere(pair, shift, spacing):
    """Moving truth and prediction together inside a larger volume does not change the scores."""
    scores = []
    for before in ((2, 2, 2), shift):
        padding = [(1 + first, 7 - first) for first in before]
        scores.append(metrics.scorePatient(*(np.pad(classes, padding) for classes in pair), spacing))
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-12)


@many
@given(st.lists(CLASSES, min_size=2, max_size=4), st.randoms())
def test_summarize_ignoresTheOrderOfPatients(predictions, shuffler):
    """The summary, intervals included, does not depend on the order of the patients."""
    config.BOOTSTRAP_RESAMPLES = 100
    scores = {f'P{number}': metrics.scorePatient(*pair) for number, pair in enumerate(predictions)}
    order = list(scores)
    shuffler.shuffle(order)
    one = metrics.summarize(metrics.scoreTable(scores))
    other = metrics.summarize(metrics.scoreTable({patient: scores[patient] for patient in order}))
    np.testing.assert_allclose(one.astype(float), other.astype(float), rtol=1e-9, atol=1e-12)


@many
@given(MASKS, SPACINGS)
@pytest.mark.filterwarnings('ignore')
def test_scorePatient_equalsMonai(pair, spacing):
    """Dice and HD95 of any two nonempty masks equal MONAI's."""
    truth, prediction = (mask.astype(bool) for mask in pair)
    if truth.any() and prediction.any():
        tensors = [torch.from_numpy(mask)[None, None] for mask in (prediction, truth)]
        found = metrics.scorePatient(2 * truth, 2 * prediction, spacing).loc['WT']
        assert found.dice == pytest.approx(float(compute_dice(*tensors, include_background=True)), abs=1e-6)
        expected = compute_hausdorff_distance(*tensors, include_background=True, percentile=95, spacing=spacing)
        assert found.hd95 == pytest.approx(float(expected), abs=1e-4)


@many
@given(MASKS, SPACINGS)
@pytest.mark.filterwarnings('ignore')
def test_hausdorff95_equalsSurfaceDistance(pair, spacing):
    """Under its rule, HD95 of any two nonempty masks equals that of the surface-distance package."""
    truth, prediction = (mask.astype(bool) for mask in pair)
    if truth.any() and prediction.any():
        surfaces = surface_distance.compute_surface_distances(truth, prediction, spacing)
        expected = surface_distance.compute_robust_hausdorff(surfaces, 95)
        found = metrics.hausdorff95(truth, prediction, spacing, rule='surface-distance')
        assert found == pytest.approx(expected, abs=1e-9)


@many
@given(CLASSES)
def test_scoreLesions_staysWithinItsBounds(pair):
    """Dice is 0 to 1, HD95 0 to 374 mm and no count negative; a segmentation compared with itself is perfect."""
    table = metrics.scoreLesions(*pair)
    assert table.dice.between(0, 1).all() and table.hd95.between(0, 374).all()
    assert (table[['missed', 'falsePositive']] >= 0).all(axis=None)
    assert metrics.scoreLesions(pair[0], pair[0])[['dice', 'hd95']].to_numpy().tolist() == [[1, 0]] * 3


@many
@given(pairs(st.integers(0, 4)))
def test_scoreLesions_of2026OfAPerfectPrediction(pair):
    """Any segmentation compared with itself has no false lesion; its scores are perfect, or NaN without the region."""
    table = metrics.scoreLesions(pair[0], pair[0], rule='BraTS2026')
    assert (table[['missed', 'falsePositive']] == 0).all(axis=None)
    assert table.dice.isin([1, np.nan]).all() and table.hd95.isin([0, np.nan]).all()


@many
@given(pairs(st.integers(0, 4)), SPACINGS, st.sampled_from(['BraTS2024', 'BraTS2026']))
def test_scores_stayWithinTheirBoundsByAnyRule(pair, spacing, rule):
    """Dice and NSD are 0 to 1 and HD95 not negative, or NaN; of 2024 no score is NaN and HD95 is 337 mm at most."""
    for table in (metrics.scoreLesions(*pair, spacing, rule), metrics.scorePatient(*pair, spacing, rule)):
        fractions = table[[name for name in table if name == 'dice' or (name[:3] == 'nsd' and 'Std' not in name)]]
        assert (fractions.isna() | fractions.ge(0) & fractions.le(1 + 1e-12)).all(axis=None)
        assert (table.hd95.isna() | (table.hd95 >= 0)).all()
        if rule == 'BraTS2024':
            assert table.notna().all(axis=None) and (table.hd95 <= 337).all()
