import copy
import pickle

import numpy as np
import pytest
import torch
import torchio as tio
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import batched
import preprocess
import transforms

IMAGES = {'include': ['x1', 'x2', 'x3']}
BOTH = {'include': ['x1', 'x2', 'x3', 'y'], 'label_keys': ['y']}
SHAPE = (41, 60)  # neither square nor of one parity
DRAWS = 3000


def makeBatch(noSamples=4, shape=SHAPE, dtype=torch.float32):
    """Makes images (B, 3, H, W) of waves and noise in a disk amid zeros, and labels (B, H, W) of the classes 0 to 3."""
    generator = torch.Generator().manual_seed(noSamples)
    rows, columns = torch.meshgrid(*(torch.linspace(-1, 1, length) for length in shape), indexing='ij')
    waves = torch.rand(noSamples, 3, 2, 1, 1, generator=generator) * 4
    image = torch.sin(waves[:, :, 0] * rows + 1) + torch.cos(waves[:, :, 1] * columns) - 0.5
    image += 0.1 * torch.rand(image.shape, generator=generator)
    label = sum(((rows - 0.2) ** 2 + columns**2 < radius).long() for radius in (0.1, 0.3, 0.5)).repeat(noSamples, 1, 1)
    return (image * (rows**2 + columns**2 < 0.9)).to(dtype), label


def asDict(image, label):
    """Gives one sample as torchio's dict: each (1, H, W, 1)."""
    return {
        'x1': image[:1, ..., None],
        'x2': image[1:2, ..., None],
        'x3': image[2:, ..., None],
        'y': label[None, ..., None],
    }


def viaTorchio(transform, image, label):
    """Gives a batch after a torchio transform, sample by sample."""
    done = [transform(asDict(*sample)) for sample in zip(image, label, strict=True)]
    images = torch.stack([torch.cat([each[name] for name in IMAGES['include']]) for each in done])
    return images[..., 0], torch.stack([each['y'][0, ..., 0] for each in done])


def viaBatched(transform, image, label, values, group=1, seed=0):
    """Gives a batch after a transform whose parameters are given."""
    generator = torch.Generator().manual_seed(seed)
    new, newLabel = batched._KINDS[type(transform)].apply(
        transform, image.clone(), label.clone(), group, values, generator
    )
    return image if new is None else new, label if newLabel is None else newLabel


def draw(transform, count=DRAWS, noImages=3):
    """Gives the groups and values that are drawn for some samples."""
    return batched._KINDS[type(transform)].draw(transform, count, noImages, torch.Generator().manual_seed(1))


def assertEqual(found, expected, noLabels=0):
    """Images to 1e-4 of the range, labels but for a number of ties."""
    extent = (expected[0].max() - expected[0].min()).clamp(min=1)
    assert found[0].shape == expected[0].shape and found[1].shape == expected[1].shape
    assert (found[0] - expected[0]).abs().max() < 1e-4 * extent
    assert (found[1] != expected[1]).sum() <= noLabels


def assertSameDistribution(found, expected):
    """Kolmogorov-Smirnov; the seeds are fixed, so a share of false alarms is not to be feared."""
    assert stats.ks_2samp(np.ravel(found), np.ravel(expected)).pvalue > 0.01


def trainList(**others):
    """The document's list, with stretching inside."""
    mask = {'masking_method': transforms.maskFunction}
    spatial = {
        tio.RandomFlip((0, 1), **BOTH): 0.35,
        tio.RandomAffine(scales=0.1, degrees=(0, 0, 0, 0, -20, 20), **BOTH): 0.35,
        tio.RandomAnisotropy((0, 1), (1.5, 2.5), **BOTH): 0.15,
        tio.RandomElasticDeformation(max_displacement=(2, 2, 0), **BOTH): 0.15,
    }
    intensity = {tio.RandomNoise(std=(0, 0.1), **IMAGES): 0.5, tio.RandomBiasField(0.1, **IMAGES): 0.5}
    return tio.Compose(
        [
            tio.CropOrPad((*SHAPE, 1), padding_mode='minimum', **BOTH),
            tio.OneOf(spatial, p=0.95, **BOTH),
            tio.RescaleIntensity((-1, 1), (0.5, 99.5), **mask, **IMAGES),
            tio.OneOf(intensity, p=0.95, **IMAGES),
            tio.RemapLabels({3: 2}, **BOTH),
        ],
        **others,
    )


