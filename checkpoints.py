"""Save a training run, stop it in time and resume it."""

import io
import random
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import segmentation_models_pytorch as smp
import torch

import config
from atomic import writeAtomically
from identity import CUT, SEEN, asEarlier, differences, patientDifferences, plain, readIdentity

FORMAT = 3  # of a checkpoint; raised when its layout changes. In format 1 the history counts epochs from 0
_RECIPE = (  # numbers that must not change within a run
    *('SEED', 'LOSS_GAMMA', 'LEARN_RATE', 'WEIGHT_DECAY', 'GRADIENT_CLIP', 'SCHEDULER_FACTOR', 'SCHEDULER_PATIENCE'),
)


def epochs(start):
    """Yield the numbers of the epochs to run, and stop early, with a message, if there is a reason.

    Reasons are: the last `config.PATIENCE` epochs did not improve the validation loss; or the next epoch, if it takes
    as long as the longest so far, would not end within `config.TIME_BUDGET` hours of the start of this process. Nothing
    is lost by stopping: a resumed run reaches the weights of an uninterrupted one.

    Args:
        start: the first epoch to run, counted from 0, as `loadCheckpoint` returns it.

    Yields:
        int, `start` to `config.EPOCHS` - 1.

    Raises:
        ValueError: the last checkpoint goes on at another epoch: the loop was started again without resuming.
    """
    _checkIsNext(start)
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
    """Return why the training should stop before an epoch (from 0), or None; `longest` is in seconds."""
    losses = [row['valLoss'] for row in _checkIsNext(epoch)]
    numWorse = len(losses) - 1 - int(np.argmin(losses)) if losses else 0  # epochs since the best one
    if config.PATIENCE is not None and numWorse >= config.PATIENCE:
        return f'the last {numWorse} did not improve the validation loss (config.PATIENCE = {config.PATIENCE})'
    if config.TIME_BUDGET is not None:
        used = (time.time() - psutil.Process().create_time()) / 3600
        if used + longest / 3600 > config.TIME_BUDGET:
            return (
                f'{used:.2f} of the {config.TIME_BUDGET} hours of config.TIME_BUDGET are used, and an epoch takes '
                f'{longest / 3600:.2f}. Run again to resume'
            )
    return None


