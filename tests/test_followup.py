"""Test the comparison of a subject's scans."""

import numpy as np
import pandas as pd

import config
import editions
import followup


def test_compareScans_givesTheChangeSinceTheScanBefore():
    """Three scans of one subject, in the order of their time points: 10, 4 and 7 ml change by -6 and +3."""
    patients = ['BraTS-GLI-00002-101', 'BraTS-GLI-00002-000', 'BraTS-GLI-00001-000', 'BraTS-GLI-00002-100']
    table = followup.compareScans(pd.DataFrame({'WT': [7.0, 10.0, 99.0, 4.0]}, patients))
    assert table['patient'].tolist() == ['BraTS-GLI-00002-000', 'BraTS-GLI-00002-100', 'BraTS-GLI-00002-101']
    assert table['subject'].tolist() == ['BraTS-GLI-00002'] * 3 and table['scan'].tolist() == [1, 2, 3]
    np.testing.assert_array_equal(table['WTChange'], [np.nan, -6, 3])


def test_compareScans_ordersScansByNumber():
    """Scan 10 of a data set of one's own is later than scan 2."""
    config.OWN_EDITIONS = {'Clinic': editions.Edition(r'case\d+_\d+', {'mask': ('seg',)}, {0: 0, 1: 1}, time=r'_\d+')}
    table = followup.compareScans(pd.DataFrame({'WT': [1.0, 5.0, 3.0]}, ['case7_10', 'case7_2', 'case7_1']))
    assert table['patient'].tolist() == ['case7_1', 'case7_2', 'case7_10'] and table['WTChange'].tolist()[1:] == [2, -4]


def test_compareScans_isEmptyWithoutASecondScan():
    """Different subjects, and one scan under the names of two years, are not compared."""
    names = ['BraTS20_Training_001', 'Brats18_CBICA_A_1', 'BraTS-GLI-00001-000', 'BraTS-GLI-00002-000']
    table = followup.compareScans(pd.DataFrame({'WT': [1.0, 2, 3, 4]}, names))
    assert table.empty and {'subject', 'scan', 'WT', 'WTChange'} <= set(table)
