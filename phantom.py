"""Make synthetic glioma patients in the layout of BraTS 2020, so that everything runs where there is no BraTS."""

import gzip
from itertools import pairwise
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from scipy import ndimage
from tqdm.auto import tqdm

from files import writeWhole

# The head is built in mm about the middle of the box, axes patient left, front, top, whatever the shape asked for.
BOX = (240, 240, 155)
HALF = (80, 98, 77)  # mm of the box that the head may fill, either way from the middle
STEP = 2  # mm between the points where anatomy is computed; voxels are interpolated
SMALLEST = 16  # voxels along an axis; below that a rim no longer fits around a core

MODALITIES = ('t1', 't1ce', 't2', 'flair')
# Intensity in each modality, white matter of T1 being 1; the first tissue in the list covers those after it.
TISSUES = {
    'enhancing': (0.76, 1.72, 0.92, 1.18),
    'necrosis': (0.50, 0.52, 1.38, 0.90),
    'vessel': (0.62, 1.85, 0.35, 0.50),
    'choroid': (0.60, 1.65, 1.20, 0.95),
    'ventricle': (0.30, 0.34, 1.75, 0.20),
    'fluid': (0.38, 0.42, 1.50, 0.30),
    'edema': (0.76, 0.78, 0.94, 1.36),
    'spot': (0.84, 0.85, 0.72, 1.25),
    'nucleus': (0.86, 0.88, 0.53, 0.93),
    'cortex': (0.74, 0.78, 0.68, 1.00),
    'stem': (0.95, 0.96, 0.46, 0.84),
    'white': (1.00, 1.00, 0.42, 0.78),
}
SOLID = (0.66, 0.68, 1.22, 1.22)  # the core of a glioma that does not enhance: tumor, not fluid

# Centre and half axes in mm; the left half is given, |x| makes the right. Nuclei: thalamus, caudate, putamen.
CEREBRUM = ((0, 0, 8), (67, 87, 60))
TEMPORAL = ((42, 0, -19), (23, 47, 23))
CEREBELLUM = ((0, -51, -34), (52, 33, 29))
PONS = ((0, -9, -33), (18, 15, 14))
NUCLEI = (((11, -13, 5), (9, 15, 9)), ((13, 19, 9), (5, 11, 9)), ((26, 3, 2), (7, 18, 11)))
MIDLINE_VENTRICLES = (((0, -4, -2), (2.4, 14, 9)), ((0, -34, -34), (8, 5, 9)))  # third, fourth
BASAL = ((0, -6, 0), (35, 42, 26))  # nuclei, capsules, callosum: no sulcus goes in here
STEM = (((0, -14, -8), 15), ((0, -14, -30), 12.5), ((0, -27, -76), 8))
# Course of a lateral ventricle, with its radius: frontal horn, body, trigone, occipital horn and back, temporal horn.
# fmt: off
VENTRICLE = (((15, 36, 4), 5.0), ((8, 13, 11), 6.5), ((11, -10, 19), 6.2), ((19, -28, 16), 7.0), ((25, -39, 6), 8.0),
             ((22, -64, 3), 3.0), ((25, -39, 6), 6.0), ((31, -12, -17), 3.0))
# fmt: on
PLEXUS = (((12, -13, 14), 1.5), ((26, -37, 5), 3.4), ((29, -22, -10), 1.0))
# Where gliomas grow: frontal, temporal, parietal, occipital, insular, deep; how often.
PLACES = ((27, 42, 20), (42, -2, -18), (29, -34, 34), (24, -60, 10), (36, 8, 4), (20, -14, 14))
PLACE_SHARES = (0.33, 0.22, 0.19, 0.09, 0.11, 0.06)


