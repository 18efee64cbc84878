import io
import os
import random
import re
import time
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import psutil
import pytest
import torch

import batched
import checkpoints
import config
import engine
import preprocess
import utils
from conftest import writePatchFile

INFINITE = float('inf')


def makeRun(seed=0, width=8):
    """Return a small model with dropout, its optimizer, a scheduler and a disabled scaler."""
    torch.manual_seed(seed)
    layers = [torch.nn.Conv2d(3, width, 3, padding=1), torch.nn.BatchNorm2d(width), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers, torch.nn.Dropout2d(0.2), torch.nn.Conv2d(width, 4, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    return model, optimizer, scheduler, torch.amp.GradScaler('cuda', enabled=False)


def write(losses):
    """Write a checkpoint after each of some epochs with these validation losses."""
    run = makeRun()
    for epoch, loss in enumerate(losses):
        checkpoints.makeCheckpoint(epoch, *run, 1, loss, min([INFINITE, *losses[:epoch]]))


# Stopping in time


def test_epochs_runsToTheLast(capsys):
    """Without a reason to stop, every epoch from the first to the last is yielded, and nothing is printed."""
    config.EPOCHS, done = 5, 0
    write([3.0, 2.0])
    for epoch in checkpoints.epochs(2):
        checkpoints.makeCheckpoint(epoch, *makeRun(), 1, 1.0, 1.0)
        done = epoch
    assert done == 4 and list(checkpoints.epochs(5)) == []
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize(
    ('losses', 'patience', 'isOver'),
    [
        ([3, 2, 1, 2, 3], 2, True),
        ([3, 2, 1, 2, 3], 3, False),
        ([3, 2, 1, 1, 1], 2, True),  # an equal loss is no improvement
        ([1, 2, 3, 0.5], 2, False),  # the latest is the best
        ([1, 2, 3, 4, 5], None, False),
        ([], 1, False),
    ],
)
def test_epochs_stopsWithoutImprovement(losses, patience, isOver, capsys):
    """A resumed run stops if its last config.PATIENCE epochs did not improve the loss."""
    config.EPOCHS, config.PATIENCE = 20, patience
    write(losses)
    assert (next(checkpoints.epochs(len(losses)), None) is None) == isOver
    assert ('did not improve the validation loss' in capsys.readouterr().out) == isOver


def test_epochs_readsTheCheckpointAfterEveryEpoch(capsys):
    """A loop whose losses rise from the third epoch on stops after config.PATIENCE more."""
    config.EPOCHS, config.PATIENCE = 20, 3
    losses, run = [2.0, 1.0, 1.5, 1.6, 1.7, 1.8], []
    for epoch in checkpoints.epochs(0):
        run.append(epoch)
        checkpoints.makeCheckpoint(epoch, *makeRun(), 1, losses[epoch], min([INFINITE, *losses[:epoch]]))
    assert run == [0, 1, 2, 3, 4]
    assert 'Stopped after 5 of 20 epochs: the last 3 did not improve' in capsys.readouterr().out


def test_epochs_ignoresPatienceWithoutValidation():
    """Where nothing is validated no epoch is worse: all are run, and the last one is the best."""
    config.EPOCHS, config.PATIENCE = 6, 2
    for epoch in checkpoints.epochs(0):
        best = checkpoints.makeCheckpoint(epoch, *makeRun(), 1 + epoch, None, INFINITE)
        assert best == INFINITE
        assert Path(config.BEST_CHECKPOINT).read_bytes() == Path(config.LAST_CHECKPOINT).read_bytes()
    history = checkpoints.readHistory()
    assert history['epoch'].tolist() == [1, 2, 3, 4, 5, 6] and history['valLoss'].isna().all()


def test_epochs_stopsBeforeTheTimeBudgetIsSpent(monkeypatch, capsys):
    """Epochs of one hour that start half an hour after the process fit three times, not four, into 3.6 hours."""
    start, now = psutil.Process().create_time(), 1800.0
    monkeypatch.setattr(time, 'time', lambda: start + now)
    monkeypatch.setattr(time, 'monotonic', lambda: now)
    config.TIME_BUDGET, config.EPOCHS, config.SCHEDULE, run = 3.6, 20, 'plateau', []
    for epoch in checkpoints.epochs(0):
        run.append(epoch)
        now += 3600
    assert run == [0, 1, 2]
    assert '3.50 of the 3.6 hours' in capsys.readouterr().out


class SlowLoader(torch.utils.data.DataLoader):
    """A loader of batches that take some hours of a stand-in clock each."""

    def __init__(self, clock, hours, numBatches=100):
        images = torch.randn(4 * numBatches, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        super().__init__(torch.utils.data.TensorDataset(images, (images[:, 0] > 0).long()), 4, shuffle=True)
        self.clock, self.hours = clock, hours

    def __iter__(self):
        for batch in super().__iter__():
            self.clock['now'] += self.hours
            yield batch


def runInTime(clock, hours, stopAfter=None):
    """Run the notebook's loop on a stand-in clock, six epochs of 100 batches; return weights, rate and schedule."""
    config.SCHEDULE, config.AVERAGE, config.EPOCHS = 'poly', 0.1, 6
    model, optimizer, _, scaler = makeRun()
    loader = SlowLoader(clock, hours)
    scheduler, average = engine.makeScheduler(optimizer, 600), engine.makeAverage(model, 600)
    run, criterion = (model, optimizer, scheduler, scaler), torch.nn.CrossEntropyLoss()
    *_, start, _, _, best = checkpoints.loadCheckpoint(*run, config.LAST_CHECKPOINT, average)
    for epoch in checkpoints.epochs(start):
        loss = engine.train(model, criterion, optimizer, scaler, loader, None, scheduler, average) / 400
        best = checkpoints.makeCheckpoint(epoch, *run, loss, loss, best, average)
        if epoch == stopAfter:
            break
    return average.state_dict(), optimizer.param_groups[0]['lr'], scheduler


def test_epochs_endOnTimeWithARateOf0(monkeypatch, capsys):
    """Of 600 steps of 36 s, 3.55 hours have time for 355: the schedule ends before, within the fourth epoch."""
    clock = {'now': 0.05}
    monkeypatch.setattr(engine, 'hoursUsed', lambda: clock['now'])
    config.TIME_BUDGET = 3.55
    _, rate, schedule = runInTime(clock, 0.01)
    told = capsys.readouterr().out
    assert rate == 0 and schedule.hasEnded and 300 < schedule.numSteps <= 350 and clock['now'] <= 3.55
    assert re.findall(r'(\d+) of (\d+) steps fit into the 3.55 hours', told) == [(str(schedule.numSteps), '600')]
    assert 'Stopped after 4 of 6 epochs: the learning rate has fallen to 0' in told
    history = checkpoints.readHistory()
    assert list(history['epoch']) == [1, 2, 3, 4] and (history['trainLoss'] < 2).all()  # also of the epoch cut short
    assert next(checkpoints.epochs(4), None) is None


def test_epochs_useTheTimeIfTheStepsBecomeFaster(monkeypatch, capsys):
    """The first 300 of 600 steps take 72 s, the others 18: the schedule is shortened first, then it grows again."""
    clock = {'now': 0.05}
    monkeypatch.setattr(
        engine, 'hoursUsed', lambda: clock['now'] if clock['now'] < 6.05 else 6.05 + (clock['now'] - 6.05) / 4
    )
    config.TIME_BUDGET = 7.2
    _, rate, schedule = runInTime(clock, 0.02)
    ends = [int(end) for end in re.findall(r'(\d+) of 600 steps fit into the 7.2 hours', capsys.readouterr().out)]
    # first told after 40 steps, at .85 hours: (7.2 - .85 - .05 (7.2 - .45)) / .02 = 300 steps more
    assert ends[0] == 340 and ends[-1] == schedule.numSteps == schedule.last_epoch and rate == 0
    assert 6.6 < engine.hoursUsed() <= 7.2  # 6.25 without; .05 of the time is left for the validation


def test_PolySchedule_measuresTheSpeedAnewWhenItIsResumed(monkeypatch):
    """The hour between a cell that was stopped and the same cell run again is no time of its steps."""
    clock = {'now': 1.0}
    monkeypatch.setattr(engine, 'hoursUsed', lambda: clock['now'])
    config.TIME_BUDGET = 8.5
    schedule = engine.PolySchedule(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1), 1000)
    state = schedule.state_dict()
    schedule.fit()
    clock['now'] = 2.0
    schedule.load_state_dict(state)
    schedule.fit()
    assert schedule.numSteps == 1000


def test_epochs_doNotBeginWhenTheTimeIsOver(monkeypatch, capsys):
    """A notebook that has been open for longer than the time does not end the run: it can be resumed."""
    monkeypatch.setattr(checkpoints, 'hoursUsed', lambda: 9.25)
    config.TIME_BUDGET, config.SCHEDULE = 8.5, 'poly'
    assert next(checkpoints.epochs(0), None) is None
    assert '9.25 of the 8.5 hours of config.TIME_BUDGET are used. Run again to resume.' in capsys.readouterr().out


def test_epochs_keepTheEndOfAScheduleThatWasShortened(tmp_path, monkeypatch, capsys):
    """Killed after the third epoch and resumed by a faster process, the run ends at the same step, bit for bit."""
    clock, ends = {}, []
    monkeypatch.setattr(engine, 'hoursUsed', lambda: clock['now'])
    config.TIME_BUDGET = 3.55
    for name, hours, stopAfter in (('whole', 0.01, None), ('killed', 0.01, 2), ('killed', 0.001, None)):
        config.OUTPUT_FOLDER, clock['now'] = str(tmp_path / name), 0.05
        torch.manual_seed(0)
        weights, rate, schedule = runInTime(clock, hours, stopAfter)
        ends.append((weights, rate, schedule.numSteps))
    whole, killed, resumed = ends
    assert killed[1] > 0 and whole[1] == resumed[1] == 0 and whole[2] == resumed[2] < 600
    assert all(torch.equal(whole[0][name], resumed[0][name]) for name in whole[0])
    assert f'The schedule was shortened to {whole[2]} steps' in capsys.readouterr().out


def test_epochs_keepThePlanWhereTheTimeIsEnough(monkeypatch, capsys):
    """600 steps of 36 s end at step 600 within 7 hours, and nothing is said."""
    clock = {'now': 0.05}
    monkeypatch.setattr(engine, 'hoursUsed', lambda: clock['now'])
    config.TIME_BUDGET = 7
    _, rate, schedule = runInTime(clock, 0.01)
    assert rate == 0 and schedule.numSteps == schedule.last_epoch == 600
    assert 'fit into' not in capsys.readouterr().out


def test_loadCheckpoint_warnsOfWeightsBeforeTheEnd(tmp_path):
    """Weights of an epoch before the end are named as such; those of the end, and of a plateau, are not."""
    runAveraged(tmp_path, 2)
    words = r'last\.pt has the weights after epoch 2 of 4, step 8 of 16: the learning rate had not fallen to 0'
    with pytest.warns(UserWarning, match=words):
        checkpoints.loadCheckpoint(makeRun()[0], None, None, None, config.LAST_CHECKPOINT)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        runAveraged(tmp_path, 4)
        checkpoints.loadCheckpoint(makeRun()[0], None, None, None, config.LAST_CHECKPOINT)
        config.OUTPUT_FOLDER, config.SCHEDULE = str(tmp_path / 'plateau'), 'plateau'
        write([1])
        checkpoints.loadCheckpoint(makeRun()[0], None, None, None, config.BEST_CHECKPOINT)


@pytest.mark.parametrize('start', [0, 1, 3])
def test_epochs_refusesALoopThatDoesNotResume(start):
    """After two epochs the third is next: the loop started again from anywhere else is refused before it trains."""
    write([2, 1])
    with pytest.raises(ValueError, match=rf'last\.pt goes on with epoch 3, not {start + 1}: it is not written over'):
        next(checkpoints.epochs(start))


# Saving


def test_makeCheckpoint_keepsTheBest(tmp_path):
    """The best file is of the epoch with the lowest validation loss, the last file of the last epoch."""
    run, best = makeRun(), INFINITE
    for epoch, loss in enumerate([3.0, 1.0, 2.0]):
        with torch.no_grad():
            run[0][0].bias.fill_(epoch)
        best = checkpoints.makeCheckpoint(epoch, *run, loss / 2, loss, best)
    assert best == 1
    for path, nextEpoch, valLoss in ((config.BEST_CHECKPOINT, 2, 1), (config.LAST_CHECKPOINT, 3, 2)):
        model, *_, epoch, trainLoss, found, bestFound = checkpoints.loadCheckpoint(*makeRun(1), path)
        assert (epoch, trainLoss, found, bestFound) == (nextEpoch, valLoss / 2, valLoss, 1)
        assert (model[0].bias == nextEpoch - 1).all()
    assert not list(tmp_path.rglob('*.part'))


def test_makeCheckpoint_holdsOnlyPlainValues():
    """Losses may be NumPy or torch scalars; the file loads weights-only and holds settings and history."""
    checkpoints.makeCheckpoint(np.int64(0), *makeRun(), np.float64(2), torch.tensor(1.0), INFINITE)
    content = torch.load(config.LAST_CHECKPOINT, weights_only=True)
    assert content['settings']['MODALITIES'] == ['t1ce', 't2', 'flair']
    assert content['settings']['CLASS_NAMES'][3] == 'enhancing tumor'
    assert content['history'] == [{'epoch': 1, 'trainLoss': 2.0, 'valLoss': 1.0, 'learnRate': 0.01}]


@pytest.mark.parametrize('epoch', [0, 1])
def test_makeCheckpoint_refusesAnEpochThatTheFileHas(epoch):
    """The loop run again in a notebook does not write over what was trained: checkpoint and history stay."""
    write([2.0, 1.0])
    files = [Path(config.LAST_CHECKPOINT), Path(config.BEST_CHECKPOINT), Path(config.OUTPUT_FOLDER, 'history.csv')]
    before = [file.read_bytes() for file in files]
    with pytest.raises(ValueError, match=rf'goes on with epoch 3, not {epoch + 1}.* Resume with loadCheckpoint'):
        checkpoints.makeCheckpoint(epoch, *makeRun(), 1, 0.5, 1.0)
    assert [file.read_bytes() for file in files] == before


def test_makeCheckpoint_mayBeCalledEveryFewEpochs():
    """A script that saves every fourth epoch runs, and resumes after the last that it saved."""
    for epoch in (3, 7):
        checkpoints.makeCheckpoint(epoch, *makeRun(), 1, 1.0, 1.0)
    assert checkpoints.loadCheckpoint(*makeRun(), config.LAST_CHECKPOINT)[4] == 8


def test_makeCheckpoint_writesTheRateAfterTheEpoch():
    """The rate in the history is that of the next epoch, as the scheduler has set it."""
    loader = [(torch.randn(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.long))]
    model, optimizer, scheduler, scaler = makeRun()
    for epoch in range(3):
        engine.train(model, torch.nn.CrossEntropyLoss(), optimizer, scaler, loader)
        scheduler.step(1.0)  # no improvement: halved after every epoch but the first
        checkpoints.makeCheckpoint(epoch, model, optimizer, scheduler, scaler, 1, 1, 1)
    assert list(checkpoints.readHistory()['learnRate']) == [0.01, 0.005, 0.0025]
    assert optimizer.param_groups[0]['lr'] == 0.0025


def test_makeCheckpoint_survivesAnInterruptBetweenItsFiles(tmp_path, monkeypatch):
    """The last checkpoint is replaced after the best one; an interrupt before either leaves the older ones whole."""
    replaced, replace = [], os.replace
    monkeypatch.setattr(os, 'replace', lambda part, file: (replaced.append(file.name), replace(part, file)))
    run = makeRun()
    checkpoints.makeCheckpoint(0, *run, 2, 2, 3)
    assert replaced == ['history.csv', 'best.pt', 'last.pt']

    def interrupt(content, file):
        file.write(b'half')
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, 'save', interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.makeCheckpoint(1, *run, 1, 1, 2)
    assert checkpoints.loadCheckpoint(*makeRun(1), config.BEST_CHECKPOINT)[4] == 1
    assert checkpoints.loadCheckpoint(*makeRun(1), config.LAST_CHECKPOINT)[4] == 1
    assert not list(tmp_path.rglob('*.part'))


def test_readHistory_countsEpochsFrom1():
    """Each epoch is one row of history.csv; without any, the file is missing."""
    with pytest.raises(FileNotFoundError, match=r'history\.csv'):
        checkpoints.readHistory()
    write([3.0, 1.0])
    expected = {'epoch': [1, 2], 'trainLoss': 1.0, 'valLoss': [3.0, 1.0], 'learnRate': 0.01}
    pd.testing.assert_frame_equal(checkpoints.readHistory(), pd.DataFrame(expected), check_dtype=False)


# Resuming


def runEpochs(folder, upTo, workers, isBatched):
    """Run the notebook's loop from the last checkpoint on, with random transforms, shuffling and dropout."""
    config.OUTPUT_FOLDER = str(folder)
    generator = np.random.default_rng(0)
    image = generator.uniform(-1, 1, (12, 3, 32, 32)).astype(np.float16)
    writePatchFile(folder / 'a.h5', image, generator.integers(0, 4, (12, 32, 32)).astype(np.uint8))
    transform = preprocess.makeTransforms()[0]
    augment = batched.Batched(transform) if isBatched else None
    dataset = utils.BRATSDataset(folder / 'a.h5', 12, None if isBatched else transform, raw=isBatched)
    loader = torch.utils.data.DataLoader(dataset, 4, shuffle=True, num_workers=workers)
    criterion = torch.nn.CrossEntropyLoss()
    state = checkpoints.loadCheckpoint(*makeRun(), config.LAST_CHECKPOINT)
    model, optimizer, scheduler, scaler, start, _, _, best = state
    for epoch in range(start, upTo):
        trainLoss = engine.train(model, criterion, optimizer, scaler, loader, augment) / len(dataset)
        valLoss = engine.validate(model, criterion, loader) / len(dataset)
        scheduler.step(valLoss)
        best = checkpoints.makeCheckpoint(epoch, model, optimizer, scheduler, scaler, trainLoss, valLoss, best)
    return model.state_dict(), checkpoints.readHistory(), random.random(), np.random.rand()


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:The model was trained on')
@pytest.mark.parametrize(('workers', 'isBatched'), [(0, True), (2, False)])
def test_loadCheckpoint_resumedEqualsUninterrupted(tmp_path, workers, isBatched):
    """Stopped after two of four epochs and resumed: weights, history and random states are the same, bit for bit."""
    for name in ('whole', 'parts'):
        (tmp_path / name).mkdir()
    random.seed(0), np.random.seed(0)
    weights, history, *drawn = runEpochs(tmp_path / 'whole', 4, workers, isBatched)
    random.seed(0), np.random.seed(0)
    runEpochs(tmp_path / 'parts', 2, workers, isBatched)
    torch.manual_seed(99), random.seed(99), np.random.seed(99)
    resumed, resumedHistory, *resumedDrawn = runEpochs(tmp_path / 'parts', 4, workers, isBatched)
    assert [name for name in weights if not torch.equal(weights[name], resumed[name])] == []
    assert history.equals(resumedHistory) and list(history['epoch']) == [1, 2, 3, 4]
    assert drawn == resumedDrawn


def runAveraged(folder, upTo):
    """Run epochs of 4 batches with a schedule by steps and averaged weights, from the last checkpoint on."""
    config.OUTPUT_FOLDER = str(folder)
    config.SCHEDULE, config.AVERAGE, config.EPOCHS = 'poly', 0.3, 4
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, 3, 8, 8, generator=generator)
    dataset = torch.utils.data.TensorDataset(images, (images[:, 0] > 0).long())
    loader = torch.utils.data.DataLoader(dataset, 4, shuffle=True)
    model, optimizer, _, scaler = makeRun()
    scheduler, average = engine.makeScheduler(optimizer, 16), engine.makeAverage(model, 16)
    criterion = torch.nn.CrossEntropyLoss()
    state = checkpoints.loadCheckpoint(model, optimizer, scheduler, scaler, config.LAST_CHECKPOINT, average)
    *_, start, _, _, best = state
    for epoch in range(start, upTo):
        trainLoss = engine.train(model, criterion, optimizer, scaler, loader, None, scheduler, average)
        valLoss, dice = engine.validate(average, criterion, loader, dice=True)
        run = (model, optimizer, scheduler, scaler, trainLoss, valLoss, best)
        best = checkpoints.makeCheckpoint(epoch, *run, average, dice)
    return {**model.state_dict(), **average.state_dict()}, checkpoints.readHistory()


def test_loadCheckpoint_resumesAverageAndSchedule(tmp_path):
    """With averaged weights and a schedule by steps, two and two epochs equal four, bit for bit."""
    torch.manual_seed(0)
    weights, history = runAveraged(tmp_path / 'whole', 4)
    torch.manual_seed(0)
    runAveraged(tmp_path / 'parts', 2)
    torch.manual_seed(99)
    resumed, resumedHistory = runAveraged(tmp_path / 'parts', 4)
    assert [name for name in weights if not torch.equal(weights[name], resumed[name])] == []
    assert history.equals(resumedHistory) and {'diceWT', 'diceTC', 'diceET'} < set(history.columns)
    assert history['learnRate'].is_monotonic_decreasing
    assert not torch.equal(weights['0.weight'], weights['module.0.weight'])


def test_loadCheckpoint_predictsWithTheAverage(tmp_path):
    """Without an optimizer the averaged weights are loaded; to resume, the average has to be given."""
    weights, _ = runAveraged(tmp_path, 4)
    model, optimizer, _, scaler = makeRun(1)
    checkpoints.loadCheckpoint(model, None, None, None, config.LAST_CHECKPOINT)
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[f'module.{name}'])
    with pytest.raises(ValueError, match='was made with a moving average'):
        checkpoints.loadCheckpoint(model, optimizer, None, scaler, config.LAST_CHECKPOINT)


