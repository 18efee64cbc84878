"""Make synthetic glioma patients in the layout of BraTS 2020, for running the package without BraTS."""

import gzip
from itertools import pairwise
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from scipy import ndimage
from tqdm.auto import tqdm

from atomic import writeAtomically

# The head is modeled in mm around the middle of the box, at every shape. Axes: patient left, front, top.
BOX = (240, 240, 155)
HALF = (80, 98, 77)  # mm from the middle of the box that the head may reach
STEP = 2  # mm between the grid points where anatomy is computed; voxels are interpolated
SMALLEST = 16  # voxels along an axis; in fewer, an enhancing rim does not fit around the core

MARK = b'phantom'  # in the header of each file
MODALITIES = ('t1', 't1ce', 't2', 'flair')
# Intensity in each modality, relative to white matter in T1. Where tissues overlap, the first in this list is seen.
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
SOLID = (0.66, 0.68, 1.22, 1.22)  # core of a glioma that does not enhance: solid tumor, not fluid

# Center and half axes in mm. Only the left half is listed; |x| mirrors it. Nuclei: thalamus, caudate, putamen.
CEREBRUM = ((0, 0, 8), (67, 87, 60))
TEMPORAL = ((42, 0, -19), (23, 47, 23))
CEREBELLUM = ((0, -51, -34), (52, 33, 29))
PONS = ((0, -9, -33), (18, 15, 14))
NUCLEI = (((11, -13, 5), (9, 15, 9)), ((13, 19, 9), (5, 11, 9)), ((26, 3, 2), (7, 18, 11)))
MIDLINE_VENTRICLES = (((0, -4, -2), (2.4, 14, 9)), ((0, -34, -34), (8, 5, 9)))  # third, fourth
BASAL = ((0, -6, 0), (35, 42, 26))  # nuclei, capsules, callosum: sulci end before it
STEM = (((0, -14, -8), 15), ((0, -14, -30), 12.5), ((0, -27, -76), 8))
# Path of a lateral ventricle with its radius: frontal horn, body, trigone, occipital horn and back, temporal horn.
# fmt: off
VENTRICLE = (((15, 36, 4), 5.0), ((8, 13, 11), 6.5), ((11, -10, 19), 6.2), ((19, -28, 16), 7.0), ((25, -39, 6), 8.0),
             ((22, -64, 3), 3.0), ((25, -39, 6), 6.0), ((31, -12, -17), 3.0))
# fmt: on
PLEXUS = (((12, -13, 14), 1.5), ((26, -37, 5), 3.4), ((29, -22, -10), 1.0))
# Sites of gliomas: frontal, temporal, parietal, occipital, insular, deep; and how often each is drawn.
PLACES = ((27, 42, 20), (42, -2, -18), (29, -34, 34), (24, -60, 10), (36, 8, 4), (20, -14, 14))
PLACE_FRACTIONS = (0.33, 0.22, 0.19, 0.09, 0.11, 0.06)


