"""One network or several, on one device or several, and under torchrun: killed and resumed, all end alike."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import psutil
import pytest
import torch

import checkpoints
import config
import deploy
import engine
import phantom
import provenance
import train
import utils
from conftest import sourcesOf

HOME = Path(__file__).resolve().parent.parent
SMALL = {
    'PATCH_SIZE': 32, 'PATCH_STRIDE': 24, 'BATCHSIZE': 8, 'ENCODER_NAME': 'resnet18', 'ENCODER_DEPTH': 3,
    'DECODER_CHANNELS': (16, 8, 8), 'ENCODER_WEIGHTS': None, 'LOADER_WORKERS': 0, 'DEVICE': 'cpu',
}  # fmt: skip


@pytest.fixture
def df(tmp_path):
    """The file list of four phantoms, and small numbers of a training."""
    phantom.makeCases(tmp_path / 'data', 4, shape=(40, 40, 16))
    vars(config).update(
        SMALL, DATA_FOLDER=str(tmp_path / 'data'), EPOCHS=2, AVERAGE=0.2, LOSS='dice+ce', SCHEDULE='poly'
    )
    torch.set_num_threads(1)
    return utils.makeFileList()


def weightsOf(file):
    """Return all that decides the predictions of a checkpoint."""
    checkpoint = torch.load(file, weights_only=True)
    return checkpoint['nextEpoch'], checkpoint['model'], checkpoint['average']


def assertEqual(file, other):
    torch.testing.assert_close(weightsOf(file), weightsOf(other), rtol=0, atol=0)


# One network


@pytest.mark.parametrize(
    ('loader', 'length', 'expected'),
    [(3, {}, (6, 2)), (3, {'STEPS': 6}, (6, 2)), (3, {'STEPS': 7}, (7, 3)), (30, {'STEPS': 7}, (7, 1))],
)
def test_planSteps_countsEpochsOrTheirSteps(loader, length, expected):
    """Two epochs of 3 batches are 6 steps; 7 steps are 7 with any number of batches, in as many epochs as it takes."""
    vars(config).update({'EPOCHS': 2, **length})
    assert (engine.planSteps(range(loader)), config.EPOCHS) == expected


@pytest.mark.slow
def test_trainModel_resumesToTheSameWeights(df, monkeypatch):
    """9 steps are an epoch of 7 and one of 2; stopped between them and called again, the weights are the same."""
    config.STEPS = 9
    traindf, valdf, _ = utils.split(df)
    whole = train.trainModel(traindf, valdf)
    config.OUTPUT_FOLDER += '/stopped'
    monkeypatch.setattr(checkpoints, 'epochs', lambda start: range(start, start + 1))
    lines = []
    for _ in range(2):
        stopped = train.trainModel(traindf, valdf, lines.append)
    assertEqual(whole, stopped)
    assert [line[:14] for line in lines] == ['epoch   1 of 2', 'epoch   2 of 2'] and 'validation' in lines[0]
    checkpoint = torch.load(whole, weights_only=True)
    assert checkpoint['scheduler']['last_epoch'] == 9 and checkpoint['history'][-1]['learnRate'] == 0


def test_trainModel_givesTheFinalWeights(df):
    """Weights of rate 0 that remember whom they saw, with an empty validation or none; at a plateau the best epoch."""
    result = train.trainModel(df[:2], df[:0])
    assert result == config.LAST_CHECKPOINT
    assert torch.load(result, weights_only=True)['optimizer']['param_groups'][0]['lr'] == 0
    assert list(utils.loadModel(result).provenance['earlier']) == list(df.index[:2])
    vars(config).update(config.DOCUMENT, EPOCHS=1, OUTPUT_FOLDER=config.OUTPUT_FOLDER + '/document')
    assert train.trainModel(df[:2], df[:0]) == config.BEST_CHECKPOINT  # an empty set is none


def test_trainModel_beginsFromTheStart(df, tmp_path):
    """With a rate of 0 the weights stay those of `config.START`; the patients of both trainings are remembered."""
    packed = utils.loadModel(train.trainModel(df[:2]))
    deploy.packModel(config.RESULT_CHECKPOINT, tmp_path / 'start')
    vars(config).update(START=str(tmp_path / 'start'), LEARN_RATE=0, WEIGHT_DECAY=0, SEED=1, EPOCHS=1)
    config.OUTPUT_FOLDER += '/started'
    model = utils.loadModel(train.trainModel(df[2:3]))
    for (name, one), other in zip(model.named_parameters(), packed.parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=name)
    assert provenance.trainedAmong(model, df.index) == list(df.index[:3])


# Members


@pytest.mark.slow
def test_trainMembers_trainsEachFoldInItsFolder(df, capsys):
    """Two folds and a plane with another seed; each has its folder, and its patients are the fold's."""
    members = [{'fold': 0, 'of': 2}, {'fold': 1, 'of': 2}, {'plane': 'coronal', 'seed': 5, 'EPOCHS': 1}]
    before = dict(vars(config))
    files = train.trainMembers(df, members)
    assert vars(config) == before
    names = ['fold-0_of-2', 'fold-1_of-2', 'plane-coronal_seed-5_EPOCHS-1']
    assert files == [f'{config.OUTPUT_FOLDER}/{name}/last.pt' for name in names]
    seen = [set(utils.loadModel(file).provenance['earlier']) for file in files]
    assert seen[0] | seen[1] == set(df.index) and not seen[0] & seen[1]
    assert seen[2] == set(utils.split(df)[0].index)
    assert utils.loadModel(files[2]).provenance['settings']['planes'] == ['coronal']
    assert 'fold-0_of-2: epoch   2 of 2: loss' in capsys.readouterr().out
    assert 'patches of 2 patients' in Path(files[0]).with_name('log.txt').read_text()


