"""Score a segmentation: pooled and per-patient; by import also its counts, distances, lesions and small parts."""

import numpy as np
import pandas as pd

import config
from counts import asPair, asSpacing, asVolumes, boxOf, countClasses, countJoint, splitJoint
from distances import hausdorff95
from lesions import countStray, scoreLesions
from smallparts import dropSmall, relabelSmallET, tuneSmall

__all__ = [
    'compareUnits',
    'computeMetrics',
    'countClasses',
    'countStray',
    'dropSmall',
    'hausdorff95',
    'relabelSmallET',
    'scoreLesions',
    'scorePatient',
    'scoreTable',
    'summarize',
    'tuneSmall',
]


def computeMetrics(TP, FP, FN, TN):
    """Prints and gives the pooled scores of the three tumor classes.

    Pooled means: the voxels of all patients are counted together, as if they were one patient. A patient with a large
    tumor weighs more than one with a small tumor, and Dice = 2 P R / (P + R), IoU = Dice / (2 - Dice) always hold.

    Args:
        TP, FP, FN, TN: class-wise counts of voxels, shape (4,), tensors or arrays of whole numbers. Class 0 is counted
            but not reported.

    Returns:
        DataFrame with the rows of the classes 1 to 3 and the columns `Precision`, `Recall`, `Accuracy`, `IoU score`,
        `DICE score`, 0 to 1. A score without a single voxel to tell (0 / 0, as the recall of a class that no patient
        has) is NaN.

    Raises:
        ValueError: other shapes, or a negative count.
    """
    counts = [np.asarray(count, dtype=float) for count in (TP, FP, FN, TN)]
    for name, count in zip(('TP', 'FP', 'FN', 'TN'), counts, strict=True):
        if count.shape != (config.NO_CLASSES,) or (count < 0).any():
            raise ValueError(f'{name} is {count}; {config.NO_CLASSES} counts were expected, one a class.')
    scores = {name: score[1:] for name, score in _scoreCounts(*counts).items()}
    table = pd.DataFrame(scores, index=pd.Index(config.CLASS_NAMES[1:], name='class'))
    print('Pooled over all voxels of all patients (large tumors weigh more than small ones):')
    print(table.to_string(float_format='{:.3f}'.format))
    return table


def _scoreCounts(TP, FP, FN, TN):
    """Gives the five scores by name, arrays of the counts' shape; 0 / 0 is NaN."""
    with np.errstate(invalid='ignore'):
        return {
            'Precision': TP / (TP + FP),
            'Recall': TP / (TP + FN),
            'Accuracy': (TP + TN) / (TP + FP + FN + TN),
            'IoU score': TP / (TP + FP + FN),
            'DICE score': 2 * TP / (2 * TP + FP + FN),
        }


def compareUnits(predictions):
    """Gives the five scores of `computeMetrics` three times: over pooled voxels, per patient and per slice.

    They differ because the mean is taken over other things. Pooled, every voxel weighs alike, so large tumors rule; per
    patient, every patient does, so small tumors, which are harder, pull the mean down; per slice, every slice does, and
    the many slices that have none of a class, in truth and prediction, score 1 and pull the mean up.

    Args:
        predictions: dict of patient to (y, yhat), or an iterable of such pairs, say a generator that predicts one
            patient after the other: only counts are kept. Slices first, as `engine.predict` gives them.

    Returns:
        DataFrame, rows by `unit` ('pooled voxels', 'patient', 'slice') and `class` (1 to 3), columns as
        `computeMetrics`. Pooled, 0 / 0 is NaN, as there. Per patient and slice every unit counts: where a class is
        missing in truth and prediction the unit scores 1, and 0 where only one of them lacks it.

    Raises:
        ValueError: no patients; other shapes, dtypes or classes.
    """
    pairs = predictions.values() if hasattr(predictions, 'values') else predictions
    pooled, sums, units = 0, {'patient': 0, 'slice': 0}, {'patient': 0, 'slice': 0}
    for y, yhat in pairs:
        slices = np.stack([countJoint(*pair) for pair in zip(*asVolumes(y, yhat), strict=True)])  # (D, 4, 4)
        patient = slices.sum(0, keepdims=True)
        pooled = pooled + patient[0]
        for unit, joint in (('patient', patient), ('slice', slices)):
            sums[unit] = sums[unit] + _scoreUnits(joint).sum(0)
            units[unit] += len(joint)
    if not units['patient']:
        raise ValueError('No predictions to score; at least one patient was expected.')
    tables = {'pooled voxels': _scoreCounts(*splitJoint(pooled))}
    names = list(tables['pooled voxels'])
    tables |= {unit: dict(zip(names, (sums[unit] / units[unit]).T, strict=True)) for unit in sums}
    index = pd.Index(config.CLASS_NAMES, name='class')
    return pd.concat({unit: pd.DataFrame(table, index)[1:] for unit, table in tables.items()}, names=['unit'])


def _scoreUnits(joint):
    """Gives the five scores (U, 4 classes, 5) of units with joint counts (U, 4, 4), with the rule for 0 / 0."""
    TP, FP, FN, TN = splitJoint(joint)
    isEmpty = (TP + FP + FN == 0)[..., None]
    scores = np.stack(list(_scoreCounts(TP, FP, FN, TN).values()), axis=-1)
    return np.where(np.isnan(scores), isEmpty, scores)


