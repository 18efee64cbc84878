import numpy as np
import pytest
import torch
import torchio as tio

import batched
import patients
import transforms
from batched import intensity
from oracle import (
    BOTH,
    DRAWS,
    IMAGES,
    SHAPE,
    assertEqual,
    assertSameDistribution,
    draw,
    fixed,
    makeBatch,
    viaBatched,
    viaTorchio,
)


@pytest.mark.parametrize('order', [0, 1, 3, 5])
def test_biasField_equalsTorchio(order):
    """Each image has its own coefficients, in torchio's order; those of the third axis have no effect."""
    transform = tio.RandomBiasField(0.5, order=order, **IMAGES)
    image, label = makeBatch(1)
    values = draw(transform, 1)[1]
    found = viaBatched(transform, image, label, values)
    assertEqual(found, viaTorchio(fixed(transform, 1, values[0]), image, label))
    assert (found[0] - image).abs().max() > 0.05


def test_noise_equalsTorchio():
    """With torchio's seed it is torchio's noise; each image has its own mean and standard deviation."""
    image, label = makeBatch(1)
    transform = tio.RandomNoise(**IMAGES)
    found = viaBatched(transform, image[:, :1], label, torch.tensor([[[0.5, 0.1]]]), seed=5)[0]
    expected, _ = viaTorchio(tio.Noise(0.5, 0.1, 5, **IMAGES), image, label)
    torch.testing.assert_close(found, expected[:, :1], atol=1e-6, rtol=0)
    values = torch.tensor([[[0.0, 0.5], [3, 0], [-2, 0.01]], [[1, 0.25], [0, 1], [0, 0]]])
    noise = viaBatched(transform, torch.zeros(2, 3, 200, 200), label, values)[0]
    torch.testing.assert_close(noise.mean((2, 3)), values[..., 0], atol=0.02, rtol=0)
    torch.testing.assert_close(noise.std((2, 3)), values[..., 1], atol=0.01, rtol=0)


def test_noiseAndBias_drawAsTorchio():
    """Mean, standard deviation and coefficients are drawn anew for every image."""
    noise = tio.RandomNoise((-1, 3), (0.2, 0.5), **IMAGES)
    bias = tio.RandomBiasField((-0.2, 0.6), order=2, **IMAGES)
    torch.manual_seed(0)
    expected = np.array([noise.get_params(noise.mean_range, noise.std_range)[:2] for _ in range(DRAWS)])
    values = draw(noise)[1]
    for each in range(2):
        assertSameDistribution(values[..., each], expected[:, each])
    assert len(values[..., 0].unique()) > 2.9 * DRAWS
    coefficients = draw(bias)[1]
    assert coefficients.shape == (DRAWS, 3, 6) and abs(np.corrcoef(coefficients.flatten(1).T) - np.eye(18)).max() < 0.1
    assertSameDistribution(coefficients, [bias.get_params(2, (-0.2, 0.6)) for _ in range(DRAWS)])


def test_contrast_changesEachImageByItsOwnNumbers():
    """Fractions of the range by hand: f ** gamma * factor + summand, clipped; the background stays the lower end."""
    transform = transforms.RandomContrast(0.5, 0.25, 0.1, (-1, 3), **IMAGES)
    fractions = torch.tensor([0.0, 0.25, 0.81, 1.0])
    image = (fractions * 4 - 1).expand(2, 3, 1, 4).clone()
    values = torch.zeros(2, 3, 3)
    values[..., 1] = 1  # factor
    values[0, 1] = torch.tensor([np.log(0.5), 1.2, -0.1])
    values[1, 2] = torch.tensor([np.log(2), 0.5, 0.2])
    found = (viaBatched(transform, image, torch.zeros(2, 1, 4, dtype=torch.long), values)[0] + 1) / 4
    expected = fractions.expand(2, 3, 1, 4).clone()
    expected[0, 1] = torch.tensor([0.0, 0.5 * 1.2 - 0.1, 0.9 * 1.2 - 0.1, 1.0])
    expected[1, 2] = torch.tensor([0.0, 0.0625 * 0.5 + 0.2, 0.6561 * 0.5 + 0.2, 0.7])
    torch.testing.assert_close(found, expected)


