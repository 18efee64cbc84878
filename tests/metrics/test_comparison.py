"""Paired comparison of tables of scores: numbers by hand and by scipy, and every refusal."""

import re

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import config
import metrics

A = {'WT': [0.5, 0.6, 0.7, 0.8], 'ET': [0.1, 0.2, 0.3, 0.4]}


@pytest.fixture(autouse=True)
def fewResamples():
    config.BOOTSTRAP_RESAMPLES = 200


def makeScores(dice, hd95=None, **columns):
    """Return a table like scoreTable's of patients p0, p1, ...: the Dice by region, and other columns alike."""
    rows = [
        {'patient': f'p{number}', 'region': region, 'dice': value, 'hd95': 5.0 if hd95 is None else hd95[number]}
        for region, values in dice.items()
        for number, value in enumerate(values)
    ]
    return pd.DataFrame(rows).assign(volumeTruth=2.0, volumePredicted=2.0, **columns)


def test_compare_isHandCounted():
    """Differences .1, .1, -.1, 0 have the mean .025 and median .05: two better, one worse, one equal, p of 1 in 3."""
    b = makeScores({'WT': [0.6, 0.7, 0.6, 0.8], 'ET': A['ET']}, [1.0, 5.0, 9.0, 2.0])
    table = metrics.compare(makeScores(A), b)
    assert table.index.names == ['region', 'score'] and list(table.index) == [
        (region, score) for region in ('WT', 'ET') for score in ('dice', 'hd95')
    ]
    row = table.loc['WT', 'dice']
    assert row[['mean', 'median']].tolist() == pytest.approx([0.025, 0.05]) and row['betterIf'] == 'higher'
    assert row[['better', 'worse', 'equal', 'patients', 'unscored']].tolist() == [2, 1, 1, 4, 0] and row['p'] == 1
    row = table.loc['WT', 'hd95']  # differences -4, 0, 4, -3: lower is better
    assert row[['betterIf', 'mean', 'median']].tolist() == ['lower', -0.75, -1.5]
    assert row[['better', 'worse', 'equal']].tolist() == [2, 1, 1]
    row = table.loc['ET', 'dice']
    assert row[['mean', 'low', 'high', 'equal', 'p']].tolist() == [0, 0, 0, 4, 1]


def test_compare_signTestIsExact():
    """Eight of eight better are 2 / 2 ** 8, seven of eight 18 / 2 ** 8; a ninth that is equal does not count."""
    a = makeScores({'WT': [0.5] * 9})
    for first, p in ((0.6, 2 / 256), (0.4, 18 / 256)):
        b = makeScores({'WT': [first] + [0.6] * 7 + [0.5]})
        for pair in ((a, b), (b, a)):
            assert metrics.compare(*pair).loc[('WT', 'dice'), 'p'] == pytest.approx(p)


def test_compare_intervalIsThatOfThePairedDifferences():
    """Mean and interval are those that summarize gives for the differences as scores, in any order of the rows."""
    generator = np.random.default_rng(1)
    dice = generator.random((2, 12))
    a, b = (makeScores({'WT': values}) for values in dice)
    expected = metrics.summarize(a.assign(dice=dice[1] - dice[0])).loc['WT', 'dice']
    for shuffled in (b, b.sample(frac=1, random_state=3)):
        row = metrics.compare(a, shuffled).loc['WT', 'dice']
        np.testing.assert_allclose(row[['mean', 'low', 'high']].astype(float), expected[['mean', 'low', 'high']])
    assert row['p'] == pytest.approx(stats.binomtest(int((dice[1] > dice[0]).sum()), 12).pvalue)


def test_compare_takesRoundingForEqual():
    """Scores that differ in the last bit are equal, and so are two infinite distances."""
    a, b = makeScores({'WT': [0.1 + 0.2]}, [np.inf]), makeScores({'WT': [0.3]}, [np.inf])
    assert (metrics.compare(a, b)[['equal', 'mean', 'p']] == [1, 0, 1]).all(axis=None)


