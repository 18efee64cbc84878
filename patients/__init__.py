"""A folder of patients: find, read, check, divide and write them. What needs pandas or joblib is imported when used."""

import importlib

from patients.editions import Edition
from patients.reading import (
    detectEdition,
    findFiles,
    makeFileList,
    maskFunction,
    patientOf,
    readCase,
    readLabel,
    readVolume,
    spacingOf,
)
from patients.slices import fromSlices
from patients.writing import saveProbabilities, saveSegmentation

_COHORT = ('checkFiles', 'describeCohort', 'readGrades', 'readSites', 'split', 'splitFolds')
__all__ = [
    'Edition',
    'detectEdition',
    'findFiles',
    'fromSlices',
    'makeFileList',
    'maskFunction',
    'patientOf',
    'readCase',
    'readLabel',
    'readVolume',
    'saveProbabilities',
    'saveSegmentation',
    'spacingOf',
    *_COHORT,
]


def __getattr__(name):
    """Return a name of `patients.cohort`, which imports pandas (PEP 562)."""
    if name in _COHORT:
        return getattr(importlib.import_module('patients.cohort'), name)
    raise AttributeError(f'patients has no {name}')
