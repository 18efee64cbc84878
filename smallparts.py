"""Take small predicted parts back, and tune how small is too small."""

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

import config
from counts import asClasses, asSpacing, asVolumes, boxOf
from lesions import labelParts, matchLesions


def relabelSmallET(yhat, N):
    """Gives the prediction with its enhancing tumor turned into necrotic core where there is too little of it.

    Args:
        yhat: tensor or array of integers, classes 0 to 3, one patient; it is not changed.
        N: fewer than so many voxels of enhancing tumor are not believed; 0 believes all. `tuneSmall` finds it.

    Returns:
        a copy of yhat, of its kind.

    Raises:
        ValueError: a dtype or classes that are not classes; a negative N.

    Reference:
        The BraTS 2020 winner (arXiv:2011.00848) had N = 200.
    """
    if N < 0:
        raise ValueError(f'N is {N}; 0 voxels or more were expected.')
    isEnhancing = np.isin(asClasses(yhat, 'yhat'), config.REGIONS['ET'])
    if isEnhancing.sum() >= N:
        isEnhancing[:] = False
    return _replace(yhat, isEnhancing, config.REGIONS['NCR'][0])


def dropSmall(yhat, ml, spacing=(1, 1, 1)):
    """Gives the prediction without its small parts of tumor, which become background.

    Args:
        yhat: tensor or array of integers, classes 0 to 3, one patient; it is not changed.
        ml: 26-connected parts of the whole tumor below this volume are dropped, in ml (1 ml = 1000 mm3); 0 drops none,
            and no part is spared for being the only one. `tuneSmall` finds it.
        spacing: mm between voxels along each axis.

    Returns:
        a copy of yhat, of its kind.

    Raises:
        ValueError: a dtype or classes that are not classes; a negative ml; a spacing that does not fit.
    """
    if ml < 0:
        raise ValueError(f'ml is {ml}; 0 ml or more were expected.')
    classes = asClasses(yhat, 'yhat')
    voxel = np.prod(asSpacing(spacing, classes.ndim)) / 1000
    box = boxOf(classes)
    parts, _ = labelParts(classes[box])
    isSmall = np.bincount(parts.ravel(), minlength=1) * voxel < ml
    dropped = np.zeros(classes.shape, bool)
    dropped[box] = isSmall[parts]
    return _replace(yhat, dropped, 0)


def _replace(yhat, mask, value):
    if isinstance(yhat, torch.Tensor):
        return yhat.masked_fill(torch.from_numpy(mask).to(yhat.device), value)
    out = np.array(yhat)
    out[mask] = value
    return out


class SmallTuning(NamedTuple):
    """What `tuneSmall` found.

    Attributes:
        N: the best number of voxels for `relabelSmallET`.
        ml: the best volume for `dropSmall`, in ml.
        curve: DataFrame with the columns `rule` ('ml' or 'N'), `value` (ml, or voxels), `score` (mean over patients:
            lesion-wise Dice of WT for 'ml', Dice of ET for 'N'), `gained` and `lost` (patients whose score is better or
            worse than at value 0). Each row's score holds up to the next row's value.
        withoutET: patients whose truth has no enhancing tumor.
        carriedBy: how many of those the best N lifts from Dice 0 to 1; nobody else can gain by it.
        lost: patients with enhancing tumor that the best N takes from.
    """

    N: int
    ml: float
    curve: pd.DataFrame
    withoutET: int
    carriedBy: int
    lost: int


def tuneSmall(predictions, spacing=(1, 1, 1)):
    """Finds the ml of `dropSmall` and then the N of `relabelSmallET` that score best; apply them in this order too.

    ml maximises the mean lesion-wise Dice of the whole tumor (2023's rules): there a stray part counts as much as a
    lesion, while a plain Dice hardly sees it. N maximises the mean Dice of the enhancing tumor, with the empty rules,
    of what `dropSmall` leaves. Every value that changes a prediction is tried; of equally good ones the smallest is
    taken, which changes least, so 0 means that the rule does not help.

    Args:
        predictions: dict of patient to (y, yhat) as `engine.predict` gives them, of validation or out-of-fold patients.
            Never of test patients: their scores would no longer be a test.
        spacing: mm between voxels along each axis, of all of them.

    Returns:
        SmallTuning.

    Raises:
        ValueError: no patients; what `metrics.scoreLesions` says of bad input.
    """
    if not predictions:
        raise ValueError('No predictions to tune on; at least one patient was expected.')
    voxel = float(np.prod(asSpacing(spacing, 3))) / 1000
    patients = [_summarizeParts(*asVolumes(*pair), spacing) for pair in predictions.values()]
    volumes = _traceCurve([_scoreDropping(patient) for patient in patients])
    dropped = _bestOf(volumes)
    steps = [_scoreRelabeling(patient, dropped) for patient in patients]
    numbers = _traceCurve(steps)
    relabeled = _bestOf(numbers)
    # a part of n voxels is below the volume of n + 1/2, whatever rounding does; n voxels are fewer than n + 1
    volumes['value'] = np.where(volumes['size'] > 0, (volumes['size'] + 0.5) * voxel, 0.0)
    numbers['value'] = np.where(numbers['size'] > 0, numbers['size'] + 1, 0)
    curve = pd.concat([volumes.assign(rule='ml'), numbers.assign(rule='N')], ignore_index=True)
    best = numbers.set_index('size').loc[relabeled]
    return SmallTuning(
        N=int(best['value']),
        ml=float(volumes.set_index('size').loc[dropped, 'value']),
        curve=curve[['rule', 'value', 'score', 'gained', 'lost']],
        withoutET=sum(patient.trueET == 0 for patient in patients),
        carriedBy=int(best['gained']),
        lost=int(best['lost']),
    )


