"""A real process, killed at random moments and started again, ends as one that was never killed."""

import os
import random
import time
from multiprocessing import get_context

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

import batched
import config
import engine
import phantom
import preprocess
import utils

NO_KILLS = int(os.environ.get('NO_KILLS', 4))  # of each way; a long campaign sets more
EPOCHS = 3


def runScript(data, folder, workers, isBatched):
    """A user's script, made of the contract's calls alone."""
    torch.set_num_threads(1)
    config.DATA_FOLDER, config.OUTPUT_FOLDER, config.DEVICE = str(data), str(folder), 'cpu'
    config.PATCH_SIZE, config.PATCH_STRIDE, config.BATCHSIZE = 32, 24, 8
    torch.manual_seed(0)
    traindf, valdf, testdf = utils.split(utils.makeFileList())
    noTrain = preprocess.makeDataset(dataframe=traindf, filename=config.TRAIN_FILE)
    noVal = preprocess.makeDataset(dataframe=valdf, filename=config.VAL_FILE)
    trainTransform, valTransform, testTransform = preprocess.makeTransforms()
    augment = batched.Batched(trainTransform) if isBatched else None
    trainSet = utils.BRATSDataset(config.TRAIN_FILE, noTrain, None if isBatched else trainTransform)
    valSet = utils.BRATSDataset(config.VAL_FILE, noVal, valTransform)
    context = 'fork' if workers else None  # else they start as this process did, and import everything
    options = {'batch_size': config.BATCHSIZE, 'num_workers': workers, 'multiprocessing_context': context}
    trainLoader = torch.utils.data.DataLoader(trainSet, shuffle=True, **options)
    valLoader = torch.utils.data.DataLoader(valSet, **options)
    layers = [torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.BatchNorm2d(32), torch.nn.ReLU(), torch.nn.Dropout2d(0.2)]
    model = torch.nn.Sequential(*layers, torch.nn.Conv2d(32, 4, 1))
    criterion, scaler = torch.nn.CrossEntropyLoss(), torch.amp.GradScaler('cuda', enabled=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    model, optimizer, scheduler, scaler, epoch, trainLoss, valLoss, best = utils.loadCheckpoint(
        model, optimizer, scheduler, scaler, config.LAST_CHECKPOINT
    )
    for number in range(epoch, EPOCHS):
        trainLoss = engine.train(model, criterion, optimizer, scaler, trainLoader, transform=augment) / noTrain
        valLoss = engine.validate(model, criterion, valLoader) / noVal
        scheduler.step(valLoss)
        best = utils.makeCheckpoint(number, model, optimizer, scheduler, scaler, trainLoss, valLoss, best)
    for patient, paths in testdf.iterrows():
        x, y, yhat = engine.predict(paths, model, transform=testTransform, patchStride=24, device='cpu')
        utils.saveSegmentation(yhat, paths, folder / f'{patient}.nii.gz')
        utils.makeGifs(x, y, yhat, folder=folder)


def start(*arguments):
    context = get_context('forkserver')  # imports once, and forks a process that has done nothing yet for each run
    context.set_forkserver_preload(['batched', 'engine', 'phantom', 'preprocess', 'utils'])
    process = context.Process(target=runScript, args=arguments)
    process.start()
    return process


def assertWhole(folder):
    """Every file that stands under its name can be read to its end."""
    for file in folder.iterdir():
        if file.suffix == '.h5':
            with h5py.File(file) as patches:
                assert preprocess._countSound(patches) > 0
        elif file.suffix == '.pt':
            assert torch.load(file, weights_only=True)['nextEpoch'] > 0
        elif file.suffix == '.gz':
            assert np.asanyarray(nib.load(file).dataobj).max() <= 4
        elif file.suffix == '.gif':
            assert len([frame.copy() for frame in ImageSequence.Iterator(Image.open(file))]) > 1
        else:
            assert file.suffix == '.part' or file.read_text().startswith('epoch,'), file


def isSame(found, expected):
    """To the bit, at any depth."""
    if isinstance(expected, torch.Tensor):
        return torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(isSame(found[key], expected[key]) for key in expected)
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(isSame, found, expected))
    return found == expected


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    phantom.makeCases(folder, 3, seed=1, shape=(64, 56, 16))
    return folder


@pytest.mark.parametrize(('workers', 'isBatched'), [(0, True), (0, False), (2, True), (2, False)])
def test_script_killedAtAnyMomentEndsAsIfItHadNotBeen(data, tmp_path, workers, isBatched):
    """SIGKILL, again and again: what stands is whole, what is lost is the epoch begun, what comes out is the same."""
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    begin = time.monotonic()
    process = start(data, whole, workers, isBatched)
    process.join()
    assert process.exitcode == 0
    seconds, generator, noKilled = time.monotonic() - begin, random.Random(0), 0
    while noKilled < NO_KILLS:
        process = start(data, killed, workers, isBatched)
        process.join(generator.uniform(0, seconds))
        if process.exitcode is None:
            process.kill()
            process.join()
            noKilled += 1
        if killed.is_dir():
            assertWhole(killed)
            if (killed / 'last.pt').exists() and generator.random() < 0.3:  # go through all of it again
                for file in killed.iterdir():
                    file.unlink()
    process = start(data, killed, workers, isBatched)
    process.join()
    assert process.exitcode == 0 and not list(killed.glob('*.part'))
    assert sorted(file.name for file in killed.iterdir()) == sorted(file.name for file in whole.iterdir())
    for name in ('last.pt', 'best.pt'):
        expected, found = (torch.load(folder / name, weights_only=True) for folder in (whole, killed))
        for checkpoint in (found, expected):  # the script seeds torch alone, which alone it draws from
            del checkpoint['random']['python'], checkpoint['random']['numpy']
        assert [part for part in expected if not isSame(found[part], expected[part])] == []
    for file in whole.glob('*.[gn]i*'):  # segmentation and GIF
        assert file.read_bytes() == (killed / file.name).read_bytes(), file.name
