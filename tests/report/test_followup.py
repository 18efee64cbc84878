"""Test the comparison of a subject's scans, and their figure."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import config
from patients import editions
from report import compareScans, plotScans


def test_compareScans_subtractsTheScanBefore():
    """Three scans of one subject, in the order of their time points: 10, 4 and 7 ml change by -6 and +3."""
    patients = ['BraTS-GLI-00002-101', 'BraTS-GLI-00002-000', 'BraTS-GLI-00001-000', 'BraTS-GLI-00002-100']
    table = compareScans(pd.DataFrame({'WT': [7.0, 10.0, 99.0, 4.0]}, patients))
    assert table['patient'].tolist() == ['BraTS-GLI-00002-000', 'BraTS-GLI-00002-100', 'BraTS-GLI-00002-101']
    assert table['subject'].tolist() == ['BraTS-GLI-00002'] * 3 and table['scan'].tolist() == [1, 2, 3]
    np.testing.assert_array_equal(table['WTChange'], [np.nan, -6, 3])


def test_compareScans_ordersScansByNumber():
    """Scan 10 of a data set of one's own is later than scan 2."""
    config.OWN_EDITIONS = {'Clinic': editions.Edition(r'case\d+_\d+', {'mask': ('seg',)}, {0: 0, 1: 1}, time=r'_\d+')}
    table = compareScans(pd.DataFrame({'WT': [1.0, 5.0, 3.0]}, ['case7_10', 'case7_2', 'case7_1']))
    assert table['patient'].tolist() == ['case7_1', 'case7_2', 'case7_10'] and table['WTChange'].tolist()[1:] == [2, -4]


def test_compareScans_isEmptyWithoutASecondScan():
    """Different subjects, and one scan under the names of two years, are not compared."""
    names = ['BraTS20_Training_001', 'Brats18_CBICA_A_1', 'BraTS-GLI-00001-000', 'BraTS-GLI-00002-000']
    table = compareScans(pd.DataFrame({'WT': [1.0, 2, 3, 4]}, names))
    assert table.empty and {'subject', 'scan', 'WT', 'WTChange'} <= set(table)


def test_plotScans_drawsEachRegionOverTheScans():
    """A line per region with the table's ml; the cavity is dashed; several subjects are refused."""
    patients = [f'BraTS-GLI-0000{number}-10{scan}' for number in (1, 2) for scan in (0, 1)]
    volumes = pd.DataFrame({'WT': [10.0, 4, 1, 2], 'ET': [2.0, 1, 0, 0], 'RC': [0.0, 6, 0, 0]}, patients)
    table = compareScans(volumes)
    [panel] = plotScans(table[table['subject'] == 'BraTS-GLI-00001']).axes
    lines = {line.get_label(): line for line in panel.lines}
    assert {name: list(line.get_ydata()) for name, line in lines.items()} == {'WT': [10, 4], 'ET': [2, 1], 'RC': [0, 6]}
    assert lines['RC'].get_linestyle() == '--' and lines['WT'].get_linestyle() == '-'
    assert lines['ET'].get_color() == config.CLASS_COLORS[3] and lines['RC'].get_color() == config.CAVITY_CLASS[1]
    plt.close('all')
    for wrong, match in ((table, '2 subjects'), (table[:0], '0 rows')):
        with pytest.raises(ValueError, match=match):
            plotScans(wrong)


@pytest.mark.parametrize('numClasses', [2, 4, 5])
def test_plotScans_drawsClassesInTheirColors(numClasses):
    """Columns that are classes, as `cohort.describeCohort` has them, have their colors; the cavity is dashed."""
    config.NO_CLASSES = numClasses
    volumes = pd.DataFrame(1.0, ['BraTS-GLI-00001-100', 'BraTS-GLI-00001-101'], list(config.CLASS_NAMES[1:]))
    [panel] = plotScans(compareScans(volumes)).axes
    assert [line.get_color() for line in panel.lines] == list(config.CLASS_COLORS[1:])
    assert [line.get_linestyle() for line in panel.lines] == ['-', '-', '-', '--'][: numClasses - 1]
    plt.close('all')
