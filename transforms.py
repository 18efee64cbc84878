"""Define the torchio transforms of volumes and patches, and apply them to one patient or patch."""

import numpy as np
import torch
import torchio as tio

import config
from patients.reading import maskFunction
from patients.volumes import alongMemory, findLimits, stretch


class StretchHistogram(tio.RescaleIntensity):
    """torchio's RescaleIntensity, but voxels outside the mask become the lower end of the range.

    Inside the mask the result equals RescaleIntensity's. RescaleIntensity maps the background like any other intensity:
    into the middle of the range if the brain has negative intensities. An image with an empty mask, or with a single
    value inside it, becomes the lower end everywhere; RescaleIntensity leaves such an image unchanged.
    """

    def rescale(self, tensor, mask, image_name):
        turn, turnBack = alongMemory(tensor.numpy())
        array, mask = turn(tensor.numpy()), turn(mask.numpy())
        return torch.from_numpy(turnBack(self.stretch(array, mask, *self.findLimits(array[mask]))))

    def findLimits(self, values):
        """Return the two intensities that become the ends of the range, from the intensities (N,) inside the mask."""
        if self.in_min_max is not None:
            return self.in_min_max
        return findLimits(values, self.percentiles)

    def stretch(self, values, mask, low, high):
        """Return `volumes.stretch` of the same arguments, to the range of this transform."""
        return stretch(values, mask, low, high, (self.out_min, self.out_max))


class RandomContrast(tio.IntensityTransform):
    """Change the gamma, contrast and brightness of each image on its own, as another scanner or another brain would.

    A value is a fraction f of the range `limits`. If f is above 0, it becomes (f ** gamma) * factor + summand, clipped
    to 0 and 1; 0, the background, stays 0.

    Args:
        logGamma: gamma is exp(u), with u drawn from -logGamma to logGamma.
        contrast: the factor is drawn from 1 - contrast to 1 + contrast.
        brightness: the summand is drawn from -brightness to brightness.
        limits: lower and upper end of the range.
        **options: of tio.Transform, such as `p` and `include`.
    """

    def __init__(self, logGamma, contrast, brightness, limits, **options):
        super().__init__(**options)
        self.logGamma, self.contrast, self.brightness, self.limits = logGamma, contrast, brightness, tuple(limits)
        self.args_names = ['logGamma', 'contrast', 'brightness', 'limits']

    def bounds(self):
        """Return the lower and upper bounds of u, factor and summand, (2, 3)."""
        reach = torch.tensor([self.logGamma, self.contrast, self.brightness])
        return torch.tensor([0.0, 1.0, 0.0]) + torch.stack([-reach, reach])

    def apply_transform(self, subject):
        low, high = self.bounds()
        for image in self.get_images(subject):
            image.set_data(self.adjust(image.data.float(), *(low + (high - low) * torch.rand(3))))
        return subject

    def adjust(self, values, logGamma, contrast, brightness):
        """Return changed values; the three numbers are tensors that broadcast with them."""
        low, high = self.limits
        fractions = (values - low).div_(high - low).clamp_(0, 1)
        changed = fractions.pow(logGamma.exp()).mul_(contrast).add_(brightness).clamp_(0, 1)
        return torch.where(fractions > 0, changed, fractions).mul_(high - low).add_(low)


class RandomModalityDropout(tio.IntensityTransform):
    """Leave out each image of a subject with a probability, but never all: it becomes the background value everywhere.

    A network trained with it predicts a patient of whom some modalities are missing.

    Args:
        dropout: probability that an image is left out, 0 to 1. If all would be, one of them, drawn with equal odds,
            is kept.
        background: value of an image that is left out.
        **options: of tio.Transform, such as `p` and `include`.
    """

    def __init__(self, dropout, background, **options):
        super().__init__(**options)
        self.dropout, self.background = dropout, background
        self.args_names = ['dropout', 'background']

    def draw(self, numSamples, numImages, generator=None):
        """Return which images are left out, bool (numSamples, numImages)."""
        isOut = torch.rand(numSamples, numImages, generator=generator) < self.dropout
        kept = torch.randint(numImages, (numSamples, 1), generator=generator)
        return isOut & ~(isOut.all(1, keepdim=True) & (torch.arange(numImages) == kept))

    def apply_transform(self, subject):
        images = self.get_images(subject)
        for image, isOut in zip(images, self.draw(1, len(images))[0], strict=True):
            if isOut:
                image.set_data(torch.full_like(image.data, self.background))
        return subject


def imageKeys(count=None):
    """Return the names of a subject's images: 'x1', 'x2', ...; `count` of them, or as many as `config.MODALITIES`."""
    return [f'x{number}' for number in range(1, (len(config.MODALITIES) if count is None else count) + 1)]


