"""Train as the notebook does: one model, or the members of an ensemble, on one or several devices.

    python train.py NAME=value ...
    torchrun --nproc-per-node=2 train.py NAME=value ...

Each NAME is a setting of `config`, its value a Python literal.
"""

import ast
import contextlib
import difflib
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import sys
import time
import traceback
import zlib
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm.auto import tqdm

import batched
import checkpoints
import config
import deploy
import engine
import metrics
import pictures
import ranks
import report
from atomic import writeAtomically
from dataset import BRATSDataset
from patients import cohort
from patients.reading import makeFileList, modelFolder, spacingOf
from preprocess import makeDataset
from provenance import checksums, describe
from transforms import makeTransforms

# not copied to a member: they follow from its own OUTPUT_FOLDER
_OWN = ('TRAIN_FILE', 'VAL_FILE', 'LAST_CHECKPOINT', 'BEST_CHECKPOINT', 'RESULT_CHECKPOINT')


def trainModel(traindf, valdf=None, tell=print):
    """Train the model that `config` describes, as the notebook does, and return the path of its checkpoint.

    A stopped run is resumed, and ends with the weights of an uninterrupted one. Under torchrun all ranks train one
    model on the batches of one process: `config.BATCHSIZE` is that of all ranks together.

    Args:
        traindf: file list of the patients to train on.
        valdf: file list of the patients to validate on; None or empty: no validation.
        tell: function that is called on rank 0 after each epoch, with one line of text.

    Returns:
        str, `config.RESULT_CHECKPOINT`: the final weights; with `config.SCHEDULE = 'plateau'` those of the epoch with
        the lowest validation loss.

    Raises:
        ValueError: bad data, as in `preprocess.makeDataset`; or `config.OUTPUT_FOLDER` has a run on other data.
    """
    torch.manual_seed(config.SEED)
    model, criterion = engine.makeModel(), engine.makeCriterion()
    deploy.startFrom(model)  # before hours are spent on patches
    with ranks.firstBeforeOthers():
        numTrain = makeDataset(traindf, config.TRAIN_FILE)
        numVal = 0 if valdf is None or valdf.empty else makeDataset(valdf, config.VAL_FILE)
    trainSet = BRATSDataset(config.TRAIN_FILE, numTrain, raw=True)
    valSet = BRATSDataset(config.VAL_FILE, numVal, raw=True) if numVal else None
    trainLoader, valLoader = _makeLoader(trainSet, True), _makeLoader(valSet, False) if valSet else None
    kind = torch.device(config.DEVICE).type
    shared = ranks.share(model, criterion)
    optimizer = torch.optim.Adam(model.parameters(), config.LEARN_RATE, weight_decay=config.WEIGHT_DECAY)
    scaler = torch.amp.GradScaler(kind, enabled=engine.precision(kind) is torch.float16)
    numSteps = engine.planSteps(trainLoader)
    scheduler, average = engine.makeScheduler(optimizer, numSteps), engine.makeAverage(model, numSteps)
    run, augment = (model, optimizer, scheduler, scaler), batched.Batched(makeTransforms()[0])
    *_, start, _, _, best = checkpoints.loadCheckpoint(*run, config.LAST_CHECKPOINT, average)
    for epoch in ranks.inStep(checkpoints.epochs(start)):
        ranks.seedEpoch(config.SEED, epoch)
        loss = engine.train(shared, criterion, optimizer, scaler, trainLoader, augment, scheduler, average)
        loss /= numTrain if ranks.numRanks() == 1 else trainLoader.batch_sampler.numSamples
        valLoss = dice = None
        if valSet is not None:
            valLoss, dice = engine.validate(average or model, criterion, valLoader, dice=True)
            valLoss /= numVal
        if config.SCHEDULE == 'plateau':
            scheduler.step(loss if valLoss is None else valLoss)
        best = _save(epoch, run, loss, valLoss, best, average, dice, tell)
    for dataset in (trainSet, valSet):
        if dataset is not None:
            dataset.file.close()
    return config.RESULT_CHECKPOINT