def makeCases(folder, n, seed=0, shape=BOX):
    """Write n synthetic patients and `name_mapping.csv` in the layout of BraTS 2020, and return their ids.

    Patients 4, 9, 14, ... are low-grade (LGG), without enhancing tumor; the others are high-grade (HGG), with labels 1,
    2 and 4. The contrasts are plausible but not physical: phantoms test code, they do not evaluate a method.

    Args:
        folder: folder to write to, made if missing. Phantoms of the same ids are replaced.
        n: number of patients, at least 1. A patient of full size takes some seconds and 10 MB.
        seed: whole number, at least 0. Patient i of a seed does not depend on n.
        shape: voxels to the left, back and top, at least 16 each. Fewer show the same head in less detail; the header
            says 1 mm at every shape.

    Returns:
        list of the n patient ids, `BraTS20_Training_001` and following.

    Raises:
        ValueError: a number is too small, or the folder has other patients, or more phantoms of an earlier call.
    """
    if n < 1 or seed < 0:
        raise ValueError(f'n is {n}, seed {seed}; at least 1 patient and a seed of at least 0 were expected.')
    if len(shape) != 3 or any(int(length) != length or length < SMALLEST for length in shape):
        raise ValueError(f'shape is {tuple(shape)}; three whole numbers of at least {SMALLEST} were expected.')
    folder, shape = Path(folder), tuple(int(length) for length in shape)
    ids = [f'BraTS20_Training_{i:03d}' for i in range(1, n + 1)]
    files = [*folder.glob('*/*.nii'), *folder.glob('*/*.nii.gz')]
    others = [file for file in files if file.parent.name not in ids or nib.load(file).header['descrip'] != MARK]
    if others:
        raise ValueError(f'{folder} has files of other patients, such as {others[0].name}: choose another folder.')
    grades = ['LGG' if i % 5 == 4 else 'HGG' for i in range(1, n + 1)]
    for i, patient in enumerate(tqdm(ids, desc='phantoms', leave=False, disable=n == 1)):
        for suffix, volume in _makePatient(np.random.default_rng([seed, i + 1]), shape, grades[i] == 'HGG').items():
            _writeVolume(volume, folder / patient / f'{patient}_{suffix}.nii.gz')
    earlier = ('BraTS_2017', 'BraTS_2018', 'TCGA_TCIA', 'BraTS_2019')  # the names in these editions are missing
    table = {'Grade': grades, **{f'{edition}_subject_ID': 'NA' for edition in earlier}, 'BraTS_2020_subject_ID': ids}
    with writeAtomically(folder / 'name_mapping.csv') as temporary:
        pd.DataFrame(table).to_csv(temporary, index=False)
    return ids


def _makePatient(rng, shape, enhances):
    """Return the four images (int16) and the label (uint8) of one patient as a dict of file suffix to volume."""
    atlas = [np.arange(-half, half + 1, STEP, dtype=np.float32) for half in HALF]
    box, voxels = _findVoxelCenters(shape)
    voxelSize = np.array(BOX) / shape  # mm
    matrices = [np.maximum(0, 1 - np.abs(v[:, None] - a) / STEP) for v, a in zip(voxels, atlas, strict=True)]
    foci = _drawFoci(rng)
    head = _drawHeadCoordinates(rng, atlas)
    fields = _drawOuterAnatomy(rng, atlas, head)
    fields |= _drawInnerAnatomy(rng, atlas, _displaceTissue(head, foci))
    fields |= _drawTumorFields(rng, atlas, head, foci)
    fields = {name: _interpolate(field, matrices) for name, field in fields.items()}
    fractions, brain = _computeFractions(fields, voxelSize)
    label = _growTumor(rng, fields, fractions, brain, foci, enhances, voxelSize)
    _paintTumor(fractions, fields, label, voxelSize)
    volumes = {suffix: np.zeros(shape, np.int16) for suffix in MODALITIES} | {'seg': np.zeros(shape, np.uint8)}
    for suffix, values in zip(MODALITIES, _mixIntensities(rng, fractions, brain, enhances), strict=True):
        volumes[suffix][box] = _simulateScan(rng, values, brain, atlas, matrices, voxelSize)
    volumes['seg'][box] = label
    return volumes


def _findVoxelCenters(shape):
    """Return per axis the slice of voxels that can hold the head, and the position of their centers in mm."""
    box, centers = [], []
    for axis, (count, extent, half) in enumerate(zip(shape, BOX, HALF, strict=True)):
        mm = (np.arange(count, dtype=np.float32) + 0.5) * extent / count - extent / 2
        inside = np.flatnonzero(np.abs(mm) < half)
        box.append(slice(inside[0], inside[-1] + 1))
        centers.append(mm[inside] * (-1 if axis == 1 else 1))  # the array runs to the back, y runs to the front
    return tuple(box), centers


