import tracemalloc

import numpy as np
import pandas as pd
import pytest
import segmentation_models_pytorch as smp
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance
from scipy import stats

import config
import metrics

MICRO = 'micro average (pooled voxels)'
PATIENTS, SLICES = 'macro average over patients', 'macro average over slices'


def test_computeMetrics_isHandCounted(capsys):
    """TP 2, FP 1, FN 3, TN 4 score 2/3, 2/5, 6/10, 2/6 and 4/8; an absent class is NaN except for accuracy."""
    table = metrics.computeMetrics(
        torch.tensor([9, 2, 5, 0]), torch.tensor([0, 1, 0, 0]), torch.tensor([1, 3, 0, 0]), torch.tensor([0, 4, 5, 10])
    )
    columns = ['Precision', 'Recall', 'Accuracy', 'IoU score', 'DICE score']
    assert list(table.columns) == columns and list(table.index) == ['necrotic core', 'edema', 'enhancing tumor']
    np.testing.assert_allclose(table.iloc[0], [2 / 3, 2 / 5, 6 / 10, 2 / 6, 4 / 8])
    np.testing.assert_allclose(table.iloc[1], [1, 1, 1, 1, 1])
    np.testing.assert_allclose(table.iloc[2], [np.nan, np.nan, 1, np.nan, np.nan])
    printed = capsys.readouterr().out
    assert '0.667' in printed and '0.333' in printed
    assert printed.startswith('Micro average over the voxels of all patients')


def test_computeMetrics_equalsSmp():
    """On random volumes every score equals that of smp.metrics on the same counts."""
    generator = torch.Generator().manual_seed(0)
    y, yhat = torch.randint(0, 4, (2, 6, 20, 20), generator=generator)
    counts = smp.metrics.functional.get_stats(yhat, y, mode='multiclass', num_classes=4)
    TP, FP, FN, TN = (count.sum(0) for count in counts)
    table = metrics.computeMetrics(TP, FP, FN, TN)
    for name, function in zip(table, ('precision', 'recall', 'accuracy', 'iou_score', 'f1_score'), strict=True):
        expected = getattr(smp.metrics, function)(*(count[None] for count in (TP, FP, FN, TN)), reduction='none')
        np.testing.assert_allclose(table[name], expected[0, 1:], rtol=1e-6)


def test_computeMetrics_refusesOtherCounts():
    """Counts that are negative or not one per class raise an error that names them."""
    with pytest.raises(ValueError, match='FP is'):
        metrics.computeMetrics([1] * 4, [1] * 3, [1] * 4, [1] * 4)
    with pytest.raises(ValueError, match='TN is'):
        metrics.computeMetrics([1] * 4, [1] * 4, [1] * 4, [1, 1, -1, 1])


def _tumor():
    """Return 4 x 4 x 4 volumes; classes 1, 2, 3 have 2, 4, 2 voxels in the truth and 2, 3, 1 in the prediction."""
    y, yhat = np.zeros((2, 4, 4, 4), np.int64)
    y[1, 1], yhat[1, 1] = (1, 1, 3, 3), (1, 2, 3, 1)
    y[1, 2], yhat[1, 2] = (2, 2, 2, 2), (2, 2, 0, 0)
    return y, yhat


def test_scorePatient_isHandCounted():
    """Dice, sensitivity, specificity, precision and ml of each region equal fractions counted by hand."""
    y, yhat = _tumor()
    table = metrics.scorePatient(y, yhat, spacing=(1, 2, 5))
    assert list(table.index) == ['WT', 'TC', 'ET', 'NCR', 'ED']
    expected = {
        'WT': [12 / 14, 6 / 8, 56 / 56, 6 / 6, 0.08, 0.06],
        'TC': [6 / 7, 3 / 4, 60 / 60, 3 / 3, 0.04, 0.03],
        'ET': [2 / 3, 1 / 2, 62 / 62, 1 / 1, 0.02, 0.01],
        'NCR': [2 / 4, 1 / 2, 61 / 62, 1 / 2, 0.02, 0.02],
        'ED': [4 / 7, 2 / 4, 59 / 60, 2 / 3, 0.04, 0.03],
    }
    columns = ['dice', 'sensitivity', 'specificity', 'precision', 'volumeTruth', 'volumePredicted']
    for region, row in expected.items():
        np.testing.assert_allclose(table.loc[region, columns].astype(float), row)
    assert list(table.columns) == [*columns[:4], 'hd95', *columns[4:]]