def volumeTransform(percentiles=None, outRange=None, count=None):
    """Return the torchio transform that is applied to each volume once, before cutting and before prediction.

    It maps two percentiles of each modality's brain to the ends of a range. It works on the volume and not on the
    patch, so that a tissue has the same value whatever else is in the patch.

    Args:
        percentiles: default `config.STRETCH_PERCENTILES`.
        outRange: default `config.STRETCH_RANGE`.
        count: number of modalities, default that of `config.MODALITIES`.
    """
    return StretchHistogram(
        out_min_max=tuple(config.STRETCH_RANGE if outRange is None else outRange),
        percentiles=tuple(config.STRETCH_PERCENTILES if percentiles is None else percentiles),
        masking_method=maskFunction,
        include=imageKeys(count),
        copy=False,
    )


def makeTransforms():
    """Return `trainTransform, valTransform, testTransform`, torchio objects made from the numbers in `config`.

    Stored patches are stretched and hold classes, so the first two neither stretch nor remap.

    Returns:
        trainTransform: tio.Compose of padding, one spatial transform, a change of contrast (unless
            `config.CONTRAST_PROBABILITY` is 0) and one intensity transform. `utils.BRATSDataset` applies it to a patch
            on the CPU, `batched.Batched` to a batch on its device.
        valTransform: tio.Compose that pads to `config.PATCH_SIZE`.
        testTransform: tio.Compose of `volumeTransform()`, for `engine.predict`.
    """
    images, both = {'include': imageKeys()}, {'include': [*imageKeys(), 'y'], 'label_keys': ['y']}
    pad = tio.CropOrPad((config.PATCH_SIZE, config.PATCH_SIZE, 1), padding_mode='minimum', **both)
    spatial = {
        tio.RandomFlip(axes=config.FLIP_AXES, flip_probability=config.FLIP_PROBABILITY, **both): config.FLIP_WEIGHT,
        tio.RandomAffine(scales=config.AFFINE_SCALES, degrees=config.AFFINE_DEGREES, **both): config.AFFINE_WEIGHT,
        tio.RandomAnisotropy(
            axes=config.ANISOTROPY_AXES, downsampling=config.ANISOTROPY_DOWNSAMPLING, **both
        ): config.ANISOTROPY_WEIGHT,
        tio.RandomElasticDeformation(max_displacement=config.ELASTIC_DISPLACEMENT, **both): config.ELASTIC_WEIGHT,
    }
    intensity = {
        tio.RandomNoise(std=(0, config.NOISE_STD), **images): 0.5,
        tio.RandomBiasField(coefficients=config.BIAS_COEFFICIENTS, **images): 0.5,
    }
    train = [pad, tio.OneOf(spatial, p=config.SPATIAL_PROBABILITY, **both)]
    if config.CONTRAST_PROBABILITY > 0:
        train.append(RandomContrast(*config.CONTRAST, config.STRETCH_RANGE, p=config.CONTRAST_PROBABILITY, **images))
    train.append(tio.OneOf(intensity, p=config.INTENSITY_PROBABILITY, **both))
    if config.MODALITY_DROPOUT > 0:
        train.append(RandomModalityDropout(config.MODALITY_DROPOUT, config.STRETCH_RANGE[0], **images))
    return tio.Compose(train, **both), tio.Compose([pad], **both), tio.Compose([volumeTransform()], copy=False, **both)


def transformCase(image, label, transform):
    """Return one patient, or one patch, after a torchio transform.

    Args:
        image: float (C, W, H, D) array or tensor.
        label: integer (W, H, D), or None.
        transform: callable that takes a dict of `x1`, `x2`, ... and `y`, each (1, W, H, D).

    Returns:
        x: float32 (D', C, W', H') tensor, slices first.
        y: uint8 (D', W', H') tensor, or None.
    """
    images = torch.as_tensor(image, dtype=torch.float32)  # affine, elastic and anisotropy refuse float16
    subject = {f'x{number}': channel[None] for number, channel in enumerate(images, start=1)}
    # a transform that includes y needs one: without a label it gets zeros, which are dropped afterwards
    y = torch.zeros(images.shape[1:], dtype=torch.uint8) if label is None else torch.as_tensor(label)
    subject['y'] = y[None]
    subject = transform(subject)
    # stacked in memory order, where W is the fastest axis (see patients.readCase), and only viewed as W, H
    channels = [subject[f'x{number}'][0].permute(2, 1, 0).numpy() for number in range(1, len(images) + 1)]
    # by NumPy, which uses large pages: torch.stack takes ten times as long for a whole patient
    x = torch.from_numpy(np.stack(channels, axis=1, dtype=np.float32)).transpose(2, 3)
    if label is None:
        return x, None
    y = subject['y'][0].permute(2, 0, 1)
    return x, (y.round() if y.is_floating_point() else y).to(torch.uint8)


def transformVolume(image, label, transform, patient):
    """Return what `transformCase` returns for a whole patient, whose shape the transform must keep.

    Args:
        image, label: as in `transformCase`.
        transform: as in `transformCase`; None: `volumeTransform()`.
        patient: id, for the error message.

    Raises:
        ValueError: the transform changed the shape.
    """
    x, y = transformCase(image, label, volumeTransform() if transform is None else transform)
    if x.permute(1, 2, 3, 0).shape != image.shape:
        raise ValueError(f'{patient}: the transform changed the shape {image.shape[1:]} to {tuple(x.shape)}.')
    return x, y
