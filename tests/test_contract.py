"""Test the calls that users rely on, made as they make them."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torchio as tio

import batched
import config
import deploy
import engine
import metrics
import patients
import phantom
import postprocess
import predictor
import preprocess
import report
import train
import utils

HOME = Path(__file__).resolve().parent.parent

SCRIPT = """
import sys
sys.path.insert(0, {home!r})
import segmentation_models_pytorch as smp
import torch
import config, engine, phantom, preprocess, utils

if __name__ == '__main__':
    torch.multiprocessing.set_start_method('spawn')
    config.DATA_FOLDER, config.OUTPUT_FOLDER, config.DEVICE = 'data', 'output', 'cpu'
    config.BATCHSIZE, config.EPOCHS, config.PATCH_SIZE, config.PATCH_STRIDE = 4, 1, 64, 56
    phantom.makeCases(config.DATA_FOLDER, 3, seed=1, shape=(72, 72, 18))
    df = utils.makeFileList()
    utils.plotSample(df.iloc[0])
    traindf, valdf, testdf = utils.split(df)
    numTrain = preprocess.makeDataset(dataframe=traindf, filename=config.TRAIN_FILE)
    numVal = preprocess.makeDataset(dataframe=valdf, filename=config.VAL_FILE)
    trainTransform, valTransform, testTransform = preprocess.makeTransforms()
    trainSet = utils.BRATSDataset(config.TRAIN_FILE, numTrain, trainTransform)
    valSet = utils.BRATSDataset(config.VAL_FILE, numVal, valTransform)
    trainLoader = torch.utils.data.DataLoader(trainSet, batch_size=config.BATCHSIZE, shuffle=True, num_workers=2)
    valLoader = torch.utils.data.DataLoader(valSet, batch_size=config.BATCHSIZE, num_workers=2)
    model = smp.Unet('resnet18', encoder_weights=None, decoder_channels=(32, 16, 16, 8, 8),
                     in_channels=config.ENCODER_IN_CHANNEL, classes=config.NO_CLASSES).to(config.DEVICE)
    criterion = engine.makeCriterion()
    optimizer = torch.optim.Adam(model.parameters(), lr=config.LEARN_RATE, weight_decay=config.WEIGHT_DECAY)
    scaler = torch.amp.GradScaler('cuda', enabled=False)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=config.SCHEDULER_FACTOR,
                                                           patience=config.SCHEDULER_PATIENCE)
    model, optimizer, scheduler, scaler, epoch, trainLoss, valLoss, best = utils.loadCheckpoint(
        model, optimizer, scheduler, scaler, config.LAST_CHECKPOINT)
    for epoch in range(epoch, config.EPOCHS):
        trainLoss = engine.train(model, criterion, optimizer, scaler, trainLoader) / numTrain
        valLoss = engine.validate(model, criterion, valLoader) / numVal
        scheduler.step(valLoss)
        best = utils.makeCheckpoint(epoch, model, optimizer, scheduler, scaler, trainLoss, valLoss, best)
    trainSet.file.close()
    valSet.file.close()
    total = 0
    for patient, paths in testdf.iterrows():
        x, y, yhat = engine.predict(paths, model, transform=testTransform, patchStride=config.PATCH_STRIDE,
                                    device=config.DEVICE)
        stats = smp.metrics.functional.get_stats(yhat, y, mode='multiclass', num_classes=config.NO_CLASSES)
        total = total + torch.stack([count.sum(0) for count in stats])
        utils.makeGifs(x, y, yhat, folder=config.OUTPUT_FOLDER)
        utils.saveSegmentation(yhat, paths, f'{{config.OUTPUT_FOLDER}}/{{patient}}.nii.gz')
    TP, FP, FN, TN = total
    utils.computeMetrics(TP, FP, FN, TN)