# The same parameters, the same result


@pytest.mark.parametrize('padding', ['minimum', 'mean', 0.3])
@pytest.mark.parametrize(('center', 'interpolation'), [('image', 'linear'), ('origin', 'linear'), ('image', 'nearest')])
def test_affine_equalsTorchio(center, interpolation, padding):
    """Scales, rotation and translation, each sample its own; nearest-neighbour images may differ in a few ties."""
    options = {'center': center, 'default_pad_value': padding, 'image_interpolation': interpolation, **BOTH}
    options['default_pad_label'] = 2
    image, label = makeBatch()
    image += 3  # so that what is read at the edges shows
    values = torch.tensor([[1.1, 0.85, 17, 4.3, -2.2], [0.7, 1.3, -95, 0, 11], [1, 1, 0, 3, 0], [1, 1, 0, 0.25, 0.1]])
    transform = tio.RandomAffine(translation=(-11, 11, -11, 11, 0, 0), **options)
    found = viaBatched(transform, image, label, values)
    for number, (first, second, degrees, right, up) in enumerate(values.tolist()):
        # the other axes' numbers torchio ignores on a single slice
        one = tio.Affine((first, second, 1.4), (30, 40, degrees), (right, up, 0), **options)
        expected = viaTorchio(one, image[number : number + 1], label[number : number + 1])
        assertEqual([each[number : number + 1] for each in found], expected)


@pytest.mark.parametrize(
    ('points', 'locked', 'interpolation'),
    [(7, 2, 'linear'), (7, 0, 'nearest'), (5, 1, 'linear'), ((6, 9, 4), 1, 'linear'), ((8, 7, 5), 2, 'linear')],
)
@pytest.mark.filterwarnings('ignore:The maximum displacement')
def test_elastic_equalsTorchio(points, locked, interpolation):
    """Any control grid, any locked borders; the label's fill is its own minimum, as torchio's."""
    options = {'max_displacement': (6, 4, 3), 'image_interpolation': interpolation, **BOTH}
    transform = tio.RandomElasticDeformation(points, locked_borders=locked, **options)
    image, label = makeBatch(2)
    image, label = image + 3, label + 1
    values = draw(transform, 2)[1]
    assert values[..., 0].abs().max() > 5
    found = viaBatched(transform, image, label, values)
    for number, field in enumerate(values):
        field = np.concatenate([field.numpy(), np.full((*field.shape[:3], 1), 2, np.float32)], -1)
        expected = viaTorchio(tio.ElasticDeformation(field, **options), image[number, None], label[number, None])
        assertEqual([each[number, None] for each in found], expected)


@pytest.mark.parametrize('axis', [0, 1])
@pytest.mark.parametrize('factor', [1.63, 2.3, 2.6, 4.1])
@pytest.mark.parametrize(('scalarsOnly', 'interpolation'), [(True, 'linear'), (False, 'linear'), (False, 'nearest')])
def test_anisotropy_equalsTorchio(axis, factor, scalarsOnly, interpolation):
    """Both axes, with and without the label, also where the coarse grid ends inside of the image.

    No factor gives an even number of rows of the 41: the middle one would then lie on a tie.
    """
    options = {'scalars_only': scalarsOnly, 'image_interpolation': interpolation, **BOTH}
    transform = tio.RandomAnisotropy(axis, (factor, factor), **options)
    image, label = makeBatch(2)
    image += 3  # so that the zeros at the ends show
    groups, values = draw(transform, 2)
    assertEqual(
        viaBatched(transform, image, label + 1, values, int(groups[0])), viaTorchio(transform, image, label + 1)
    )


@pytest.mark.parametrize(('group', 'axes'), [(1, (0,)), (2, (1,)), (3, (0, 1))])
def test_flip_equalsTorchio(group, axes):
    """The groups are the axes."""
    image, label = makeBatch(2)
    found = viaBatched(tio.RandomFlip((0, 1), **BOTH), image, label, torch.zeros(2, 0), group)
    assertEqual(found, viaTorchio(tio.Flip(axes, **BOTH), image, label))


