"""Check properties that the scores have for any masks."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import metrics
from metrics.rules import RULES

SIDES = st.tuples(st.integers(2, 9), st.integers(2, 9), st.integers(2, 9))
SPACINGS = st.tuples(*[st.sampled_from([0.5, 1.0, 1.25, 3.0])] * 3)


def pairs(elements):
    """Return a strategy for two integer arrays of the same shape, often sparse."""
    return SIDES.flatmap(
        lambda shape: st.tuples(*[arrays(np.uint8, shape, elements=elements, fill=st.sampled_from([0, 1]))] * 2)
    )


CLASSES = pairs(st.integers(0, 3))
many = settings(max_examples=60, deadline=None)


@many
@given(CLASSES, SPACINGS)
def test_scorePatient_isSymmetric(pair, spacing):
    """Swapping truth and prediction keeps Dice and HD95 and swaps sensitivity and precision."""
    there, back = metrics.scorePatient(*pair, spacing), metrics.scorePatient(*pair[::-1], spacing)
    np.testing.assert_allclose(there[['dice', 'hd95']], back[['dice', 'hd95']], rtol=1e-12)
    np.testing.assert_allclose(there.sensitivity, back.precision)


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
@given(st.data(), SPACINGS, st.sampled_from(list(RULES)))
def test_scores_stayWithinTheirBounds(data, spacing, rule):
    """Fractions are 0 to 1, HD95 is 0 to the penalty, of the truth itself 1 and 0; NaN and infinite only by 2026."""
    pair = data.draw(pairs(st.integers(0, 4 if rule in ('BraTS2024', 'BraTS2026') else 3)))
    known = {'dice', 'sensitivity', 'specificity', 'precision', 'nsd0.5', 'nsd1.0'}
    for score in (metrics.scorePatient, metrics.scoreLesions):
        if score is metrics.scoreLesions and rule == 'BraTS2020':
            continue
        table, perfect = score(*pair, spacing, rule=rule), score(pair[0], pair[0], spacing, rule=rule)
        fractions = sorted(known & set(table))
        found, limit = table[fractions], np.inf if rule == 'BraTS2026' else RULES[rule].penalty
        assert rule == 'BraTS2026' or table.notna().all(axis=None)
        assert (found.isna() | found.ge(0) & found.le(1 + 1e-12)).all(axis=None)
        assert (table.hd95.isna() | table.hd95.between(0, limit)).all()
        if rule not in ('BraTS2024', 'BraTS2024-SSA'):  # these remove small lesions of the prediction only
            assert perfect[fractions].isin([1, np.nan]).all(axis=None) and perfect.hd95.isin([0, np.nan]).all()
