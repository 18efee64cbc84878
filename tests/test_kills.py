"""Kill a script at random moments, start it again, and compare its results with those of an uninterrupted run."""

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

NUM_KILLS = int(os.environ.get('NUM_KILLS', 1))  # of each variant; set more to search longer
EPOCHS = 2


def runScript(data, folder, workers, isBatched):
    """Run what a user's script runs: the notebook's calls alone."""
    torch.set_num_threads(1)
    config.DATA_FOLDER, config.OUTPUT_FOLDER, config.DEVICE = str(data), str(folder), 'cpu'
    config.PATCH_SIZE, config.PATCH_STRIDE, config.BATCHSIZE = 32, 24, 8
    torch.manual_seed(0)
    traindf, valdf, testdf = utils.split(utils.makeFileList())
    numTrain = preprocess.makeDataset(dataframe=traindf, filename=config.TRAIN_FILE)
    numVal = preprocess.makeDataset(dataframe=valdf, filename=config.VAL_FILE)
    trainTransform, valTransform, testTransform = preprocess.makeTransforms()
    augment = batched.Batched(trainTransform) if isBatched else None
    trainSet = utils.BRATSDataset(config.TRAIN_FILE, numTrain, None if isBatched else trainTransform)
    valSet = utils.BRATSDataset(config.VAL_FILE, numVal, valTransform)
    context = 'fork' if workers else None  # otherwise each worker would import everything anew
    options = {'batch_size': config.BATCHSIZE, 'num_workers': workers, 'multiprocessing_context': context}
    trainLoader = torch.utils.data.DataLoader(trainSet, shuffle=True, **options)
    valLoader = torch.utils.data.DataLoader(valSet, **options)
    layers = [torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.BatchNorm2d(32), torch.nn.ReLU(), torch.nn.Dropout2d(0.2)]
    model = torch.nn.Sequential(*layers, torch.nn.Conv2d(32, 4, 1))
    criterion, scaler = torch.nn.CrossEntropyLoss(), torch.amp.GradScaler('cuda', enabled=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    model, optimizer, scheduler, scaler, startEpoch, trainLoss, valLoss, best = utils.loadCheckpoint(
        model, optimizer, scheduler, scaler, config.LAST_CHECKPOINT
    )
    for epoch in range(startEpoch, EPOCHS):
        trainLoss = engine.train(model, criterion, optimizer, scaler, trainLoader, transform=augment) / numTrain
        valLoss = engine.validate(model, criterion, valLoader) / numVal
        scheduler.step(valLoss)
        best = utils.makeCheckpoint(epoch, model, optimizer, scheduler, scaler, trainLoss, valLoss, best)
    for patient, paths in testdf.iterrows():
        x, y, yhat = engine.predict(paths, model, transform=testTransform, patchStride=24, device='cpu')
        utils.saveSegmentation(yhat, paths, folder / f'{patient}.nii.gz')
        utils.makeGifs(x, y, yhat, folder=folder)


def start(*arguments):
    """Start `runScript` in a process of its own."""
    context = get_context('forkserver')  # imports once, then forks a fresh process for each run
    context.set_forkserver_preload(['batched', 'engine', 'phantom', 'preprocess', 'utils'])
    process = context.Process(target=runScript, args=arguments)
    process.start()
    return process


def assertWhole(folder):
    """Assert that every file under its final name can be read to its end."""
    for file in folder.iterdir():
        if file.suffix == '.h5':
            with h5py.File(file) as patches:
                assert preprocess._verifyChecksums(patches) > 0
        elif file.suffix == '.pt':
            assert torch.load(file, weights_only=True)['nextEpoch'] > 0
        elif file.suffix == '.gz':
            assert np.asanyarray(nib.load(file).dataobj).max() <= 4
        elif file.suffix == '.gif':
            assert len([frame.copy() for frame in ImageSequence.Iterator(Image.open(file))]) > 1
        else:
            assert file.suffix == '.part' or file.read_text().startswith('epoch,'), file


def isSame(found, expected):
    """Return whether two nested values are equal, tensors bit for bit."""
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


@pytest.mark.slow
@pytest.mark.parametrize(('workers', 'isBatched'), [(0, True), (2, False)])
def test_script_killedAtAnyMomentEndsLikeAnUninterruptedRun(data, tmp_path, workers, isBatched):
    """After each SIGKILL all files are whole; the final weights, segmentation and GIF equal the uninterrupted run's."""
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    begin = time.monotonic()
    process = start(data, whole, workers, isBatched)
    process.join()
    assert process.exitcode == 0
    seconds, generator, numKilled = time.monotonic() - begin, random.Random(0), 0
    while numKilled < NUM_KILLS:
        process = start(data, killed, workers, isBatched)
        process.join(generator.uniform(0, seconds))
        if process.exitcode is None:
            process.kill()
            process.join()
            numKilled += 1
        if killed.is_dir():
            assertWhole(killed)
            if (killed / 'last.pt').exists() and generator.random() < 0.3:  # now and then start anew
                for file in killed.iterdir():
                    file.unlink()
    process = start(data, killed, workers, isBatched)
    process.join()
    assert process.exitcode == 0 and not list(killed.glob('*.part'))
    assert sorted(file.name for file in killed.iterdir()) == sorted(file.name for file in whole.iterdir())
    for name in ('last.pt', 'best.pt'):
        expected, found = (torch.load(folder / name, weights_only=True) for folder in (whole, killed))
        for checkpoint in (found, expected):  # the script seeds and uses torch's generator only
            del checkpoint['random']['python'], checkpoint['random']['numpy']
        assert [part for part in expected if not isSame(found[part], expected[part])] == []
    results = [file for file in whole.iterdir() if file.suffix in ('.gz', '.gif')]
    assert len(results) == 2
    for file in results:
        assert file.read_bytes() == (killed / file.name).read_bytes(), file.name
