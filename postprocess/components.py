"""Rules against small components of a prediction, and their tuning."""

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

import config
from metrics.counts import asClasses, asSpacing, asVolumes, boundingBox
from metrics.lesions import labelComponents, matchLesions


def removeSmallComponents(yhat, ml, spacing=(1, 1, 1)):
    """Return the prediction without its small components of tumor, which become background.

    Args:
        yhat: tensor or array of integers, classes 0 to 3, one patient; it is not changed.
        ml: 26-connected components of the whole tumor below this volume in ml (1 ml = 1000 mm3) are removed. The
            largest one always stays: every patient of BraTS has a tumor. `tunePostprocessing` finds a value.
        spacing: mm between voxels along each axis.

    Returns:
        copy of yhat, tensor or array as given.

    Raises:
        ValueError: not classes, a negative ml, or a spacing that does not fit.
    """
    if ml < 0:
        raise ValueError(f'ml is {ml}; 0 ml or more was expected.')
    classes = asClasses(yhat, 'yhat')
    tumor = isIn(classes, 'WT')
    voxel = np.prod(asSpacing(spacing, classes.ndim)) / 1000  # ml
    box = boundingBox(tumor)
    components, _ = labelComponents(tumor[box])
    sizes = np.bincount(components.ravel(), minlength=1)[1:] * voxel
    removed = np.zeros(classes.shape, bool)
    removed[box] = np.append(False, ~_isLeft(sizes, ml))[components]
    return _replace(yhat, removed, 0)


def _isLeft(sizes, smallest):
    """Return which components (C,) stay: those of at least a size, and the largest."""
    return sizes >= min(smallest, sizes.max(initial=0))


def relabelSmallET(yhat, N):
    """Return the prediction with its enhancing tumor relabelled as necrotic core if it is smaller than N voxels.

    Args:
        yhat: tensor or array of integers, classes 0 to 3, one patient; it is not changed.
        N: number of voxels; 0 changes nothing. `tunePostprocessing` finds a value.

    Returns:
        copy of yhat, tensor or array as given.

    Raises:
        ValueError: not classes, or a negative N.

    Reference:
        The winner of BraTS 2020 (arXiv:2011.00848) used N = 200.
    """
    if N < 0:
        raise ValueError(f'N is {N}; 0 voxels or more were expected.')
    if N and not {'ET', 'NCR'} <= set(config.REGIONS):
        raise ValueError(f'N is {N}; 0 was expected: config.REGIONS has {", ".join(config.REGIONS)}, not ET and NCR.')
    isEnhancing = isIn(asClasses(yhat, 'yhat'), 'ET')
    if isEnhancing.sum() >= N:
        isEnhancing[:] = False
    return _replace(yhat, isEnhancing, config.REGIONS.get('NCR', (0,))[0])


def isIn(classes, region):
    """Return where classes belong to a region of `config.REGIONS`, bool; nowhere if there is no such region."""
    return np.isin(classes, config.REGIONS.get(region, ()))


def _replace(yhat, mask, value):
    """Return a copy of a tensor or array with a value where the mask (array) is True."""
    if isinstance(yhat, torch.Tensor):
        return yhat.masked_fill(torch.from_numpy(mask).to(yhat.device), value)
    out = np.array(yhat)
    out[mask] = value
    return out


class Tuning(NamedTuple):
    """The rules of `applyRules`, as `tunePostprocessing` finds them; or of your own, such as `Tuning(N=200)`.

    Attributes:
        N: voxels, for `relabelSmallET`.
        ml: volume, for `removeSmallComponents`.
        curve: DataFrame with the columns `rule` ('ml' or 'N'), `value` (ml or voxels), `score` (mean over patients: the
            lesion-wise Dice of WT for 'ml', the Dice of ET for 'N'), `gained` and `lost` (patients with a better or
            worse score than at value 0). A score holds up to the next row's value.
        withoutET: number of patients without enhancing tumor in truth.
        gained: how many of those N lifts from Dice 0 to 1; no other patient can gain.
        lost: number of patients with enhancing tumor whose score N lowers.
        kind: the kind of prediction that N and ml were tuned on, as `kindOf` returns it; None: unknown, they fit any.
    """

    N: int = 0
    ml: float = 0.0
    curve: pd.DataFrame | None = None
    withoutET: int = 0
    gained: int = 0
    lost: int = 0
    kind: dict | None = None


