"""Check, describe and divide the patients of a file list."""

import json
import re
import warnings
from collections import Counter
from contextlib import suppress
from functools import partial
from itertools import combinations
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd

import config
from atomic import writeAtomically
from patients.editions import CAVITY, classesOf, isAutomatic, known, withoutTime
from patients.parallel import forEachPatient, resultsOf, withSegmentation
from patients.reading import (
    UNREADABLE,
    checkGrid,
    detectEdition,
    firstFile,
    hasFile,
    hasVoxelsOf,
    maskFunction,
    modelFolder,
    readLabel,
    readVolume,
    spacingOf,
    toClasses,
)
from patients.volumes import findOddities

_SETS = ('train', 'val', 'test')
_FEW_VALUES = 6  # an image with fewer different intensities is a segmentation, or empty
_COPY = 0.9999  # correlation; two modalities above it look like copies
_LARGEST = 32767  # of 16 bits
MOST_OUTSIDE = 0.05  # fraction of the tumor outside the brain; above it the segmentation may be another patient's
_OVERLAPPING = ('BraTS2024', 'BraTS-GoAT', 'Decathlon', 'UCSF-PDGM', 'UPENN-GBM')  # hold patients of other editions


def checkFiles(df):
    """Return what is wrong with the files of `config.MODALITIES` and the segmentations, all of which are read.

    Args:
        df: file list.

    Returns:
        DataFrame with a row per finding, empty if all is well: `patient`, `file` (its name, or the modality if there
        is no file), `finding` and `stops`. With a finding that stops, the patient cannot be read, see `usable`:
        - a missing modality; a file that cannot be read, is not 3-D, not finite, or beyond 1e6;
        - another shape or grid than the first modality's;
        - labels unknown to the edition.
        With the others it is used:
        - another axis order than the first modality's, which is corrected when the file is read;
        - other voxels than the median of all patients, or a skull that was not stripped;
        - an image that is constant, looks like a segmentation, or like a copy of another modality, or is clipped;
        - a segmentation without tumor, with tumor outside the brain, or with resection cavity that is background;
        - a segmentation that is automatic, where the edition has others that were corrected by hand;
        - a patient published as having another neoplasm than a glioma.
    """
    findings = list(forEachPatient(partial(_checkPatient, usual=medianSpacing(df)), df, 'check'))
    rows = [(patient, *finding) for patient, found in zip(df.index, findings, strict=True) for finding in found]
    return pd.DataFrame(rows, columns=['patient', 'file', 'finding', 'stops']).astype({'stops': bool})


def medianSpacing(df):
    """Return the median voxel size of a file list in mm along (D, W, H), from headers; 1 mm if none can be read."""
    sizes = []
    for _, paths in df.iterrows():
        with suppress(*UNREADABLE):
            sizes.append(spacingOf(paths))
    return np.quantile(sizes or np.ones((1, 3)), 0.5, axis=0, method='lower').tolist()


def usable(df, findings):
    """Return the patients of a file list without those that a finding of `checkFiles` stops, which are printed.

    Raises:
        ValueError: none is left.
    """
    bad = findings[findings['stops']]
    for patient, found in bad.groupby('patient'):
        print(f'{patient} is left out: {found["file"].iloc[0]}: {found["finding"].iloc[0]}')
    if df.index.isin(bad['patient']).all():
        raise ValueError(f'None of the {len(df)} patients can be used; the findings say why.')
    return df[~df.index.isin(bad['patient'])]


def _checkPatient(paths, usual):
    """Return the (file, finding, stops) triples of one patient; `usual` is the usual voxel size, along (D, W, H)."""
    first = Path(firstFile(paths) or '-')
    try:
        edition = known()[detectEdition(paths)]
    except ValueError as error:
        return [(first.name, str(error), True)]
    findings, volumes, grids, opened = [], {}, {}, {}  # column, finding or error, stops
    for column in (*config.MODALITIES, 'seg'):
        if hasFile(paths, column):
            try:
                channel = (edition.channels or {}).get(column)
                volumes[column], grids[column] = readVolume(paths[column], paths.name, channel, opened)
            except (ValueError, FileNotFoundError) as error:
                findings.append((column, error, True))
        elif column != 'seg':
            findings.append((column, 'this modality is missing', True))
    images = {column: volume for column, volume in volumes.items() if column != 'seg'}
    for column in list(images)[:1]:
        width, height, depth = nib.affines.voxel_sizes(grids[column])
        numVoxels = max(map(np.count_nonzero, images.values()))
        odd = findOddities(numVoxels, (depth, width, height), usual, 'the median')
        findings += [(column, text, False) for text in odd]
    findings += _checkImages(images)
    findings += _checkGrids(volumes, grids, paths)
    if 'seg' in volumes:
        findings += [('seg', *finding) for finding in _checkLabel(volumes['seg'], images, paths)]
    rows = []
    for column, finding, stops in findings:
        file = str(paths[column]) if hasFile(paths, column) else column
        text = str(finding).removeprefix(f'{paths.name}: ').removeprefix(file)  # the table has both
        rows.append((Path(file).name, text.strip(), stops))
    if '51_OtherNeoplasms' in first.parts:
        rows.append((first.name, 'published under 51_OtherNeoplasms: not a glioma', False))
    return rows


