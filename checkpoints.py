"""Save a run, stop it in time and resume it."""

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
from engine import buildModel, hoursUsed
from provenance import SETTINGS, asEarlier, differences, plain, provenanceOf, readProvenance, unwrap
from ranks import numRanks

FORMAT = 4  # of a checkpoint; raised when its layout changes
_RECIPE = (  # settings of the training that must not change within a run
    *('SEED', 'LOSS', 'LOSS_GAMMA', 'LEARN_RATE', 'WEIGHT_DECAY', 'GRADIENT_CLIP', 'SCHEDULE', 'WARMUP', 'POLY_POWER'),
    *('SCHEDULER_FACTOR', 'SCHEDULER_PATIENCE', 'AVERAGE', 'MODALITY_DROPOUT', 'START'),
)


def epochs(start):
    """Yield the numbers of the epochs to run. Stop early, with a message, if there is a reason.

    - 'poly': the schedule has ended, or `config.TIME_BUDGET` is over. `engine.train` shortens the schedule if not all
      steps fit into it.
    - Other schedules: the next epoch would not end within `config.TIME_BUDGET` hours of the start of this process, if
      it took as long as the longest so far. The run can be resumed, and then reaches the weights of an uninterrupted
      one.
    - Any schedule: the last `config.PATIENCE` epochs did not improve the validation loss.

    Args:
        start: the first epoch to run, counted from 0, as `loadCheckpoint` returns it.

    Yields:
        int, `start` to `config.EPOCHS` - 1.

    Raises:
        ValueError: the next epoch of the last checkpoint is not `start`: the loop was started again without resuming.
    """
    checkpoint = _checkIsNext(start)
    state = (checkpoint and checkpoint['scheduler']) or {}
    # only a shortened run has ended for good; any other goes on if config.EPOCHS is raised
    hasEnded = state.get('numSteps', 1) < state.get('planned', 1) and state['last_epoch'] >= state['numSteps']
    history = checkpoint['history'] if checkpoint else []
    longest = 0.0  # seconds
    for epoch in range(start, config.EPOCHS):
        reason = _reasonToStop(history, hasEnded, longest)
        if reason:
            print(f'Stopped after {epoch} of {config.EPOCHS} epochs: {reason}.')
            return
        begin = time.monotonic()
        yield epoch
        longest = max(longest, time.monotonic() - begin)
        history = readHistory().to_dict('records') if _historyFile().exists() else []
        hasEnded = config.SCHEDULE == 'poly' and bool(history) and history[-1]['learnRate'] == 0


def _reasonToStop(history, hasEnded, longest):
    """Return why the training should stop before the next epoch, or None.

    Args:
        history: rows of `readHistory`.
        hasEnded: whether the learning rate has fallen to 0.
        longest: seconds of the longest epoch so far.
    """
    if hasEnded:
        return 'the learning rate has fallen to 0, as all steps for which there was time are done'
    losses = np.array([row['valLoss'] for row in history])
    numWorse = len(losses) - 1 - int(np.nanargmin(losses)) if np.isfinite(losses).any() else 0  # since the best
    if config.PATIENCE is not None and numWorse >= config.PATIENCE:
        return f'the last {numWorse} did not improve the validation loss (config.PATIENCE = {config.PATIENCE})'
    if config.TIME_BUDGET is not None:
        used, needed = hoursUsed(), longest / 3600 if config.SCHEDULE != 'poly' else 0  # which ends within an epoch
        if used + needed > config.TIME_BUDGET:
            text = f'{used:.2f} of the {config.TIME_BUDGET} hours of config.TIME_BUDGET are used'
            return text + f', and an epoch takes {needed:.2f}' * (needed > 0) + '. Run again to resume'
    return None


