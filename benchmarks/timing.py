"""Measure the time and memory of methods that do the same work, and describe the machine."""

import contextlib
import ctypes
import os
import platform
import threading
import time
from importlib import metadata
from pathlib import Path

import pandas as pd
import psutil
import torch

import config

ROUNDS = 5


def measure(stage, methods, numUnits=1, rounds=ROUNDS):
    """Return how long each of several methods takes, measured interleaved.

    Every round calls each method once, so that other load on the machine affects all of them alike. A first round warms
    up and is not counted.

    Args:
        stage: what the methods do, and the unit of the times, for example 'prediction, per patient'.
        methods: dict of name to a function without arguments. The first one is the reference. A function that returns
            `Seconds` measures itself.
        numUnits: number of units, such as patients, that one call works on.
        rounds: how often each method is timed.

    Returns:
        DataFrame with the columns `stage`, `method`, `ms` (median per unit) and `ratio` (to the reference in the same
        round, median over the rounds).
    """
    times = {name: [] for name in methods}
    for number in range(rounds + 1):
        for name in times:
            start = time.perf_counter()
            seconds = methods[name]()
            waitForDevice()
            if not isinstance(seconds, Seconds):
                seconds = time.perf_counter() - start
            if number > 0:
                times[name].append(1e3 * seconds / numUnits)
    times = pd.DataFrame(times)  # a row for each round
    ratios = times.div(times.iloc[:, 0], axis=0)
    table = pd.DataFrame({'ms': times.median(), 'ratio': ratios.median()}).rename_axis('method').reset_index()
    table.insert(0, 'stage', stage)
    return table


def waitForDevice():
    """Wait until the GPU, if there is one, has finished its work."""
    if config.DEVICE == 'cuda':
        torch.cuda.synchronize()


def timeLoader(loader, augment=None):
    """Load batches, augment them on the device, and return the `Seconds` per sample.

    Time is taken from the second batch on, without the start of the workers: an epoch of BraTS has a thousand batches.
    """
    numSamples = 0
    for number, (image, label) in enumerate(loader):
        if number == 0:
            start = time.perf_counter()
            continue
        image, label = (values.to(config.DEVICE, non_blocking=True) for values in (image, label))
        numSamples += len(image)
        if augment is not None:
            augment(image, label)
    waitForDevice()
    return Seconds((time.perf_counter() - start) / numSamples)


class RestOfEpoch:
    """The batches of a loader that an iterator has not returned yet, as a loader."""

    def __init__(self, batches, length):
        self.batches, self.length = batches, length

    def __len__(self):
        return self.length

    def __iter__(self):
        return self.batches


class Seconds(float):
    """The time that a method measured itself."""


def makeTimed(function, amount=1):
    """Return a function that calls another one and returns its `Seconds`, divided by the amount of work of a call."""

    def run():
        start = time.perf_counter()
        function()
        waitForDevice()
        return Seconds((time.perf_counter() - start) / amount)

    return run


def measurePeak(settings, function, *arguments):
    """Set some values of `config`, and return by how many GB the memory grows at most while a function runs.

    The resident memory is read every 5 ms. Run it in a fresh process: memory that was released before may be used again
    unseen.
    """
    vars(config).update(settings)
    process, isDone = psutil.Process(), threading.Event()
    if trim := getattr(ctypes.CDLL(None), 'malloc_trim', None):  # of glibc, after `patients.volumes.keepMemory`
        trim(0)
    before = highest = process.memory_info().rss

    def watch():
        nonlocal highest
        while not isDone.wait(0.005):
            highest = max(highest, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        function(*arguments)
    finally:
        isDone.set()
        watcher.join()
    return (highest - before) / 1e9


def describeMachine(dtype=None):
    """Return one line about the processor, the device, the dtype that it computes in (None: float32) and versions."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        processor = next((line.split(':')[1].strip() for line in lines if line.startswith('model name')), processor)
    device = torch.cuda.get_device_name() if config.DEVICE == 'cuda' else config.DEVICE
    versions = [f'{name} {metadata.version(name)}' for name in ('torchio', 'segmentation-models-pytorch')]
    return (
        f'{os.cpu_count()} cores ({processor}), device {device} computing in {dtype or torch.float32}, '
        f'Python {platform.python_version()}, torch {torch.__version__}, {", ".join(versions)}'
    )
