"""Estimate the Dice of a segmentation without truth, from how much members and planes of the model disagree."""

import json
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import optimize, stats

import config
from atomic import writeAtomically
from metrics.counts import confusionMatrix
from patients.editions import withoutTime
from patients.reading import modelFolder

MEASURES = ('planeDice', 'planeSpread', 'entropy', 'memberDice', 'memberSpread')
_FEWEST = 5  # patients from which a region is fitted
_SUREST = 0.05  # scale of the error of an estimated Dice of 1
_CONSTANT = 1e-9  # a measure whose values differ by less is constant: the difference is rounding
_GROUPS = 20  # of subjects in `crossFit`, at most


def measureMember(parts):
    """Return what `describeDisagreement` needs of one member of an ensemble; `engine.segment` calls it.

    Args:
        parts: list of the probabilities by each of its planes, float (D, K, W, H), on any device.

    Returns:
        dict: `classes`, uint8 (D, W, H), the member's segmentation; `confusions`, the `metrics.confusionMatrix` of each
        pair of planes; `counts`, (planes, K), voxels of each class; `entropy`, region -> mean entropy in bits (0 to 1)
        of its probability over the voxels that the member gives it, NaN without such voxels. Arrays are on the CPU.
    """
    mean = sum(parts) / len(parts)
    own, entropy = mean.max(1).indices, {}
    classes = [part.max(1).indices.to(torch.uint8).cpu().numpy() for part in parts]
    isTumor = own > 0
    # (voxels, K), (voxels,); copied first: mps has no float64
    probability, given = mean.movedim(1, -1)[isTumor].cpu().double(), own[isTumor].cpu()
    for region, numbers in config.REGIONS.items():
        isIn = torch.isin(given, torch.tensor(numbers, device=given.device))
        inside = probability[isIn][:, list(numbers)].sum(1).clamp(0, 1)
        bits = -(torch.special.xlogy(inside, inside) + torch.special.xlogy(1 - inside, 1 - inside)) / math.log(2)
        entropy[region] = float(bits.mean())  # NaN of none
    return {
        'classes': own.to(torch.uint8).cpu().numpy(),
        'confusions': [confusionMatrix(one, other) for one, other in combinations(classes, 2)],
        'counts': np.array([_countVoxels(each) for each in classes]),
        'entropy': entropy,
    }


def _countVoxels(classes):
    """Return the voxels (K,) of each class."""
    return np.bincount(classes.ravel(), minlength=config.NO_CLASSES)


def describeDisagreement(measured, yhat):
    """Return how much the members of a model, and the planes of each member, disagree about one patient.

    Args:
        measured: list of what `measureMember` returned for each member; empty for a patient without brain.
        yhat: integer (D, W, H), the segmentation that is used, after any rules against small components.

    Returns:
        DataFrame with the rows of `config.REGIONS` and the columns `members`, `planes` (numbers), `voxels` (of the
        region in yhat), and:
        - `planeDice`: mean Dice over the pairs of planes of a member, mean over members; NaN with one plane;
        - `planeSpread`: standard deviation of the planes' volumes over their mean, mean over members; NaN likewise;
        - `entropy`: mean entropy of the region's probability, 0 to 1, over the voxels that a member gives it; else 1;
        - `memberDice`, `memberSpread`: the same between the segmentations of members; NaN with one member.
        Two empty segmentations have Dice 1 and spread 0.

    Reference:
        Roy et al., Bayesian QuickNAT: model uncertainty in deep whole-brain segmentation for structure-wise quality
        control (arXiv:1811.09800), for pairwise Dice and spread.
    """
    yhat, rows = np.asarray(yhat), {}
    pairs = [confusionMatrix(one['classes'], other['classes']) for one, other in combinations(measured, 2)]
    counts = np.array([_countVoxels(each['classes']) for each in measured])
    for region, numbers in config.REGIONS.items():
        entropy = [each['entropy'][region] for each in measured if not math.isnan(each['entropy'][region])]
        rows[region] = {
            'members': len(measured),
            'planes': max((len(each['counts']) for each in measured), default=0),
            'voxels': int(np.isin(yhat, numbers).sum()),
            'planeDice': _mean([_meanDice(each['confusions'], numbers) for each in measured]),
            'planeSpread': _mean([_spread(each['counts'], numbers) for each in measured]),
            'entropy': _mean(entropy or [1.0]),  # no member gives it a voxel: full doubt
            'memberDice': _meanDice(pairs, numbers),
            'memberSpread': _spread(counts, numbers),
        }
    return pd.DataFrame.from_dict(rows, orient='index').rename_axis('region')


def _mean(values):
    return float(np.mean(values)) if len(values) else np.nan