def test_scorePatient_measuresInMm():
    """Two voxels three steps apart along the second axis, of 2 mm, are 6 mm apart."""
    y, yhat = np.zeros((2, 4, 4, 4), np.int64)
    y[0, 0, 3], yhat[0, 3, 3] = 3, 3
    table = metrics.scorePatient(y, yhat, spacing=(1, 2, 5))
    assert table.loc[['WT', 'TC', 'ET'], 'hd95'].tolist() == [6, 6, 6]
    assert table.loc[['NCR', 'ED'], 'hd95'].tolist() == [0, 0]


def test_scorePatient_ofEmptyRegions():
    """With both empty the scores are 1 and 0 mm, with one empty 0 and 373.12866 mm; nothing is NaN."""
    empty, full = np.zeros((3, 4, 5), int), np.full((3, 4, 5), 3)
    columns = ['dice', 'sensitivity', 'specificity', 'precision', 'hd95']
    both = metrics.scorePatient(empty, empty, spacing=(2, 2, 2))
    assert (both[columns] == [1, 1, 1, 1, 0]).all(axis=None)
    onlyTruth = metrics.scorePatient(full, empty, spacing=(2, 2, 2)).loc['ET']
    assert onlyTruth[columns].tolist() == [0, 0, 1, 0, 373.12866]
    assert (onlyTruth['volumeTruth'], onlyTruth['volumePredicted']) == (pytest.approx(0.48), 0)
    onlyPredicted = metrics.scorePatient(empty, full).loc['ET']
    assert onlyPredicted[columns].tolist() == [0, 0, 0, 0, 373.12866]
    assert metrics.scorePatient(full, full).loc['ET', columns].tolist() == [1, 1, 1, 1, 0]
    for y, yhat in ((empty, empty), (full, empty), (empty, full), (full, full)):
        assert metrics.scorePatient(y, yhat).notna().all(axis=None)


def test_scorePatient_equalsMonaiAndSmp():
    """On random volumes Dice and HD95 equal MONAI's (HD95 to 1e-4 mm) and all four fractions equal smp's."""
    generator = torch.Generator().manual_seed(1)
    regions = {'WT': (1, 2, 3), 'TC': (1, 3), 'ET': (3,), 'NCR': (1,), 'ED': (2,)}
    for _ in range(5):
        y, yhat = torch.randint(0, 4, (2, 9, 11, 10), generator=generator)
        table = metrics.scorePatient(y, yhat, spacing=(1, 1.5, 3))
        for region, classes in regions.items():
            truth, found = (torch.isin(volume, torch.tensor(classes))[None, None] for volume in (y, yhat))
            row = table.loc[region]
            assert row['dice'] == pytest.approx(compute_dice(found, truth).item(), abs=1e-6)
            counts = smp.metrics.get_stats(found.long(), truth.long(), mode='binary')
            for name in ('dice', 'sensitivity', 'specificity', 'precision'):
                expected = getattr(smp.metrics, name.replace('dice', 'f1_score'))(*counts)
                assert row[name] == pytest.approx(expected.item(), abs=1e-6)
            monai = compute_hausdorff_distance(found, truth, True, percentile=95, spacing=[1.0, 1.5, 3.0])
            assert row['hd95'] == pytest.approx(monai.item(), abs=1e-4)


def test_scorePatient_takesAnyAxisOrderAndDtype():
    """The order of the axes, that of the spacing alike, and the dtype change no score."""
    y, yhat = _tumor()
    table = metrics.scorePatient(y, yhat, spacing=(1, 2, 5))
    permuted = metrics.scorePatient(y.transpose(2, 0, 1), yhat.transpose(2, 0, 1).astype(np.uint8), spacing=(5, 1, 2))
    np.testing.assert_allclose(permuted, table)