def makeCases(folder, n, seed=0, shape=BOX):
    """Writes n synthetic patients, `BraTS20_Training_001` on, with BraTS 2020's files and `name_mapping.csv`.

    Every fifth patient from the fourth on is an LGG without enhancing tumor; the others are HGG with labels 1, 2 and 4.
    The contrasts are plausible, not physical: this is to try the code, never to judge a method.

    Args:
        folder: where the patients' folders go (made if missing). Files of the same names are overwritten, other
            patients there are left alone.
        n: number of patients, 1 or more. Full-size ones take some seconds and 10 MB each.
        seed: whole number, 0 or more. Patient i of a seed is the same whatever n is.
        shape: voxels to patient left, back and top. A smaller one shows the same head coarser (16 or more an axis).

    Returns:
        List of the n patient ids (str).

    Raises:
        ValueError: n under 1, a negative seed, or a shape that is not three whole numbers of 16 or more.
    """
    if n < 1:
        raise ValueError(f'n = {n} patients asked for, at least 1 expected')
    if seed < 0:
        raise ValueError(f'seed = {seed}, a whole number of 0 or more expected')
    if len(shape) != 3 or any(int(size) != size or size < SMALLEST for size in shape):
        raise ValueError(f'shape = {tuple(shape)}, three whole numbers of {SMALLEST} or more expected to hold a tumor')
    folder, shape = Path(folder), tuple(int(size) for size in shape)
    ids = [f'BraTS20_Training_{i:03d}' for i in range(1, n + 1)]
    lowGrade = [i % 5 == 4 for i in range(1, n + 1)]
    for i, patient in enumerate(tqdm(ids, desc='phantoms', leave=False, disable=n == 1)):
        volumes = _makePatient(np.random.default_rng([seed, i + 1]), shape, not lowGrade[i])
        for suffix, volume in volumes.items():
            _writeVolume(volume, folder / patient / f'{patient}_{suffix}.nii.gz')
    _writeMapping(ids, lowGrade, folder / 'name_mapping.csv')
    return ids


def _makePatient(rng, shape, enhances):
    """The four images (int16) and the label (uint8) of one patient, by file suffix."""
    atlas = [np.arange(-half, half + 1, STEP, dtype=np.float32) for half in HALF]
    box, voxels = _voxelCentres(shape)
    size = np.array(BOX) / shape  # mm
    matrices = [np.maximum(0, 1 - np.abs(v[:, None] - a) / STEP) for v, a in zip(voxels, atlas, strict=True)]
    foci = _placeTumor(rng)
    head = _headCoordinates(rng, atlas)
    fields = _outerAnatomy(rng, atlas, head)
    fields |= _innerAnatomy(rng, atlas, _pushAside(head, foci))
    fields |= _tumorFields(rng, atlas, head, foci)
    fields = {name: _spread(field, matrices) for name, field in fields.items()}
    covers, brain = _tissueCovers(fields, size)
    label = _growTumor(rng, fields, covers, brain, foci, enhances, size)
    _paintTumor(covers, fields, label, size)
    volumes = {suffix: np.zeros(shape, np.int16) for suffix in MODALITIES} | {'seg': np.zeros(shape, np.uint8)}
    for suffix, values in zip(MODALITIES, _intensities(rng, covers, brain, enhances), strict=True):
        volumes[suffix][box] = _scan(rng, values, brain, atlas, matrices, size)
    volumes['seg'][box] = label
    return volumes


def _voxelCentres(shape):
    """Slices of the box that hold the head, and the mm of the voxel centres in them, per axis."""
    box, centres = [], []
    for axis, (count, extent, half) in enumerate(zip(shape, BOX, HALF, strict=True)):
        mm = (np.arange(count, dtype=np.float32) + 0.5) * extent / count - extent / 2
        inside = np.flatnonzero(np.abs(mm) < half)
        box.append(slice(inside[0], inside[-1] + 1))
        centres.append(mm[inside] * (-1 if axis == 1 else 1))  # the array runs to the back, y to the front
    return tuple(box), centres


def _spread(field, matrices):
    """The field interpolated by one matrix per axis: three small products, many times faster than ndimage.zoom."""
    a, b, c = (matrix.astype(np.float32) for matrix in matrices)
    field = b @ (field.astype(np.float32).reshape(-1, c.shape[1]) @ c.T).reshape(*field.shape[:2], -1)
    return (a @ field.reshape(field.shape[0], -1)).reshape(-1, *field.shape[1:])


def _noise(rng, axes, spacing, band=False):
    """Smooth noise of unit deviation on the axes (mm), from random cubic B-splines; `band` evens out its waves."""
    matrices = []
    for axis in axes:
        u = np.abs(axis[:, None] - np.arange(-HALF[1] - 2 * spacing, HALF[1] + 2 * spacing, spacing)) / spacing
        u = u[:, (u < 2).any(axis=0)]
        matrices.append(np.where(u < 1, 2 / 3 - u**2 + u**3 / 2, np.maximum(2 - u, 0) ** 3 / 6))
    knots = rng.standard_normal([matrix.shape[1] for matrix in matrices], dtype=np.float32)
    field = _spread(knots - ndimage.gaussian_filter(knots, 1.1) if band else knots, matrices)
    return field / field.std()


