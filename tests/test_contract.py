"""The calls that users rely on, made as they make them."""

import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torchio as tio

import config
import engine
import patients
import phantom
import preprocess
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
    phantom.makeCases(config.DATA_FOLDER, 3, seed=1, shape=(120, 120, 18))
    df = utils.makeFileList()
    utils.plotSample(df.iloc[0])
    traindf, valdf, testdf = utils.split(df)
    noTrain = preprocess.makeDataset(dataframe=traindf, filename=config.TRAIN_FILE)
    noVal = preprocess.makeDataset(dataframe=valdf, filename=config.VAL_FILE)
    trainTransform, valTransform, testTransform = preprocess.makeTransforms()
    trainSet = utils.BRATSDataset(config.TRAIN_FILE, noTrain, trainTransform)
    valSet = utils.BRATSDataset(config.VAL_FILE, noVal, valTransform)
    trainLoader = torch.utils.data.DataLoader(trainSet, batch_size=config.BATCHSIZE, shuffle=True, num_workers=2)
    valLoader = torch.utils.data.DataLoader(valSet, batch_size=config.BATCHSIZE, num_workers=2)
    model = smp.Unet('resnet18', encoder_weights=None, decoder_channels=(32, 16, 16, 8, 8),
                     in_channels=config.ENCODER_IN_CHANNEL, classes=config.NO_CLASSES).to(config.DEVICE)
    criterion = smp.losses.FocalLoss(mode='multiclass', gamma=config.LOSS_GAMMA)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.LEARN_RATE, weight_decay=config.WEIGHT_DECAY)
    scaler = torch.amp.GradScaler('cuda', enabled=False)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=config.SCHEDULER_FACTOR,
                                                           patience=config.SCHEDULER_PATIENCE)
    model, optimizer, scheduler, scaler, epoch, trainLoss, valLoss, best = utils.loadCheckpoint(
        model, optimizer, scheduler, scaler, config.LAST_CHECKPOINT)
    for epoch in range(epoch, config.EPOCHS):
        trainLoss = engine.train(model, criterion, optimizer, scaler, trainLoader) / noTrain
        valLoss = engine.validate(model, criterion, valLoader) / noVal
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


def test_contract_runsAsAScriptUnderSpawn(tmp_path):
    """The whole walk runs from another folder under spawn, leaves what it promises and not one warning."""
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


def documentsTransforms():
    """The list of the document that the package follows: stretching and remapping inside the patch transforms."""
    images, both = {'include': ['x1', 'x2', 'x3']}, {'include': ['x1', 'x2', 'x3', 'y'], 'label_keys': ['y']}
    pad = tio.CropOrPad((128, 128, 1), padding_mode='minimum', **both)
    spatial = tio.OneOf(
        {
            tio.RandomFlip(axes=(0, 1), **both): 0.35,
            tio.RandomAffine(degrees=(0, 0, 0, 0, -20, 20), **both): 0.35,
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


@pytest.mark.filterwarnings('ignore:Rescaling image:RuntimeWarning')
def test_contract_theDocumentsOwnWayWorks(tmp_path):
    """Raw patches by an identity volume transform, stretched in the patch: shapes, dtypes and classes are the same."""
    config.PATCH_SIZE, config.PATCH_STRIDE = 128, 112
    phantom.makeCases(tmp_path, 1, shape=(140, 132, 20))
    df = utils.makeFileList(tmp_path)
    noPatches = preprocess.makeDataset(dataframe=df, filename=tmp_path / 'a.h5', transform=lambda subject: subject)
    raw, label = patients.readCase(df.iloc[0])
    with h5py.File(tmp_path / 'a.h5') as file:
        row, column, z = (int(file[name][0]) for name in ('row', 'column', 'slice'))
        np.testing.assert_array_equal(file['image'][0], raw[:, row : row + 128, column : column + 128, z])
    train, validation, test = documentsTransforms()
    dataset = utils.BRATSDataset(tmp_path / 'a.h5', noPatches, train)
    for index in range(0, noPatches, 5):
        image, patchLabel = dataset[index]
        assert image.shape == (3, 128, 128) and image.dtype == torch.float32
        assert patchLabel.shape == (128, 128) and patchLabel.dtype == torch.int64 and patchLabel.max() <= 3
    image, _ = utils.BRATSDataset(tmp_path / 'a.h5', noPatches, validation)[noPatches // 2]
    assert image.min() == -1 and image.max() == 1
    model = torch.nn.Conv2d(3, 4, 1)
    x, y, yhat = engine.predict(df.iloc[0], model, transform=test, patchStride=112, device='cpu')
    assert x.shape == (20, 3, 140, 132) and x.min() == -1 and x.max() == 1
    np.testing.assert_array_equal(y, label.transpose(2, 0, 1))
    assert yhat.shape == y.shape