def test_trainMembers_shareTheTime(df, monkeypatch):
    """After one of five hours, two members on one device have two hours each."""
    given = []
    monkeypatch.setattr(engine, 'hoursUsed', lambda: 1.0 + 2 * len(given))
    monkeypatch.setattr(train, 'trainModel', lambda *arguments: given.append(config.TIME_BUDGET))
    config.TIME_BUDGET = 5.0
    train.trainMembers(df, [{'seed': 1}, {'seed': 2}])
    assert given == [3.0, 5.0]


def writeCache(tell):
    """Write the memory for patches that this process may use; called in a process of its own."""
    Path(config.OUTPUT_FOLDER, 'cache').write_text(str(config.CACHE_PATCHES))


def test_runOnDevices_sharesTheMemory(df, tmp_path):
    """Two processes on one machine hold half as many patches each."""
    config.CACHE_PATCHES = 0.4
    values = train._configWith({'OUTPUT_FOLDER': str(tmp_path)})
    assert train._runOnDevices(writeCache, {'one': (values, ())}, ['cpu', 'cpu']) == {}
    assert float((tmp_path / 'cache').read_text()) == 0.2


def test_show_takesOtherTextThanAnEpoch():
    """What a training tells beside its epochs, such as too few minutes, is shown as it is."""
    shown = []
    bar = types.SimpleNamespace(set_postfix_str=shown.append, n=0, total=None)
    train._show(bar, 'epoch', 'epoch   2 of 5: loss 0.5')
    train._show(bar, 'epoch', '1 minutes are 3 batches, less than the 4 of an epoch: give more minutes.')
    assert shown == ['loss 0.5', '1 minutes are 3 batches, less than the 4 of an epoch: give more minutes.']
    assert (bar.n, bar.total) == (2, 5)


def killWhenSaved(file):
    """Kill the process that trains a member, once its first epoch is saved."""
    while not Path(file).exists():
        time.sleep(0.01)
    [member] = [child for child in multiprocessing.active_children() if isTraining(child.pid, file)]
    os.kill(member.pid, signal.SIGKILL)


def isTraining(process, file):
    """Return whether a process has the log of a member open."""
    log = str(Path(file).with_name('log.txt'))
    return log in [opened.path for opened in psutil.Process(process).open_files()]


@pytest.mark.slow
def test_trainMembers_goOnAfterOneWasKilledAndOneFailed(df):
    """On two devices one member is killed and one cannot train: the third ends; run again, all equal one process's."""
    config.EPOCHS = 3
    members = [{'seed': 1}, {'LOSS': 'hinge'}, {'seed': 2}]
    killer = threading.Thread(target=killWhenSaved, args=(f'{config.OUTPUT_FOLDER}/seed-1/last.pt',), daemon=True)
    killer.start()
    with pytest.raises(RuntimeError, match='2 of 3 members failed; the others are complete') as error:
        train.trainMembers(df, members, ['cpu', 'cpu'])
    assert re.search(r'seed-1: its process ended with code -9; see its log\.txt', str(error.value))
    assert "LOSS-hinge: ValueError: config.LOSS is 'hinge'" in str(error.value)
    assert 0 < weightsOf(f'{config.OUTPUT_FOLDER}/seed-1/last.pt')[0] < 3
    again = train.trainMembers(df, members[::2], ['cpu', 'cpu'])
    config.OUTPUT_FOLDER += '/here'
    for file, alone in zip(again, train.trainMembers(df, members[::2]), strict=True):
        assertEqual(file, alone)


@pytest.mark.parametrize(
    ('members', 'words'),
    [
        ([{'seed': 1}, {'seed': 1}], 'Two members are seed-1'),
        ([{'fold': 1}], "needs both 'fold' and 'of'"),
        ([{'fold': 5, 'of': 5}], 'no fold: 0 to 4 of 5 were expected'),
        ([{'DEVICE': 'cpu'}], 'The member DEVICE-cpu sets DEVICE: set it in config or by devices=, for all members'),
        ([{'EPOCH': 1}], 'config has no EPOCH; the nearest names are EPOCHS'),
    ],
)
def test_trainMembers_refusesUnclearMembers(df, members, words):
    """Members that share a folder, half a fold and unknown names are refused before anything is trained."""
    with pytest.raises(ValueError, match=words):
        train.trainMembers(df, members)
    assert not Path(config.OUTPUT_FOLDER).exists()