def _meanDice(confusions, numbers):
    """Return the mean Dice of a region (classes) over confusion matrices (K, K); NaN of none."""
    found, numbers = [], list(numbers)
    for matrix in confusions:
        total = matrix[numbers].sum() + matrix[:, numbers].sum()
        found.append(2 * matrix[np.ix_(numbers, numbers)].sum() / total if total else 1.0)
    return _mean(found)


def _spread(counts, numbers):
    """Return the standard deviation of a region's volumes over their mean, of counts (S, K); NaN if S is below 2."""
    if len(counts) < 2:
        return np.nan
    volumes = counts[:, list(numbers)].sum(1)
    return float(volumes.std() / volumes.mean()) if volumes.any() else 0.0


def fitQuality(disagreement, scores):
    """Return a fit of the true Dice of each region to the disagreement, from patients that the model has not seen.

    The Dice falls linearly with each measure of disagreement and never rises with one (non-negative least squares). The
    interval holds the Dice of a new patient with about the probability `config.QUALITY_LEVEL`: its reach is that
    quantile of the errors for patients left out of the fit, one subject at a time (jackknife). Errors are divided by
    1.05 minus the estimate, so that low estimates have wider intervals than high ones.

    Args:
        disagreement: DataFrame with `patient`, `region` and the columns of `describeDisagreement`, as
            `readDisagreement` returns it of a folder of predictions of patients that the model was not trained on.
        scores: DataFrame of their true scores, as `predictFolder` or `scoreFolder` returns it, by one rule. Patients
            that are in only one of both tables are left out and counted.

    Returns:
        dict of plain values: `level`, `planes`, `regions`. The last is a dict of region -> `measures`, `intercept`,
        `slopes`, `reach`, `patients`. A region is fitted if at least five patients, of two or more subjects, have it
        in their prediction.

    Raises:
        ValueError: no region can be fitted; a patient is there twice; or predictions were made of different planes.

    Reference:
        Lei et al., Distribution-free predictive inference for regression (arXiv:1604.04173), sections 2.4 and 5.2.
    """
    table = _join(disagreement, scores)
    fit = _fitRegions(table)
    if left := [region for region in table['region'].unique() if region not in fit['regions']]:
        reason = f'fewer than {_FEWEST} patients, or one subject only, have them in their prediction'
        print(f'Not fitted, because {reason}: {", ".join(left)}.')
    if not fit['regions']:
        number = table['patient'].nunique()
        raise ValueError(
            f'{number} patients: too few to fit any region; {_FEWEST} of at least two subjects were expected.'
        )
    return fit


def _fitRegions(table):
    """Return the dict of `fitQuality` from the rows of `_join`; `regions` may be empty."""
    regions = {region: _fitRegion(part) for region, part in table.groupby('region', sort=False)}
    fitted = {region: fit for region, fit in regions.items() if fit}
    return {'level': config.QUALITY_LEVEL, 'planes': int(table['planes'].max()), 'regions': fitted}


def _join(disagreement, scores):
    """Return the rows of both tables with the column `dice`; raise a ValueError if they cannot be joined."""
    if 'rule' in scores and scores['rule'].nunique() != 1:
        raise ValueError(f'The scores are by the rules {sorted(scores["rule"].unique())}; choose one of them.')
    tables = [table.assign(patient=table['patient'].astype(str)) for table in (disagreement, scores)]
    for table in tables:
        if twice := sorted(set(table['patient'][table.duplicated(['patient', 'region'])])):
            raise ValueError(f'{", ".join(twice[:5])}: twice in a table; one row per patient and region was expected.')
    table = tables[0].merge(tables[1][['patient', 'region', 'dice']].dropna(), on=['patient', 'region'])
    numLeft = len({*tables[0]['patient'], *tables[1]['patient']}) - table['patient'].nunique()
    if numLeft:
        print(f'{numLeft} patients are left out: they have no disagreement or no true score.')
    if table.empty:
        raise ValueError('No patient has both a disagreement and a true score.')
    planes = sorted(set(table['planes'][table['members'] > 0]))
    if len(planes) > 1:
        found = ', '.join(map(str, planes))
        raise ValueError(f'The predictions were made of {found} planes; the same number was expected.')
    return table


