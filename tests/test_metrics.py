import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch

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