"""


CALLS = {
    utils.makeFileList: 'folder',
    utils.plotSample: 'paths',
    utils.checkFiles: 'df',
    utils.split: 'df',
    utils.splitFolds: 'df k',
    utils.maskFunction: 'x',
    utils.BRATSDataset: 'file noSamples transform',
    utils.loadCheckpoint: 'model optimizer scheduler scaler path',
    utils.makeCheckpoint: 'epoch model optimizer scheduler scaler trainLoss valLoss bestValLoss',
    utils.makeGifs: 'x y yhat folder',
    utils.computeMetrics: 'TP FP FN TN',
    utils.saveSegmentation: 'yhat paths file',
    patients.readCase: 'paths',
    patients.fromSlices: 'folder pattern output spacing',
    preprocess.makeDataset: 'dataframe filename transform',
    preprocess.makeTransforms: '',
    deploy.packModel: 'checkpoints folder',
    deploy.loadModel: 'folder',
    deploy.exportOnnx: 'folder',
    predictor.predict: 'paths folder',
    batched.Batched: 'transform',
    engine.makeModel: '',
    engine.makeCriterion: '',
    engine.train: 'model criterion optimizer scaler loader transform',
    engine.validate: 'model criterion loader',
    engine.predict: 'paths model transform patchStride device',
    metrics.scorePatient: 'y yhat',
    train.trainMembers: 'df members devices',
    train.trainModel: 'traindf',
    deploy.quantizeOnnx: 'folder df',
    utils.loadModel: 'path',
    postprocess.scoreFolder: 'df folder rules',
    metrics.scoreTable: 'scores',
    metrics.summarize: 'table',
    metrics.scoreLesions: 'y yhat',
    postprocess.removeSmallComponents: 'yhat ml',
    postprocess.relabelSmallET: 'yhat N',
    postprocess.tunePostprocessing: 'predictions',
    postprocess.predictFolder: 'df model folder',
    postprocess.writeScores: 'scores folder',
    phantom.makeCases: 'folder n seed shape',
    report.writeReport: 'folder',
}


@pytest.mark.parametrize('call', CALLS, ids=lambda call: f'{call.__module__}.{call.__name__}')
def test_contract_keepsNamesAndOrderOfArguments(call):
    """The promised arguments come first, in their order; all others have a default."""
    promised, parameters = CALLS[call].split(), inspect.signature(call).parameters
    assert list(parameters)[: len(promised)] == promised
    others = [parameters[name] for name in list(parameters)[len(promised) :]]
    assert all(other.default is not other.empty or other.kind == other.VAR_KEYWORD for other in others)


@pytest.mark.slow
def test_contract_runsAsAScriptUnderSpawn(tmp_path):
    """The notebook's calls run as a script from another folder under spawn, write their files and warn of nothing."""
    (tmp_path / 'script.py').write_text(SCRIPT.format(home=str(HOME)))
    settings = {**os.environ, 'MPLBACKEND': 'agg', 'PYTHONWARNINGS': 'default'}
    run = subprocess.run([sys.executable, 'script.py'], cwd=tmp_path, env=settings, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    made = {path.name for path in (tmp_path / 'output').iterdir()}
    assert {'train.h5', 'val.h5', 'last.pt', 'best.pt', 'history.csv'} < made
    assert any(name.endswith('.gif') for name in made) and any(name.endswith('.nii.gz') for name in made)
    assert 'DICE score' in run.stdout and 'enhancing tumor' in run.stdout
    ours = [line for line in run.stderr.splitlines() if 'Warning' in line and str(HOME) in line]
    assert not ours, ours


def documentsTransforms(degrees=20):
    """Return the document's lists for training, validation and test, which stretch and remap inside the patch."""
    images, both = {'include': ['x1', 'x2', 'x3']}, {'include': ['x1', 'x2', 'x3', 'y'], 'label_keys': ['y']}
    pad = tio.CropOrPad((128, 128, 1), padding_mode='minimum', **both)
    spatial = tio.OneOf(
        {
            tio.RandomFlip(axes=(0, 1), flip_probability=1, **both): 0.35,
            tio.RandomAffine(degrees=degrees, **both): 0.35,
            tio.RandomAnisotropy(axes=(0, 1), downsampling=(1.5, 2.5), **both): 0.15,
            tio.RandomElasticDeformation(max_displacement=(2, 2, 0), **both): 0.15,
        },
        p=0.95,
    )
    stretch = tio.RescaleIntensity((-1, 1), percentiles=(0.5, 99.5), masking_method=utils.maskFunction, **images)
    intensity = tio.OneOf(
        {tio.RandomNoise(std=(0, 0.1), **images): 0.5, tio.RandomBiasField(coefficients=0.1, **images): 0.5}, p=0.95
    )
    remap = tio.RemapLabels({0: 0, 1: 1, 2: 2, 4: 3}, **both)
    train = tio.Compose([pad, spatial, stretch, intensity, remap])
    return train, tio.Compose([pad, stretch, remap]), tio.Compose([stretch, remap])


IN_SLICE = (0, 0, 0, 0, -20, 20)  # degrees; the plain 20 is the same, for torchio turns a slice within itself only


@pytest.fixture
def rawPatches(tmp_path):
    """The patient's row, the file of its unstretched patches, and their number."""
    config.PATCH_SIZE, config.PATCH_STRIDE = 128, 112
    phantom.makeCases(tmp_path, 1, shape=(140, 132, 20))
    df, file = utils.makeFileList(tmp_path), tmp_path / 'a.h5'
    return df.iloc[0], file, preprocess.makeDataset(dataframe=df, filename=file, transform=lambda subject: subject)


def test_contract_cutsTheDocumentsRawPatches(rawPatches):
    """With an identity for transform, the patches are the volume's own intensities."""
    paths, file, numPatches = rawPatches
    raw, label = patients.readCase(paths)
    with h5py.File(file) as patches:
        for number in (0, numPatches - 1):
            row, column, z = (int(patches[name][number]) for name in ('row', 'column', 'slice'))
            window = slice(row, row + 128), slice(column, column + 128), z
            np.testing.assert_array_equal(patches['image'][number], raw[:, *window])
            np.testing.assert_array_equal(patches['label'][number], label[window])


def assertIsTransformed(image, label):
    """Assert what holds of a patch under any transform of the document's training list."""
    assert image.shape == (3, 128, 128) and image.dtype == torch.float32 and image.isfinite().all()
    assert label.shape == (128, 128) and set(label.unique().tolist()) <= {0, 1, 2, 3}
    assert image.abs().max() < 2  # raw intensities reach hundreds; noise and bias field exceed 1 a little


@pytest.mark.filterwarnings('ignore:Rescaling image:RuntimeWarning')
def test_contract_theDocumentsListWorksPerSample(rawPatches):
    """BRATSDataset takes the document's lists; both ways to write 20 degrees draw the same patches."""
    _, file, numPatches = rawPatches
    sets = [utils.BRATSDataset(file, numPatches, documentsTransforms(degrees)[0]) for degrees in (20, IN_SLICE)]
    for index in range(0, numPatches, 3):
        drawn = []
        for dataset in sets:
            torch.manual_seed(index)
            image, label = dataset[index]
            assertIsTransformed(image, label)
            assert label.dtype == torch.int64
            drawn.append(image)
        assert torch.equal(*drawn)
    stored = utils.BRATSDataset(file, numPatches)[numPatches // 2]
    train, validation, _ = documentsTransforms()
    flip = next(iter(train.transforms[1].transforms_dict))
    for found, expected in zip(utils.BRATSDataset(file, numPatches, flip)[numPatches // 2], stored, strict=True):
        assert torch.equal(found, expected.flip(-2, -1))
    image, label = utils.BRATSDataset(file, numPatches, validation)[numPatches // 2]
    assert image.min() == -1 and image.max() == 1 and torch.equal(label, stored[1])


@pytest.mark.filterwarnings('ignore:Rescaling image:RuntimeWarning')
def test_contract_theDocumentsListWorksInBatched(rawPatches):
    """Batched takes the same lists: its flips and its validation list equal torchio's, its training list is drawn."""
    _, file, numPatches = rawPatches
    indices = range(0, numPatches, 3)
    samples = utils.BRATSDataset(file, numPatches, raw=True).__getitems__(indices)
    image, label = (torch.stack(parts) for parts in zip(*samples, strict=True))
    drawn = []
    for degrees in (20, IN_SLICE):
        augment = batched.Batched(documentsTransforms(degrees)[0], torch.Generator().manual_seed(0))
        drawn.append(augment(image, label))
        for sample in zip(*drawn[-1], strict=True):
            assertIsTransformed(*sample)
    assert torch.equal(drawn[0][0], drawn[1][0]) and torch.equal(drawn[0][1], drawn[1][1])
    train, validation, _ = documentsTransforms()
    flipped, flippedLabel = batched.Batched(next(iter(train.transforms[1].transforms_dict)))(image, label)
    assert torch.equal(flipped, image.flip(-2, -1)) and torch.equal(flippedLabel, label.flip(-2, -1))
    stretched, unchanged = batched.Batched(validation)(image, label)
    expected = utils.BRATSDataset(file, numPatches, validation)
    expected = torch.stack([expected[index][0] for index in indices])
    torch.testing.assert_close(stretched, expected, atol=1e-4, rtol=0)
    assert torch.equal(unchanged, label)


def test_contract_theDocumentsListWorksInPredict(rawPatches):
    """predict takes the document's test list, which stretches the whole volume to [-1, 1] and keeps the classes."""
    paths, _, _ = rawPatches
    test = documentsTransforms()[2]
    x, y, yhat = engine.predict(paths, torch.nn.Conv2d(3, 4, 1), transform=test, patchStride=112, device='cpu')
    assert x.shape == (20, 3, 140, 132) and x.min() == -1 and x.max() == 1
    np.testing.assert_array_equal(y, patients.readCase(paths)[1].transpose(2, 0, 1))
    assert yhat.shape == y.shape