@pytest.mark.parametrize('order', [0, 1, 3, 5])
def test_biasField_equalsTorchio(order):
    """Each image its own coefficients, in torchio's order; those of depth have no effect."""
    transform = tio.RandomBiasField(0.5, order=order, **IMAGES)
    image, label = makeBatch(1)
    coefficients = {name: transform.get_params(order, (-0.5, 0.5)) for name in IMAGES['include']}
    powers = range(order + 1)
    depths = [z for x in powers for y in powers for z in powers if x + y + z <= order]
    inPlane = [
        [value for value, depth in zip(coefficients[name], depths, strict=True) if depth == 0] for name in coefficients
    ]
    expected = tio.BiasField(coefficients, dict.fromkeys(coefficients, order), **IMAGES)
    found = viaBatched(transform, image, label, torch.tensor([inPlane]))
    assertEqual(found, viaTorchio(expected, image, label))
    assert (found[0] - image).abs().max() > 0.05


def test_noise_equalsTorchio():
    """With torchio's seed it is torchio's noise; each image has its own mean and standard deviation."""
    image, label = makeBatch(1)
    values = torch.tensor([[[0.5, 0.1]]])
    found = viaBatched(tio.RandomNoise(**IMAGES), image[:, :1], label, values, seed=5)[0]
    expected, _ = viaTorchio(tio.Noise(0.5, 0.1, 5, **IMAGES), image, label)
    torch.testing.assert_close(found, expected[:, :1], atol=1e-6, rtol=0)
    values = torch.tensor([[[0.0, 0.5], [3, 0], [-2, 0.01]], [[1, 0.25], [0, 1], [0, 0]]])
    noise = viaBatched(tio.RandomNoise(**IMAGES), torch.zeros(2, 3, 200, 200), label, values)[0]
    torch.testing.assert_close(noise.mean((2, 3)), values[..., 0], atol=0.02, rtol=0)
    torch.testing.assert_close(noise.std((2, 3)), values[..., 1], atol=0.01, rtol=0)


