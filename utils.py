"""The patch dataset and the checkpoints; and, by import, the calls that users know under `utils`."""

import io
import os
import random
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import torch

import config
from checks import checkFiles
from cohort import describeCohort, readSplit, split, splitFolds, writeSplit
from files import writeWhole
from gifs import makeGifs
from metrics import computeMetrics
from patients import makeFileList
from pictures import plotCurves, plotPrediction, plotSample, plotTransforms
from results import saveProbabilities, saveSegmentation
from transforms import maskFunction, transformCase

__all__ = [
    'BRATSDataset',
    'checkFiles',
    'computeMetrics',
    'describeCohort',
    'loadCheckpoint',
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
    'writeSplit',
]

CHECKPOINT_FORMAT = 1  # raised when a checkpoint's layout changes


class BRATSDataset(torch.utils.data.Dataset):
    """The patches of an `.h5` file: (image float32 (C, 128, 128), label int64 (128, 128)).

    Args:
        file: path of a file that `preprocess.makeDataset` wrote.
        noSamples: how many of its patches to use, from the first; None: all.
        transform: torchio transform of a patch, run here on the CPU; None: the patch as it is.
        raw: a loader gets batches as they are stored, float16 (or float32) and uint8: for
            `batched.Batched`, `engine.train` and `validate`, which cast them on the device. Without a transform only.

    Attributes:
        file: the open h5py.File. Each process that loads opens its own; `file.close()` may be called at any time, and a
            patch asked for later opens it again.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file has fewer patches, or those of other modalities than `config.MODALITIES`.
    """

    def __init__(self, file, noSamples=None, transform=None, raw=False):
        if not Path(file).is_file():
            raise FileNotFoundError(f'{file} does not exist; preprocess.makeDataset writes it.')
        if raw and transform is not None:
            raise ValueError('raw = True hands out what is stored; it cannot go with a transform.')
        self.path, self.transform, self.raw, self._cache = str(file), transform, raw, None
        self._open()
        images = self.file['image']
        self.noSamples = len(images) if noSamples is None else int(noSamples)
        if not 0 < self.noSamples <= len(images):
            raise ValueError(f'{file} has {len(images)} patches, {noSamples} were asked for.')
        if images.shape[1] != len(config.MODALITIES):
            raise ValueError(f'{file} has {images.shape[1]} modalities, config.MODALITIES {len(config.MODALITIES)}.')
        if images.nbytes / len(images) * self.noSamples <= config.CACHE_PATCHES * 1e9:
            # tensors: forked workers share their memory, and spawned ones get them shared by torch's pickling
            self._cache = tuple(torch.from_numpy(self.file[name][: self.noSamples]) for name in ('image', 'label'))

    def _open(self):
        self.file = h5py.File(self.path, 'r')
        self._process = os.getpid()

    def __getstate__(self):
        return {**vars(self), 'file': None}  # a handle does not travel to another process

    def __len__(self):
        return self.noSamples

    def _read(self, index):
        """Gives image and label of a patch as stored."""
        if self._cache is None:
            if not self.file or self._process != os.getpid():
                self._open()
            # one at a time: h5py takes ten times as long for a list of indices
            return tuple(torch.from_numpy(self.file[name][index]) for name in ('image', 'label'))
        return tuple(values[index] for values in self._cache)

    def __getitem__(self, index):
        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f'Patch {index} of {len(self)} was asked for.')
        image, label = self._read(index % len(self))
        if self.transform is None:
            return image.float(), label.long()
        x, y = transformCase(image[..., None], label[..., None], self.transform)
        return x[0].contiguous(), y[0].long()  # (1, C, W, H) -> (C, W, H)

    def __getitems__(self, indices):
        """Gives the samples of a batch; raw ones are read in the order in which they lie in the file."""
        if not self.raw:
            return [self[index] for index in indices]
        read = {index: self._read(index) for index in sorted({int(index) for index in indices})}
        return [read[int(index)] for index in indices]


def makeCheckpoint(epoch, model, optimizer, scheduler, scaler, trainLoss, valLoss, bestValLoss):
    """Writes `config.LAST_CHECKPOINT`, before it `config.BEST_CHECKPOINT` where `valLoss` improved, and `history.csv`.

    Each file is written whole or not at all. A checkpoint holds the weights, the states of optimizer, scheduler, scaler
    and random generators, the history of the losses and the settings, all as plain values and tensors.

    Args:
        epoch: the one that has just ended, from 0.
        model, optimizer, scaler: as in `engine.train`.
        scheduler: or None.
        trainLoss, valLoss: of this epoch, per sample.
        bestValLoss: the best one before; infinite at the start.

    Returns:
        float: the best validation loss so far.
    """
    trainLoss, valLoss = float(trainLoss), float(valLoss)
    isBest = valLoss < bestValLoss
    best = valLoss if isBest else float(bestValLoss)
    rate = float(optimizer.param_groups[0]['lr'])
    history = [row for row in _lastHistory() if row['epoch'] < epoch]
    history.append({'epoch': int(epoch), 'trainLoss': trainLoss, 'valLoss': valLoss, 'learnRate': rate})
    checkpoint = {
        'format': CHECKPOINT_FORMAT,
        'settings': _settings(model),
        'nextEpoch': int(epoch) + 1,
        'trainLoss': trainLoss,
        'valLoss': valLoss,
        'bestValLoss': best,
        'history': history,
        'model': model.state_dict(),
        'optimizer': optimizer.state_dict(),
        'scheduler': None if scheduler is None else scheduler.state_dict(),
        'scaler': scaler.state_dict(),
        'random': _randomStates(),
    }
    with writeWhole(_historyFile()) as part:
        pd.DataFrame(history).to_csv(part, index=False)
    stream = io.BytesIO()  # torch itself does not name the file that a full disk cut off
    torch.save(checkpoint, stream)
    content = stream.getbuffer()
    for path in [config.BEST_CHECKPOINT] * isBest + [config.LAST_CHECKPOINT]:
        with writeWhole(path) as part:
            part.write_bytes(content)
    return best


