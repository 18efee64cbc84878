"""What holds of the scores for any masks whatever."""

import numpy as np
import pytest
import surface_distance
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from monai.metrics import compute_dice, compute_hausdorff_distance

import distances
import metrics

SIDES = st.tuples(st.integers(2, 9), st.integers(2, 9), st.integers(2, 9))
SPACINGS = st.tuples(*[st.sampled_from([0.5, 1.0, 1.25, 3.0])] * 3)


def pairs(elements):
    """Two integer arrays of one shape, sparse ones among them."""
    return SIDES.flatmap(
        lambda shape: st.tuples(*[arrays(np.uint8, shape, elements=elements, fill=st.sampled_from([0, 1]))] * 2)
    )


CLASSES, MASKS = pairs(st.integers(0, 3)), pairs(st.integers(0, 1))
many = settings(max_examples=60, deadline=None)


@many
@given(CLASSES, SPACINGS)
def test_scorePatient_staysWithinItsBounds(pair, spacing):
    """Shares lie in 0 to 1, distances within the volume's diagonal or at the challenge's constant; nothing is NaN."""
    table = metrics.scorePatient(*pair, spacing)
    shares = table[['dice', 'sensitivity', 'specificity', 'precision']].to_numpy()
    assert (shares >= 0).all() and (shares <= 1).all()
    diagonal = np.linalg.norm(np.multiply(pair[0].shape, spacing))
    assert ((table.hd95 <= diagonal) | (table.hd95 == 373.12866)).all() and (table.hd95 >= 0).all()


@many
@given(CLASSES, SPACINGS)
def test_scorePatient_isSymmetric(pair, spacing):
    """With truth and prediction exchanged Dice and HD95 stay; sensitivity and precision change places."""
    there, back = metrics.scorePatient(*pair, spacing), metrics.scorePatient(*pair[::-1], spacing)
    np.testing.assert_allclose(there[['dice', 'hd95']], back[['dice', 'hd95']], rtol=1e-12)
    np.testing.assert_allclose(there.sensitivity, back.precision)


@many
@given(CLASSES)
def test_scorePatient_ofThePerfectPrediction(pair):
    """Whatever it is, a segmentation scores 1 and 0 mm against itself."""
    table = metrics.scorePatient(pair[0], pair[0])
    assert (table[['dice', 'sensitivity', 'precision', 'specificity']] == 1).all(axis=None) and (table.hd95 == 0).all()


@many
@given(CLASSES, st.tuples(*[st.integers(0, 4)] * 3), SPACINGS)
def test_scorePatient_isTheSameAnywhere(pair, shift, spacing):
    """Two segmentations moved together in a larger volume of background score the same, but for specificity."""
    scores = []
    for before in ((2, 2, 2), shift):
        padding = [(1 + first, 7 - first) for first in before]
        scores.append(metrics.scorePatient(*(np.pad(classes, padding) for classes in pair), spacing))
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-12)


@many
@given(st.lists(CLASSES, min_size=2, max_size=4), st.randoms())
def test_summarize_forgetsTheOrderOfPatients(predictions, shuffler):
    """Mean, median, deviation and counts do not depend on who comes first."""
    scores = {f'P{number}': metrics.scorePatient(*pair) for number, pair in enumerate(predictions)}
    order = list(scores)
    shuffler.shuffle(order)
    one = metrics.summarize(metrics.scoreTable(scores))
    other = metrics.summarize(metrics.scoreTable({patient: scores[patient] for patient in order}))
    columns = [column for column in one if column not in ('low', 'high')]
    np.testing.assert_allclose(one[columns].astype(float), other[columns].astype(float), rtol=1e-9)


@many
@given(MASKS, SPACINGS)
@pytest.mark.filterwarnings('ignore')
def test_scores_areMonais(pair, spacing):
    """Dice and HD95 of any two masks that are not empty equal MONAI's."""
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
def test_hausdorff95_isSurfaceDistances(pair, spacing):
    """By its rule, HD95 of any two masks that are not empty equals the surface-distance package's."""
    truth, prediction = (mask.astype(bool) for mask in pair)
    if truth.any() and prediction.any():
        surfaces = surface_distance.compute_surface_distances(truth, prediction, spacing)
        expected = surface_distance.compute_robust_hausdorff(surfaces, 95)
        found = distances.hausdorff95(truth, prediction, spacing, rule='surface-distance')
        assert found == pytest.approx(expected, abs=1e-9)


@many
@given(CLASSES)
def test_scoreLesions_staysWithinItsBounds(pair):
    """Dice in 0 to 1, HD95 in 0 to 374 mm, counts whole; a segmentation against itself is perfect."""
    table = metrics.scoreLesions(*pair)
    assert table.dice.between(0, 1).all() and table.hd95.between(0, 374).all()
    assert (table[['missed', 'falsePositive']] >= 0).all(axis=None)
    assert metrics.scoreLesions(pair[0], pair[0])[['dice', 'hd95']].to_numpy().tolist() == [[1, 0]] * 3