def test_compare_countsWhatHasNoScore():
    """A patient without a score in both tables is left out and counted; in one table only, there is no mean."""
    a, b = makeScores({'WT': [np.nan, 0.5, 0.5]}), makeScores({'WT': [np.nan, 0.6, 0.7]})
    row = metrics.compare(a, b).loc['WT', 'dice']
    assert row[['patients', 'unscored', 'better']].tolist() == [2, 1, 2] and row['mean'] == pytest.approx(0.15)
    row = metrics.compare(makeScores({'WT': [0.4, 0.5, 0.5]}), b).loc['WT', 'dice']
    assert row[['patients', 'unscored', 'better']].tolist() == [3, 0, 2]
    assert row[['mean', 'median', 'low', 'high', 'p']].isna().all()


def test_compare_comparesEachRuleByItsScores():
    """With several rules each has rows of its own, without the scores that it does not have."""

    def both(dice):
        first = makeScores({'WT': dice}, rule='BraTS2020', lesionDice=np.nan, lesionMissed=np.nan)
        second = makeScores({'WT': dice, 'RC': dice}, rule='BraTS2024', lesionDice=dice * 2, lesionMissed=[1, 2] * 2)
        return pd.concat([first, second])

    table = metrics.compare(both([0.1, 0.2]), both([0.3, 0.4]))
    assert table.index.names == ['rule', 'region', 'score']
    assert list(table.loc['BraTS2020'].index) == [('WT', 'dice'), ('WT', 'hd95')]
    scores = ['dice', 'hd95', 'lesionDice', 'lesionMissed']
    assert list(table.loc['BraTS2024'].index) == [(region, score) for region in ('WT', 'RC') for score in scores]
    assert table.loc[('BraTS2024', 'RC', 'lesionDice'), 'mean'] == pytest.approx(0.2)
    assert table['betterIf'].xs('lesionMissed', level='score').eq('lower').all()


def test_compare_comparesEachGroup():
    """Of groups x = p0, p2 and y = p1, p3 each has its own mean; a patient without a group is refused by name."""
    a, b = makeScores(A), makeScores({'WT': [0.6, 0.6, 0.8, 0.7], 'ET': A['ET']})
    by = pd.Series({'p1': 'y', 'p0': 'x', 'p3': 'y', 'p2': 'x', 'p9': 'z'})
    table = metrics.compare(a, b, by)
    assert table.index.names == ['group', 'region', 'score'] and list(table.index.unique('group')) == ['x', 'y']
    assert table.loc[('x', 'WT', 'dice'), ['mean', 'patients']].tolist() == pytest.approx([0.1, 2])
    assert table.loc[('y', 'WT', 'dice'), ['mean', 'worse', 'equal']].tolist() == pytest.approx([-0.05, 1, 1])
    pd.testing.assert_frame_equal(metrics.compare(a, b, by.to_dict()), table)
    with pytest.raises(ValueError, match='by has no group for p1, p3; give each patient one'):
        metrics.compare(a, b, by.replace('y', None))


@pytest.mark.parametrize(
    ('change', 'match'),
    [
        (lambda b: b[b['patient'] != 'p2'], 'other patients: only A has p2'),
        (lambda b: b.replace('p3', 'q'), 'other patients: only A has p3 and only B has q'),
        (lambda b: b[b['region'] != 'ET'], 'other regions: only A has ET'),
        (lambda b: b[:-1], 'other rows: only A has p3 ET'),
        (lambda b: pd.concat([b, b[:1]]), 'Table B has p0 twice; one row per patient and region'),
        (lambda b: b.assign(rule='BraTS2020'), 'Table B has a column rule, the other has none'),
        (lambda b: b.assign(missed=1), r'other columns \(were they scored by the same rule\?\): only B has missed'),
        (lambda b: b.assign(volumeTruth=[2.0] * 7 + [2.1]), 'true volumes of p3 differ between the tables'),
        (lambda b: b[:0], 'Table B has 0 rows'),
        (lambda b: b.drop(columns='region'), r"lacks the columns \['region'\]"),
    ],
)
def test_compare_refusesOtherTables(change, match):
    """Other patients, regions, rules, columns or truth, a patient twice and an empty table are refused in words."""
    with pytest.raises(ValueError, match=match):
        metrics.compare(makeScores(A), change(makeScores(A)))


