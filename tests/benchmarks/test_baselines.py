"""The baselines do the same work as this package, or the comparison would mean nothing."""

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

import config
import engine
import metrics
import phantom
import preprocess
import transforms
import utils
from benchmarks import baselines


@pytest.fixture
def smallCases(tmp_path):
    """Return the file list of one small phantom."""
    phantom.makeCases(tmp_path / 'data', 1, shape=(48, 40, 16))
    return utils.makeFileList(tmp_path / 'data')


def _makeKorniaAugmentOfOne():
    """Return kornia's augmentation of a batch for one patch."""
    augment = baselines.makeKorniaAugment()
    return lambda image, label: [values[0] for values in augment(image[None], label[None])]


@pytest.mark.parametrize(
    ('package', 'make'),
    [
        ('torchio', lambda: baselines.makeTorchioAugment(transforms.makeTransforms()[0])),
        ('monai', baselines.makeMonaiAugment),
        ('batchgeneratorsv2', lambda: baselines.makeBatchgeneratorsAugment(isGamma=False)),
        ('batchgeneratorsv2', lambda: baselines.makeBatchgeneratorsAugment(isGamma=True)),
        ('kornia', _makeKorniaAugmentOfOne),
    ],
)
def test_makeAugment_keepsShapesAndClasses(package, make):
    """Each package returns a changed float32 image and an int64 label of the same shape, without new classes."""
    pytest.importorskip(package)
    augment, isChanged = make(), False
    image, label = torch.rand(4, 3, 32, 32), torch.randint(0, 4, (4, 32, 32))
    for _ in range(5):
        for given, classes in zip(image, label, strict=True):
            x, y = augment(given, classes)
            assert (x.dtype, x.shape, y.dtype, y.shape) == (torch.float32, (3, 32, 32), torch.int64, (32, 32))
            assert x.isfinite().all() and set(y.unique().tolist()) <= {0, 1, 2, 3}
            isChanged |= not torch.equal(x, given)
    assert isChanged


def test_AugmentedDataset_augmentsEachPatch(smallCases, tmp_path):
    """A sample is the augmentation of the patch in the file."""
    file = str(tmp_path / 'patches.h5')
    numPatches = preprocess.makeDataset(smallCases, file)
    dataset = baselines.AugmentedDataset(file, lambda image, label: (image + 1, label))
    image, label = utils.BRATSDataset(file)[3]
    assert len(dataset) == numPatches
    assert torch.equal(dataset[3][0], image + 1) and torch.equal(dataset[3][1], label)


def test_readers_returnTheSameVolume(smallCases):
    """isal, nibabel and SimpleITK read the same int16 volume."""
    path = smallCases.iloc[0]['flair']
    first, *others = [read(path) for read in (baselines.readByIsal, baselines.readByNibabel, baselines.readBySimpleITK)]
    assert first.dtype == np.int16 and first.any()
    for volume in others:
        np.testing.assert_array_equal(volume, first, strict=True)


def test_preprocessNaively_writesThePatchesOfMakeDataset(smallCases, tmp_path):
    """The naive baseline writes the patches that makeDataset writes, up to the rounding of float16."""
    config.PATCH_STRIDE = 16  # of 48 and 40 pixels: starts 0, 16 and 0, 8, the corners that the naive baseline takes
    naive, ours = str(tmp_path / 'naive.h5'), str(tmp_path / 'ours.h5')
    numPatches = baselines.preprocessNaively(smallCases, naive)
    assert numPatches == preprocess.makeDataset(smallCases, ours) > 10
    with h5py.File(naive) as theirs, h5py.File(ours) as file:
        # the files' axes run left and back, ours right and front: each patch is turned, and the order differs
        turned = {name: values[:][..., ::-1, ::-1] for name, values in theirs.items()}
        kept = {name: file[name][:] for name in turned}
    for patches in (turned, kept):
        order = np.argsort([patch.tobytes() for patch in patches['label']])
        patches |= {name: values[order] for name, values in patches.items()}
    np.testing.assert_array_equal(turned['label'], kept['label'])
    np.testing.assert_allclose(turned['image'], kept['image'], atol=1e-3)


