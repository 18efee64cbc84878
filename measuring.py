"""Measure ways to do the same side by side."""

import contextlib
import io
import os
import platform
import statistics
import threading
import time
from pathlib import Path

import pandas as pd
import psutil
import segmentation_models_pytorch as smp
import torch
import torchio as tio

import config
import engine

ROUNDS = 5  # each way is measured so often, in turns, so that whatever else the machine does meets all alike


def measure(stage, ways, noUnits=1, rounds=ROUNDS):
    """Gives how long each of some ways to do the same takes, measured in turns after one call to warm up.

    Args:
        stage: what they do, and per what it is counted.
        ways: dict of name to a function without arguments, or None where it cannot be had here. The first is ours. A
            function that gives `Seconds` has measured itself.
        noUnits: what a call does, in units of the stage.
        rounds: how often each is measured.

    Returns:
        DataFrame with the columns `stage`, `way`, `ms` (median, per unit), `ratio` (to ours, median over the rounds).
    """
    times = {name: [] for name, way in ways.items() if way is not None}
    for turn in range(rounds + 1):
        for name in times:
            start = time.perf_counter()
            seconds = ways[name]()
            waitForDevice()
            seconds = seconds if isinstance(seconds, Seconds) else time.perf_counter() - start
            if turn:
                times[name].append(1e3 * seconds / noUnits)
    first, rows = next(iter(times.values())), []
    for name in ways:
        taken = times.get(name)
        ratio = taken and statistics.median(each / ours for each, ours in zip(taken, first, strict=True))
        rows.append({'stage': stage, 'way': name, 'ms': taken and statistics.median(taken), 'ratio': ratio})
    return pd.DataFrame(rows).astype({'ms': float, 'ratio': float})


def waitForDevice():
    if config.DEVICE == 'cuda':
        torch.cuda.synchronize()


class Seconds(float):
    """What a way took that has measured itself."""


def timed(function, share=1):
    """Gives a function that measures another's seconds itself, and divides them by a share or a count."""

    def run():
        start = time.perf_counter()
        function()
        waitForDevice()
        return Seconds((time.perf_counter() - start) / share)

    return run


def quietly(function):
    """Gives the function without its printing, which a table need not hold, and without its result."""

    def run():
        with contextlib.redirect_stdout(io.StringIO()):
            function()

    return run


def ifInstalled(make, *arguments):
    """Gives what a peer's function makes, or None where its package is not installed."""
    try:
        return make(*arguments)
    except ImportError:
        return None


def measurePeak(settings, function, *arguments):
    """Gives the GB by which this process grows at most while a function runs, looked at every few milliseconds."""
    vars(config).update(settings)
    process, isDone = psutil.Process(), threading.Event()
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


def describeMachine():
    """Gives one line about what the figures were measured on."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        processor = next((line.split(':')[1].strip() for line in lines if line.startswith('model name')), processor)
    device = torch.cuda.get_device_name() if config.DEVICE == 'cuda' else config.DEVICE
    return (
        f'{os.cpu_count()} cores ({processor}), device {device} computing in '
        f'{engine.precision(config.DEVICE) or torch.float32}, Python {platform.python_version()}, torch '
        f'{torch.__version__}, torchio {tio.__version__}, smp {smp.__version__}'
    )