def test_compare_refusesOtherRules():
    """Tables by other rules are refused, also where only regions or columns tell them apart."""
    y = np.zeros((6, 6, 6), int)
    y[2:5, 2:5, 2:5] = 1
    rules = ('BraTS2020', 'BraTS2023', 'BraTS2024', 'BraTS2024-SSA', 'BraTS2026')
    tables = [metrics.scoreTable({'p': metrics.scorePatient(y, y, rule=rule)}) for rule in rules]
    tables += [metrics.scoreTable({'p': metrics.scoreLesions(y, y, rule=rule)}) for rule in rules[1:]]
    for number, a in enumerate(tables):
        for b in tables[:number]:
            with pytest.raises(ValueError, match=r'The tables have other (regions|columns)'):
                metrics.compare(a, b)
    with pytest.raises(ValueError, match='other rules: only A has BraTS2023 and only B has BraTS2026'):
        metrics.compare(tables[1].assign(rule='BraTS2023'), tables[4].assign(rule='BraTS2026'))


def test_compare_readsWhatWasWritten(tmp_path):
    """A table that was written as CSV and read again, numbers as patients, is equal to itself."""
    a = makeScores(A, np.random.default_rng(0).random(4)).assign(patient=lambda table: table['patient'].str[1:])
    a.to_csv(tmp_path / 'scores.csv', index=False)
    assert (metrics.compare(a, pd.read_csv(tmp_path / 'scores.csv'))['equal'] == 4).all()


# Recipes


def tableOf(values, names=('a', 'b')):
    """Return scores with the Dice values[recipe][seed][patient], of patients in two folds, for two regions."""
    return pd.DataFrame(
        [
            {'recipe': names[recipe], 'fold': patient % 2, 'seed': seed, 'patient': f'P{patient:02}', 'region': region,
             'dice': value, 'hd95': 10 * value}
            for (recipe, seed, patient), value in np.ndenumerate(np.asarray(values))
            for region in ('WT', 'ET')
        ]
    )  # fmt: skip


def test_compareRecipes_errorIsThatOfThePatientsIfTrainingsDoNotMatter():
    """With one seed and a fold for each patient, mean and error are those of the paired t test."""
    generator = np.random.default_rng(0)
    a, b = generator.uniform(0.5, 0.9, (2, 12))
    scores = tableOf([[a], [b]]).assign(fold=lambda table: table['patient'])
    row = metrics.compareRecipes(scores).loc['b']
    expected = stats.ttest_rel(b, a)
    assert row['difference'] == pytest.approx((b - a).mean())
    assert row['difference'] / row['error'] == pytest.approx(expected.statistic)
    assert (row['low'], row['high']) == pytest.approx(tuple(expected.confidence_interval(config.CONFIDENCE)))
    assert row['hd95 difference'] == pytest.approx(10 * (b - a).mean())


def test_compareRecipes_intervalHoldsTheTrueDifference():
    """Patients differ, trainings differ, and nine or more of ten intervals hold the difference that was put in."""
    generator, held = np.random.default_rng(1), 0
    for _ in range(100):
        patients, trainings = generator.normal(0, 0.03, 20), generator.normal(0, 0.02, (3, 2))
        gain = 0.02 + patients + np.repeat(trainings[:, None], 10, axis=1).reshape(3, 20)
        gain += generator.normal(0, 0.02, gain.shape)
        base = generator.uniform(0.5, 0.8, (3, 20))
        row = metrics.compareRecipes(tableOf([base, base + gain])).loc['b']
        held += row['low'] <= 0.02 <= row['high']
    assert 90 <= held <= 100


