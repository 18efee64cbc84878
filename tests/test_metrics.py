import numpy as np
import pandas as pd
import pytest
import segmentation_models_pytorch as smp
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance
from scipy import stats

import config
import metrics


def test_computeMetrics_handCounted(capsys):
    """TP 2, FP 1, FN 3, TN 4 give 2/3, 2/5, 6/10, 2/6 and 4/8; a class that is never there NaN but for accuracy."""
    table = metrics.computeMetrics(
        torch.tensor([9, 2, 5, 0]), torch.tensor([0, 1, 0, 0]), torch.tensor([1, 3, 0, 0]), torch.tensor([0, 4, 5, 10])
    )
    columns = ['Precision', 'Recall', 'Accuracy', 'IoU score', 'DICE score']
    assert list(table.columns) == columns and list(table.index) == ['necrotic core', 'edema', 'enhancing tumor']
    np.testing.assert_allclose(table.iloc[0], [2 / 3, 2 / 5, 6 / 10, 2 / 6, 4 / 8])
    np.testing.assert_allclose(table.iloc[1], [1, 1, 1, 1, 1])
    np.testing.assert_allclose(table.iloc[2], [np.nan, np.nan, 1, np.nan, np.nan])
    printed = capsys.readouterr().out
    assert '0.667' in printed and '0.333' in printed and 'Pooled' in printed


def test_computeMetrics_equalsSmp():
    """On random volumes every score is the one of smp.metrics on the same pooled counts."""
    generator = torch.Generator().manual_seed(0)
    y, yhat = torch.randint(0, 4, (2, 6, 20, 20), generator=generator)
    counts = smp.metrics.functional.get_stats(yhat, y, mode='multiclass', num_classes=4)
    TP, FP, FN, TN = (count.sum(0) for count in counts)
    table = metrics.computeMetrics(TP, FP, FN, TN)
    functions = {
        'Precision': smp.metrics.precision,
        'Recall': smp.metrics.recall,
        'Accuracy': smp.metrics.accuracy,
        'IoU score': smp.metrics.iou_score,
        'DICE score': smp.metrics.f1_score,
    }
    for name, function in functions.items():
        expected = function(*(count[None] for count in (TP, FP, FN, TN)), reduction='none')[0, 1:]
        np.testing.assert_allclose(table[name], expected, rtol=1e-6)


def test_computeMetrics_refusesOtherCounts():
    """Counts that are not one a class, or negative, are refused by name."""
    with pytest.raises(ValueError, match='FP is'):
        metrics.computeMetrics([1] * 4, [1] * 3, [1] * 4, [1] * 4)
    with pytest.raises(ValueError, match='TN is'):
        metrics.computeMetrics([1] * 4, [1] * 4, [1] * 4, [1, 1, -1, 1])


def _tumor():
    """A volume of 4 x 4 x 4 with classes counted by hand: truth 1, 2, 3 have 2, 4, 2 voxels, the prediction 2, 3, 1."""
    y, yhat = np.zeros((2, 4, 4, 4), np.int64)
    y[1, 1], yhat[1, 1] = (1, 1, 3, 3), (1, 2, 3, 1)
    y[1, 2], yhat[1, 2] = (2, 2, 2, 2), (2, 2, 0, 0)
    return y, yhat


def test_scorePatient_handCounted():
    """Dice, sensitivity, specificity, precision and ml of each region of 64 voxels, as fractions."""
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


def test_scorePatient_distanceInMm():
    """One voxel each, three apart along the second of axes with 1, 2 and 5 mm: 6 mm; at the volume's border."""
    y, yhat = np.zeros((2, 4, 4, 4), np.int64)
    y[0, 0, 3], yhat[0, 3, 3] = 3, 3
    table = metrics.scorePatient(y, yhat, spacing=(1, 2, 5))
    assert table.loc[['WT', 'TC', 'ET'], 'hd95'].tolist() == [6, 6, 6]
    assert table.loc[['NCR', 'ED'], 'hd95'].tolist() == [0, 0]


def test_scorePatient_emptyRules():
    """Both empty: 1, 0 mm. One empty: 0, 373.12866 mm, whatever the shape and spacing. No row has a NaN."""
    empty, full = np.zeros((3, 4, 5), int), np.full((3, 4, 5), 3)
    columns = ['dice', 'sensitivity', 'specificity', 'precision', 'hd95']
    both = metrics.scorePatient(empty, empty, spacing=(2, 2, 2))
    assert (both[columns] == [1, 1, 1, 1, 0]).all(axis=None)
    missed = metrics.scorePatient(full, empty, spacing=(2, 2, 2)).loc['ET']
    assert missed[columns].tolist() == [0, 0, 1, 0, 373.12866]
    assert (missed['volumeTruth'], missed['volumePredicted']) == (pytest.approx(0.48), 0)
    invented = metrics.scorePatient(empty, full).loc['ET']
    assert invented[columns].tolist() == [0, 0, 0, 0, 373.12866]
    assert metrics.scorePatient(full, full).loc['ET', columns].tolist() == [1, 1, 1, 1, 0]
    for y, yhat in ((empty, empty), (full, empty), (empty, full), (full, full)):
        assert metrics.scorePatient(y, yhat).notna().all(axis=None)


