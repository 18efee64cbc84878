"""Count what truth and prediction share, voxel by voxel, once both are known to hold classes."""

import numpy as np
import torch

import config


def asClasses(classes, name):
    """Gives classes as a uint8 array of the same shape.

    Args:
        classes: tensor or array of any integer dtype, 0 to 3; it is not changed.
        name: what to call it in an error.

    Raises:
        ValueError: not integers, no voxels, or classes outside 0 to 3.
    """
    array = asArray(classes)
    if array.dtype.kind not in 'iu':
        raise ValueError(f'{name} holds {array.dtype}; integer classes 0 to {config.NO_CLASSES - 1} were expected.')
    if array.size == 0:
        raise ValueError(f'{name} has the shape {array.shape}: not a single voxel.')
    # seen as unsigned, a negative number is a large one: one pass finds both kinds of stranger
    if array.view(array.dtype.str.replace('i', 'u')).max() >= config.NO_CLASSES:
        found = sorted({int(array.min()), int(array.max())})
        raise ValueError(
            f'{name} reaches from {found[0]} to {found[-1]}; classes 0 to {config.NO_CLASSES - 1} were expected (raw '
            'labels, with 4 for the enhancing tumor, have to be mapped to classes first).'
        )
    return array.astype(np.uint8, copy=False)


def asArray(values):
    """Gives a tensor (of any device) or an array-like as a NumPy array, without a copy where there need not be one."""
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def asPair(y, yhat):
    """Gives truth and prediction as two uint8 arrays of one shape; ValueError where they are not classes of one shape.

    Args:
        y, yhat: tensors or arrays of any integer dtype, classes 0 to 3.
    """
    if y is None:
        raise ValueError('y is None: this patient has no segmentation to be scored against.')
    y, yhat = asClasses(y, 'y'), asClasses(yhat, 'yhat')
    if y.shape != yhat.shape:
        raise ValueError(f'y has the shape {y.shape}, yhat {yhat.shape}; one shape was expected.')
    return y, yhat


def asVolumes(y, yhat):
    """Gives what `asPair` gives, and a ValueError where it has not three axes."""
    y, yhat = asPair(y, yhat)
    if y.ndim != 3:
        raise ValueError(f'y has the shape {y.shape}; a volume was expected: three axes.')
    return y, yhat


def asSpacing(spacing, dimensions):
    """Gives the spacing as float64 (dimensions,), in mm.

    Args:
        spacing: mm between voxels along each axis of the arrays, in their order.
        dimensions: number of axes.

    Raises:
        ValueError: not one number per axis, or one that is not finite and above 0.
    """
    array = np.asarray(spacing, dtype=float)
    if array.shape != (dimensions,) or not np.isfinite(array).all() or (array <= 0).any():
        raise ValueError(f'spacing is {spacing}; {dimensions} numbers above 0 were expected: mm along each axis.')
    return array


def boxOf(mask):
    """Gives the slices, one an axis, of the smallest box that holds all that is not 0; of length 0 if all is."""
    box = []
    for axis in range(mask.ndim):
        others = tuple(other for other in range(mask.ndim) if other != axis)
        where = np.flatnonzero(mask.any(others))
        if len(where) == 0:
            return (slice(0, 0),) * mask.ndim
        part = slice(int(where[0]), int(where[-1]) + 1)
        mask = mask[(slice(None),) * axis + (part,)]  # the axes that follow have less to look through
        box.append(part)
    return tuple(box)


def countJoint(y, yhat):
    """Gives int64 (4, 4): how many voxels have the class of the row in truth and that of the column in prediction.

    Args:
        y, yhat: tensors or arrays of integers of one shape, classes 0 to 3.

    Raises:
        ValueError: other shapes, dtypes or classes.
    """
    y, yhat = asPair(y, yhat)
    box = boxOf(y | yhat)
    codes = y[box] * np.uint8(config.NO_CLASSES) + yhat[box]
    joint = np.bincount(codes.ravel(), minlength=config.NO_CLASSES**2).reshape(config.NO_CLASSES, -1)
    joint[0, 0] += y.size - codes.size  # around the box both are background
    return joint


def splitJoint(joint):
    """Gives TP, FP, FN, TN of each class, (..., 4), from joint counts (..., 4, 4)."""
    TP = np.diagonal(joint, axis1=-2, axis2=-1)
    FP, FN = joint.sum(-2) - TP, joint.sum(-1) - TP
    return TP, FP, FN, joint.sum((-2, -1))[..., None] - TP - FP - FN


def countClasses(y, yhat):
    """Gives TP, FP, FN, TN of each class, for `computeMetrics`, by one count of the pairs of classes.

    The numbers are those of `smp.metrics.functional.get_stats(yhat, y, mode = 'multiclass')` summed over the images.

    Args:
        y, yhat: truth and prediction, tensors or arrays of integers of one shape, classes 0 to 3.

    Returns:
        TP, FP, FN, TN: int64 arrays (4,), voxels. They add up over patients.

    Raises:
        ValueError: other shapes, dtypes or classes.
    """
    return splitJoint(countJoint(y, yhat))
