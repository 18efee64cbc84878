"""Read the parts of a patch file as one file."""

import json

import h5py
import numpy as np

from identity import readIdentity


def openPatches(path):
    """Return an open patch file for reading: an h5py.File, or `Parts` for a list of paths."""
    return Parts(path) if isinstance(path, (list, tuple)) else h5py.File(path, 'r')


class Parts:
    """The parts of a patch file that `preprocess.makeDataset` cut with `part`, read like the one h5py.File.

    The patches have the order of the one file, whatever the number of parts.

    Args:
        paths: of all parts, in any order.

    Raises:
        OSError, KeyError, ValueError: as in `identity.readIdentity`.
    """

    def __init__(self, paths):
        self.identity, self.files = readIdentity(paths), [h5py.File(path, 'r') for path in paths]
        places = {}  # patient -> its file and the numbers of its patches there, which stand together
        for number, file in enumerate(self.files):
            patients, owners = list(readIdentity(file)['patients']), file['patient'][:]
            for owner in np.unique(owners):
                places[patients[owner]] = number, np.flatnonzero(owners == owner)
        ordered = [(patient, *places[patient]) for patient in self.identity['patients'] if patient in places]
        self.fileOf = np.concatenate([np.full(len(numbers), file) for _, file, numbers in ordered])
        self.indexIn = np.concatenate([numbers for _, _, numbers in ordered])
        ids = {patient: number for number, patient in enumerate(self.identity['patients'])}
        self.patientOf = np.concatenate([np.full(len(numbers), ids[patient]) for patient, _, numbers in ordered])

    def __getitem__(self, name):
        """Return a dataset by its name, or the identity of the whole."""
        if name == 'patient':
            return self.patientOf
        return {(): json.dumps(self.identity).encode()} if name == 'identity' else _Column(self, name)

    def __contains__(self, name):
        return name in self.files[0]

    def __bool__(self):
        return all(map(bool, self.files))

    def close(self):
        """Close all files."""
        for file in self.files:
            file.close()


class _Column:
    """One dataset of all parts."""

    def __init__(self, parts, name):
        self.parts, self.name = parts, name

    def __len__(self):
        return len(self.parts.indexIn)

    @property
    def nbytes(self):
        return sum(file[self.name].nbytes for file in self.parts.files)

    def __getitem__(self, key):
        """Return one patch by its number, or those of a slice."""
        files, numbers = self.parts.fileOf[key], self.parts.indexIn[key]
        if np.ndim(numbers) == 0:
            return self.parts.files[files][self.name][int(numbers)]
        columns = [file[self.name] for file in self.parts.files]
        patches = np.empty((len(numbers), *columns[0].shape[1:]), np.result_type(*columns))
        for number, column in enumerate(columns):
            isHere = files == number
            if isHere.any():
                patches[isHere] = column[: numbers[isHere].max() + 1][numbers[isHere]]
        return patches