def makeCheckpoint(
    epoch, model, optimizer, scheduler, scaler, trainLoss, valLoss, bestValLoss, average=None, dice=None
):
    """Write `config.LAST_CHECKPOINT` and `history.csv`, and `config.BEST_CHECKPOINT` if `valLoss` improved.

    Each file is written atomically. A checkpoint holds, as tensors and plain values, the weights, the states of
    optimizer, scheduler, scaler and random generators, the history of losses and learning rates, `model.provenance` and
    the settings.

    Args:
        epoch: the epoch that has just ended, counted from 0. In the history it is counted from 1.
        model, optimizer, scheduler, scaler: as in `engine.train`; the scheduler may be None.
        trainLoss, valLoss: mean losses of this epoch. `valLoss` is None without validation; each epoch then is best.
        bestValLoss: the best validation loss before this epoch; infinite at the start.
        average: moving average of the weights (`engine.makeAverage`). If there is one, `loadModel` returns it.
        dice: dict of region to Dice of this epoch, as `engine.validate` returns it, for the history.

    Returns:
        float, the best validation loss so far.

    Raises:
        ValueError: the last checkpoint has the epoch already, or is of another run. No file is changed.
    """
    before = _checkIsNext(epoch, model)
    history = before['history'] if before else []
    isValidated = valLoss is not None
    trainLoss, valLoss = float(trainLoss), float(valLoss) if isValidated else float('nan')
    isBest = not isValidated or valLoss < bestValLoss
    best = valLoss if isValidated and isBest else float(bestValLoss)
    rate = float(optimizer.param_groups[0]['lr'])  # after the epoch
    row = {'epoch': int(epoch) + 1, 'trainLoss': trainLoss, 'valLoss': valLoss, 'learnRate': rate}
    history.append(row | {f'dice{region}': float(value) for region, value in (dice or {}).items()})
    checkpoint = {
        'format': FORMAT,
        'settings': _settings(model),
        'recipe': {**_recipe(), 'optimizer': type(optimizer).__name__},
        'epochs': int(config.EPOCHS),
        'ranks': numRanks(),
        'provenance': provenanceOf(model),
        'nextEpoch': int(epoch) + 1,
        'trainLoss': trainLoss,
        'valLoss': valLoss,
        'bestValLoss': best,
        'history': history,
        'model': unwrap(model).state_dict(),
        'average': None if average is None else average.state_dict(),
        'optimizer': optimizer.state_dict(),
        'scheduler': None if scheduler is None else scheduler.state_dict(),
        'scaler': scaler.state_dict(),
        'random': _randomStates(),
    }
    with writeAtomically(_historyFile()) as temporary:
        pd.DataFrame(history).to_csv(temporary, index=False)
    stream = io.BytesIO()  # torch's own error on a full disk does not name the file
    torch.save(checkpoint, stream)
    for path in (config.BEST_CHECKPOINT, config.LAST_CHECKPOINT) if isBest else (config.LAST_CHECKPOINT,):
        # Python 3.12.1 crashes if an error leaves the buffer unreleased, as Path.write_bytes does
        with writeAtomically(path) as temporary, stream.getbuffer() as content, open(temporary, 'wb') as file:
            file.write(content)
    return best


def _checkIsNext(epoch, model=None):
    """Return history and scheduler of the last checkpoint, or None if there is none.

    Raises:
        ValueError: it is of another run, or `epoch` is not its next.
    """
    if not Path(config.LAST_CHECKPOINT).exists():
        return None
    try:
        checkpoint = readCheckpoint(config.LAST_CHECKPOINT, mmap=True)  # the weights stay on the disk
    except ValueError:  # damaged, or on a disk without memory mapping
        checkpoint = readCheckpoint(config.LAST_CHECKPOINT)
    # a script may save only every few epochs, but never an epoch that the file has
    if checkpoint['nextEpoch'] > epoch or (model is None and checkpoint['nextEpoch'] != epoch):
        raise ValueError(
            f'{config.LAST_CHECKPOINT} goes on with epoch {checkpoint["nextEpoch"] + 1}, not {epoch + 1}: it is not '
            'written over. Resume with loadCheckpoint in the same cell as the loop; for a new run, set another '
            'config.OUTPUT_FOLDER.'
        )
    if model is not None and checkpoint['provenance'] and provenanceOf(model):
        _checkData(config.LAST_CHECKPOINT, checkpoint['provenance'], provenanceOf(model), 'the model')
    # without the tensors: Windows cannot replace a file that is mapped into memory
    return {name: checkpoint[name] for name in ('history', 'scheduler')}


