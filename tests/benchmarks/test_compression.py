"""The filters of HDF5 are compared on the patches of a file."""

import h5py
import numpy as np

from benchmarks import compression


def test_main_measuresEachFilter(tmp_path):
    """Every filter has its row; patches of zeros are smallest where they are compressed."""
    with h5py.File(tmp_path / 'a.h5', 'w') as file:
        file['image'], file['label'] = np.zeros((6, 2, 64, 64), np.float16), np.zeros((6, 64, 64), np.uint8)
    table = compression.main(tmp_path / 'a.h5', 4, rounds=1).set_index('filter')
    assert list(table.index) == list(compression.FILTERS) and (table > 0).all().all()
    assert table['kB'].drop('none').max() < table['kB']['none'] > 64 * 64 * 5 / 1000