@pytest.mark.parametrize(
    'mask', [None, transforms.maskFunction, 'Left', 'Anterior', (7, 9, 0), lambda image: image > image.mean()]
)
@pytest.mark.parametrize('percentiles', [(0.5, 99.5), (0, 100), (25, 75), (0, 3)])
@pytest.mark.parametrize('inside', [None, (-0.3, 1.7)])
@pytest.mark.filterwarnings('ignore:Rescaling image')
def test_rescale_equalsTorchio(mask, percentiles, inside):
    """Any mask, any percentiles, each image its own; torchio and Batched as their users call them."""
    image, label = makeBatch(2)
    image[1] *= 2
    image[0, 1, : SHAPE[0] // 2 + 1] = 0
    transform = tio.RescaleIntensity((-1, 2), percentiles, mask, inside, **IMAGES)
    assertEqual(batched.Batched(transform)(image, label), viaTorchio(transform, image, label))
    stretch = transforms.StretchHistogram((-1, 2), percentiles, mask, inside, **IMAGES)
    assertEqual(batched.Batched(stretch)(image, label), viaTorchio(stretch, image, label))


@pytest.mark.parametrize('kind', [tio.RescaleIntensity, transforms.StretchHistogram])
@pytest.mark.parametrize('inside', [None, (-0.3, 1.7), (2, 2)])
@pytest.mark.filterwarnings('ignore:Rescaling image')
def test_rescale_ofEmptyAndConstantImages(kind, inside):
    """Beside one that can be rescaled: an empty mask, a single pixel, one value in all; all as torchio does it."""
    image, label = makeBatch(4)
    image[1] = 0
    image[2] = 0
    image[2, :, 3, 4] = 5
    image[3] = 7
    transform = kind((-1, 1), (0.5, 99.5), transforms.maskFunction, inside, **IMAGES)
    found, expected = batched.Batched(transform)(image, label), viaTorchio(transform, image, label)
    assertEqual(found, expected)
    assert found[0].isfinite().all() and torch.equal(found[0][1:], expected[0][1:])


@pytest.mark.parametrize('shape', [(80, 30), (20, 20), (41, 61), (40, 70)])
@pytest.mark.parametrize(
    'mode', [0, 0.7, 'minimum', 'maximum', 'mean', 'median', 'edge', 'reflect', 'symmetric', 'wrap']
)
@pytest.mark.filterwarnings('ignore:The constant value')
def test_cropOrPad_equalsTorchio(shape, mode):
    """Crops and pads at once, every mode; the label is padded by its own values."""
    image, label = makeBatch(2)
    transform = tio.CropOrPad((*shape, 1), padding_mode=mode, **BOTH)
    assertEqual(batched.Batched(transform)(image, label + 1), viaTorchio(transform, image, label + 1))


@pytest.mark.parametrize(
    ('target', 'options'),
    [((5.04, None, None), {'units': 'cm'}), ((30, 90, 5), {'only_crop': True}), ((30, 90, 1), {'only_pad': True})],
)
def test_cropOrPad_honoursUnitsAndOneWay(target, options):
    """Centimetres of 1 mm pixels; only cropping; only padding."""
    image, label = makeBatch(2)
    transform = tio.CropOrPad(target, **options, **BOTH)
    assertEqual(batched.Batched(transform)(image, label), viaTorchio(transform, image, label))


@pytest.mark.parametrize('mask', [None, 'Left', lambda label: label > 1])
def test_remapLabels_equalsTorchio(mask):
    """Classes change places without meeting, where the mask lets them."""
    image, label = makeBatch(2)
    transform = tio.RemapLabels({1: 2, 2: 1, 3: 7, 9: 0}, mask, **BOTH)
    assertEqual(batched.Batched(transform)(image, label), viaTorchio(transform, image, label))


# The same distributions


@pytest.mark.parametrize('isotropic', [False, True])
def test_affine_drawsAsTorchio(isotropic):
    """Scales, degrees and translation of every axis, alone and together."""
    scales = (0.8, 1.3) if isotropic else (0.8, 1.3, 0.5, 0.9, 1, 1)
    transform = tio.RandomAffine(scales, (0, 0, 0, 0, -20, 35), (-3, 1, 5, 9, 0, 0), isotropic=isotropic, **BOTH)
    torch.manual_seed(0)
    bounds = (transform.scales, transform.degrees, transform.translation, isotropic)
    expected = np.array([torch.cat(transform.get_params(*bounds)).numpy() for _ in range(DRAWS)])[:, [0, 1, 5, 6, 7]]
    groups, values = draw(transform)
    assert (groups == 1).all()
    for found, axis in zip(values.numpy().T, expected.T, strict=True):
        assertSameDistribution(found, axis)
    assertSameDistribution(values[:, 0] - values[:, 1], expected[:, 0] - expected[:, 1])


def test_anisotropy_drawsAsTorchio():
    """The axis, a doubled one twice as often and never that of depth, and the factor."""
    transform = tio.RandomAnisotropy((0, 1, 1, 2), (1.5, 2.5), **BOTH)
    torch.manual_seed(0)
    expected = np.array([transform.get_params((0, 1, 1), (1.5, 2.5)) for _ in range(DRAWS)])
    groups, values = draw(transform)
    table = [np.bincount(groups, minlength=3)[1:], np.bincount(expected[:, 0].astype(int))]
    assert stats.chi2_contingency(table).pvalue > 0.01
    assertSameDistribution(values, expected[:, 1])
    assertSameDistribution(values[groups == 1], expected[:, 1])


def test_elastic_drawsAsTorchio():
    """Displacements along both axes, and where the borders are locked."""
    transform = tio.RandomElasticDeformation((7, 6, 5), (2, 5, 1), locked_borders=1, **BOTH)
    torch.manual_seed(0)
    expected = np.array([transform.get_params((7, 6, 5), (2, 5, 1), 1) for _ in range(30)])
    groups, values = draw(transform, 30)
    np.testing.assert_array_equal(values[..., 0] == 0, expected[..., 0] == 0)
    for axis in (0, 1):
        assertSameDistribution(values[:, 1:-1, 1:-1, :, axis], expected[:, 1:-1, 1:-1, :, axis])
    assert (groups == 1).all()
    assert not draw(tio.RandomElasticDeformation(max_displacement=0, **BOTH), 30)[0].any()


def test_noiseAndBias_drawAsTorchio():
    """Mean, standard deviation and coefficients, anew for every image."""
    noise = tio.RandomNoise((-1, 3), (0.2, 0.5), **IMAGES)
    bias = tio.RandomBiasField((-0.2, 0.6), order=2, **IMAGES)
    torch.manual_seed(0)
    expected = np.array([noise.get_params(noise.mean_range, noise.std_range)[:2] for _ in range(DRAWS)])
    values = draw(noise, DRAWS)[1]
    for each in range(2):
        assertSameDistribution(values[..., each], expected[:, each])
    assert len(values[..., 0].unique()) > 2.9 * DRAWS
    coefficients = draw(bias, DRAWS)[1]
    assert coefficients.shape == (DRAWS, 3, 6) and abs(np.corrcoef(coefficients.flatten(1).T) - np.eye(18)).max() < 0.1
    assertSameDistribution(coefficients, [bias.get_params(2, (-0.2, 0.6)) for _ in range(DRAWS)])


def test_flip_drawsAsTorchio():
    """Each axis on its own, only those that are named."""
    torch.manual_seed(0)
    transform = tio.RandomFlip((0, 1), flip_probability=0.3, **BOTH)
    expected = [sum(flip << axis for axis, flip in enumerate(transform.get_params(0.3)[:2])) for _ in range(DRAWS)]
    table = [np.bincount(draw(transform)[0], minlength=4), np.bincount(expected, minlength=4)]
    assert stats.chi2_contingency(table).pvalue > 0.01
    for axes, groups in ((1, {0, 2}), (('Left', 2), {0, 1}), (('AP',), {0, 2}), ((0, 1), {0, 1, 2, 3}), (2, {0})):
        assert set(draw(tio.RandomFlip(axes, **BOTH))[0].tolist()) == groups


def test_branches_areTakenAsOftenAsTorchioTakesThem():
    """Probabilities of a nest of Compose and OneOf, by what each branch adds to the image."""
    add = [
        tio.RandomNoise((10.0**power, 10.0**power), (0, 0), p=p, **IMAGES) for power, p in enumerate((1, 0.5, 1, 0.7))
    ]
    inner = tio.Compose([add[1], add[2]], p=0.6)
    transform = tio.Compose([tio.OneOf({add[0]: 3, inner: 2, tio.Compose([]): 1}, p=0.8), add[3]], p=0.9)
    image, label = torch.zeros(DRAWS, 3, 1, 1), torch.zeros(DRAWS, 1, 1, dtype=torch.int64)
    torch.manual_seed(0)
    found = batched.Batched(transform)(image, label)[0]
    assert (found == found[:, :1]).all()  # a branch is chosen once per sample
    expected, _ = viaTorchio(transform, image[:250], label[:250])
    counts = [dict.fromkeys((0, 1, 100, 110, 1000, 1001, 1100, 1110), 0) for _ in range(2)]
    for each, result in zip(counts, (found, expected), strict=True):
        for value in result[:, 0].flatten().tolist():
            each[round(value)] += 1  # a sum that no path gives is a KeyError
    common = [key for key in counts[0] if counts[0][key] + counts[1][key] > 30]
    assert stats.chi2_contingency([[each[key] for key in common] for each in counts]).pvalue > 0.01
    assert abs(counts[0][1001] / DRAWS - 0.9 * 0.8 * 0.5 * 0.7) < 0.025


# What holds for every call


def test_call_isRepeatable():
    """Same seed, same result; the next call differs; the global generator gives one number and no more."""
    image, label = makeBatch(16)
    transform = batched.Batched(trainList())
    torch.manual_seed(3)
    first, second = transform(image, label), transform(image, label)
    torch.manual_seed(3)
    for one, other in zip(first, transform(image, label), strict=True):
        assert torch.equal(one, other)
    state = torch.get_rng_state()
    assert not torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])
    torch.manual_seed(3)
    torch.randint(2**63 - 1, ())
    assert torch.equal(torch.get_rng_state(), state)


