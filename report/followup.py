"""Compare the scans of one subject over time, and draw their volumes."""

import re
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

import config
from patients.editions import withoutTime
from pictures.figure import classColors, classNames, newFigure, requireColumns


def compareScans(volumes):
    """Return the volumes of the subjects with several scans, and the change since the scan before.

    Names of scans of one subject differ in the time point only, such as `BraTS-GLI-00001-000` and
    `BraTS-GLI-00001-101`. The time points are the order; the names do not say how long lies between them. A scan that
    has names of two editions is not compared with itself.

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


def plotScans(table):
    """Draw the ml of each region over the scans of one subject.

    Args:
        table: rows of one subject of `report.compareScans`, whose columns are regions or classes.

    Returns:
        matplotlib Figure, with equal steps from scan to scan. A region of one class has the color of the class, others
        are grey; the resection cavity, which is no tumor, is dashed.

    Raises:
        ValueError: the table has no rows, no region, or several subjects.
    """
    regions = [name for name in table if f'{name}Change' in table]
    requireColumns(table, ['subject', 'patient', 'scan', *(regions or ['a region and its change'])])
    if table['subject'].nunique() > 1:
        raise ValueError(f'The table has {table["subject"].nunique()} subjects; the rows of one were expected.')
    figure = newFigure(5.2, 3.1)
    panel = figure.subplots()
    colors = dict(zip(classNames(), classColors(), strict=True)) | {'RC': config.CAVITY_CLASS[1]}
    colors |= {name: config.CLASS_COLORS[each[0]] for name, each in config.REGIONS.items() if len(each) == 1}
    for place, (region, marker) in enumerate(zip(regions, cycle('os^Dv<>'))):
        color = colors.get(region, '#8C8C8C' if place else '#444444')
        style = {'color': color, 'linestyle': '--' if region in ('RC', config.CAVITY_CLASS[0]) else '-'}
        style |= {'marker': marker, 'markeredgecolor': '#555555', 'markersize': 6}
        panel.plot(table['scan'], table[region], label=region, **style)
    names = [str(patient).removeprefix(str(table['subject'].iloc[0])) for patient in table['patient']]
    panel.set_xticks(table['scan'], names, fontsize=8)
    panel.set_xlim(table['scan'].min() - 0.3, table['scan'].max() + 0.3)
    panel.set_ylim(0, 1.08 * max(np.nanmax(table[regions].to_numpy(float), initial=0), 0.1))
    panel.yaxis.set_major_locator(MaxNLocator(5))
    panel.set_ylabel('volume (ml)')
    panel.spines[['top', 'right']].set_visible(False)
    panel.legend(frameon=False, fontsize=8, loc='center left', bbox_to_anchor=(1, 0.5))
    panel.set_title(str(table['subject'].iloc[0]), fontsize=10)
    return figure
