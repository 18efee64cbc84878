"""Measure in mm how far apart the surfaces of two masks lie."""

import functools

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree

import config
from counts import asArray, asSpacing, boxOf

_LEAF = 32  # points in a leaf of the tree; the fastest on tumors
_NEAR_SHARE = 0.9  # of the points at most; with more of them near, they too often matter after all
_NEAR_STEPS = 6  # voxels that near may reach


def hausdorff95(truth, prediction, spacing=(1, 1, 1), rule='challenge'):
    """Gives the 95th percentile of the surface distances, the larger of both directions, in mm.

    'challenge' is BraTS 2020's, and MONAI's: the surface is every voxel of the mask that has a background voxel across
    one of its faces, outside of the volume being background; every voxel counts alike; the percentile is linearly
    interpolated. 'surface-distance' is the rule of DeepMind's package of that name, which the challenge of 2023 uses:
    the surface is every corner where voxels of the mask and others meet, weighed by the area that the surface has
    around it, and the percentile is the first distance within which 95 % of that area lie. The two differ by some
    tenths of a mm on tumors, by several mm on small parts.

    Args:
        truth, prediction: bool arrays or tensors of one shape, 'surface-distance' wants three axes. Swapping them
            changes nothing.
        spacing: mm between voxels along each axis of the arrays.
        rule: 'challenge' or 'surface-distance'.

    Returns:
        float, mm; 0 where both masks are empty, `config.HD95_EMPTY[rule]` where one is.

    Raises:
        ValueError: other shapes or dtypes, a spacing that does not fit, an unknown rule.

    Reference:
        Nikolov et al., Deep learning to achieve clinically applicable segmentation of head and neck anatomy
        (arXiv:1809.04430), for 'surface-distance'.
    """
    truth, prediction = asArray(truth), asArray(prediction)
    if truth.shape != prediction.shape or truth.dtype != bool or prediction.dtype != bool:
        raise ValueError(
            f'truth is {truth.dtype} {truth.shape}, prediction {prediction.dtype} {prediction.shape}; two masks (bool) '
            'of one shape were expected.'
        )
    spacing = asSpacing(spacing, truth.ndim)
    if rule not in config.HD95_EMPTY:
        raise ValueError(f'rule is {rule!r}; one of {list(config.HD95_EMPTY)} was expected.')
    if rule == 'surface-distance' and truth.ndim != 3:
        raise ValueError(f"the masks have {truth.ndim} axes; rule = 'surface-distance' wants three.")
    if not (truth.any() and prediction.any()):
        return config.HD95_EMPTY[rule] if truth.any() or prediction.any() else 0.0
    box = boxOf(truth | prediction)
    surface = _markVoxels if rule == 'challenge' else _markCorners
    (here, areasHere), (there, areasThere) = (surface(mask[box], spacing) for mask in (truth, prediction))
    return max(_distance95(here, there, areasHere, spacing), _distance95(there, here, areasThere, spacing))


def _markVoxels(mask, spacing):
    """Gives the voxels of a mask with a background neighbour across a face, bool like it; and None: all count alike."""
    inside = mask.copy()
    for axis in range(mask.ndim):
        inner, whole = np.moveaxis(inside, axis, 0), np.moveaxis(mask, axis, 0)
        inner[1:] &= whole[:-1]
        inner[:-1] &= whole[1:]
        inner[[0, -1]] = False  # beyond the box there is background
    return mask & ~inside, None


def _markCorners(mask, spacing):
    """Gives the corners where a mask meets others, bool, longer by 1 along each axis; and the area (P,) at each."""
    padded = np.pad(mask, 1).view(np.uint8)
    codes = np.zeros([length + 1 for length in mask.shape], np.uint8)
    for bit, corner in enumerate(np.ndindex(2, 2, 2)):
        codes |= padded[tuple(slice(at, at + length) for at, length in zip(corner, codes.shape, strict=True))] << bit
    isSurface = (codes != 0) & (codes != 255)  # neither all eight voxels outside nor all inside
    return isSurface, _cornerAreas(tuple(spacing))[codes[isSurface]]


