import io
import os
import pickle
import random

import h5py
import numpy as np
import pytest
import torch

import batched
import config
import engine
import preprocess
import utils


def writePatches(file, noPatches=12, value=None):
    """Writes a patch file as makeDataset lays it out; patch k has the value k / 100 or the given one."""
    config.MODALITIES = ('t1ce', 't2', 'flair')
    with h5py.File(file, 'w') as handle:
        image = np.ones((noPatches, 3, 32, 32)) * np.arange(noPatches)[:, None, None, None] / 100
        handle['image'] = (image if value is None else np.full_like(image, value)).astype(np.float16)
        label = np.zeros((noPatches, 32, 32), np.uint8)
        label[:, 4:20, 6:25] = np.arange(noPatches)[:, None, None] % 4
        handle['label'] = label
    return str(file)


def loaderOf(dataset, workers=0, context=None, shuffle=False):
    return torch.utils.data.DataLoader(
        dataset, batch_size=4, num_workers=workers, multiprocessing_context=context, shuffle=shuffle
    )


def test_BRATSDataset_handsOutShapesAndDtypes(tmp_path):
    """Without a transform: what is stored, as float32 (3, 32, 32) and int64 (32, 32), in order."""
    dataset = utils.BRATSDataset(writePatches(tmp_path / 'a.h5'), 10, None)
    assert len(dataset) == 10
    image, label = dataset[7]
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32
    assert label.shape == (32, 32) and label.dtype == torch.int64
    np.testing.assert_allclose(image, 0.07, atol=1e-4)
    assert label[10, 10] == 3 and label[0, 0] == 0
    with pytest.raises(IndexError):
        dataset[10]


@pytest.mark.parametrize('cache', [0, 1])
@pytest.mark.parametrize('workers', [0, 2])
def test_BRATSDataset_handsALoaderWhatIsStored(tmp_path, workers, cache):
    """A raw batch has the stored dtypes and the order asked for, repeats too, from memory or file."""
    config.CACHE_PATCHES = cache
    dataset = utils.BRATSDataset(writePatches(tmp_path / 'a.h5'), 11, raw=True)
    order = [7, 3, 3, 10, 0, 5, 9, 1]
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, sampler=order, num_workers=workers)
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert images.dtype == torch.float16 and labels.dtype == torch.uint8
    np.testing.assert_allclose(images[:, 2, 5, 5], np.array(order) / 100, atol=1e-4)
    assert labels[:, 10, 10].tolist() == [number % 4 for number in order]


def test_BRATSDataset_needsNoFileOnceItIsInMemory(tmp_path):
    """Patches that fit CACHE_PATCHES are read once; beyond it they are not."""
    dataset = utils.BRATSDataset(writePatches(tmp_path / 'a.h5'), 12, None)
    dataset.file.close()
    assert dataset[3][0].shape == (3, 32, 32) and not dataset.file
    config.CACHE_PATCHES = 12 * 3 * 32 * 32 * 2 / 1e9 - 1e-9
    dataset = utils.BRATSDataset(tmp_path / 'a.h5', 12, None)
    dataset.file.close()
    assert dataset[3][0].shape == (3, 32, 32) and dataset.file


@pytest.mark.parametrize(('workers', 'context'), [(0, None), (2, 'fork'), (2, 'forkserver'), (2, 'spawn')])
def test_BRATSDataset_loadsTheSameInAnyProcess(tmp_path, workers, context):
    """0 and 2 workers, however they are started, give the same patches; the file closes before and after."""
    config.CACHE_PATCHES = 0
    dataset = utils.BRATSDataset(writePatches(tmp_path / 'a.h5'), 12, preprocess.makeTransforms()[1])
    dataset.file.close()
    images = torch.cat([image for image, _ in loaderOf(dataset, workers, context)])
    np.testing.assert_allclose(images[:, 0, 0, 0], np.arange(12) / 100, atol=1e-4)
    dataset.file.close()
    assert not dataset.file


def test_BRATSDataset_survivesPicklingWithAnOpenFile(tmp_path):
    """A pickled dataset reads the same, and the original's handle stays open."""
    dataset = utils.BRATSDataset(writePatches(tmp_path / 'a.h5'), 12, None)
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[3][0], dataset[3][0]) and dataset.file


