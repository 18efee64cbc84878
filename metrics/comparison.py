"""Compare tables of scores patient by patient, and recipes training by training: is B better than A?"""

import numpy as np
import pandas as pd
from scipy import stats

import config
from metrics.scores import bootstrapMean

_HIGHER = ('dice', 'sensitivity', 'specificity', 'precision', 'f1', 'pq', 'found')  # and each NSD: higher is better
_LOWER = ('hd95', 'missed', 'falsePositive')
_SAME = 1e-9  # scores that differ by less are equal: it is rounding
_SAME_VOLUME = 1e-6  # ml; true volumes that differ by more are those of different truths
_POWER = 0.8  # chance to show a difference that is there
_MOST_PATIENTS = 10_000  # no data set of gliomas has more
_MOST_NAMED = 5  # patients or regions in an error message


def betterIf(score):
    """Return 'higher' or 'lower', the better direction of a score's name, or None where neither is, as for volumes."""
    name = score.removeprefix('lesion')
    name = name[:1].lower() + name[1:]
    isHigher = name in _HIGHER or (name.startswith('nsd') and not name.endswith('Std'))
    return 'higher' if isHigher else 'lower' if name in _LOWER else None


def compare(tableA, tableB, by=None):
    """Return the paired differences B - A of two tables of scores, per region and score over the same patients.

    Each patient is compared with itself, so what makes a patient hard for both does not count. Higher is better for
    Dice, sensitivity, specificity, precision, surface Dice and F1; lower is better for HD95 and the numbers of false
    negatives and false positives. Volumes and deviations, of which neither is better, are not compared.

    Args:
        tableA, tableB: DataFrames of `scoreTable` or `postprocess.scoreFolder`, or a `scores.csv`, of the same patients
            by the same rule. The order of the rows does not matter.
        by: Series or dict of patient -> group, such as `patients.readGrades(df)` or `patients.readSites(df)`. Each
            group is then compared by itself. Patients that are in no table do not matter.

    Returns:
        DataFrame with the index levels `group` (with `by`), `rule` (if the tables have it), `region` and `score`, and
        the columns `betterIf` ('higher' or 'lower'); `mean` and `median` of B - A, in the unit of the score; `low` and
        `high`, the interval of the mean as in `summarize`; `better`, `worse` and `equal`, for how many patients B is
        so; `p` of the exact two-sided sign test of better against worse (1 if all are equal); `patients`, how many were
        compared; `unscored`, how many have no score (NaN) in either table and are left out. If only one table has a
        score of a patient, mean, median, interval and p are NaN. A score that a rule does not have has no row.

    Raises:
        ValueError: as `pairScores`; or a patient has no group.

    Reference:
        Dixon and Mood, The statistical sign test, Journal of the American Statistical Association 41 (1946).
    """
    a, b = pairScores(tableA, tableB)
    levels = [level for level in ('rule', 'region') if level in a.index.names]
    keys = [a.index.get_level_values(level) for level in levels]
    if by is not None:
        levels, keys = ['group', *levels], [_groupsOf(a.index.get_level_values('patient'), by), *keys]
    rows = {}
    for key, places in a.groupby(keys, sort=False).indices.items():
        key = key if isinstance(key, tuple) else (key,)
        for score in a:
            isOfRule = a.index.get_level_values('rule') == key[-2] if 'rule' in levels else slice(None)
            if a[score][isOfRule].notna().any() or b[score][isOfRule].notna().any():
                values = a[score].to_numpy(float)[places], b[score].to_numpy(float)[places]
                rows[(*key, score)] = _compareScore(*values, betterIf(score))
    table = pd.DataFrame.from_dict(rows, orient='index')
    table.index = pd.MultiIndex.from_tuples(rows, names=[*levels, 'score'])
    return table.sort_index(level='group', sort_remaining=False, kind='stable') if by is not None else table


