"""Save a training run, stop it in time and resume it."""

import io
import random
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import segmentation_models_pytorch as smp
import torch

import config
from atomic import writeAtomically
from identity import CUT, SEEN, differences, patientDifferences, plain, readIdentity
from ranks import numRanks
from recipe import buildModel, hoursUsed
from trained import asEarlier, bare, identityOf

FORMAT = 3  # of a checkpoint; raised when its layout changes. In format 1 the history counts epochs from 0
_RECIPE = (  # numbers that must not change within a run
    *('SEED', 'LOSS', 'LOSS_GAMMA', 'LEARN_RATE', 'WEIGHT_DECAY', 'GRADIENT_CLIP', 'SCHEDULE', 'WARMUP', 'POLY_POWER'),
    *('SCHEDULER_FACTOR', 'SCHEDULER_PATIENCE', 'AVERAGE'),
)


def epochs(start):
    """Yield the numbers of the epochs to run, and stop early, with a message, if there is a reason.

    A learning rate that decays by the step ('poly') stops with its schedule, which `engine.train` fits to the time of
    `config.TIME_BUDGET`. A run of another schedule stops if the next epoch, if it takes as long as the longest so far,
    would not end within `config.TIME_BUDGET` hours of the start of this process; it can be resumed and then reaches the
    weights of an uninterrupted one. Any run stops when `config.PATIENCE` epochs did not improve the validation loss.

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
    checkpoint = _checkIsNext(epoch)
    losses = np.array([row['valLoss'] for row in checkpoint['history']]) if checkpoint else np.array([])
    numWorse = len(losses) - 1 - int(np.nanargmin(losses)) if np.isfinite(losses).any() else 0  # since the best one
    if config.PATIENCE is not None and numWorse >= config.PATIENCE:
        return f'the last {numWorse} did not improve the validation loss (config.PATIENCE = {config.PATIENCE})'
    if config.SCHEDULE == 'poly':
        state = (checkpoint and checkpoint['scheduler']) or {}
        if state.get('numSteps', 1) < state.get('planned', 1) and state['last_epoch'] >= state['numSteps']:
            return f'{state["numSteps"]} of {state["planned"]} steps fit into the time, and the learning rate is 0 now'
        return None
    if config.TIME_BUDGET is not None:
        used = hoursUsed()
        if used + longest / 3600 > config.TIME_BUDGET:
            return (
                f'{used:.2f} of the {config.TIME_BUDGET} hours of config.TIME_BUDGET are used, and an epoch takes '
                f'{longest / 3600:.2f}. Run again to resume'
            )
    return None


def makeCheckpoint(
    epoch, model, optimizer, scheduler, scaler, trainLoss, valLoss, bestValLoss, average=None, dice=None
):
    """Write `config.LAST_CHECKPOINT` and `history.csv`, and `config.BEST_CHECKPOINT` if `valLoss` improved.

    Each file is written atomically. A checkpoint holds the weights, the states of optimizer, scheduler, scaler and
    random generators, the history of losses and learning rates, what the model was trained on (`model.identity`), and
    settings, as tensors and plain values.

    Args:
        epoch: the epoch that has just ended, counted from 0; the history counts from 1.
        model, optimizer, scheduler, scaler: as in `engine.train`; the scheduler may be None.
        trainLoss, valLoss: losses of this epoch, per sample. None if nothing is validated: the last epoch is the best.
        bestValLoss: the best validation loss before this epoch; infinite at the start.
        average: moving average of the weights (`engine.makeAverage`). Without an optimizer, its weights are loaded.
        dice: dict of region to Dice of this epoch, as `engine.validate` returns it, for the history.

    Returns:
        float, the best validation loss so far.

    Raises:
        ValueError: the last checkpoint has the epoch already, or is of another run; it then stays as it is.
    """
    before = _checkIsNext(epoch, model)
    history = before['history'] if before else []
    isValidated = valLoss is not None
    trainLoss, valLoss = float(trainLoss), float(valLoss) if isValidated else float('nan')
    isBest = not isValidated or valLoss < bestValLoss
    best = valLoss if isValidated and isBest else float(bestValLoss)
    rate = float(getattr(optimizer, 'learnRate', optimizer.param_groups[0]['lr']))  # the epoch's
    row = {'epoch': int(epoch) + 1, 'trainLoss': trainLoss, 'valLoss': valLoss, 'learnRate': rate}
    history.append(row | {f'dice{region}': float(value) for region, value in (dice or {}).items()})
    checkpoint = {
        'format': FORMAT,
        'settings': _settings(model),
        'recipe': _recipe(),
        'epochs': int(config.EPOCHS),
        'ranks': numRanks(),
        'identity': identityOf(model),
        'nextEpoch': int(epoch) + 1,
        'trainLoss': trainLoss,
        'valLoss': valLoss,
        'bestValLoss': best,
        'history': history,
        'model': bare(model).state_dict(),
        'average': None if average is None else average.state_dict(),
        'optimizer': optimizer.state_dict(),
        'optimizerName': type(optimizer).__name__,
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


def _checkIsNext(epoch, model=None):
    """Return the last checkpoint or None; raise a ValueError if it is another run, or goes on at another epoch."""
    if not Path(config.LAST_CHECKPOINT).exists():
        return None
    try:
        checkpoint = readCheckpoint(config.LAST_CHECKPOINT, mmap=True)  # the weights stay on the disk
    except ValueError:  # damaged, or on a disk without memory mapping
        checkpoint = readCheckpoint(config.LAST_CHECKPOINT)
    # a script may save every few epochs, but never one that the file has
    if checkpoint['nextEpoch'] > epoch or (model is None and checkpoint['nextEpoch'] != epoch):
        raise ValueError(
            f'{config.LAST_CHECKPOINT} goes on with epoch {checkpoint["nextEpoch"] + 1}, not {epoch + 1}: it is not '
            'written over. Resume with loadCheckpoint in the same cell as the loop; for a new run, set another '
            'config.OUTPUT_FOLDER or delete the file.'
        )
    if model is not None and checkpoint['identity'] and identityOf(model):
        _checkPatients(config.LAST_CHECKPOINT, checkpoint['identity'], identityOf(model), 'the model')
    return checkpoint


def loadModel(path):
    """Return the model of a checkpoint, on `config.DEVICE`. It needs no configuration: `engine.predict` follows it.

    A warning says so if the learning rate had not fallen to 0 yet: these are not the final weights of the training.

    Args:
        path: `config.RESULT_CHECKPOINT`, or a file that was made elsewhere.

    Returns:
        smp model with the `identity` of its training. It may be trained on: its patients are remembered.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a checkpoint of this package, or its model is not one that `engine.makeModel` makes.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'The checkpoint {path} does not exist.')
    checkpoint = readCheckpoint(path)
    settings = checkpoint['settings']
    if checkpoint['identity'] is None:  # prediction then follows config
        names = ('MODALITIES', 'NO_CLASSES', 'CLASS_NAMES')
        _checkSettings(path, settings, {name: plain(getattr(config, name)) for name in names})
    if not hasattr(smp, settings['model']):
        raise ValueError(f'{path} has a {settings["model"]}: make the model yourself and use loadCheckpoint.')
    model = buildModel(settings['model'], settings, len(settings['MODALITIES']))
    weights = _bestWeights(checkpoint)
    _checkWeights(path, weights, model.state_dict())
    model.load_state_dict(weights)
    model.identity = asEarlier(checkpoint['identity'])
    _warnOfEarlyWeights(path, checkpoint)
    return model


