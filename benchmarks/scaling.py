"""Measure how cutting, predicting and scoring patients scale over threads, processes and Dask, and what DDP costs.

    python -m benchmarks.scaling [PATIENTS]
    python -m benchmarks.scaling FOLDER

PATIENTS is a number of phantoms. Each worker has one thread of torch, and is started before the time is taken. With
FOLDER, a folder of patients, 1, 4, 16, ... of them are cut, predicted and scored by one worker: is it linear?
"""

import contextlib
import functools
import multiprocessing
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

import joblib
import pandas as pd
import torch
import torch.distributed as dist

import config
import deploy
import engine
import phantom
import postprocess
import preprocess
import ranks
import utils
from benchmarks import timing
from benchmarks.benchmark import formatTable

NUM_WORKERS = 2
STEPS = 12  # of training, the first two of which are not counted
NETWORK = {'ENCODER_NAME': 'resnet18', 'ENCODER_WEIGHTS': None, 'DECODER_CHANNELS': (128, 64, 32, 16, 16)}


def main(numPatients=4):
    """Print how long each of several patients takes by each method, and a step of training by one and two ranks.

    Args:
        numPatients: full-size phantoms to work on.
    """
    import dask.distributed

    vars(config).update(NETWORK, DEVICE='cpu', PREPROCESS_WORKERS=1)
    torch.set_num_threads(1)
    print(timing.describeMachine(engine.precision(config.DEVICE)))
    options = {'n_workers': NUM_WORKERS, 'threads_per_worker': 1, 'dashboard_address': None}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(dask.distributed.Client(stack.enter_context(dask.distributed.LocalCluster(**options))))
        phantom.makeCases(folder / 'data', numPatients)
        df, model = utils.makeFileList(folder / 'data'), engine.makeModel()
        cut = functools.partial(preprocess.makeDataset, df, str(folder / 'train.h5'))
        predict = functools.partial(postprocess.predictFolder, df, model, folder / 'out')
        score = functools.partial(postprocess.scoreFolder, df, folder / 'done' / 'upload')
        print(formatTable(benchPatients('cutting', df, cut, folder)), flush=True)
        print(formatTable(benchPatients('predicting', df, predict, folder, 1)), flush=True)
        postprocess.predictFolder(df, model, folder / 'done')
        print(formatTable(benchPatients('scoring', df, score, folder)), flush=True)
    print(formatTable(benchRanks()))


def benchSizes(folder):
    """Print, and return, seconds and GB for growing numbers of the patients of a folder, by one worker.

    `GB` is by how much the memory of a fresh process grows at most while it cuts, predicts and scores.
    """
    df, rows = utils.makeFileList(folder), []
    for size in sorted({min(4**power, len(df)) for power in range(8)}):
        with tempfile.TemporaryDirectory() as place:
            context = multiprocessing.get_context('spawn')
            results = context.SimpleQueue()
            worker = context.Process(target=_workOn, args=(df[:size], Path(place), results))
            worker.start()
            worker.join()
            if worker.exitcode != 0:
                raise RuntimeError(f'The process for {size} patients failed; its error is above.')
            rows.append({'patients': size, **results.get()})
    table = pd.DataFrame(rows)
    print(table.round(2).to_string(index=False))
    return table


def _workOn(df, folder, results):
    """Cut, predict and score patients; put the seconds of each patient, the memory and the size of the patches."""
    torch.set_num_threads(1)
    settings = {'DEVICE': 'cpu', 'PREPROCESS_WORKERS': 1, 'MODALITIES': ('t1', 't1ce', 't2', 'flair')}
    vars(config).update(settings)
    model = deploy.pretrained()
    model.provenance |= {'patients': {}, 'earlier': {}, 'voxels': {}}  # patients of the training would not be scored
    stages = {
        'cut': functools.partial(preprocess.makeDataset, df, str(folder / 'train.h5')),
        'predict': functools.partial(postprocess.predictFolder, df, model, folder / 'out'),
        'score': functools.partial(postprocess.scoreFolder, df, folder / 'out' / 'upload'),
    }
    found = {}

    def work():
        for stage, function in stages.items():
            found[f'{stage}, s a patient'] = timing.makeTimed(function, len(df))()

    with warnings.catch_warnings(action='ignore'):  # of planes other than those of config
        found['GB'] = timing.measurePeak(settings, work)
    found['patches, MB a patient'] = (folder / 'train.h5').stat().st_size / 1e6 / len(df)
    results.put(found)


def benchPatients(stage, df, work, folder, rounds=3):
    """Measure one stage by each backend of joblib; what it has written is removed before each call."""
    backends = {
        '1 thread': ('threading', 1),
        '2 threads': ('threading', 2),
        '2 processes': ('loky', 2),
        '2 Dask workers': ('dask', 2),
    }

    def run(backend, workers):
        for path in (folder / 'train.h5', folder / 'out'):
            shutil.rmtree(path, ignore_errors=True)
            path.unlink(missing_ok=True)
        config.PREPROCESS_WORKERS = workers
        with joblib.parallel_config(backend, n_jobs=workers):
            return timing.makeTimed(work)()

    methods = {name: functools.partial(run, *each) for name, each in backends.items()}
    return timing.measure(f'{stage}, per patient', methods, numUnits=len(df), rounds=rounds)


def benchRanks():
    """Measure a step of training with 16 patches by one process, and by two ranks with 8 patches each."""
    methods = {'1 rank': lambda: spawnRanks(1), '2 ranks': lambda: spawnRanks(2)}
    return timing.measure('training step of 16 patches', methods, rounds=3)


def spawnRanks(number, kind='cpu'):
    """Return the `Seconds` of a step by so many ranks, as rank 0 measures them; with kind 'cuda', on a card each."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context('spawn')
        results = context.SimpleQueue()
        torch.multiprocessing.spawn(_timeSteps, (number, folder, results, kind), nprocs=number)
        return timing.Seconds(results.get())


def _timeSteps(rank, number, folder, results, kind):
    torch.set_num_threads(1)
    vars(config).update(NETWORK, DEVICE='cpu' if kind == 'cpu' else f'cuda:{rank}')
    if kind == 'cuda':
        torch.cuda.set_device(rank)
    if number > 1:
        backend = 'gloo' if kind == 'cpu' else 'nccl'
        dist.init_process_group(backend, init_method=f'file://{folder}/meeting', rank=rank, world_size=number)
    layers, criterion = engine.makeModel(), engine.makeCriterion()
    model = ranks.share(layers, criterion)
    optimizer, scaler = torch.optim.Adam(layers.parameters()), torch.amp.GradScaler(kind, enabled=False)
    size = config.PATCH_SIZE
    batch = torch.randn(16 // number, 3, size, size), torch.randint(0, 4, (16 // number, size, size))
    engine.train(model, criterion, optimizer, scaler, [batch] * 2)
    start = time.perf_counter()
    engine.train(model, criterion, optimizer, scaler, [batch] * (STEPS - 2))
    if rank == 0:
        results.put((time.perf_counter() - start) / (STEPS - 2))
    if number > 1:
        dist.destroy_process_group()


if __name__ == '__main__':
    if len(sys.argv) > 1 and not sys.argv[1].isdigit():
        benchSizes(sys.argv[1])
    else:
        main(*map(int, sys.argv[1:2]))
