"""Score segmentations: one patient, many patients, or the voxels of all patients."""

import warnings

import numpy as np
import pandas as pd
from scipy import stats

import config
from metrics.counts import asPair, asSpacing, asVolumes, boundingBox, confusionMatrix, countsFromConfusion, widenBox
from metrics.distances import hausdorff95, surfaceDice
from metrics.lesions import keptPrediction
from metrics.rules import findRule

_BATCH = 100  # bootstrap resamples drawn at once; bounds the memory


def computeMetrics(TP, FP, FN, TN):
    """Print and return the micro average of the scores of the three tumor classes.

    A micro average pools the voxels of all patients: large tumors weigh more than small ones, and Dice = 2 P R / (P +
    R), IoU = Dice / (2 - Dice) always hold.

    Args:
        TP, FP, FN, TN: voxels of each class, shape (4,), tensors or arrays of whole numbers. Class 0 is counted but not
            reported.

    Returns:
        DataFrame with the rows of the classes 1 to 3 and the columns `Precision`, `Recall`, `Accuracy`, `IoU score`,
        `DICE score`, 0 to 1. A score of 0 / 0, such as the recall of a class that no patient has, is NaN.

    Raises:
        ValueError: if a shape differs, or a count is negative.
    """
    counts = [np.asarray(count, dtype=float) for count in (TP, FP, FN, TN)]
    for name, count in zip(('TP', 'FP', 'FN', 'TN'), counts, strict=True):
        if count.shape != (config.NO_CLASSES,) or (count < 0).any():
            raise ValueError(f'{name} is {count}; {config.NO_CLASSES} counts were expected, one per class.')
    scores = {name: score[1:] for name, score in _scoreCounts(*counts).items()}
    table = pd.DataFrame(scores, index=pd.Index(config.CLASS_NAMES[1:], name='class'))
    print('Micro average over the voxels of all patients (large tumors weigh more than small ones):')
    print(table.to_string(float_format='{:.3f}'.format))
    return table


def _scoreCounts(TP, FP, FN, TN):
    """Return the five scores by name, arrays of the counts' shape; 0 / 0 is NaN."""
    with np.errstate(invalid='ignore'):
        return {
            'Precision': TP / (TP + FP),
            'Recall': TP / (TP + FN),
            'Accuracy': (TP + TN) / (TP + FP + FN + TN),
            'IoU score': TP / (TP + FP + FN),
            'DICE score': 2 * TP / (2 * TP + FP + FN),
        }


def compareAverages(predictions):
    """Return the five scores of `computeMetrics` as micro average, and as macro averages over patients and slices.

    In the micro average every voxel weighs the same, so large tumors dominate. In the macro average over patients every
    patient does, so small tumors, which are harder, lower the mean. In the macro average over slices every slice does,
    so the many slices without a class, in truth and prediction, score 1 and raise the mean.

    Args:
        predictions: dict of patient to (y, yhat), or an iterable of such pairs; of a generator only counts are stored.
            The first axis of y and yhat is the slice, as in `engine.predict`.

    Returns:
        DataFrame with the index levels `average` ('micro average (pooled voxels)', 'macro average over patients',
        'macro average over slices') and `class` (the names of classes 1 to 3), and the columns of `computeMetrics`. In
        the micro average 0 / 0 is NaN. In the macro averages a patient or slice without the class scores 1 if the
        prediction has none of it either, else 0.

    Raises:
        ValueError: if there are no patients, or shapes, dtypes or classes are not as above.
    """
    pairs = predictions.values() if hasattr(predictions, 'values') else predictions
    units = {'patients': [], 'slices': []}  # confusion matrices
    for y, yhat in pairs:
        slices = [confusionMatrix(*pair) for pair in zip(*asVolumes(y, yhat), strict=True)]
        units['patients'].append(sum(slices))
        units['slices'] += slices
    if not units['patients']:
        raise ValueError('No predictions to score; at least one patient was expected.')
    micro = _scoreCounts(*countsFromConfusion(sum(units['patients'])))
    tables = {'micro average (pooled voxels)': micro}
    for unit, matrices in units.items():
        scores = _scoreUnits(np.stack(matrices)).mean(0)
        tables[f'macro average over {unit}'] = dict(zip(micro, scores.T, strict=True))
    index = pd.Index(config.CLASS_NAMES, name='class')
    return pd.concat({name: pd.DataFrame(table, index)[1:] for name, table in tables.items()}, names=['average'])