def test_train_refusesOtherBatchesOfAResumedRun(tmp_path):
    """With half the batches an epoch, a schedule that counts them would be at its end too early: it is refused."""
    runAveraged(tmp_path, 2)
    model, optimizer, _, scaler = makeRun()
    scheduler, average = engine.makeScheduler(optimizer, 16), engine.makeAverage(model, 16)
    checkpoints.loadCheckpoint(model, optimizer, scheduler, scaler, config.LAST_CHECKPOINT, average)
    batches = [(torch.randn(8, 3, 8, 8), torch.zeros(8, 8, 8, dtype=torch.long))] * 2
    with pytest.raises(ValueError, match='begun with 4 batches an epoch, and now has 2'):
        engine.train(model, torch.nn.CrossEntropyLoss(), optimizer, scaler, batches, None, scheduler, average)


def test_loadCheckpoint_tellsAnotherNumberOfSteps(tmp_path, capsys):
    """A finished run of 16 steps that gets 32 goes on at half of the maximal rate, and says so."""
    runAveraged(tmp_path, 4)
    config.EPOCHS, config.POLY_POWER = 8, 0.9
    model, optimizer, _, scaler = makeRun()
    scheduler, average = engine.makeScheduler(optimizer, 32), engine.makeAverage(model, 32)
    checkpoints.loadCheckpoint(model, optimizer, scheduler, scaler, config.LAST_CHECKPOINT, average)
    assert 'after 16 steps the learning rate goes on at 0.54 of its maximum, not at 0.00' in capsys.readouterr().out