def test_call_drawsFromItsGenerator():
    """With a generator of its own it leaves the global one alone, also where torchio is asked for the padding."""
    image, label = makeBatch(4)
    pad = tio.CropOrPad((50, 60, 1), **BOTH)
    transform = tio.Compose([pad, trainList()])
    before = torch.get_rng_state()
    results = [batched.Batched(transform, torch.Generator().manual_seed(seed))(image, label)[0] for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_call_putsEverySampleBack():
    """Samples that are one number everywhere keep it, whichever of them are gathered."""
    number = torch.arange(1.0, 65)
    image, label = number.view(-1, 1, 1, 1).expand(-1, 3, *SHAPE), number.long().view(-1, 1, 1).expand(-1, *SHAPE)
    kinds = [tio.RandomFlip((0, 1), **BOTH), tio.RandomElasticDeformation(**BOTH), tio.RandomAffine(**BOTH)]
    new, newLabel = batched.Batched(tio.OneOf([*kinds, tio.RandomNoise(0, (0, 0), **IMAGES)], p=0.9))(image, label)
    torch.testing.assert_close(new, image)
    assert torch.equal(newLabel.amax((1, 2)), number.long())


def test_call_leavesWhatItWasGiven():
    """The batch that was handed in keeps its values."""
    image, label = makeBatch(8)
    before = image.clone(), label.clone()
    batched.Batched(trainList())(image, label)
    assert torch.equal(image, before[0]) and torch.equal(label, before[1])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('labelDtype', [torch.uint8, torch.int16, torch.int64])
def test_call_keepsDtypesAndClasses(dtype, labelDtype):
    """float32 comes out, the label keeps its dtype, no class is invented."""
    image, label = makeBatch(16, dtype=dtype)
    torch.manual_seed(0)
    new, newLabel = batched.Batched(trainList())(image, label.to(labelDtype))
    assert new.dtype == torch.float32 and newLabel.dtype == labelDtype
    assert new.isfinite().all() and set(newLabel.unique().tolist()) == {0, 1, 2}


def test_call_ofOneSampleOfBackground():
    """A batch of one, an empty label and an empty image pass through everything."""
    transform = batched.Batched(trainList())
    for seed in range(12):
        torch.manual_seed(seed)
        image, label = transform(torch.zeros(1, 3, *SHAPE), torch.zeros(1, *SHAPE, dtype=torch.int64))
        assert image.shape == (1, 3, *SHAPE) and not label.any()
        assert image.abs().max() < 1  # noise at most
    image, label = transform(torch.zeros(0, 3, *SHAPE), torch.zeros(0, *SHAPE, dtype=torch.int64))
    assert image.shape == (0, 3, *SHAPE) and label.shape == (0, *SHAPE)


def test_call_withProbabilityZeroAndOne():
    """p = 0 never, p = 1 always, at the top, in a nest and at the leaf."""
    image, label = makeBatch(64)
    add = {p: tio.RandomNoise((5, 5), (0, 0), p=p, **IMAGES) for p in (0, 1)}
    never = [tio.Compose([add[1]], p=0), tio.OneOf([add[1]], p=0), tio.Compose([tio.OneOf([add[0]])])]
    for transform in never:
        assert torch.equal(batched.Batched(transform)(image, label)[0], image)
    for transform in (add[1], tio.Compose([tio.OneOf([add[1]], p=1)], p=1)):
        torch.testing.assert_close(batched.Batched(transform)(image, label)[0], image + 5)


def test_call_changesOnlyWhatIsIncluded():
    """include and exclude choose channels and label; include on a Compose means nothing, as in torchio."""
    image, label = makeBatch(4)
    add = lambda **options: batched.Batched(tio.Compose([tio.RandomNoise((5, 5), (0, 0), **options)], include=['x2']))  # noqa: E731
    for options, channels in (
        ({'include': ['x1', 'x3', 'x9']}, [0, 2]),
        ({'exclude': ['x1']}, [1, 2]),
        ({}, [0, 1, 2]),
        ({'include': ['y'], 'label_keys': ['y']}, []),
    ):
        expected = image.clone()
        expected[:, channels] += 5
        torch.testing.assert_close(add(**options)(image, label)[0], expected)
    flip = {'axes': (0, 1), 'flip_probability': 1}
    new, newLabel = batched.Batched(tio.RandomFlip(**flip, include=['x2', 'y']))(image, label)
    assert torch.equal(new[:, 1], image[:, 1].flip((1, 2))) and torch.equal(new[:, ::2], image[:, ::2])
    assert torch.equal(newLabel, label.flip((1, 2)))
    new, newLabel = batched.Batched(tio.RandomFlip(**flip, exclude=['y']))(image, label)
    assert torch.equal(new, image.flip((2, 3))) and torch.equal(newLabel, label)
    for name, options in (('RandomAffine', {'degrees': 30}), ('RandomElasticDeformation', {'max_displacement': 5})):
        onlyLabel = batched.Batched(getattr(tio, name)(include=['y'], label_keys=['y'], **options))
        new, newLabel = onlyLabel(image, label)
        assert torch.equal(new, image) and not torch.equal(newLabel, label)


def test_call_keepsImageAndLabelTogether():
    """A label that is a thresholded channel stays one, but for pixels at its edge, whatever happens in space."""
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 80), indexing='ij')
    height = (0.6 - (rows - 0.1) ** 2 - (columns + 0.2) ** 2).repeat(48, 3, 1, 1)  # steepness below 0.1 a pixel
    transform = trainList().transforms[1]
    for child in transform.transforms_dict:
        child.scalars_only = False  # of RandomAnisotropy
    torch.manual_seed(0)
    new, newLabel = batched.Batched(transform)(height, (height[:, 0] > 0).long())
    isOff = (new[:, 0] > 0).long() != newLabel
    assert isOff.float().mean() < 0.02 and (new[:, 0][isOff].abs() < 0.15).all()
    assert (newLabel != (height[:, 0] > 0)).flatten(1).any(1).sum() > 36  # most samples did move
    assert torch.equal(new[:, 0], new[:, 2])  # one displacement for all channels


