"""Load patches; and re-export the calls that the contract names under `utils`."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import psutil
import torch

import config
from checkpoints import epochs, loadCheckpoint, loadModel, makeCheckpoint, readHistory
from cohort import checkFiles, describeCohort, readSplit, split, splitFolds, usable, writeSplit
from identity import checkPatchFile
from metrics import computeMetrics
from parts import openPatches
from patients import makeFileList
from pictures import makeGifs, plotCurves, plotPrediction, plotSample, plotTransforms
from postprocess import saveProbabilities, saveSegmentation
from transforms import maskFunction, transformCase

__all__ = [
    'BRATSDataset',
    'checkFiles',
    'computeMetrics',
    'describeCohort',
    'epochs',
    'loadCheckpoint',
    'loadModel',
    'makeCheckpoint',
    'makeFileList',
    'makeGifs',
    'maskFunction',
    'plotCurves',
    'plotPrediction',
    'plotSample',
    'plotTransforms',
    'readHistory',
    'readSplit',
    'saveProbabilities',
    'saveSegmentation',
    'split',
    'splitFolds',
    'usable',
    'writeSplit',
]


_DRIVE = '/content/drive/'  # where Colab mounts Drive


class BRATSDataset(torch.utils.data.Dataset):
    """Patches of an `.h5` file as (image float32 (C, 128, 128), label int64 (128, 128)).

    Patches are held in memory, shared by the workers, if they take at most the fraction `config.CACHE_PATCHES` of the
    machine's. Otherwise they are read from the file; one on a mounted Drive is copied to the local disk first.

    Args:
        file: path of a file written by `preprocess.makeDataset`; or a list of the paths of all its parts.
        noSamples: number of patches to use, from the first; None: all.
        transform: torchio transform, applied to each patch on the CPU; None: the patch as stored.
        raw: a loader gets batches as stored, float16 (or float32) and uint8, for `batched.Batched`, `engine.train` and
            `engine.validate`, which convert them on the device. Not with a transform.

    Attributes:
        file: the open h5py.File, or `parts.Parts` of several. Each loader process opens its own. `file.close()` may be
            called at any time; a patch requested later opens the file again.
        identity: what the patches were cut from and how, see `identity.identify`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is of another version, has fewer patches than requested, or was cut with other modalities,
            classes, patch size or stretching than `config` has.
    """

    def __init__(self, file, noSamples=None, transform=None, raw=False):
        paths = [str(path) for path in file] if isinstance(file, (list, tuple)) else str(file)
        for path in paths if isinstance(paths, list) else [paths]:
            if not Path(path).is_file():
                raise FileNotFoundError(f'{path} does not exist; preprocess.makeDataset writes it.')
        if raw and transform is not None:
            raise ValueError('raw = True returns patches as stored; it cannot be combined with a transform.')
        self.path, self.transform, self.raw, self._cache, self._content = paths, transform, raw, None, None
        try:
            self._open()
            self.identity = json.loads(self.file['identity'][()])
        except (KeyError, json.JSONDecodeError) as error:
            raise ValueError(f'{file} is of another version ({error}); preprocess.makeDataset cuts it anew.') from error
        checkPatchFile(file, self.identity)
        # which of the identity's patients each patch comes from
        self.patientNumbers = self.file['patient'][:noSamples] if 'patient' in self.file else None
        numPatches = len(self.file['image'])
        self.noSamples = numPatches if noSamples is None else int(noSamples)
        if not 0 < self.noSamples <= numPatches:
            raise ValueError(f'{file} has {numPatches} patches, {noSamples} were requested.')
        size = sum(self.file[name].nbytes for name in ('image', 'label')) / numPatches * self.noSamples
        if size <= config.CACHE_PATCHES * _memory():
            # as tensors: workers share their memory, whether forked or spawned
            self._cache = tuple(torch.from_numpy(self.file[name][: self.noSamples]) for name in ('image', 'label'))
        elif isinstance(paths, str) and str(Path(paths).resolve()).startswith(_DRIVE):  # a request for each random read
            self.file.close()
            self.path = str(shutil.copyfile(file, Path(tempfile.mkdtemp()) / Path(file).name))
            self._open()

    def _open(self):
        self.file = openPatches(self.path)
        self._process = os.getpid()
        content = self.file['identity'][()] if 'identity' in self.file else None
        if self._content not in (None, content):
            raise ValueError(f'{self.path} was cut anew since this dataset was made: make the dataset again.')
        self._content = content

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
        """Return the samples of a batch; raw ones are read in the order of the file."""
        if not self.raw:
            return [self[index] for index in indices]
        read = {index: self._read(index) for index in sorted({int(index) for index in indices})}
        return [read[int(index)] for index in indices]


def _memory():
    """Return the bytes of memory of the machine, or of the container that this process runs in."""
    limits = [psutil.virtual_memory().total]
    for file in map(Path, ('/sys/fs/cgroup/memory.max', '/sys/fs/cgroup/memory/memory.limit_in_bytes')):
        if file.is_file() and (limit := file.read_text().strip()).isdigit():  # otherwise 'max'
            limits.append(int(limit))
    return min(limits)
