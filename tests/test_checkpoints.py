import time

import psutil
import pytest
import torch

import config
import utils


def write(losses):
    """Makes a checkpoint after each of some epochs, with these validation losses."""
    model = torch.nn.Conv2d(3, 4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for epoch, loss in enumerate(losses):
        best = min([float('inf'), *losses[:epoch]])
        utils.makeCheckpoint(epoch, model, optimizer, None, torch.amp.GradScaler('cpu', enabled=False), 1, loss, best)


def test_epochs_runsToTheLast(capsys):
    """Without a reason to stop: every epoch from the given one on, and not a word."""
    config.EPOCHS = 5
    assert list(utils.epochs(2)) == [2, 3, 4] and list(utils.epochs(5)) == []
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize(
    ('losses', 'patience', 'isOver'),
    [
        ([3, 2, 1, 2, 3], 2, True),
        ([3, 2, 1, 2, 3], 3, False),
        ([3, 2, 1, 1, 1], 2, True),  # as good is not better
        ([1, 2, 3, 0.5], 2, False),  # the latest is the best
        ([1, 2, 3, 4, 5], None, False),
        ([], 1, False),
    ],
)
def test_epochs_stopsWithoutImprovement(losses, patience, isOver, capsys):
    """As many epochs as config.PATIENCE after the best one end it, in the run itself and in one that resumes it."""
    config.EPOCHS, config.PATIENCE = 20, patience
    write(losses)
    assert (next(utils.epochs(len(losses)), None) is None) == isOver
    assert ('did not improve the validation loss' in capsys.readouterr().out) == isOver


def test_epochs_looksAtTheCheckpointAfterEveryEpoch():
    """A loop whose losses rise from the second on ends itself after PATIENCE more."""
    config.EPOCHS, config.PATIENCE = 20, 3
    losses, run = [2.0, 1.0, 1.5, 1.6, 1.7, 1.8], []
    for epoch in utils.epochs(0):
        run.append(epoch)
        write(losses[: epoch + 1])
    assert run == [0, 1, 2, 3, 4]


def test_epochs_endsBeforeTheBudgetIsSpent(monkeypatch, capsys):
    """With epochs of an hour, half an hour after the start of the process, 3.6 hours hold three and not four."""
    start, now = psutil.Process().create_time(), 1800.0
    monkeypatch.setattr(time, 'time', lambda: start + now)
    monkeypatch.setattr(time, 'monotonic', lambda: now)
    config.TIME_BUDGET, config.EPOCHS, run = 3.6, 20, []
    for epoch in utils.epochs(0):
        run.append(epoch)
        now += 3600
    assert run == [0, 1, 2]
    assert '3.50 of the 3.6 hours' in capsys.readouterr().out


def test_epochs_ofAnotherRunDoNotCount():
    """A fresh start beside an older checkpoint is not stopped by that one's losses."""
    config.EPOCHS, config.PATIENCE = 20, 2
    write([1, 2, 3, 4])
    assert next(utils.epochs(0)) == 0