def _fitRegion(table):
    """Return the fit of one region, a dict, or None with too few patients."""
    table = table[table['voxels'] > 0]
    subjects = table['patient'].map(withoutTime).to_numpy()
    if len(table) < _FEWEST or len(set(subjects)) < 2:  # one is left out at a time
        return None
    measures = [name for name in MEASURES if table[name].notna().all()]
    x, y = _measuresOf(table, measures), table['dice'].to_numpy(float)
    errors = []
    for subject in np.unique(subjects):
        isOut = subjects == subject
        estimates = _apply(x[isOut], *_regress(x[~isOut], y[~isOut]))
        errors += list(np.abs(y[isOut] - estimates) / _doubt(estimates))
    rank = math.ceil((len(errors) + 1) * config.QUALITY_LEVEL)
    intercept, slopes = _regress(x, y)
    return {
        'measures': measures,
        'intercept': float(intercept),
        'slopes': [float(slope) for slope in slopes],
        'reach': float(np.sort(errors)[rank - 1]) if rank <= len(errors) else 1 / _SUREST,  # with too few, any Dice
        'patients': len(table),
    }


def _measuresOf(table, measures):
    """Return measures (patients, M) of which a larger value is more disagreement."""
    return np.stack([1 - table[name] if name.endswith('Dice') else table[name] for name in measures], 1).astype(float)


def _regress(x, y):
    """Return intercept and slopes (M,) of y = intercept - x @ slopes with slopes of 0 or more, by least squares."""
    centred = np.where(np.ptp(x, axis=0) < _CONSTANT, 0, x.mean(0) - x)
    slopes = optimize.nnls(centred, y - y.mean())[0]
    return y.mean() + x.mean(0) @ slopes, slopes


def _doubt(estimates):
    """Return the scale of the error of each estimate (n,): 1.05 - estimate."""
    return 1 - estimates + _SUREST


def _apply(x, intercept, slopes):
    return np.clip(intercept - x @ np.asarray(slopes), 0, 1)


def predictQuality(disagreement, fit):
    """Return the estimated Dice of each patient and region, and flag those not to be trusted.

    Args:
        disagreement: as in `fitQuality`, of any patients.
        fit: dict of `fitQuality`.

    Returns:
        DataFrame with the columns `patient`, `region`, `predictedDice`, `low`, `high` (its interval), `isFlagged` and
        `reason`. Flagged are estimates below `config.QUALITY_LIMIT`, and regions without a voxel in the prediction,
        which have no estimate (NaN). Regions that are not fitted are left out.

    Raises:
        ValueError: the patients were predicted of other planes, or lack a measure of the fit.
    """
    planes = sorted(set(disagreement['planes'][disagreement['members'] > 0]))
    if planes not in ([], [fit['planes']]):
        found = ', '.join(map(str, planes))
        raise ValueError(f'The fit is of {fit["planes"]} planes, but predictions were made of {found}; fit it anew.')
    parts = []
    for region, own in fit['regions'].items():
        part = disagreement[disagreement['region'] == region]
        isEmpty = (part['voxels'] == 0).to_numpy()
        missing = part['patient'][part[own['measures']].isna().any(axis=1) & ~isEmpty]
        if len(missing):
            raise ValueError(
                f'{", ".join(map(str, missing[:5]))}: the fit of {region} needs {", ".join(own["measures"])}; predict '
                'with as many members as it was fitted with, or fit it anew.'
            )
        estimates = _apply(_measuresOf(part, own['measures']), own['intercept'], own['slopes'])
        dice = np.where(isEmpty, np.nan, estimates)
        table = pd.DataFrame({'patient': part['patient'].astype(str), 'region': region, 'predictedDice': dice})
        reach = own['reach'] * _doubt(dice)
        table['low'], table['high'] = (dice - reach).clip(0, 1), (dice + reach).clip(0, 1)
        table['isFlagged'] = isEmpty | (dice < config.QUALITY_LIMIT)
        low = f'estimated Dice below {config.QUALITY_LIMIT}'
        table['reason'] = np.where(isEmpty, 'no voxel predicted', np.where(table['isFlagged'], low, ''))
        parts.append(table)
    return pd.concat(parts, ignore_index=True)


def crossFit(disagreement, scores):
    """Return the estimates of patients by fits that were made without them and without other scans of their subject.

    Arguments and errors are those of `fitQuality`.

    Returns:
        DataFrame with the columns of `predictQuality` and `dice`, the true one. A region that cannot be fitted without
        a patient has no row for it.
    """
    table = _join(disagreement, scores)
    subjects = table['patient'].map(withoutTime)
    numbers = pd.Series(np.arange(subjects.nunique()) % _GROUPS, sorted(subjects.unique()))
    groups, parts = subjects.map(numbers), []
    for group in sorted(numbers.unique()):
        others = table[groups != group]
        if len(others) and (fit := _fitRegions(others))['regions']:
            parts.append(predictQuality(table[groups == group], fit))
    if not parts:
        raise ValueError(f'{table["patient"].nunique()} patients are too few to fit without one; see fitQuality.')
    return pd.concat(parts).merge(table[['patient', 'region', 'dice']], on=['patient', 'region'])


