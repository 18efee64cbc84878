"""The baselines do the same work as this package, or the comparison would mean nothing."""

import h5py
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

import config
import engine
import metrics
import phantom
import preprocess
import recipe
import transforms
import utils
from benchmarks import baselines


@pytest.fixture
def smallCases(tmp_path):
    """Return the file list of one small phantom."""
    phantom.makeCases(tmp_path / 'data', 1, shape=(48, 40, 16))
    return utils.makeFileList(tmp_path / 'data')


def _checkAugment(augment):
    """Check that an augmentation of patches keeps shapes, dtypes and classes, and changes the image."""
    image, label = torch.rand(4, 3, 32, 32), torch.randint(0, 4, (4, 32, 32))
    isChanged = False
    for _ in range(5):
        for given, classes in zip(image, label, strict=True):
            x, y = augment(given, classes)
            assert (x.dtype, x.shape, y.dtype, y.shape) == (torch.float32, (3, 32, 32), torch.int64, (32, 32))
            assert x.isfinite().all() and set(y.unique().tolist()) <= {0, 1, 2, 3}
            isChanged |= not torch.equal(x, given)
    assert isChanged


@pytest.mark.parametrize('isStretched', [False, True])
def test_makeTorchioAugment_keepsShapesAndClasses(isStretched):
    """torchio's lists give float32 images and int64 labels of the same shape, without new classes."""
    transform = baselines.makeStretchingTransform() if isStretched else transforms.makeTransforms()[0]
    _checkAugment(baselines.makeTorchioAugment(transform))


@pytest.mark.parametrize('isStretched', [False, True])
def test_makeMonaiAugment_keepsShapesAndClasses(isStretched):
    """The same of MONAI."""
    pytest.importorskip('monai')
    _checkAugment(baselines.makeMonaiAugment(isStretched))


@pytest.mark.parametrize('isGamma', [False, True])
def test_makeBatchgeneratorsAugment_keepsShapesAndClasses(isGamma):
    """The same of batchgeneratorsv2."""
    pytest.importorskip('batchgeneratorsv2')
    _checkAugment(baselines.makeBatchgeneratorsAugment(isGamma))


def test_makeKorniaAugment_keepsShapesAndClasses():
    """The same of kornia, for a batch."""
    pytest.importorskip('kornia')
    augment = baselines.makeKorniaAugment()

    def augmentOne(image, label):
        x, y = augment(image[None], label[None])
        return x[0], y[0]

    _checkAugment(augmentOne)


def test_makeStretchingTransform_stretchesTheBrain():
    """Between spatial and intensity transforms, the brain's intensities are mapped to the range."""
    config.SPATIAL_PROBABILITY = config.INTENSITY_PROBABILITY = 0
    image = torch.arange(3 * 32 * 32.0).view(3, 32, 32) + 100
    x, _ = baselines.makeTorchioAugment(baselines.makeStretchingTransform())(image, torch.zeros(32, 32))
    assert (x.amin((1, 2)) == -1).all() and (x.amax((1, 2)) == 1).all()


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
    volumes = [read(path) for read in (baselines.readByIsal, baselines.readByNibabel, baselines.readBySimpleITK)]
    assert all(volume.dtype == np.int16 and volume.any() for volume in volumes)
    np.testing.assert_array_equal(volumes[0], volumes[1])
    np.testing.assert_array_equal(volumes[0], volumes[2])


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


def test_predictPatchByPatch_sendsEveryCornerWindow():
    """Each slice is sent as four windows, one at a time, and they hold every pixel."""
    windows = []
    x = torch.arange(2 * 3 * 48 * 40.0).view(2, 3, 48, 40)
    baselines.predictPatchByPatch(x, lambda patch: windows.append(patch) or patch, 'cpu')
    assert [window.shape for window in windows] == [(1, 3, 32, 32)] * 8
    assert torch.equal(torch.stack(windows).unique(), x.flatten())


def test_predictByMonai_returnsTheClassesOfPredict(smallCases, monkeypatch):
    """MONAI's inferer predicts what predict does, except for background, which predict skips."""
    pytest.importorskip('monai')
    monkeypatch.setattr(recipe, 'precision', lambda device: None)  # bfloat16 is too coarse to compare
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


def test_computeHd95ByTransform_equalsHausdorff95(masks):
    """The distance transform gives the same HD95."""
    expected = metrics.hausdorff95(*masks)
    assert baselines.computeHd95ByTransform(*masks) == pytest.approx(expected)
    assert baselines.computeHd95ByTransform(*masks[::-1]) == pytest.approx(expected)


def test_computeHd95ByMonai_equalsHausdorff95(masks):
    """MONAI gives the same HD95."""
    pytest.importorskip('monai')
    assert baselines.computeHd95ByMonai(*masks) == pytest.approx(metrics.hausdorff95(*masks))


def test_computeHd95BySurfaceDistance_equalsHausdorff95(masks):
    """surface-distance gives the same HD95 by its own rule."""
    pytest.importorskip('surface_distance')
    expected = metrics.hausdorff95(*masks, rule='surface-distance')
    assert baselines.computeHd95BySurfaceDistance(*masks) == pytest.approx(expected)


def test_writeFramesInColor_writesEveryFrame(tmp_path):
    """Frames of one color each come back with their colors."""
    colors = [(255, 0, 0), (0, 128, 0), (0, 0, 255)]
    frames = np.stack([np.full((8, 6, 3), color, np.uint8) for color in colors])
    baselines.writeFramesInColor(frames, tmp_path / 'color.gif')
    with Image.open(tmp_path / 'color.gif') as movie:
        read = np.stack([np.asarray(frame.convert('RGB')) for frame in ImageSequence.Iterator(movie)])
    np.testing.assert_array_equal(read, frames)