def _compareScore(a, b, direction):
    """Return a row of `compare` from the scores (patients,) of both tables."""
    isUnscored = np.isnan(a) & np.isnan(b)
    differences = subtract(a, b)[~isUnscored]
    gain = differences if direction == 'higher' else -differences
    better, worse = int((gain > 0).sum()), int((gain < 0).sum())
    mean = median = low = high = p = np.nan
    if differences.size and not np.isnan(differences).any():
        with np.errstate(invalid='ignore'):  # of infinite distances
            mean, median = differences.mean(), np.median(differences)
            [low], [high] = bootstrapMean(np.sort(differences)[:, None])
        p = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
    row = {'betterIf': direction, 'mean': mean, 'median': median, 'low': low, 'high': high}
    row |= {'better': better, 'worse': worse, 'equal': int((gain == 0).sum()), 'p': p}
    return row | {'patients': len(differences), 'unscored': int(isUnscored.sum())}


def compareRecipes(scores):
    """Return how recipes compare that were trained in the same folds with the same seeds: is one better than the first?

    The standard error of a difference counts both that other patients would score otherwise and that another training
    would: it is clustered by patient and by training (fold and seed), and never smaller than by either alone. The
    interval is that of Student's t, with the degrees of freedom of whichever are fewer, patients or trainings.

    Args:
        scores: DataFrame with a row for each recipe, fold, seed, patient and region, and the columns `dice` and
            `hd95` (mm). A column `subject`, if there is one, says which patients are scans of one: they are clustered.

    Returns:
        DataFrame indexed by `recipe`, in the order of `scores`, with the columns
        - `dice WT`, ..., `hd95 WT`, ...: means over patients and seeds;
        - `mean`: mean Dice of the regions; `noise`: its standard deviation between seeds, NaN with one seed;
        - `difference`: of `mean` from the first recipe's, with its standard error `error` and the interval `low` to
          `high` at the level `config.CONFIDENCE`; NaN for the first recipe, and the last three with a single training;
        - `smallest`: the difference that so many patients and trainings would show four times in five;
        - `hd95 difference`, `hd95 error`: the same of the mean HD95 of the regions, in mm;
        - `verdict`: in words.

    Raises:
        ValueError: a recipe lacks patients, folds, seeds or regions of the first.

    Reference:
        Cameron, Gelbach and Miller, Robust inference with multiway clustering, Journal of Business & Economic
        Statistics 29 (2011).
    """
    names, level = list(scores['recipe'].unique()), (1 + config.CONFIDENCE) / 2
    units = ['fold', 'seed', 'patient', 'region']
    subjects = dict(zip(scores['patient'], scores.get('subject', scores['patient']), strict=True))
    wide = scores.pivot(index=units, columns='recipe', values=['dice', 'hd95'])
    if bad := [name for name in names if wide['dice'][name].isna().any()]:
        raise ValueError(f'{", ".join(bad)}: not the patients, folds, seeds and regions of the other recipes.')
    regions, rows = scores['region'].unique(), {}
    for name in names:
        own = {score: wide[score][name].groupby('region').mean()[regions] for score in ('dice', 'hd95')}
        rows[name] = {f'{score} {region}': values[region] for score, values in own.items() for region in regions}
        rows[name] |= {'mean': own['dice'].mean(), 'noise': wide['dice'][name].groupby('seed').mean().std()}
        if name == names[0]:
            continue
        changed = (wide.xs(name, axis=1, level=1) - wide.xs(names[0], axis=1, level=1)).groupby(units[:3]).mean()
        changed = changed.rename(index=subjects, level='patient')
        gain, farther = changed['dice'], changed['hd95']
        error, freedom, share = _clusteredError(gain)
        low, high = gain.mean() + np.array([-1, 1]) * stats.t.ppf(level, freedom) * error
        smallest = (stats.t.ppf(level, freedom) + stats.t.ppf(_POWER, freedom)) * error
        rows[name] |= {'difference': gain.mean(), 'error': error, 'low': low, 'high': high, 'smallest': smallest}
        rows[name] |= {'hd95 difference': farther.mean(), 'hd95 error': _clusteredError(farther)[0]}
        numPatients = gain.index.get_level_values('patient').nunique()
        rows[name]['verdict'] = _verdict(names[0], name, rows[name], numPatients, share)
    table = pd.DataFrame.from_dict(rows, orient='index').rename_axis('recipe')
    return table.fillna({'verdict': 'the others are compared with it'})