class Watch(TorchDispatchMode):
    """Fails where a copy to the device would wait for it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        if function is torch.ops.aten._to_copy.default and kwargs.get('device', given[0].device) != given[0].device:
            assert kwargs['non_blocking']
        return function(*args, **(kwargs or {}))


def test_call_neverAsksTheDevice(monkeypatch):
    """On the meta device, which holds no values, everything runs: no shape and no choice depends on pixels."""
    generator = torch.Generator
    monkeypatch.setattr(torch, 'Generator', lambda device='cpu': generator())
    pad = tio.CropOrPad((80, 50, 1), padding_mode='median', **BOTH)
    transform = tio.Compose([pad, preprocess.volumeTransform(), trainList(), tio.RandomFlip(include=['x1'])])
    image, label = makeBatch(32)
    with Watch():
        image, label = batched.Batched(transform)(
            image.to('meta', non_blocking=True), label.to('meta', non_blocking=True)
        )
    assert image.shape == (32, 3, *SHAPE) and label.shape == (32, *SHAPE) and image.device.type == 'meta'


def test_call_insideCompile():
    """torch.compile leaves the call as it is."""
    image, label = makeBatch(4)
    transform = batched.Batched(trainList())
    compiled = torch.compile(lambda image, label: transform(image * 2, label)[0] + 1, backend='eager')
    torch.manual_seed(0)
    found = compiled(image, label)
    torch.manual_seed(0)
    assert torch.equal(found, transform(image * 2, label)[0] + 1)


def test_batched_canBeCopiedAndPickled():
    """A copy, and one from a pickle, go on alike."""
    image, label = makeBatch(4)
    transform = batched.Batched(trainList(), torch.Generator().manual_seed(4))
    copies = copy.deepcopy(transform), pickle.loads(pickle.dumps(transform))
    expected = transform(image, label)[0]
    for each in copies:
        assert torch.equal(each(image, label)[0], expected)


def test_makeTransforms_runBatched():
    """The package's own transforms are taken, and the two without chance give what torchio gives."""
    image, label = makeBatch(3, (32, 32))
    train, val, test = preprocess.makeTransforms()
    new, newLabel = batched.Batched(train)(image.half(), label)
    assert new.shape == image.shape and newLabel.shape == label.shape
    for transform in (val, test):
        assertEqual(batched.Batched(transform)(image, label), viaTorchio(transform, image, label))