def _interpolate(field, matrices):
    """Return a field interpolated by one matrix per axis; many times faster than `ndimage.zoom`."""
    a, b, c = (matrix.astype(np.float32) for matrix in matrices)
    field = b @ (field.astype(np.float32).reshape(-1, c.shape[1]) @ c.T).reshape(*field.shape[:2], -1)
    return (a @ field.reshape(field.shape[0], -1)).reshape(-1, *field.shape[1:])


def _drawNoise(rng, axes, spacing, band=False):
    """Draw smooth noise with standard deviation 1 from random cubic B-splines; `band` makes its waves equally wide."""
    matrices = []
    for axis in axes:
        u = np.abs(axis[:, None] - np.arange(-HALF[1] - 2 * spacing, HALF[1] + 2 * spacing, spacing)) / spacing
        u = u[:, (u < 2).any(axis=0)]
        matrices.append(np.where(u < 1, 2 / 3 - u**2 + u**3 / 2, np.maximum(2 - u, 0) ** 3 / 6))
    knots = rng.standard_normal([matrix.shape[1] for matrix in matrices], dtype=np.float32)
    field = _interpolate(knots - ndimage.gaussian_filter(knots, 1.1) if band else knots, matrices)
    return field / field.std()


def _softEdge(depth, width):
    """Return the fraction of a voxel inside a surface, 0 to 1, for a depth in mm and an edge of `width` mm."""
    return np.clip(depth / width + 0.5, 0, 1)


def _ellipsoidDepth(at, center, radii, power=2):
    """Return the depth in mm below the surface of an ellipsoid along the ray from its center, negative outside."""
    offsets = [a - c for a, c in zip(at, center, strict=True)]
    level = sum(np.abs(o / r) ** power for o, r in zip(offsets, radii, strict=True)) ** (1 / power)
    return (1 / np.maximum(level, 0.05) - 1) * np.sqrt(sum(o * o for o in offsets))


def _tubeDepth(at, points, scale=1):
    """Return the depth in mm below the surface of a tube through (point, radius) pairs, with scaled radii."""
    depth = np.float32(-np.inf)
    for (start, radius), (end, endRadius) in pairwise(points):
        direction = np.subtract(end, start).astype(np.float32)
        offsets = [a - s for a, s in zip(at, start, strict=True)]
        t = np.clip(sum(o * w for o, w in zip(offsets, direction, strict=True)) / (direction @ direction), 0, 1)
        distance = np.sqrt(sum((o - t * w) ** 2 for o, w in zip(offsets, direction, strict=True)))
        depth = np.maximum(depth, scale * (radius + (endRadius - radius) * t) - distance)
    return depth


def _smoothMaximum(a, b, k):
    """Return the larger of two depths, with the crease between them filled over k mm."""
    h = np.maximum(k - np.abs(a - b), 0) / k
    return np.maximum(a, b) + h * h * k / 4


def _drawFoci(rng):
    """Draw one to three foci, the largest first: center (3,) and radius in mm; radii set only the relative size."""
    place = PLACES[rng.choice(len(PLACES), p=PLACE_FRACTIONS)]
    center = np.array(place) + rng.normal(0, (4, 7, 5))
    center[0] = max(center[0], 15) * rng.choice((-1, 1))
    foci = [(center, 22.0)]
    for _ in range(rng.choice(3, p=(0.7, 0.2, 0.1))):
        away = rng.normal(0, 1, 3) * (0.5, 1, 0.6)
        other = center + away / np.linalg.norm(away) * rng.uniform(28, 44)
        other[0] = np.sign(center[0]) * np.clip(abs(other[0]), 16, 46)
        other = np.clip(other, (-46, -62, -22), (46, 52, 44))
        foci.append((other, rng.uniform(9, 14)))
    return foci


