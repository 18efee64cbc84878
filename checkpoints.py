"""Keep a run: what it has learned so far, whether it goes on, and how it is taken up again."""

import io
import random
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch

import config
from files import writeWhole

FORMAT = 1  # of a checkpoint; raised when its layout changes


def epochs(start):
    """Yields the numbers of the epochs to run, and ends when there is reason to, which it prints.

    The reasons: `config.EPOCHS` have been run; the last `config.PATIENCE` epochs of the last checkpoint did not improve
    the validation loss; or the next epoch, at the pace of the longest one here, would not end within
    `config.TIME_BUDGET` hours of the start of this process. Each time the checkpoint has been written, so that nothing
    is lost: started again, the run goes on, to the weights it would have had without the stop.

    Args:
        start: the first epoch to run, as `loadCheckpoint` gives it.
    """
    longest = 0.0  # seconds
    for epoch in range(start, config.EPOCHS):
        reason = _reasonToStop(epoch, longest)
        if reason:
            print(f'Stopped after {epoch} of {config.EPOCHS} epochs: {reason}.')
            return
        begin = time.monotonic()
        yield epoch
        longest = max(longest, time.monotonic() - begin)


def _reasonToStop(epoch, longest):
    losses = [row['valLoss'] for row in lastHistory() if row['epoch'] < epoch]
    worse = len(losses) - 1 - int(np.argmin(losses)) if losses else 0  # epochs since the best one
    if config.PATIENCE is not None and worse >= config.PATIENCE:
        return f'the last {worse} did not improve the validation loss (config.PATIENCE = {config.PATIENCE})'
    if config.TIME_BUDGET is not None:
        used = (time.time() - psutil.Process().create_time()) / 3600
        if used + longest / 3600 > config.TIME_BUDGET:
            return (
                f'{used:.2f} of the {config.TIME_BUDGET} hours of config.TIME_BUDGET are used, and an epoch takes '
                f'{longest / 3600:.2f}. Start again to go on'
            )
    return None


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
    history = [row for row in lastHistory() if row['epoch'] < epoch]
    history.append({'epoch': int(epoch), 'trainLoss': trainLoss, 'valLoss': valLoss, 'learnRate': rate})
    checkpoint = {
        'format': FORMAT,
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


def lastHistory():
    """Gives the last checkpoint's history, a dict for each epoch; none where there is no checkpoint to be read."""
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
    if newest > FORMAT:
        raise ValueError(f'{path} has the format {newest}, this version reads up to {FORMAT}: update it.')
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