def _scoreUnits(matrices):
    """Return the five scores (U, 4 classes, 5) of U patients or slices from confusion matrices (U, 4, 4).

    A class that truth and prediction lack scores 1; any other 0 / 0 is 0.
    """
    TP, FP, FN, TN = countsFromConfusion(matrices)
    isEmpty = (TP + FP + FN == 0)[..., None]
    scores = np.stack(list(_scoreCounts(TP, FP, FN, TN).values()), axis=-1)
    return np.where(np.isnan(scores), isEmpty, scores)


def scorePatient(y, yhat, spacing=(1, 1, 1), rule='BraTS2020'):
    """Score one patient region by region, over the whole volume, by the rules of a challenge.

    Args:
        y, yhat: truth and prediction, tensors or arrays of integers of the same shape (axes in any order), classes 0 to
            3, and 4 for the resection cavity where the rule has the region `RC`. The y and yhat of `engine.predict` can
            be passed as they are.
        spacing: mm between voxels along each axis of the arrays.
        rule: 'BraTS2020', 'BraTS2023', 'BraTS2024' (GLI of 2024 and 2025), 'BraTS2024-SSA' (BraTS-Africa of both years)
            or 'BraTS2026'. From 2023 on three axes are needed.

    Returns:
        DataFrame with the rows `WT`, `TC`, `ET`, `NCR`, `ED` (of other rules: those of `metrics.scoreLesions`) and the
        columns `dice`, `sensitivity`, `specificity`, `precision` (0 to 1), `hd95` (mm, see `hausdorff95`),
        `volumeTruth`, `volumePredicted` (ml), from 2024 on `nsd0.5` and `nsd1.0` (0 to 1), in 2026 only the first: the
        surface Dice at that tolerance in mm. A region empty in truth and prediction has Dice, NSD, sensitivity and
        precision 1 and HD95 0; by 'BraTS2026' it has no score (NaN). A region empty in one of them has Dice, NSD,
        sensitivity and precision 0 and the HD95 of the rule: 373.12866, 374 ('BraTS2023', 'BraTS2024-SSA'), 337
        ('BraTS2024') or 373 mm; by 'BraTS2026' so does one without a common voxel. 'BraTS2024' and 'BraTS2024-SSA'
        first remove small predicted lesions, in each region for itself, also from `volumePredicted`.

    Raises:
        ValueError: if shapes, dtypes or classes are not as above, the spacing does not fit, or the rule is unknown.

    Reference:
        Bakas et al., arXiv:1811.02629, section on evaluation; for later years see `metrics.scoreLesions`.
    """
    rule = findRule(rule)
    y, yhat = (asPair if rule.hd95 == 'challenge' else asVolumes)(y, yhat, rule.numClasses())
    spacing = asSpacing(spacing, y.ndim)
    numVoxels = y.size
    margin = max(region.dilation for region in rule.namedRegions().values()) if rule.isPredictionDilated else 0
    box = widenBox(boundingBox(y | yhat), margin, y.shape)
    y, yhat = y[box], yhat[box]
    rows = {}
    for name, region in rule.namedRegions().items():
        isIn = rule.classTable(name)
        rows[name] = _scoreRegion(isIn[y], keptPrediction(isIn[yhat], region), numVoxels, spacing, rule)
    return pd.DataFrame.from_dict(rows, orient='index').rename_axis('region')


def _scoreRegion(truth, prediction, numVoxels, spacing, rule):
    """Return the scores of one region, name -> number, from masks cut out of a volume of `numVoxels` around both."""
    TP = np.count_nonzero(truth & prediction)
    FN, FP = np.count_nonzero(truth) - TP, np.count_nonzero(prediction) - TP
    TN = numVoxels - TP - FN - FP
    ml = float(np.prod(spacing)) / 1000  # of one voxel
    isEmpty = TP + FP + FN == 0
    empty = float(isEmpty) if rule.isEmptyScored or not isEmpty else np.nan  # of a score that is 0 / 0
    isPenalized = not isEmpty and (TP == 0 if rule.isOverlapNeeded else TP + FN == 0 or TP + FP == 0)
    if isPenalized or isEmpty:
        hd95, nsd = rule.penalty if isPenalized else 1 - empty, dict.fromkeys(rule.tolerances, empty)
    else:
        hd95 = hausdorff95(truth, prediction, spacing, rule.hd95)
        nsd = {limit: surfaceDice(truth, prediction, limit, spacing) for limit in rule.tolerances}
    return {
        'dice': 2 * TP / (2 * TP + FP + FN) if not isEmpty else empty,
        'sensitivity': TP / (TP + FN) if TP + FN else empty,
        'specificity': TN / (TN + FP) if TN + FP else 1.0,
        'precision': TP / (TP + FP) if TP + FP else empty,
        'hd95': hd95,
        'volumeTruth': (TP + FN) * ml,
        'volumePredicted': (TP + FP) * ml,
        **{f'nsd{limit}': value for limit, value in nsd.items()},
    }