def _drawHeadCoordinates(rng, atlas):
    """Draw pose, size and asymmetry; return where each grid point lies in the standard head: x, y, z in mm."""
    a, b, c = rng.normal(0, (0.05, 0.035, 0.05))  # nod, tilt, turn in radians
    turn = np.array([[1, -c, b], [c, 1, -a], [-b, a, 1]]) / rng.normal(0.97, 0.035, 3)[:, None]
    shift = rng.normal(0, 2, 3).astype(np.float32)
    grid = np.meshgrid(*(axis - s for axis, s in zip(atlas, shift, strict=True)), indexing='ij')
    return [
        sum(np.float32(w) * g for w, g in zip(row, grid, strict=True)) + np.float32(2.2) * _drawNoise(rng, atlas, 38)
        for row in turn
    ]


def _displaceTissue(head, foci):
    """Return the positions from which the tumor has displaced the tissue: ventricles narrow and the midline bends."""
    x, y, z = head
    for center, radius in foci:
        offsets = [a - np.float32(c) for a, c in zip((x, y, z), center, strict=True)]
        pull = 0.32 * np.exp(-sum(o * o for o in offsets) / np.float32(1.5 * radius) ** 2)
        x, y, z = (a - pull * o for a, o in zip((x, y, z), offsets, strict=True))
    return x, y, z


def _drawOuterAnatomy(rng, atlas, head):
    """Draw the depths below hull and pia, and the sheets of fluid, each as a signed distance and a width in mm."""
    x, y, z = head
    half = (np.abs(x), y, z)
    egg = (half[0] / (1 - 0.0011 * (y + 10)), y, z)  # the forehead is narrower
    base = z + 17 + 0.06 * y + 1.5 * _drawNoise(rng, atlas, 18)
    cerebrum = -_smoothMaximum(-_ellipsoidDepth(egg, *CEREBRUM, power=2.3), -base, 8)
    temporal, cerebellum = _ellipsoidDepth(half, *TEMPORAL), _ellipsoidDepth(half, *CEREBELLUM, power=2.2)
    stem = _smoothMaximum(_tubeDepth(head, STEM), _ellipsoidDepth(head, *PONS), 4)
    hull = _smoothMaximum(_smoothMaximum(cerebrum, temporal, 16), _smoothMaximum(cerebellum, stem, 14), 24)
    hemisphere = np.maximum(cerebrum, temporal)
    pia = np.maximum(np.maximum(hemisphere, cerebellum), stem) - 1 - 0.9 * _drawNoise(rng, atlas, 14)
    fold, foldWidth = _drawFolds(rng, atlas, head, hull)
    inCerebellum = (cerebellum > hemisphere) | (z < -45)
    leaf = 5.6 / 6.28 * np.sin(6.28 / 5.6 * (z + 0.35 * (y + 52) + 1.5 * _drawNoise(rng, atlas, 12)))
    # branches of the white matter in the cerebellum
    reach = 12 + 6 * np.sin(9 * np.arctan2(z + 32, y + 36) + 1.2 * _drawNoise(rng, atlas, 16))
    callosum = np.maximum(0, ((y + 3) / 42) ** 2 + (np.where(z > 0, z / 29, z / 16)) ** 2 - 1)
    return {
        'hull': hull,
        'pia': pia,
        'stem': stem - np.maximum(0, cerebellum),
        'cerebellum': cerebellum - hemisphere,
        'side': x,
        'fold': np.where(inCerebellum, leaf, fold),
        'foldWidth': np.where(inCerebellum, 0.9 * _softEdge(reach - cerebellum, 3), foldWidth) * (stem < 0),
        'midline': x + 0.8 * _drawNoise(rng, atlas, 20),
        'midlineWidth': 1.7 * np.minimum(1, 8 * callosum) * (cerebrum > np.maximum(cerebellum, stem)),
        'sylvian': (cerebrum - temporal) / 1.5,
        'sylvianWidth': 3.2 * _softEdge(half[0] - 31, 6) * _softEdge(47 - np.abs(y), 8),
        'tentorium': (hemisphere - cerebellum) / 1.6,
        'tentoriumWidth': 2.2 * (stem < 0),
        'tubes': 7 * np.sqrt(_drawNoise(rng, atlas, 9) ** 2 + _drawNoise(rng, atlas, 9) ** 2),
        'sinus': np.hypot(x, hull - 3) + 20 * (z < 15) + 20 * (y > 45),
        'dural': _drawNoise(rng, atlas, 11),
    }


