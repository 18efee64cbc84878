import numpy as np
import pytest
import torch
import torchio as tio
from scipy import stats

import batched
from oracle import BOTH, DRAWS, assertEqual, assertSameDistribution, draw, fixed, makeBatch, viaBatched, viaTorchio

# Same parameters, same result


def assertSamplesEqual(transform, image, label, values, group=1):
    """Assert that every sample equals torchio's result with the same parameters."""
    found = viaBatched(transform, image, label, values, group)
    for number, each in enumerate(values):
        sample = slice(number, number + 1)
        expected = viaTorchio(fixed(transform, group, each), image[sample], label[sample])
        assertEqual([part[sample] for part in found], expected)


def test_affine_equalsTorchio():
    """Scales and rotation differ by sample; the image's minimum and label 0 lie outside."""
    image, label = makeBatch()
    image, label = image + 3, label + 1  # so that the fill differs from the border
    values = torch.tensor([[1.1, 0.85, 17], [0.7, 1.3, -95], [1, 1, 0], [1, 1, 0.25]])
    assertSamplesEqual(tio.RandomAffine(**BOTH), image, label, values)


@pytest.mark.parametrize(('points', 'locked'), [(7, 2), (7, 0), (5, 1), ((6, 9, 4), 1), ((8, 7, 5), 2)])
@pytest.mark.filterwarnings('ignore:The maximum displacement')
def test_elastic_equalsTorchio(points, locked):
    """It holds for any control grid and any locked borders; the minimum of image and label map lies outside."""
    transform = tio.RandomElasticDeformation(points, (6, 4, 3), locked, **BOTH)
    image, label = makeBatch(2)
    values = draw(transform, 2)[1]
    assert values[..., 0].abs().max() > 5
    assertSamplesEqual(transform, image + 3, label + 1, values)


@pytest.mark.parametrize('axis', [0, 1])
@pytest.mark.parametrize('factor', [1.63, 2.3, 2.6, 4.1])
def test_anisotropy_equalsTorchio(axis, factor):
    """Images equal torchio's also where the coarse grid ends inside of the image; label maps stay as they are.

    No factor keeps an even number of the 41 rows, where the center would lie between two pixels.
    """
    transform = tio.RandomAnisotropy(axis, (factor, factor), **BOTH)
    image, label = makeBatch(2)
    groups, values = draw(transform, 2)
    assert groups.tolist() == [axis + 1] * 2
    assertSamplesEqual(transform, image + 3, label, values, axis + 1)  # + 3, so that the zeros at the ends show


@pytest.mark.parametrize(('group', 'axes'), [(1, (0,)), (2, (1,)), (3, (0, 1))])
def test_flip_equalsTorchio(group, axes):
    """Group 1 flips the first axis, 2 the second, 3 both."""
    image, label = makeBatch(2)
    found = viaBatched(tio.RandomFlip((0, 1), **BOTH), image, label, torch.zeros(2, 0), group)
    expected = viaTorchio(tio.Flip(axes, **BOTH), image, label)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize('shape', [(80, 30), (20, 20), (41, 61), (40, 70), (42, 59)])
@pytest.mark.parametrize('labelDtype', [torch.uint8, torch.int64])
def test_cropOrPad_equalsTorchio(shape, labelDtype):
    """Cropped and padded by even and odd numbers; each image and label map is padded with its own minimum."""
    image, label = makeBatch(2)
    image, label = image + torch.rand(2, 3, 1, 1), (label + torch.tensor([1, 2])[:, None, None]).to(labelDtype)
    transform = tio.CropOrPad((*shape, 1), padding_mode='minimum', **BOTH)
    new, newLabel = batched.Batched(transform)(image, label)
    expected, expectedLabel = viaTorchio(transform, image, label)
    assert torch.equal(new, expected) and torch.equal(newLabel, expectedLabel) and newLabel.dtype == labelDtype


# Same distributions


def test_affine_drawsAsTorchio():
    """The scales of both axes and the degrees in the plane, alone and together."""
    transform = tio.RandomAffine((0.8, 1.3, 0.5, 0.9, 1, 1), (0, 0, 0, 0, -20, 35), **BOTH)
    torch.manual_seed(0)
    bounds = (transform.scales, transform.degrees, transform.translation, False)
    expected = np.array([torch.cat(transform.get_params(*bounds)).numpy() for _ in range(DRAWS)])[:, [0, 1, 5]]
    groups, values = draw(transform)
    assert (groups == 1).all()
    for found, axis in zip(values.numpy().T, expected.T, strict=True):
        assertSameDistribution(found, axis)
    assertSameDistribution(values[:, 0] - values[:, 1], expected[:, 0] - expected[:, 1])


def test_anisotropy_drawsAsTorchio():
    """The axis, one that is named twice twice as often, and the factor."""
    transform = tio.RandomAnisotropy((0, 1, 1), (1.5, 2.5), **BOTH)
    torch.manual_seed(0)
    expected = np.array([transform.get_params((0, 1, 1), (1.5, 2.5)) for _ in range(DRAWS)])
    groups, values = draw(transform)
    table = [np.bincount(groups, minlength=3)[1:], np.bincount(expected[:, 0].astype(int))]
    assert stats.chi2_contingency(table).pvalue > 0.01
    assertSameDistribution(values, expected[:, 1])
    assertSameDistribution(values[groups == 1], expected[:, 1])


def test_elastic_drawsAsTorchio():
    """Displacements along both axes, and 0 where the borders are locked."""
    transform = tio.RandomElasticDeformation((7, 6, 5), (2, 5, 1), locked_borders=1, **BOTH)
    torch.manual_seed(0)
    expected = np.array([transform.get_params((7, 6, 5), (2, 5, 1), 1) for _ in range(30)])
    groups, values = draw(transform, 30)
    np.testing.assert_array_equal(values[..., 0] == 0, expected[..., 0] == 0)
    for axis in (0, 1):
        assertSameDistribution(values[:, 1:-1, 1:-1, :, axis], expected[:, 1:-1, 1:-1, :, axis])
    assert (groups == 1).all()


def test_flip_drawsAsTorchio():
    """Each axis is drawn on its own, and only the named ones are flipped."""
    torch.manual_seed(0)
    transform = tio.RandomFlip((0, 1), flip_probability=0.3, **BOTH)
    expected = [sum(flip << axis for axis, flip in enumerate(transform.get_params(0.3)[:2])) for _ in range(DRAWS)]
    table = [np.bincount(draw(transform)[0], minlength=4), np.bincount(expected, minlength=4)]
    assert stats.chi2_contingency(table).pvalue > 0.01
    for axes, groups in ((0, {0, 1}), (1, {0, 2}), ((0, 1), {0, 1, 2, 3}), ((1, 1), {0, 2})):
        assert set(draw(tio.RandomFlip(axes, **BOTH))[0].tolist()) == groups
