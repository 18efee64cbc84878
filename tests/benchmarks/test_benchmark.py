"""One run measures every stage, and prints the tables of the benchmarks' README."""

from pathlib import Path

import pandas as pd
import pytest
import torch

import config
import phantom
import preprocess
import utils
from benchmarks import benchmark, timing

README = Path(benchmark.__file__).with_name('README.md')


@pytest.fixture
def oneThread():
    """Let torch use one thread: more are slower for tiny tensors."""
    numThreads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(numThreads)


@pytest.mark.slow
def test_main_measuresEveryStage(tmp_path, monkeypatch, capsys, oneThread):
    """One run times every method of every stage, writes both tables, and prints them as in the README."""
    for package in ('monai', 'kornia', 'batchgeneratorsv2', 'surface_distance'):
        pytest.importorskip(package)
    config.ENCODER_NAME, config.ENCODER_DEPTH, config.DECODER_CHANNELS = 'resnet18', 3, (8, 4, 4)
    config.LOADER_WORKERS = 0
    measure, benchLoading = timing.measure, benchmark.benchLoading
    monkeypatch.setattr(timing, 'measure', lambda *arguments, rounds=1: measure(*arguments, rounds=1))
    monkeypatch.setattr(benchmark, 'benchLoading', lambda file: benchLoading(file, numSlow=2, numFast=3))
    memory = pd.DataFrame({'stage': ['memory of prediction'], 'method': ['predict'], 'GB': [0.5], 'ratio': [1.0]})
    monkeypatch.setattr(benchmark, 'BATCH', 2)
    monkeypatch.setattr(benchmark, 'benchMemory', lambda df, folder: memory)  # starts processes
    table, returned = benchmark.main(1, (48, 40, 16))
    assert returned is memory
    stages = [
        'augmentation',
        'loader',
        'preprocessing',
        'reading',
        'training',
        'prediction',
        'counts',
        'HD95',
        'lesion',
    ]
    assert [stage for stage in stages if not table.stage.str.startswith(stage).any()] == []
    assert (table.ms > 0).all() and (table.ratio > 0).all()
    assert (table.groupby('stage', sort=False).ratio.first() == 1).all()
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / 'output' / 'benchmark.csv'), table)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / 'output' / 'memory.csv'), memory)
    printed = capsys.readouterr().out
    assert benchmark.formatTable(table) in printed and benchmark.formatTable(memory) in printed
    # the README's table has the form of what is printed, and no stage that is not measured
    header, rule, *rows = README.read_text().split('<!-- table -->')[1].split('\n\n')[0].strip().splitlines()
    assert [header, rule] == benchmark.formatTable(table).splitlines()[:2]
    assert rows and {row.split('|')[1].strip() for row in rows} <= set(table.stage)


def test_benchReading_comparesMemoryWithFile(tmp_path):
    """Shuffled patches are read from memory and from the file, which takes longer; the configuration stays."""
    phantom.makeCases(tmp_path / 'data', 1, shape=(48, 40, 16))
    file = str(tmp_path / 'patches.h5')
    preprocess.makeDataset(utils.makeFileList(tmp_path / 'data'), file)
    before = config.CACHE_PATCHES
    table = benchmark.benchReading(file, numBatches=1)
    assert table.method.tolist() == ['from memory', 'from the file']
    assert (table.ms > 0).all() and table.ratio[1] > 1
    assert before == config.CACHE_PATCHES


@pytest.mark.slow
def test_benchMemory_findsLessThanTheNaiveBaseline(tmp_path, monkeypatch):
    """Cutting and predicting need memory, and less than half of what the naive baselines need."""
    phantom.makeCases(tmp_path / 'data', 1, shape=(160, 160, 48))
    config.PREDICT_BATCH, config.PREPROCESS_WORKERS, config.PATCH_STRIDE = 4, 1, 32
    config.ENCODER_NAME, config.ENCODER_DEPTH, config.DECODER_CHANNELS = 'resnet18', 3, (16, 16, 16)
    # memory that is released goes back to the system at once, so that one process suffices
    monkeypatch.setenv('MALLOC_MMAP_THRESHOLD_', '1000000')
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    startPool = benchmark.ProcessPoolExecutor
    monkeypatch.setattr(
        benchmark,
        'ProcessPoolExecutor',
        lambda *arguments, max_tasks_per_child, **named: startPool(*arguments, **named),
    )
    table = benchmark.benchMemory(utils.makeFileList(tmp_path / 'data'), tmp_path)
    assert table.columns.tolist() == ['stage', 'method', 'GB', 'ratio']
    assert table.stage.tolist() == ['memory of preprocessing'] * 2 + ['memory of prediction'] * 2
    assert table.method.tolist() == ['makeDataset', 'naive baseline', 'predict', 'naive baseline']
    assert (table.GB > 0.005).all()
    assert table.ratio[0] == table.ratio[2] == 1
    assert (table.ratio[[1, 3]] > 2).all()


@pytest.mark.parametrize('unit', ['ms', 'GB'])
def test_formatTable_writesARowPerStage(unit):
    """Numbers have two digits or more, never a power of ten; the first method is compared with the others."""
    table = pd.DataFrame(
        [
            ('cutting', 'ours', 0.0333, 1.0),
            ('cutting', 'naive', 12345.6, 49.7),
            ('scores', 'ours', 20.4, 1.0),
            ('scores', 'other', 9.96, 0.169),
        ],
        columns=['stage', 'method', unit, 'ratio'],
    )
    assert benchmark.formatTable(table) == (
        f'| stage | method, {unit} | compared with, {unit} (ratio) |\n'
        '|---|---|---|\n'
        '| cutting | ours 0.033 | naive 12346 (50x) |\n'
        '| scores | ours 20 | other 10.0 (0.17x) |'
    )