# What is refused


class OwnNoise(tio.RandomNoise):
    pass


@pytest.mark.parametrize(
    ('transform', 'match'),
    [
        (tio.RandomMotion(**IMAGES), 'RandomMotion is not among'),
        (tio.Lambda(lambda image: image, **IMAGES), 'Lambda is not among'),
        (OwnNoise(**IMAGES), 'OwnNoise is not among'),
        (tio.Compose([tio.OneOf([tio.Compose([tio.RandomGamma(**IMAGES)])])]), 'RandomGamma is not among'),
        (tio.Compose([lambda subject: subject]), 'function is not among'),
        (tio.RandomAffine(translation=5, **BOTH), 'RandomAffine: translation.*leave the slice'),
        (tio.RandomAffine(default_pad_value='otsu', **BOTH), 'RandomAffine: default_pad_value'),
        (tio.RandomAffine(default_pad_label=0.5, **BOTH), 'RandomAffine: default_pad_label'),
        (tio.RandomAffine(image_interpolation='bspline', **BOTH), 'RandomAffine: image_interpolation'),
        (tio.RandomAffine(label_interpolation='linear', **BOTH), 'RandomAffine: label_interpolation'),
        (tio.RandomElasticDeformation(image_interpolation='lanczos', **BOTH), 'Elastic.*: image_interpolation'),
        (tio.RandomElasticDeformation(label_interpolation='linear', **BOTH), 'Elastic.*: label_interpolation'),
        (tio.RandomAnisotropy(2, **BOTH), 'RandomAnisotropy: axes'),
        (tio.RandomAnisotropy(image_interpolation='bspline', **BOTH), 'RandomAnisotropy: image_interpolation'),
        (tio.RandomFlip('Height', **BOTH), 'RandomFlip: axes'),
        (tio.RescaleIntensity(masking_method='y', **BOTH), 'RescaleIntensity: masking_method'),
        (tio.RescaleIntensity(masking_method='nowhere', **BOTH), 'RescaleIntensity: masking_method'),
        (tio.RescaleIntensity(masking_method=lambda x: x > x.mean().item(), **IMAGES), 'cannot be mapped'),
        (tio.RescaleIntensity(masking_method=lambda x: x * 2, **IMAGES), 'does not give bool'),
        (tio.CropOrPad((9, 9, 2), **BOTH), 'CropOrPad: target_shape'),
        (tio.CropOrPad((9, 9, 1), padding_mode='linear_ramp', **BOTH), 'CropOrPad: padding_mode'),
        (tio.CropOrPad((9, 9, 1), location='random', **BOTH), 'CropOrPad: location'),
        (tio.CropOrPad(mask_name='y', **BOTH), 'CropOrPad: mask_name'),
        (tio.CropOrPad((9, 9, 1), p=0.5, **BOTH), 'CropOrPad: under p < 1'),
        (tio.OneOf([tio.CropOrPad((9, 9, 1), **BOTH)]), 'CropOrPad: under p < 1'),
        (tio.Compose([tio.CropOrPad((9, 9, 1), **BOTH)], p=0.5), 'CropOrPad: under p < 1'),
        (tio.RemapLabels({1: 1.5}, **BOTH), 'RemapLabels: remapping'),
        (tio.RandomNoise(keep={'x1': 'x1raw'}, **IMAGES), 'RandomNoise: keep'),
        (tio.RandomAffine(include=['x1', 'y']), 'RandomAffine: include names y'),
        (tio.RandomFlip(include=['x1', 'y'], label_keys=['x1', 'y']), 'RandomFlip: label_keys'),
    ],
)  # fmt: skip
def test_batched_refusesByName(transform, match):
    """What cannot be honoured is said when it is built, with the transform's name and the parameter's."""
    with pytest.raises(ValueError, match=match):
        batched.Batched(transform)