def loadCheckpoint(model, optimizer, scheduler, scaler, path, average=None):
    """Restore a run from a checkpoint.

    With an optimizer, the run is resumed with its random generators, and its patch files have to be the same. Without
    one, only weights are loaded, those of the moving average if there is one: if they are trained on other patients
    next, both are remembered.

    Args:
        model, optimizer, scheduler, scaler: as in `makeCheckpoint`; changed in place. All but the model may be None.
        average: as in `makeCheckpoint`, to resume.
        path: `config.LAST_CHECKPOINT` to resume, `config.RESULT_CHECKPOINT` to test. Only tensors and plain values are
            loaded, so a file from elsewhere cannot run code.

    Returns:
        model, optimizer, scheduler, scaler, epoch, trainLoss, valLoss, bestValLoss: `epoch` is the next one to run.
        If the file does not exist: the same objects, epoch 0 and infinite losses.

    Raises:
        ValueError: the file is not a checkpoint of this package, or belongs to another model, modalities or classes;
            or the run is resumed with other patients or files (those of `config.TRAIN_FILE` and `config.VAL_FILE`),
            or with another optimizer or other numbers of the training; or there is no file, and the optimizer has
            been used already.
    """
    if not Path(path).is_file():
        _tellFreshStart(path, optimizer)
        return model, optimizer, scheduler, scaler, 0, float('inf'), float('inf'), float('inf')
    checkpoint = readCheckpoint(path)
    _checkSettings(path, checkpoint['settings'], _settings(model))
    weights = checkpoint['model'] if optimizer is not None else _bestWeights(checkpoint)
    _checkWeights(path, weights, bare(model).state_dict())
    if optimizer is not None:
        _checkSettings(path, checkpoint['recipe'], _recipe() if checkpoint['recipe'] else {})
        if checkpoint['optimizerName'] not in (None, type(optimizer).__name__):
            _checkSettings(path, {'optimizer': checkpoint['optimizerName']}, {'optimizer': type(optimizer).__name__})
        _checkFiles(path, checkpoint['identity'])
        if (average is None) != (checkpoint['average'] is None):
            raise ValueError(
                f'{path} was made {"without" if average else "with"} a moving average; resume it likewise.'
            )
        if average is not None:
            average.load_state_dict(checkpoint['average'])
        _checkSteps(path, checkpoint['scheduler'], scheduler)
        _tellOtherLength(checkpoint)
    bare(model).load_state_dict(weights)
    bare(model).identity = checkpoint['identity'] if optimizer is not None else asEarlier(checkpoint['identity'])
    if optimizer is not None:
        _restoreRandomStates(checkpoint['random'])
        optimizer.load_state_dict(checkpoint['optimizer'])
    if average is not None:
        bare(average).identity = identityOf(model)
    if scheduler is not None and checkpoint['scheduler'] is not None:
        scheduler.load_state_dict(checkpoint['scheduler'])
    if scaler is not None and scaler.is_enabled() and checkpoint['scaler']:  # the state of a disabled one is empty
        scaler.load_state_dict(checkpoint['scaler'])
    if optimizer is None:
        _warnOfEarlyWeights(path, checkpoint)
    losses = (checkpoint[name] for name in ('trainLoss', 'valLoss', 'bestValLoss'))
    return model, optimizer, scheduler, scaler, checkpoint['nextEpoch'], *losses