def _clusteredError(values):
    """Return the standard error of the mean of values indexed by fold, seed and patient; its degrees of freedom; and
    the share of its square that more patients would not lower, as it comes from the trainings."""
    left, variances, counts = values - values.mean(), [], []
    for levels in (['patient'], ['fold', 'seed'], ['fold', 'seed', 'patient']):
        sums = left.groupby(levels).sum()
        counts.append(len(sums))
        correction = len(sums) / (len(sums) - 1) if len(sums) > 1 else np.nan
        variances.append(correction * (sums**2).sum() / len(values) ** 2)
    patient, training, both = variances
    variance = np.max([patient, training, patient + training - both])
    return np.sqrt(variance), min(counts) - 1, max(0, training - both) / variance if variance > 0 else 0


def _verdict(first, name, row, numPatients, share):
    """Return in words what `compareRecipes` found; `share` as `_clusteredError` returns it."""
    if row['low'] > 0:
        return f'{name} is better'
    if row['high'] < 0:
        return f'{first} is better'
    if not np.isfinite(row['smallest']) or row['difference'] == 0:
        return 'cannot be told'
    allowed = (row['difference'] / row['smallest']) ** 2 - share  # of the variance, in times what it is
    if allowed <= 0:
        return 'cannot be told: more patients or seeds would be needed'
    needed = numPatients * (1 - share) / allowed
    if needed > _MOST_PATIENTS:
        return f'cannot be told: more than {_MOST_PATIENTS:,} patients would be needed'
    return f'cannot be told: about {float(f"{needed:.2g}"):,.0f} patients would be needed'


def fitLearningCurve(scores):
    """Return the Dice of recipes by the number of training patients, with a power law that is fitted to it.

    The law is 1 - Dice = a n^-b for n patients, fitted by least squares of the logarithms. The intervals are those of a
    percentile bootstrap over the patients that were scored and, at the same time, over the trainings (fold and seed),
    as both are chance.

    Args:
        scores: DataFrame as in `compareRecipes`, with a column `patients`, the number of training patients.

    Returns:
        DataFrame indexed by `recipe` and `patients`, with one row more for twice the largest number, and the columns
        `mean` (of the Dice over regions, patients and seeds), `low`, `high` (its interval), `fitted`, `fittedLow`,
        `fittedHigh` (of the law; NaN with a single number of patients), `gain`, `gainLow`, `gainHigh` (of the law,
        from the row before). Mean and interval of the last row are NaN.

    Reference:
        Owen, The pigeonhole bootstrap, Annals of Applied Statistics 1 (2007).
    """
    rows, ends = {}, [(1 - config.CONFIDENCE) / 2, (1 + config.CONFIDENCE) / 2]
    scores = scores.assign(subject=scores.get('subject', scores['patient']))
    for name, part in scores.groupby('recipe', sort=False):
        values = part.pivot_table(index=['fold', 'seed', 'subject', 'patient'], columns='patients', values='dice')
        sizes = values.columns.to_numpy(float)
        more = np.append(sizes, 2 * sizes[-1])
        generator, weights = np.random.default_rng(config.SEED), 1
        for levels in ('subject', ['fold', 'seed']):
            unit = values.groupby(levels).ngroup().to_numpy()
            count = unit.max() + 1
            drawn = generator.multinomial(count, np.full(count, 1 / count), config.BOOTSTRAP_RESAMPLES)
            drawn[0] = 1  # the scores themselves
            weights = weights * drawn[:, unit]
        weights = weights[weights.any(1)]
        means = weights @ values.to_numpy() / weights.sum(1, keepdims=True)
        fitted = np.full((len(means), len(more)), np.nan)
        if len(sizes) > 1:
            slope, start = np.polyfit(np.log(sizes), np.log(np.maximum(1 - means.T, _SAME)), 1)
            fitted = 1 - np.exp(start[:, None] + slope[:, None] * np.log(more))
        means = np.pad(means, [(0, 0), (0, 1)], constant_values=np.nan)
        gain = np.diff(fitted, axis=1, prepend=np.nan)
        columns = [each for own in (means, fitted, gain) for each in (own[0], *np.quantile(own, ends, axis=0))]
        rows |= {(name, int(size)): row for size, row in zip(more, np.transpose(columns), strict=True)}
    columns = [f'{name}{end}' for name in ('', 'fitted', 'gain') for end in ('', 'Low', 'High')]
    columns[:3] = ['mean', 'low', 'high']
    table = pd.DataFrame.from_dict(rows, orient='index', columns=columns)
    table.index = pd.MultiIndex.from_tuples(rows, names=['recipe', 'patients'])
    return table


