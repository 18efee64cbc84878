"""Run torchio's transforms of intensities and of labels on a batch: they change the values of pixels, not places."""

import math

import torch
import torchio as tio

from batched.operation import Operation, checkParameters, drawNothing, oneGroup, toDevice, uniform
from transforms import RandomContrast, RandomModalityDropout, StretchHistogram

# Rescaling


def _mask(transform, image):
    """Return the bool mask of images (n, C, H, W) by the transform's masking function; without one, all pixels."""
    if transform.masking_method is None:
        return torch.ones_like(image, dtype=torch.bool)
    volumes = image.flatten(0, 1)[:, None, ..., None]  # (n * C, 1, H, W, 1), each as torchio passes it to the function
    return torch.vmap(transform.masking_method)(volumes).view(image.shape)


def _checkRescale(transform):
    method = transform.masking_method
    if method is not None and not callable(method):
        return f'masking_method = {method!r}, only a function or None is supported'
    try:
        mask = _mask(transform, torch.arange(64.0).view(2, 1, 4, 8))
    except Exception as error:  # the function is the user's and may raise anything
        return f'masking_method = {method} cannot be mapped over a batch ({error})'
    if mask.dtype != torch.bool:
        return f'masking_method = {method} returns {mask.dtype}, expected a bool mask'
    return checkParameters(transform, in_min_max=None)


def _applyRescale(transform, image, label, group, values, generator):
    mask = _mask(transform, image).float()
    count = mask.sum((2, 3), keepdim=True)
    away = mask.reciprocal().sub_(1)  # 0 in the mask, infinite outside
    low, high = (_maskedPercentile(image, away, count, percentile) for percentile in transform.percentiles)
    isInvalid = (count == 0) | (high <= low)
    scale = (transform.out_max - transform.out_min) / (high - low)
    if type(transform) is StretchHistogram:
        # what is outside the mask, and an image that cannot be stretched, becomes the lower end of the range
        low, high, scale = (each.masked_fill(isInvalid, 0) for each in (low, high, scale))
        return image.clamp(low, high).sub_(low).mul_(scale).mul_(mask).add_(transform.out_min), None
    # an image that cannot be rescaled stays as it is
    lowest, scale = low.masked_fill(isInvalid, 0), scale.masked_fill(isInvalid, 1)
    low, high = low.masked_fill(isInvalid, -math.inf), high.masked_fill(isInvalid, math.inf)
    shift = torch.full_like(scale, transform.out_min).masked_fill_(isInvalid, 0)
    return image.clamp(low, high).sub_(lowest).mul_(scale).add_(shift), None


def _maskedPercentile(image, away, count, percentile):
    """Return the percentile of the pixels inside the mask of each image, linear between pixels, (n, C, 1, 1).

    Only the tail up to the percentile is sorted. Its length is that of the largest possible mask, so that it does not
    depend on the pixels.

    Args:
        image: float (n, C, H, W).
        away: float (n, C, H, W), 0 inside the mask and infinite outside.
        count: float (n, C, 1, 1), number of pixels inside the mask.
        percentile: 0 to 100.
    """
    isHigh = percentile > 50
    fraction = (100 - percentile if isHigh else percentile) / 100
    flat = (image - away if isHigh else image + away).flatten(2)  # (n, C, pixels)
    numPixels = flat.shape[2]
    numTail = min(int(fraction * (numPixels - 1)) + 2, numPixels)
    # the tail lies in the `numTail` groups of pixels with the outermost extremes
    groups = flat.unflatten(2, (math.gcd(numPixels, 16), -1))
    if numTail < groups.shape[3]:
        extremes = groups.amax(2) if isHigh else groups.amin(2)
        chosen = extremes.topk(numTail, largest=isHigh, sorted=False).indices
        flat = groups.gather(3, chosen[:, :, None].expand(-1, -1, groups.shape[2], -1)).flatten(2)
    tail = flat.topk(numTail, largest=isHigh).values  # sorted
    place = fraction * (count.flatten(2) - 1).clamp(min=0)
    first = place.floor()
    start, end = (tail.gather(2, (first + step).long().clamp(max=numTail - 1)) for step in (0, 1))
    weight = place - first
    # with weight 0, `end` may lie outside the mask and be infinite
    return (start + ((end - start) * weight).masked_fill_(weight == 0, 0))[..., None]