def loadModel(path):
    """Return the model of a checkpoint, on `config.DEVICE`; `engine.predict` uses the settings of its training.

    A warning says if the learning rate had not fallen to 0: these are not the final weights of the training.

    Args:
        path: of the checkpoint, such as `config.RESULT_CHECKPOINT`.

    Returns:
        smp model with the `provenance` of its training. If it is trained further, the provenance keeps its patients.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a checkpoint of this package; its model is not of smp; or it has no provenance, and its
            modalities or classes are not those of `config`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'The checkpoint {path} does not exist.')
    checkpoint = readCheckpoint(path)
    settings = checkpoint['settings']
    if checkpoint['provenance'] is None:  # prediction then uses config
        names = ('MODALITIES', 'NO_CLASSES', 'CLASS_NAMES')
        _checkSettings(path, settings, {name: plain(getattr(config, name)) for name in names})
    if not hasattr(smp, settings['model']):
        raise ValueError(f'{path} has a {settings["model"]}: make the model yourself and use loadCheckpoint.')
    model = buildModel(settings['model'], settings, len(settings['MODALITIES']))
    weights = _bestWeights(checkpoint)
    _checkWeights(path, weights, model.state_dict())
    model.load_state_dict(weights)
    model.provenance = asEarlier(checkpoint['provenance'])
    _warnOfEarlyWeights(path, checkpoint)
    return model


def loadCheckpoint(model, optimizer, scheduler, scaler, path, average=None):
    """Restore a run from a checkpoint.

    With an optimizer, the run is resumed with the states of its random generators; the patch files have to be the same.
    Without one, only the weights are loaded, those of the moving average if there is one. If they are trained further,
    `model.provenance` keeps their patients.

    Args:
        model, optimizer, scheduler, scaler: as in `makeCheckpoint`; changed in place. All but the model may be None.
        path: `config.LAST_CHECKPOINT` to resume, `config.RESULT_CHECKPOINT` to predict. Only tensors and plain values
            are loaded, so a file from elsewhere cannot run code.
        average: as in `makeCheckpoint`, to resume.

    Returns:
        model, optimizer, scheduler, scaler, epoch, trainLoss, valLoss, bestValLoss: `epoch` is the next one to run,
        counted from 0. If the file does not exist: the objects as they are, epoch 0 and infinite losses.

    Raises:
        ValueError: the file is not a checkpoint of this package, or belongs to another model, modalities or classes.
            The run is resumed with other patients in `config.TRAIN_FILE` or `config.VAL_FILE`, another optimizer, or
            other settings of the training. Or there is no file, and the optimizer has been used already.
    """
    if not Path(path).is_file():
        _tellFreshStart(path, model, optimizer)
        return model, optimizer, scheduler, scaler, 0, float('inf'), float('inf'), float('inf')
    checkpoint = readCheckpoint(path)
    _checkSettings(path, checkpoint['settings'], _settings(model))
    weights = checkpoint['model'] if optimizer is not None else _bestWeights(checkpoint)
    _checkWeights(path, weights, unwrap(model).state_dict())
    if optimizer is not None:
        _checkSettings(path, checkpoint['recipe'], {**_recipe(), 'optimizer': type(optimizer).__name__})
        _checkFiles(path, checkpoint['provenance'])
        if (average is None) != (checkpoint['average'] is None):
            raise ValueError(
                f'{path} was made {"without" if average else "with"} a moving average; resume it likewise.'
            )
        if average is not None:
            average.load_state_dict(checkpoint['average'])
        _checkSteps(path, checkpoint['scheduler'], scheduler)
        _tellOtherLength(checkpoint, scheduler)
    unwrap(model).load_state_dict(weights)
    unwrap(model).provenance = (
        checkpoint['provenance'] if optimizer is not None else asEarlier(checkpoint['provenance'])
    )
    if optimizer is not None:
        _restoreRandomStates(checkpoint['random'])
        optimizer.load_state_dict(checkpoint['optimizer'])
    if average is not None:
        unwrap(average).provenance = provenanceOf(model)
    if scheduler is not None and checkpoint['scheduler'] is not None:
        scheduler.load_state_dict(checkpoint['scheduler'])
    if scaler is not None and scaler.is_enabled() and checkpoint['scaler']:  # the state of a disabled one is empty
        scaler.load_state_dict(checkpoint['scaler'])
    if optimizer is None:
        _warnOfEarlyWeights(path, checkpoint)
    losses = (checkpoint[name] for name in ('trainLoss', 'valLoss', 'bestValLoss'))
    return model, optimizer, scheduler, scaler, checkpoint['nextEpoch'], *losses


def _warnOfEarlyWeights(path, checkpoint):
    """Warn if the schedule of a checkpoint had not ended."""
    state = checkpoint['scheduler'] or {}
    if state.get('last_epoch', 0) < state.get('numSteps', 0):
        warnings.warn(
            f'{path} has the weights after epoch {checkpoint["nextEpoch"]} of {checkpoint["epochs"]}, step '
            f'{state["last_epoch"]} of {state["numSteps"]}: the learning rate had not fallen to 0 yet. Final weights '
            'score better; config.RESULT_CHECKPOINT holds them when the training has ended.',
            stacklevel=3,
        )


def _tellFreshStart(path, model, optimizer):
    """Print that there is no checkpoint; raise a ValueError if the optimizer has been used already.

    A warning says if the model is not the one that `config` describes, as after a change of config.
    """
    if optimizer is not None and optimizer.state:
        raise ValueError(f'No checkpoint at {path}, but the model has been trained already: make the model again.')
    if optimizer is not None and type(unwrap(model)) is smp.Unet:
        with torch.random.fork_rng(devices=[]):
            expected = buildModel('Unet', _settings(model), len(config.MODALITIES))
        try:
            _checkWeights(path, unwrap(model).state_dict(), expected.state_dict())
        except ValueError:
            warnings.warn(
                f'The model is not the Unet with a {config.ENCODER_NAME} that config describes and its checkpoints '
                'will name: loadModel will not load them. If config was changed, make the model again.',
                stacklevel=3,
            )
    print(f'No checkpoint at {path}: {"starting from epoch 1" if optimizer else "the weights stay as they are"}.')


def _bestWeights(checkpoint):
    """Return the weights to predict with: those of the moving average, if there is one."""
    if checkpoint['average'] is None:
        return checkpoint['model']
    prefix = 'module.'
    found = checkpoint['average'].items()
    return {name.removeprefix(prefix): value for name, value in found if name.startswith(prefix)}


def _checkSteps(path, state, scheduler):
    """Raise a ValueError if a run that has ended within an epoch is to become longer: its epochs no longer count."""
    planned, now = (state or {}).get('planned'), getattr(scheduler, 'planned', None)
    hasEnded = None not in (planned, now) and state['last_epoch'] >= planned
    if hasEnded and now != planned and planned % state['stepsPerEpoch']:
        raise ValueError(
            f'{path} has ended after its {planned} steps, within an epoch, and cannot become {now} steps long: begin a '
            'new run in another config.OUTPUT_FOLDER.'
        )


def _tellOtherLength(checkpoint, scheduler):
    """Print what changes if a run is resumed with another number of ranks or steps."""
    if checkpoint['ranks'] != numRanks():
        print(
            f'The run had {checkpoint["ranks"]} ranks and now has {numRanks()}: the same batches, but augmented by '
            'other draws.'
        )
    state = checkpoint['scheduler'] or {}
    before, now = state.get('planned'), getattr(scheduler, 'planned', None)
    if None in (before, now):
        return
    if state['numSteps'] < before:
        before, now = state['numSteps'], min(state['numSteps'], now)
        print(f'The schedule was shortened to {before} steps, as the time was short, and becomes no longer.')
    if before != now:
        done = state['last_epoch']
        left, planned = ((1 - min(1, done / steps)) ** config.POLY_POWER for steps in (now, before))
        print(
            f'The run was begun for {before} steps and now has {now}: after {done} steps the learning rate goes on at '
            f'{left:.2f} of its maximum, not at {planned:.2f}.'
        )


def readHistory():
    """Return the history of losses, from `history.csv` beside `config.LAST_CHECKPOINT`.

    Returns:
        DataFrame, one row per epoch, with the columns `epoch` (from 1), `trainLoss`, `valLoss`, `learnRate`
        and, if the Dice was given to `makeCheckpoint`, `diceWT`, `diceTC`, `diceET`.

    Raises:
        FileNotFoundError: no epoch has ended yet.
    """
    return pd.read_csv(_historyFile())


def _historyFile():
    return Path(config.LAST_CHECKPOINT).with_name('history.csv')


def _settings(model):
    """Return the settings that must be the same when a checkpoint is written and loaded."""
    names = ('MODALITIES', 'NO_CLASSES', 'CLASS_NAMES', 'ENCODER_NAME', 'ENCODER_DEPTH', 'DECODER_CHANNELS')
    return {'model': type(unwrap(model)).__name__, **{name: plain(getattr(config, name)) for name in names}}


def _recipe():
    """Return the settings of the training that must be the same when a run is resumed."""
    return {name: plain(getattr(config, name)) for name in _RECIPE}


def _checkSettings(path, found, expected):
    """Raise a ValueError if a checkpoint was made with other settings."""
    for name, value in expected.items():
        if found.get(name) != value:
            raise ValueError(
                f'{path} was made with {name} = {found.get(name)}, this run has {name} = {value}. '
                'Set another config.OUTPUT_FOLDER.'
            )


def _checkFiles(path, provenance):
    """Raise a ValueError if the patch files hold other data than the run to resume was trained on."""
    for name, key in (('TRAIN_FILE', 'patients'), ('VAL_FILE', 'validated')):
        file = getattr(config, name)
        try:
            found = readProvenance(file)
        except (OSError, KeyError, ValueError):  # missing, damaged, or shards: `engine.train` compares instead
            continue
        if provenance and provenance[key]:
            # the file may hold more patients than the loader yields, which `engine.train` compares
            used = {patient: sums for patient, sums in found['patients'].items() if patient in provenance[key]}
            seen = {**provenance, 'patients': provenance[key]}
            # a validation may lack editions of the training, or have only thick slices, of which one plane is cut
            own = () if key == 'patients' else ('editions', 'channels', 'planes', 'sliceStep')
            names = [each for each in SETTINGS if each not in own]
            _checkData(path, seen, {**found, 'patients': used}, f'config.{name}, {file}', names)


def _checkData(path, provenance, found, where, names=SETTINGS):
    """Raise a ValueError if the provenance of a checkpoint differs from that of `where`."""
    if texts := differences(provenance, found, names):
        raise ValueError(
            f'{path} belongs to a run on other data than {where}: {"; ".join(texts)}. '
            'Set another config.OUTPUT_FOLDER for each run, for example one for each fold.'
        )


def _checkWeights(path, found, expected):
    """Raise a ValueError if names or shapes of the weights are not those of the model."""
    for name in sorted(found.keys() | expected.keys()):
        shapes = [tuple(weights[name].shape) if name in weights else 'absent' for weights in (found, expected)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f'{path} belongs to another model: its {name} is {shapes[0]}, the given model has {shapes[1]}.'
            )


def readCheckpoint(path, **options):
    """Return the content of a checkpoint file; raise a ValueError if it cannot be read or has another format."""
    try:
        checkpoint = torch.load(str(path), map_location='cpu', weights_only=True, **options)
        found = int(checkpoint['format'])
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f'{path} is not a checkpoint of this package, or is damaged: {reason}') from error
    if found != FORMAT:
        raise ValueError(f'{path} has the format {found}, this version reads {FORMAT}: use the version that wrote it.')
    return checkpoint


def _randomStates():
    """Return the states of all random generators as tensors and plain values."""
    kind, keys, *rest = np.random.get_state()
    return {
        'torch': torch.get_rng_state(),
        'cuda': torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        'python': random.getstate(),
        'numpy': [kind, keys.tolist(), *rest],  # torch.load with weights_only refuses arrays
    }


def _restoreRandomStates(states):
    """Restore what `_randomStates` returned; for GPUs, only if their number is the same."""
    torch.set_rng_state(states['torch'])
    if states['cuda'] and len(states['cuda']) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states['cuda'])
    version, keys, gauss = states['python']
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(states['numpy']))
