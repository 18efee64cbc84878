"""Measure the distance in mm between the surfaces of two masks."""

import functools

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree

import config
from metrics.counts import asArray, asSpacing, boundingBox

_LEAF_SIZE = 32  # points in a leaf of the tree; the fastest on tumors
_NEAR_FRACTION = 0.9  # largest fraction of points to skip; with a larger one they had to be measured too often
_NEAR_STEPS = 6  # largest number of dilations, each by one voxel
_MOST_SHIFTS = 125  # of a surface to find what is near it; beyond, a distance transform is faster


def hausdorff95(truth, prediction, spacing=(1, 1, 1), rule='challenge'):
    """Return the 95th percentile of the distances in mm between two surfaces, the larger of both directions (HD95).

    'challenge' is the rule of BraTS 2020 and of MONAI. The surface is every voxel of the mask with a background voxel
    across one of its faces; outside the volume is background. The percentile is linearly interpolated.

    'surface-distance' is the rule of DeepMind's package of that name, used by BraTS 2023. The surface is every corner
    where voxels inside and outside the mask meet. The percentile is the smallest distance within which 95 % of the
    surface area lie.

    'pooled' is the rule of panoptica, used by BraTS 2026. The surface is that of 'challenge'; the percentile is taken
    once, over the distances of both directions together.

    'challenge' and 'surface-distance' usually differ by less than 1 mm, and by several mm on small components.

    Args:
        truth, prediction: bool arrays or tensors of the same shape, three axes for 'surface-distance'. Swapping them
            does not change the result.
        spacing: mm between voxels along each axis of the arrays.
        rule: 'challenge', 'surface-distance' or 'pooled'.

    Returns:
        float in mm; 0 if both masks are empty, `config.HD95_EMPTY[rule]` if one is.

    Raises:
        ValueError: if shapes or dtypes are not as above, the spacing does not fit, or the rule is unknown.

    Reference:
        Nikolov et al., Deep learning to achieve clinically applicable segmentation of head and neck anatomy
        (arXiv:1809.04430), for 'surface-distance'.
    """
    truth, prediction, spacing = _asMasks(truth, prediction, spacing, rule, list(config.HD95_EMPTY))
    if not (truth.any() and prediction.any()):
        return config.HD95_EMPTY[rule] if truth.any() or prediction.any() else 0.0
    box = boundingBox(truth | prediction)
    surface = _surfaceCorners if rule == 'surface-distance' else _surfaceVoxels
    (here, areasHere), (there, areasThere) = (surface(mask[box], spacing) for mask in (truth, prediction))
    if rule == 'pooled':
        distances = [_distances(*pair, spacing) for pair in ((here, there), (there, here))]
        return float(np.percentile(np.concatenate(distances), 95))
    return max(_distance95(here, there, areasHere, spacing), _distance95(there, here, areasThere, spacing))


def surfaceDice(truth, prediction, tolerance, spacing=(1, 1, 1), rule='challenge'):
    """Return the fraction of two surfaces that lies close to the other one, the normalized surface Dice (NSD).

    'challenge' is the rule of BraTS since 2024. The surface is every voxel of the mask with a background voxel across
    one of its faces, as in `hausdorff95`. For each mask the fraction of its surface voxels within the tolerance is
    taken, and the mean of both fractions is the NSD.

    'surface-distance' is the rule of DeepMind's package of that name. The surface is every corner where voxels inside
    and outside the mask meet, weighed by the area around it. The areas within the tolerance of both masks are divided
    by both areas.

    Args:
        truth, prediction, spacing: as in `hausdorff95`.
        tolerance: mm; 0 or more. Points at exactly this distance are within it.
        rule: 'challenge' or 'surface-distance'.

    Returns:
        float, 0 to 1; 1 if both masks are empty, 0 if one is.

    Raises:
        ValueError: as in `hausdorff95`; or the tolerance is negative.

    Reference:
        Nikolov et al., arXiv:1809.04430.
    """
    truth, prediction, spacing = _asMasks(truth, prediction, spacing, rule, ['challenge', 'surface-distance'])
    if not tolerance >= 0:
        raise ValueError(f'tolerance is {tolerance}; 0 mm or more was expected.')
    if not (truth.any() and prediction.any()):
        return float(truth.any() == prediction.any())
    box = boundingBox(truth | prediction)
    surface = _surfaceVoxels if rule == 'challenge' else _surfaceCorners
    (here, areasHere), (there, areasThere) = (surface(mask[box], spacing) for mask in (truth, prediction))
    isNear = [_within(other, tolerance, spacing)[one] for one, other in ((here, there), (there, here))]
    if rule == 'challenge':
        return float(np.mean([each.mean() for each in isNear]))
    near = areasHere[isNear[0]].sum() + areasThere[isNear[1]].sum()
    return float(near / (areasHere.sum() + areasThere.sum()))