class _Parts(NamedTuple):
    """What the two rules need to know of one patient; (P,) predicted parts, (L,) lesions of the whole tumor, voxels."""

    sizes: np.ndarray  # (P,)
    enhancing: np.ndarray  # (P,), of each part
    enhancingHit: np.ndarray  # (P,), of those, enhancing in truth
    trueET: int
    lesionSizes: np.ndarray  # (L,), of those that count
    belongs: np.ndarray  # (L, P)
    overlap: np.ndarray  # (L, P)
    isFalse: np.ndarray  # (P,), belongs to no lesion, counted or not


def _summarizeParts(y, yhat, spacing):
    match = matchLesions(y > 0, yhat > 0, spacing)
    isTrue, isPredicted = (np.isin(classes[match.box], config.REGIONS['ET']) for classes in (y, yhat))
    shape = np.array(match.belongs.shape) + 1
    pairs = match.lesions.astype(np.int64) * shape[1] + match.parts
    overlap = np.bincount(pairs.ravel(), minlength=shape.prod()).reshape(shape)[1:, 1:]
    count = lambda mask: np.bincount(match.parts[mask], minlength=shape[1])[1:]  # noqa: E731
    return _Parts(
        sizes=match.partSizes,
        enhancing=count(isPredicted),
        enhancingHit=count(isPredicted & isTrue),
        trueET=int(isTrue.sum()),
        lesionSizes=match.lesionSizes[match.isKept],
        belongs=match.belongs[match.isKept],
        overlap=overlap[match.isKept],
        isFalse=~match.belongs.any(0),
    )


def _scoreDropping(patient):
    """Gives the sizes (K,) of the patient's parts and the lesion-wise Dice (K + 1,) once 0, 1, ... K sizes are gone."""
    sizes = np.unique(patient.sizes)
    scores = []
    for size in [0, *sizes]:
        isLeft = patient.sizes > size
        belongs = patient.belongs & isLeft
        predicted = belongs @ patient.sizes  # voxels of the parts that are left to each lesion
        dice = 2 * (patient.overlap * belongs).sum(1) / (patient.lesionSizes + predicted)
        count = len(dice) + (patient.isFalse & isLeft).sum()
        scores.append(dice.sum() / count if count else 1.0)
    return sizes, scores


def _scoreRelabeling(patient, dropped):
    """Gives the patient's ET voxels (1,) after parts of up to `dropped` voxels went, and the Dice with and without."""
    isLeft = patient.sizes > dropped
    predicted, hit = patient.enhancing[isLeft].sum(), patient.enhancingHit[isLeft].sum()
    whole = predicted + patient.trueET
    return np.array([predicted]), [2 * hit / whole if whole else 1.0, float(patient.trueET == 0)]


def _traceCurve(steps):
    """Gives the mean score over patients at every size where a patient's score may change.

    Args:
        steps: for each patient, ascending sizes (K,) and scores (K + 1,): the first before any size is taken, the next
            once the sizes up to the first are, and so on.

    Returns:
        DataFrame, columns `size` (0 first), `score`, `gained`, `lost` (patients, against size 0).
    """
    sizes = np.unique(np.concatenate([[0], *(own for own, _ in steps)]))
    scores = np.zeros((3, len(sizes)))
    for own, values in steps:
        here = np.asarray(values)[np.searchsorted(own, sizes, side='right')]
        scores += here, here > values[0] + 1e-12, here < values[0] - 1e-12
    return pd.DataFrame(
        {'size': sizes, 'score': scores[0] / len(steps), 'gained': scores[1].astype(int), 'lost': scores[2].astype(int)}
    )


def _bestOf(curve):
    """Gives the smallest size with the best score; a difference that is rounding is none."""
    return int(curve['size'][curve['score'] >= curve['score'].max() - 1e-12].iloc[0])