def _soft(depth, width):
    """0 to 1 across a surface, over `width` mm: the share of a voxel that lies inside."""
    return np.clip(depth / width + 0.5, 0, 1)


def _ellipsoid(at, centre, radii, power=2):
    """Depth in mm below the surface of an ellipsoid, negative outside (along the ray from its centre)."""
    offsets = [a - c for a, c in zip(at, centre, strict=True)]
    level = sum(np.abs(o / r) ** power for o, r in zip(offsets, radii, strict=True)) ** (1 / power)
    return (1 / np.maximum(level, 0.05) - 1) * np.sqrt(sum(o * o for o in offsets))


def _course(at, points, scale=1):
    """Depth in mm below the surface of a tube through (point, radius) pairs, the radii times scale."""
    depth = np.float32(-np.inf)
    for (start, radius), (end, endRadius) in pairwise(points):
        way = np.subtract(end, start).astype(np.float32)
        offsets = [a - s for a, s in zip(at, start, strict=True)]
        t = np.clip(sum(o * w for o, w in zip(offsets, way, strict=True)) / (way @ way), 0, 1)
        distance = np.sqrt(sum((o - t * w) ** 2 for o, w in zip(offsets, way, strict=True)))
        depth = np.maximum(depth, scale * (radius + (endRadius - radius) * t) - distance)
    return depth


def _join(a, b, k):
    """The larger depth, with the crease filled over k mm."""
    h = np.maximum(k - np.abs(a - b), 0) / k
    return np.maximum(a, b) + h * h * k / 4


def _placeTumor(rng):
    """One to three foci, the largest first: centre (3,) and radius in mm, by which the rest of the tumor is scaled."""
    place = PLACES[rng.choice(len(PLACES), p=PLACE_SHARES)]
    centre = np.array(place) + rng.normal(0, (4, 7, 5))
    centre[0] = max(centre[0], 15) * rng.choice((-1, 1))
    foci = [(centre, 22.0)]
    for _ in range(rng.choice(3, p=(0.7, 0.2, 0.1))):
        away = rng.normal(0, 1, 3) * (0.5, 1, 0.6)
        other = centre + away / np.linalg.norm(away) * rng.uniform(28, 44)
        other[0] = np.sign(centre[0]) * np.clip(abs(other[0]), 16, 46)
        other = np.clip(other, (-46, -62, -22), (46, 52, 44))
        foci.append((other, rng.uniform(9, 14)))
    return foci


def _headCoordinates(rng, atlas):
    """Where in the standard head each atlas point lies (x left, y front, z top; mm): pose, size, asymmetry."""
    a, b, c = rng.normal(0, (0.05, 0.035, 0.05))  # nod, tilt, turn in radians
    turn = np.array([[1, -c, b], [c, 1, -a], [-b, a, 1]]) / rng.normal(0.97, 0.035, 3)[:, None]
    shift = rng.normal(0, 2, 3).astype(np.float32)
    grid = np.meshgrid(*(axis - s for axis, s in zip(atlas, shift, strict=True)), indexing='ij')
    return [
        sum(np.float32(w) * g for w, g in zip(row, grid, strict=True)) + np.float32(2.2) * _noise(rng, atlas, 38)
        for row in turn
    ]


def _pushAside(head, foci):
    """Coordinates from which the tumor has displaced the tissue: ventricles are squeezed, the midline bends."""
    x, y, z = head
    for centre, radius in foci:
        offsets = [a - np.float32(c) for a, c in zip((x, y, z), centre, strict=True)]
        pull = 0.32 * np.exp(-sum(o * o for o in offsets) / np.float32(1.5 * radius) ** 2)
        x, y, z = (a - pull * o for a, o in zip((x, y, z), offsets, strict=True))
    return x, y, z