def test_scorePatient_equalsMonaiAndSmp():
    """On random volumes the Dice of the regions is MONAI's, all four fractions are smp's, HD95 MONAI's to 1e-4 mm."""
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
            assert row['dice'] == pytest.approx(smp.metrics.f1_score(*counts).item(), abs=1e-6)
            assert row['sensitivity'] == pytest.approx(smp.metrics.sensitivity(*counts).item(), abs=1e-6)
            assert row['specificity'] == pytest.approx(smp.metrics.specificity(*counts).item(), abs=1e-6)
            assert row['precision'] == pytest.approx(smp.metrics.precision(*counts).item(), abs=1e-6)
            monai = compute_hausdorff_distance(found, truth, True, percentile=95, spacing=[1.0, 1.5, 3.0])
            assert row['hd95'] == pytest.approx(monai.item(), abs=1e-4)


def test_scorePatient_doesNotCareForOrderOrPlace():
    """Axes in another order with their spacing, background around, another dtype: the same; but for specificity."""
    y, yhat = _tumor()
    table = metrics.scorePatient(y, yhat, spacing=(1, 2, 5))
    turned = metrics.scorePatient(y.transpose(2, 0, 1), yhat.transpose(2, 0, 1).astype(np.uint8), spacing=(5, 1, 2))
    np.testing.assert_allclose(turned, table)
    around = metrics.scorePatient(np.pad(y, 3), np.pad(yhat, 3), spacing=(1, 2, 5)).drop(columns='specificity')
    np.testing.assert_allclose(around, table.drop(columns='specificity'))
    swapped = metrics.scorePatient(yhat, y, spacing=(1, 2, 5))
    np.testing.assert_allclose(swapped[['dice', 'hd95', 'precision']], table[['dice', 'hd95', 'sensitivity']])


def test_scorePatient_refuses():
    """Other shapes, raw labels and a spacing that does not fit the axes are refused with what was found."""
    y = np.zeros((3, 4, 5), int)
    with pytest.raises(ValueError, match=r'yhat \(3, 4, 4\)'):
        metrics.scorePatient(y, y[:, :, :4])
    with pytest.raises(ValueError, match='raw labels'):
        metrics.scorePatient(y + 4, y)
    with pytest.raises(ValueError, match='3 numbers above 0'):
        metrics.scorePatient(y, y, spacing=(1, 1))


def _scores(dice):
    """Tables like scorePatient's of one region, with the Dice given by patient; truth is empty where it is 1."""
    return {
        patient: pd.DataFrame(
            {'dice': [value], 'volumeTruth': [float(value < 1)], 'volumePredicted': [float(value < 0.9)]},
            index=pd.Index(['ET'], name='region'),
        )
        for patient, value in dice.items()
    }


def test_scoreTable_isLong():
    """A row for each patient and region with the columns of scorePatient, and of scoreLesions."""
    y, yhat = _tumor()
    scores = {'b': metrics.scorePatient(y, yhat), 'a': metrics.scorePatient(y, y)}
    table = metrics.scoreTable(scores)
    assert list(table.columns) == ['patient', 'region', *scores['a'].columns] and len(table) == 10
    assert table['patient'].tolist() == ['b'] * 5 + ['a'] * 5
    assert table.loc[6, 'region'] == 'TC' and table.loc[6, 'dice'] == 1
    lesions = metrics.scoreTable({'a': metrics.scoreLesions(y, yhat)})
    assert metrics.summarize(lesions).loc[('WT', 'missed'), 'mean'] == 0
    with pytest.raises(ValueError, match='at least one patient'):
        metrics.scoreTable({})


def test_summarize_handCounted():
    """Dice 0, 0.5, 1: mean and median 0.5, deviation 0.5, interval 0 to 1 (3.7 % of draws are all 0); one is empty."""
    summary = metrics.summarize(metrics.scoreTable(_scores({'a': 0.0, 'b': 0.5, 'c': 1.0})))
    row = summary.loc[('ET', 'dice')]
    assert row[['mean', 'median', 'std', 'low', 'high']].tolist() == pytest.approx([0.5, 0.5, 0.5, 0, 1])
    assert row[['patients', 'emptyTruth', 'emptyBoth']].tolist() == [3, 1, 1]
    alone = metrics.summarize(metrics.scoreTable(_scores({'a': 0.5}))).loc[('ET', 'dice')]
    assert alone[['mean', 'low', 'high']].tolist() == [0.5, 0.5, 0.5] and np.isnan(alone['std'])