def _drawFolds(rng, atlas, head, hull):
    """Draw the sulci of the cerebrum: signed distance and width in mm, which is 0 below the depth that they reach."""
    pattern = _drawNoise(rng, atlas, rng.uniform(5.6, 6.8), band=True)
    x, y, z = head
    level = np.sqrt((x / 67) ** 2 + (y / 87) ** 2 + ((z - 6) / 62) ** 2)
    pull = 0.4 + 0.6 / np.maximum(level, 0.4)  # nearly constant along a ray: sulci are perpendicular to the surface
    places = [(p * pull + h) / STEP + _drawNoise(rng, atlas, 10) for p, h in zip(head, HALF, strict=True)]
    fold = ndimage.map_coordinates(pattern, places, order=1, mode='mirror')
    slope = np.sqrt(sum(g * g for g in np.gradient(fold, STEP)))
    depth = np.maximum(hull, 0)
    gate = _softEdge(22 + 7 * _drawNoise(rng, atlas, 13) - depth, 4) * _softEdge(-_ellipsoidDepth(head, *BASAL), 6)
    return fold / np.maximum(slope, 0.10), (1.3 + rng.uniform(0.3, 1.6) * np.exp(-depth / 5)) * gate


def _drawInnerAnatomy(rng, atlas, head):
    """Draw the depths in mm below the surfaces of ventricles, choroid plexus, nuclei and white matter spots."""
    half = (np.abs(head[0]), head[1], head[2])
    scale = rng.uniform(0.75, 1.5)
    lateral = np.minimum(_tubeDepth(half, VENTRICLE, scale), half[0] - 1.2) + 0.7 * _drawNoise(rng, atlas, 8)
    middle = [_ellipsoidDepth(head, center, np.multiply(radii, (scale, 1, 1))) for center, radii in MIDLINE_VENTRICLES]
    nuclei = np.max([_ellipsoidDepth(half, center, radii) for center, radii in NUCLEI], axis=0)
    caps = 5 * np.exp(-(((head[1] - 34) / 14) ** 2)) + 5 * np.exp(-(((head[1] + 50) / 16) ** 2))
    return {
        'ventricle': np.maximum(lateral, np.max(middle, axis=0)),
        'choroid': _tubeDepth(half, PLEXUS) + 0.9 * _drawNoise(rng, atlas, 5),
        'nucleus': nuclei + 0.8 * _drawNoise(rng, atlas, 8),
        'cap': lateral + caps * rng.uniform(0.3, 1.1) + 1.6 * _drawNoise(rng, atlas, 10) - 1.5,
        'spot': 4 * (_drawNoise(rng, atlas, 5) - rng.uniform(1.9, 2.6)),
    }


def _drawTumorFields(rng, atlas, head, foci):
    """Draw irregular distances from the foci, in units of their radius, for edema, core and necrosis."""
    ragged, coarse, fine = _drawNoise(rng, atlas, 14), _drawNoise(rng, atlas, 8), _drawNoise(rng, atlas, 5)
    distances = []
    for center, radius in foci:
        stretch = rng.normal(1, 0.16, 3)
        offsets = [(p - np.float32(c)) * np.float32(s) for p, c, s in zip(head, center, stretch, strict=True)]
        distances.append(np.sqrt(sum(o * o for o in offsets)) / np.float32(radius))
    distance = np.min(distances, axis=0)
    return {
        'edema': distance * np.exp(0.22 * ragged + 0.12 * coarse) + 0.05 * fine,
        'core': distance * np.exp(0.16 * coarse + 0.07 * fine) + 0.02 * fine,
        'necrosis': distance * np.exp(0.16 * coarse + 0.12 * _drawNoise(rng, atlas, 7)),  # a rim remains around it
        'patchy': _drawNoise(rng, atlas, 6),
    }


