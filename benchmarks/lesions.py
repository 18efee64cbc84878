"""Measure the lesion-wise scores of one patient by the rule of 2024, compared with a loop over whole volumes."""

import tempfile

import numpy as np
import pandas as pd
from scipy import ndimage

import metrics
import patients
import phantom
from benchmarks import timing
from metrics.rules import RULES

_FACES_AND_EDGES = ndimage.generate_binary_structure(3, 2)  # 18 neighbours


def main(shape=phantom.BOX, numLesions=4):
    """Print the table of `benchLesions` for a phantom.

    Args:
        shape: voxels of the phantom.
        numLesions: how many tumors it has: its own, and smaller copies in the corners of the volume.
    """
    with tempfile.TemporaryDirectory() as folder:
        phantom.makeCases(folder, 1, shape=shape)
        y = patients.readLabel(patients.makeFileList(folder).iloc[0])
    small = y[::3, ::3, ::3]
    corners = [tuple(slice(0, n) if bit else slice(-n, None) for bit, n in zip(bits, small.shape, strict=True))
               for bits in np.ndindex(2, 2, 2)]  # fmt: skip
    for corner in corners[: numLesions - 1]:
        y[corner] = np.where(small > 0, small, y[corner])
    table = benchLesions(y, np.roll(y, (4, -6, 1), (0, 1, 2)))  # stands for a prediction that is somewhat wrong
    print(timing.describeMachine())
    print(table.to_string(index=False, float_format='{:.3g}'.format, na_rep='not installed'))
    return table


def benchLesions(y, yhat):
    """Measure `scoreLesions` by the rule of 2024 from truth and prediction, integer arrays (W, H, D)."""
    naive = timing.makeIfInstalled(scoreLesionsNaively, *np.ones((2, 3, 3, 3), np.uint8))
    methods = {
        "scoreLesions, 2024's rule": lambda: metrics.scoreLesions(y, yhat, rule='BraTS2024'),
        'whole volumes, lesion by lesion': None if naive is None else lambda: scoreLesionsNaively(y, yhat),
    }
    return timing.measure('lesion-wise scores, per patient', methods, rounds=1)


def scoreLesionsNaively(y, yhat):
    """Return the table of `metrics.scoreLesions(y, yhat, rule='BraTS2024')` at 1 mm, column by column the same.

    Each lesion is a mask of the whole volume, where it is dilated, compared and measured, as the challenge does.

    Args:
        y, yhat: truth and prediction, integer arrays (W, H, D), classes 0 to 4.
    """
    regions = RULES['BraTS2024'].regions
    separated = {
        name: [_separate(np.isin(each, region.classes), region.dilation) for each in (y, yhat)]
        for name, region in regions.items()
    }
    for name, (_, prediction) in separated.items():
        for number in np.unique(prediction[prediction > 0]):
            if (prediction == number).sum() <= regions[name].smallestPredicted:
                prediction[prediction == number] = 0
    rows = {}
    for name, region in regions.items():
        merged = [each.copy() for each in separated[name]]
        for other in region.mergedBy:
            merged = [_merge(own, others) for own, others in zip(merged, separated[other], strict=True)]
        rows[name] = _scoreRegion(*merged, region)
    return pd.DataFrame.from_dict(rows, orient='index').rename_axis('region')


def _separate(mask, dilation):
    """Return the number of the lesion at each voxel of a mask, 0 outside."""
    return ndimage.label(ndimage.binary_dilation(mask, _FACES_AND_EDGES, dilation), np.ones((3, 3, 3)))[0] * mask


def _merge(numbers, others):
    """Return numbers in which the lesions that touch the same lesion of another region have one number."""
    merged, first = numbers.copy(), {}
    for number in np.unique(numbers[numbers > 0]):
        lesion = numbers == number
        touched = others[ndimage.binary_dilation(lesion, _FACES_AND_EDGES)]
        if touched.any():
            merged[lesion] = first.setdefault(touched[touched > 0].min(), number)
    return merged


def _scoreRegion(truth, prediction, region):
    """Return the scores of one region, name -> number, from the numbers of the lesions of truth and prediction."""
    from surface_distance import compute_robust_hausdorff, compute_surface_distances

    scores, missed, matched = [], 0, set()
    for number in np.unique(truth[truth > 0]):
        lesion = truth == number
        near = set(prediction[ndimage.binary_dilation(lesion, _FACES_AND_EDGES, region.dilation)]) - {0}
        matched |= near
        if lesion.sum() <= region.smallestTrue:
            continue
        missed += not near
        if near:
            found = np.isin(prediction, list(near))
            dice = 2 * (lesion & found).sum() / (lesion.sum() + found.sum())
            hd95 = compute_robust_hausdorff(compute_surface_distances(lesion, found, (1, 1, 1)), 95)
            scores.append([dice, hd95, *_surfaceDice(lesion, found)])
    falsePositive = len(set(np.unique(prediction)) - {0} - matched)
    total = len(scores) + missed + falsePositive
    worst = np.array([0, RULES['BraTS2024'].penalty, 0, 0])
    summed = np.sum(scores, axis=0) + (missed + falsePositive) * worst
    dice, hd95, *nsd = summed / total if total else (1, 0, 1, 1)
    counts = {'missed': missed, 'falsePositive': falsePositive}
    return {'dice': dice, 'hd95': hd95, **counts, 'nsd0.5': nsd[0], 'nsd1.0': nsd[1]}


def _surfaceDice(truth, prediction):
    """Return the surface Dice of two masks at 0.5 and 1 mm by distance transforms of the volume."""
    surfaces = [mask & ~ndimage.binary_erosion(mask) for mask in (truth, prediction)]
    distances = [ndimage.distance_transform_edt(~surface) for surface in surfaces]
    own = distances[1][surfaces[0]], distances[0][surfaces[1]]
    return [np.mean([(each <= limit).mean() for each in own]) for limit in (0.5, 1.0)]


if __name__ == '__main__':
    main()
