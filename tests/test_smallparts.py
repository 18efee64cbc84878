import numpy as np
import pytest
import torch
from scipy import ndimage

import metrics


def _patient(trueET, predictedET, shape=(6, 6, 6)):
    """Truth and prediction with so many voxels of ET, counted from the same corner on; the rest is edema."""
    y, yhat = np.full((2, *shape), 2)
    y.ravel()[:trueET] = 3
    yhat.ravel()[:predictedET] = 3
    return y, yhat


@pytest.mark.parametrize('kind', [torch.from_numpy, np.asarray])
def test_relabelSmallET_belowN(kind):
    """Two voxels of ET become NCR for N = 3, not for N = 2; input, other classes, type and dtype stay."""
    classes = np.array([[[0, 1, 2], [3, 3, 0]]], np.int16)
    yhat = kind(classes.copy())
    relabeled = metrics.relabelSmallET(yhat, 3)
    assert type(relabeled) is type(yhat) and relabeled.dtype == yhat.dtype
    assert relabeled.tolist() == [[[0, 1, 2], [1, 1, 0]]] and yhat.tolist() == classes.tolist()
    kept = metrics.relabelSmallET(yhat, 2)
    kept[:] = 0
    assert metrics.relabelSmallET(yhat, 2).tolist() == yhat.tolist() == classes.tolist()


@pytest.mark.parametrize('kind', [torch.from_numpy, np.asarray])
def test_dropSmall_belowMl(kind):
    """Of a part of two voxels across a corner (2 mm3) and one of one, below 2 mm3 only the one goes."""
    classes = np.zeros((4, 4, 4), np.uint8)
    classes[0, 0, 0], classes[1, 1, 1], classes[3, 3, 3] = 1, 3, 2
    yhat = kind(classes.copy())
    dropped = metrics.dropSmall(yhat, 0.002)
    assert type(dropped) is type(yhat) and dropped.dtype == yhat.dtype and yhat.tolist() == classes.tolist()
    assert (dropped[0, 0, 0], dropped[1, 1, 1], dropped[3, 3, 3]) == (1, 3, 0)
    assert not metrics.dropSmall(yhat, 0.0021).any()
    assert metrics.dropSmall(yhat, 0).tolist() == classes.tolist()


def test_dropSmall_countsMillimetres():
    """One voxel of 8 mm3 is not below 8 mm3 and is below 9; an empty prediction stays empty."""
    yhat = np.zeros((3, 3, 3), int)
    assert not metrics.dropSmall(yhat, 1).any()
    yhat[1, 1, 1] = 2
    assert metrics.dropSmall(yhat, 0.008, spacing=(2, 2, 2)).any()
    assert not metrics.dropSmall(yhat, 0.009, spacing=(2, 2, 2)).any()


def test_smallParts_refuse():
    """Negative sizes, labels that are not classes and no patients are refused."""
    yhat = np.zeros((3, 3, 3), int)
    with pytest.raises(ValueError, match='N is -1'):
        metrics.relabelSmallET(yhat, -1)
    with pytest.raises(ValueError, match=r'ml is -0\.5'):
        metrics.dropSmall(yhat, -0.5)
    with pytest.raises(ValueError, match='reaches from 0 to 4'):
        metrics.relabelSmallET(yhat + np.eye(3, dtype=int) * 4, 5)
    with pytest.raises(ValueError, match='spacing'):
        metrics.dropSmall(yhat, 1, spacing=(1, 1))
    with pytest.raises(ValueError, match='at least one patient'):
        metrics.tuneSmall({})


def test_tuneSmall_handCounted():
    """A patient without ET has 2 voxels of it predicted, one with ET 5: N = 3 lifts the mean from 2/3 to 1."""
    predictions = {'a': _patient(0, 2), 'b': _patient(5, 5), 'c': _patient(9, 9)}
    tuning = metrics.tuneSmall(predictions)
    assert (tuning.N, tuning.withoutET, tuning.carriedBy, tuning.lost) == (3, 1, 1, 0)
    curve = tuning.curve[tuning.curve['rule'] == 'N']
    assert curve['value'].tolist() == [0, 3, 6, 10]
    np.testing.assert_allclose(curve['score'], [2 / 3, 1, 2 / 3, 1 / 3])
    assert curve['gained'].tolist() == [0, 1, 1, 1] and curve['lost'].tolist() == [0, 0, 1, 2]


def test_tuneSmall_takesTheSmallestOfEquals():
    """Where no value helps, or one gains what it loses, N and ml are 0."""
    even = {'a': _patient(0, 5), 'b': _patient(4, 4)}
    tuning = metrics.tuneSmall(even)
    assert (tuning.N, tuning.carriedBy, tuning.lost) == (0, 0, 0)
    found = np.zeros((8, 8, 8), int)
    found[2:6, 2:6, 2:6] = 2
    assert metrics.tuneSmall({'a': (found, found)})[:2] == (0, 0)


def test_tuneSmall_dropsStrayParts():
    """A found lesion of 64 voxels and a stray part of 3: above 3 and below 4 mm3 the score goes from 1/2 to 1."""
    y = np.zeros((10, 10, 30), int)
    y[3:7, 3:7, 2:6] = 2
    yhat = y.copy()
    yhat[0, 0, 25:28] = 3
    tuning = metrics.tuneSmall({'a': (y, yhat)})
    assert 0.003 < tuning.ml < 0.004 and (metrics.dropSmall(yhat, tuning.ml) == y).all()
    curve = tuning.curve[tuning.curve['rule'] == 'ml']
    assert curve['score'].tolist() == [0.5, 1, 0]
    assert tuning.curve.loc[tuning.curve['rule'] == 'N', 'score'].tolist() == [
        1
    ]  # what was dropped is no ET to relabel
    coarse = metrics.tuneSmall({'a': (y, yhat)}, spacing=(1, 1, 2))
    assert 0.006 < coarse.ml < 0.008


def test_tuneSmall_equalsScoringEveryCandidate():
    """On random patients each point of both curves is the mean of the scores of what the two rules give."""
    generator = np.random.default_rng(3)
    predictions = {}
    for number in range(5):
        noise = [ndimage.gaussian_filter(generator.standard_normal((14, 16, 18)), 1) for _ in range(3)]
        truth, other = noise[0], noise[0] + 0.6 * noise[1]
        y, yhat = (np.where(field > 0.25, 2, 0) for field in (truth, other))
        y[(truth > 0.45) & (number != 2)] = 3
        yhat[other > 0.45 + 0.1 * generator.random()] = 3
        predictions[number] = y, yhat
    tuning = metrics.tuneSmall(predictions)
    for rule, value, score in tuning.curve[['rule', 'value', 'score']].itertuples(index=False):
        scores = []
        for y, yhat in predictions.values():
            if rule == 'ml':
                scores.append(metrics.scoreLesions(y, metrics.dropSmall(yhat, value)).loc['WT', 'dice'])
            else:
                relabeled = metrics.relabelSmallET(metrics.dropSmall(yhat, tuning.ml), value)
                hit, whole = ((y == 3) & (relabeled == 3)).sum(), (y == 3).sum() + (relabeled == 3).sum()
                scores.append(2 * hit / whole if whole else 1)
        assert score == pytest.approx(np.mean(scores)), (rule, value)
    best = tuning.curve.groupby('rule')['score'].max()
    at = tuning.curve.set_index(['rule', 'value'])['score']
    assert at['N', tuning.N] == best['N'] and at['ml', tuning.ml] == best['ml']
