import numpy as np
import pytest
import torch
import torchio as tio

import config
import transforms
from patients import volumes

GENERATOR = np.random.default_rng(0)
IMAGES = {
    'positive': GENERATOR.exponential(300, (3, 20, 20, 8)),
    'negative too': GENERATOR.normal(100, 80, (3, 20, 20, 8)),
    'few values': GENERATOR.integers(1, 5, (3, 20, 20, 8)),
}


@pytest.mark.parametrize('kind', IMAGES)
def test_StretchHistogram_equalsTorchioInsideTheMask(kind):
    """Inside the brain it is torchio's RescaleIntensity, outside it is -1, with negative intensities too."""
    image = IMAGES[kind].astype(np.float32)
    image[:, :5] = 0
    names = ['x1', 'x2', 'x3']
    rescale = tio.RescaleIntensity((-1, 1), (0.5, 99.5), masking_method=transforms.maskFunction, include=names)
    stretched, _ = transforms.transformCase(image, None, transforms.volumeTransform())
    expected, _ = transforms.transformCase(image, None, rescale)
    isBrain = (image != 0).transpose(3, 0, 1, 2)
    np.testing.assert_allclose(stretched[isBrain], expected[isBrain], atol=1e-6)
    assert (stretched[~isBrain] == -1).all() and stretched[isBrain].min() == -1 and stretched[isBrain].max() == 1


@pytest.mark.filterwarnings('error')
def test_StretchHistogram_makesBackgroundOfAnEmptyOrConstantImage():
    """A modality without contrast becomes -1 everywhere, without a warning."""
    for value in (0, 7):
        stretched, _ = transforms.transformCase(np.full((3, 4, 4, 4), value), None, transforms.volumeTransform())
        assert (stretched == -1).all()


def test_StretchHistogram_followsTheConfiguration():
    """Another range and other percentiles: the quartiles of 1 to 5 are 2 and 4, mapped to 0 and 10."""
    config.STRETCH_RANGE, config.STRETCH_PERCENTILES, config.MODALITIES = (0, 10), (25, 75), ('t2',)
    image = np.array([0, 1, 2, 3, 4, 5], np.float32).reshape(1, 6, 1, 1)
    stretched, _ = transforms.transformCase(image, None, transforms.volumeTransform())
    assert stretched.flatten().tolist() == [0, 0, 0, 5, 10, 10]


@pytest.mark.parametrize('dtype', [np.uint8, np.int16, np.float32, np.float64])
def test_findLimits_areThePercentiles(dtype):
    """Of 0, 1, ..., 200 the percentiles 0.5 and 99.5 are 1 and 199; of nothing both are 0; given limits come first."""
    stretch = transforms.volumeTransform()
    values = np.random.default_rng(0).permutation(201).astype(dtype)
    assert stretch.findLimits(values) == pytest.approx([1, 199])
    assert stretch.findLimits(values[:0]) == (0, 0)
    given = transforms.StretchHistogram((-1, 1), in_min_max=(10, 20), include=['x1'])
    assert tuple(given.findLimits(values)) == (10, 20)


def test_stretch_mapsAndClips():
    """10 to 30 is mapped to -1 to 1, the rest clipped, and what is outside the mask becomes -1; the input is kept.

    Whatever is rounded, nothing exceeds 1: patches with 1.0000001 would be stored in float32, twice as large.
    """
    stretch = transforms.volumeTransform().stretch
    values, mask = np.array([[25, 0, 10], [20, 30, 99]], np.int16), np.array([[False, True, True], [True, True, True]])
    stretched = stretch(values, mask, 10, 30)
    assert stretched.dtype == np.float32 and stretched.tolist() == [[-1, -1, -1], [0, 1, 1]]
    assert values.tolist() == [[25, 0, 10], [20, 30, 99]]
    assert (stretch(values, mask, 30, 30) == -1).all()
    for low, width in np.random.default_rng(0).uniform(1, 1000, (300, 2)):
        values = np.array([low, low + width, 2 * (low + width)], np.float32)
        assert np.abs(stretch(values, np.ones(3, bool), low, low + width)).max() <= 1


def test_transformCase_putsSlicesFirst():
    """(C, W, H, D) becomes (D, C, W, H), float32, and the label (D, W, H), uint8."""
    image = np.arange(2 * 3 * 4 * 5, dtype=np.int16).reshape(2, 3, 4, 5)
    x, y = transforms.transformCase(image, image[0] % 4, lambda subject: subject)
    assert x.dtype == torch.float32 and y.dtype == torch.uint8
    np.testing.assert_array_equal(x, image.transpose(3, 0, 1, 2))
    np.testing.assert_array_equal(y, image[0].transpose(2, 0, 1) % 4)


def test_transformCase_roundsFloatLabels():
    """Affine and elastic return labels as float32: 2.9999 is class 3. Without a label there is none afterwards."""
    image, label = np.ones((1, 2, 2, 1), np.float32), np.full((2, 2, 1), 3, np.uint8)
    _, y = transforms.transformCase(image, label, lambda subject: subject | {'y': subject['y'] - 0.0001})
    assert y.dtype == torch.uint8 and (y == 3).all()
    seen = []
    _, y = transforms.transformCase(image, None, lambda subject: seen.append(subject['y']) or subject)
    assert y is None and seen[0].shape == (1, 2, 2, 1)