def _outerAnatomy(rng, atlas, head):
    """Depths below hull and pia; sheets of fluid (signed distance, width): folds, midline, Sylvian, tentorium."""
    x, y, z = head
    half = (np.abs(x), y, z)
    egg = (half[0] / (1 - 0.0011 * (y + 10)), y, z)  # the forehead is narrower
    base = z + 17 + 0.06 * y + 1.5 * _noise(rng, atlas, 18)
    cerebrum = -_join(-_ellipsoid(egg, *CEREBRUM, power=2.3), -base, 8)
    temporal, cerebellum = _ellipsoid(half, *TEMPORAL), _ellipsoid(half, *CEREBELLUM, power=2.2)
    stem = _join(_course(head, STEM), _ellipsoid(head, *PONS), 4)
    hull = _join(_join(cerebrum, temporal, 16), _join(cerebellum, stem, 14), 24)
    hemisphere = np.maximum(cerebrum, temporal)
    pia = np.maximum(np.maximum(hemisphere, cerebellum), stem) - 1 - 0.9 * _noise(rng, atlas, 14)
    fold, foldWidth = _folds(rng, atlas, head, hull)
    inCerebellum = (cerebellum > hemisphere) | (z < -45)
    leaf = 5.6 / 6.28 * np.sin(6.28 / 5.6 * (z + 0.35 * (y + 52) + 1.5 * _noise(rng, atlas, 12)))
    reach = 12 + 6 * np.sin(9 * np.arctan2(z + 32, y + 36) + 1.2 * _noise(rng, atlas, 16))  # the tree of life
    callosum = np.maximum(0, ((y + 3) / 42) ** 2 + (np.where(z > 0, z / 29, z / 16)) ** 2 - 1)
    return {
        'hull': hull,
        'pia': pia,
        'stem': stem - np.maximum(0, cerebellum),
        'cerebellum': cerebellum - hemisphere,
        'side': x,
        'fold': np.where(inCerebellum, leaf, fold),
        'foldWidth': np.where(inCerebellum, 0.9 * _soft(reach - cerebellum, 3), foldWidth) * (stem < 0),
        'midline': x + 0.8 * _noise(rng, atlas, 20),
        'midlineWidth': 1.7 * np.minimum(1, 8 * callosum) * (cerebrum > np.maximum(cerebellum, stem)),
        'sylvian': (cerebrum - temporal) / 1.5,
        'sylvianWidth': 3.2 * _soft(half[0] - 31, 6) * _soft(47 - np.abs(y), 8),
        'tentorium': (hemisphere - cerebellum) / 1.6,
        'tentoriumWidth': 2.2 * (stem < 0),
        'tubes': 7 * np.sqrt(_noise(rng, atlas, 9) ** 2 + _noise(rng, atlas, 9) ** 2),
        'sinus': np.hypot(x, hull - 3) + 20 * (z < 15) + 20 * (y > 45),
        'dural': _noise(rng, atlas, 11),
    }


def _folds(rng, atlas, head, hull):
    """Signed distance to the sulci of the cerebrum and their width in mm, 0 below the depth that they reach."""
    pattern = _noise(rng, atlas, rng.uniform(5.6, 6.8), band=True)
    x, y, z = head
    level = np.sqrt((x / 67) ** 2 + (y / 87) ** 2 + ((z - 6) / 62) ** 2)
    pull = 0.4 + 0.6 / np.maximum(level, 0.4)  # changes little along a ray: sulci go in at right angles
    places = [(p * pull + h) / STEP + _noise(rng, atlas, 10) for p, h in zip(head, HALF, strict=True)]
    fold = ndimage.map_coordinates(pattern, places, order=1, mode='mirror')
    slope = np.sqrt(sum(g * g for g in np.gradient(fold, STEP)))
    depth = np.maximum(hull, 0)
    gate = _soft(22 + 7 * _noise(rng, atlas, 13) - depth, 4) * _soft(-_ellipsoid(head, *BASAL), 6)
    return fold / np.maximum(slope, 0.10), (1.3 + rng.uniform(0.3, 1.6) * np.exp(-depth / 5)) * gate


def _innerAnatomy(rng, atlas, head):
    """Depths below the surface of ventricles, choroid plexus, nuclei, and of white matter spots."""
    half = (np.abs(head[0]), head[1], head[2])
    scale = rng.uniform(0.75, 1.5)
    lateral = np.minimum(_course(half, VENTRICLE, scale), half[0] - 1.2) + 0.7 * _noise(rng, atlas, 8)
    middle = [_ellipsoid(head, centre, np.multiply(radii, (scale, 1, 1))) for centre, radii in MIDLINE_VENTRICLES]
    nuclei = np.max([_ellipsoid(half, centre, radii) for centre, radii in NUCLEI], axis=0)
    caps = 5 * np.exp(-(((head[1] - 34) / 14) ** 2)) + 5 * np.exp(-(((head[1] + 50) / 16) ** 2))
    return {
        'ventricle': np.maximum(lateral, np.max(middle, axis=0)),
        'choroid': _course(half, PLEXUS) + 0.9 * _noise(rng, atlas, 5),
        'nucleus': nuclei + 0.8 * _noise(rng, atlas, 8),
        'cap': lateral + caps * rng.uniform(0.3, 1.1) + 1.6 * _noise(rng, atlas, 10) - 1.5,
        'spot': 4 * (_noise(rng, atlas, 5) - rng.uniform(1.9, 2.6)),
    }


