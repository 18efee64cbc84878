"""Draw the volumes of one subject over its scans."""

import numpy as np
from matplotlib.ticker import MaxNLocator

import config
from pictures.figure import newFigure, requireColumns

_MARKERS = 'os^Dv<>'


def plotScans(table):
    """Draw the ml of each region over the scans of one subject.

    Args:
        table: rows of one subject of `followup.compareScans`, whose columns are regions or classes.

    Returns:
        matplotlib Figure. The scans are equally far apart: their names do not say how long lies between them. A region
        has the color of its class, one of several classes a grey; the resection cavity, which is no tumor, is dashed.

    Raises:
        ValueError: the table has no rows, no region, or several subjects.
    """
    regions = [name for name in table if f'{name}Change' in table]
    requireColumns(table, ['subject', 'patient', 'scan', *(regions or ['a region and its change'])])
    if table['subject'].nunique() > 1:
        raise ValueError(f'The table has {table["subject"].nunique()} subjects; the rows of one were expected.')
    figure = newFigure(5.2, 3.1)
    panel = figure.subplots()
    for place, region in enumerate(regions):
        members = config.REGIONS.get(
            region, [number for number, name in enumerate(config.CLASS_NAMES) if name == region]
        )
        color = config.CLASS_COLORS[members[0]] if len(members) == 1 else '#444444' if place == 0 else '#8C8C8C'
        isCavity = region in ('RC', config.CAVITY_CLASS[0])
        color = config.CAVITY_CLASS[1] if isCavity and not members else color
        style = {'color': color, 'linestyle': '--' if isCavity else '-'}
        style |= {'marker': _MARKERS[place % len(_MARKERS)], 'markeredgecolor': '#555555', 'markersize': 6}
        panel.plot(table['scan'], table[region], label=region, **style)
    panel.set_xticks(table['scan'], [str(patient) for patient in table['patient']], fontsize=8)
    panel.set_xlim(table['scan'].min() - 0.3, table['scan'].max() + 0.3)
    panel.set_ylim(0, 1.08 * max(np.nanmax(table[regions].to_numpy(float), initial=0), 0.1))
    panel.yaxis.set_major_locator(MaxNLocator(5))
    panel.set_ylabel('volume (ml)')
    panel.spines[['top', 'right']].set_visible(False)
    panel.legend(frameon=False, fontsize=8, loc='center left', bbox_to_anchor=(1, 0.5))
    panel.set_title(str(table['subject'].iloc[0]), fontsize=10)
    return figure
