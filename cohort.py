"""Check, describe and divide the patients of a file list."""

import json
import warnings
from itertools import combinations
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd

import config
from atomic import writeAtomically
from editions import CAVITY, classesOf, isAutomatic, known
from parallel import forEachPatient, resultsOf, withSegmentation
from patients import (
    COLUMNS,
    checkGrid,
    detectEdition,
    hasFile,
    maskFunction,
    readLabel,
    readVolume,
    spacingOf,
    toClasses,
)
from subjects import findSubjects, readGrades, readSites

__all__ = [
    'checkFiles',
    'describeCohort',
    'findSubjects',
    'readGrades',
    'readSites',
    'readSplit',
    'split',
    'splitFolds',
    'usable',
    'writeSplit',
]

SETS = ('train', 'val', 'test')
_FEW_VALUES = 6  # an image with fewer different intensities is a segmentation, or empty
_COPY = 0.9999  # correlation of two modalities from which one is taken for a copy of the other
_LARGEST = 32767  # of 16 bits
_OUTSIDE = 0.05  # fraction of the tumor outside the brain from which a segmentation is taken for another patient's
_OVERLAPPING = ('BraTS2024', 'BraTS-GoAT', 'Decathlon', 'UCSF-PDGM', 'UPENN-GBM')  # hold patients of other editions


def checkFiles(df):
    """Return what is wrong with the files of a file list, one row per finding.

    All of `config.MODALITIES` and the segmentations are read.

    Args:
        df: file list.

    Returns:
        DataFrame with the columns `patient`, `file` (its name, or the column's if there is no file), `finding` and
        `stops`; empty if all is well. With a finding that stops, the patient cannot be read, see `usable`:
        - a missing modality; a file that cannot be read, is not 3-D, not finite, or beyond 1e6;
        - another shape or grid than the first modality's;
        - labels unknown to the edition.
        With the others it is used:
        - another axis order than the first modality's, which is corrected when the file is read;
        - an image that is constant, looks like a segmentation, or like a copy of another modality, or is clipped;
        - a segmentation without tumor, with tumor outside the brain, or with resection cavity that is background;
        - a segmentation that is automatic, where the edition has others that were corrected by hand;
        - a patient published as having another neoplasm than a glioma.
    """
    findings = list(forEachPatient(_checkPatient, df, 'check'))
    rows = [(patient, *finding) for patient, found in zip(df.index, findings, strict=True) for finding in found]
    return pd.DataFrame(rows, columns=['patient', 'file', 'finding', 'stops']).astype({'stops': bool})


def usable(df, findings):
    """Return the patients of a file list that can be read, and print which cannot.

    Args:
        df: file list.
        findings: table of `checkFiles`.

    Raises:
        ValueError: none is left.
    """
    bad = findings[findings['stops']]
    for patient, found in bad.groupby('patient'):
        print(f'{patient} is left out: {found["file"].iloc[0]}: {found["finding"].iloc[0]}')
    if df.index.isin(bad['patient']).all():
        raise ValueError(f'None of the {len(df)} patients can be used; the findings say why.')
    return df[~df.index.isin(bad['patient'])]


def _checkPatient(paths):
    """Return the (file, finding, stops) triples of one patient."""
    findings, volumes, grids, opened = [], {}, {}, {}
    try:
        edition = known()[detectEdition(paths)]
    except ValueError as error:
        return [(next((Path(paths[name]).name for name in COLUMNS if hasFile(paths, name)), '-'), str(error), True)]
    for column in (*config.MODALITIES, 'seg'):
        if not hasFile(paths, column):
            findings += [(column, 'this modality is missing', True)] * (column != 'seg')
            continue
        channel = (edition.channels or {}).get(column)
        try:
            volumes[column], grids[column] = readVolume(paths[column], paths.name, channel, opened)
        except (ValueError, FileNotFoundError) as error:
            findings.append((Path(paths[column]).name, _withoutPrefix(error, paths, column), True))
    seg = volumes.pop('seg', None)
    for column, volume in volumes.items():
        findings += [(Path(paths[column]).name, finding, False) for finding in _checkImage(volume)]
    findings += _checkCopies(volumes, paths)
    findings += _checkGrids(volumes if seg is None else {**volumes, 'seg': seg}, grids, paths)
    if seg is not None:
        findings += [(Path(paths['seg']).name, *finding) for finding in _checkLabel(seg, volumes, paths)]
    file = Path(next(paths[column] for column in COLUMNS if hasFile(paths, column)))
    if '51_OtherNeoplasms' in file.parts:
        findings.append((file.name, 'published under 51_OtherNeoplasms: not a glioma', False))
    return findings