def loadCheckpoint(model, optimizer, scheduler, scaler, path):
    """Restores a run from a checkpoint, random generators included, and gives what a loop needs to go on.

    Args:
        model, optimizer, scheduler, scaler: as in `makeCheckpoint`; filled in place. All but the model may be None.
        path: `config.LAST_CHECKPOINT` to go on, `config.BEST_CHECKPOINT` to test. Only tensors and plain values are
            read: nothing that a foreign file may contain is run.

    Returns:
        model, optimizer, scheduler, scaler, epoch, trainLoss, valLoss, bestValLoss: `epoch` is the next one to run.
        With no file there, the objects as they are and a fresh start: epoch 0 and infinite losses.

    Raises:
        ValueError: the file is not a checkpoint of this package, or of another network, other modalities or classes.
    """
    if not Path(path).is_file():
        print(f'No checkpoint at {path}: a fresh start.')
        return model, optimizer, scheduler, scaler, 0, float('inf'), float('inf'), float('inf')
    checkpoint = _readCheckpoint(path)
    _checkSettings(path, checkpoint['settings'], _settings(model))
    _checkWeights(path, checkpoint['model'], model.state_dict())
    model.load_state_dict(checkpoint['model'])
    if optimizer is not None:
        optimizer.load_state_dict(checkpoint['optimizer'])
    if scheduler is not None and checkpoint['scheduler'] is not None:
        scheduler.load_state_dict(checkpoint['scheduler'])
    if scaler is not None and scaler.is_enabled() and checkpoint['scaler']:  # one saved while disabled is empty
        scaler.load_state_dict(checkpoint['scaler'])
    _restoreRandomStates(checkpoint['random'])
    losses = (checkpoint[name] for name in ('trainLoss', 'valLoss', 'bestValLoss'))
    return model, optimizer, scheduler, scaler, checkpoint['nextEpoch'], *losses


def readHistory():
    """Gives the losses so far, from `history.csv` beside `config.LAST_CHECKPOINT`.

    Returns:
        DataFrame with the columns `epoch`, `trainLoss`, `valLoss`, `learnRate`, one row per epoch.

    Raises:
        FileNotFoundError: no epoch has ended yet.
    """
    return pd.read_csv(_historyFile())


def _historyFile():
    return Path(config.LAST_CHECKPOINT).with_name('history.csv')


def _lastHistory():
    """Gives the rows of the last checkpoint's history; none where there is no checkpoint that can be read."""
    try:
        # mmap: the weights beside the history stay on the disk
        return torch.load(str(config.LAST_CHECKPOINT), map_location='cpu', weights_only=True, mmap=True)['history']
    except Exception:
        return []


def _settings(model):
    """Gives what a checkpoint's user must agree on with its maker."""
    names = ('MODALITIES', 'NO_CLASSES', 'CLASS_NAMES', 'ENCODER_NAME', 'ENCODER_DEPTH', 'DECODER_CHANNELS')
    values = {name: getattr(config, name) for name in names}
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return {'network': type(model).__name__, **values}


def _checkSettings(path, found, expected):
    """Refuses, in words, a checkpoint whose network would read or name other things."""
    for name, value in expected.items():
        if found.get(name) != value:
            raise ValueError(
                f'{path} was made with {name} = {found.get(name)}, this run has {name} = {value}: '
                'move the file away, or set another config.OUTPUT_FOLDER.'
            )


def _checkWeights(path, found, expected):
    """Refuses weights of another network before any of them is copied."""
    for name in sorted(found.keys() | expected.keys()):
        shapes = [tuple(weights[name].shape) if name in weights else 'absent' for weights in (found, expected)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f'{path} is of another network: its {name} is {shapes[0]}, the given model has {shapes[1]}.'
            )


def _readCheckpoint(path):
    try:
        checkpoint = torch.load(str(path), map_location='cpu', weights_only=True)
        newest = checkpoint['format']
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f'{path} is not a checkpoint of this package, or is damaged: {reason}') from error
    if newest > CHECKPOINT_FORMAT:
        raise ValueError(f'{path} has the format {newest}, this version reads up to {CHECKPOINT_FORMAT}: update it.')
    return checkpoint


def _randomStates():
    kind, keys, *rest = np.random.get_state()
    return {
        'torch': torch.get_rng_state(),
        'cuda': torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        'python': random.getstate(),
        'numpy': [kind, keys.tolist(), *rest],  # weights-only loading refuses the array
    }


def _restoreRandomStates(states):
    torch.set_rng_state(states['torch'])
    if states['cuda'] and len(states['cuda']) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states['cuda'])
    version, keys, gauss = states['python']
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(states['numpy']))
