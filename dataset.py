"""Read the patches of an HDF5 file, or of its shards, for training and validation."""

import os
import shutil
import tempfile
from pathlib import Path

import h5py
import hdf5plugin  # noqa: F401 - decompresses the patches
import numpy as np
import psutil
import torch

import config
from provenance import checkPatchFile, differences, readProvenance
from transforms import transformCase

_DRIVE = '/content/drive/'  # where Colab mounts Drive


class BRATSDataset(torch.utils.data.Dataset):
    """Patches of an `.h5` file as (image float32 (C, 128, 128), label int64 (128, 128)).

    Patches that need at most the fraction `config.CACHE_PATCHES` of the machine's memory are held there, shared by the
    workers. Otherwise they are read from the file; a file on a mounted Drive is copied to the local disk first.

    Args:
        file: path of a file written by `preprocess.makeDataset`; or a list of the paths of all its shards.
        noSamples: number of patches to use, from the first; None: all.
        transform: torchio transform, applied to each patch on the CPU; None: the patch as stored.
        raw: give a loader the patches in the dtypes of the file, float16 (or float32) and uint8, which takes less time.
            `batched.Batched`, `engine.train` and `engine.validate` convert them on the device. Not with a transform.

    Attributes:
        file: the open h5py.File, or `Shards` of several. Each loader process opens its own. `file.close()` may be
            called at any time; a patch requested later opens the file again.
        provenance: what the patches were cut from and how, see `provenance.py`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is of another version, has fewer patches than requested, or was cut with other input
            settings (`provenance.INPUT`) than `config` has.
    """

    def __init__(self, file, noSamples=None, transform=None, raw=False):
        paths = [str(path) for path in file] if isinstance(file, (list, tuple)) else str(file)
        for path in paths if isinstance(paths, list) else [paths]:
            if not Path(path).is_file():
                raise FileNotFoundError(f'{path} does not exist; preprocess.makeDataset writes it.')
        if raw and transform is not None:
            raise ValueError('raw = True returns patches as stored; it cannot be combined with a transform.')
        self.path, self.transform, self.raw, self._cache, self.provenance = paths, transform, raw, None, None
        try:
            self._open()
        except KeyError as error:
            raise ValueError(f'{file} is of another version ({error}); preprocess.makeDataset cuts it anew.') from error
        checkPatchFile(file, self.provenance)
        self.patientNumbers = self.file['patient'][:noSamples]  # index of each patch's patient in the provenance
        numPatches = len(self.file['image'])
        self.noSamples = numPatches if noSamples is None else int(noSamples)
        if not 0 < self.noSamples <= numPatches:
            raise ValueError(f'{file} has {numPatches} patches, {noSamples} were requested.')
        size = sum(self.file[name].nbytes for name in ('image', 'label')) / numPatches * self.noSamples
        if size <= config.CACHE_PATCHES * _memory():
            # as tensors: workers share their memory, whether forked or spawned
            self._cache = tuple(torch.from_numpy(self.file[name][: self.noSamples]) for name in ('image', 'label'))
        elif isinstance(paths, str) and str(Path(paths).resolve()).startswith(_DRIVE):  # a request per read
            self.file.close()
            self.path = str(shutil.copyfile(file, Path(tempfile.mkdtemp()) / Path(file).name))
            self._open()

    def _open(self):
        self.file = openPatches(self.path)
        self._process = os.getpid()
        found = self.file.provenance if isinstance(self.file, Shards) else readProvenance(self.file)
        if self.provenance not in (None, found):
            raise ValueError(f'{self.path} was cut anew since this dataset was made: make the dataset again.')
        self.provenance = found

    def __getstate__(self):
        return {**vars(self), 'file': None}  # HDF5 handles cannot be sent to another process

    def __len__(self):
        return self.noSamples

    def _read(self, index):
        """Return image and label of a patch as stored."""
        if self._cache is None:
            if not self.file or self._process != os.getpid():
                self._open()
            # one by one: h5py takes ten times as long for a list of indices
            return tuple(torch.from_numpy(self.file[name][index]) for name in ('image', 'label'))
        return tuple(values[index] for values in self._cache)

    def __getitem__(self, index):
        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f'Patch {index} of {len(self)} was requested.')
        image, label = self._read(index % len(self))
        if self.transform is None:
            return image.float(), label.long()
        x, y = transformCase(image[..., None], label[..., None], self.transform)
        return x[0].contiguous(), y[0].long()  # (1, C, W, H) -> (C, W, H)

    def __getitems__(self, indices):
        """Return the samples of a batch; raw ones are read in the order of the file, which is faster."""
        if not self.raw:
            return [self[index] for index in indices]
        read = {index: self._read(index) for index in sorted({int(index) for index in indices})}
        return [read[int(index)] for index in indices]


