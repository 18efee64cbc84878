import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch

import metrics
from metrics.counts import boundingBox


def test_countClasses_isHandCounted():
    """Six voxels, counted by hand: each class has its TP, FP, FN and TN, as int64."""
    y, yhat = np.array([[0, 1, 1, 2, 3, 3]]), np.array([[0, 1, 2, 2, 0, 3]])
    TP, FP, FN, TN = metrics.countClasses(y, yhat)
    assert TP.tolist() == [1, 1, 1, 1] and FP.tolist() == [1, 0, 1, 0]
    assert FN.tolist() == [0, 1, 0, 1] and TN.tolist() == [4, 4, 4, 4]
    assert all(count.dtype == np.int64 for count in (TP, FP, FN, TN))


def test_confusionMatrix_isHandCounted():
    """Rows are the true classes, columns the predicted ones; background around the tumor is counted too."""
    y, yhat = np.zeros((2, 3, 4), int), np.zeros((2, 3, 4), int)
    y[1, 1], yhat[1, 1] = (0, 1, 1, 2), (3, 1, 2, 2)
    assert metrics.confusionMatrix(y, yhat).tolist() == [[20, 0, 0, 1], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize('dtype', [torch.int64, torch.int16, torch.uint8])
def test_countClasses_equalsSmp(dtype):
    """On a random volume with an empty border the counts are those of smp.get_stats summed over slices."""
    generator = torch.Generator().manual_seed(0)
    y, yhat = torch.zeros(2, 9, 20, 20, dtype=dtype)
    for volume in (y, yhat):
        volume[2:7, 3:15, 4:18] = torch.randint(0, 4, (5, 12, 14), generator=generator).to(dtype)
    expected = smp.metrics.functional.get_stats(yhat.long(), y.long(), mode='multiclass', num_classes=4)
    for count, perSlice in zip(metrics.countClasses(y, yhat), expected, strict=True):
        assert (count == perSlice.sum(0).numpy()).all()


@pytest.mark.parametrize('dtype', ['>i4', '<i8', 'i1', '>u2'])
def test_countClasses_takesAnyInteger(dtype):
    """Byte order, sign and memory order do not change the counts, also of empty volumes."""
    y = np.array([[0, 1, 2], [3, 3, 0]])
    for classes, expected in ((y, [2, 1, 1, 2]), (0 * y, [6, 0, 0, 0])):
        TP, FP, FN, TN = metrics.countClasses(classes.astype(dtype).T, classes.T)
        assert TP.tolist() == expected and (TP + TN == 6).all() and not (FP + FN).any()


@pytest.mark.parametrize(
    ('y', 'yhat', 'words'),
    [
        ([[0, 1]], [[0], [1]], r'y has the shape \(1, 2\), yhat \(2, 1\)'),
        ([[0.0, 1.0]], [[0, 1]], 'y has the dtype float64; integer classes 0 to 3'),
        ([[True, False]], [[0, 1]], 'y has the dtype bool'),
        ([[0, 1]], [[0, 4]], 'yhat has values from 0 to 4; classes 0 to 3'),
        ([[0, 256]], [[0, 1]], 'y has values from 0 to 256'),
        ([[0, 1]], [[-1, 1]], 'yhat has values from -1 to 1'),
        (np.zeros((0, 3), int), np.zeros((0, 3), int), r'y has the shape \(0, 3\) and no voxels'),
        (None, [[0, 1]], 'y is None'),
    ],
)
def test_countClasses_refusesOtherThanClasses(y, yhat, words):
    """Other shapes, dtypes and values raise an error that names what was found."""
    with pytest.raises(ValueError, match=words):
        metrics.countClasses(None if y is None else np.array(y), np.array(yhat))


@pytest.mark.parametrize(('dtype', 'value'), [(bool, True), (np.uint8, 3), (np.int64, -2), (np.float32, 0.5)])
def test_boundingBox_isTheSmallest(dtype, value):
    """The box around two nonzero voxels ends at both, whatever the dtype, value and memory order."""
    mask = np.zeros((5, 6, 7), dtype)
    mask[1, 2, 3] = mask[3, 2, 6] = value
    assert boundingBox(mask) == (slice(1, 4), slice(2, 3), slice(3, 7))
    assert boundingBox(mask.T) == (slice(3, 7), slice(2, 3), slice(1, 4))
    assert boundingBox(mask[1]) == (slice(2, 3), slice(3, 4)) and boundingBox(mask[1, 2]) == (slice(3, 4),)
    assert mask[boundingBox(0 * mask)].shape == (0, 0, 0)  # of nothing