def _distance95(here, there, areas, spacing):
    """Gives the percentile of the distances in mm from the points of one surface (bool) to the nearest of the other.

    Only the far points decide it, so the near ones are counted, as 0 mm, and not measured unless they matter after all.
    """
    tree = KDTree(np.argwhere(there) * spacing, leafsize=_LEAF, balanced_tree=False)
    near, reach = _growNear(here, there, spacing)
    isNear = near[here]
    distances = np.zeros(len(isNear))
    distances[~isNear] = tree.query(np.argwhere(here & ~near) * spacing)[0]
    least, found = _percentile(distances, areas)
    if least < reach:
        distances[isNear] = tree.query(np.argwhere(here & near) * spacing)[0]
        _, found = _percentile(distances, areas)
    return float(found)


def _growNear(here, there, spacing):
    """Gives what lies near one surface, bool, and how far at most in mm: as far as few enough of the other is in it."""
    near, reach = there, 0.0
    for _ in range(_NEAR_STEPS):
        grown = near.copy()
        for axis in range(near.ndim):
            out, whole = np.moveaxis(grown, axis, 0), np.moveaxis(near, axis, 0)
            out[1:] |= whole[:-1]
            out[:-1] |= whole[1:]
        if (grown & here).sum() > _NEAR_SHARE * here.sum():
            break
        near, reach = grown, reach + spacing.max()
    return near, reach


def _percentile(distances, areas):
    """Gives the least of the distances that decide the percentile, and the percentile.

    Args:
        distances: (P,) in mm.
        areas: (P,) what each counts; None: all alike, and the percentile is interpolated.
    """
    if areas is None:
        return np.percentile(distances, 95, method='lower'), np.percentile(distances, 95)
    order = np.lexsort((areas, distances))
    share = np.cumsum(areas[order]) / areas[order].sum()
    found = distances[order][min(np.searchsorted(share, 0.95), len(order) - 1)]
    return found, found


@functools.lru_cache(maxsize=16)
def _cornerAreas(spacing):
    """Gives the area (256,) in mm2 of the surface around a corner, by which of its eight voxels are in the mask.

    Bit i of the index is the voxel at `np.ndindex(2, 2, 2)`'s i-th place. The eight voxel centres span a cube; the
    surface cuts each of the cube's edges that joins a voxel inside to one outside in its middle. Whichever of inside
    and outside holds fewer of the eight is cut off, each of its face-connected parts by a polygon of its own.
    """
    areas = np.zeros(256)
    for code in range(1, 255):
        mask = (code >> np.arange(8) & 1).astype(bool).reshape(2, 2, 2)
        minority = mask if mask.sum() <= 4 else ~mask
        parts, count = ndimage.label(minority)
        areas[code] = sum(_cutArea(parts == part, spacing) for part in range(1, count + 1))
    return areas


def _cutArea(part, spacing):
    """Gives the area in mm2 of the polygon that cuts a connected part (bool (2, 2, 2)) off its cube.

    Polygons of five and six sides can be bent, so how they are cut into triangles matters: here every second vertex is
    cut off until a triangle is left, beginning with a vertex at the voxel that has most of its neighbours in the part.
    """
    outside = np.argwhere(~part)
    cuts = [[(voxel + other) / 2 for other in outside if abs(voxel - other).sum() == 1] for voxel in np.argwhere(part)]
    left = [cut for several in sorted(cuts, key=len) for cut in several]
    polygon = [left.pop(0)]
    while left:  # consecutive vertices lie on one face of the cube
        onFace = [((cut == polygon[-1]) & (cut % 1 == 0)).any() for cut in left]
        polygon.append(left.pop(onFace.index(True)))
    triangles, place = [], 0
    while len(polygon) > 3:
        triangles.append((polygon[place - 1], polygon[place], polygon[place + 1]))
        del polygon[place]
        place += 1
    triangles.append(polygon)
    scale = [np.prod(np.delete(spacing, axis)) for axis in range(3)]  # an area grows with the axes it does not face
    areas = [np.linalg.norm(np.cross(b - a, c - a) / 2 * scale) for a, b, c in triangles]
    return sum(sorted(areas, reverse=True))  # the package's order: a tie at 95 % hangs on the last bit