def kindOf(patchStride=None, mirror=False, planes=None, twoLooks=True, **others):
    """Return the options of `engine.predict` on which the small components of a prediction depend, as plain values."""
    stride, planes = None if patchStride is None else int(patchStride), None if planes is None else list(planes)
    looks = {'twoLooks': bool(twoLooks), 'sliceStep': 2 if twoLooks else 1}
    return {'patchStride': stride, 'mirror': bool(mirror), 'planes': planes, **looks}


def applyRules(yhat, rules, spacing=(1, 1, 1), kind=None):
    """Return a prediction after `removeSmallComponents` and then `relabelSmallET`.

    Args:
        yhat: tensor or array of integers, classes 0 to 3, one patient; it is not changed.
        rules: Tuning; None changes nothing.
        spacing: mm between voxels along each axis.
        kind: the kind of the prediction, as `kindOf` returns it; None if it is not known.

    Raises:
        ValueError: the rules were tuned on another kind of prediction, or bad input as in the two functions.
    """
    if rules is None:
        return yhat
    if kind is not None and rules.kind is not None and kind != rules.kind:
        raise ValueError(
            f'The rules were tuned on predictions with {rules.kind}, these have {kind}. Tune them on the same kind: '
            'small components differ.'
        )
    return relabelSmallET(removeSmallComponents(yhat, rules.ml, spacing), rules.N)


def tunePostprocessing(predictions, spacing=(1, 1, 1), **options):
    """Return the `Tuning` with the ml of `removeSmallComponents` and then the N of `relabelSmallET` that score best.

    ml maximises the mean lesion-wise Dice of WT (by 'BraTS2023'), in which a false positive component counts as much as
    a lesion; the ordinary Dice hardly changes with it. N maximises the mean Dice of ET (by 'BraTS2020') after small
    components were removed. Every value that changes a prediction is tried. Of equally good values the smallest is
    taken, so 0 means that the rule does not help.

    Args:
        predictions: (y, yhat) of each patient as `engine.predict` returns them, or a dict of patient to them. Of
            validation or out-of-fold patients, not of test patients: their scores would no longer be a test. A
            generator over `engine.predictAll` keeps one patient in memory.
        spacing: mm between voxels along each axis, the same for all patients.
        **options: `patchStride`, `mirror`, `twoLooks`, with which they were predicted; the rules fit only such ones.

    Raises:
        ValueError: no patients, or bad input as in `metrics.scoreLesions`.
    """
    voxel = float(np.prod(asSpacing(spacing, 3))) / 1000  # ml
    pairs = predictions.values() if isinstance(predictions, dict) else predictions
    patients = [_countComponents(*asVolumes(*pair), spacing) for pair in pairs]
    if not patients:
        raise ValueError('There are no predictions to tune on; at least one patient was expected.')
    if not any(patient.trueET for patient in patients):
        print('None of these patients has enhancing tumor: N is chosen from false positives alone.')
    volumes = _traceCurve([_scoreRemoval(patient) for patient in patients])
    removed = _bestOf(volumes)
    numbers = _traceCurve([_scoreRelabelling(patient, removed) for patient in patients])
    relabelled = _bestOf(numbers)
    # half a voxel is added, so that rounding cannot change the comparison
    volumes['value'] = np.where(volumes['size'] > 0, (volumes['size'] + 0.5) * voxel, 0.0)
    numbers['value'] = np.where(numbers['size'] > 0, numbers['size'] + 1, 0)
    curve = pd.concat([volumes.assign(rule='ml'), numbers.assign(rule='N')], ignore_index=True)
    best = numbers.set_index('size').loc[relabelled]
    return Tuning(
        N=int(best['value']),
        ml=float(volumes.set_index('size').loc[removed, 'value']),
        curve=curve[['rule', 'value', 'score', 'gained', 'lost']],
        withoutET=sum(patient.trueET == 0 for patient in patients),
        gained=int(best['gained']),
        lost=int(best['lost']),
        kind=kindOf(**options),
    )


