"""Compare the scans of one subject over time."""

import re

import pandas as pd

from editions import withoutTime


def compareScans(volumes):
    """Return the volumes of the subjects with several scans, and the change since the scan before.

    Scans of one subject have names that differ in the time point only, such as `BraTS-GLI-00001-000` and
    `BraTS-GLI-00001-101`. Their order is that of the time points; the names do not say how long lies between them. The
    same scan under names of two years is no second scan and is not compared.

    Args:
        volumes: DataFrame indexed by patient, a column of ml for each region; NaN where a volume is not known.

    Returns:
        DataFrame, one row per scan: `subject`, `patient`, `scan` (from 1), the columns of `volumes` (ml), and
        `<column>Change`: ml more than in the scan before, NaN for the first one. Empty if no subject has two scans.
    """
    columns = list(volumes)
    order = sorted(range(len(volumes)), key=lambda place: _numbersOf(volumes.index[place]))
    table = volumes.iloc[order].rename_axis('patient').reset_index()
    table.insert(0, 'subject', [withoutTime(patient) for patient in table['patient']])
    table = table[table['subject'].duplicated(keep=False)].reset_index(drop=True)
    scans = table.groupby('subject', sort=False)
    table.insert(2, 'scan', scans.cumcount() + 1)
    changes = scans[columns].diff().rename(columns=lambda column: f'{column}Change')
    return pd.concat([table, changes], axis=1)


def _numbersOf(patient):
    """Return a patient id as a list of texts and numbers, so that scan 10 is later than scan 2."""
    return [int(part) if part.isdecimal() else part for part in re.split(r'(\d+)', str(patient))]