def _memory():
    """Return the memory in bytes of the machine, or of the container that this process runs in."""
    limits = [psutil.virtual_memory().total]
    for file in map(Path, ('/sys/fs/cgroup/memory.max', '/sys/fs/cgroup/memory/memory.limit_in_bytes')):
        if file.is_file() and (limit := file.read_text().strip()).isdigit():  # otherwise 'max'
            limits.append(int(limit))
    return min(limits)


def openPatches(path):
    """Return an open patch file for reading: an h5py.File, or `Shards` for a list of paths."""
    return Shards(path) if isinstance(path, (list, tuple)) else h5py.File(path, 'r')


class Shards:
    """The shards of a patch file, read like one h5py.File.

    The patches have the order of the file that `preprocess.makeDataset` writes without `part`.

    Args:
        paths: of all shards, in any order.

    Raises:
        OSError, KeyError, ValueError: not patch files of this version, or not all shards of one file.
    """

    def __init__(self, paths):
        self.files = [h5py.File(path, 'r') for path in paths]
        owners = [readProvenance(file) for file in self.files]
        self.provenance, places = _mergeProvenances(owners), {}
        # patient -> index of its file, and the indices of its patches in that file
        for number, (file, own) in enumerate(zip(self.files, owners, strict=True)):
            ids, column = list(own['patients']), file['patient'][:]
            for owner in np.unique(column):
                places[ids[owner]] = number, np.flatnonzero(column == owner)
        ordered = [
            (number, *places[patient])
            for number, patient in enumerate(self.provenance['patients'])
            if patient in places
        ]
        self.patientOf, self.fileOf = (
            np.concatenate([np.full(len(each[2]), each[column]) for each in ordered]) for column in (0, 1)
        )
        self.indexIn = np.concatenate([numbers for _, _, numbers in ordered])

    def __getitem__(self, name):
        """Return a dataset of all shards by its name."""
        if name == 'patient':
            return self.patientOf
        return _Column(self, name)

    def __bool__(self):
        return all(map(bool, self.files))

    def close(self):
        """Close all files."""
        for file in self.files:
            file.close()


def _mergeProvenances(shards):
    """Return the provenance of the whole patch file, patients in the file list's order, from those of its shards."""
    numbers = [found.get('shard', [0, 1]) for found in shards]
    if sorted(numbers) != [[number, len(shards)] for number in range(len(shards))]:
        raise ValueError(f'The files are the shards {numbers}; all shards [i, n] of one file were expected.')
    for found in shards[1:]:
        if texts := differences(shards[0], found, patients=False):
            raise ValueError(f'The shards were cut with other settings: {"; ".join(texts)}.')
    patients = {patient: sums for found in shards for patient, sums in found['patients'].items()}
    if len(patients) < sum(len(found['patients']) for found in shards):
        raise ValueError('The shards have patients in common: they are not of one file list.')
    rows = {patient: row for found in shards for patient, row in found.get('rows', {}).items()}
    ordered = {patient: patients[patient] for patient in sorted(patients, key=lambda patient: rows.get(patient, 0))}
    return {'format': shards[0]['format'], 'settings': shards[0]['settings'], 'patients': ordered}


class _Column:
    """One dataset of all shards, indexed like an h5py.Dataset."""

    def __init__(self, shards, name):
        self.shards, self.name = shards, name

    def __len__(self):
        return len(self.shards.indexIn)

    @property
    def nbytes(self):
        return sum(file[self.name].nbytes for file in self.shards.files)

    def __getitem__(self, key):
        """Return one patch by its index, or the patches of a slice."""
        files, numbers = self.shards.fileOf[key], self.shards.indexIn[key]
        if np.ndim(numbers) == 0:
            return self.shards.files[files][self.name][int(numbers)]
        columns = [file[self.name] for file in self.shards.files]
        patches = np.empty((len(numbers), *columns[0].shape[1:]), np.result_type(*columns))
        for number, column in enumerate(columns):
            isHere = files == number
            if isHere.any():
                patches[isHere] = column[: numbers[isHere].max() + 1][numbers[isHere]]
        return patches