# Noise, bias field and contrast


def _drawNoise(transform, numSamples, numChannels, generator):
    """Draw values (n, C, 2): mean and standard deviation of each image's noise."""
    bounds, shape = (transform.mean_range, transform.std_range), (numSamples, numChannels)
    return oneGroup(numSamples), torch.stack([uniform(each, shape, generator) for each in bounds], -1)


def _applyNoise(transform, image, label, group, values, generator):
    mean, std = toDevice(values, image.device)[..., None, None].unbind(2)  # each (n, C, 1, 1)
    noise = torch.randn(image.shape, generator=generator, device=image.device)
    return noise.mul_(std).add_(mean).add_(image), None


def _drawBias(transform, numSamples, numChannels, generator):
    """Draw values (n, C, K): coefficients of the terms x^i y^j, ordered by i, then j.

    On a slice, torchio's terms with a power of z are 0.
    """
    numTerms = (transform.order + 1) * (transform.order + 2) // 2
    shape = (numSamples, numChannels, numTerms)
    return oneGroup(numSamples), uniform(transform.coefficients_range, shape, generator)


def _applyBias(transform, image, label, group, values, generator):
    degrees = torch.arange(transform.order + 1)
    table = torch.zeros(*values.shape[:2], len(degrees), len(degrees))
    table[..., degrees[:, None] + degrees <= transform.order] = values
    powers = []
    for length in image.shape[2:]:
        place = torch.arange(length) - (length - 1) / 2  # 0 at the center, then scaled to 1 at the last pixel
        powers.append((place / max((length - 1) / 2, 1))[:, None] ** degrees)
    table, rows, columns = (toDevice(each, image.device) for each in (table, *powers))
    return (rows @ (table @ columns.T)).exp_().mul_(image), None


def _drawContrast(transform, numSamples, numChannels, generator):
    """Draw values (n, C, 3): logarithm of gamma, factor and summand of each image."""
    low, high = transform.bounds()
    return oneGroup(numSamples), low + (high - low) * torch.rand(numSamples, numChannels, 3, generator=generator)


def _applyContrast(transform, image, label, group, values, generator):
    return transform.adjust(image, *toDevice(values, image.device)[..., None, None].unbind(2)), None


def _drawDropout(transform, numSamples, numChannels, generator):
    """Draw values (n, C): 1 if an image is left out, else 0."""
    return oneGroup(numSamples), transform.draw(numSamples, numChannels, generator).float()


def _applyDropout(transform, image, label, group, values, generator):
    return torch.where(toDevice(values, image.device)[..., None, None] > 0, transform.background, image), None


# Labels


def _checkRemap(transform):
    if any(new % 1 for new in transform.remapping.values()):
        return f'remapping = {transform.remapping}, only whole numbers are supported'
    return checkParameters(transform, masking_method=None)


def _applyRemap(transform, image, label, group, values, generator):
    remapped = label
    for old, new in transform.remapping.items():
        remapped = remapped.masked_fill(label == old, int(new))
    return None, remapped


OPERATIONS = {
    tio.RescaleIntensity: Operation(_checkRescale, drawNothing, _applyRescale),
    StretchHistogram: Operation(_checkRescale, drawNothing, _applyRescale),
    tio.RandomNoise: Operation(checkParameters, _drawNoise, _applyNoise),
    tio.RandomBiasField: Operation(checkParameters, _drawBias, _applyBias),
    RandomContrast: Operation(checkParameters, _drawContrast, _applyContrast),
    RandomModalityDropout: Operation(checkParameters, _drawDropout, _applyDropout),
    tio.RemapLabels: Operation(_checkRemap, drawNothing, _applyRemap, onImages=False, onLabels=True),
}