def test_contrast_drawsAsTorchioDoes():
    """Sample by sample through torchio, the numbers have the same distribution, drawn anew for every image."""
    transform = transforms.RandomContrast(0.5, 0.25, 0.1, (0, 1), **IMAGES)
    values = draw(transform)[1]
    assert values.shape == (DRAWS, 3, 3) and len(values[..., 0].unique()) > 2.9 * DRAWS
    low, high = transform.bounds()
    assert (values >= low).all() and (values <= high).all()
    ones = {name: torch.full((1, 1, 1, 1), 0.5) for name in IMAGES['include']}
    torch.manual_seed(0)
    found = torch.stack([torch.cat([each.flatten() for each in transform(ones).values()]) for _ in range(DRAWS // 3)])
    gamma, factor, summand = values.unbind(2)
    assertSameDistribution(0.5 ** gamma.exp() * factor + summand, found.numpy())


def test_dropout_leavesOutEachImageButNeverAll():
    """As many as the binomial says; where it says all, one is kept, each as often. Sample by sample it is the same."""
    transform = transforms.RandomModalityDropout(0.4, -1, **IMAGES)
    values = draw(transform)[1]
    odds = torch.tensor([0.6**3, 3 * 0.4 * 0.6**2, 3 * 0.4**2 * 0.6 + 0.4**3, 0])
    for found in (values, torch.cat([transform.draw(1, 3) for _ in range(DRAWS)]).float()):
        counts = torch.bincount(found.sum(1).long(), minlength=4) / len(found)
        torch.testing.assert_close(counts, odds, atol=0.04, rtol=0)
        torch.testing.assert_close(found.mean(0), torch.full((3,), 0.4 - 0.4**3 / 3), atol=0.04, rtol=0)
    image, left = torch.rand(2, 3, 4, 4), torch.tensor([[0.0, 1, 0], [1, 0, 1]])
    found = viaBatched(transform, image, torch.zeros(2, 4, 4, dtype=torch.long), left)[0]
    assert torch.equal(found, torch.where(left[..., None, None] > 0, -1, image))
    subject = {name: torch.rand(1, 4, 4, 1) for name in IMAGES['include']}
    for _ in range(20):
        changed = transform(subject)
        isOut = [bool((changed[name] == -1).all()) for name in subject]
        assert not all(isOut)
        assert all(out or torch.equal(changed[name], subject[name]) for out, name in zip(isOut, subject, strict=True))


@pytest.mark.parametrize('mask', [None, patients.maskFunction, lambda image: image > image.mean()])
@pytest.mark.parametrize('percentiles', [(0.5, 99.5), (0, 100), (25, 75), (0, 3)])
@pytest.mark.parametrize('kind', [tio.RescaleIntensity, transforms.StretchHistogram])
@pytest.mark.filterwarnings('ignore:Rescaling image')
def test_rescale_equalsTorchio(kind, mask, percentiles):
    """It holds for any mask function and any percentiles, each image having its own."""
    image, label = makeBatch(2)
    image[1] *= 2
    image[0, 1, : SHAPE[0] // 2 + 1] = 0
    transform = kind((-1, 2), percentiles, mask, **IMAGES)
    assertEqual(batched.Batched(transform)(image, label), viaTorchio(transform, image, label))


@pytest.mark.parametrize('kind', [tio.RescaleIntensity, transforms.StretchHistogram])
@pytest.mark.filterwarnings('ignore:Rescaling image')
def test_rescale_ofEmptyAndConstantImages(kind):
    """An empty mask, a mask of one pixel and a constant image give torchio's result, in a batch with a usual image."""
    image, label = makeBatch(4)
    image[1] = 0
    image[2] = 0
    image[2, :, 3, 4] = 5
    image[3] = 7
    transform = kind((-1, 1), (0.5, 99.5), patients.maskFunction, **IMAGES)
    found, expected = batched.Batched(transform)(image, label), viaTorchio(transform, image, label)
    assertEqual(found, expected)
    assert found[0].isfinite().all() and torch.equal(found[0][1:], expected[0][1:])


@pytest.mark.parametrize('percentile', [0, 0.5, 30, 50, 75, 99.5, 100])
@pytest.mark.parametrize('shape', [(41, 60), (16, 16), (1, 7)])
def test_maskedPercentile_isNumpys(percentile, shape):
    """NumPy's percentile of the masked pixels, for large and small masks, with and without groups of pixels."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(3, 2, *shape, generator=generator).mul_(4).round_()  # with ties
    mask = torch.rand(3, 2, *shape, generator=generator) < torch.tensor([1, 0.6, 0.1])[:, None, None, None]
    mask[..., 0] = True
    away = torch.zeros(image.shape).masked_fill_(~mask, torch.inf)
    found = intensity._maskedPercentile(image, away, mask.float().sum((2, 3), keepdim=True), percentile)
    assert found.shape == (3, 2, 1, 1)
    for sample in range(3):
        for channel in range(2):
            expected = np.percentile(image[sample, channel][mask[sample, channel]], percentile)
            assert found[sample, channel].item() == pytest.approx(expected, abs=1e-4)


def test_remapLabels_equalsTorchio():
    """Classes swap without merging; one that is not there changes nothing."""
    image, label = makeBatch(2)
    transform = tio.RemapLabels({1: 2, 2: 1, 3: 7, 9: 0}, **BOTH)
    found, expected = batched.Batched(transform)(image, label), viaTorchio(transform, image, label)
    assert torch.equal(found[0], image) and torch.equal(found[1], expected[1])
    assert set(found[1].unique().tolist()) == {0, 1, 2, 7}
