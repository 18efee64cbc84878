"""Separate lesions, remove small ones, merge, match predicted to true ones and score each, by a challenge's rule."""

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import ndimage, optimize

from metrics.counts import asSpacing, asVolumes, boundingBox, widenBox
from metrics.distances import hausdorff95, surfaceDice
from metrics.rules import RULES, findRule

_FACES_AND_EDGES = ndimage.generate_binary_structure(3, 2)  # 18 neighbours


class Lesions(NamedTuple):
    """The lesions of a mask.

    Attributes:
        numbers: int (w, h, d), the number of the lesion at each voxel, 0 outside. Numbers may be missing.
        reach: int (w, h, d), the number of the lesion whose dilation covers each voxel, 0 outside.
        sizes: int (L,), voxels of the lesions 1 to L; 0 if there is none of this number.
    """

    numbers: np.ndarray
    reach: np.ndarray
    sizes: np.ndarray


class Match(NamedTuple):
    """The lesions of the truth and the predicted ones (components, for short) that match each of them.

    Attributes:
        box: slices, one per axis: where `lesions` and `components` lie in the whole arrays.
        lesions: int (w, h, d), the number of the true lesion at each voxel, 0 outside.
        components: int (w, h, d), the number of the predicted component at each voxel, 0 outside.
        lesionSizes: int (L,), voxels of the lesions 1 to L.
        componentSizes: int (C,), voxels of the components 1 to C.
        isScored: bool (L,), whether the lesion is larger than the rule's `smallestTrue`.
        isMatched: bool (L, C), whether the component belongs to the lesion.
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


def separate(mask, dilation):
    """Return the Lesions of a mask, numbered in the order in which a scan of the dilated mask meets them.

    `dilation` is a number of iterations with 18 neighbours. The voxels in one 26-connected component of the dilated
    mask (bool, three axes) are one lesion, so islands close to each other are one; 0: the components of the mask.
    """
    box = widenBox(boundingBox(mask), dilation, mask.shape)
    dilated = mask[box]
    if dilation:
        dilated = ndimage.binary_dilation(dilated, _FACES_AND_EDGES, iterations=dilation)
    numbers, reach = np.zeros((2, *mask.shape), np.int32)
    reach[box], count = labelComponents(dilated)
    numbers[box] = reach[box] * mask[box]
    return Lesions(numbers, reach, np.bincount(numbers[box].ravel(), minlength=count + 1)[1:])


def removeSmall(lesions, smallest):
    """Return Lesions without those of `smallest` voxels or fewer; the others keep their numbers."""
    isKept = lesions.sizes > smallest
    return lesions if isKept.all() else _renumber(lesions, np.arange(1, len(isKept) + 1) * isKept)


def _renumber(lesions, numbers):
    """Return Lesions with other numbers (L,); 0 removes a lesion, and lesions of the same number become one."""
    table = np.append(0, numbers).astype(np.int32)
    sizes = np.bincount(table[1:], weights=lesions.sizes, minlength=len(table)).astype(np.int64)[1:]
    return Lesions(table[lesions.numbers], table[lesions.reach], sizes)


def merge(lesions, others):
    """Return Lesions in which those that touch the same lesion of another region are one.

    Each lesion goes to the lowest-numbered lesion of the other region that it touches, across a face or an edge, and
    those that go to the same one become one: merging is not transitive. `others` are the numbers of the lesions of
    other regions, arrays of the same shape, merged by one after the other.
    """
    groups = np.arange(len(lesions.sizes) + 1)
    for other in others if np.count_nonzero(lesions.sizes) > 1 else ():
        mine, touched = _touching(lesions.numbers, other)
        lowest = np.full(len(groups), np.iinfo(np.int64).max)
        np.minimum.at(lowest, groups[mine], touched)
        touching = np.unique(groups[mine])
        _, first, which = np.unique(lowest[touching], return_index=True, return_inverse=True)
        joined = np.arange(len(groups))
        joined[touching] = touching[first][which]
        groups = joined[groups]
    return lesions if (groups == np.arange(len(groups))).all() else _renumber(lesions, groups[1:])


def _touching(numbers, others):
    """Return the numbers (P,), (P,) of all voxels of two regions that are neighbours across a face or an edge."""
    box = widenBox(boundingBox(others), 1, others.shape)
    numbers, others = numbers[box], others[box]
    isNear = ndimage.binary_dilation(others != 0, _FACES_AND_EDGES) & (numbers != 0)
    places, padded = np.argwhere(isNear), np.pad(others, 1)
    mine, touched = [], []
    for step in np.argwhere(_FACES_AND_EDGES):
        other = padded[tuple((places + step).T)]  # (P,)
        mine.append(numbers[isNear][other != 0])
        touched.append(other[other != 0])
    return np.concatenate(mine), np.concatenate(touched)


def keptPrediction(mask, region):
    """Return a predicted mask (bool, three axes) of a Region without the lesions that its rule removes."""
    if not region.smallestPredicted:
        return mask
    return removeSmall(separate(mask, region.dilation), region.smallestPredicted).numbers > 0


def _separateRegions(y, yhat, rule):
    """Return the Lesions of each region that a rule scores in truth and prediction (classes, uint8 (W, H, D)).

    Small ones are removed and others merged, as the rule says: name -> [Lesions, Lesions].
    """
    pairs = {}
    for name, region in rule.allRegions().items():
        isIn = rule.classTable(name)
        truth, prediction = isIn[y], isIn[yhat]
        if not rule.isMerging():
            box = boundingBox(truth | prediction)  # dilations that meet outside the box also meet inside it
            truth, prediction = truth[box], prediction[box]
        predicted = separate(prediction, region.dilation if rule.isPredictionDilated else 0)
        pairs[name] = separate(truth, region.dilation), removeSmall(predicted, region.smallestPredicted)
    # merged by what the others were before they were merged themselves
    return {
        name: [
            merge(lesions, [pairs[other][which].numbers for other in region.mergedBy])
            for which, lesions in enumerate(pairs[name])
        ]
        for name, region in rule.namedRegions().items()
    }


def matchLesions(truth, prediction, spacing=(1, 1, 1)):
    """Return the Match of the true lesions and the predicted components of a region by the rules of BraTS 2023.

    The truth is dilated 3 times with 18 neighbours. The true voxels inside one 26-connected component of the result are
    one lesion. The prediction is separated into 26-connected components without dilation. A component matches every
    lesion whose dilation it touches.

    Args:
        truth, prediction: bool arrays of the same shape, three axes.
        spacing: mm between voxels along each axis.
    """
    rule = RULES['BraTS2023']
    region = rule.regions['WT']
    box = boundingBox(truth | prediction)  # dilations that meet outside the box also meet inside it
    pair = separate(truth[box], region.dilation), separate(prediction[box], 0)
    return _match(*pair, region, rule, spacing)._replace(box=box)


def _match(truth, prediction, region, rule, spacing):
    """Return the Match of true and predicted Lesions of a region."""
    isMatched = np.zeros((len(truth.sizes), len(prediction.sizes)), bool)
    if rule.isOneToOne:
        isMatched[_pairOff(truth, prediction)] = True
    else:
        isBoth = (truth.reach != 0) & (prediction.numbers != 0)
        isMatched[truth.reach[isBoth] - 1, prediction.numbers[isBoth] - 1] = True
    isScored = truth.sizes * np.prod(spacing) > region.smallestTrue
    return Match((), truth.numbers, prediction.numbers, truth.sizes, prediction.sizes, isScored, isMatched)


def _pairOff(truth, prediction):
    """Return the indices (P,), (P,) of the true and predicted lesions whose pairs have the largest sum of Dice."""
    isBoth = (truth.numbers != 0) & (prediction.numbers != 0)
    pairs = np.stack([truth.numbers[isBoth] - 1, prediction.numbers[isBoth] - 1])
    (mine, theirs), overlap = np.unique(pairs, axis=1, return_counts=True)
    rows, row = np.unique(mine, return_inverse=True)  # only what overlaps anything: the table stays small
    columns, column = np.unique(theirs, return_inverse=True)
    dice = np.zeros((len(rows), len(columns)))
    dice[row, column] = 2 * overlap / (truth.sizes[mine] + prediction.sizes[theirs])
    chosen = optimize.linear_sum_assignment(dice, maximize=True)
    isPair = dice[chosen] > 0
    return rows[chosen[0][isPair]], columns[chosen[1][isPair]]


def scoreLesions(y, yhat, spacing=(1, 1, 1), rule='BraTS2023'):
    """Score one patient lesion by lesion, by the rules of a challenge.

    'BraTS2023' (GLI and SSA): each true lesion of more than 50 mm3 is compared, undilated, with the union of the
    predicted components that match it (see `matchLesions`). A lesion without a match is a false negative, a component
    without a match, even of one voxel, a false positive; both count with Dice 0 and 374 mm. Smaller lesions are not
    scored, and components that match them are no false positives.

    'BraTS2024' (GLI of 2024 and 2025), 'BraTS2024-SSA' (BraTS-Africa of both years) and 'BraTS2026' differ in what a
    lesion is, which are left out, what matches and what the mean covers. `docs/scores.md` has them in words,
    `metrics.rules.RULES` as a table.

    Args:
        y, yhat: truth and prediction, tensors or arrays of integers of the same shape, three axes, classes 0 to 3, and
            4 for the resection cavity where the rule has the region `RC`. The y and yhat of `engine.predict` can be
            passed as they are. With 'BraTS2024' and 'BraTS2024-SSA' the order and direction of the axes may decide
            which lesions are merged; the challenge has those of the files.
        spacing: mm between voxels along each axis of the arrays. BraTS has 1 mm.
        rule: name of the rule.

    Returns:
        DataFrame with the rows `WT`, `TC`, `ET` ('BraTS2024', 'BraTS2026': also `NETC`, `SNFH`, `RC`) and the columns
        `dice` (0 to 1) and `hd95` (mm), means over the scored lesions and the false positives; `missed`, the number of
        false negatives; `falsePositive`, that of false positives; from 2024 on `nsd0.5` and `nsd1.0` (0 to 1), in 2026
        only the second: the surface Dice at that tolerance in mm. With neither a scored lesion nor a false positive,
        Dice and NSD are 1 and HD95 is 0.

        By 'BraTS2026' the means cover the pairs of a true and a predicted lesion only. Further columns: `found`, the
        number of pairs; `precision`, `sensitivity` and `f1` of the lesions; `pq`, Dice times F1; `diceStd`, `hd95Std`,
        `nsd1.0Std`, over the pairs (n in the denominator); `volumeMatched` (ml), the mean volume of the true lesions
        of the pairs. Without a pair Dice, NSD and F1 are 0 and HD95 is infinite. Without any lesion, true or
        predicted, they are NaN: such a region has no score.

    Raises:
        ValueError: if shapes, dtypes or classes are not as above, the spacing does not fit, or the rule is unknown.

    Reference:
        The evaluation programs of the challenges (github.com/rachitsaluja/BraTS-2023-Metrics, BraTS-2024-Metrics) and
        panoptica (arXiv:2312.02608).
    """
    rule = findRule(rule, isLesionWise=True)
    y, yhat = asVolumes(y, yhat, rule.numClasses())
    spacing = asSpacing(spacing, 3)
    # the numbers of lesions decide what is merged, and follow the dilated masks
    margin = max(region.dilation for region in rule.allRegions().values()) if rule.isMerging() else 0
    box = widenBox(boundingBox(y | yhat), margin, y.shape)
    rows = {}
    for name, pair in _separateRegions(y[box], yhat[box], rule).items():
        rows[name] = _scoreMatch(_match(*pair, rule.regions[name], rule, spacing), spacing, rule)
    columns = ['dice', 'hd95', 'missed', 'falsePositive', *(f'nsd{limit}' for limit in rule.lesionTolerances)]
    if rule.isMeanOverPairs:
        columns += [name for name in rows['WT'] if name not in columns]
    return pd.DataFrame.from_dict(rows, orient='index')[columns].rename_axis('region')


def _scoreMatch(match, spacing, rule):
    """Return the scores of one region, name -> number: those of `scoreLesions` and `found`, how many were matched."""
    isFound = match.isMatched.any(1)
    missed = int((match.isScored & ~isFound).sum())
    falsePositive = int(((match.componentSizes > 0) & ~match.isMatched.any(0)).sum())
    names = ['dice', 'hd95', *(f'nsd{limit}' for limit in rule.lesionTolerances)]
    pairs = _scorePairs(match, spacing, rule)
    counts = {'missed': missed, 'falsePositive': falsePositive, 'found': len(pairs)}
    scores, total = dict(zip(names, pairs.T, strict=True)), sum(counts.values())  # name -> (found,)
    if rule.isMeanOverPairs:
        volume = match.lesionSizes[isFound].mean() * np.prod(spacing) / 1000 if len(pairs) else np.nan  # ml
        return _averagePairs(scores, **counts) | {'volumeMatched': volume}
    if not total:
        return {name: float(name != 'hd95') for name in names} | counts
    worst = dict.fromkeys(names, 0.0) | {'hd95': rule.penalty}
    return {
        name: (sum(values) + (missed + falsePositive) * worst[name]) / total for name, values in scores.items()
    } | counts


def _scorePairs(match, spacing, rule):
    """Return Dice, HD95 and each NSD (found, scores) of the scored lesions that have a match."""
    scores, scored = [], np.flatnonzero(match.isScored & match.isMatched.any(1))
    boxes = [ndimage.find_objects(numbers) for numbers in (match.lesions, match.components) if len(scored)]
    for index in scored:
        isMatched = match.isMatched[index]
        around = [boxes[0][index], *(boxes[1][number] for number in np.flatnonzero(isMatched))]
        box = tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*around, strict=True))
        lesion = match.lesions[box] == index + 1
        found = np.append(False, isMatched)[match.components[box]]  # the union of the matched components
        overlap = np.count_nonzero(lesion & found)
        dice = 2 * overlap / (match.lesionSizes[index] + match.componentSizes[isMatched].sum())
        nsd = [surfaceDice(lesion, found, limit, spacing) for limit in rule.lesionTolerances]
        scores.append([dice, hausdorff95(lesion, found, spacing, rule.hd95), *nsd])
    return np.array(scores).reshape(len(scores), 2 + len(rule.lesionTolerances))


def _averagePairs(scores, found, missed, falsePositive):
    """Return means and deviations of the pairs' scores (name -> (P,)), the counts, and the scores of the counts."""
    isEmpty = not found + missed + falsePositive
    if found:
        means = {name: values.mean() for name, values in scores.items()}
    else:
        means = {name: np.nan if isEmpty else np.inf if name == 'hd95' else 0.0 for name in scores}
    f1 = np.nan if isEmpty else found / (found + falsePositive / 2 + missed / 2)
    return {
        **means,
        'missed': missed,
        'falsePositive': falsePositive,
        'found': found,
        'precision': found / (found + falsePositive) if found + falsePositive else np.nan,
        'sensitivity': found / (found + missed) if found + missed else np.nan,
        'f1': f1,
        'pq': means['dice'] * f1,
        **{f'{name}Std': values.std() if found else np.nan for name, values in scores.items()},
    }