@pytest.mark.parametrize('value', [None, -1, 0])
def test_BRATSDataset_keepsShapesUnderEveryTransform(tmp_path, value):
    """Every transform of the list, forced to happen, keeps shape and dtype, on an all-background patch too."""
    file = writePatches(tmp_path / 'a.h5', value=value)
    train, validation, test = preprocess.makeTransforms()
    leaves = [*train.transforms[1].transforms_dict, *train.transforms[2].transforms_dict, validation, test, train]
    for transform in leaves:
        transform.probability = 1
        image, label = utils.BRATSDataset(file, 12, transform)[3]
        assert image.shape == (3, 32, 32) and image.dtype == torch.float32 and image.isfinite().all()
        assert label.shape == (32, 32) and label.dtype == torch.int64 and set(label.unique().tolist()) <= {0, 3}


def test_BRATSDataset_refusesWhatDoesNotFit(tmp_path):
    """No file, more patches than there are, and other modalities are refused in words."""
    with pytest.raises(FileNotFoundError, match=r'none\.h5 does not exist'):
        utils.BRATSDataset(tmp_path / 'none.h5', 1, None)
    file = writePatches(tmp_path / 'a.h5')
    with pytest.raises(ValueError, match='has 12 patches, 13 were asked for'):
        utils.BRATSDataset(file, 13, None)
    config.MODALITIES = ('t1ce', 't2')
    with pytest.raises(ValueError, match=r'has 3 modalities, config\.MODALITIES 2'):
        utils.BRATSDataset(file, 12, None)