@pytest.mark.parametrize(
    ('gain', 'spread', 'words'),
    [
        (0.05, 0.01, 'b is better'),
        (-0.05, 0.01, 'a is better'),
        (0.0, 0.0, 'cannot be told'),
        (0.004, 0.02, r'cannot be told: about [\d,]+ patients would be needed'),
        (0.00001, 0.05, 'cannot be told: more than 10,000 patients would be needed'),
    ],
)
def test_compareRecipes_saysWhatCanBeTold(gain, spread, words):
    """A verdict only if the interval leaves 0 out; else how many patients would show the difference."""
    gains = gain + spread * np.tile([1, -1, -1, 1], (3, 5))
    base = np.full((3, 20), 0.7)
    row = metrics.compareRecipes(tableOf([base, base + gains])).loc['b']
    assert re.fullmatch(words, row['verdict'])
    if 'about' in words:
        found = int(re.search(r'[\d,]+', row['verdict'])[0].replace(',', ''))
        assert found == pytest.approx(20 * (row['smallest'] / row['difference']) ** 2, rel=0.1)


def test_compareRecipes_asksForSeedsIfTrainingsDiffer():
    """If one seed gains and the other loses in all patients alike, more patients would show nothing."""
    base = np.full((2, 20), 0.7)
    gains = np.array([[0.05], [-0.04]]) + np.zeros((2, 20))
    row = metrics.compareRecipes(tableOf([base, base + gains])).loc['b']
    assert row['verdict'] == 'cannot be told: more patients or seeds would be needed'


def test_compareRecipes_countsTheScansOfASubjectAsOne():
    """Each patient a second time, as another scan of the same subject, changes neither error nor interval."""
    values = np.full((2, 3, 12), 0.7)
    values[1] += 0.02 + 0.1 * np.tile([1, 1, -1, -1], 3)  # patients differ, trainings do not
    once = metrics.compareRecipes(tableOf(values)).loc['b']
    twice = tableOf(np.repeat(values, 2, axis=2))
    twice['number'] = twice['patient'].str[1:].astype(int) // 2
    twice['fold'] = twice['number'] % 2
    again = metrics.compareRecipes(twice.assign(subject=twice['number'].astype(str))).loc['b']
    columns = ['difference', 'error', 'low', 'high', 'hd95 error', 'verdict']
    assert again[columns].tolist()[:-1] == pytest.approx(once[columns].tolist()[:-1])
    assert again['verdict'] == once['verdict']
    assert metrics.compareRecipes(twice).loc['b', 'error'] < again['error']


def test_compareRecipes_refusesOtherPatients():
    """A recipe that lacks a training is named."""
    scores = tableOf(np.full((2, 3, 4), 0.7))
    with pytest.raises(ValueError, match='b: not the patients, folds, seeds and regions of the other'):
        metrics.compareRecipes(scores[(scores['recipe'] == 'a') | (scores['seed'] > 0)])


def test_fitLearningCurve_findsThePowerLaw():
    """1 - Dice = .5 n^-.3 is found, and goes on to twice the patients."""
    parts = [tableOf([[[1 - 0.5 * size**-0.3] * 4]], ['a']).assign(patients=size) for size in (2, 4, 8)]
    table = metrics.fitLearningCurve(pd.concat(parts))
    assert list(table.index) == [('a', 2), ('a', 4), ('a', 8), ('a', 16)]
    np.testing.assert_allclose(table['fitted'], 1 - 0.5 * np.array([2, 4, 8, 16.0]) ** -0.3)
    np.testing.assert_allclose(table['mean'][:3], table['fitted'][:3])
    np.testing.assert_allclose(table[['fittedLow', 'fittedHigh']], table[['fitted', 'fitted']])
    np.testing.assert_allclose(
        table[['gain', 'gainLow', 'gainHigh']][1:], np.diff(table['fitted'])[:, None] + np.zeros(3)
    )


def test_fitLearningCurve_intervalsCountTheTrainings():
    """All patients are alike, and one of three seeds is worse: the interval goes from the worst seed to the best."""
    seeds = np.array([0.7, 0.7, 0.4])[:, None] + np.zeros((3, 4))
    parts = [tableOf([seeds + gain], ['a']).assign(patients=size) for size, gain in ((2, 0), (4, 0.1))]
    table = metrics.fitLearningCurve(pd.concat(parts))
    row, more = table.loc[('a', 4)], table.loc[('a', 8)]
    assert row['mean'] == pytest.approx(0.7)
    assert row['low'] < 0.6 and row['high'] == pytest.approx(0.8)
    assert row['gain'] == pytest.approx(0.1) and more['gainLow'] < more['gain'] < more['gainHigh']
