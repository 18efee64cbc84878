"""Describe the patients of a file list and divide them into sets, no person in two of them."""

import json
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd

import config
from files import writeWhole
from patients import COLUMNS, hasFile, readLabel, spacingOf, tellEdition

SETS = ('train', 'val', 'test')


def annotated(df, purpose):
    """Gives the patients of a file list that have a segmentation, and prints how many have none.

    Raises:
        ValueError: none has one.
    """
    has = df['seg'].notna()
    if not has.all():
        print(f'{(~has).sum()} of {len(df)} patients have no segmentation and are left out of {purpose}.')
    if not has.any():
        raise ValueError(f'None of the {len(df)} patients has a segmentation: nothing is left for {purpose}.')
    return df[has]


def readGrades(df):
    """Gives the grade of each patient of a file list, as its edition publishes it.

    Args:
        df: file list.

    Returns:
        Series indexed by patient: 'HGG' or 'LGG' as told by a `name_mapping*.csv` up to two folders above the
        patient's or by a folder HGG or LGG; 'unknown' where nothing tells it.
    """
    told = {}
    for _, names in _nearbyTables(df):
        if 'Grade' in names:
            names = names.dropna(subset='Grade')
            for column in names.columns.drop('Grade'):
                told.update(dict(zip(names[column], names['Grade'], strict=True)))
    grades = {
        patient: next((part for part in file.parts if part in ('HGG', 'LGG')), told.get(patient, 'unknown'))
        for patient, file in _firstFiles(df).items()
    }
    return pd.Series(grades, dtype=object, name='grade').reindex(df.index)


def _firstFiles(df):
    rows = df.to_dict('index')
    return {patient: Path(next(row[name] for name in COLUMNS if hasFile(row, name))) for patient, row in rows.items()}


def _nearbyTables(df):
    """Gives (path, DataFrame) of the tables of names that BraTS publishes, up to two folders above the patients."""
    folders = {parent for file in _firstFiles(df).values() for parent in file.parents[1:3]}
    paths = {
        path for folder in folders for kind in ('name_mapping*.csv', '*Mapping*.xlsx') for path in folder.glob(kind)
    }
    tables = []
    for path in sorted(path for path in paths if not path.name.startswith(('.', '~'))):
        try:
            tables.append((path, pd.read_csv(path) if path.suffix == '.csv' else pd.read_excel(path)))
        except Exception as error:  # each reader has its own
            raise ValueError(f'{path} is not a table of names ({error}); mend it or move it away.') from error
    return tables


def tellPersons(df):
    """Gives the person behind each patient id, as far as the names tell.

    Scans of one person are: the time points of 2023 and 2024 (`BraTS-GLI-00001-000`, `-001`); two names in one row of a
    published table of names (`name_mapping*.csv`, `*Mapping*.xlsx`, up to two folders above the patients); and, where
    no such table names them, equal numbers in 2021 and 2023 GLI, which is a suspicion.

    Args:
        df: file list.

    Returns:
        Series indexed by patient: the first id, in alphabetical order, of the person's.
    """
    keys = {patient: {_withoutTime(patient)} for patient in df.index}
    named = {}
    for patient in keys:
        for alias in (patient, _withoutTime(patient)):
            named.setdefault(alias, set()).add(patient)
    for path, names in _nearbyTables(df):
        for number, row in enumerate(names.astype(str).to_numpy()):
            for patient in set().union(*(named.get(value, ()) for value in row)):
                keys[patient].add((str(path), number))
    for patient, found in keys.items():
        number = re.fullmatch(r'(?:BraTS2021_|BraTS-GLI-)(\d+)(?:-\d+)?', patient)
        if number and len(found) == 1:
            found.add(int(number[1]))
    groups = {}  # key -> all patients that are linked to it, one list for each person
    for patient in keys:
        linked = {id(groups[key]): groups[key] for key in keys[patient] if key in groups}
        together = [patient, *(other for group in linked.values() for other in group)]
        groups.update({key: together for other in together for key in keys[other]})
    return pd.Series({patient: min(groups[_withoutTime(patient)]) for patient in keys}, dtype=object, name='person')


def _withoutTime(patient):
    return re.sub(r'^(BraTS-(?:GLI|SSA)-\d+)-\d+$', r'\1', str(patient))


def split(df):
    """Splits a file list into training, validation and test, no person in two of them.

    The shares are `config.VAL_FRACTION` and `config.TEST_FRACTION`, the order is drawn from `config.SEED`, and each set
    has the same mix of grades where grades are known. Patients without a segmentation are left out, and counted.

    Args:
        df: file list.

    Returns:
        traindf, valdf, testdf: disjoint, together every patient with a segmentation; none empty from three persons on.
    """
    df = annotated(df, 'training and scoring').sort_index()
    persons, order = _drawOrder(df)
    noTest = max(1, round(config.TEST_FRACTION * len(order))) if len(order) > 2 else 0
    noVal = max(1, round(config.VAL_FRACTION * len(order))) if len(order) > 1 else 0
    if noTest + noVal >= len(order) > 1:
        raise ValueError(
            f'VAL_FRACTION and TEST_FRACTION take {noVal} + {noTest} of {len(order)} patients: none is left to train.'
        )
    test, val, train = (df[persons.isin(part)] for part in np.split(order, [noTest, noTest + noVal]))
    print(f'{len(train)} patients to train, {len(val)} to validate, {len(test)} to test.')
    return train, val, test