def test_summarize_equalsScipysBootstrap():
    """The interval of a skewed sample is scipy's percentile interval within a fiftieth of its width, of any level."""
    values = np.random.default_rng(4).beta(5, 1, 40)
    table = metrics.scoreTable(_scores(dict(enumerate(values))))
    expected = stats.bootstrap((values,), np.mean, n_resamples=40_000, method='percentile', rng=9).confidence_interval
    row = metrics.summarize(table).loc[('ET', 'dice')]
    width = expected.high - expected.low
    assert row['low'] == pytest.approx(expected.low, abs=width / 50)
    assert row['high'] == pytest.approx(expected.high, abs=width / 50)


def test_summarize_doesNotCareForOrder(monkeypatch):
    """Patients in another order give the same table, to the last bit; another confidence another interval."""
    scores = _scores(dict(enumerate(np.random.default_rng(5).random(20))))
    summary = metrics.summarize(metrics.scoreTable(scores))
    shuffled = dict(sorted(scores.items(), key=lambda item: (item[0] * 7) % 20))
    pd.testing.assert_frame_equal(metrics.summarize(metrics.scoreTable(shuffled)), summary)
    monkeypatch.setattr(config, 'CONFIDENCE', 0.5)
    half = metrics.summarize(metrics.scoreTable(scores))
    assert summary.loc[('ET', 'dice'), 'low'] < half.loc[('ET', 'dice'), 'low'] < half.loc[('ET', 'dice'), 'mean']


def test_compareUnits_handCounted():
    """Class 2 in two patients of two slices: a Dice of 4/6 pooled, of 2/5 per patient, of 2.8/4 per slice."""
    first, second = np.zeros((2, 2, 2, 2, 3), np.int64)
    first[0, 0, 0], first[1, 0, 0] = 2, (2, 2, 0)  # Dice 4 / 5 on the first slice of the first patient
    second[1, 1, 1] = (0, 0, 2)  # one invented voxel in the second patient
    table = metrics.compareUnits({'a': first, 'b': second})
    assert list(table.index.names) == ['unit', 'class'] and len(table) == 9
    dice = table['DICE score'].xs('edema', level='class')
    assert dice.tolist() == pytest.approx([4 / 6, 4 / 5 / 2, (4 / 5 + 1 + 0 + 1) / 4])
    recall = table['Recall'].xs('edema', level='class')
    assert recall.tolist() == pytest.approx([2 / 3, 2 / 3 / 2, (2 / 3 + 1 + 0 + 1) / 4])
    precision = table['Precision'].xs('edema', level='class')
    assert precision.tolist() == pytest.approx([2 / 3, 1 / 2, (1 + 1 + 0 + 1) / 4])
    accuracy = table['Accuracy'].xs('edema', level='class')
    assert accuracy.tolist() == pytest.approx([22 / 24, 22 / 24, (5 + 6 + 5 + 6) / 24])
    absent = table['DICE score'].xs('enhancing tumor', level='class')
    assert np.isnan(absent['pooled voxels']) and absent[['patient', 'slice']].tolist() == [1, 1]


def test_compareUnits_pooledIsComputeMetrics():
    """From a generator of random patients the pooled part is computeMetrics of smp's counts."""
    generator = torch.Generator().manual_seed(2)
    pairs = [torch.randint(0, 4, (2, 5, 8, 9), generator=generator) for _ in range(3)]
    table = metrics.compareUnits((y, yhat) for y, yhat in pairs)
    counts = [smp.metrics.get_stats(yhat, y, mode='multiclass', num_classes=4) for y, yhat in pairs]
    pooled = metrics.computeMetrics(*(sum(part.sum(0) for part in parts) for parts in zip(*counts, strict=True)))
    pd.testing.assert_frame_equal(table.loc['pooled voxels'], pooled)
    perSlice = [torch.cat(parts) for parts in zip(*counts, strict=True)]
    expected = smp.metrics.f1_score(*perSlice, reduction='none')[:, 1:].double().mean(0)
    np.testing.assert_allclose(table.loc['slice', 'DICE score'], expected, rtol=1e-6)


def test_compareUnits_refusesNothing():
    """No patients are refused."""
    with pytest.raises(ValueError, match='at least one patient'):
        metrics.compareUnits({})
