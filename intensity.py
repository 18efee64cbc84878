"""Run torchio's transforms of intensities, and of labels, on a batch: what becomes of the value of each pixel."""

import math

import torch
import torchio as tio

from kinds import Kind, drawNothing, ones, send, uniform
from transforms import StretchHistogram


def _mask(transform, values):
    """Gives the bool mask of images (n, C, H, W), or labels (n, H, W), of the transform's masking method."""
    method = transform.masking_method
    if method is None:
        return torch.ones_like(values, dtype=torch.bool)
    if callable(method):
        each = values.flatten(0, -3)[:, None, ..., None]  # (images, 1, H, W, 1): what torchio shows the function
        return torch.vmap(method)(each).view(values.shape)
    mask = transform.get_mask_from_masking_method(method, (), torch.empty(1, *values.shape[-2:], 1))
    return send(mask[0, ..., 0], values.device).expand(values.shape)


def _checkMask(transform):
    if transform.masking_method == 'y':
        return "masking_method = 'y': a function or a side of the image is known"
    try:
        mask = _mask(transform, torch.arange(2 * 64).view(2, 8, 8) * (1 if type(transform) is tio.RemapLabels else 0.5))
    except Exception as error:  # whatever a user's function raises
        return f'masking_method = {transform.masking_method} cannot be mapped over a batch ({error})'
    return None if mask.dtype == torch.bool else f'masking_method = {transform.masking_method} does not give bool'


def _applyRescale(transform, image, label, group, values, generator):
    mask = _mask(transform, image).float()
    count = mask.sum((2, 3), keepdim=True)
    away = mask.reciprocal().sub_(1)  # 0 in the mask, infinite outside
    low, high = (_percentile(image, away, count, percentile) for percentile in transform.percentiles)
    # torchio takes the extremes of the clamped image, which the percentiles of any part of it are
    lowest, highest = low, high
    isStretch = type(transform) is StretchHistogram
    if transform.in_min_max is not None:
        lowest, highest = (torch.full_like(low, bound) for bound in transform.in_min_max)
        low, high = (lowest, highest) if isStretch else (low, high)
    isUnfit = (count == 0) | (highest <= lowest)
    scale = (transform.out_max - transform.out_min) / (highest - lowest)
    if isStretch:
        low, high, lowest, scale = (each.masked_fill(isUnfit, 0) for each in (low, high, lowest, scale))
        return image.clamp(low, high).sub_(lowest).mul_(scale).mul_(mask).add_(transform.out_min), None
    # an image that cannot be rescaled stays as it is
    low, high = low.masked_fill(isUnfit, -math.inf), high.masked_fill(isUnfit, math.inf)
    lowest, scale = lowest.masked_fill(isUnfit, 0), scale.masked_fill(isUnfit, 1)
    shift = torch.full_like(scale, transform.out_min).masked_fill_(isUnfit, 0)
    return image.clamp(low, high).sub_(lowest).mul_(scale).add_(shift), None


def _percentile(image, away, count, percentile):
    """Gives the percentile (n, C, 1, 1) of the masked pixels of each image, linear between pixels.

    Only the tail is sorted: as many pixels as the largest possible mask has up to the percentile, which is known here.

    Args:
        image: float (n, C, H, W).
        away: its shape, 0 in the mask, infinite outside.
        count: (n, C, 1, 1), pixels of the mask.
        percentile: 0 to 100.
    """
    isHigh = percentile > 50
    share = (100 - percentile if isHigh else percentile) / 100
    flat = (image - away if isHigh else image + away).flatten(2)  # (n, C, pixels)
    noPixels = flat.shape[2]
    noTail = min(int(share * (noPixels - 1)) + 2, noPixels)
    # the tail's pixels lie in the groups with the outermost extremes, as many of those as pixels are wanted
    groups = flat.unflatten(2, (math.gcd(noPixels, 16), -1))
    if noTail < groups.shape[3]:
        extremes = groups.amax(2) if isHigh else groups.amin(2)
        chosen = extremes.topk(noTail, largest=isHigh, sorted=False).indices
        flat = groups.gather(3, chosen[:, :, None].expand(-1, -1, groups.shape[2], -1)).flatten(2)
    tail = flat.topk(noTail, largest=isHigh).values  # sorted
    place = share * (count.flatten(2) - 1).clamp(min=0)
    first = place.floor()
    start, end = (tail.gather(2, (first + on).long().clamp(max=noTail - 1)) for on in (0, 1))
    weight = place - first
    # where there is nothing to go on to, `end` is infinite and `weight` 0
    return (start + ((end - start) * weight).masked_fill_(weight == 0, 0))[..., None]


def _drawNoise(transform, count, noImages, generator):
    """Gives values (n, C, 2): mean and standard deviation."""
    bounds = (transform.mean_range, transform.std_range)
    return ones(count), torch.stack([uniform(each, (count, noImages), generator) for each in bounds], -1)


def _applyNoise(transform, image, label, group, values, generator):
    mean, std = send(values, image.device)[..., None, None].unbind(2)  # each (n, C, 1, 1)
    noise = torch.randn(image.shape, generator=generator, device=image.device)
    return noise.mul_(std).add_(mean).add_(image), None


def _drawBias(transform, count, noImages, generator):
    """Gives values (n, C, K): coefficients of x^i y^j, i outermost; those of depth meet zeros on a single slice."""
    noTerms = (transform.order + 1) * (transform.order + 2) // 2
    return ones(count), uniform(transform.coefficients_range, (count, noImages, noTerms), generator)


def _applyBias(transform, image, label, group, values, generator):
    degrees = torch.arange(transform.order + 1)
    table = torch.zeros(*values.shape[:2], len(degrees), len(degrees))
    table[..., degrees[:, None] + degrees <= transform.order] = values
    powers = []
    for length in image.shape[2:]:
        place = torch.arange(length) - (length - 1) / 2  # the middle is 0, the last pixel 1
        powers.append((place / max((length - 1) / 2, 1))[:, None] ** degrees)
    table, rows, columns = (send(each, image.device) for each in (table, *powers))
    return (rows @ (table @ columns.T)).exp_().mul_(image), None


def _checkRemap(transform):
    if any(new % 1 for new in transform.remapping.values()):
        return f'remapping = {transform.remapping}: a class is a whole number'
    return _checkMask(transform)


def _applyRemap(transform, image, label, group, values, generator):
    new, mask = label, _mask(transform, label)
    for old, wanted in transform.remapping.items():
        new = new.masked_fill(mask & (label == old), int(wanted))
    return None, new


KINDS = {
    tio.RescaleIntensity: Kind(_checkMask, drawNothing, _applyRescale),
    StretchHistogram: Kind(_checkMask, drawNothing, _applyRescale),
    tio.RandomNoise: Kind(lambda transform: None, _drawNoise, _applyNoise),
    tio.RandomBiasField: Kind(lambda transform: None, _drawBias, _applyBias),
    tio.RemapLabels: Kind(_checkRemap, drawNothing, _applyRemap, onImages=False, onLabels=True),
}