def _makeLoader(dataset, shuffle):
    """Return the loader of the notebook; under torchrun, one that yields this rank's part of its batches."""
    options = {'num_workers': config.LOADER_WORKERS, 'pin_memory': config.DEVICE.startswith('cuda')}
    if ranks.numRanks() == 1:
        return torch.utils.data.DataLoader(dataset, config.BATCHSIZE, shuffle=shuffle, **options)
    make = ranks.TrainingBatches if shuffle else ranks.validationBatches
    return torch.utils.data.DataLoader(dataset, batch_sampler=make(len(dataset), config.BATCHSIZE), **options)


def _save(epoch, run, loss, valLoss, best, average, dice, tell):
    """Write the checkpoint of an epoch and report it, on rank 0; return the best validation loss on every rank."""
    if ranks.rank() == 0:
        best = checkpoints.makeCheckpoint(epoch, *run, loss, valLoss, best, average, dice)
        scores = ', '.join(f'{region} {value:.3f}' for region, value in (dice or {}).items())
        validated = f', validation {valLoss:.4f}, Dice {scores}' if dice else ''
        tell(f'epoch {epoch + 1:3} of {config.EPOCHS}: loss {loss:.4f}{validated}')
    return ranks.fromFirst(best)


# Ensembles


def trainMembers(df, members, devices=None):
    """Train the members of an ensemble, several at a time if there are several devices.

    Each member has a folder below `config.OUTPUT_FOLDER` with its patches, checkpoints, history and `log.txt`. Stopped
    members are resumed. On one device, the members are trained one after the other in this process. On several, each is
    trained in a process of its own, and a free device takes the next member; a script then needs
    `if __name__ == '__main__':` around the call. Members that are trained one after the other share the hours of
    `config.TIME_BUDGET` equally.

    Args:
        df: file list.
        members: list of dicts, one for each member, with these keys:
            - `'fold'` and `'of'`: `{'fold': 0, 'of': 5}` is trained on the training set of fold 0 of
              `utils.splitFolds(df, 5)`, without validation. A member without a fold is trained and validated on the
              first two sets of `utils.split(df)`, which are written to `split.json` in `config.OUTPUT_FOLDER`.
            - `'plane'`: `{'plane': 'coronal'}` is trained on slices of this plane only.
            - `'seed'`: `{'seed': 1}` draws other weights and patches.
            - names of `config`, with their values.
        devices: names such as `['cuda:0', 'cuda:1']`; the same one may be named several times. None: all GPUs if
            `config.DEVICE` is 'cuda', else `config.DEVICE`.

    Returns:
        list of the paths that `trainModel` returns for the members, in their order, for `utils.loadModel`.

    Raises:
        ValueError: a key of a member is unknown, or two members are the same.
        RuntimeError: members failed; they are named with their errors. The others are trained first.
    """
    jobs = {}
    for member in members:
        name = _nameOf(member)
        if name in jobs:
            raise ValueError(f'Two members are {name}: they would share a folder.')
        jobs[name] = _valuesOf(member, name)
    sets = None if all('fold' in member for member in members) else cohort.split(df)
    if sets:
        cohort.writeSplit(sets, Path(config.OUTPUT_FOLDER, 'split.json'))
    for member, (name, values) in zip(members, list(jobs.items()), strict=True):
        isFold = 'fold' in member
        jobs[name] = values, (cohort.splitFolds(df, member['of'])[member['fold']][0], None) if isFold else sets[:2]
    _raiseFailed(_runAll(trainModel, jobs, devices), len(jobs), 'members')
    return [_resultOf(values) for values, _ in jobs.values()]


def _runAll(work, jobs, devices):
    """Run jobs on the devices; return name -> error text of those that failed.

    Args:
        work: function of a module that is called as `work(*arguments, tell)`, under the values of a job.
        jobs: dict of name -> (values of `config`, arguments).
        devices: as in `trainMembers`.
    """
    devices = _findDevices(devices)
    return (_runHere if len(devices) == 1 else _runOnDevices)(work, jobs, devices)


def _raiseFailed(failed, numJobs, what):
    """Raise a RuntimeError that names the jobs that failed, if there are any; `what` they are called."""
    if failed:
        reasons = '\n'.join(f'{name}: {reason}' for name, reason in failed.items())
        raise RuntimeError(
            f'{len(failed)} of {numJobs} {what} failed; the others are complete. Call again to resume those that '
            f'failed.\n{reasons}'
        )


