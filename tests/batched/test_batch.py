import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
import torchio as tio
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import batched
import config
import transforms
from batched import batch
from oracle import BOTH, DRAWS, IMAGES, SHAPE, assertEqual, documentList, fixed, makeBatch, viaTorchio

# Whole lists


def runAndRecord(transform, image, label, monkeypatch):
    """Return a batch after `Batched`, and per sample the list of (transform, group, values) that it met."""
    met, current = [[] for _ in image], []
    runOperation = batch._runOperation

    def recordRows(transform, whole, rows):
        current[:] = rows.tolist()
        runOperation(transform, whole, rows)

    def recordDraws(draw):
        def run(transform, *others):
            groups, values = draw(transform, *others)
            for row, group, value in zip(current, groups.tolist(), values, strict=True):
                met[row].append((transform, group, value))
            return groups, values

        return run

    monkeypatch.setattr(batch, '_runOperation', recordRows)
    for kind, operation in batch.OPERATIONS.items():
        monkeypatch.setitem(batch.OPERATIONS, kind, operation._replace(draw=recordDraws(operation.draw)))
    return *batched.Batched(transform, torch.Generator().manual_seed(0))(image, label), met


@pytest.mark.parametrize('name', ['document', 'package'])
@pytest.mark.parametrize('shape', [(128, 128), (101, 140)])
def test_batched_equalsTorchioSampleBySample(name, shape, monkeypatch):
    """Of the document's list and of the package's, each sample is torchio's with the parameters that it drew.

    Noise is random in each pixel, so its standard deviation is compared.
    """
    config.PATCH_SIZE = 128
    transform = documentList((128, 128)) if name == 'document' else transforms.makeTransforms()[0]
    image, label = makeBatch(48, shape)
    label[label == 3] = 4 if name == 'document' else 3
    new, newLabel, met = runAndRecord(transform, image, label, monkeypatch)
    for number, steps in enumerate(met):
        noise = [values for each, _, values in steps if type(each) is tio.RandomNoise]
        chosen = tio.Compose([fixed(*step) for step in steps if type(step[0]) is not tio.RandomNoise])
        sample = slice(number, number + 1)
        expected, expectedLabel = viaTorchio(chosen, image[sample], label[sample])
        assert (newLabel[sample] != expectedLabel).sum() <= 2
        if noise:
            found = (new[sample] - expected).std((2, 3))[0]
            torch.testing.assert_close(found, noise[0][:, 1], rtol=0.05, atol=1e-4)
        else:
            assertEqual((new[sample], expectedLabel), (expected, expectedLabel))
    assert {type(each) for steps in met for each, _, _ in steps} >= {
        tio.CropOrPad, tio.RandomFlip, tio.RandomAffine, tio.RandomAnisotropy, tio.RandomElasticDeformation,
        tio.RandomNoise, tio.RandomBiasField,
    }  # fmt: skip


def test_batched_equalsTorchioForValidationAndTest():
    """The package's two lists without chance give torchio's result."""
    image, label = makeBatch(3)
    for config.PATCH_SIZE in (32, 50):
        for transform in transforms.makeTransforms()[1:]:
            assertEqual(batched.Batched(transform)(image, label), viaTorchio(transform, image, label))