def _withoutPrefix(error, paths, column):
    return str(error).removeprefix(f'{paths.name}: ').removeprefix(str(paths[column])).strip()


def _checkImage(volume):
    """Yield the findings of an image by itself."""
    if volume.min() == volume.max():
        yield f'every voxel is {volume.flat[0]}: this modality is empty'
    elif len(np.unique(volume[:, :, ::8])) < _FEW_VALUES and len(np.unique(volume)) < _FEW_VALUES:
        yield f'it has {len(np.unique(volume))} different values, like a segmentation; an image was expected'
    numClipped = np.count_nonzero(volume == _LARGEST)
    if numClipped > 1 and volume.max() == _LARGEST:
        yield f'{numClipped} voxels are {_LARGEST}, the largest number of 16 bits: they were clipped'


def _checkCopies(volumes, paths):
    """Yield (file, finding, stops) for each two modalities that look the same."""
    for (first, image), (second, other) in combinations(volumes.items(), 2):
        if image.shape == other.shape:
            isBrain = maskFunction(image) & maskFunction(other)
            values, others = image[isBrain][::7].astype(float), other[isBrain][::7].astype(float)
            if values.size > 1 and values.std() and others.std() and np.corrcoef(values, others)[0, 1] > _COPY:
                yield Path(paths[second]).name, f'{second} looks like a copy of {first}', False


def _checkGrids(volumes, grids, paths):
    """Yield (file, finding, stops) for each volume with another grid or axis order than the first modality."""
    first = next(iter(volumes), None)
    for column in list(volumes)[1:]:
        file = Path(paths[column]).name
        try:
            checkGrid(paths, column, volumes[column].shape, grids[column], first, volumes[first].shape, grids[first])
        except ValueError as error:
            yield file, _withoutPrefix(error, paths, column), True
            continue
        # such as 'LPS': the axes point to the left, the back (posterior) and the top
        order, expected = (''.join(nib.aff2axcodes(nib.load(paths[name]).affine)) for name in (column, first))
        if order != expected:
            yield file, f'stored in {order} order, {first} in {expected}: corrected when it is read', False


def _checkLabel(seg, volumes, paths):
    """Yield the (finding, stops) pairs of a segmentation."""
    try:
        classes = toClasses(seg, paths)
    except ValueError as error:
        yield _withoutPrefix(error, paths, 'seg'), True
        return
    if isAutomatic(paths['seg']):
        yield 'segmented automatically, and not corrected by hand', False
    for label, number in classesOf(detectEdition(paths)).items():
        numVoxels = np.count_nonzero(np.rint(seg) == label) if label and number == 0 else 0
        if numVoxels:
            yield f'{numVoxels} voxels of resection cavity (label {label}) count as background', False
    classes = np.where(classes == CAVITY, 0, classes)  # it may lie outside the brain, where all is 0
    if not classes.any():
        yield 'no voxel of tumor', False
        return
    brains = [maskFunction(volume) for volume in volumes.values() if volume.shape == classes.shape]
    if brains:
        numOutside = np.count_nonzero(classes[~np.any(brains, axis=0)])
        fraction = numOutside / np.count_nonzero(classes)
        if fraction > _OUTSIDE:
            yield f"{fraction:.0%} of the tumor lies outside the brain: is it another patient's segmentation?", False
        elif numOutside:
            yield f'{numOutside} voxels of tumor lie where all modalities are 0', False