def makeRun(seed=0, channels=3, width=8):
    torch.manual_seed(seed)
    layers = [torch.nn.Conv2d(channels, width, 3, padding=1), torch.nn.BatchNorm2d(width), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers, torch.nn.Dropout2d(0.2), torch.nn.Conv2d(width, 4, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    return model, optimizer, scheduler, torch.amp.GradScaler('cuda', enabled=False)


def runEpochs(tmp_path, upTo, workers, isBatched):
    """The contract's loop from the last checkpoint on, with random transforms, shuffling and dropout."""
    config.LAST_CHECKPOINT, config.BEST_CHECKPOINT = str(tmp_path / 'last.pt'), str(tmp_path / 'best.pt')
    transform = preprocess.makeTransforms()[0]
    augment = batched.Batched(transform) if isBatched else None
    dataset = utils.BRATSDataset(writePatches(tmp_path / 'a.h5'), 12, None if isBatched else transform, raw=isBatched)
    loader = loaderOf(dataset, workers, shuffle=True)
    state = utils.loadCheckpoint(*makeRun(), config.LAST_CHECKPOINT)
    model, optimizer, scheduler, scaler, epoch, _, _, best = state
    for number in range(epoch, upTo):
        trainLoss = engine.train(model, torch.nn.CrossEntropyLoss(), optimizer, scaler, loader, augment) / len(dataset)
        valLoss = engine.validate(model, torch.nn.CrossEntropyLoss(), loader) / len(dataset)
        scheduler.step(valLoss)
        best = utils.makeCheckpoint(number, model, optimizer, scheduler, scaler, trainLoss, valLoss, best)
    return model, utils.readHistory(), random.random(), np.random.rand()


@pytest.mark.parametrize('isBatched', [False, True])
@pytest.mark.parametrize('workers', [0, 2])
def test_loadCheckpoint_resumedEqualsUninterrupted(tmp_path, workers, isBatched):
    """Stopped after two epochs of four and gone on: weights, history and random states of the whole run, to the bit."""
    (tmp_path / 'whole').mkdir()
    (tmp_path / 'parts').mkdir()
    random.seed(0), np.random.seed(0)
    whole, history, *drawn = runEpochs(tmp_path / 'whole', 4, workers, isBatched)
    random.seed(0), np.random.seed(0)
    runEpochs(tmp_path / 'parts', 2, workers, isBatched)
    torch.manual_seed(99), random.seed(99), np.random.seed(99)
    resumed, resumedHistory, *resumedDrawn = runEpochs(tmp_path / 'parts', 4, workers, isBatched)
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    assert history.equals(resumedHistory) and list(history['epoch']) == [0, 1, 2, 3]
    assert drawn == resumedDrawn


def test_makeCheckpoint_keepsTheBest(tmp_path):
    """The best file is that of the lowest validation loss, the last that of the last epoch; the best loss is given."""
    config.LAST_CHECKPOINT, config.BEST_CHECKPOINT = str(tmp_path / 'last.pt'), str(tmp_path / 'best.pt')
    run, best = makeRun(), float('inf')
    for epoch, loss in enumerate([3.0, 1.0, 2.0]):
        with torch.no_grad():
            run[0][0].bias.fill_(epoch)
        best = utils.makeCheckpoint(epoch, *run, loss / 2, loss, best)
    assert best == 1
    for path, nextEpoch, valLoss in ((config.BEST_CHECKPOINT, 2, 1), (config.LAST_CHECKPOINT, 3, 2)):
        model, *_, epoch, trainLoss, read, bestRead = utils.loadCheckpoint(*makeRun(1), path)
        assert (epoch, trainLoss, read, bestRead) == (nextEpoch, valLoss / 2, valLoss, 1)
        assert (model[0].bias == nextEpoch - 1).all()
    assert not list(tmp_path.glob('*.part'))
    assert list(utils.readHistory()['valLoss']) == [3, 1, 2]


def test_makeCheckpoint_holdsOnlyPlainValues(tmp_path):
    """Numpy and torch scalars for losses are fine; the file says modalities, classes and settings, weights-only."""
    config.LAST_CHECKPOINT, config.BEST_CHECKPOINT = str(tmp_path / 'last.pt'), str(tmp_path / 'best.pt')
    utils.makeCheckpoint(np.int64(0), *makeRun(), np.float64(2), torch.tensor(1.0), float('inf'))
    content = torch.load(config.LAST_CHECKPOINT, weights_only=True)
    assert content['settings']['MODALITIES'] == ['t1ce', 't2', 'flair']
    assert content['settings']['CLASS_NAMES'][3] == 'enhancing tumor'
    assert content['history'] == [{'epoch': 0, 'trainLoss': 2.0, 'valLoss': 1.0, 'learnRate': 0.01}]


def test_loadCheckpoint_startsAfreshWithoutAFile(tmp_path):
    """No file: the same objects, epoch 0, the best loss infinite; a scheduler may be None."""
    model, optimizer, _, scaler = makeRun()
    result = utils.loadCheckpoint(model, optimizer, None, scaler, str(tmp_path / 'none.pt'))
    assert result[:4] == (model, optimizer, None, scaler)
    assert result[4] == 0 and result[7] == float('inf')


def test_loadCheckpoint_takesAScalerSavedWhileDisabled(tmp_path):
    """A checkpoint made on the CPU, its scaler off, goes on with a scaler that is on."""
    config.LAST_CHECKPOINT, config.BEST_CHECKPOINT = str(tmp_path / 'last.pt'), str(tmp_path / 'best.pt')
    model, optimizer, scheduler, scaler = makeRun()
    utils.makeCheckpoint(0, model, optimizer, None, scaler, 1, 1, 2)
    enabled = torch.amp.GradScaler('cpu', enabled=True)
    scale = enabled.get_scale()
    assert utils.loadCheckpoint(model, optimizer, scheduler, enabled, config.LAST_CHECKPOINT)[4] == 1
    assert enabled.get_scale() == scale


class Surprise:
    def __reduce__(self):
        return print, ('a program ran',)


def test_loadCheckpoint_refusesStrangersInWords(tmp_path, capsys):
    """Another network, other modalities, a newer format, damage and a pickled program: refused, and nothing changes."""
    config.LAST_CHECKPOINT, config.BEST_CHECKPOINT = str(tmp_path / 'last.pt'), str(tmp_path / 'best.pt')
    run = makeRun()
    utils.makeCheckpoint(0, *run, 1, 1, 2)
    content = torch.load(config.LAST_CHECKPOINT, weights_only=True)

    def refuses(given, words, **changes):
        before = {name: weight.clone() for name, weight in given[0].state_dict().items()}
        torch.save({**content, **changes}, tmp_path / 'other.pt')
        with pytest.raises(ValueError, match=words):
            utils.loadCheckpoint(*given, tmp_path / 'other.pt')
        assert all(torch.equal(before[name], weight) for name, weight in given[0].state_dict().items())

    refuses(makeRun(1, width=9), r'of another network: its 0\.bias is \(8,\), the given model has \(9,\)')
    refuses(makeRun(1), 'format 99', format=99)
    refuses(makeRun(1), 'not a checkpoint of this package', format=Surprise())
    assert 'a program ran' not in capsys.readouterr().out
    settings = {**content['settings'], 'MODALITIES': ['flair', 't1ce', 't2']}
    refuses(makeRun(1), r"MODALITIES = \['flair', 't1ce', 't2'\], this run has", settings=settings)
    stream = io.BytesIO()
    torch.save(content, stream)
    (tmp_path / 'cut.pt').write_bytes(stream.getvalue()[:2000])
    with pytest.raises(ValueError, match=r'cut\.pt is not a checkpoint'):
        utils.loadCheckpoint(*run, tmp_path / 'cut.pt')


def test_loadCheckpoint_bringsBackSchedulerAndScaler(tmp_path):
    """A plateau that was counted before the stop goes on being counted; a scaler that is on gets its scale back."""
    config.LAST_CHECKPOINT, config.BEST_CHECKPOINT = str(tmp_path / 'last.pt'), str(tmp_path / 'best.pt')
    model, optimizer, _, _ = makeRun()
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
    for loss in (1.0, 2.0):
        scheduler.step(loss)
    scaler = torch.amp.GradScaler('cpu', init_scale=8.0)
    utils.makeCheckpoint(1, model, optimizer, scheduler, scaler, 2, 2, 1)
    model, optimizer, _, _ = makeRun(1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
    scaler = torch.amp.GradScaler('cpu')
    utils.loadCheckpoint(model, optimizer, scheduler, scaler, config.LAST_CHECKPOINT)
    assert scaler.get_scale() == 8 and scheduler.num_bad_epochs == 1 and scheduler.best == 1
    scheduler.step(2.0)
    assert optimizer.param_groups[0]['lr'] == pytest.approx(1e-3)


def test_makeCheckpoint_survivesADeathBetweenItsFiles(tmp_path, monkeypatch):
    """The best file is moved in place before the last; a death in the middle of either leaves the older one whole."""
    config.LAST_CHECKPOINT, config.BEST_CHECKPOINT = str(tmp_path / 'last.pt'), str(tmp_path / 'best.pt')
    moved, replace = [], os.replace
    monkeypatch.setattr(os, 'replace', lambda part, file: (moved.append(os.path.basename(file)), replace(part, file)))
    run = makeRun()
    utils.makeCheckpoint(0, *run, 2, 2, 3)
    assert moved == ['history.csv', 'best.pt', 'last.pt']

    def die(content, file):
        file.write(b'half')
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, 'save', die)
    with pytest.raises(KeyboardInterrupt):
        utils.makeCheckpoint(1, *run, 1, 1, 2)
    assert utils.loadCheckpoint(*makeRun(1), config.BEST_CHECKPOINT)[4] == 1
    assert utils.loadCheckpoint(*makeRun(1), config.LAST_CHECKPOINT)[4] == 1
    assert not list(tmp_path.glob('*.part'))


def test_BRATSDataset_opensItsOwnHandleInAnotherProcess(tmp_path):
    """A dataset that finds itself in another process does not read through the handle it came with."""
    config.CACHE_PATCHES = 0
    dataset = utils.BRATSDataset(writePatches(tmp_path / 'a.h5'), 12, None)
    handle, dataset._process = dataset.file, -1
    dataset[0]
    assert dataset.file is not handle and dataset._process == os.getpid()


def test_BRATSDataset_picklingLeavesTheHandleOpen(tmp_path):
    """What is sent to a worker leaves the file open here."""
    dataset = utils.BRATSDataset(writePatches(tmp_path / 'a.h5'), 12, None)
    dataset.__getstate__()
    assert dataset.file


def test_BRATSDataset_keepsTheContractInALoader(tmp_path):
    """Unless raw is asked for, batches are float32 and int64, with and without a transform; raw takes none."""
    file = writePatches(tmp_path / 'a.h5')
    for transform in (None, preprocess.makeTransforms()[1]):
        image, label = next(iter(loaderOf(utils.BRATSDataset(file, 12, transform))))
        assert image.dtype == torch.float32 and label.dtype == torch.int64
    with pytest.raises(ValueError, match='cannot go with a transform'):
        utils.BRATSDataset(file, 12, preprocess.makeTransforms()[1], raw=True)
