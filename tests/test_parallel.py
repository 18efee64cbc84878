import os
import threading
import time
import warnings

import joblib
import numpy as np
import pandas as pd
import pytest

import config
from conftest import listOf
from patients import parallel


@pytest.mark.parametrize('workers', [1, 3, -1])
def test_forEachPatient_keepsTheOrder(workers):
    """Results come in the order of the file list, whatever the time that each takes; -1 means every core."""
    config.PREPROCESS_WORKERS = workers
    delays = np.random.default_rng(0).uniform(0, 0.004, 60)
    df = pd.DataFrame({'number': range(60)}, [f'P{i}' for i in range(60)])

    def work(paths):
        time.sleep(delays[paths['number']])
        return paths.name

    assert list(parallel.forEachPatient(work, df, 'test')) == list(df.index)
    assert list(parallel.forEachPatient(work, df[:0], 'test')) == []


def test_forEachPatient_worksInThreadsOfThisProcess():
    """Two patients are worked on at once, by a function that cannot be sent to another process."""
    config.PREPROCESS_WORKERS = 2
    meeting = threading.Barrier(2, timeout=20)

    def work(paths):
        meeting.wait()  # returns only if another thread is here at the same time
        return os.getpid()

    assert list(parallel.forEachPatient(work, listOf(6), 'test')) == [os.getpid()] * 6


def test_forEachPatient_followsTheBackendOfJoblib():
    """Under joblib.parallel_config another backend does the work: the sequential one, in the caller's thread."""
    with joblib.parallel_config(backend='sequential'):
        threads = list(parallel.forEachPatient(lambda paths: threading.get_ident(), listOf(3), 'test'))
    assert threads == [threading.get_ident()] * 3


def test_forEachPatient_raisesTheErrorOfAPatient():
    """An error that the function raises reaches the caller as it is, and the patients of later blocks are not begun."""
    config.PREPROCESS_WORKERS, begun = 2, []

    def work(paths):
        begun.append(paths.name)
        if paths.name == 'BraTS2021_00005':
            raise KeyError('five')

    with pytest.raises(KeyError, match='five'):
        list(parallel.forEachPatient(work, listOf(100), 'test'))
    assert len(begun) <= 16


def test_forEachPatient_isAtMostABlockAhead():
    """However slow the caller, no more results are ready than 8 for each worker: memory does not grow with patients."""
    config.PREPROCESS_WORKERS, begun = 2, []
    for taken, _ in enumerate(parallel.forEachPatient(lambda paths: begun.append(paths.name), listOf(50), 'test')):
        time.sleep(0.01)  # time enough for the workers to begin all 50
        assert taken < len(begun) <= taken + 16
    assert len(begun) == 50


def test_forEachPatient_endsWhenTheCallerStops():
    """A generator that is closed early begins no more patients, warns of nothing and leaves no thread."""
    config.PREPROCESS_WORKERS, begun = 2, []

    def work(paths):
        begun.append(paths.name)
        time.sleep(0.01)

    list(parallel.forEachPatient(work, listOf(1), 'test'))  # starts the threads that stay, such as tqdm's
    numThreads = threading.active_count()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        results = parallel.forEachPatient(work, listOf(50), 'test')
        next(results)
        results.close()
    numBegun, end = len(begun), time.monotonic() + 10
    while threading.active_count() > numThreads and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() <= numThreads
    assert len(begun) <= numBegun + 2 and not caught


def test_leaveOut_raisesOrPrints(capsys):
    """With 'stop' the error says what was done before and how to go on; with 'leaveOut' it is printed."""
    with pytest.raises(
        ValueError, match=r"^P1: bad\. 3 of 9 were done\. config\.ON_BAD_PATIENT = 'leaveOut' would go on"
    ):
        parallel.leaveOut(ValueError('P1: bad.'), '3 of 9 were done.')
    config.ON_BAD_PATIENT = 'leaveOut'
    parallel.leaveOut(ValueError('P1: bad.'))
    assert capsys.readouterr().out == 'Left out: P1: bad.\n'


def test_resultsOf_keepsTheGoodAndNamesTheBad(capsys):
    """Of four patients two are bad: named at once with 'stop', printed and dropped with 'leaveOut'."""

    def work(paths):
        if paths.name[-1] in '02':
            raise ValueError(f'{paths.name}: bad')
        return paths.name[-1]

    with pytest.raises(
        ValueError, match=r'(?s)2 of 4 patients cannot be used.*BraTS2021_00000: bad.*BraTS2021_00002: bad'
    ):
        parallel.resultsOf(work, listOf(4), 'test')
    config.ON_BAD_PATIENT = 'leaveOut'
    assert parallel.resultsOf(work, listOf(4), 'test') == {'BraTS2021_00001': '1', 'BraTS2021_00003': '3'}
    assert capsys.readouterr().out.count('Left out: ') == 2
    with pytest.raises(ValueError, match='None of the 1 patients can be used: BraTS2021_00000: bad'):
        parallel.resultsOf(work, listOf(1), 'test')
