"""Times are medians of interleaved calls, and memory is the peak that a function adds."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import config
from benchmarks import timing
from patients.volumes import keepMemory


def _setClock(monkeypatch, *seconds):
    """Replace the clock by one that shows these times, one per reading."""
    monkeypatch.setattr(timing, 'time', SimpleNamespace(perf_counter=iter(seconds).__next__))


def test_measure_dividesByTheFirstMethod():
    """1 s and 4 s compared with 3 s and 2 s have medians of 2.5 s and ratios of 3 and 1/2, whose median is 1.75."""
    ours, theirs = iter([9, 1, 4]), iter([9, 3, 2])  # the first call of each is not counted
    methods = {'ours': lambda: timing.Seconds(next(ours)), 'theirs': lambda: timing.Seconds(next(theirs))}
    table = timing.measure('work', methods, numUnits=10, rounds=2)
    assert table.columns.tolist() == ['stage', 'method', 'ms', 'ratio']
    assert table.stage.tolist() == ['work'] * 2 and table.method.tolist() == ['ours', 'theirs']
    np.testing.assert_allclose(table.ms, [250, 250])
    np.testing.assert_allclose(table.ratio, [1, 1.75])


def test_measure_interleavesTheMethods():
    """Each round, the first one to warm up included, calls every method once."""
    calls = []
    methods = {name: (lambda name=name: calls.append(name)) for name in 'ab'}
    timing.measure('work', methods, rounds=2)
    assert calls == ['a', 'b', 'a', 'b', 'a', 'b']


def test_measure_timesAFunctionFromOutside(monkeypatch):
    """A function that does not measure itself is timed from its start to its end."""
    _setClock(monkeypatch, 0, 1, 10, 14)
    assert timing.measure('work', {'ours': lambda: None}, rounds=1).ms.tolist() == [4000]


def test_makeTimed_dividesByTheAmount(monkeypatch):
    """A call of 3 s that does half a unit takes 6 s per unit."""
    _setClock(monkeypatch, 1, 4)
    seconds = timing.makeTimed(lambda: None, 0.5)()
    assert isinstance(seconds, timing.Seconds) and seconds == 6


def test_timeLoader_leavesTheFirstBatchOut(monkeypatch):
    """8 s after the first batch of three, with two samples each, are 2 s per sample, and two batches are augmented."""
    _setClock(monkeypatch, 1, 9)
    batch, augmented = (torch.zeros(2, 1), torch.ones(2)), []
    seconds = timing.timeLoader([batch] * 3, lambda image, label: augmented.append((image.shape, label.shape)))
    assert isinstance(seconds, timing.Seconds) and seconds == 2
    assert augmented == [((2, 1), (2,))] * 2


@pytest.mark.parametrize('megabytes', [0, 100, 400])
def test_measurePeak_seesWhatAFunctionAllocates(megabytes):
    """A function that fills and releases an array three times is seen with the size of one array."""

    def allocate():
        for _ in range(3):
            array = np.ones(megabytes * 125_000)
            time.sleep(0.03)
            del array
        time.sleep(0.03)

    keepMemory()
    np.ones(62_500_000)  # 500 MB that the process keeps
    assert timing.measurePeak({}, allocate) == pytest.approx(megabytes / 1e3, abs=0.03)


def test_measurePeak_setsTheConfigurationAndPassesErrorsOn():
    """The function sees the settings, and its error is raised."""
    with pytest.raises(ZeroDivisionError):
        timing.measurePeak({'SEED': 0}, lambda: 1 / config.SEED)


def test_describeMachine_namesDeviceAndVersions():
    """One line names the device, the dtype and the version of torch."""
    line = timing.describeMachine(torch.bfloat16)
    assert 'device cpu computing in torch.bfloat16' in line
    assert f'torch {torch.__version__}' in line and '\n' not in line
    assert 'computing in torch.float32' in timing.describeMachine()