# The script


def test_readArguments_readsLiterals():
    """Numbers, tuples and None are Python literals; a text needs no quotes."""
    found = train.readArguments(
        ['EPOCHS=50', "PLANES=('axial',)", 'PATIENCE=None', 'ENCODER_NAME=resnet18', 'EDITION=A']
    )
    assert found == {
        'EPOCHS': 50, 'PLANES': ('axial',), 'PATIENCE': None, 'ENCODER_NAME': 'resnet18', 'EDITION': 'A',
    }  # fmt: skip


@pytest.mark.parametrize(
    ('argument', 'words'),
    [
        ('EPOCHS', "'EPOCHS' was given; NAME=value was expected"),
        ('BATCH_SIZE=3', 'config has no BATCH_SIZE; the nearest names are .*BATCHSIZE'),
        ('EPOCHS=many', "EPOCHS=many: 'many' is not a Python literal"),
        ('EPOCHS=5,000', 'EPOCHS=5,000: a number was expected'),
        ('STEPS=abc', 'STEPS=abc: a number was expected'),
    ],
)
def test_readArguments_refusesOthers(argument, words):
    """What is not NAME=value, an unknown name, and a value that cannot be read are named."""
    with pytest.raises(ValueError, match=words):
        train.readArguments([argument])


def startRanks(folder, **values):
    """Start train.py on two ranks by torchrun."""
    names = (*config.DOCUMENT, *SMALL, 'DATA_FOLDER')
    values = {name: getattr(config, name) for name in names} | {'OUTPUT_FOLDER': str(folder)} | values
    arguments = [f'{name}={value}' for name, value in values.items()]
    options = ['--standalone', '--nproc-per-node=2']  # standalone: on a free port, as two runs are started at once
    command = [sys.executable, '-m', 'torch.distributed.run', *options, str(HOME / 'train.py'), *arguments]
    environment = os.environ | {'OMP_NUM_THREADS': '1', 'TQDM_DISABLE': '1'}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_torchrun_trainsAsOneProcessAndSurvivesAKilledRank(df, tmp_path):
    """Two ranks have the losses of one process; a killed rank ends both by name; resumed, the weights are the same."""
    plain = {'SPATIAL_PROBABILITY': 0.0, 'CONTRAST_PROBABILITY': 0.0, 'INTENSITY_PROBABILITY': 0.0}
    plain['STEPS'] = 17  # three epochs
    whole = startRanks(tmp_path / 'whole', **plain)
    killed = startRanks(tmp_path / 'killed', **plain)
    file = tmp_path / 'killed' / 'last.pt'
    while not file.exists() and killed.poll() is None:
        time.sleep(0.01)
    ranks = psutil.Process(killed.pid).children()
    ranks[-1].kill()
    told = killed.communicate(timeout=120)[0]
    assert killed.returncode != 0 and re.search(r'rank +: 1 \(local_rank: 1\)', told), told
    assert whole.wait(timeout=120) == 0, whole.stdout.read()
    assert weightsOf(file)[0] < 3
    assert startRanks(tmp_path / 'killed', **plain).wait(timeout=120) == 0
    assertEqual(tmp_path / 'whole' / 'last.pt', file)
    vars(config).update(plain, OUTPUT_FOLDER=str(tmp_path / 'alone'))
    train.trainModel(*utils.split(df)[:2])
    losses = [torch.load(tmp_path / name / 'last.pt', weights_only=True)['history'] for name in ('alone', 'whole')]
    for one, other in zip(*losses, strict=True):
        assert one['trainLoss'] == pytest.approx(other['trainLoss'], rel=5e-3)


@pytest.mark.slow
def test_trainModel_givesTheNotebooksWeights(df, tmp_path):
    """The notebook's cells, run from the split to the end of the training, and one call end with the same weights."""
    sources = sourcesOf(HOME / 'brats_segmentation.ipynb')
    first = next(number for number, source in enumerate(sources) if 'utils.split(df)' in source)
    last = next(number for number, source in enumerate(sources) if 'trainSet.file.close()' in source)
    names = {'df': df}
    exec('import batched, config, deploy, engine, preprocess, utils, torch, segmentation_models_pytorch as smp', names)
    config.OUTPUT_FOLDER = str(tmp_path / 'notebook')
    for source in sources[first : last + 1]:
        exec(source, names)
    config.OUTPUT_FOLDER = str(tmp_path / 'call')
    torch.manual_seed(99)
    assertEqual(tmp_path / 'notebook' / 'last.pt', train.trainModel(*utils.split(df)[:2]))
