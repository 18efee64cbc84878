"""Measure how fast patches are written and read, shuffled, and how large they are, by filters of HDF5.

    python -m benchmarks.compression FILE [PATCHES]

FILE is a patch file of `preprocess.makeDataset`. Chunks and checksums are as there.
"""

import sys
import tempfile
import time
from pathlib import Path

import h5py
import hdf5plugin
import numpy as np
import pandas as pd

FILTERS = {
    'Zstandard, level 1: ours': hdf5plugin.Zstd(clevel=1),
    'lzf, of h5py': {'compression': 'lzf'},
    'gzip, level 1': {'compression': 'gzip', 'compression_opts': 1},
    'LZ4': hdf5plugin.LZ4(),
    'bitshuffle, LZ4': hdf5plugin.Bitshuffle(cname='lz4'),
    'bitshuffle, Zstandard': hdf5plugin.Bitshuffle(cname='zstd', clevel=1),
    'none': {},
}


def main(file, numPatches=1200, rounds=3):
    """Print, and return, ms to write and to read a patch and its label, the lowest of the rounds, and kB of a patch."""
    with h5py.File(file) as opened:
        arrays = {name: opened[name][: int(numPatches)] for name in ('image', 'label')}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for name, options in FILTERS.items():
                path = Path(folder, 'patches.h5')
                rows.append({'filter': name, 'written': _write(path, arrays, options), 'read': _read(path)})
                rows[-1]['kB'] = path.stat().st_size / len(arrays['label']) / 1e3
    table = pd.DataFrame(rows).groupby('filter', sort=False).min().reset_index()
    print(table.round(2).to_string(index=False))
    return table


def _write(path, arrays, options):
    begin = time.perf_counter()
    with h5py.File(path, 'w', rdcc_nbytes=0) as file:
        for name, values in arrays.items():
            file.create_dataset(name, data=values, chunks=(1, *values.shape[1:]), fletcher32=True, **options)
    return 1e3 * (time.perf_counter() - begin) / len(values)


def _read(path):
    with h5py.File(path) as file:
        image, label = file['image'], file['label']
        order = np.random.default_rng(0).permutation(len(label)).tolist()
        begin = time.perf_counter()
        for number in order:
            image[number], label[number]
        return 1e3 * (time.perf_counter() - begin) / len(order)


if __name__ == '__main__':
    main(*sys.argv[1:])