def split(df):
    """Split a file list into training, validation and test set, no subject in two of them.

    The fractions are `config.VAL_FRACTION` and `config.TEST_FRACTION`; the order is drawn from `config.SEED`. Each set
    has about the same mix of grades where grades are known. Patients without a segmentation are left out and counted.

    Args:
        df: file list.

    Returns:
        traindf, valdf, testdf: disjoint, together every patient with a segmentation; none is empty if there are three
        subjects or more.

    Raises:
        ValueError: the fractions leave no subject for training, or no patient has a segmentation.
    """
    df = withSegmentation(df, 'training and scoring').sort_index()
    subjects, order = _drawOrder(df)
    numTest = max(1, round(config.TEST_FRACTION * len(order))) if len(order) > 2 else 0
    numVal = max(1, round(config.VAL_FRACTION * len(order))) if len(order) > 1 else 0
    if numTest + numVal >= len(order) > 1:
        raise ValueError(
            f'VAL_FRACTION and TEST_FRACTION take {numVal} + {numTest} of {len(order)} subjects: none is left to train.'
        )
    test, val, train = (df[subjects.isin(part)] for part in np.split(order, [numTest, numTest + numVal]))
    print(f'{len(train)} patients to train, {len(val)} to validate, {len(test)} to test.')
    if len(order) < 3:
        print(f'{len(df)} patients are {len(order)} subjects; three are needed for a set to validate and one to test.')
    return train, val, test


def splitFolds(df, k):
    """Split a file list into k folds for cross-validation.

    Args:
        df: file list; patients without a segmentation are left out and counted.
        k: number of folds, 2 to the number of subjects.

    Returns:
        list of k (traindf, testdf), drawn from `config.SEED`: every patient is in one testdf, no subject is in both
        sets of a fold, and each fold has about the same mix of grades.

    Raises:
        ValueError: k is out of range, or no patient has a segmentation.
    """
    df = withSegmentation(df, 'training and scoring').sort_index()
    subjects, order = _drawOrder(df)
    if not 2 <= k <= len(order):
        raise ValueError(f'k is {k}; 2 to {len(order)}, the number of subjects, was expected.')
    tested = [subjects.isin(part) for part in np.array_split(order, k)]
    return [(df[~isTested], df[isTested]) for isTested in tested]


def _drawOrder(df):
    """Return the subject of each patient and the subjects in a drawn order in which the grades are spread evenly."""
    subjects = findSubjects(df)
    _reportSuspicions(df, subjects)
    grades = readGrades(df).groupby(subjects).first()
    generator = np.random.default_rng(config.SEED)
    ranks = np.empty(len(grades))
    for grade in sorted(grades.unique()):
        members = np.flatnonzero(grades == grade)
        ranks[generator.permutation(members)] = (np.arange(len(members)) + generator.uniform()) / len(members)
    return subjects, grades.index.to_numpy()[np.argsort(ranks, kind='stable')]


def _reportSuspicions(df, subjects):
    """Print which patients are kept together because of their names, and what names cannot reveal."""
    editions = df.apply(detectEdition, axis=1)
    renamed = [sorted(group) for _, group in subjects.groupby(subjects).groups.items() if editions[group].nunique() > 1]
    if renamed:
        examples = '; '.join(' = '.join(group) for group in renamed[:3])
        print(
            f'{len(renamed)} subjects have, or may have, names of several years or time points: {examples}. Each stays '
            'in one set.'
        )
    if editions.nunique() > 1 and (mixed := sorted({*_OVERLAPPING} & set(editions))):
        print(
            f'{" and ".join(mixed)} may hold subjects of other editions under other names; the names do not say which.'
        )