def test_loadCheckpoint_refusesToLengthenARunThatEndedWithinAnEpoch(tmp_path):
    """A run of 14 steps, three epochs of 4 and one of 2, cannot become one of 16: its epochs no longer count."""
    with mock.patch.object(engine, 'makeScheduler', lambda optimizer, _: engine.PolySchedule(optimizer, 14)):
        runAveraged(tmp_path, 4)
    with pytest.raises(ValueError, match='ended after its 14 steps, within an epoch, and cannot become 16 steps long'):
        runAveraged(tmp_path, 4)


def test_loadCheckpoint_startsFromZeroWithoutAFile(tmp_path, capsys):
    """Without a file the same objects, epoch 0 and infinite losses are returned; the scheduler may be None."""
    model, optimizer, _, scaler = makeRun()
    result = checkpoints.loadCheckpoint(model, optimizer, None, scaler, str(tmp_path / 'none.pt'))
    assert result == (model, optimizer, None, scaler, 0, INFINITE, INFINITE, INFINITE)
    assert 'starting from epoch 1' in capsys.readouterr().out


def test_loadCheckpoint_warnsOfAModelThatIsNotTheOneOfConfig(tmp_path):
    """After a change of config the model has to be made again, or its checkpoints could not be loaded."""
    vars(config).update(ENCODER_NAME='resnet18', ENCODER_DEPTH=3, DECODER_CHANNELS=(16, 8, 8), ENCODER_WEIGHTS=None)
    model, scaler = engine.makeModel(), torch.amp.GradScaler('cuda', enabled=False)
    optimizer = torch.optim.SGD(model.parameters(), 1)
    state, file = torch.random.get_rng_state(), str(tmp_path / 'none.pt')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        checkpoints.loadCheckpoint(model, optimizer, None, scaler, file)
    config.DECODER_CHANNELS = (16, 8, 16)
    with pytest.warns(UserWarning, match='is not the Unet with a resnet18 that config describes'):
        checkpoints.loadCheckpoint(model, optimizer, None, scaler, file)
    assert torch.random.get_rng_state().equal(state)