def _findDevices(devices):
    """Return the names of the devices to train on, a list; None: all GPUs if `config.DEVICE` is 'cuda'."""
    if devices is None:
        isMany = config.DEVICE == 'cuda' and torch.cuda.device_count() > 1
        devices = [f'cuda:{number}' for number in range(torch.cuda.device_count())] if isMany else [config.DEVICE]
    return list(devices)


def _resultOf(values):
    """Return the path of the checkpoint that a training with these values of `config` ends with."""
    with configured(values):
        return config.RESULT_CHECKPOINT


def _nameOf(member):
    """Return the name of a member's folder, such as 'fold-0_of-5'."""
    text = '_'.join(f'{key}-{value}' for key, value in member.items())
    return re.sub(r'[^\w.-]+', '-', text).strip('-') or 'member'


def _valuesOf(member, name):
    """Return the values of `config` with which a member is trained in the folder of its name."""
    own = {key: value for key, value in member.items() if key not in ('fold', 'of')}
    if ('fold' in member) != ('of' in member):
        raise ValueError(f"The member {name} needs both 'fold' and 'of', such as {{'fold': 0, 'of': 5}}.")
    if 'fold' in member and not 0 <= member['fold'] < member['of']:
        raise ValueError(f'The member {name} is no fold: 0 to {member["of"] - 1} of {member["of"]} were expected.')
    if 'plane' in own:
        own['PLANES'] = (own.pop('plane'),)
    if 'seed' in own:
        own['SEED'] = own.pop('seed')
    if fixed := sorted({'DEVICE', 'OUTPUT_FOLDER', 'TIME_BUDGET'} & own.keys()):
        raise ValueError(
            f'The member {name} sets {", ".join(fixed)}: set it in config or by devices=, for all members.'
        )
    checkNames(own)
    return _configWith({'OUTPUT_FOLDER': str(Path(config.OUTPUT_FOLDER, name)), **own})


def _configWith(values):
    """Return all values of `config`, with some changed, for a process that trains in a folder of its own."""
    known = {name: value for name, value in vars(config).items() if name.isupper() and name not in (*_OWN, '_FOUND')}
    return known | values


def checkNames(names):
    """Raise a ValueError, which suggests the nearest names, if `config` does not have one of the names."""
    known = [name for name in dir(config) if name.isupper() and not name.startswith('_')]
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name.upper(), known, 3, 0.5)
            raise ValueError(f'config has no {name}; the nearest names are {", ".join(nearest) or "none"}.')


def _runHere(work, jobs, devices):
    """Run the jobs of `_runAll` one after the other in this process; return name -> error text of those that failed."""
    failed, screen = {}, sys.stdout
    for number, (name, (values, arguments)) in enumerate(tqdm(jobs.items(), unit='training')):
        with configured(values | {'DEVICE': devices[0], 'TIME_BUDGET': _shareOfTime(len(jobs) - number)}):
            try:
                _runLogged(work, arguments, lambda text, name=name: print(f'{name}: {text}', file=screen))
            except Exception as error:  # of any kind: the other jobs are still run
                failed[name] = f'{type(error).__name__}: {error}'
    return failed


def _shareOfTime(numMembers):
    """Return the `config.TIME_BUDGET` of the next member, in hours, if so many are trained one after the other."""
    if config.TIME_BUDGET is None:
        return None
    used = engine.hoursUsed()
    return used + (config.TIME_BUDGET - used) / numMembers


@contextlib.contextmanager
def configured(values):
    """Set values of `config` for a block, and restore all values at its end."""
    before = dict(vars(config))
    for name in _OWN if 'OUTPUT_FOLDER' in values else ():  # they follow from the folder
        vars(config).pop(name, None)
    vars(config).update(values)
    try:
        yield
    finally:
        vars(config).clear()
        vars(config).update(before)