def _tumorFields(rng, atlas, head, foci):
    """Distances from the foci, ragged, in units of each one's radius: of edema, of core and of necrosis."""
    ragged, coarse, fine = _noise(rng, atlas, 14), _noise(rng, atlas, 8), _noise(rng, atlas, 5)
    distances = []
    for centre, radius in foci:
        stretch = rng.normal(1, 0.16, 3)
        offsets = [(p - np.float32(c)) * np.float32(s) for p, c, s in zip(head, centre, stretch, strict=True)]
        distances.append(np.sqrt(sum(o * o for o in offsets)) / np.float32(radius))
    distance = np.min(distances, axis=0)
    return {
        'edema': distance * np.exp(0.22 * ragged + 0.12 * coarse) + 0.05 * fine,
        'core': distance * np.exp(0.16 * coarse + 0.07 * fine) + 0.02 * fine,
        'necrosis': distance * np.exp(0.16 * coarse + 0.12 * _noise(rng, atlas, 7)),  # nearly the core: a rim stays
        'patchy': _noise(rng, atlas, 6),
    }


def _tissueCovers(fields, size):
    """Per healthy tissue the share of a voxel that it may cover (0 to 1), and the mask of the brain."""
    blur = float(size.mean())  # mm over which an edge is spread

    def sheet(name):
        width = fields[name + 'Width']
        return np.clip((width / 2 - np.abs(fields[name])) / blur + 0.5, 0, np.minimum(1, width / blur))

    hull, pia = fields['hull'], fields['pia']
    notch = 1.8 * np.exp(-((fields['fold'] / 2.2) ** 2)) * (fields['foldWidth'] > 0.5) * (pia > -2)
    brain = (hull > notch) & (pia > -7)
    midline = sheet('midline')
    fluid = np.max([_soft(-pia, blur), sheet('fold'), midline, sheet('sylvian'), sheet('tentorium')], axis=0)
    ribbon = ndimage.gaussian_filter(fluid, 2.0 / size)  # reaches as far from a thin sulcus as from the open surface
    stem = _soft(fields['stem'], 2 * blur)
    patchy = np.clip(0.75 + 0.35 * fields['patchy'], 0, 1)
    vessel = np.maximum(_soft(1.3 - fields['tubes'], blur) * (hull < 16), _soft(2.6 - fields['sinus'], blur))
    dura = np.maximum(_soft(2.2 - hull, blur) * (fields['dural'] > 1), 0.8 * midline * (hull < 14)) * patchy
    ventricle = _soft(fields['ventricle'], blur)
    return {
        'vessel': np.maximum(vessel * (1 - stem), dura),
        'choroid': _soft(fields['choroid'], blur) * ventricle * patchy,
        'ventricle': ventricle,
        'fluid': fluid,
        'spot': 0.85 * np.maximum(_soft(fields['spot'], 3), _soft(fields['cap'], 3)) * (ribbon < 0.05),
        'nucleus': _soft(fields['nucleus'], 2 * blur),
        'cortex': _soft((ribbon - 0.085) * 25, blur) * (1 - stem),
        'stem': stem,
        'white': np.ones_like(hull),
    }, brain


def _growTumor(rng, fields, covers, brain, foci, enhances, size):
    """The label (uint8: 0, 1, 2, 4): as many voxels as the drawn volumes need, those nearest to the foci first."""
    whole = np.clip(rng.lognormal(np.log(75), 0.55), 20, 190)  # ml
    coreShare = rng.uniform(0.16, 0.5) if enhances else rng.uniform(0.3, 0.65)
    deadShare = rng.uniform(0.15, 0.6) if enhances else 1
    voxels = whole * 1000 / size.prod()
    solid = brain & (covers['ventricle'] < 0.5) & (fields['hull'] > 3)
    side = fields['side'] * np.sign(foci[0][0][0])  # mm from the midline, the tumor's half being positive
    inCore = _nearest(fields['core'], solid & (side > 1), max(12, round(voxels * coreShare)))
    edema = fields['edema'] + 0.35 * covers['cortex'] + 0.4 * covers['nucleus']  # it spreads along white matter
    edema += 0.9 * (side < -3) + 0.9 * _soft(fields['cerebellum'], 3)
    inAll = _nearest(edema, solid & ((covers['fluid'] < 0.5) | inCore), max(32, round(voxels))) | inCore
    pieces, _ = ndimage.label(inAll, np.ones((3, 3, 3)))
    label = 2 * (inAll & np.isin(pieces, np.unique(pieces[inCore]))).astype(np.uint8)
    label[inCore] = 4 if enhances else 1
    label[_nearest(fields['necrosis'], inCore, max(4, round(voxels * coreShare * deadShare)))] = 1
    return label