def _computeFractions(fields, voxelSize):
    """Return the fraction of each voxel, 0 to 1, that each healthy tissue may fill, and the brain mask."""
    blur = float(voxelSize.mean())  # mm over which an edge extends

    def sheet(name):
        width = fields[name + 'Width']
        return np.clip((width / 2 - np.abs(fields[name])) / blur + 0.5, 0, np.minimum(1, width / blur))

    hull, pia = fields['hull'], fields['pia']
    notch = 1.8 * np.exp(-((fields['fold'] / 2.2) ** 2)) * (fields['foldWidth'] > 0.5) * (pia > -2)
    brain = (hull > notch) & (pia > -7)
    midline = sheet('midline')
    fluid = np.max([_softEdge(-pia, blur), sheet('fold'), midline, sheet('sylvian'), sheet('tentorium')], axis=0)
    ribbon = ndimage.gaussian_filter(fluid, 2.0 / voxelSize)  # as deep below a thin sulcus as below the open surface
    stem = _softEdge(fields['stem'], 2 * blur)
    patchy = np.clip(0.75 + 0.35 * fields['patchy'], 0, 1)
    vessel = np.maximum(_softEdge(1.3 - fields['tubes'], blur) * (hull < 16), _softEdge(2.6 - fields['sinus'], blur))
    dura = np.maximum(_softEdge(2.2 - hull, blur) * (fields['dural'] > 1), 0.8 * midline * (hull < 14)) * patchy
    ventricle = _softEdge(fields['ventricle'], blur)
    return {
        'vessel': np.maximum(vessel * (1 - stem), dura),
        'choroid': _softEdge(fields['choroid'], blur) * ventricle * patchy,
        'ventricle': ventricle,
        'fluid': fluid,
        'spot': 0.85 * np.maximum(_softEdge(fields['spot'], 3), _softEdge(fields['cap'], 3)) * (ribbon < 0.05),
        'nucleus': _softEdge(fields['nucleus'], 2 * blur),
        'cortex': _softEdge((ribbon - 0.085) * 25, blur) * (1 - stem),
        'stem': stem,
        'white': np.ones_like(hull),
    }, brain


def _growTumor(rng, fields, fractions, brain, foci, enhances, voxelSize):
    """Draw volumes and return the label (uint8: 0, 1, 2, 4), grown from the foci until the volumes are reached."""
    whole = np.clip(rng.lognormal(np.log(75), 0.55), 20, 190)  # ml
    coreFraction = rng.uniform(0.16, 0.5) if enhances else rng.uniform(0.3, 0.65)
    necroticFraction = rng.uniform(0.15, 0.6) if enhances else 1
    voxels = whole * 1000 / voxelSize.prod()
    solid = brain & (fractions['ventricle'] < 0.5) & (fields['hull'] > 3)
    side = fields['side'] * np.sign(foci[0][0][0])  # mm from the midline, positive on the tumor's side
    inCore = _selectNearest(fields['core'], solid & (side > 1), max(12, round(voxels * coreFraction)))
    edema = fields['edema'] + 0.35 * fractions['cortex'] + 0.4 * fractions['nucleus']  # edema follows white matter
    edema += 0.9 * (side < -3) + 0.9 * _softEdge(fields['cerebellum'], 3)
    inAll = _selectNearest(edema, solid & ((fractions['fluid'] < 0.5) | inCore), max(32, round(voxels))) | inCore
    pieces, _ = ndimage.label(inAll, np.ones((3, 3, 3)))
    label = 2 * (inAll & np.isin(pieces, np.unique(pieces[inCore]))).astype(np.uint8)
    label[inCore] = 4 if enhances else 1
    label[_selectNearest(fields['necrosis'], inCore, max(4, round(voxels * coreFraction * necroticFraction)))] = 1
    return label