def writeSplit(sets, file):
    """Write the patient ids of `sets` (traindf, valdf, testdf) to a JSON file, but not over that of another run."""
    ids = {name: [str(patient) for patient in part.index] for name, part in zip(SETS, sets, strict=True)}
    hasRun = Path(config.LAST_CHECKPOINT).exists() and Path(config.LAST_CHECKPOINT).parent == Path(file).parent
    if hasRun and Path(file).exists() and json.loads(Path(file).read_text()) != ids:
        raise ValueError(f'{file} is the split of the run in this folder: set another config.OUTPUT_FOLDER.')
    with writeAtomically(file) as part:
        part.write_text(json.dumps(ids, indent=1))


def readSplit(file, df):
    """Return the three sets of a JSON file, {'train': [ids], 'val': [ids], 'test': [ids]}, as `writeSplit` writes it.

    Subjects that are, or may be, in two of the sets are reported by a warning; none is dropped.

    Args:
        file: path of the file.
        df: file list with every patient of the file; its other patients are left out and counted.

    Returns:
        traindf, valdf, testdf.

    Raises:
        ValueError: a set is missing, a patient is in two sets, or is not in the file list.
    """
    ids = json.loads(Path(file).read_text())
    if not isinstance(ids, dict) or set(ids) != set(SETS):
        raise ValueError(f'{file} has {list(ids)}; the sets {", ".join(SETS)} were expected.')
    everyone = [patient for name in SETS for patient in ids[name]]
    twice = sorted({patient for patient in everyone if everyone.count(patient) > 1})
    absent = sorted(set(everyone) - set(df.index))
    if twice or absent:
        raise ValueError(f'{file}: in two sets: {twice[:5] or "none"}; not in the file list: {absent[:5] or "none"}.')
    if len(everyone) < len(df):
        print(f'{len(df) - len(everyone)} of {len(df)} patients are in no set of {file}.')
    sets = tuple(df.loc[ids[name]] for name in SETS)
    _warnOfSharedSubjects(sets)
    return sets


def _warnOfSharedSubjects(sets):
    """Warn of subjects that are, or may be, in two sets, under names of different years or time points."""
    together = pd.concat(sets)
    number = pd.Series(np.repeat(np.arange(len(sets)), [len(part) for part in sets]), together.index)
    subjects = findSubjects(together)
    shared = [sorted(group) for _, group in subjects.groupby(subjects).groups.items() if number[group].nunique() > 1]
    if shared:
        named = '; '.join(' = '.join(group) for group in shared)
        warnings.warn(f'Scans of one subject are, or may be, in two sets: {named}.', stacklevel=3)


def describeCohort(df):
    """Return a table of the patients: edition, grade, subject and the volume of each class.

    Args:
        df: file list.

    Returns:
        DataFrame indexed by patient: `edition`, `grade`, `subject`, and one column per tumor class, named as in
        `config.CLASS_NAMES`: its volume in ml, NaN if there is no segmentation.

    Raises:
        ValueError, FileNotFoundError: segmentations cannot be read; all of them are named at once. With
            `config.ON_BAD_PATIENT = 'leaveOut'` these patients are left out, unless no other is left.
    """
    volumes = resultsOf(_measureVolumes, df, 'describe')
    df = df.loc[list(volumes)]
    table = pd.DataFrame(list(volumes.values()), df.index, list(config.CLASS_NAMES[1:]))
    table.insert(0, 'edition', df.apply(detectEdition, axis=1))
    table.insert(1, 'grade', readGrades(df))
    table.insert(2, 'subject', findSubjects(df))
    return table


def _measureVolumes(paths):
    """Return the volume of each tumor class of one patient in ml."""
    if not hasFile(paths, 'seg'):
        return [np.nan] * (config.NO_CLASSES - 1)
    counts = np.bincount(readLabel(paths).ravel(), minlength=config.NO_CLASSES)
    return counts[1:] * np.prod(spacingOf(paths)) / 1000  # mm3 -> ml
