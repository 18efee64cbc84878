"""Test the figure of a subject's scans."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest

import config
import followup
from pictures import plotScans


def test_plotScans_drawsEachRegionOverTheScans():
    """A line per region with the table's ml; the cavity is dashed; several subjects are refused."""
    patients = [f'BraTS-GLI-0000{number}-10{scan}' for number in (1, 2) for scan in (0, 1)]
    table = followup.compareScans(
        pd.DataFrame({'WT': [10.0, 4, 1, 2], 'ET': [2.0, 1, 0, 0], 'RC': [0.0, 6, 0, 0]}, patients)
    )
    [panel] = plotScans(table[table['subject'] == 'BraTS-GLI-00001']).axes
    lines = {line.get_label(): line for line in panel.lines}
    assert {name: list(line.get_ydata()) for name, line in lines.items()} == {'WT': [10, 4], 'ET': [2, 1], 'RC': [0, 6]}
    assert lines['RC'].get_linestyle() == '--' and lines['WT'].get_linestyle() == '-'
    assert lines['ET'].get_color() == config.CLASS_COLORS[3] and lines['RC'].get_color() == config.CAVITY_CLASS[1]
    plt.close('all')
    with pytest.raises(ValueError, match='2 subjects'):
        plotScans(table)
    with pytest.raises(ValueError, match='0 rows'):
        plotScans(table[:0])


@pytest.mark.parametrize('numClasses', [2, 4, 5])
def test_plotScans_drawsClassesInTheirColors(numClasses):
    """Columns that are classes, as `cohort.describeCohort` has them, have their colors; the cavity is dashed."""
    config.NO_CLASSES = numClasses
    volumes = pd.DataFrame(1.0, ['BraTS-GLI-00001-100', 'BraTS-GLI-00001-101'], list(config.CLASS_NAMES[1:]))
    [panel] = plotScans(followup.compareScans(volumes)).axes
    assert [line.get_color() for line in panel.lines] == list(config.CLASS_COLORS[1:])
    assert [line.get_linestyle() for line in panel.lines] == ['-', '-', '-', '--'][: numClasses - 1]
    plt.close('all')