def splitFolds(df, k):
    """Splits a file list into k folds, each patient tested once, no person in training and test of one fold.

    Args:
        df: file list; patients without a segmentation are left out, and counted.
        k: number of folds, 2 to the number of persons.

    Returns:
        list of k (traindf, testdf), drawn from `config.SEED`, each with the same mix of grades.

    Raises:
        ValueError: another k.
    """
    df = annotated(df, 'training and scoring').sort_index()
    persons, order = _drawOrder(df)
    if not 2 <= k <= len(order):
        raise ValueError(f'{k} folds were asked for; 2 to {len(order)}, the number of patients, are possible.')
    tested = [persons.isin(part) for part in np.array_split(order, k)]
    return [(df[~isTested], df[isTested]) for isTested in tested]


def _drawOrder(df):
    """Gives the person of each patient, and the persons in a drawn order; each stretch has the mix of grades."""
    persons = tellPersons(df)
    _reportSuspicions(df, persons)
    grades = readGrades(df).groupby(persons).first()
    generator = np.random.default_rng(config.SEED)
    ranks = np.empty(len(grades))
    for grade in sorted(grades.unique()):
        members = np.flatnonzero(grades == grade)
        ranks[generator.permutation(members)] = (np.arange(len(members)) + generator.uniform()) / len(members)
    return persons, grades.index.to_numpy()[np.argsort(ranks, kind='stable')]


def _reportSuspicions(df, persons):
    """Prints which patients are kept together for their names, and what names cannot tell."""
    editions = df.apply(tellEdition, axis=1)
    renamed = [sorted(group) for _, group in persons.groupby(persons).groups.items() if editions[group].nunique() > 1]
    if renamed:
        examples = '; '.join(' = '.join(group) for group in renamed[:3])
        print(f'{len(renamed)} persons have, or may have, names of several years: {examples}. Each stays in one set.')
    if editions.nunique() > 1 and editions.isin(['Decathlon', 'BraTS2024']).any():
        print('The Decathlon and BraTS 2024 may hold persons of other editions too; no published table tells which.')


def writeSplit(sets, file):
    """Writes the patient ids of three sets to a JSON file.

    Args:
        sets: traindf, valdf, testdf.
        file: path of the file.
    """
    ids = {name: [str(patient) for patient in part.index] for name, part in zip(SETS, sets, strict=True)}
    with writeWhole(file) as part:
        part.write_text(json.dumps(ids, indent=1))


def readSplit(file, df):
    """Gives the sets of a JSON file: {'train': [ids], 'val': [ids], 'test': [ids]}, as `writeSplit` writes it.

    Warns of persons that sit, or may sit, in two of the sets; none is dropped.

    Args:
        file: path of the file.
        df: file list that has every patient of the file; others are left out, and counted.

    Returns:
        traindf, valdf, testdf.

    Raises:
        ValueError: a set is missing, a patient is in two sets, or is not in the file list.
    """
    ids = json.loads(Path(file).read_text())
    if not isinstance(ids, dict) or set(ids) != set(SETS):
        raise ValueError(f'{file}: the sets {", ".join(SETS)} were expected, {list(ids)} were found.')
    everyone = [patient for name in SETS for patient in ids[name]]
    twice = sorted({patient for patient in everyone if everyone.count(patient) > 1})
    absent = sorted(set(everyone) - set(df.index))
    if twice or absent:
        raise ValueError(f'{file}: in two sets: {twice[:5] or "none"}; not in the file list: {absent[:5] or "none"}.')
    if len(everyone) < len(df):
        print(f'{len(df) - len(everyone)} of {len(df)} patients are in no set of {file}.')
    sets = tuple(df.loc[ids[name]] for name in SETS)
    warnOfTwins(sets)
    return sets


def warnOfTwins(sets):
    """Warns of persons that sit, or may sit, in two sets, under names of different years or time points.

    Args:
        sets: file lists.

    Returns:
        list of lists of patient ids, one for each such person.
    """
    together = pd.concat(sets)
    number = pd.Series(np.repeat(np.arange(len(sets)), [len(part) for part in sets]), together.index)
    persons = tellPersons(together)
    twins = [sorted(group) for _, group in persons.groupby(persons).groups.items() if number[group].nunique() > 1]
    if twins:
        named = '; '.join(' = '.join(group) for group in twins)
        warnings.warn(f'In two sets sit what are, or may be, scans of one person: {named}.', stacklevel=2)
    return twins


def describeCohort(df):
    """Gives a table of the patients: edition, grade, person and the volume of each class.

    Args:
        df: file list.

    Returns:
        DataFrame indexed by patient: `edition`, `grade`, `person` and, in ml, a column per tumor class named as in
        `config.CLASS_NAMES`; NaN where there is no segmentation.

    Raises:
        ValueError, FileNotFoundError: a segmentation cannot be read; `checks.checkFiles` finds all such beforehand.
    """

    def measure(paths):
        if not hasFile(paths, 'seg'):
            return [np.nan] * (config.NO_CLASSES - 1)
        counts = np.bincount(readLabel(paths).ravel(), minlength=config.NO_CLASSES)
        return counts[1:] * np.prod(spacingOf(paths)) / 1000  # mm3 -> ml

    with ThreadPoolExecutor() as pool:  # unpacking and counting leave the interpreter's lock
        volumes = list(pool.map(measure, (paths for _, paths in df.iterrows())))
    table = pd.DataFrame(volumes, df.index, list(config.CLASS_NAMES[1:]))
    table.insert(0, 'edition', df.apply(tellEdition, axis=1))
    table.insert(1, 'grade', readGrades(df))
    table.insert(2, 'person', tellPersons(df))
    return table