def test_scorePatient_refusesBadArguments():
    """Other shapes, raw labels and a spacing of too few axes raise an error that names what was found."""
    y = np.zeros((3, 4, 5), int)
    with pytest.raises(ValueError, match=r'yhat \(3, 4, 4\)'):
        metrics.scorePatient(y, y[:, :, :4])
    with pytest.raises(ValueError, match='raw labels'):
        metrics.scorePatient(y + 4, y)
    with pytest.raises(ValueError, match='3 numbers above 0'):
        metrics.scorePatient(y, y, spacing=(1, 1))


def _scores(dice):
    """Return tables as scorePatient does, of one region, with the given Dice per patient; 1 means both empty."""
    return {
        patient: pd.DataFrame(
            {'dice': [value], 'volumeTruth': [float(value < 1)], 'volumePredicted': [float(value < 0.9)]},
            index=pd.Index(['ET'], name='region'),
        )
        for patient, value in dice.items()
    }


def test_scoreTable_isLong():
    """The table has a row per patient and region, with the columns of scorePatient or of scoreLesions."""
    y, yhat = _tumor()
    scores = {'b': metrics.scorePatient(y, yhat), 'a': metrics.scorePatient(y, y)}
    table = metrics.scoreTable(scores)
    assert list(table.columns) == ['patient', 'region', *scores['a'].columns] and len(table) == 10
    assert table['patient'].tolist() == ['b'] * 5 + ['a'] * 5
    assert table.loc[6, 'region'] == 'TC' and table.loc[6, 'dice'] == 1
    lesions = metrics.scoreTable({'a': metrics.scoreLesions(y, yhat)})
    assert metrics.summarize(lesions).loc[('WT', 'missed'), 'mean'] == 0
    for function in (metrics.scoreTable, metrics.compareAverages):
        with pytest.raises(ValueError, match='at least one patient'):
            function({})


def test_summarize_isHandCounted():
    """Dice 0, 0.5, 1 have mean, median and deviation 0.5 and the interval 0 to 1 (3.7 % of resamples are all 0)."""
    summary = metrics.summarize(metrics.scoreTable(_scores({'a': 0.0, 'b': 0.5, 'c': 1.0})))
    row = summary.loc[('ET', 'dice')]
    assert row[['mean', 'median', 'std', 'low', 'high']].tolist() == pytest.approx([0.5, 0.5, 0.5, 0, 1])
    assert row[['patients', 'emptyTruth', 'emptyBoth']].tolist() == [3, 1, 1]


def test_summarize_ofEachRule():
    """With a column `rule` each rule has its own means, of the scores that it has only."""
    tables = {rule: metrics.scoreTable(_scores({'a': 0.0, 'b': value})) for rule, value in (('one', 0.5), ('two', 0.7))}
    tables['two']['nsd0.5'] = [0.25, 0.75]
    table = pd.concat([each.assign(rule=rule) for rule, each in tables.items()], ignore_index=True)
    summary = metrics.summarize(table)
    assert summary.index.names == ['rule', 'region', 'score']
    assert summary.loc[('one', 'ET', 'dice'), 'mean'] == 0.25 and summary.loc[('two', 'ET', 'dice'), 'mean'] == 0.35
    assert summary.loc[('two', 'ET', 'nsd0.5'), 'mean'] == 0.5 and ('one', 'ET', 'nsd0.5') not in summary.index


@pytest.mark.filterwarnings('error')
def test_summarize_ofAnInfiniteDistance():
    """Without a pair of lesions HD95 is infinite by 2026: the mean is too, and that of Dice is a number."""
    y, _ = _tumor()
    tables = {'a': metrics.scoreLesions(y, y, rule='BraTS2026'), 'b': metrics.scoreLesions(y, 0 * y, rule='BraTS2026')}
    means = metrics.summarize(metrics.scoreTable(tables).dropna(subset=['dice']))['mean']
    assert means['WT', 'hd95'] == np.inf and means['WT', 'dice'] == 0.5