def _runLogged(work, arguments, tell):
    """Run one job, and append its output to `log.txt` in its folder."""
    file = Path(config.OUTPUT_FOLDER, 'log.txt')
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, 'a', buffering=1, encoding='utf-8') as log, contextlib.redirect_stdout(log):
        try:
            work(*arguments, lambda text: (print(text), tell(text)))
        except Exception:
            traceback.print_exc(file=log)
            raise


def _runOnDevices(work, jobs, devices):
    """Run each job in a process of its own on the next free device; return what `_runHere` returns."""
    context = multiprocessing.get_context('spawn')  # a forked process could not use the GPU
    waiting, free, running, failed = list(jobs), list(devices), {}, {}
    bars = {name: tqdm(desc=name, position=at) for at, name in enumerate(jobs, 1)}  # below that of the seeds
    numThreads = max(1, (os.cpu_count() or 1) // len(devices))
    try:
        while waiting or running:
            while waiting and free:
                name, device = waiting.pop(0), free.pop(0)
                values, own = jobs[name]
                # a pipe for each: a process that is killed while it writes would block a queue that all share
                messages, end = context.Pipe(duplex=False)
                # jobs that are still to be run on this device, this one included
                numLeft = math.ceil((len(waiting) + 1) / len(devices))
                cache = values['CACHE_PATCHES'] / len(devices)  # of the memory that all share
                values = values | {'DEVICE': device, 'TIME_BUDGET': _shareOfTime(numLeft), 'CACHE_PATCHES': cache}
                arguments = values, work, own, numThreads, engine.hoursUsed(), end
                process = context.Process(target=_runMember, args=arguments)
                process.start()
                end.close()
                running[messages] = name, process, device
            for messages in multiprocessing.connection.wait(list(running)):
                name, process, device = running[messages]
                try:
                    state, text = messages.recv()
                except EOFError:  # the process has ended
                    process.join()
                    if process.exitcode:
                        failed.setdefault(name, f'its process ended with code {process.exitcode}; see its log.txt.')
                    free.append(device)
                    del running[messages]
                    continue
                _show(bars[name], state, text)
                if state == 'failed':
                    failed[name] = text
    finally:
        for _, process, _ in running.values():  # after an interrupt
            process.terminate()
            process.join()
        for bar in bars.values():
            bar.close()
    return failed


def _show(bar, state, text):
    """Show in the bar of a member the epoch, or the error, that its process sent."""
    if state == 'epoch':
        if found := re.match(r'epoch +(\d+) of (\d+)', text):
            bar.n, bar.total = map(int, found.groups())
        bar.set_postfix_str(text.partition(': ')[2] if found else text)
    elif state == 'failed':
        bar.set_postfix_str(f'failed: {text.splitlines()[0][:60]}')


def _runMember(values, work, arguments, numThreads, hoursUsed, messages):
    """Run one job in this new process, and send ('epoch' or 'failed', text) through a pipe.

    Args:
        hoursUsed: hours that the parent process had used at the start, part of `config.TIME_BUDGET`.
        messages: end of the pipe to send to.
    """
    vars(config).update(values)
    if config.TIME_BUDGET is not None:
        config.TIME_BUDGET -= hoursUsed
    torch.set_num_threads(numThreads)
    if 'cuda' in config.DEVICE:
        torch.cuda.set_device(config.DEVICE)
    try:
        with open(os.devnull, 'w') as nowhere, contextlib.redirect_stderr(nowhere):  # their bars would mix
            _runLogged(work, arguments, lambda text: messages.send(('epoch', text)))
    except Exception as error:
        messages.send(('failed', f'{type(error).__name__}: {error}'))


# Comparison


def compare(df, recipes, folds=4, seeds=3, steps=None, minutes=None, output=None, devices=None):
    """Train several recipes on the same patients, and return whether another one is better than the first.

    Each recipe is trained in each fold with each seed, and scored on the whole patients of the fold, which it has not
    seen. Each seed has folds of its own, the same ones for all recipes: whom they are trained on is chance too. Patches
    are cut once for recipes that cut the same. A stopped comparison goes on where it was, and trainings that have ended
    are not repeated.

    The folder `output` gets `scores.csv` (a row for each training, patient and region), `comparison.csv` (the table
    below), `comparison.png` and `comparison.html`, and the folders of the trainings.

    Args:
        df: file list.
        recipes: dict of name -> dict of `config` values, two or more. An empty dict is `config` as it is.
        folds: number of folds, as in `utils.splitFolds`.
        seeds: how often each fold is trained, with `config.SEED` and the numbers after it.
        steps, minutes: length of each training, in batches or minutes. None: `config.STEPS` or `config.EPOCHS`.
            Trainings of so many minutes are fair if nothing else runs on the machine. With `SCHEDULE = 'plateau'` whole
            epochs are trained: as many as hold the steps, or as fit into the minutes, but one at least.
        output: folder; None: `comparison` in `config.OUTPUT_FOLDER`.
        devices: as in `trainMembers`.

    Returns:
        DataFrame of `metrics.compareRecipes`.

    Raises:
        ValueError: fewer than two recipes, or two alike; a number that `config` does not have; fewer subjects than
            folds; the folder has a recipe of the same name with other numbers or patients; or bad data.
        RuntimeError: trainings failed; they are named with their errors. The others are complete. Or the next ones
            would not end within `config.TIME_BUDGET`.
    """
    if len(recipes) < 2:
        raise ValueError(f'{len(recipes)} recipes were given; two or more were expected.')
    output = Path(output or Path(config.OUTPUT_FOLDER, 'comparison'))
    scores = scoreRecipes(df, recipes, [None], folds, seeds, steps, minutes, output, devices)
    table = metrics.compareRecipes(scores.drop(columns='patients'))
    _writeResults(output, 'comparison', scores, table, pictures.plotRecipes(scores))
    return table


def learningCurve(
    df, sizes=(2, 4, 8, 16), recipes=None, folds=4, seeds=3, steps=None, minutes=None, output=None, devices=None
):
    """Train on more and more patients, and return what more of them bring.

    Args:
        df: file list.
        sizes: numbers of patients to train on. In each fold and seed the smaller sets are part of the larger ones.
        recipes: as in `compare`, one or more; None: `config` as it is, as `default`.
        folds, seeds, steps, minutes, devices: as in `compare`.
        output: folder, as in `compare`; None: `learningCurve` in `config.OUTPUT_FOLDER`. The files are called
            `learningCurve` in place of `comparison`.

    Returns:
        DataFrame of `metrics.fitLearningCurve`.

    Raises:
        ValueError, RuntimeError: as in `compare`; or a fold has fewer patients to train on than the largest size.
    """
    recipes = {'default': {}} if recipes is None else recipes
    output = Path(output or Path(config.OUTPUT_FOLDER, 'learningCurve'))
    scores = scoreRecipes(df, recipes, sorted(sizes), folds, seeds, steps, minutes, output, devices)
    table = metrics.fitLearningCurve(scores)
    _writeResults(output, 'learningCurve', scores, table, pictures.plotLearningCurve(table))
    return table


def scoreRecipes(df, recipes, sizes, folds, seeds, steps, minutes, output, devices):
    """Return the scores of all trainings of a comparison, with the columns recipe, patients, fold and seed.

    Beside the scores they have epochs, steps, seconds, and the seconds a patient that were spent on cutting patches
    (NaN if they were there already). The arguments are those of `learningCurve`; a size of None is all patients.
    """
    if steps is not None and minutes is not None:
        raise ValueError('Both steps and minutes were given; one of them was expected.')
    if not (isinstance(recipes, dict) and recipes and len(sizes) and seeds > 0):
        raise ValueError('A dict of recipes, at least one size, and at least one seed were expected.')
    length = {'STEPS': steps, 'EPOCHS': 10**6} if steps or minutes else {}  # EPOCHS follows from the steps or minutes
    for name, recipe in recipes.items():
        checkNames(recipe)
        if fixed := sorted({'DEVICE', 'OUTPUT_FOLDER', 'TIME_BUDGET', 'SEED', *_OWN} & recipe.keys()):
            raise ValueError(f'The recipe {name} sets {", ".join(fixed)}, which the comparison sets.')
    values = {name: _configWith({**recipe, **length}) for name, recipe in recipes.items()}
    folders = {name: output / _nameOf({'recipe': name}) for name in recipes}
    for (one, its), (other, own) in itertools.combinations(values.items(), 2):
        if _asJson(its) == _asJson(own) or folders[one] == folders[other]:
            raise ValueError(f'The recipes {one} and {other} are alike, or have nearly the same name.')
        if its['NO_CLASSES'] != own['NO_CLASSES']:
            raise ValueError(f'The recipes {one} and {other} have other classes: their scores cannot be compared.')
    sets = {}
    for seed in range(config.SEED, config.SEED + seeds):
        with configured({'SEED': seed}):
            sets[seed] = cohort.splitFolds(df, folds)
    fewest = min(len(traindf) for each in sets.values() for traindf, _ in each)
    if fewest < (sizes[-1] or 1):
        raise ValueError(f'A fold has {fewest} patients to train on, not {sizes[-1]}.')
    known = {}  # checksums, as files that are not .gz are read for them
    for name in recipes:
        with configured(values[name]):
            if seen := cohort.seenByStart(df):
                raise ValueError(f'{name}: config.START was trained on {", ".join(seen[:5])}, who are to be tested on.')
            rest = {str(patient): checksums(paths, known) for patient, paths in df.sort_index().iterrows()}
            hasWeights = _tryRecipe(name)  # offline, the encoder would begin otherwise than in the trainings before
            start = config.START and (modelFolder(config.START) / 'config.json').read_text()  # with sums of its files
        rest = {'folds': f'{folds}, of each seed', 'minutes': minutes, 'patients': rest}
        rest['the weights of START'] = start and zlib.crc32(start.encode())
        if minutes is not None:  # as many steps as the device makes
            isGpu = torch.device(config.DEVICE).type == 'cuda'
            rest['the device'] = torch.cuda.get_device_name() if isGpu else config.DEVICE
        rest['whether ENCODER_WEIGHTS can be loaded'] = hasWeights
        checkRecipe(folders[name], {**values[name], **rest})
        if not hasWeights:  # another attempt takes half a minute of each training
            values[name]['ENCODER_WEIGHTS'] = None
    jobs, isAlone, failed, longest = {}, len(_findDevices(devices)) == 1, {}, 0
    for seed, its in sets.items():
        for (fold, (traindf, testdf)), size, name in itertools.product(enumerate(its), sizes, recipes):
            order = np.random.default_rng([seed, fold]).permutation(len(traindf))
            traindf = traindf.iloc[sorted(order[:size])]
            place = {'recipe': name, 'patients': len(traindf), 'fold': fold, 'seed': seed}
            folder = folders[name] / _nameOf(place)
            own = {**values[name], 'SEED': seedOf(fold, seed), 'OUTPUT_FOLDER': str(folder)}
            # on one device the patches of one fold are on the disk at a time
            part = jobs.setdefault((seed, fold if isAlone else None), {})
            part[folder.name] = place, own, (traindf, testdf, minutes)
    for number, part in enumerate(tqdm(jobs.values(), unit='fold' if isAlone else 'seed')):
        begin = engine.hoursUsed()
        if longest and config.TIME_BUDGET is not None and begin + longest > config.TIME_BUDGET:
            text = f'{number} of {len(jobs)} parts of the comparison are trained, and the next one would not end'
            raise RuntimeError(f'{text} within the {config.TIME_BUDGET} hours of config.TIME_BUDGET: call again later.')
        failed |= _runPart({name: job[1:] for name, job in part.items()}, output / 'patches', devices)
        longest = max(longest, engine.hoursUsed() - begin)
    _raiseFailed(failed, sum(map(len, jobs.values())), 'trainings')
    rows = [
        pd.read_csv(Path(own['OUTPUT_FOLDER'], 'scores.csv'), dtype={'patient': str}).assign(**place)
        for part in jobs.values()
        for place, own, _ in part.values()
    ]
    scores = pd.concat(rows, ignore_index=True)
    return scores.assign(subject=scores['patient'].map(cohort.findSubjects(df).rename(index=str)))


def seedOf(fold, seed):
    """Return the `config.SEED` of a training. With the same one, all folds of a seed would begin with the same weights.

    The error of a comparison counts them as independent.
    """
    return seed + 1000 * fold


def _tryRecipe(name):
    """Make what the recipe of `config` trains, as far as it needs no patients; raise a ValueError if it cannot be.

    Return whether `config.ENCODER_WEIGHTS` can be loaded.
    """
    try:
        hasWeights = bool(config.ENCODER_WEIGHTS and (engine.findImageNet() or engine.availableWeights()))
        if not hasWeights:
            config.ENCODER_WEIGHTS = None
        model, *_ = engine.makeModel(), engine.makeCriterion(), makeTransforms()
        deploy.startFrom(model)
        engine.makeScheduler(torch.optim.Adam(model.parameters()), 1)
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(f'The recipe {name} cannot be trained: {error}') from error
    return hasWeights


def _asJson(values):
    """Return the numbers of a recipe as JSON has them, so that those that are written alike are equal."""
    return json.loads(json.dumps(values, default=str))


def checkRecipe(folder, values):
    """Write the numbers of a recipe into its folder; raise a ValueError if others are there."""
    others = r'DEVICE|TIME_BUDGET|CONFIDENCE|.*_(FOLDER|WORKERS|BATCH|PATCHES|RESAMPLES|FRACTION)|(QUALITY|DEMO)_.*'
    own = {name: value for name, value in values.items() if not re.fullmatch(others, name)}
    own, file = _asJson(own), folder / 'recipe.json'
    if file.exists():
        found = json.loads(file.read_text())
        if other := [name for name in own if name in found and found[name] != own[name]]:
            raise ValueError(
                f'{folder} was begun with other numbers: {", ".join(other[:5])}. Name the recipe otherwise, or choose '
                'another output.'
            )
    # another process may write the same
    with contextlib.suppress(BlockingIOError), writeAtomically(file) as temporary:
        temporary.write_text(json.dumps(own, indent=1))


def _runPart(jobs, folder, devices):
    """Run the trainings of a fold or seed that have no scores yet; return name -> error text of those that failed.

    Patches are cut before, and deleted at the end.
    """
    left = {name: job for name, job in jobs.items() if not Path(job[0]['OUTPUT_FOLDER'], 'scores.csv').exists()}
    seconds = {}
    for name, (values, arguments) in left.items():
        traindf, *_ = arguments
        with configured(values):
            cut = json.dumps([describe(traindf), [str(patient) for patient in traindf.index]])
            file = values['TRAIN_FILE'] = str(folder / f'{zlib.crc32(cut.encode()):08x}.h5')
            isThere, begin = Path(file).exists(), time.monotonic()
            makeDataset(traindf, file)
            used = np.nan if isThere else (time.monotonic() - begin) / len(traindf)
        left[name] = values, (*arguments, seconds.setdefault(file, used))
    with configured({'TIME_BUDGET': None}):  # a short session must not shorten some of the trainings
        failed = _runAll(_trainAndScore, left, devices)
    shutil.rmtree(folder, ignore_errors=True)
    return failed


def _trainAndScore(traindf, testdf, minutes, preparation, tell):
    """Train on patients, and write the scores of others to `scores.csv` in `config.OUTPUT_FOLDER`.

    `preparation` is the time of cutting in seconds a patient, and is written beside the scores.
    """
    if minutes is not None:
        Path(config.LAST_CHECKPOINT).unlink(missing_ok=True)  # a stopped training would get its minutes twice
        spare = engine.TIME_LEFT if config.SCHEDULE == 'poly' else 0  # which it leaves for a validation
        config.TIME_BUDGET = engine.hoursUsed() + minutes / 60 / (1 - spare)
    isNew, begin = not Path(config.LAST_CHECKPOINT).exists(), time.monotonic()
    result = trainModel(traindf, None, tell)
    seconds = round(time.monotonic() - begin) if isNew else np.nan  # those before it was stopped are unknown
    if minutes is not None and not Path(config.LAST_CHECKPOINT).exists():
        raise ValueError(f'{minutes} minutes were over before the first batch: give more minutes.')
    last = checkpoints.readCheckpoint(config.LAST_CHECKPOINT)
    perEpoch = last['scheduler'].get('stepsPerEpoch')  # None with 'plateau'
    numSteps = last['scheduler']['last_epoch'] if perEpoch else int(last['optimizer']['state'][0]['step'])
    if minutes is not None and perEpoch and numSteps < perEpoch:
        tell(f'{minutes} minutes are {numSteps} batches, less than the {perEpoch} of an epoch: give more minutes.')
    table = scorePatients(testdf, checkpoints.loadModel(result))
    table = table.loc[table['region'].isin(config.MAIN_REGIONS), ['patient', 'region', 'dice', 'hd95']]
    with writeAtomically(Path(config.OUTPUT_FOLDER, 'scores.csv')) as temporary:
        spent = {'steps': numSteps, 'seconds': seconds, 'preparation': preparation}
        table.assign(epochs=len(checkpoints.readHistory()), **spent).to_csv(temporary, index=False)
    for file in {config.LAST_CHECKPOINT, config.BEST_CHECKPOINT}:  # of many trainings they would fill the disk
        Path(file).unlink(missing_ok=True)


def scorePatients(df, model):
    """Return the scores of the patients of a file list, predicted by a model, as a table of `metrics.scoreTable`."""
    scores = {}
    for patient, (_, y, yhat) in engine.predictAll(df, model):
        scores[patient] = metrics.scorePatient(y, yhat, spacingOf(df.loc[patient]))
    return metrics.scoreTable(scores)


def _writeResults(output, name, scores, table, figure):
    """Write the scores, the table, the figure and the page of a comparison or learning curve."""
    for file, each in (('scores.csv', scores), (f'{name}.csv', table.reset_index())):
        with writeAtomically(output / file) as temporary:
            each.to_csv(temporary, index=False)
    with writeAtomically(output / f'{name}.png') as temporary:
        figure.savefig(temporary, format='png', dpi=120)
    report.writeTable(output / f'{name}.html', table, figure)


# The script


def readArguments(arguments):
    """Return a dict of `config` names and values from texts such as 'EPOCHS=50'.

    A value is a Python literal. A text without quotes is accepted where `config` has a text or None.

    Raises:
        ValueError: a text is not NAME=value, the name is unknown, or the value cannot be read or is no number.
    """
    values = {}
    for argument in arguments:
        name, sign, text = argument.partition('=')
        if not sign:
            raise ValueError(f'{argument!r} was given; NAME=value was expected, such as EPOCHS=50.')
        checkNames([name])
        try:
            values[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            if not isinstance(getattr(config, name), (str, type(None))):
                raise ValueError(f'{argument}: {text!r} is not a Python literal.') from None
            values[name] = text
        isNumber = isinstance(getattr(config, name), (int, float)) or name in ('STEPS', 'TIME_BUDGET')
        if isNumber and not isinstance(values[name], (int, float, type(None))):
            raise ValueError(f'{argument}: a number was expected.')
    return values


@record  # torchrun tells which rank failed, and why
def main(arguments):
    """Check and split the patients of `config.DATA_FOLDER`, and train on them, under torchrun with all ranks."""
    vars(config).update(readArguments(arguments))
    if 'RANK' in os.environ and int(os.environ['WORLD_SIZE']) > 1:
        isOnGpu = config.DEVICE.startswith('cuda')
        if isOnGpu:
            config.DEVICE = f'cuda:{os.environ["LOCAL_RANK"]}'
            torch.cuda.set_device(config.DEVICE)
        # the other ranks wait while rank 0 checks and cuts the patients
        torch.distributed.init_process_group('nccl' if isOnGpu else 'gloo', timeout=timedelta(hours=12))
    sets = None
    if ranks.rank() == 0:
        df = makeFileList()
        sets = cohort.split(cohort.usable(df, cohort.checkFiles(df)))
        cohort.writeSplit(sets, Path(config.OUTPUT_FOLDER, 'split.json'))
    traindf, valdf, _ = ranks.fromFirst(sets)
    result = trainModel(traindf, valdf, print)
    if ranks.rank() == 0:
        print(f'Weights: {result}. The test patients are in split.json beside it.')
    if ranks.isMany():
        torch.distributed.destroy_process_group()


if __name__ == '__main__':
    main(sys.argv[1:])