def test_loadCheckpoint_enablesAScalerThatWasDisabled():
    """A checkpoint made with a disabled scaler, as on the CPU, loads into an enabled one, whose scale stays."""
    model, optimizer, scheduler, scaler = makeRun()
    checkpoints.makeCheckpoint(0, model, optimizer, None, scaler, 1, 1, 2)
    enabled = torch.amp.GradScaler('cpu', enabled=True)
    scale = enabled.get_scale()
    assert checkpoints.loadCheckpoint(model, optimizer, scheduler, enabled, config.LAST_CHECKPOINT)[4] == 1
    assert enabled.get_scale() == scale


def test_loadCheckpoint_restoresSchedulerAndScaler():
    """The scheduler goes on counting the epochs without improvement; an enabled scaler has its scale back."""
    model, optimizer, _, _ = makeRun()
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
    for loss in (1.0, 2.0):
        scheduler.step(loss)
    scaler = torch.amp.GradScaler('cpu', init_scale=8.0)
    checkpoints.makeCheckpoint(0, model, optimizer, scheduler, scaler, 2, 2, 1)
    model, optimizer, _, _ = makeRun(1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
    scaler = torch.amp.GradScaler('cpu')
    checkpoints.loadCheckpoint(model, optimizer, scheduler, scaler, config.LAST_CHECKPOINT)
    assert scaler.get_scale() == 8 and scheduler.num_bad_epochs == 1 and scheduler.best == 1
    scheduler.step(2.0)
    assert optimizer.param_groups[0]['lr'] == pytest.approx(1e-3)


class Program:
    """An object that runs code when it is unpickled."""

    def __reduce__(self):
        return print, ('a program ran',)


@pytest.mark.parametrize(
    ('changes', 'width', 'words'),
    [
        ({}, 9, r'belongs to another model: its 0\.bias is \(8,\), the given model has \(9,\)'),
        ({'format': 99}, 8, 'has the format 99, this version reads 4'),
        ({'format': 'other'}, 8, 'is not a checkpoint of this package'),
        ({'format': Program()}, 8, 'is not a checkpoint of this package'),
    ],
)
def test_loadCheckpoint_refusesAnotherRunsFile(tmp_path, capsys, changes, width, words):
    """Another model, a newer or unknown format, and a pickled program are refused, and the model stays as it is."""
    write([1])
    torch.save({**torch.load(config.LAST_CHECKPOINT, weights_only=True), **changes}, tmp_path / 'other.pt')
    model, *others = makeRun(1, width)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf'other\.pt .*{words}'):
        checkpoints.loadCheckpoint(model, *others, tmp_path / 'other.pt')
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert 'a program ran' not in capsys.readouterr().out