class _Pointwise(torch.nn.Module):
    """A model that decides each pixel from its own intensities: the brightest modality, or 0 if all are dark."""

    def forward(self, x):
        return torch.cat([torch.full_like(x[:, :1], -0.25), x], 1)  # (B, 3, H, W) -> (B, 4, H, W)


def test_predictNaively_returnsTheClassesOfPredict(smallCases):
    """With a model that looks at single pixels, the naive baseline predicts what predict does, in the files' axes."""
    paths = smallCases.iloc[0]
    x, _, yhat = engine.predict(paths, _Pointwise())
    naive = baselines.predictNaively(paths, _Pointwise()).flip(1, 2)
    assert naive.shape == yhat.shape and yhat.unique().tolist() == [0, 1, 2, 3]
    isSure = (x.sort(1).values.diff(dim=1)[:, -1].abs() > 1e-4) & ((x.amax(1) + 0.25).abs() > 1e-4)
    assert isSure.float().mean() > 0.1
    assert torch.equal(naive[isSure], yhat[isSure])


def test_predictByMonai_returnsTheClassesOfPredict(smallCases, monkeypatch):
    """MONAI's inferer predicts what predict does, except for background, which predict skips."""
    pytest.importorskip('monai')
    monkeypatch.setattr(engine, 'precision', lambda device: None)  # bfloat16 is too coarse to compare
    config.PATCH_STRIDE, config.PREDICT_BATCH, config.DECODER_CHANNELS = 16, 16, (16, 8, 8, 4, 4)
    config.ENCODER_NAME = 'resnet18'
    torch.manual_seed(0)
    model = engine.makeModel().eval()
    x, _, yhat = engine.predict(smallCases.iloc[0], model, patchStride=config.PATCH_STRIDE)
    theirs, isBrain = baselines.predictByMonai(x, model, 'cpu'), (x > -1).any(1)
    assert (theirs == yhat)[isBrain].float().mean() > 0.999


@pytest.fixture
def masks():
    """Return two boxes that overlap, bool (12, 14, 16)."""
    truth, prediction = np.zeros((2, 12, 14, 16), bool)
    truth[2:8, 3:9, 4:10], prediction[3:10, 3:8, 5:12] = True, True
    return truth, prediction


@pytest.mark.parametrize(
    ('package', 'compute', 'rule'),
    [
        ('scipy', baselines.computeHd95ByTransform, {}),
        ('monai', baselines.computeHd95ByMonai, {}),
        ('surface_distance', baselines.computeHd95BySurfaceDistance, {'rule': 'surface-distance'}),
    ],
)
def test_computeHd95_equalsHausdorff95(package, compute, rule):
    """Each package finds the same HD95 of two boxes that overlap, in both directions; surface-distance by its rule."""
    pytest.importorskip(package)
    truth, prediction = np.zeros((2, 12, 14, 16), bool)
    truth[2:8, 3:9, 4:10], prediction[3:10, 3:8, 5:12] = True, True
    for pair in ((truth, prediction), (prediction, truth)):
        assert compute(*pair) == pytest.approx(metrics.hausdorff95(*pair, **rule))


@pytest.mark.parametrize('seed', range(4))
def test_scoreLesionsNaively_equalsScoreLesions(seed):
    """On random boxes of all classes, small ones and neighbours among them, every score agrees."""
    pytest.importorskip('surface_distance')
    generator = np.random.default_rng(seed)
    y, yhat = np.zeros((2, 40, 36, 32), np.uint8)
    for volumes, number in (((y,), 14), ((yhat,), 14), ((y, yhat), 6)):
        for _ in range(number):
            start, size = generator.integers(0, (34, 30, 26)), generator.integers(1, 7, 3)
            box = tuple(slice(low, low + length) for low, length in zip(start, size, strict=True))
            for volume in volumes:
                volume[box] = generator.integers(1, 5)
    expected = metrics.scoreLesions(y, yhat, rule='BraTS2024')
    found = baselines.scoreLesionsNaively(y, yhat)
    pd.testing.assert_frame_equal(found, expected[found.columns], check_dtype=False, rtol=1e-9)
    assert set(found) == set(expected) and (found['dice'] < 1).any()