def _selectNearest(distance, allowed, count):
    """Return the mask of the `count` allowed voxels with the smallest distance."""
    values = distance[allowed]
    bound = np.partition(values, min(count, values.size) - 1)[min(count, values.size) - 1]
    return allowed & (distance <= bound)


def _paintTumor(fractions, fields, label, voxelSize):
    """Add the tumor's fractions in place: a patchy rim, a soft core, and edema that fades into white matter."""
    patchy = fields['patchy']
    rim, dead, fade = (
        ndimage.gaussian_filter(mask.astype(np.float32), blur / voxelSize)
        for mask, blur in ((label == 4, 0.6), (label == 1, 0.8), (label > 0, 2.0))
    )
    fractions['enhancing'] = rim * np.clip(0.8 + 0.2 * patchy, 0.3, 1)
    fractions['necrosis'] = dead * np.clip(0.88 + 0.14 * patchy, 0.5, 1)
    fractions['edema'] = np.clip(fade * (0.95 + 0.12 * patchy), 0, 1) * (1 - 0.3 * fractions['cortex'])


def _mixIntensities(rng, fractions, brain, enhances):
    """Draw tissue intensities and return the noise-free brain voxels, float32 (modalities, voxels)."""
    table, names = np.array(list(TISSUES.values())), list(TISSUES)
    if enhances:
        table[names.index('necrosis'), MODALITIES.index('flair')] *= rng.uniform(0.7, 1.35)  # from watery to viscous
    else:
        table[names.index('necrosis')] = SOLID
    table *= rng.normal(1, 0.04, table.shape)  # varies between patients
    table[[names.index(name) for name in ('enhancing', 'necrosis', 'edema')]] *= rng.normal(1, 0.07, (3, 4))
    remaining = np.ones(np.count_nonzero(brain), np.float32)
    weights = np.empty((len(names), remaining.size), np.float32)
    for row, name in zip(weights, names, strict=True):
        row[:] = remaining * fractions[name][brain]
        remaining -= row
    return table.T.astype(np.float32) @ weights


def _simulateScan(rng, values, brain, atlas, matrices, voxelSize):
    """Return an image (int16, 0 outside the brain) with the blur, gain, bias field and noise of a scanner."""
    image = np.zeros(brain.shape, np.float32)
    image[brain] = values
    sharpness = np.array([0.55, 0.55, rng.uniform(0.5, 1.1)]) / voxelSize  # mm; slices are thicker than pixels
    edge = ndimage.gaussian_filter(brain.astype(np.float32), sharpness)[brain]
    signal = ndimage.gaussian_filter(image, sharpness)[brain] / edge  # the background must not darken the border
    signal *= np.exp(rng.uniform(0.06, 0.12) * _interpolate(_drawNoise(rng, atlas, 55), matrices)[brain])
    sigma = np.float32(np.median(values) / rng.uniform(15, 25))
    noise = rng.standard_normal((2, signal.size), dtype=np.float32) * sigma
    signal = np.hypot(signal + noise[0], noise[1]) * rng.uniform(250, 1400)
    image = np.zeros(brain.shape, np.int16)
    image[brain] = np.clip(np.rint(signal), 1, np.iinfo(np.int16).max)
    return image


def _writeVolume(volume, file):
    """Write a NIfTI with BraTS's affine (axes left, back, top; 1 mm); equal volumes give equal bytes."""
    affine = np.array([[-1.0, 0, 0, 0], [0, -1, 0, volume.shape[1] - 1], [0, 0, 1, 0], [0, 0, 0, 1]])
    image = nib.Nifti1Image(volume, affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header['descrip'] = MARK
    with writeAtomically(file) as temporary:
        temporary.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))
