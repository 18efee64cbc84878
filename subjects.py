"""Tell the subject (person), grade and site of each patient from names and published tables."""

import re
from pathlib import Path

import pandas as pd

from editions import COLUMNS, withoutTime
from patients import hasFile


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
    """Return the site of each patient (Series), such as 'CBICA' or 'TCIA01', from its name of 2018 or 2019 as
    `Brats18_CBICA_AAB_1`, its own or one in the same row of a `name_mapping*.csv`; else 'unknown'."""
    named = {}
    for _, names in _nearbyTables(df):
        for row in names.fillna('').astype(str).to_numpy():
            named.update(dict.fromkeys(row, ' '.join(row)))
    found = [re.search(r'Brats1\d_([A-Z0-9]+)_', f'{each} {named.get(each)}', re.IGNORECASE) for each in df.index]
    return pd.Series([site[1] if site else 'unknown' for site in found], df.index, dtype=object, name='site')


def _firstFiles(df):
    """Return a dict of patient id -> Path of the patient's first file."""
    rows = df.to_dict('index')
    return {patient: Path(next(row[name] for name in COLUMNS if hasFile(row, name))) for patient, row in rows.items()}


def _nearbyTables(df):
    """Return (path, DataFrame) of BraTS's published tables of names, up to two folders above the patients."""
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

    Scans of one subject are: time points of 2023 to 2025 (`BraTS-GLI-00001-000`, `-101`), of UCSF-PDGM (`_FU001d`) and
    UPENN-GBM (`_11`, `_21`); two names in one row of a published table of names (`name_mapping*.csv`,
    `*Mapping*.xlsx`, up to two folders above the patients); and, if no such table names them, equal numbers in 2021 and
    2023 GLI (suspected).

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