def _checkImages(images):
    """Yield (column, finding, stops) for each image by itself, and for each two that look the same."""
    for column, image in images.items():
        if image.min() == image.max():
            yield column, f'every voxel is {image.flat[0]}: this modality is empty', False
        elif len(np.unique(image[:, :, ::8])) < _FEW_VALUES and len(np.unique(image)) < _FEW_VALUES:
            numValues = len(np.unique(image))
            yield column, f'it has {numValues} different values, like a segmentation; an image was expected', False
        # numpy 2.0 to 2.2 crash if they compare an array of 8 bits with a larger number
        numClipped = np.count_nonzero(image == _LARGEST) if image.max() == _LARGEST else 0
        if numClipped > 1:  # a single one is the maximum of a scaled image
            text = f'{numClipped} voxels are {_LARGEST}, the largest number of 16 bits: they were clipped'
            yield column, text, False
    for (first, image), (second, other) in combinations(images.items(), 2):
        if image.shape == other.shape:
            isBrain = maskFunction(image) & maskFunction(other)
            values, others = image[isBrain][::7].astype(float), other[isBrain][::7].astype(float)
            if values.size > 1 and values.std() and others.std() and np.corrcoef(values, others)[0, 1] > _COPY:
                yield second, f'{second} looks like a copy of {first}', False


def _checkGrids(volumes, grids, paths):
    """Yield (column, finding, stops) for each volume with another grid or axis order than the first."""
    first = next(iter(volumes), None)
    for column in list(volumes)[1:]:
        try:
            checkGrid(paths, column, volumes[column].shape, grids[column], first, volumes[first].shape, grids[first])
        except ValueError as error:
            yield column, error, True
            continue
        # such as 'LPS': the axes point to the left, the back (posterior) and the top
        order, expected = (''.join(nib.aff2axcodes(nib.load(paths[name]).affine)) for name in (column, first))
        if order != expected:
            yield column, f'stored in {order} order, {first} in {expected}: corrected when it is read', False


def _checkLabel(seg, images, paths):
    """Yield the (finding, stops) pairs of a segmentation."""
    try:
        classes = toClasses(seg, paths)
    except ValueError as error:
        yield error, True
        return
    if isAutomatic(paths['seg']):
        yield 'segmented automatically, and not corrected by hand', False
    for label, number in classesOf(detectEdition(paths)).items():
        numVoxels = np.count_nonzero(np.rint(seg) == label) if label and number == 0 else 0
        if numVoxels:
            yield f'{numVoxels} voxels of resection cavity (label {label}) count as background', False
    isTumor = (classes != 0) & (classes != CAVITY)  # the cavity may lie outside the brain, where all is 0
    if not isTumor.any():
        yield 'no voxel of tumor', False
        return
    brains = [maskFunction(image) for image in images.values() if image.shape == classes.shape]
    if brains:
        numOutside = np.count_nonzero(isTumor[~np.any(brains, axis=0)])
        fraction = numOutside / np.count_nonzero(isTumor)
        if fraction > MOST_OUTSIDE:
            yield f"{fraction:.0%} of the tumor lies outside the brain: is it another patient's segmentation?", False
        elif numOutside:
            yield f'{numOutside} voxels of tumor lie where all modalities are 0', False


def split(df, test=None):
    """Split a file list into training, validation and test set, no subject in two of them.

    The fractions are `config.VAL_FRACTION` and `config.TEST_FRACTION`; the order is drawn from `config.SEED`. Each set
    has about the same mix of grades where grades are known. Patients without a segmentation are left out and counted.

    Args:
        df: file list.
        test: ids of the patients to test on; other scans of their subjects are in no set. None: they are drawn.

    Returns:
        traindf, valdf, testdf: disjoint; without `test`, together every patient with a segmentation. None is empty if
        there are three subjects or more, but for a fraction of 0.

    Raises:
        ValueError: no subject is left for training, no patient has a segmentation, or one of `test` is not among them.
    """
    df = withSegmentation(df, 'training and scoring').sort_index()
    subjects, order = _drawOrder(df)
    numTest, numVal = (
        max(1, round(fraction * len(order))) if fraction and len(order) >= fewest else 0
        for fraction, fewest in ((config.TEST_FRACTION, 3), (config.VAL_FRACTION, 2))
    )
    if test is not None:
        test = [test] if isinstance(test, str) else list(test)
        if unknown := [patient for patient in test if patient not in df.index]:
            raise ValueError(f'test has {unknown[:5]}: not in the file list, or without a segmentation.')
        isTested = np.isin(order, subjects[test])
        order, numTest = np.concatenate([order[isTested], order[~isTested]]), isTested.sum()
    if numTest + numVal >= len(order):
        raise ValueError(
            f'Validation and test take {numVal} + {numTest} of {len(order)} subjects: none is left to train.'
        )
    drawn, val, train = (df[subjects.isin(part)] for part in np.split(order, [numTest, numTest + numVal]))
    test = drawn if test is None else df[df.index.isin(test)]
    print(f'{len(train)} patients to train, {len(val)} to validate, {len(test)} to test.')
    _warnOfStart(pd.concat([val, test]))
    if numLeft := len(drawn) - len(test):
        print(f'{numLeft} other scans of the subjects to test are in no set.')
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