def _warnOfEarlyWeights(path, checkpoint):
    """Warn if the schedule of a checkpoint's training had not reached its end."""
    state = checkpoint['scheduler'] or {}
    if state.get('last_epoch', 0) < state.get('numSteps', 0):
        warnings.warn(
            f'{path} has the weights after epoch {checkpoint["nextEpoch"]} of {checkpoint["epochs"]}, step '
            f'{state["last_epoch"]} of {state["numSteps"]}: the learning rate had not fallen to 0 yet. Final weights '
            'score better; config.RESULT_CHECKPOINT holds them when the training has ended.',
            stacklevel=3,
        )


def _tellFreshStart(path, optimizer):
    """Print that there is no checkpoint; raise a ValueError if the model is not fresh."""
    if optimizer is not None and optimizer.state:
        raise ValueError(f'No checkpoint at {path}, but the model has been trained already: make the model again.')
    print(f'No checkpoint at {path}: {"starting from epoch 1" if optimizer else "the weights stay as they are"}.')


def _bestWeights(checkpoint):
    """Return the weights to predict with: those of the moving average, if there is one."""
    if checkpoint['average'] is None:
        return checkpoint['model']
    prefix = 'module.'
    found = checkpoint['average'].items()
    return {name.removeprefix(prefix): value for name, value in found if name.startswith(prefix)}