def summarizeQuality(crossed):
    """Return how good the estimates of `crossFit` are, per region.

    Returns:
        DataFrame indexed by region: `patients` with an estimate; `spearman`, the rank correlation of estimated and true
        Dice; `error`, the mean distance between them; `coverage`, the fraction of patients whose Dice lies in its
        interval, to compare with `config.QUALITY_LEVEL`; `width`, the mean width of the intervals; and the numbers of
        patients `failures`, with a true Dice below `config.QUALITY_LIMIT`; `flagged`; `caught`, with both; and `empty`,
        without an estimate because nothing was predicted, who count among the last three too.
    """
    rows = {}
    for region, part in crossed.groupby('region', sort=False):
        known, isFailure = part[part['predictedDice'].notna()], part['dice'] < config.QUALITY_LIMIT
        isConstant = known[['predictedDice', 'dice']].nunique().min() < 2
        rows[region] = {
            'patients': len(known),
            'spearman': np.nan if isConstant else stats.spearmanr(known['predictedDice'], known['dice']).statistic,
            'error': (known['predictedDice'] - known['dice']).abs().mean(),
            'coverage': known['dice'].between(known['low'], known['high']).mean(),
            'width': (known['high'] - known['low']).mean(),
            'failures': isFailure.sum(),
            'flagged': part['isFlagged'].sum(),
            'caught': (isFailure & part['isFlagged']).sum(),
            'empty': len(part) - len(known),
        }
    return pd.DataFrame.from_dict(rows, orient='index').rename_axis('region')


def findSuspiciousTruth(crossed):
    """Return the patients of `crossFit` whose Dice lies below its interval: their truth or the model is wrong.

    Returns:
        DataFrame with the columns `patient`, `region`, `dice`, `predictedDice`, `low` and `gap` (predicted minus true),
        the largest gap first; empty if there is none.
    """
    found = crossed[crossed['dice'] < crossed['low']].assign(gap=crossed['predictedDice'] - crossed['dice'])
    columns = ['patient', 'region', 'dice', 'predictedDice', 'low', 'gap']
    return found[columns].sort_values('gap', ascending=False, kind='stable', ignore_index=True)


def readDisagreement(folder):
    """Return the disagreement of a folder that `postprocess.predictFolder` filled, of all its shards, as one table.

    Raises:
        FileNotFoundError: the folder has none.
    """
    files = sorted(Path(folder).glob('disagreement*.csv'), key=lambda file: file.stat().st_mtime)  # the newest counts
    if not files:
        raise FileNotFoundError(f'{folder} has no disagreement.csv; postprocess.predictFolder writes it.')
    table = pd.concat([pd.read_csv(file, dtype={'patient': str}) for file in files], ignore_index=True)
    return table.drop_duplicates(['patient', 'region'], keep='last', ignore_index=True)


def writeFit(fit, file):
    """Write the dict of `fitQuality` as JSON."""
    with writeAtomically(file) as temporary:
        temporary.write_text(json.dumps(fit, indent=1))


def readFit(file):
    """Return the dict of `fitQuality` that `writeFit` wrote.

    Args:
        file: its path; or a model folder with `quality.json`; or 'glioma', the weights in the box.

    Raises:
        ValueError: the file holds something else.
    """
    file = modelFolder(file)
    file = file / 'quality.json' if file.is_dir() else file
    try:
        fit = json.loads(file.read_text())
        isFit = {'level', 'planes', 'regions'} <= set(fit)
    except (ValueError, TypeError):
        isFit = False
    if not isFit:
        raise ValueError(f'{file} is no fit of the quality; one that postprocess.writeFit wrote was expected.')
    return fit


def writeQuality(folder, fit):
    """Write `quality.csv` into a folder that `postprocess.predictFolder` filled, and return its table.

    Args:
        folder: folder of predictions.
        fit: dict of `fitQuality`, of the same model or of one with the same settings; or the DataFrame of `crossFit` of
            the folder's own patients, so that none is estimated by a fit that has seen it.

    Returns:
        DataFrame of `predictQuality` or `crossFit`.

    Raises:
        FileNotFoundError, ValueError: as in `readDisagreement` and `predictQuality`.
    """
    table = fit if isinstance(fit, pd.DataFrame) else predictQuality(readDisagreement(folder), fit)
    with writeAtomically(Path(folder) / 'quality.csv') as temporary:
        table.to_csv(temporary, index=False)
    numFlagged = table['patient'][table['isFlagged']].nunique()
    print(f'{numFlagged} of {table["patient"].nunique()} patients are flagged: see {Path(folder) / "quality.csv"}.')
    return table