def scorePatient(y, yhat, spacing=(1, 1, 1)):
    """Gives the scores of one patient by region, by the rules of BraTS 2020.

    Args:
        y, yhat: truth and prediction, tensors or arrays of integers of one shape (any order of axes), classes 0 to 3; y
            and yhat of `engine.predict` as they are.
        spacing: mm between voxels along each axis of the arrays.

    Returns:
        DataFrame, rows `WT`, `TC`, `ET`, `NCR`, `ED`, columns `dice`, `sensitivity`, `specificity`, `precision` (0 to
        1), `hd95` (mm, see `hausdorff95`), `volumeTruth`, `volumePredicted` (ml). No score is ever NaN. A region empty
        in truth and prediction has Dice, sensitivity and precision 1 and HD95 0; empty in one of them, Dice,
        sensitivity and precision 0 and HD95 373.12866. Specificity is 1 where the region fills the volume, so that
        there is nothing to be specific about.

    Raises:
        ValueError: other shapes, dtypes or classes, or a spacing that does not fit.

    Reference:
        Bakas et al., arXiv:1811.02629, section on evaluation; the empty rules are those of the challenge's platform.
    """
    y, yhat = asPair(y, yhat)
    spacing = asSpacing(spacing, y.ndim)
    ml = float(np.prod(spacing)) / 1000  # of a voxel
    joint = countJoint(y, yhat)
    box = boxOf(y | yhat)
    y, yhat = y[box], yhat[box]
    rows = {}
    for region, classes in config.REGIONS.items():
        isIn = np.isin(np.arange(config.NO_CLASSES), classes)
        TP, FN = joint[isIn][:, isIn].sum(), joint[isIn][:, ~isIn].sum()
        FP, TN = joint[~isIn][:, isIn].sum(), joint[~isIn][:, ~isIn].sum()
        isEmpty = float(TP + FP + FN == 0)
        rows[region] = {
            'dice': 2 * TP / (2 * TP + FP + FN) if not isEmpty else 1.0,
            'sensitivity': TP / (TP + FN) if TP + FN else isEmpty,
            'specificity': TN / (TN + FP) if TN + FP else 1.0,
            'precision': TP / (TP + FP) if TP + FP else isEmpty,
            'hd95': hausdorff95(isIn[y], isIn[yhat], spacing),
            'volumeTruth': (TP + FN) * ml,
            'volumePredicted': (TP + FP) * ml,
        }
    return pd.DataFrame.from_dict(rows, orient='index').rename_axis('region')


def scoreTable(scores):
    """Gives the scores of many patients as one long table.

    Args:
        scores: dict of patient to the table of `scorePatient`, or to that of `scoreLesions`.

    Returns:
        DataFrame, one row for each patient and region, columns `patient`, `region` and those of the tables (units as
        there: mm and ml).

    Raises:
        ValueError: no patients.
    """
    if not scores:
        raise ValueError('No scores; a table of at least one patient was expected.')
    return pd.concat(dict(scores), names=['patient', 'region']).reset_index()


def summarize(table):
    """Gives mean, median, spread and the interval of the mean over patients, of each region and score.

    The interval tells how much the mean owes to which patients happened to be scored: as many are drawn again with
    replacement, `config.BOOTSTRAP_RESAMPLES` times, and the middle `config.CONFIDENCE` of the means is kept (percentile
    bootstrap, seeded by `config.SEED`; the order of the patients does not matter).

    Args:
        table: as `scoreTable` gives it.

    Returns:
        DataFrame, rows by `region` and `score`, columns `mean`, `median`, `std` (n - 1; NaN of one patient), `low`,
        `high` (all in the score's unit: 0 to 1, mm, ml), `patients`, and, where the table has volumes, `emptyTruth` and
        `emptyBoth`: of those patients, how many have none of the region in truth, and how many neither there nor in
        the prediction. A NaN in the table shows as NaN; nothing drops out.

    Raises:
        ValueError: no rows.

    Reference:
        Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    if table.empty:
        raise ValueError('The table has no rows; at least one patient was expected.')
    summaries = {}
    for region, part in table.groupby('region', sort=False):
        scores = part.drop(columns=['patient', 'region'])
        values = np.sort(scores.to_numpy(dtype=float), axis=0)  # (patients, scores)
        low, high = _resampleMeans(values)
        summary = {'mean': values.mean(0), 'median': np.median(values, axis=0)}
        summary |= {'std': scores.std().to_numpy(), 'low': low, 'high': high, 'patients': len(part)}
        if 'volumeTruth' in part:
            isEmpty = part['volumeTruth'] == 0
            summary |= {'emptyTruth': isEmpty.sum(), 'emptyBoth': (isEmpty & (part['volumePredicted'] == 0)).sum()}
        summaries[region] = pd.DataFrame(summary, index=scores.columns)
    return pd.concat(summaries, names=['region', 'score'])


def _resampleMeans(values):
    """Gives the lower and upper end (scores,) of the bootstrap interval of the mean of values (patients, scores)."""
    count = len(values)
    drawn = np.random.default_rng(config.SEED).integers(count, size=(config.BOOTSTRAP_RESAMPLES, count))
    # how often each patient was drawn, as a share: one product then gives all means
    cells = drawn + count * np.arange(len(drawn))[:, None]
    weights = np.bincount(cells.ravel(), minlength=drawn.size).reshape(drawn.shape) / count
    tail = (1 - config.CONFIDENCE) / 2
    return np.quantile(weights @ values, [tail, 1 - tail], axis=0)
