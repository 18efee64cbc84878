"""Find what is wrong with the files of the patients before hours are spent on them."""

from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from tqdm.auto import tqdm

import config
from patients import COLUMNS, EDITIONS, checkGrid, hasFile, readVolume, tellEdition, toClasses

_FEW_VALUES = 6  # a scan has hundreds of intensities; an image with fewer than this is a segmentation, or empty
_SAME = 0.9999  # correlation of two modalities' intensities from which one is taken for a copy of the other
_OUTSIDE = 0.05  # share of the tumor outside of the brain from which the segmentation is taken for another patient's


def checkFiles(df):
    """Gives what is wrong with the files of a file list, one row per finding; an empty table when all is well.

    All modalities of `config.MODALITIES` and the segmentations are read, several patients at a time.

    Args:
        df: file list.

    Returns:
        DataFrame with the columns `patient`, `file` (its name, or that of the column where there is no file) and
        `finding`: a modality that is missing; a file that cannot be read, is not 3-D, not finite or beyond 1e6; another
        shape, grid or axis order than the first modality's (the last is mended when it is read); an image that is
        constant, looks like a segmentation or like a copy of another; labels that the edition does not know, a
        segmentation without tumor or with tumor outside of the brain, how many voxels of resection cavity become
        background; and a patient that is published as having another neoplasm than a glioma.
    """
    with ThreadPoolExecutor() as pool:  # unpacking and counting leave the interpreter's lock
        patients = [paths for _, paths in df.iterrows()]
        findings = list(tqdm(pool.map(_checkPatient, patients), 'check', len(patients), leave=False))
    rows = [(patient, *finding) for patient, found in zip(df.index, findings, strict=True) for finding in found]
    return pd.DataFrame(rows, columns=['patient', 'file', 'finding'])


def _checkPatient(paths):
    """Gives the (file, finding) of one patient."""
    findings, volumes, grids, opened = [], {}, {}, {}
    try:
        edition = EDITIONS[tellEdition(paths)]
    except ValueError as error:
        return [(next((Path(paths[name]).name for name in COLUMNS if hasFile(paths, name)), '-'), str(error))]
    for column in (*config.MODALITIES, 'seg'):
        if not hasFile(paths, column):
            findings += [(column, 'this modality is missing')] * (column != 'seg')
            continue
        channel = (edition.channels or {}).get(column)
        try:
            volumes[column], grids[column] = readVolume(paths[column], paths.name, channel, opened)
        except (ValueError, FileNotFoundError) as error:
            findings.append((Path(paths[column]).name, _withoutPlace(error, paths, column)))
    seg = volumes.pop('seg', None)
    for column, volume in volumes.items():
        findings += [(Path(paths[column]).name, finding) for finding in _checkImage(volume)]
    findings += _checkCopies(volumes, paths)
    findings += _checkGrids(volumes if seg is None else {**volumes, 'seg': seg}, grids, paths)
    if seg is not None:
        findings += [(Path(paths['seg']).name, finding) for finding in _checkLabel(seg, volumes, paths)]
    file = Path(next(paths[column] for column in COLUMNS if hasFile(paths, column)))
    if '51_OtherNeoplasms' in file.parts:
        findings.append((file.name, 'published under 51_OtherNeoplasms: not a glioma'))
    return findings


def _withoutPlace(error, paths, column):
    """Gives the message of an error without the patient and the path that it begins with."""
    return str(error).removeprefix(f'{paths.name}: ').removeprefix(str(paths[column])).strip()


def _checkImage(volume):
    if volume.min() == volume.max():
        yield f'every voxel is {volume.flat[0]}: this modality is empty'
    elif len(np.unique(volume[:, :, ::8])) < _FEW_VALUES and len(np.unique(volume)) < _FEW_VALUES:
        yield f'it has {len(np.unique(volume))} different values, like a segmentation; an image was expected'


def _checkCopies(volumes, paths):
    """Gives a finding for each pair of modalities that look like one."""
    findings = []
    for (first, image), (second, other) in combinations(volumes.items(), 2):
        if image.shape == other.shape:
            isBrain = (image != 0) & (other != 0)
            values, others = image[isBrain][::7].astype(float), other[isBrain][::7].astype(float)
            if values.size > 1 and values.std() and others.std() and np.corrcoef(values, others)[0, 1] > _SAME:
                findings.append((Path(paths[second]).name, f'{second} looks like a copy of {first}'))
    return findings


def _checkGrids(volumes, grids, paths):
    """Gives a finding for each volume whose voxels, or whose axes, lie otherwise than the first modality's."""
    first = next(iter(volumes), None)
    findings = []
    for column in list(volumes)[1:]:
        try:
            checkGrid(paths, column, volumes[column].shape, grids[column], volumes[first].shape, grids[first])
        except ValueError as error:
            findings.append((Path(paths[column]).name, _withoutPlace(error, paths, column)))
            continue
        orders = [''.join(nib.aff2axcodes(nib.load(paths[name]).affine)) for name in (column, first)]
        if orders[0] != orders[1]:
            text = f'stored in {orders[0]} order, {first} in {orders[1]}: mended when it is read'
            findings.append((Path(paths[column]).name, text))
    return findings


def _checkLabel(seg, volumes, paths):
    """Yields the findings of a segmentation."""
    try:
        classes = toClasses(seg, paths)
    except ValueError as error:
        yield _withoutPlace(error, paths, 'seg')
        return
    edition = EDITIONS[tellEdition(paths)]
    for label in edition.classes:
        if label and edition.classes[label] == 0:
            noVoxels = int(np.count_nonzero(np.rint(seg) == label))
            if noVoxels:
                yield f'{noVoxels} voxels of resection cavity (label {label}) count as background'
    if not classes.any():
        yield 'no voxel of tumor'
        return
    fitting = [volume != 0 for volume in volumes.values() if volume.shape == classes.shape]
    if fitting:
        outside = np.count_nonzero(classes[~np.any(fitting, axis=0)]) / np.count_nonzero(classes)
        if outside > _OUTSIDE:
            yield f'{outside:.0%} of the tumor lies outside of the brain: is it the segmentation of another patient?'