class _Counts(NamedTuple):
    """The voxels of one patient's C predicted components and L scored lesions of WT."""

    sizes: np.ndarray  # (C,)
    enhancing: np.ndarray  # (C,), predicted ET of each component
    truePositiveET: np.ndarray  # (C,), of that, ET in truth
    trueET: int
    lesionSizes: np.ndarray  # (L,)
    isMatched: np.ndarray  # (L, C)
    overlap: np.ndarray  # (L, C)
    isFalsePositive: np.ndarray  # (C,), matches no lesion, scored or not


def _countComponents(y, yhat, spacing):
    """Return the _Counts of one patient."""
    match = matchLesions(isIn(y, 'WT'), isIn(yhat, 'WT'), spacing)
    isTrue, isPredicted = (isIn(classes[match.box], 'ET') for classes in (y, yhat))
    shape = np.array(match.isMatched.shape) + 1
    pairs = match.lesions.astype(np.int64) * shape[1] + match.components
    overlap = np.bincount(pairs.ravel(), minlength=shape.prod()).reshape(shape)[1:, 1:]

    def count(mask):
        return np.bincount(match.components[mask], minlength=shape[1])[1:]

    return _Counts(
        sizes=match.componentSizes,
        enhancing=count(isPredicted),
        truePositiveET=count(isPredicted & isTrue),
        trueET=int(isTrue.sum()),
        lesionSizes=match.lesionSizes[match.isScored],
        isMatched=match.isMatched[match.isScored],
        overlap=overlap[match.isScored],
        isFalsePositive=~match.isMatched.any(0),
    )


def _scoreRemoval(patient):
    """Return the sizes (K,) of a patient's components and the lesion-wise Dice (K + 1,) with 0, 1, ... K removed."""
    sizes = np.unique(patient.sizes)
    scores = []
    for size in [0, *sizes]:
        isLeft = _isLeft(patient.sizes, size + 0.5)
        isMatched = patient.isMatched & isLeft
        predicted = isMatched @ patient.sizes  # voxels of the components left to each lesion
        dice = 2 * (patient.overlap * isMatched).sum(1) / (patient.lesionSizes + predicted)
        count = len(dice) + (patient.isFalsePositive & isLeft).sum()
        scores.append(dice.sum() / count if count else 1.0)
    return sizes, scores


def _scoreRelabelling(patient, removed):
    """Return a patient's ET voxels (1,) without components of up to `removed` voxels, and the Dice with and without."""
    isLeft = _isLeft(patient.sizes, removed + 0.5)
    predicted, truePositive = patient.enhancing[isLeft].sum(), patient.truePositiveET[isLeft].sum()
    total = predicted + patient.trueET
    return np.array([predicted]), [2 * truePositive / total if total else 1.0, float(patient.trueET == 0)]


def _traceCurve(steps):
    """Return the mean score over patients at 0 and at every size at which a patient's score may change.

    `steps` has for each patient ascending sizes (K,) and scores (K + 1,): the first score is without any removal, the
    next with the first size removed, and so on. The columns are `size`, `score`, `gained`, `lost` (as in `Tuning`).
    """
    sizes = np.unique(np.concatenate([[0], *(changes for changes, _ in steps)]))
    score, gained, lost = np.zeros((3, len(sizes)))
    for changes, values in steps:
        scores = np.asarray(values)[np.searchsorted(changes, sizes, side='right')]
        score += scores
        gained += scores > values[0] + 1e-12
        lost += scores < values[0] - 1e-12
    gained, lost = gained.astype(int), lost.astype(int)
    return pd.DataFrame({'size': sizes, 'score': score / len(steps), 'gained': gained, 'lost': lost})


def _bestOf(curve):
    """Return the smallest size with the best score; differences below 1e-12 are rounding."""
    return int(curve['size'][curve['score'] >= curve['score'].max() - 1e-12].iloc[0])