def haveVoxelsOf(df, voxels):
    """Return for each patient of a file list what `hasVoxelsOf` returns, a list; if `voxels` is empty, nothing is read.

    The images of several patients are read at a time.
    """
    if not voxels:
        return [False] * len(df)
    return list(forEachPatient(partial(hasVoxelsOf, voxels=voxels), df, 'known patients'))


def seenByStart(df):
    """Return the ids of the patients of a file list that the weights of `config.START` were trained on.

    They are recognised by their ids, as other scans of a subject, and by their voxels.
    """
    file = config.START and modelFolder(config.START) / 'config.json'
    if not file or not file.is_file():  # told when the training starts
        return []
    subjects, voxels = set(), {}
    for member in json.loads(file.read_text())['members']:
        own = member['provenance']
        subjects |= {withoutTime(patient) for patient in (*own['patients'], *own['earlier'])}
        voxels |= own.get('voxels', {})
    ids = zip(df.index.astype(str), haveVoxelsOf(df, voxels), strict=True)
    return [patient for patient, isSame in ids if isSame or withoutTime(patient) in subjects]


def _warnOfStart(df):
    """Warn of patients to validate or test on that the weights of `config.START` were trained on."""
    if seen := seenByStart(df):
        names = ', '.join(seen[:5]) + ', ...' * (len(seen) > 5)
        text = f'config.START was trained on {len(seen)} of {len(df)} patients to validate or test on: {names}.'
        warnings.warn(f'{text} Their scores are no test.', stacklevel=3)


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
    if renamed := _subjectsAcross(editions, subjects):
        print(
            f'{len(renamed)} subjects have, or may have, names of several years or time points: '
            f'{"; ".join(renamed[:3])}. Each stays in one set.'
        )
    if editions.nunique() > 1 and (mixed := sorted({*_OVERLAPPING} & set(editions))):
        print(
            f'{" and ".join(mixed)} may hold subjects of other editions under other names; the names do not say which.'
        )


def _subjectsAcross(values, subjects):
    """Return the patients of each subject that has several of the values, such as editions, as 'one = other'."""
    groups = subjects.groupby(subjects).groups.values()
    return [' = '.join(sorted(group)) for group in groups if values[group].nunique() > 1]


def writeSplit(sets, file):
    """Write the patient ids of `sets` (traindf, valdf, testdf) to a JSON file, but not over that of another run."""
    ids = {name: [str(patient) for patient in part.index] for name, part in zip(_SETS, sets, strict=True)}
    hasRun = Path(config.LAST_CHECKPOINT).exists() and Path(config.LAST_CHECKPOINT).parent == Path(file).parent
    if hasRun and Path(file).exists() and json.loads(Path(file).read_text()) != ids:
        raise ValueError(f'{file} is the split of the run in this folder: set another config.OUTPUT_FOLDER.')
    with writeAtomically(file) as temporary:
        temporary.write_text(json.dumps(ids, indent=1))


def readSplit(file, df):
    """Return traindf, valdf, testdf of a JSON file, {'train': [ids], 'val': [ids], 'test': [ids]}.

    Subjects that are, or may be, in two of the sets are reported by a warning; none is dropped.

    Args:
        file: path of the file, as `writeSplit` writes it.
        df: file list with every patient of the file; its other patients are left out and counted.

    Raises:
        ValueError: a set is missing, a patient is in two sets, or is not in the file list.
    """
    ids = json.loads(Path(file).read_text())
    if not isinstance(ids, dict) or set(ids) != set(_SETS):
        raise ValueError(f'{file} has {list(ids)}; the sets {", ".join(_SETS)} were expected.')
    everyone = [patient for name in _SETS for patient in ids[name]]
    twice = [patient for patient, count in sorted(Counter(everyone).items()) if count > 1]
    absent = sorted(set(everyone) - set(df.index))
    if twice or absent:
        raise ValueError(f'{file}: in two sets: {twice[:5] or "none"}; not in the file list: {absent[:5] or "none"}.')
    if len(everyone) < len(df):
        print(f'{len(df) - len(everyone)} of {len(df)} patients are in no set of {file}.')
    setOf = pd.Series({patient: name for name in _SETS for patient in ids[name]}, dtype=object)
    if shared := _subjectsAcross(setOf, findSubjects(df.loc[everyone])):
        warnings.warn(f'Scans of one subject are, or may be, in two sets: {"; ".join(shared)}.', stacklevel=2)
    return tuple(df.loc[ids[name]] for name in _SETS)


