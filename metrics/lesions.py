"""Find the lesions of a segmentation, match predicted components to them and score each lesion."""

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import ndimage

import config
from metrics.counts import asSpacing, asVolumes, boundingBox
from metrics.distances import hausdorff95


class Match(NamedTuple):
    """The lesions of the truth and the predicted components that match each of them.

    Attributes:
        box: slices, one per axis: where `lesions` and `components` lie in the whole arrays.
        lesions: int (w, h, d), the number of the true lesion at each voxel, 0 outside.
        components: int (w, h, d), the number of the predicted component at each voxel, 0 outside.
        lesionSizes: int (L,), voxels of the lesions 1 to L.
        componentSizes: int (C,), voxels of the components 1 to C.
        isScored: bool (L,), whether the lesion is larger than `config.LESION_SMALLEST`.
        isMatched: bool (L, C), whether the component touches the dilated lesion.
    """

    box: tuple
    lesions: np.ndarray
    components: np.ndarray
    lesionSizes: np.ndarray
    componentSizes: np.ndarray
    isScored: np.ndarray
    isMatched: np.ndarray


def labelComponents(mask):
    """Number the 26-connected components of a mask; return the int array (0 outside) and how many there are."""
    return ndimage.label(mask, np.ones((3,) * mask.ndim))  # connected across a face, an edge or a corner


def matchLesions(truth, prediction, spacing=(1, 1, 1)):
    """Separate the true lesions of a region and match the predicted components to them.

    The truth is dilated `config.LESION_DILATION` times with 18 neighbours. The true voxels inside one 26-connected
    component of the result are one lesion, so islands close to each other are one lesion. The prediction is separated
    into 26-connected components without dilation. A component matches every lesion whose dilation it touches.

    Args:
        truth, prediction: bool arrays of the same shape, three axes.
        spacing: mm between voxels along each axis.

    Returns:
        Match.
    """
    box = boundingBox(truth | prediction)  # dilations that meet outside the box also meet inside it
    truth, prediction = truth[box], prediction[box]
    neighbours = ndimage.generate_binary_structure(3, 2)  # 18: across a face or an edge
    dilated = ndimage.binary_dilation(truth, neighbours, iterations=config.LESION_DILATION)
    reach, numLesions = labelComponents(dilated)
    components, numComponents = labelComponents(prediction)
    isMatched = np.zeros((numLesions + 1, numComponents + 1), bool)
    isMatched[reach[prediction], components[prediction]] = True
    lesions = reach * truth
    lesionSizes = np.bincount(lesions.ravel(), minlength=numLesions + 1)[1:]
    componentSizes = np.bincount(components.ravel(), minlength=numComponents + 1)[1:]
    isScored = lesionSizes * np.prod(spacing) > config.LESION_SMALLEST
    # row 0 and column 0 stand for the background
    return Match(box, lesions, components, lesionSizes, componentSizes, isScored, isMatched[1:, 1:])


def scoreLesions(y, yhat, spacing=(1, 1, 1)):
    """Score one patient lesion by lesion, by the rules of BraTS 2023 (GLI and SSA).

    Each true lesion of more than 50 mm3 is compared, undilated, with the union of the predicted components that match
    it (see `matchLesions`). A lesion without a match is a false negative, a component without a match, even of one
    voxel, a false positive; both count with Dice 0 and 374 mm. Smaller lesions are not scored, and components that
    match them are no false positives.

    Args:
        y, yhat: truth and prediction, tensors or arrays of integers of the same shape (three axes in any order),
            classes 0 to 3. The y and yhat of `engine.predict` can be passed as they are.
        spacing: mm between voxels along each axis of the arrays. BraTS has 1 mm.

    Returns:
        DataFrame with the rows `WT`, `TC`, `ET` and the columns `dice` (0 to 1) and `hd95` (mm, rule
        'surface-distance'), means over the scored lesions and the false positives; `missed`, the number of false
        negatives; `falsePositive`, the number of false positives. With neither a scored lesion nor a false positive,
        Dice is 1 and HD95 0.

    Raises:
        ValueError: if shapes, dtypes or classes are not as above, or the spacing does not fit.

    Reference:
        The evaluation script of the BraTS 2023 challenge (github.com/rachitsaluja/BraTS-2023-Metrics).
    """
    y, yhat = asVolumes(y, yhat)
    spacing = asSpacing(spacing, 3)
    box = boundingBox(y | yhat)
    y, yhat = y[box], yhat[box]
    rows = {}
    for region in ('WT', 'TC', 'ET'):
        classes = config.REGIONS[region]
        rows[region] = _scoreMatch(matchLesions(np.isin(y, classes), np.isin(yhat, classes), spacing), spacing)
    table = pd.DataFrame.from_dict(rows, orient='index', columns=['dice', 'hd95', 'missed', 'falsePositive'])
    return table.rename_axis('region')


def _scoreMatch(match, spacing):
    """Return Dice, HD95, false negatives and false positives of one region."""
    dice, hd95, falseNegatives = [], [], 0
    for index in np.flatnonzero(match.isScored):
        isMatched = match.isMatched[index]
        if not isMatched.any():
            falseNegatives += 1
            continue
        lesion = match.lesions == index + 1
        found = np.append(False, isMatched)[match.components]  # the union of the matched components
        overlap = (lesion & found).sum()
        dice.append(2 * overlap / (match.lesionSizes[index] + match.componentSizes[isMatched].sum()))
        hd95.append(hausdorff95(lesion, found, spacing, rule='surface-distance'))
    falsePositives = int((~match.isMatched.any(0)).sum())
    numScored = len(dice) + falseNegatives + falsePositives
    if numScored == 0:
        return 1.0, 0.0, 0, 0
    penalty = (falseNegatives + falsePositives) * config.HD95_EMPTY['surface-distance']
    return sum(dice) / numScored, (sum(hd95) + penalty) / numScored, falseNegatives, falsePositives