def test_windowStarts_areThoseCountedByHand():
    """0, stride, ..., and the last one flush with the end, for slices of 240 pixels, 182, 128 and fewer."""
    for length, stride, starts in (
        (240, 112, [0, 112]),
        (240, 64, [0, 64, 112]),
        (182, 112, [0, 54]),
        (128, 112, [0]),
        (100, 112, [0]),
        (129, 128, [0, 1]),
        (256, 128, [0, 128]),
    ):
        assert volumes.windowStarts(length, 128, stride).tolist() == starts


def test_windowStarts_coverEveryPixel():
    """For any length, size and stride, every pixel is in a window and no window leaves the image."""
    for length in range(1, 40):
        for size in range(1, 12):
            for stride in range(1, size + 1):
                starts = volumes.windowStarts(length, size, stride)
                covered = {start + offset for start in starts for offset in range(size)}
                assert covered >= set(range(length)) and max(covered) == max(length, size) - 1


@pytest.mark.parametrize('stride', [0, -1, 13])
def test_windowStarts_refuseAStrideThatLeavesPixelsOut(stride):
    """A stride of 0, below, or beyond the window's size is refused with the strides that are possible."""
    with pytest.raises(ValueError, match=f'stride is {stride}; 1 to 12 .* covers every pixel'):
        volumes.windowStarts(40, 12, stride)


def leaves():
    """Return a dict of class name to each transform inside the two choices of the training transform."""
    train, *_ = transforms.makeTransforms()
    return {type(one).__name__: one for group in train.transforms[1:] for one in group.transforms_dict}


def test_makeTransforms_areTheOnesOfTheContract():
    """Pad, spatial, intensity, with the documented weights and ranges; validation only pads, test only stretches."""
    train, validation, test = transforms.makeTransforms()
    pad, spatial, intensity = train.transforms
    assert tuple(pad.target_shape) == (32, 32, 1) and pad.padding_mode == 'minimum'
    weights = {type(one).__name__: weight for one, weight in spatial.transforms_dict.items()}
    expected = {'RandomFlip': 0.35, 'RandomAffine': 0.35, 'RandomAnisotropy': 0.15, 'RandomElasticDeformation': 0.15}
    assert weights == pytest.approx(expected) and spatial.probability == intensity.probability == 0.95
    assert [type(one).__name__ for one in intensity.transforms_dict] == ['RandomNoise', 'RandomBiasField']
    assert [type(one).__name__ for one in validation.transforms] == ['CropOrPad']
    assert [type(one).__name__ for one in test.transforms] == ['StretchHistogram']
    one = leaves()
    assert one['RandomFlip'].axes == (0, 1) and one['RandomFlip'].flip_probability == 1
    assert one['RandomAffine'].degrees == (0, 0, 0, 0, -20, 20)
    assert one['RandomAffine'].scales == (0.9, 1.1, 0.9, 1.1, 0.9, 1.1)
    assert one['RandomAnisotropy'].axes == (0, 1) and one['RandomAnisotropy'].downsampling_range == (1.5, 2.5)
    assert tuple(one['RandomElasticDeformation'].max_displacement) == (2, 2, 0)
    assert one['RandomNoise'].std_range == (0, 0.1) and one['RandomBiasField'].coefficients_range == (-0.1, 0.1)


@pytest.mark.parametrize(
    ('name', 'value', 'kind', 'attribute', 'expected'),
    [
        ('FLIP_AXES', (0,), 'RandomFlip', 'axes', (0,)),
        ('FLIP_PROBABILITY', 0.3, 'RandomFlip', 'flip_probability', 0.3),
        ('AFFINE_DEGREES', 5, 'RandomAffine', 'degrees', (-5, 5) * 3),
        ('AFFINE_SCALES', 0.5, 'RandomAffine', 'scales', (0.5, 1.5) * 3),
        ('ANISOTROPY_AXES', (1,), 'RandomAnisotropy', 'axes', (1,)),
        ('ANISOTROPY_DOWNSAMPLING', (2, 3), 'RandomAnisotropy', 'downsampling_range', (2, 3)),
        ('ELASTIC_DISPLACEMENT', (1, 1, 0), 'RandomElasticDeformation', 'max_displacement', (1, 1, 0)),
        ('NOISE_STD', 1, 'RandomNoise', 'std_range', (0, 1)),
        ('BIAS_COEFFICIENTS', 1, 'RandomBiasField', 'coefficients_range', (-1, 1)),
        ('MODALITIES', ('t1', 'flair'), 'RandomAffine', 'include', ['x1', 'x2', 'y']),
    ],
)
def test_makeTransforms_readEachNumberFromConfig(name, value, kind, attribute, expected):
    """Another number in config makes another object, when makeTransforms is called."""
    setattr(config, name, value)
    found = getattr(leaves()[kind], attribute)
    assert type(expected)(found) == expected


def test_makeTransforms_trainKeepsShapesAndClasses():
    """Whatever is drawn, a patch keeps its shape and its label gets no new class."""
    transform = transforms.makeTransforms()[0]
    image = torch.rand(3, 32, 32, 1) * 2 - 1
    label = torch.zeros(32, 32, 1, dtype=torch.uint8)
    label[8:20, 8:20] = 3
    for seed in range(40):
        torch.manual_seed(seed)
        changed, classes = transforms.transformCase(image, label, transform)
        assert changed.shape == (1, 3, 32, 32) and classes.shape == (1, 32, 32)
        assert set(classes.unique().tolist()) <= {0, 3}