def test_loadCheckpoint_refusesOtherSettings():
    """Other modalities, or the same in another order, and another class of model are refused."""
    write([1])
    _, *others = makeRun()
    with pytest.raises(ValueError, match=r'last\.pt was made with model = Sequential, this run has model = Conv2d'):
        checkpoints.loadCheckpoint(torch.nn.Conv2d(3, 4, 1), *others, config.LAST_CHECKPOINT)
    config.MODALITIES = ('flair', 't1ce', 't2')
    words = r"MODALITIES = \['t1ce', 't2', 'flair'\], this run has MODALITIES = \['flair', 't1ce', 't2'\]"
    with pytest.raises(ValueError, match=words):
        checkpoints.loadCheckpoint(*makeRun(), config.LAST_CHECKPOINT)


def test_loadCheckpoint_refusesADamagedFile(tmp_path):
    """A file that was cut off is named, also by the loop and by the next checkpoint, which does not replace it."""
    write([1])
    stream = io.BytesIO()
    torch.save(torch.load(config.LAST_CHECKPOINT, weights_only=True), stream)
    for file in (tmp_path / 'cut.pt', config.LAST_CHECKPOINT):
        with open(file, 'wb') as part:
            part.write(stream.getvalue()[:2000])
    with pytest.raises(ValueError, match=r'cut\.pt is not a checkpoint of this package, or is damaged'):
        checkpoints.loadCheckpoint(*makeRun(), tmp_path / 'cut.pt')
    for call in (lambda: checkpoints.makeCheckpoint(1, *makeRun(), 1, 1, 2), lambda: next(checkpoints.epochs(1))):
        with pytest.raises(ValueError, match=r'last\.pt is not a checkpoint of this package, or is damaged'):
            call()