def test_batched_takesBranchesAsOftenAsTorchio():
    """The probabilities of a nest of Compose and OneOf, seen by what each branch adds to the image."""
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
    """Same seed, same result, and the given batch is kept; one number is drawn from the global generator.

    With a generator of its own, the global one stays as it was.
    """
    image, label = makeBatch(16)
    given = image.clone(), label.clone()
    transform = batched.Batched(documentList())
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
    results = [
        batched.Batched(documentList(), torch.Generator().manual_seed(seed))(image, label)[0] for seed in (1, 1, 2)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    assert torch.equal(image, given[0]) and torch.equal(label, given[1])


def test_call_putsEverySampleBack():
    """Constant samples keep their value, whichever of them are transformed together."""
    number = torch.arange(1.0, 65)
    image, label = number.view(-1, 1, 1, 1).expand(-1, 3, *SHAPE), number.long().view(-1, 1, 1).expand(-1, *SHAPE)
    children = [tio.RandomFlip((0, 1), **BOTH), tio.RandomElasticDeformation(**BOTH), tio.RandomAffine(**BOTH)]
    children.append(tio.RandomNoise(0, (0, 0), **IMAGES))
    new, newLabel = batched.Batched(tio.OneOf(children, p=0.9))(image, label)
    torch.testing.assert_close(new, image)
    assert torch.equal(newLabel.amax((1, 2)), number.long())


@pytest.mark.parametrize(
    ('dtype', 'labelDtype'),
    [(torch.float16, torch.uint8), (torch.bfloat16, torch.int16), (torch.float64, torch.int64)],
)
def test_call_keepsDtypesAndClasses(dtype, labelDtype):
    """Images become float32, label maps keep their dtype and get no class that is not theirs."""
    image, label = makeBatch(16, dtype=dtype)
    label[label == 3] = 4
    torch.manual_seed(0)
    new, newLabel = batched.Batched(documentList())(image, label.to(labelDtype))
    assert new.dtype == torch.float32 and newLabel.dtype == labelDtype
    assert new.isfinite().all() and set(newLabel.unique().tolist()) == {0, 1, 2, 3}


def test_call_ofOneSampleOfBackground():
    """A batch of one empty sample, and an empty batch, pass through every transform."""
    transform = batched.Batched(documentList())
    for seed in range(12):
        torch.manual_seed(seed)
        image, label = transform(torch.zeros(1, 3, *SHAPE), torch.zeros(1, *SHAPE, dtype=torch.int64))
        assert image.shape == (1, 3, *SHAPE) and not label.any()
        assert image.abs().max() < 1  # noise at most
    image, label = transform(torch.zeros(0, 3, *SHAPE), torch.zeros(0, *SHAPE, dtype=torch.int64))
    assert image.shape == (0, 3, *SHAPE) and label.shape == (0, *SHAPE)


def test_call_withProbabilityZeroAndOne():
    """p = 0 means never and p = 1 always, for the outermost transform, an inner one and a leaf."""
    image, label = makeBatch(64)
    add = {p: tio.RandomNoise((5, 5), (0, 0), p=p, **IMAGES) for p in (0, 1)}
    never = [tio.Compose([add[1]], p=0), tio.OneOf([add[1]], p=0), tio.Compose([tio.OneOf([add[0]])])]
    for transform in never:
        assert torch.equal(batched.Batched(transform)(image, label)[0], image)
    for transform in (add[1], tio.Compose([tio.OneOf([add[1]], p=1)], p=1)):
        torch.testing.assert_close(batched.Batched(transform)(image, label)[0], image + 5)


@pytest.mark.parametrize(
    ('options', 'isImage', 'isLabel'),
    [
        ({'include': ['x1', 'x2', 'x3', 'y'], 'label_keys': ['y']}, True, True),
        ({'include': ['x1', 'x2', 'x3', 'x4']}, True, False),  # torchio ignores names that a subject lacks
        ({'include': ['y'], 'label_keys': ['y']}, False, True),
        ({'include': ['z']}, False, False),
        ({'exclude': ['y']}, True, False),
        ({'exclude': ['x1', 'x2', 'x3']}, False, True),
        ({}, True, True),
    ],
)
def test_call_changesOnlyWhatIsCovered(options, isImage, isLabel):
    """`include` and `exclude` choose the images, the label map, or both; on a Compose they mean nothing, as in torchio.

    Anisotropy and noise never change the label map.
    """
    image, label = makeBatch(4)
    for name, arguments in (
        ('RandomFlip', {'flip_probability': 1}),
        ('RandomAffine', {'degrees': (0, 0, 0, 0, 20, 30)}),
        ('RandomElasticDeformation', {'max_displacement': 5}),
        ('RandomAnisotropy', {'axes': 0}),
        ('RandomNoise', {}),
    ):
        transform = tio.Compose([getattr(tio, name)(**arguments, **options)], include=['x2'])
        new, newLabel = batched.Batched(transform)(image, label)
        assert torch.equal(new, image) != isImage
        assert torch.equal(newLabel, label) != (isLabel and name not in ('RandomAnisotropy', 'RandomNoise'))


class Watch(TorchDispatchMode):
    """Fails if a copy to the device would wait for the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        if function is torch.ops.aten._to_copy.default and kwargs.get('device', given[0].device) != given[0].device:
            assert kwargs.get('non_blocking')
        return function(*args, **(kwargs or {}))


def test_call_neverWaitsForTheDevice(monkeypatch):
    """It runs on the meta device, which holds no values: no shape and no choice depends on pixels."""
    generator = torch.Generator
    monkeypatch.setattr(torch, 'Generator', lambda device='cpu': generator())
    transform = tio.Compose([transforms.volumeTransform(), documentList((80, 50)), tio.RandomFlip(exclude=['y'])])
    image, label = (each.to('meta', non_blocking=True) for each in makeBatch(32))
    with Watch():
        image, label = batched.Batched(transform)(image, label)
    assert image.shape == (32, 3, 80, 50) and label.shape == (32, 80, 50) and image.device.type == 'meta'


def test_call_insideCompile():
    """torch.compile skips the call, so that the result is the same."""
    image, label = makeBatch(4)
    transform = batched.Batched(documentList())
    compiled = torch.compile(lambda image, label: transform(image * 2, label)[0] + 1, backend='eager')
    torch.manual_seed(0)
    found = compiled(image, label)
    torch.manual_seed(0)
    assert torch.equal(found, transform(image * 2, label)[0] + 1)


def test_batched_canBeCopiedAndPickled():
    """A copy, and one from a pickle, continue with the same random numbers."""
    image, label = makeBatch(4)
    transform = batched.Batched(documentList(), torch.Generator().manual_seed(4))
    copies = copy.deepcopy(transform), pickle.loads(pickle.dumps(transform))
    expected = transform(image, label)[0]
    for each in copies:
        assert torch.equal(each(image, label)[0], expected)


# What is refused


class OwnNoise(tio.RandomNoise):
    pass


def crop(shape=(9, 9, 1), padding_mode='minimum', **others):
    return tio.CropOrPad(shape, padding_mode, **{**BOTH, **others})


def rescale(**options):
    return tio.RescaleIntensity(**options, **IMAGES)


@pytest.mark.parametrize(
    ('transform', 'match'),
    [
        (tio.RandomMotion(**IMAGES), 'RandomMotion is not supported.*supported are Compose'),
        (OwnNoise(**IMAGES), 'OwnNoise is not supported'),
        (tio.Compose([tio.OneOf([tio.Compose([tio.RandomGamma(**IMAGES)])])]), 'RandomGamma is not supported'),
        (tio.Compose([lambda subject: subject]), 'function is not supported'),
        (tio.RandomAffine(translation=5, **BOTH), r'RandomAffine: translation = \(-5.0, 5.0.*only \(0, 0'),
        (tio.RandomAffine(isotropic=True, **BOTH), 'RandomAffine: isotropic = True, only False'),
        (tio.RandomAffine(center='origin', **BOTH), "RandomAffine: center = 'origin', only 'image'"),
        (tio.RandomAffine(default_pad_value=0, **BOTH), "RandomAffine: default_pad_value = 0, only 'minimum'"),
        (tio.RandomAffine(default_pad_label=1, **BOTH), 'RandomAffine: default_pad_label'),
        (tio.RandomAffine(image_interpolation='nearest', **BOTH), 'RandomAffine: image_interpolation.*linear'),
        (tio.RandomAffine(label_interpolation='linear', **BOTH), 'RandomAffine: label_interpolation'),
        (tio.RandomElasticDeformation(image_interpolation='bspline', **BOTH), 'Elastic.*: image_interpolation'),
        (tio.RandomElasticDeformation(label_interpolation='linear', **BOTH), 'Elastic.*: label_interpolation'),
        (tio.RandomAnisotropy((0, 1, 2), **BOTH), 'RandomAnisotropy: axes'),
        (tio.RandomAnisotropy(0, image_interpolation='nearest', **BOTH), 'RandomAnisotropy: image_interpolation'),
        (tio.RandomAnisotropy(0, scalars_only=False, **BOTH), 'RandomAnisotropy: scalars_only'),
        (tio.RandomFlip('Left', **BOTH), r"RandomFlip: axes = \('Left',\), only the numbers 0 and 1"),
        (rescale(masking_method='Left'), "RescaleIntensity: masking_method = 'Left', only a function or None"),
        (rescale(masking_method=lambda image: image > image.mean().item()), 'masking_method.*cannot be mapped'),
        (rescale(masking_method=lambda image: image * 2), 'masking_method.*expected a bool mask'),
        (rescale(in_min_max=(0, 9)), 'RescaleIntensity: in_min_max = .*, only None'),
        (transforms.StretchHistogram(in_min_max=(0, 9), **IMAGES), 'StretchHistogram: in_min_max'),
        (crop((9, 9, 2)), r'CropOrPad: target_shape = \(9, 9, 2\), only \(H, W, 1\)'),
        (crop(padding_mode=0), "CropOrPad: padding_mode = 0, only 'minimum'"),
        (crop(location='random'), 'CropOrPad: location'),
        (crop(None, mask_name='y'), 'CropOrPad: mask_name'),
        (crop(units='mm'), 'CropOrPad: units'),
        (crop(only_crop=True), 'CropOrPad: only_crop'),
        (crop(only_pad=True), 'CropOrPad: only_pad'),
        (crop(p=0.5), 'CropOrPad: with p < 1'),
        (tio.OneOf([crop()]), 'CropOrPad: with p < 1'),
        (tio.Compose([crop()], p=0.5), 'CropOrPad: with p < 1'),
        (crop(include=['x1', 'x2', 'x3']), 'CropOrPad: images and label map would differ'),
        (tio.RemapLabels({1: 1.5}, **BOTH), 'RemapLabels: remapping'),
        (tio.RemapLabels({1: 2}, 'Left', **BOTH), "RemapLabels: masking_method = 'Left', only None"),
        (tio.RandomNoise(keep={'x1': 'x1raw'}, **IMAGES), 'RandomNoise: keep'),
        (tio.RandomAffine(include=['x1', 'y']), 'RandomAffine: include names y'),
        (tio.RandomFlip(include=['x1', 'y'], label_keys=['x1', 'y']), 'RandomFlip: label_keys'),
        (tio.RandomNoise(include=['x1', 'x3']), 'RandomNoise covers only some of the images x1 to x3'),
        (tio.RandomNoise(exclude=['x2']), 'RandomNoise covers only some of the images x1 to x2'),
    ],
)  # fmt: skip
def test_batched_refusesByName(transform, match):
    """What is not supported is an error at construction, which names the transform and the parameter."""
    with pytest.raises(ValueError, match=match):
        batched.Batched(transform)


@pytest.mark.parametrize(
    'options', [{'include': ['x1', 'x2', 'y'], 'label_keys': ['y']}, {'exclude': ['x1']}], ids=['include', 'exclude']
)
def test_call_refusesToCoverSomeImages(options):
    """A transform of some of the images is an error at every call, also if no sample meets it."""
    transform = batched.Batched(tio.Compose([tio.OneOf([tio.RandomFlip(**options)], p=0)]))
    with pytest.raises(ValueError, match='RandomFlip covers only some of the images x1 to x3'):
        transform(*makeBatch(2))


def test_batched_refusesAGeneratorOfTheDevice():
    """Parameters are drawn on the CPU, so the generator has to be there."""
    with pytest.raises(ValueError, match='on cuda'):
        batched.Batched(tio.RandomNoise(), SimpleNamespace(device=torch.device('cuda')))


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
    """Other shapes and dtypes are an error that says what was expected."""
    with pytest.raises(ValueError, match='expected float'):
        batched.Batched(tio.RandomNoise())(image, label)
