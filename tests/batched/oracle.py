"""Make example batches, and transform them by torchio, sample by sample, or by one operation of `batched`."""

import numpy as np
import torch
import torchio as tio
from scipy import stats

import patients
from batched.batch import OPERATIONS

IMAGES = {'include': ['x1', 'x2', 'x3']}
BOTH = {'include': ['x1', 'x2', 'x3', 'y'], 'label_keys': ['y']}
SHAPE = (41, 60)  # neither square nor both even
DRAWS = 3000


def makeBatch(numSamples=4, shape=SHAPE, dtype=torch.float32):
    """Return images (B, 3, H, W), waves and noise in a disk on zeros, and label maps (B, H, W) of classes 0 to 3."""
    generator = torch.Generator().manual_seed(numSamples)
    rows, columns = torch.meshgrid(*(torch.linspace(-1, 1, length) for length in shape), indexing='ij')
    waves = torch.rand(numSamples, 3, 2, 1, 1, generator=generator) * 4
    image = torch.sin(waves[:, :, 0] * rows + 1) + torch.cos(waves[:, :, 1] * columns) - 0.5
    image += 0.1 * torch.rand(image.shape, generator=generator)
    label = sum(((rows - 0.2) ** 2 + columns**2 < radius).long() for radius in (0.1, 0.3, 0.5)).repeat(numSamples, 1, 1)
    return (image * (rows**2 + columns**2 < 0.9)).to(dtype), label


def documentList(shape=SHAPE):
    """Return the training transforms of the document that the package follows: padded to a shape, stretched inside."""
    spatial = {
        tio.RandomFlip((0, 1), flip_probability=1, **BOTH): 0.35,
        tio.RandomAffine(degrees=20, **BOTH): 0.35,
        tio.RandomAnisotropy((0, 1), (1.5, 2.5), **BOTH): 0.15,
        tio.RandomElasticDeformation(max_displacement=(2, 2, 0), **BOTH): 0.15,
    }
    intensity = {tio.RandomNoise(std=(0, 0.1), **IMAGES): 0.5, tio.RandomBiasField(0.1, **IMAGES): 0.5}
    return tio.Compose(
        [
            tio.CropOrPad((*shape, 1), padding_mode='minimum', **BOTH),
            tio.OneOf(spatial, p=0.95),
            tio.RescaleIntensity((-1, 1), (0.5, 99.5), patients.maskFunction, **IMAGES),
            tio.OneOf(intensity, p=0.95),
            tio.RemapLabels({0: 0, 1: 1, 2: 2, 4: 3}, **BOTH),
        ]
    )


def viaTorchio(transform, image, label):
    """Return a batch after a torchio transform, which is called sample by sample."""
    images, labels = [], []
    for channels, classes in zip(image, label, strict=True):
        subject = {f'x{number}': channel[None, ..., None] for number, channel in enumerate(channels, start=1)}
        done = transform({**subject, 'y': classes[None, ..., None]})
        images.append(torch.cat([done[name] for name in subject])[..., 0])
        labels.append(done['y'][0, ..., 0])
    return torch.stack(images), torch.stack(labels)


def viaBatched(transform, image, label, values, group=1, seed=0):
    """Return a batch after the operation of a transform with the given parameters."""
    operation, generator = OPERATIONS[type(transform)], torch.Generator().manual_seed(seed)
    given = image.clone() if operation.onImages else None, label.clone() if operation.onLabels else None
    new, newLabel = operation.apply(transform, *given, group, values, generator)
    return image if new is None else new, label if newLabel is None else newLabel


def draw(transform, numSamples=DRAWS, numChannels=3):
    """Return the groups and values that the operation of a transform draws for some samples."""
    return OPERATIONS[type(transform)].draw(transform, numSamples, numChannels, torch.Generator().manual_seed(1))


def fixed(transform, group, values):
    """Return the torchio transform without chance that has the parameters of one sample, as the operations draw them.

    Noise has no counterpart: its random numbers differ.
    """
    options = {'include': transform.include, 'label_keys': transform.label_keys}
    if type(transform) is tio.RandomFlip:
        return tio.Flip([axis for axis in (0, 1) if group >> axis & 1], **options)
    if type(transform) is tio.RandomAffine:
        first, second, degrees = values.tolist()
        return tio.Affine((first, second, 1.4), (30, 40, degrees), (0, 0, 0), **options)  # 1.4, 30, 40 have no effect
    if type(transform) is tio.RandomAnisotropy:
        return tio.RandomAnisotropy(group - 1, (float(values), float(values)), **options)
    if type(transform) is tio.RandomElasticDeformation:
        field = np.concatenate([values.numpy(), np.full((*values.shape[:3], 1), 2, np.float32)], -1)
        return tio.ElasticDeformation(field, transform.max_displacement, **options)
    if type(transform) is tio.RandomBiasField:
        powers = range(transform.order + 1)
        depths = [z for x in powers for y in powers for z in powers if x + y + z <= transform.order]
        coefficients = {}
        for name, inPlane in zip(transform.include, values.tolist(), strict=True):
            inPlane = iter(inPlane)
            coefficients[name] = [next(inPlane) if z == 0 else 0.3 for z in depths]  # 0.3 has no effect
        return tio.BiasField(coefficients, dict.fromkeys(coefficients, transform.order), **options)
    return transform


def assertEqual(found, expected, numTies=0):
    """Assert that images are equal to 1e-4 of their range, and labels except for some ties between two pixels."""
    extent = (expected[0].max() - expected[0].min()).clamp(min=1)
    assert found[0].shape == expected[0].shape and found[1].shape == expected[1].shape
    assert (found[0] - expected[0]).abs().max() < 1e-4 * extent
    assert (found[1] != expected[1]).sum() <= numTies


def assertSameDistribution(found, expected):
    """Assert that the Kolmogorov-Smirnov test finds no difference. Seeds are fixed, so there are no false alarms."""
    assert stats.ks_2samp(np.ravel(found), np.ravel(expected)).pvalue > 0.01