def subtract(a, b):
    """Return b - a of scores, arrays of one shape; 0 where they are equal but for rounding, or both infinite."""
    with np.errstate(invalid='ignore'):
        return np.where(np.isclose(a, b, rtol=0, atol=_SAME), 0.0, np.subtract(b, a))


def pairScores(tableA, tableB):
    """Return the scores of two tables, as `compare` takes them, row by row for the same patient and region.

    Returns:
        a, b: DataFrames with the same index (`rule` if the tables have it, `patient`, `region`), in the order of
        `tableA`, and the same columns: the scores that `betterIf` knows.

    Raises:
        ValueError: a table has no rows, lacks a column or has a patient twice; or patients, regions, rules, scores or
            true volumes of the tables differ.
    """
    a, b = (_indexed(table, name) for table, name in ((tableA, 'A'), (tableB, 'B')))
    if a.index.names != b.index.names:
        raise ValueError(
            f'Table {"A" if "rule" in a.index.names else "B"} has a column rule, the other has none: score both by the '
            'same rules.'
        )
    for level in a.index.names:
        _refuseDifferent(*(table.index.get_level_values(level).unique() for table in (a, b)), f'{level}s')
    _refuseDifferent(a.columns, b.columns, 'columns (were they scored by the same rule?)')
    _refuseDifferent(a.index, b.index, 'rows')
    b = b.reindex(a.index)
    if 'volumeTruth' in a:
        isOther = ~np.isclose(a['volumeTruth'], b['volumeTruth'], rtol=0, atol=_SAME_VOLUME, equal_nan=True)
        patients = a.index.get_level_values('patient')[isOther].unique()
        if len(patients):
            raise ValueError(
                f'The true volumes of {_name(patients)} differ between the tables: they were not scored against the '
                'same segmentations. Score both again.'
            )
    scores = [column for column in a if betterIf(column)]
    if not scores:
        raise ValueError(f'The tables have the columns {list(a)}, and none is a score; dice or hd95 were expected.')
    return a[scores], b[scores]


def _indexed(table, name):
    """Return a table of scores indexed by rule, patient (text) and region; raise ValueError if it cannot be."""
    missing = [column for column in ('patient', 'region') if column not in table]
    if missing or table.empty:
        raise ValueError(
            f'Table {name} has {len(table)} rows and lacks the columns {missing or "none"}; a table of scoreTable with '
            'at least one patient was expected.'
        )
    levels = [level for level in ('rule', 'patient', 'region') if level in table]
    indexed = table.assign(patient=table['patient'].astype(str)).set_index(levels)
    if not indexed.index.is_unique:
        twice = indexed.index[indexed.index.duplicated()].get_level_values('patient').unique()
        raise ValueError(f'Table {name} has {_name(twice)} twice; one row per patient and region was expected.')
    return indexed


def _refuseDifferent(a, b, what):
    """Raise a ValueError if two indices differ; it names what only one of them has."""
    onlyA, onlyB = (one[~one.isin(other)] for one, other in ((a, b), (b, a)))
    if len(onlyA) or len(onlyB):
        found = ' and '.join(
            f'only {name} has {_name(only)}' for name, only in (('A', onlyA), ('B', onlyB)) if len(only)
        )
        raise ValueError(f'The tables have other {what}: {found}. Only the same ones can be compared.')


def _name(values):
    """Return the first few of some values, and how many more there are, in words."""
    texts = [' '.join(map(str, value)) if isinstance(value, tuple) else str(value) for value in values[:_MOST_NAMED]]
    more = len(values) - len(texts)
    return ', '.join(texts) + (f' and {more} more' if more else '')


def _groupsOf(patients, by):
    """Return the group of each patient, an Index; raise a ValueError that names those without one."""
    known = {str(patient): group for patient, group in dict(by).items()}
    groups = pd.Index([known.get(patient) for patient in patients], dtype=object)
    if groups.hasnans:
        without = patients[groups.isna()].unique()
        raise ValueError(f'by has no group for {_name(without)}; give each patient one, such as "unknown".')
    return groups