def _nearest(distance, allowed, count):
    """Mask of the `count` allowed voxels with the smallest distance."""
    values = distance[allowed]
    bound = np.partition(values, min(count, values.size) - 1)[min(count, values.size) - 1]
    return allowed & (distance <= bound)


def _paintTumor(covers, fields, label, size):
    """Adds the tumor's covers: a patchy rim, a soft core, and edema that fades into the white matter."""
    patchy = fields['patchy']
    rim, dead, fade = (
        ndimage.gaussian_filter(mask.astype(np.float32), blur / size)
        for mask, blur in ((label == 4, 0.6), (label == 1, 0.8), (label > 0, 2.0))
    )
    covers['enhancing'] = rim * np.clip(0.8 + 0.2 * patchy, 0.3, 1)
    covers['necrosis'] = dead * np.clip(0.88 + 0.14 * patchy, 0.5, 1)
    covers['edema'] = np.clip(fade * (0.95 + 0.12 * patchy), 0, 1) * (1 - 0.3 * covers['cortex'])


def _intensities(rng, covers, brain, enhances):
    """Noise-free brain voxels, (modalities, voxels), each tissue covering those after it."""
    table, names = np.array(list(TISSUES.values())), list(TISSUES)
    if enhances:
        table[names.index('necrosis'), MODALITIES.index('flair')] *= rng.uniform(0.7, 1.35)  # watery to thick
    else:
        table[names.index('necrosis')] = SOLID
    table *= rng.normal(1, 0.04, table.shape)  # no two patients' tissues are alike
    table[[names.index(name) for name in ('enhancing', 'necrosis', 'edema')]] *= rng.normal(1, 0.07, (3, 4))
    left = np.ones(np.count_nonzero(brain), np.float32)
    weights = np.empty((len(names), left.size), np.float32)
    for row, name in zip(weights, names, strict=True):
        row[:] = left * covers[name][brain]
        left -= row
    return table.T.astype(np.float32) @ weights


def _scan(rng, values, brain, atlas, matrices, size):
    """What a scanner of its own blur, gain, bias and noise makes of the voxels (int16, 0 outside the brain)."""
    image = np.zeros(brain.shape, np.float32)
    image[brain] = values
    sharpness = np.array([0.55, 0.55, rng.uniform(0.5, 1.1)]) / size  # mm; slices are thicker than pixels
    edge = ndimage.gaussian_filter(brain.astype(np.float32), sharpness)[brain]
    signal = ndimage.gaussian_filter(image, sharpness)[brain] / edge  # the background does not darken the rim
    signal *= np.exp(rng.uniform(0.06, 0.12) * _spread(_noise(rng, atlas, 55), matrices)[brain])
    sigma = np.float32(np.median(values) / rng.uniform(15, 25))
    noise = rng.standard_normal((2, signal.size), dtype=np.float32) * sigma
    signal = np.hypot(signal + noise[0], noise[1]) * rng.uniform(250, 1400)
    image = np.zeros(brain.shape, np.int16)
    image[brain] = np.clip(np.rint(signal), 1, np.iinfo(np.int16).max)
    return image


def _writeVolume(volume, file):
    """Writes a NIfTI with BraTS's affine (LPS array, 1 mm), whole or not at all, the same bytes every time."""
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    affine[1, 3] = volume.shape[1] - 1
    image = nib.Nifti1Image(volume, affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    with writeWhole(file) as part:
        part.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


def _writeMapping(ids, lowGrade, file):
    """Writes the table of grades and names; these patients have no earlier names."""
    table = {'Grade': ['LGG' if low else 'HGG' for low in lowGrade]}
    table |= {f'{earlier}_subject_ID': 'NA' for earlier in ('BraTS_2017', 'BraTS_2018', 'TCGA_TCIA', 'BraTS_2019')}
    with writeWhole(file) as part:
        pd.DataFrame(table | {'BraTS_2020_subject_ID': ids}).to_csv(part, index=False)