def test_epochs_worksOnADiskWithoutMemoryMapping(monkeypatch):
    """Where files cannot be mapped, the checkpoint is read whole: its history still stops the run."""
    load = torch.load

    def refuseMapping(*arguments, mmap=False, **options):
        if mmap:
            raise RuntimeError('unable to mmap')
        return load(*arguments, **options)

    config.EPOCHS, config.PATIENCE = 20, 2
    write([1, 2, 3])
    monkeypatch.setattr(torch, 'load', refuseMapping)
    assert next(checkpoints.epochs(3), None) is None


@pytest.mark.parametrize(
    ('name', 'value'),
    [('LOSS_GAMMA', 1.0), ('LEARN_RATE', 5e-4), ('WEIGHT_DECAY', 0), ('SEED', 1), ('GRADIENT_CLIP', 9)],
)
def test_loadCheckpoint_resumesOnlyTheSameRecipe(name, value):
    """With another number of the training the run is not resumed; its weights can still be loaded."""
    write([1])
    setattr(config, name, value)
    model, *others = makeRun()
    with pytest.raises(ValueError, match=rf'last\.pt was made with {name} = .*, this run has {name} = {value}'):
        checkpoints.loadCheckpoint(model, *others, config.LAST_CHECKPOINT)
    assert checkpoints.loadCheckpoint(model, None, None, None, config.LAST_CHECKPOINT)[4] == 1


def test_makeCheckpoint_acceptsNumpyNumbers():
    """Numbers that were computed by NumPy are stored as plain ones, which weights-only loading accepts."""
    config.LEARN_RATE, config.DECODER_CHANNELS = np.float64(1e-3), tuple(np.array([64, 32]))
    write([1])
    assert checkpoints.loadCheckpoint(*makeRun(), config.LAST_CHECKPOINT)[4] == 1
