"""Measure in one table what a graphics card gives: training, data, prediction, memory, members and ranks.

    python -m benchmarks.gpu OUTPUT

It works on phantoms of full size that it makes. A processor can run it too, to try it. A row that the machine cannot
measure says "not measured".
"""

import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import pandas as pd
import torch

import batched
import config
import engine
import phantom
import train
import transforms
import utils
from atomic import writeAtomically
from benchmarks import benchmark, scaling, timing
from preprocess import makeDataset

PATIENTS = 3  # phantoms
STEPS = 100  # of each training that is timed
ENCODERS = {'resnet18': (128, 64, 32, 16, 16), 'resnet34': (256, 128, 64, 32, 16)}  # and their decoders
MEMBERS = 4
NONE = 'not measured'


def main(output, shape=phantom.BOX):
    """Write `gpu.csv` into a folder; print and return its table.

    Returns:
        DataFrame with the columns `what`, `value` and `unit`.
    """
    config.ENCODER_WEIGHTS = None  # their download is not measured
    print(timing.describeMachine(engine.precision(config.DEVICE)), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        phantom.makeCases(Path(folder, 'data'), PATIENTS, shape=shape)
        df, file = utils.makeFileList(Path(folder, 'data')), str(Path(folder, 'train.h5'))
        makeDataset(df, file)
        rows = [row for encoder in ENCODERS for row in _measureEncoder(encoder, file, df)]
        rows += _measureMembers(df, Path(folder, 'members'))
    rows += _measureRanks()
    table = pd.DataFrame(rows, columns=['what', 'value', 'unit'])
    with writeAtomically(Path(output, 'gpu.csv')) as temporary:
        table.to_csv(temporary, index=False)
    print(table.to_string(index=False))
    return table


def _measureEncoder(encoder, file, df):
    """Return the rows of a network: its steps in each precision, with and without data, and its prediction."""
    vars(config).update(ENCODER_NAME=encoder, DECODER_CHANNELS=ENCODERS[encoder])
    dataset, size = utils.BRATSDataset(file, raw=True), config.BATCHSIZE
    held = [values.to(config.DEVICE) for values in benchmark.firstBatch(dataset)]
    usual, rows = engine.precision(config.DEVICE), []
    ways = {f'held, {usual or torch.float32}': usual}
    if _isOnGpu():
        ways |= {f'held, {dtype or torch.float32}': dtype for dtype in (torch.float16, torch.bfloat16, None)}
    for way, dtype in ways.items():
        seconds = _timeSteps(engine.makeModel(), itertools.repeat(held), dtype)
        rows.append((f'{encoder}: a step of {size} patches, {way}', 1000 * seconds, 'ms'))
        rows.append((f'{encoder}: its memory, {way}', _peak() or NONE, 'GB'))
    alone = rows[0][1] / 1000
    augment = batched.Batched(transforms.makeTransforms()[0])
    seconds = _timeSteps(engine.makeModel(), benchmark.makeLoader(dataset, STEPS + 2), usual, augment)
    rows.append((f'{encoder}: a step with loading and augmentation, over one without', seconds / alone, 'times'))
    name, value = f'{encoder}: a step, compiled', NONE
    if _isOnGpu():
        begin = time.perf_counter()
        model = torch.compile(engine.makeModel())
        value = 1000 * _timeSteps(model, itertools.repeat(held), usual)
        spent = time.perf_counter() - begin - STEPS * value / 1000
        rows.append((f'{encoder}: to compile', spent, 's'))
    rows.append((name, value, 'ms'))
    model = engine.makeModel()
    _peak()
    times = [timing.makeTimed(lambda: engine.predict(df.iloc[0], model))() for _ in range(4)]
    rows.append((f'{encoder}: a patient, {len(config.PLANES)} planes, with reading', statistics.median(times[1:]), 's'))
    rows.append((f'{encoder}: its memory, a patient', _peak() or NONE, 'GB'))
    return rows


def _timeSteps(model, batches, dtype, transform=None):
    """Return the seconds of a training step; two steps before are not counted."""
    optimizer, criterion = torch.optim.Adam(model.parameters()), engine.makeCriterion()
    scaler = torch.amp.GradScaler(config.DEVICE, enabled=dtype is torch.float16)
    batches = iter(batches)

    def trainOn(numSteps):
        part = timing.RestOfEpoch(itertools.islice(batches, numSteps), numSteps)
        engine.train(model, criterion, optimizer, scaler, part, transform)

    with mock.patch.object(engine, 'precision', lambda device: dtype):
        trainOn(2)
        _peak()
        return timing.makeTimed(lambda: trainOn(STEPS), STEPS)()


def _isOnGpu():
    return config.DEVICE.startswith('cuda')


def _peak():
    """Return the largest memory on the card since the last call, in GB; None on a processor."""
    if not _isOnGpu():
        return None
    peak = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return peak


def _measureMembers(df, folder):
    """Return how long one member and several on one device take, processes and patches included."""
    rows, device = [], 'cuda:0' if _isOnGpu() else config.DEVICE
    for number in (1, MEMBERS):
        members = [{'fold': 0, 'of': 2, 'seed': seed} for seed in range(number)]
        with train.configured({'OUTPUT_FOLDER': str(folder / str(number)), 'STEPS': STEPS}):
            begin = time.perf_counter()
            train.trainMembers(df, members, [device] * max(2, number))
            seconds = time.perf_counter() - begin
        rows.append(
            (f'{config.ENCODER_NAME}: {number} member(s) side by side on one device, {STEPS} steps each', seconds, 's')
        )
    return rows


def _measureRanks():
    """Return the step of one rank and of two, each on a card of its own; a batch is divided among them."""
    name = 'a step of 16 patches (resnet18), two cards over one'
    if torch.cuda.device_count() < 2 or not _isOnGpu():
        return [(name, NONE, 'times')]
    return [(name, scaling.spawnRanks(2, 'cuda') / scaling.spawnRanks(1, 'cuda'), 'times')]


if __name__ == '__main__':
    main(*sys.argv[1:2])