def _within(surface, tolerance, spacing):
    """Return which points (bool) lie within a tolerance in mm of a surface (bool, the same shape)."""
    reach = (tolerance // spacing + 1).astype(int)
    if np.prod(2 * reach + 1) > _MOST_SHIFTS:
        return ndimage.distance_transform_edt(~surface, sampling=spacing) <= tolerance
    # a few shifts of the whole surface take a tenth of the time of a distance transform
    offsets = np.indices(2 * reach + 1).reshape(surface.ndim, -1).T - reach
    offsets = offsets[np.sqrt(((offsets * spacing) ** 2).sum(1)) <= tolerance]
    near = np.zeros(np.add(surface.shape, 2 * reach), bool)
    for offset in offsets:
        near[tuple(slice(at, at + length) for at, length in zip(reach + offset, surface.shape, strict=True))] |= surface
    return near[tuple(slice(at, at + length) for at, length in zip(reach, surface.shape, strict=True))]


def _asMasks(truth, prediction, spacing, rule, rules):
    """Return two masks as bool arrays and the spacing as an array; raise ValueError if they or the rule do not fit."""
    truth, prediction = asArray(truth), asArray(prediction)
    if rule not in rules:
        raise ValueError(f'rule is {rule!r}; one of {rules} was expected.')
    if truth.shape != prediction.shape or truth.dtype != bool or prediction.dtype != bool:
        raise ValueError(
            f'truth is {truth.dtype} {truth.shape}, prediction {prediction.dtype} {prediction.shape}; two bool masks '
            'of the same shape were expected.'
        )
    if rule == 'surface-distance' and truth.ndim != 3:
        raise ValueError(f"The masks have {truth.ndim} axes; rule = 'surface-distance' needs three.")
    return truth, prediction, asSpacing(spacing, truth.ndim)


def _surfaceVoxels(mask, spacing):
    """Return the voxels of a mask with a background voxel across a face (bool), and None: all weigh the same."""
    inside = mask.copy()
    for axis in range(mask.ndim):
        inner, whole = np.moveaxis(inside, axis, 0), np.moveaxis(mask, axis, 0)
        inner[1:] &= whole[:-1]
        inner[:-1] &= whole[1:]
        inner[[0, -1]] = False  # outside the box is background
    return mask & ~inside, None


def _surfaceCorners(mask, spacing):
    """Return the corners on the surface of a mask (bool, one longer per axis) and the area (P,) around each."""
    padded = np.pad(mask, 1).view(np.uint8)
    codes = np.zeros([length + 1 for length in mask.shape], np.uint8)
    for bit, corner in enumerate(np.ndindex(2, 2, 2)):
        codes |= padded[tuple(slice(at, at + length) for at, length in zip(corner, codes.shape, strict=True))] << bit
    isSurface = (codes != 0) & (codes != 255)  # neither all eight voxels outside nor all inside
    return isSurface, _cornerAreas(tuple(spacing))[codes[isSurface]]


def _distance95(here, there, areas, spacing):
    """Return the 95th percentile of the distances in mm from each point of a surface to the nearest of the other.

    The far points determine it. The near ones are taken as 0 mm first, and measured only if the percentile is among
    them.

    Args:
        here, there: the two surfaces, bool arrays of the same shape.
        areas: the weight (P,) of each point of `here`, or None.
        spacing: mm between points along each axis, array.
    """
    tree = KDTree(np.argwhere(there) * spacing, leafsize=_LEAF_SIZE, balanced_tree=False)
    near, reach = _growNear(here, there, spacing)
    isNear = near[here]
    distances = np.zeros(len(isNear))
    distances[~isNear] = tree.query(np.argwhere(here & ~near) * spacing)[0]
    lowest, found = _surfacePercentile(distances, areas)
    if lowest < reach:
        distances[isNear] = tree.query(np.argwhere(here & near) * spacing)[0]
        _, found = _surfacePercentile(distances, areas)
    return float(found)


def _distances(here, there, spacing):
    """Return the distance (P,) in mm from each point of a surface to the nearest of the other (bool arrays)."""
    return KDTree(np.argwhere(there) * spacing, leafsize=_LEAF_SIZE).query(np.argwhere(here) * spacing)[0]


def _growNear(here, there, spacing):
    """Dilate one surface until it covers too many points of the other; return it and the most it reaches in mm."""
    near, reach = there, 0.0
    for _ in range(_NEAR_STEPS):
        grown = near.copy()
        for axis in range(near.ndim):
            out, whole = np.moveaxis(grown, axis, 0), np.moveaxis(near, axis, 0)
            out[1:] |= whole[:-1]
            out[:-1] |= whole[1:]
        if (grown & here).sum() > _NEAR_FRACTION * here.sum():
            break
        near, reach = grown, reach + spacing.max()
    return near, reach


def _surfacePercentile(distances, areas):
    """Return the smallest distance that determines the 95th percentile, and the percentile.

    Args:
        distances: (P,) in mm.
        areas: (P,), the weight of each distance; None: all weigh the same, and the percentile is interpolated.
    """
    if areas is None:
        return np.percentile(distances, 95, method='lower'), np.percentile(distances, 95)
    order = np.lexsort((areas, distances))
    fraction = np.cumsum(areas[order]) / areas[order].sum()
    found = distances[order][min(np.searchsorted(fraction, 0.95), len(order) - 1)]
    return found, found


@functools.lru_cache(maxsize=16)
def _cornerAreas(spacing):
    """Return the surface area (256,) in mm2 around a corner for every pattern of its eight voxels.

    Bit i of the index is set if the i-th voxel of `np.ndindex(2, 2, 2)` is in the mask. The centres of the eight voxels
    form a cube. The surface crosses each edge of the cube between a voxel inside and one outside in the middle. Of the
    voxels inside and those outside, the fewer are cut off, each of their face-connected components by its own polygon.
    """
    areas = np.zeros(256)
    for code in range(1, 255):
        mask = (code >> np.arange(8) & 1).astype(bool).reshape(2, 2, 2)
        minority = mask if mask.sum() <= 4 else ~mask
        components, count = ndimage.label(minority)
        areas[code] = sum(_cutArea(components == number, spacing) for number in range(1, count + 1))
    return areas


def _cutArea(component, spacing):
    """Return the area in mm2 of the polygon that cuts a connected component (bool (2, 2, 2)) off its cube.

    A polygon of five or six sides need not be flat, so its area depends on how it is divided into triangles. As in the
    package, every second vertex is cut off until a triangle is left. The first vertices are those of the voxel with
    most neighbours in the component.
    """
    outside = np.argwhere(~component)
    inside = np.argwhere(component)
    cuts = [[(voxel + other) / 2 for other in outside if abs(voxel - other).sum() == 1] for voxel in inside]
    remaining = [cut for cutsOfVoxel in sorted(cuts, key=len) for cut in cutsOfVoxel]
    polygon = [remaining.pop(0)]
    while remaining:  # consecutive vertices lie on the same face of the cube
        isOnFace = [((cut == polygon[-1]) & (cut % 1 == 0)).any() for cut in remaining]
        polygon.append(remaining.pop(isOnFace.index(True)))
    triangles, index = [], 0
    while len(polygon) > 3:
        triangles.append((polygon[index - 1], polygon[index], polygon[index + 1]))
        del polygon[index]
        index += 1
    triangles.append(polygon)
    scale = [np.prod(np.delete(spacing, axis)) for axis in range(3)]  # each axis of a normal scales with the other two
    areas = [np.linalg.norm(np.cross(b - a, c - a) / 2 * scale) for a, b, c in triangles]
    return sum(sorted(areas, reverse=True))  # summed in the package's order: the last bit can decide a tie at 95 %