def describeCohort(df):
    """Return a table of the patients of a file list.

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


def readGrades(df):
    """Return the grade of each patient of a file list, as its edition publishes it.

    Returns:
        Series indexed by patient: 'HGG' or 'LGG' from a folder of that name or a `name_mapping*.csv` up to two folders
        above the patient's, else 'unknown'.
    """
    published = {}
    for _, names in _nearbyTables(df):
        if 'Grade' in names:
            names = names.dropna(subset='Grade')
            for column in names.columns.drop('Grade'):
                published.update(dict(zip(names[column], names['Grade'], strict=True)))
    grades = {
        patient: next((part for part in file.parts if part in ('HGG', 'LGG')), published.get(patient, 'unknown'))
        for patient, file in _firstFiles(df).items()
    }
    return pd.Series(grades, dtype=object, name='grade').reindex(df.index)


def readSites(df):
    """Return the site of each patient of a file list, as its name of 2017 to 2019 says it: `Brats18_CBICA_AAB_1`.

    Returns:
        Series indexed by patient: such as 'CBICA' or 'TCIA01', from its own name or one in the same row of a
        `name_mapping*.csv`, else 'unknown'.
    """
    named = {}
    for _, names in _nearbyTables(df):
        for row in names.fillna('').astype(str).to_numpy():
            named.update(dict.fromkeys(row, ' '.join(row)))
    found = [re.search(r'Brats1\d_([A-Z0-9]+)_', f'{each} {named.get(each)}', re.IGNORECASE) for each in df.index]
    return pd.Series([site[1] if site else 'unknown' for site in found], df.index, dtype=object, name='site')


def _firstFiles(df):
    """Return a dict of patient id -> Path of the patient's first file."""
    return {patient: Path(firstFile(row)) for patient, row in df.to_dict('index').items()}


def _nearbyTables(df):
    """Return a (path, DataFrame) list of BraTS's published tables of names, up to two folders above the patients."""
    folders = {parent for file in _firstFiles(df).values() for parent in file.parents[1:3]}
    patterns = ('name_mapping*.csv', '*Mapping*.xlsx')
    paths = {path for folder in folders for pattern in patterns for path in folder.glob(pattern)}
    tables = []
    for path in sorted(path for path in paths if not path.name.startswith(('.', '~'))):
        try:
            tables.append((path, pd.read_csv(path) if path.suffix == '.csv' else pd.read_excel(path)))
        except Exception as error:  # each reader has its own
            raise ValueError(f'{path} is not a table of names ({error}); correct it or move it away.') from error
    return tables


def findSubjects(df):
    """Return the subject (person) of each patient of a file list, as far as the names say.

    Scans of one subject are:
    - time points of 2023 to 2025 (`BraTS-GLI-00001-000`, `-101`), UCSF-PDGM (`_FU001d`) and UPENN-GBM (`_11`, `_21`);
    - two names in one row of a `name_mapping*.csv` or `*Mapping*.xlsx` up to two folders above the patients;
    - if no such table names them, equal numbers in 2021 and 2023 GLI (suspected).

    Returns:
        Series indexed by patient: the subject's first patient id in alphabetical order.
    """
    keys = {patient: {withoutTime(patient)} for patient in df.index}
    named = {}
    for patient in keys:
        for alias in (patient, withoutTime(patient)):
            named.setdefault(alias, set()).add(patient)
    for path, names in _nearbyTables(df):
        for number, row in enumerate(names.astype(str).to_numpy()):
            for patient in set().union(*(named.get(value, ()) for value in row)):
                keys[patient].add((str(path), number))
    for patient, found in keys.items():
        number = re.fullmatch(r'(?:BraTS2021_|BraTS-GLI-)(\d+)(?:-\d+)?', str(patient))
        if number and len(found) == 1:
            found.add(int(number[1]))
    groups = {}  # key -> list of the patients linked to it; one list object per subject
    for patient in keys:
        linked = {id(groups[key]): groups[key] for key in keys[patient] if key in groups}
        together = [patient, *(other for group in linked.values() for other in group)]
        groups.update({key: together for other in together for key in keys[other]})
    return pd.Series({patient: min(groups[withoutTime(patient)]) for patient in keys}, dtype=object, name='subject')