def scoreTable(scores):
    """Return the tables of many patients as one, with a row per patient and region.

    Args:
        scores: dict of patient to the table of `scorePatient`, or to that of `scoreLesions`.

    Returns:
        DataFrame with the columns `patient`, `region` and those of the tables.

    Raises:
        ValueError: if there are no patients.
    """
    if not scores:
        raise ValueError('No scores; the table of at least one patient was expected.')
    return pd.concat(dict(scores), names=['patient', 'region']).reset_index()


def summarize(table):
    """Return mean, median, standard deviation and the interval of the mean over patients, per region and score.

    The interval is a percentile bootstrap over the patients with `config.BOOTSTRAP_RESAMPLES` resamples at the level
    `config.CONFIDENCE`, seeded by `config.SEED`. The order of the patients does not matter.

    Args:
        table: DataFrame returned by `scoreTable`, or by `postprocess.scoreFolder` with the column `rule`.

    Returns:
        DataFrame with the index levels `rule` (if the table has it), `region` and `score` and the columns `mean`,
        `median`, `std` (n - 1 in the denominator; NaN for one patient), `low`, `high` (the interval), all in the unit
        of the score (0 to 1, mm, ml), and `patients`. If the table has volumes, `emptyTruth` counts the patients
        without the region in the truth, and `emptyBoth` those without it in truth and prediction. A NaN in the table
        makes the summary of that score NaN. A score that a rule does not have, NaN in all its rows, has no summary.
        With an infinite HD95 the mean is infinite and the deviation NaN.

    Raises:
        ValueError: if the table has no rows.

    Reference:
        Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    if table.empty:
        raise ValueError('The table has no rows; at least one patient was expected.')
    summaries, levels = {}, [level for level in ('rule', 'region') if level in table]
    for keys, part in table.groupby(levels, sort=False):
        scores = part.drop(columns=['patient', *levels])
        if 'rule' in table:  # without the scores that this rule does not have
            scores = scores[scores.columns[table.loc[table['rule'] == keys[0], scores.columns].notna().any()]]
        values = np.sort(scores.to_numpy(dtype=float), axis=0)  # (patients, scores)
        with np.errstate(invalid='ignore'):  # of infinite distances
            low, high = bootstrapMean(values)
            summary = {'mean': (mean := values.mean(0)), 'median': np.median(values, axis=0)}
            summary |= {'std': scores.std(skipna=False).to_numpy(), 'patients': len(part)}
            summary |= {'low': np.minimum(low, mean), 'high': np.maximum(high, mean)}  # equal but for rounding
        if 'volumeTruth' in part:
            isEmpty = part['volumeTruth'] == 0
            summary |= {'emptyTruth': isEmpty.sum(), 'emptyBoth': (isEmpty & (part['volumePredicted'] == 0)).sum()}
        summaries[keys] = pd.DataFrame(summary, index=scores.columns)
    return pd.concat(summaries, names=[*levels, 'score'])


def bootstrapMean(values):
    """Return the lower and upper end (scores,) of the interval of the mean of values (patients, scores)."""
    if len(values) == 1:  # scipy needs at least two
        return values[0], values[0]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', stats.DegenerateDataWarning)  # of a NaN in the table
        interval = stats.bootstrap(
            (values,),
            np.mean,
            n_resamples=config.BOOTSTRAP_RESAMPLES,
            batch=_BATCH,
            confidence_level=config.CONFIDENCE,
            method='percentile',
            random_state=np.random.default_rng(config.SEED),  # scipy 1.13 has no rng=
        ).confidence_interval
    return interval.low, interval.high