def test_batched_refusesAnotherGenerator():
    """Parameters are drawn on the CPU."""

    class Elsewhere:
        device = torch.device('cuda')

    with pytest.raises(ValueError, match='on cuda'):
        batched.Batched(tio.RandomNoise(), Elsewhere())


@pytest.mark.parametrize(
    ('image', 'label'),
    [
        (torch.zeros(3, 8, 8), torch.zeros(8, 8).long()),
        (torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 9).long()),
        (torch.zeros(2, 3, 8, 8).long(), torch.zeros(2, 8, 8).long()),
        (torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8)),
    ],
)
def test_call_refusesOtherBatches(image, label):
    """Other shapes and dtypes are named."""
    with pytest.raises(ValueError, match='expected float'):
        batched.Batched(tio.RandomNoise())(image, label)


@pytest.mark.parametrize('include', [['x1', 'y'], ['x1', 'x2', 'x3']])
def test_call_refusesToChangeTheShapeOfAPart(include):
    """CropOrPad must mean all images and the label where it does change the shape."""
    image, label = makeBatch(2)
    batched.Batched(tio.CropOrPad((*SHAPE, 1), include=include))(image, label)
    with pytest.raises(ValueError, match='CropOrPad would change the shape of some'):
        batched.Batched(tio.CropOrPad((30, 30, 1), include=include))(image, label)
