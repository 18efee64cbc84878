"""Score a segmentation lesion by lesion: tell them apart, match them, count what is predicted where there is none."""

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import ndimage

import config
from counts import asSpacing, asVolumes, boxOf
from distances import hausdorff95


class Match(NamedTuple):
    """Which predicted parts belong to which true lesions.

    Attributes:
        box: slices, one an axis: where the two below lie in the arrays.
        lesions: int (w, h, d), the number of the true lesion of each voxel, 0 where there is none.
        parts: int (w, h, d), the same for the predicted parts.
        lesionSizes, partSizes: int (L,) and (P,), voxels of the lesions 1 to L and the parts 1 to P.
        isKept: bool (L,), whether the lesion is larger than `config.LESION_SMALLEST`.
        belongs: bool (L, P), whether the part touches the lesion's dilation.
    """

    box: tuple
    lesions: np.ndarray
    parts: np.ndarray
    lesionSizes: np.ndarray
    partSizes: np.ndarray
    isKept: np.ndarray
    belongs: np.ndarray


def labelParts(mask):
    """Gives the numbers of a mask's 26-connected parts, int like the mask with 0 outside, and how many there are."""
    return ndimage.label(mask, np.ones((3,) * mask.ndim))  # across a face, an edge or a corner


def matchLesions(truth, prediction, spacing=(1, 1, 1)):
    """Tells the lesions of a region apart and gives the predicted parts that belong to each.

    A lesion is what lies of the truth in one 26-connected part of its dilation (`config.LESION_DILATION` times, 18
    neighbours): nearby islands are one lesion. Predicted parts are 26-connected and are not dilated; one may belong to
    several lesions.

    Args:
        truth, prediction: bool arrays of one shape, three axes.
        spacing: mm along each axis.

    Returns:
        Match.
    """
    box = boxOf(truth | prediction)  # dilations that meet beyond it meet inside too
    truth, prediction = truth[box], prediction[box]
    neighbours = ndimage.generate_binary_structure(3, 2)  # 18: across a face or an edge
    grown = ndimage.binary_dilation(truth, neighbours, iterations=config.LESION_DILATION)
    reach, lesionCount = labelParts(grown)
    parts, partCount = labelParts(prediction)
    belongs = np.zeros((lesionCount + 1, partCount + 1), bool)
    belongs[reach[prediction], parts[prediction]] = True  # row and column 0, of no lesion and no part, go below
    lesions = reach * truth
    lesionSizes = np.bincount(lesions.ravel(), minlength=lesionCount + 1)[1:]
    partSizes = np.bincount(parts.ravel(), minlength=partCount + 1)[1:]
    isKept = lesionSizes * np.prod(spacing) > config.LESION_SMALLEST
    return Match(box, lesions, parts, lesionSizes, partSizes, isKept, belongs[1:, 1:])


def scoreLesions(y, yhat, spacing=(1, 1, 1)):
    """Gives the lesion-wise scores of BraTS 2023 (GLI and SSA) of one patient.

    Each true lesion (see `matchLesions`) of more than 50 mm3 is scored, undilated, against all of the predicted parts
    that belong to it. Lesions without any, and parts that belong to no lesion, even of one voxel, count with Dice 0 and
    374 mm. Smaller lesions do not count, found or not, and what belongs to them is no false positive.

    Args:
        y, yhat: truth and prediction, tensors or arrays of integers of one shape (three axes, any order), classes 0 to
            3; y and yhat of `engine.predict` as they are.
        spacing: mm between voxels along each axis of the arrays. BraTS has 1 mm.

    Returns:
        DataFrame, rows `WT`, `TC`, `ET`, columns `dice` and `hd95` (mm, rule 'surface-distance'), the sum over lesions
        and false positives divided by their number; `missed`, the lesions that count and have no part; `falsePositive`,
        the parts that belong to no lesion. Where neither a lesion that counts nor a false positive is left, Dice is 1
        and HD95 0.

    Raises:
        ValueError: other shapes, dtypes or classes, or a spacing that does not fit.

    Reference:
        The evaluation script of the BraTS 2023 challenge (github.com/rachitsaluja/BraTS-2023-Metrics).
    """
    y, yhat = asVolumes(y, yhat)
    spacing = asSpacing(spacing, 3)
    box = boxOf(y | yhat)
    y, yhat = y[box], yhat[box]
    rows = {}
    for region in ('WT', 'TC', 'ET'):
        classes = config.REGIONS[region]
        rows[region] = _scoreMatch(matchLesions(np.isin(y, classes), np.isin(yhat, classes), spacing), spacing)
    table = pd.DataFrame.from_dict(rows, orient='index', columns=['dice', 'hd95', 'missed', 'falsePositive'])
    return table.rename_axis('region')


def _scoreMatch(match, spacing):
    """Gives Dice, HD95, missed lesions and false positives of one region."""
    dice, hd95, missed = [], [], 0
    for number in np.flatnonzero(match.isKept):
        belongs = match.belongs[number]
        if not belongs.any():
            missed += 1
            continue
        lesion = match.lesions == number + 1
        found = np.append(False, belongs)[match.parts]  # the union of the parts
        overlap = (lesion & found).sum()
        dice.append(2 * overlap / (match.lesionSizes[number] + match.partSizes[belongs].sum()))
        hd95.append(hausdorff95(lesion, found, spacing, rule='surface-distance'))
    falsePositive = int((~match.belongs.any(0)).sum())
    count = len(dice) + missed + falsePositive
    if count == 0:
        return 1.0, 0.0, 0, 0
    lost = (missed + falsePositive) * config.HD95_EMPTY['surface-distance']
    return sum(dice) / count, (sum(hd95) + lost) / count, missed, falsePositive


def countStray(y, yhat):
    """Counts what is predicted where there is no tumor: on slices without any, and in patients without any.

    Args:
        y, yhat: truth and prediction, tensors or arrays of integers of one shape, slices first as `engine.predict`
            gives them, classes 0 to 3.

    Returns:
        DataFrame of whole numbers, rows `slice` and `patient`, that of several patients may be summed. Columns:
        `tumorFree`, how many are without tumor; `predicted`, how many of those have a voxel of tumor predicted;
        `voxels`, predicted there; `components`, the 26-connected parts of the prediction that lie there as a whole (the
        end of a part that reaches into a slice with tumor counts its voxels, but is no part of its own).

    Raises:
        ValueError: other shapes, dtypes or classes.
    """
    y, yhat = asVolumes(y, yhat)
    isFree = ~y.any((1, 2))
    predicted = (yhat > 0).sum((1, 2))  # voxels a slice
    parts, count = labelParts(yhat[boxOf(yhat)])
    besideTumor = np.unique(parts[~isFree[boxOf(yhat)[0]]])
    strayParts = count - np.count_nonzero(besideTumor)
    voxels, isPatientFree = predicted[isFree].sum(), isFree.all()
    rows = {
        'slice': [isFree.sum(), (predicted[isFree] > 0).sum(), voxels, strayParts],
        'patient': isPatientFree * np.array([1, voxels > 0, voxels, strayParts]),
    }
    table = pd.DataFrame.from_dict(rows, orient='index', columns=['tumorFree', 'predicted', 'voxels', 'components'])
    return table.astype(int).rename_axis('unit')