@pytest.mark.parametrize('level', [0.5, 0.95])
@pytest.mark.parametrize(('patients', 'successes'), [(30, 10), (50, 47)])
def test_summarize_intervalIsBinomial(monkeypatch, level, patients, successes):
    """The mean of resampled zeros and ones is binomial, so the ends of the interval are its quantiles."""
    monkeypatch.setattr(config, 'CONFIDENCE', level)
    scores = _scores(dict(enumerate([1.0] * successes + [0.0] * (patients - successes))))
    row = metrics.summarize(metrics.scoreTable(scores)).loc[('ET', 'dice')]
    expected = stats.binom.ppf([(1 - level) / 2, (1 + level) / 2], patients, successes / patients) / patients
    np.testing.assert_allclose(row[['low', 'high']].astype(float), expected)


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('dice', [[0.5], [0.7] * 3, [0.25, np.nan, 0.75]])
def test_summarize_doesNotWarn(dice):
    """One patient, equal scores or a NaN cause no warning; the interval is that value, or NaN."""
    row = metrics.summarize(metrics.scoreTable(_scores(dict(enumerate(dice))))).loc[('ET', 'dice')]
    value = np.mean(dice)
    np.testing.assert_allclose(row[['mean', 'median', 'low', 'high']].astype(float), [value] * 4)
    assert row['std'] == pytest.approx(0) if dice == [0.7] * 3 else np.isnan(row['std'])


def test_summarize_needsLittleMemory():
    """The resamples of 400 patients are drawn in batches: the peak stays below 8 MB."""
    table = metrics.scoreTable(_scores(dict(enumerate(np.random.default_rng(6).random(400)))))
    tracemalloc.start()
    metrics.summarize(table)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8e6


def test_summarize_ignoresTheOrderOfPatients():
    """Another order of the patients gives the same table, to the last bit."""
    scores = _scores(dict(enumerate(np.random.default_rng(5).random(20))))
    summary = metrics.summarize(metrics.scoreTable(scores))
    shuffled = dict(sorted(scores.items(), key=lambda item: (item[0] * 7) % 20))
    pd.testing.assert_frame_equal(metrics.summarize(metrics.scoreTable(shuffled)), summary)


def test_compareAverages_isHandCounted():
    """Class 2 in two patients of two slices has a Dice of 4/6 (micro), 2/5 (over patients), 2.8/4 (over slices)."""
    first, second = np.zeros((2, 2, 2, 2, 3), np.int64)
    first[0, 0, 0], first[1, 0, 0] = 2, (2, 2, 0)  # Dice 4 / 5 on the first slice of the first patient
    second[1, 1, 1] = (0, 0, 2)  # one false positive voxel in the second patient
    table = metrics.compareAverages({'a': first, 'b': second})
    assert list(table.index.names) == ['average', 'class'] and len(table) == 9
    expected = {
        'DICE score': [4 / 6, 4 / 5 / 2, (4 / 5 + 1 + 0 + 1) / 4],
        'Recall': [2 / 3, 2 / 3 / 2, (2 / 3 + 1 + 0 + 1) / 4],
        'Precision': [2 / 3, 1 / 2, (1 + 1 + 0 + 1) / 4],
        'Accuracy': [22 / 24, 22 / 24, (5 + 6 + 5 + 6) / 24],
    }
    for name, values in expected.items():
        assert table[name].xs('edema', level='class').tolist() == pytest.approx(values)
    absent = table['DICE score'].xs('enhancing tumor', level='class')
    assert np.isnan(absent[MICRO]) and absent[[PATIENTS, SLICES]].tolist() == [1, 1]


def test_compareAverages_equalsSmp():
    """From a generator of random patients the micro average is that of smp's counts, the macro average smp's Dice."""
    generator = torch.Generator().manual_seed(2)
    pairs = [torch.randint(0, 4, (2, 5, 8, 9), generator=generator) for _ in range(3)]
    table = metrics.compareAverages((y, yhat) for y, yhat in pairs)
    counts = [smp.metrics.get_stats(yhat, y, mode='multiclass', num_classes=4) for y, yhat in pairs]
    micro = metrics.computeMetrics(*(sum(part.sum(0) for part in parts) for parts in zip(*counts, strict=True)))
    pd.testing.assert_frame_equal(table.loc[MICRO], micro)
    perSlice = [torch.cat(parts) for parts in zip(*counts, strict=True)]
    expected = smp.metrics.f1_score(*perSlice, reduction='none')[:, 1:].double().mean(0)
    np.testing.assert_allclose(table.loc[SLICES, 'DICE score'], expected, rtol=1e-6)
