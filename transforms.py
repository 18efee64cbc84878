"""Define the torchio transforms of volumes and of patches, and run them on one."""

import numpy as np
import torch
import torchio as tio

import config
from patients import alongMemory


def maskFunction(x):
    """Gives the brain mask of an image tensor: bool of its shape, True where it is not background (0)."""
    return x != 0


class StretchHistogram(tio.RescaleIntensity):
    """torchio's RescaleIntensity, but what the mask leaves out gets the lower end of the range.

    Inside the mask the result is RescaleIntensity's. Outside, the plain class maps background like any other intensity:
    to somewhere inside the range where the brain has negative ones. An image with an empty mask, or with one value in
    all of it, becomes the lower end everywhere; the plain class would leave its intensities as they are.
    """

    def rescale(self, tensor, mask, image_name):
        turn, turnBack = alongMemory(tensor.numpy())
        array, mask = turn(tensor.numpy()), turn(mask.numpy())
        values = array[mask]
        stretched = np.full(array.shape, self.out_min, np.float32)
        stretched[mask] = self.stretch(values, *self.findLimits(values))
        return torch.from_numpy(turnBack(stretched))

    def findLimits(self, values):
        """Gives the two intensities that become the ends of the range, of the intensities (N,) inside the mask."""
        if self.in_min_max is not None:
            return self.in_min_max
        return tuple(_percentile(values, percentile) if values.size else 0 for percentile in self.percentiles)

    def stretch(self, values, low, high):
        """Gives float32 intensities with `low` and what is below at the range's lower end, `high` at its upper end."""
        if not high > low:
            return np.full(values.shape, self.out_min, np.float32)
        stretched = values.astype(np.float32)
        np.clip(stretched, low, high, out=stretched)
        stretched -= low
        stretched *= (self.out_max - self.out_min) / (high - low)
        stretched += self.out_min
        return stretched


def _percentile(values, percentile):
    """Gives what `np.percentile` gives of values (N,), in a fifth of the time: only the tail it lies in is sorted."""
    place = percentile / 100 * (len(values) - 1)
    first = int(place)
    sample = np.sort(values[:: len(values) // 4096 + 1])  # tells about where the tail ends, with room to spare
    room = int(0.5 + len(sample) * (0.01 + 0.5 * min(percentile, 100 - percentile) / 100))
    middle = int(percentile / 100 * (len(sample) - 1))
    if percentile < 50:
        tail = values[values <= sample[min(middle + room, len(sample) - 1)]]
    else:
        tail = values[values >= sample[max(middle - room, 0)]]
        first -= len(values) - len(tail)
    if not 0 <= first < len(tail) - 1:  # values that the sample did not foresee, or the very end of them
        tail, first = values, int(place)
    last = min(first + 1, len(tail) - 1)
    start, end = np.partition(tail, (first, last))[[first, last]].astype(np.float64)
    return float(start + (end - start) * (place - int(place)))


def imageKeys():
    """Gives the names of a subject's images, one per entry of `config.MODALITIES`: ['x1', 'x2', ...]."""
    return [f'x{number}' for number in range(1, len(config.MODALITIES) + 1)]


def volumeTransform():
    """Gives the torchio transform that every volume meets once, before patches are cut and before it is predicted.

    It maps the `config.STRETCH_PERCENTILES` of each modality's brain to `config.STRETCH_RANGE`. Per volume, not per
    patch: the same tissue then has the same value whatever else the patch holds.
    """
    return StretchHistogram(
        out_min_max=config.STRETCH_RANGE,
        percentiles=config.STRETCH_PERCENTILES,
        masking_method=maskFunction,
        include=imageKeys(),
        copy=False,
    )


def makeTransforms():
    """Gives `trainTransform, valTransform, testTransform`, torchio objects made from the numbers in `config`.

    Patches are stored stretched and with classes for labels, so the first two neither stretch nor remap; the third is
    `volumeTransform()`, for whole patients.

    Returns:
        trainTransform: tio.Compose for `utils.BRATSDataset` (per patch, on the CPU): pad, one spatial and one intensity
            transform.
        valTransform: tio.Compose that pads to `config.PATCH_SIZE`.
        testTransform: tio.Compose for `engine.predict`.
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
    train = [
        pad,
        tio.OneOf(spatial, p=config.SPATIAL_PROBABILITY, **both),
        tio.OneOf(intensity, p=config.INTENSITY_PROBABILITY, **both),
    ]
    return tio.Compose(train, **both), tio.Compose([pad], **both), tio.Compose([volumeTransform()], copy=False, **both)


def transformCase(image, label, transform):
    """Gives one patient, or one patch, after a torchio transform.

    Args:
        image: float (C, W, H, D) array or tensor.
        label: integer (W, H, D), or None.
        transform: callable on a dict of `x1`, `x2`, ... and `y`, each (1, W, H, D).

    Returns:
        x: float32 (D', C, W', H') tensor, slices first.
        y: uint8 (D', W', H') tensor, or None.
    """
    images = torch.as_tensor(image, dtype=torch.float32)  # affine, elastic and anisotropy refuse float16
    subject = {f'x{number}': channel[None] for number, channel in enumerate(images, start=1)}
    # a transform that includes y wants one, so an unlabelled patient gets zeros for the way
    given = torch.zeros(images.shape[1:], dtype=torch.uint8) if label is None else torch.as_tensor(label)
    subject['y'] = given[None]
    subject = transform(subject)
    # joined as they lie in memory, where W is the fastest axis (see patients.readCase), and only looked at as W, H
    channels = [subject[f'x{number}'][0].permute(2, 1, 0).numpy() for number in range(1, len(images) + 1)]
    # by NumPy, which asks for large pages: of a whole patient torch's own stack takes ten times as long
    x = torch.from_numpy(np.stack(channels, axis=1, dtype=np.float32)).transpose(2, 3)
    if label is None:
        return x, None
    y = subject['y'][0].permute(2, 0, 1)
    return x, (y.round() if y.is_floating_point() else y).to(torch.uint8)


def transformVolume(image, label, transform, patient):
    """Gives what `transformCase` gives of a whole patient, whose shape the transform has to keep.

    Args:
        image, label, transform: as there; no transform stands for `volumeTransform()`.
        patient: to be named in an error.

    Raises:
        ValueError: the transform changed the shape.
    """
    x, y = transformCase(image, label, volumeTransform() if transform is None else transform)
    if x.permute(1, 2, 3, 0).shape != image.shape:
        raise ValueError(f'{patient}: the transform made {tuple(x.shape)} of {image.shape[1:]}; it must stay.')
    return x, y