def makeCheckpoint(epoch, model, optimizer, scheduler, scaler, trainLoss, valLoss, bestValLoss):
    """Write `config.LAST_CHECKPOINT` and `history.csv`, and `config.BEST_CHECKPOINT` if `valLoss` improved.

    Each file is written atomically. A checkpoint holds the weights, the states of optimizer, scheduler, scaler and
    random generators, the history of losses and learning rates, what the model was trained on (`model.identity`), and
    settings, as tensors and plain values.

    Args:
        epoch: the epoch that has just ended, counted from 0; the history counts from 1.
        model, optimizer, scaler: as in `engine.train`.
        scheduler: learning rate scheduler, or None.
        trainLoss, valLoss: losses of this epoch, per sample.
        bestValLoss: the best validation loss before this epoch; infinite at the start.

    Returns:
        float, the best validation loss so far.

    Raises:
        ValueError: the epoch is not the next one of the last checkpoint, which then stays as it is.
    """
    history = _checkIsNext(epoch)
    trainLoss, valLoss = float(trainLoss), float(valLoss)
    isBest = valLoss < bestValLoss
    best = valLoss if isBest else float(bestValLoss)
    # that of the epoch; the scheduler has already set the next one's
    rate = float(getattr(optimizer, 'learnRate', optimizer.param_groups[0]['lr']))
    history.append({'epoch': int(epoch) + 1, 'trainLoss': trainLoss, 'valLoss': valLoss, 'learnRate': rate})
    checkpoint = {
        'format': FORMAT,
        'settings': _settings(model),
        'recipe': _recipe(),
        'identity': getattr(model, 'identity', None),
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
    with writeAtomically(_historyFile()) as part:
        pd.DataFrame(history).to_csv(part, index=False)
    stream = io.BytesIO()  # torch's own error on a full disk does not name the file
    torch.save(checkpoint, stream)
    content = stream.getbuffer()
    for path in [config.BEST_CHECKPOINT] * isBest + [config.LAST_CHECKPOINT]:
        with writeAtomically(path) as part:
            part.write_bytes(content)
    return best


def _checkIsNext(epoch):
    """Return the last checkpoint's history; raise a ValueError if its run goes on at another epoch than this one."""
    if not Path(config.LAST_CHECKPOINT).exists():
        return []
    try:
        checkpoint = _readCheckpoint(config.LAST_CHECKPOINT, mmap=True)  # the weights stay on the disk
    except ValueError:  # damaged, or on a disk without memory mapping
        checkpoint = _readCheckpoint(config.LAST_CHECKPOINT)
    if checkpoint['nextEpoch'] != epoch:
        raise ValueError(
            f'{config.LAST_CHECKPOINT} goes on with epoch {checkpoint["nextEpoch"] + 1}, not {epoch + 1}: it is not '
            'written over. Resume with loadCheckpoint in the same cell as the loop; for a new run, set another '
            'config.OUTPUT_FOLDER or delete the file.'
        )
    return checkpoint['history']


def loadModel(path):
    """Return the model of a checkpoint, on `config.DEVICE`. It needs no configuration: `engine.predict` follows it.

    Args:
        path: `config.BEST_CHECKPOINT`, or a file that was made elsewhere.

    Returns:
        smp model with the `identity` of its training. It may be trained on: its patients are remembered.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a checkpoint of this package, or its model is not one that `engine.makeModel` makes.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'The checkpoint {path} does not exist.')
    checkpoint = _readCheckpoint(path)
    settings = checkpoint['settings']
    if not hasattr(smp, settings['model']):
        raise ValueError(f'{path} has a {settings["model"]}: make the model yourself and use loadCheckpoint.')
    model = getattr(smp, settings['model'])(
        settings['ENCODER_NAME'],
        encoder_depth=settings['ENCODER_DEPTH'],
        encoder_weights=None,
        decoder_channels=settings['DECODER_CHANNELS'],
        in_channels=len(settings['MODALITIES']),
        classes=settings['NO_CLASSES'],
    )
    _checkWeights(path, checkpoint['model'], model.state_dict())
    model.load_state_dict(checkpoint['model'])
    model.identity = asEarlier(checkpoint['identity'])
    return model.to(config.DEVICE)


def loadCheckpoint(model, optimizer, scheduler, scaler, path):
    """Restore a run from a checkpoint, including the random generators.

    With an optimizer, the run is resumed, and its patch file has to be the one it was trained on. Without one, only
    weights are loaded: if they are trained on other patients next, both are remembered.

    Args:
        model, optimizer, scheduler, scaler: as in `makeCheckpoint`; changed in place. All but the model may be None.
        path: `config.LAST_CHECKPOINT` to resume, `config.BEST_CHECKPOINT` to test. Only tensors and plain values are
            loaded, so a file from elsewhere cannot run code.

    Returns:
        model, optimizer, scheduler, scaler, epoch, trainLoss, valLoss, bestValLoss: `epoch` is the next one to run.
        If the file does not exist: the same objects, epoch 0 and infinite losses.

    Raises:
        ValueError: the file is not a checkpoint of this package, or belongs to another model, modalities or classes;
            or the run is resumed with other training patients or files (those of `config.TRAIN_FILE`), or another
            learning rate, loss or seed.
    """
    if not Path(path).is_file():
        print(f'No checkpoint at {path}: starting from epoch 1.')
        return model, optimizer, scheduler, scaler, 0, float('inf'), float('inf'), float('inf')
    checkpoint = _readCheckpoint(path)
    _checkSettings(path, checkpoint['settings'], _settings(model))
    _checkWeights(path, checkpoint['model'], model.state_dict())
    if optimizer is not None:
        _checkSettings(path, checkpoint['recipe'], _recipe() if checkpoint['recipe'] else {})
        _checkPatients(path, checkpoint['identity'])
    model.load_state_dict(checkpoint['model'])
    model.identity = checkpoint['identity'] if optimizer is not None else asEarlier(checkpoint['identity'])
    if optimizer is not None:
        optimizer.load_state_dict(checkpoint['optimizer'])
    if scheduler is not None and checkpoint['scheduler'] is not None:
        scheduler.load_state_dict(checkpoint['scheduler'])
    if scaler is not None and scaler.is_enabled() and checkpoint['scaler']:  # the state of a disabled one is empty
        scaler.load_state_dict(checkpoint['scaler'])
    _restoreRandomStates(checkpoint['random'])
    losses = (checkpoint[name] for name in ('trainLoss', 'valLoss', 'bestValLoss'))
    return model, optimizer, scheduler, scaler, checkpoint['nextEpoch'], *losses


def readHistory():
    """Return the losses so far, from `history.csv` in the folder of `config.LAST_CHECKPOINT`.

    Returns:
        DataFrame, one row per epoch, with the columns `epoch` (from 1), `trainLoss`, `valLoss`, `learnRate`.

    Raises:
        FileNotFoundError: no epoch has ended yet.
    """
    return pd.read_csv(_historyFile())


def _historyFile():
    return Path(config.LAST_CHECKPOINT).with_name('history.csv')


def _settings(model):
    """Return the settings that must be the same when a checkpoint is written and loaded."""
    names = ('MODALITIES', 'NO_CLASSES', 'CLASS_NAMES', 'ENCODER_NAME', 'ENCODER_DEPTH', 'DECODER_CHANNELS')
    return {'model': type(model).__name__, **{name: plain(getattr(config, name)) for name in names}}


def _recipe():
    """Return the numbers of the training that must be the same when a run is resumed."""
    return {name: plain(getattr(config, name)) for name in _RECIPE}


def _checkSettings(path, found, expected):
    """Raise a ValueError if a checkpoint was made with other settings."""
    for name, value in expected.items():
        if found.get(name) != value:
            raise ValueError(
                f'{path} was made with {name} = {found.get(name)}, this run has {name} = {value}. '
                'Move the file away, or set another config.OUTPUT_FOLDER.'
            )


def _checkPatients(path, identity):
    """Raise a ValueError if a run is resumed and `config.TRAIN_FILE` holds other data than it was trained on."""
    if identity is None or not Path(config.TRAIN_FILE).is_file():
        return  # with another loader, `engine.train` compares
    try:
        found = readIdentity(config.TRAIN_FILE)
    except (OSError, KeyError, ValueError):  # of another version, or damaged: it cannot be trained on
        return
    differing = [*differences(identity, found, {**SEEN, **CUT}), patientDifferences(identity, found)]
    if any(differing):
        raise ValueError(
            f'{path} belongs to a run on other data than {config.TRAIN_FILE}: {"; ".join(filter(None, differing))}. '
            'Set another config.OUTPUT_FOLDER for each run, for example one for each fold.'
        )


def _checkWeights(path, found, expected):
    """Raise a ValueError, before anything is copied, if weights belong to another model."""
    for name in sorted(found.keys() | expected.keys()):
        shapes = [tuple(weights[name].shape) if name in weights else 'absent' for weights in (found, expected)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f'{path} belongs to another model: its {name} is {shapes[0]}, the given model has {shapes[1]}.'
            )


def _readCheckpoint(path, **options):
    """Return the content of a checkpoint file in today's format; raise a ValueError if it cannot be read."""
    try:
        checkpoint = torch.load(str(path), map_location='cpu', weights_only=True, **options)
        found = int(checkpoint['format'])
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f'{path} is not a checkpoint of this package, or is damaged: {reason}') from error
    if found > FORMAT:
        raise ValueError(f'{path} has the format {found}, this version reads up to {FORMAT}: update the package.')
    if found == 1:
        checkpoint['history'] = [{**row, 'epoch': row['epoch'] + 1} for row in checkpoint['history']]
        checkpoint['settings']['model'] = checkpoint['settings'].pop('network')
    if found < 3:
        checkpoint |= {'recipe': {}, 'identity': None}
    return checkpoint


def _randomStates():
    """Return the states of all random generators as tensors and plain values."""
    kind, keys, *rest = np.random.get_state()
    return {
        'torch': torch.get_rng_state(),
        'cuda': torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        'python': random.getstate(),
        'numpy': [kind, keys.tolist(), *rest],  # weights-only loading refuses arrays
    }


def _restoreRandomStates(states):
    """Restore what `_randomStates` returned; GPUs only if their number is the same."""
    torch.set_rng_state(states['torch'])
    if states['cuda'] and len(states['cuda']) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states['cuda'])
    version, keys, gauss = states['python']
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(states['numpy']))