def _checkSteps(path, state, scheduler):
    """Raise a ValueError if a schedule that counts batches is resumed with other ones."""
    found, expected = (state or {}).get('stepsPerEpoch'), getattr(scheduler, 'stepsPerEpoch', None)
    if None not in (found, expected) and found != expected:
        raise ValueError(
            f'{path} belongs to a run with {found:g} batches an epoch, this one has {expected:g}: its learning rate '
            'would decay wrongly. Set config.BATCHSIZE and the patches as they were.'
        )


def _tellOtherLength(checkpoint):
    """Print what follows if a run is resumed with another number of epochs or ranks."""
    if (ranks := checkpoint.get('ranks', 1)) != numRanks():
        print(f'The run had {ranks} ranks and now has {numRanks()}: the same batches, but augmented by other draws.')
    before, done = checkpoint['epochs'], checkpoint['nextEpoch']
    if config.SCHEDULE == 'poly' and before is not None and before != config.EPOCHS:
        left, planned = ((1 - min(1, done / epochs)) ** config.POLY_POWER for epochs in (config.EPOCHS, before))
        print(
            f'The run was begun for {before} epochs and now has {config.EPOCHS}: after {done} epochs the learning rate '
            f'goes on at {left:.2f} of its maximum, not at {planned:.2f}.'
        )


def readHistory():
    """Return the losses so far, from `history.csv` in the folder of `config.LAST_CHECKPOINT`.

    Returns:
        DataFrame, one row per epoch, with the columns `epoch` (from 1), `trainLoss`, `valLoss`, `learnRate`
        and, if they were given, `diceWT`, `diceTC`, `diceET`.

    Raises:
        FileNotFoundError: no epoch has ended yet.
    """
    return pd.read_csv(_historyFile())


def _historyFile():
    return Path(config.LAST_CHECKPOINT).with_name('history.csv')


def _settings(model):
    """Return the settings that must be the same when a checkpoint is written and loaded."""
    names = ('MODALITIES', 'NO_CLASSES', 'CLASS_NAMES', 'ENCODER_NAME', 'ENCODER_DEPTH', 'DECODER_CHANNELS')
    return {'model': type(bare(model)).__name__, **{name: plain(getattr(config, name)) for name in names}}


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


def _checkFiles(path, identity):
    """Raise a ValueError if a run is resumed and its patch files hold other data than it was trained on."""
    train, val = (_readIdentity(file) for file in (config.TRAIN_FILE, config.VAL_FILE))
    if identity and identity['patients'] and train:
        # the file may hold more than is trained on; `engine.train` compares what the loader gives
        used = {patient: content for patient, content in train['patients'].items() if patient in identity['patients']}
        _checkPatients(path, identity, {**train, 'patients': used}, f'config.TRAIN_FILE, {config.TRAIN_FILE}')
    if identity and identity['validated'] and val:
        validated = {**val, 'patients': identity['validated']}
        used = {patient: content for patient, content in val['patients'].items() if patient in identity['validated']}
        _checkPatients(path, validated, {**val, 'patients': used}, f'config.VAL_FILE, {config.VAL_FILE}')


def _readIdentity(file):
    """Return the identity of a patch file; None if it is missing, damaged or of another version."""
    try:
        return readIdentity(file)
    except (OSError, KeyError, ValueError):
        return None


def _checkPatients(path, identity, found, where):
    """Raise a ValueError if the identity of a checkpoint differs from another one."""
    differing = [*differences(identity, found, {**SEEN, **CUT}), patientDifferences(identity, found)]
    if any(differing):
        raise ValueError(
            f'{path} belongs to a run on other data than {where}: {"; ".join(filter(None, differing))}. '
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


def readCheckpoint(path, **options):
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
        checkpoint |= {'recipe': {}, 'identity': None, 'average': None, 'epochs': None, 'optimizerName': None}
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
