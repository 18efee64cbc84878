"""Runs torchio's transforms on a whole batch at once, on the model's device."""

import copy
import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torchio as tio
from torch.nn.functional import grid_sample

from preprocess import StretchHistogram


class Batched:
    """A torchio transform that takes a batch: the same distributions, computed together for all samples of one kind.

    A sample of C channels is the subject of C images `x1` ... `xC` and the label map `y`, H and W its first two axes,
    depth 1. As in torchio, spatial parameters are drawn once per sample, those of intensity once per sample and
    channel; `p`, `include`, `exclude` and `label_keys` hold at every level. What torchio ignores on a single slice
    (rotations about the first two axes, scales and displacements along depth) is ignored.

    All that decides which samples meet which transform is drawn on the host, so the device is never waited for: no
    shape depends on a value that lives there, and small tensors go there from pinned memory. `torch.compile` leaves a
    call as it is (a graph break): the number of samples of each kind differs from batch to batch, and every new one
    would be compiled anew.

    Args:
        transform: tio.Compose, OneOf, RandomFlip, RandomAffine, RandomAnisotropy, RandomElasticDeformation,
            RescaleIntensity, `preprocess.StretchHistogram`, RandomNoise, RandomBiasField, CropOrPad or RemapLabels,
            nested as you like. A masking function must be one that `torch.vmap` can map over images.
        generator: torch.Generator on the CPU that each call draws its seed from; None: torch's global one, so that a
            run resumed from a checkpoint goes on as if it had never stopped.

    Raises:
        ValueError: a transform, or a parameter of one, that is not known here, by its name.
    """

    def __init__(self, transform, generator=None):
        if generator is not None and generator.device.type != 'cpu':
            raise ValueError(f'The generator is on {generator.device}; one on the CPU was expected.')
        _check(transform)
        self.transform, self.generator = transform, generator

    @torch.compiler.disable
    @torch.no_grad()
    def __call__(self, image, label):
        """Gives the batch after the transform; what was handed in stays as it is.

        Args:
            image: float (B, C, H, W) of any float dtype.
            label: integer (B, H, W), on the same device.

        Returns:
            image: float32 (B, C, H', W'); only CropOrPad changes the shape.
            label: (B, H', W') in its own dtype.

        Raises:
            ValueError: other shapes or dtypes; CropOrPad would change the shape of some of the images only.
        """
        isFit = image.ndim == 4 and label.shape == (len(image), *image.shape[2:])
        if not isFit or not image.is_floating_point() or label.is_floating_point():
            raise ValueError(
                f'Got image {image.dtype} {tuple(image.shape)} and label {label.dtype} {tuple(label.shape)}; '
                'expected float (B, C, H, W) and integer (B, H, W).'
            )
        seed = int(torch.randint(2**63 - 1, (), generator=self.generator))
        host = torch.Generator().manual_seed(seed)
        device = host if image.device.type == 'cpu' else torch.Generator(image.device).manual_seed(seed)
        image = image.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        batch = _Batch(image, label.clone(), host, device)
        _run(self.transform, batch, torch.arange(len(image)))
        return batch.image, batch.label


@dataclass
class _Batch:
    image: torch.Tensor
    label: torch.Tensor
    host: torch.Generator  # of parameters
    device: torch.Generator  # of noise


def _run(transform, batch, rows):
    """Applies a transform and all it holds to the samples `rows` (int64, on the host) of a batch, in place."""
    if transform.probability < 1:
        rows = rows[torch.rand(len(rows), generator=batch.host) < transform.probability]
    if len(rows) == 0:
        return
    if type(transform) is tio.Compose:
        for child in transform.transforms:
            _run(child, batch, rows)
    elif type(transform) is tio.OneOf:
        weights = torch.tensor(list(transform.transforms_dict.values()))
        chosen = torch.multinomial(weights, len(rows), replacement=True, generator=batch.host)
        for number, child in enumerate(transform.transforms_dict):
            _run(child, batch, rows[chosen == number])
    else:
        _runKind(transform, batch, rows)


def _runKind(transform, batch, rows):
    """Draws the parameters of a transform for some samples, gathers what goes together and puts the results back."""
    kind, (noSamples, noChannels, *shape) = _KINDS[type(transform)], batch.image.shape
    channels = [number for number in range(noChannels) if kind.onImages and _covers(transform, f'x{number + 1}')]
    onLabel = kind.onLabels and _covers(transform, 'y')
    if not channels and not onLabel:
        return
    groups, values = kind.draw(transform, len(rows), len(channels), batch.host)
    for group in sorted(set(groups.tolist()) - {0}):
        here = groups == group
        isWhole = len(rows) == noSamples and bool(here.all())
        where = None if isWhole else _send(rows[here], batch.image.device)
        image = _take(batch.image, where) if channels else None
        some = image if len(channels) in (0, noChannels) else torch.stack([image[:, each] for each in channels], 1)
        label = _take(batch.label, where) if onLabel else None
        new, label = kind.apply(transform, some, label, group, values[here], batch.device)
        isChanged = any(each is not None and each.shape[-2:] != torch.Size(shape) for each in (new, label))
        if isChanged and not (onLabel and len(channels) == noChannels):
            raise ValueError(f'{_name(transform)} would change the shape of some images, or of the label, only.')
        if new is not None and len(channels) < noChannels:
            for number, channel in enumerate(channels):
                image[:, channel] = new[:, number]
            new = image
        batch.image, batch.label = _put(batch.image, where, new), _put(batch.label, where, label)


def _take(whole, where):
    return whole if where is None else whole.index_select(0, where)


def _put(whole, where, part):
    """Gives `whole` with the samples `where` (None: all) replaced by `part` (None: nothing is)."""
    if part is None or where is None:
        return whole if part is None else part
    return whole.index_copy_(0, where, part)


def _send(tensor, device):
    """Copies a small tensor from the host to a device without waiting for the device."""
    if device.type == 'cuda':
        tensor = tensor.pin_memory()  # from pageable memory the copy would wait
    return tensor.to(device, non_blocking=True)


def _uniform(bounds, shape, generator):
    low, high = bounds
    return torch.rand(shape, generator=generator) * (high - low) + low


def _ones(count):
    return torch.ones(count, dtype=torch.int64)


# Which images a transform means, and which transforms are meant here


def _name(transform):
    return type(transform).__name__


def _covers(transform, name):
    isIncluded = transform.include is None or name in transform.include
    return isIncluded and (transform.exclude is None or name not in transform.exclude)


def _check(transform, isAlways=True):
    """Refuses by name what cannot be honoured; `isAlways`: every sample will meet this transform."""
    reason = None
    isNest = type(transform) in (tio.Compose, tio.OneOf)
    if not isNest and type(transform) not in _KINDS:
        known = ', '.join(kind.__name__ for kind in (tio.Compose, tio.OneOf, *_KINDS))
        raise ValueError(f'{_name(transform)} is not among what Batched knows: {known}.')
    if transform.keep is not None:
        reason = f'keep = {transform.keep}: a batch has no place for more images'
    elif not isNest:
        labels = transform.label_keys or ()
        isAlways = isAlways and transform.probability == 1
        asImage = transform.include is not None and 'y' in transform.include and 'y' not in labels
        if any(key != 'y' and key.startswith('x') for key in labels):
            reason = f'label_keys = {labels}: only y is a label'
        elif asImage and type(transform) not in (tio.RandomFlip, tio.CropOrPad):
            reason = 'include names y but label_keys do not: torchio would treat the label as an image'
        elif type(transform) is tio.CropOrPad and not isAlways:
            reason = 'under p < 1 or in a OneOf the samples of a batch would differ in shape'
        else:
            reason = _KINDS[type(transform)].check(transform)
    if reason:
        raise ValueError(f'{_name(transform)}: {reason}.')
    isOneOf = type(transform) is tio.OneOf
    for child in (transform.transforms_dict if isOneOf else transform.transforms) if isNest else ():
        _check(child, isAlways and transform.probability == 1 and not isOneOf)


def _checkInterpolation(transform):
    if transform.image_interpolation not in ('linear', 'nearest'):
        return f'image_interpolation = {transform.image_interpolation!r}: linear or nearest is known'
    if getattr(transform, 'label_interpolation', 'nearest') != 'nearest':
        return f'label_interpolation = {transform.label_interpolation!r} would invent classes: nearest is known'
    return None


# Flip


def _flipAxes(transform):
    """Gives the axes in the slice that may be flipped; a name means what it means for a tensor: RAS order."""
    anyImage = tio.ScalarImage(tensor=torch.zeros(1, 1, 1, 1))
    axes = (3 + anyImage.axis_name_to_index(axis) if isinstance(axis, str) else axis for axis in transform.axes)
    return {axis for axis in axes if axis < 2}  # along depth there is nothing to flip


def _checkFlip(transform):
    try:
        _flipAxes(transform)
    except ValueError as error:
        return f'axes = {transform.axes}: {error}'


def _drawFlip(transform, count, noImages, generator):
    """Gives groups 0 to 3: 1 for the first axis plus 2 for the second."""
    isFlipped = torch.rand(count, 2, generator=generator) < transform.flip_probability
    return sum(isFlipped[:, axis].long() << axis for axis in _flipAxes(transform)) + 0 * _ones(count), isFlipped


def _applyFlip(transform, image, label, group, values, generator):
    axes = [axis - 2 for axis in (0, 1) if group >> axis & 1]
    return (None if each is None else each.flip(axes) for each in (image, label))


# Affine and elastic: where each pixel comes from, then one reading


def _resample(transform, image, label, row, column, fill, labelFill):
    """Reads images and labels at the coordinates `row` and `column`, float (n, H, W) in pixels.

    As ITK reads: up to half a pixel outside of the outermost centers an image goes on as it ends, beyond it is `fill`.
    """
    height, width = row.shape[1:]
    # halves go up, as in ITK; grid_sample's own nearest would send them to the even side
    wanted = (row + 0.5).floor_(), (column + 0.5).floor_()
    nearest = wanted[0].clamp(0, height - 1), wanted[1].clamp(0, width - 1)
    # 1 inside, 0 outside: as numbers, for comparing and choosing take several times longer on a CPU
    inside = 1 - ((wanted[0] - nearest[0]).abs_() + (wanted[1] - nearest[1]).abs_()).clamp_(max=1)
    index = (nearest[0] * width + nearest[1]).long().flatten(1)
    if label is not None:
        read = label.flatten(1).gather(1, index).view_as(label)
        label = (read - labelFill) * inside.to(label.dtype) + labelFill  # what wraps around comes back
    if image is not None:
        if transform.image_interpolation == 'nearest':
            read = image.flatten(2).gather(2, index[:, None].expand(-1, image.shape[1], -1)).view_as(image)
        else:
            grid = torch.stack([(2 * column + 1) / width - 1, (2 * row + 1) / height - 1]).movedim(0, -1)
            read = grid_sample(image, grid, padding_mode='border', align_corners=False)
        image = torch.lerp(fill, read, inside[:, None])
    return image, label


def _checkAffine(transform):
    if max(map(abs, transform.translation[4:])) >= 0.5:  # pixels: there a single slice ends
        return f'translation = {transform.translation}: along the last axis it would leave the slice'
    if transform.default_pad_value == 'otsu':
        return "default_pad_value = 'otsu': minimum, mean or a number is known"
    if transform.default_pad_label % 1:
        return f'default_pad_label = {transform.default_pad_label} is not a class'
    return _checkInterpolation(transform)


def _drawAffine(transform, count, noImages, generator):
    """Gives values (n, 5): scales of both axes, degrees in the plane, translation of both axes in pixels."""
    bounds = [transform.scales[:2], transform.scales[2:4], transform.degrees[4:]]
    bounds += [transform.translation[:2], transform.translation[2:4]]
    values = torch.stack([_uniform(each, count, generator) for each in bounds], 1)
    if transform.isotropic:
        values[:, 1] = values[:, 0]
    return _ones(count), values


def _applyAffine(transform, image, label, group, values, generator):
    """Pixel o of the result is pixel R^T ((o - c) / s - t) + c: scaling comes after rotation and translation."""
    like = label if image is None else image[:, 0]
    height, width = like.shape[1:]
    scales, angle, shift = values[:, :2].double(), values[:, 2].double().deg2rad(), values[:, 3:].double()
    cos, sin = angle.cos(), angle.sin()
    back = torch.stack([torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1)], 1)  # (n, 2, 2)
    matrix = back / scales[:, None]
    isImage = transform.center == 'image'
    center = torch.tensor([(height - 1) / 2, (width - 1) / 2]).double() if isImage else torch.zeros(2).double()
    offset = center - matrix @ center - (back @ shift[..., None])[..., 0]
    table = torch.cat([matrix.flatten(1), offset], 1).float()
    a, b, c, d, e, f = _send(table, like.device)[:, :, None, None].unbind(1)  # each (n, 1, 1)
    rows = torch.arange(height, device=like.device)[:, None]
    columns = torch.arange(width, device=like.device)
    row, column = a * rows + e + b * columns, c * rows + f + d * columns  # (n, H, W)
    fill = None if image is None else _borderValue(image, transform.default_pad_value)
    return _resample(transform, image, label, row, column, fill, int(transform.default_pad_label))


def _borderValue(image, padding):
    if padding == 'minimum':
        return image.amin((2, 3), keepdim=True)
    if padding == 'mean':
        # torchio's six faces of the volume: the first and the last slice, here the same one, and the four edges
        faces = [image, image, image[:, :, :1], image[:, :, -1:], image[..., :1], image[..., -1:]]
        total = sum(face.sum((2, 3), keepdim=True) for face in faces)
        return total / sum(face[0, 0].numel() for face in faces)
    return image.new_full((), padding)


def _drawElastic(transform, count, noImages, generator):
    """Gives values (n, nx, ny, nz, 2): the displacement of each control point along both axes, in pixels."""
    points = torch.rand(count, *transform.num_control_points, 2, generator=generator) * 2 - 1
    points *= torch.tensor(transform.max_displacement[:2], dtype=torch.float32)
    for border in range(transform.num_locked_borders):
        for end in (border, -1 - border):
            points[:, end] = 0
            points[:, :, end] = 0
    return _ones(count) * any(transform.max_displacement), points


def _applyElastic(transform, image, label, group, values, generator):
    """Control points lie in ITK's order, against both axes of the slice, and so do their displacements."""
    like = label if image is None else image[:, 0]
    height, width = like.shape[1:]
    sides = zip((height, width, 1), values.shape[1:4], strict=True)
    rows, columns, depth = (_splines(length, number) for length, number in sides)
    points = torch.einsum('nabck,c->nabk', values.flip(1, 2), depth[0])  # a single slice lies amid the mesh
    points, rows, columns = (_send(each, like.device) for each in (points, rows, columns))
    shift = torch.einsum('ha,nabk,wb->nkhw', rows, points, columns)
    row = torch.arange(height, device=like.device)[:, None] - shift[:, 0]
    column = torch.arange(width, device=like.device) - shift[:, 1]
    fill = None if image is None else image.amin((2, 3), keepdim=True)
    return _resample(transform, image, label, row, column, fill, None if label is None else label.amin((1, 2), True))


@functools.cache
def _splines(length, noPoints):
    """Gives the weights (length, noPoints) of control points at pixel centers, by uniform cubic B-splines.

    The mesh covers the pixels and an eighth of one more at each end.

    Reference: itk::BSplineTransformInitializer.
    """
    noCells = noPoints - 3
    place = (torch.arange(length).double() + 0.625) / (length + 0.25) * noCells
    cell = place.floor()
    t = place - cell
    pieces = [(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]
    weights = torch.zeros(length, noPoints, dtype=torch.float64)
    return weights.scatter(1, cell.long()[:, None] + torch.arange(4), torch.stack(pieces, 1) / 6).float()


# Anisotropy


def _checkAnisotropy(transform):
    if not {0, 1} & set(transform.axes):
        return f'axes = {transform.axes}: a slice has the axes 0 and 1'
    return _checkInterpolation(transform)


def _drawAnisotropy(transform, count, noImages, generator):
    """Gives groups 1 and 2, the axis plus one, and values (n,): by how much it is coarsened."""
    axes = torch.tensor([axis for axis in transform.axes if axis != 2])
    chosen = axes[torch.randint(len(axes), (count,), generator=generator)]
    return chosen + 1, _uniform(transform.downsampling_range, count, generator)


def _applyAnisotropy(transform, image, label, group, values, generator):
    """Every m-th pixel about the middle is kept, then read back; the coarse grid's outer half pixels end it in 0."""
    length = (label if image is None else image).shape[group - 3]
    factor = values.double()[:, None]
    noKept = (length / factor).floor()
    start = (length - 1 - (noKept - 1) * factor) / 2
    place = (torch.arange(length) - start) / factor  # (n, L), on the coarse grid
    inside = ((place >= -0.5) & (place < noKept - 0.5)).float()

    def read(each, places):
        kept = torch.minimum(places.clamp(min=0), noKept - 1)
        return _readAlong(each, (start + kept * factor + 0.5).floor().long(), group)

    def spread(table, like):
        table = table[:, None, :, None] if group == 1 else table[:, None, None]
        return _send(table, like.device).to(like.dtype)

    nearest = (place + 0.5).floor()
    if image is not None and transform.image_interpolation == 'nearest':
        image = read(image, nearest) * spread(inside, image)
    elif image is not None:
        weight = spread((place - place.floor()).float(), image)
        image = torch.lerp(read(image, place.floor()), read(image, place.floor() + 1), weight) * spread(inside, image)
    if label is None or transform.scalars_only:
        return image, None
    return image, (read(label[:, None], nearest) * spread(inside, label))[:, 0]


def _readAlong(image, index, group):
    """Gives images (n, C, H, W) whose rows (group 1) or columns (2) are those of `index` (n, L), on the host."""
    index = _send(index, image.device)
    if group == 2:
        return image.gather(3, index[:, None, None].expand(image.shape))
    first = torch.arange(0, image.shape[:3].numel(), image.shape[2], device=image.device).view(*image.shape[:2], 1)
    return image.flatten(0, 2).index_select(0, (first + index[:, None]).flatten()).view(image.shape)


# Intensity


def _mask(transform, values):
    """Gives the bool mask of images (n, C, H, W), or labels (n, H, W), of the transform's masking method."""
    method = transform.masking_method
    if method is None:
        return torch.ones_like(values, dtype=torch.bool)
    if callable(method):
        each = values.flatten(0, -3)[:, None, ..., None]  # (images, 1, H, W, 1): what torchio shows the function
        return torch.vmap(method)(each).view(values.shape)
    mask = transform.get_mask_from_masking_method(method, (), torch.empty(1, *values.shape[-2:], 1))
    return _send(mask[0, ..., 0], values.device).expand(values.shape)


def _checkMask(transform):
    if transform.masking_method == 'y':
        return "masking_method = 'y': a function or a side of the image is known"
    try:
        mask = _mask(transform, torch.arange(2 * 64).view(2, 8, 8) * (1 if type(transform) is tio.RemapLabels else 0.5))
    except Exception as error:  # whatever a user's function raises
        return f'masking_method = {transform.masking_method} cannot be mapped over a batch ({error})'
    return None if mask.dtype == torch.bool else f'masking_method = {transform.masking_method} does not give bool'


def _drawNothing(transform, count, noImages, generator):
    return _ones(count), torch.zeros(count, 0)


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
    return _ones(count), torch.stack([_uniform(each, (count, noImages), generator) for each in bounds], -1)


def _applyNoise(transform, image, label, group, values, generator):
    mean, std = _send(values, image.device)[..., None, None].unbind(2)  # each (n, C, 1, 1)
    noise = torch.randn(image.shape, generator=generator, device=image.device)
    return noise.mul_(std).add_(mean).add_(image), None


def _drawBias(transform, count, noImages, generator):
    """Gives values (n, C, K): coefficients of x^i y^j, i outermost; those of depth meet zeros on a single slice."""
    noTerms = (transform.order + 1) * (transform.order + 2) // 2
    return _ones(count), _uniform(transform.coefficients_range, (count, noImages, noTerms), generator)


def _applyBias(transform, image, label, group, values, generator):
    degrees = torch.arange(transform.order + 1)
    table = torch.zeros(*values.shape[:2], len(degrees), len(degrees))
    table[..., degrees[:, None] + degrees <= transform.order] = values
    powers = []
    for length in image.shape[2:]:
        place = torch.arange(length) - (length - 1) / 2  # the middle is 0, the last pixel 1
        powers.append((place / max((length - 1) / 2, 1))[:, None] ** degrees)
    table, rows, columns = (_send(each, image.device) for each in (table, *powers))
    return (rows @ (table @ columns.T)).exp_().mul_(image), None


# Shape and labels

_PAD_VALUES = {
    'minimum': lambda images: images.amin(2),
    'maximum': lambda images: images.amax(2),
    'mean': lambda images: images.float().mean(2),
    'median': lambda images: images.float().quantile(0.5, 2),
}


def _checkCropOrPad(transform):
    mode = transform.padding_mode
    if transform.mask_name is not None:
        return f'mask_name = {transform.mask_name!r}: the shape would depend on the sample'
    if transform.location != 'center':
        return f'location = {transform.location!r}: center is known'
    if not isinstance(mode, (int, float)) and mode not in (*_PAD_VALUES, 'edge', 'reflect', 'symmetric', 'wrap'):
        return f'padding_mode = {mode!r} is not known'
    depth = transform.target_shape[2]
    if depth is not None and not transform.only_crop and round(depth * (10 if transform.units == 'cm' else 1)) != 1:
        return f'target_shape = {transform.target_shape}: a slice has depth 1'
    return None


@functools.lru_cache
def _sources(transform, height, width):
    """Gives, for each pixel of CropOrPad's result, the flat index of the pixel it comes from; -1 where it is padding.

    torchio itself says so, of an image that holds the indices; what it draws to decide nothing is not felt outside.
    """
    index = torch.arange(height * width).view(1, height, width, 1)
    transform = copy.copy(transform)
    transform.include = transform.exclude = None
    if transform.padding_mode not in ('edge', 'reflect', 'symmetric', 'wrap'):
        transform.padding_mode = -1
    with torch.random.fork_rng(devices=[]):
        return transform.apply_transform(tio.Subject(x=tio.ScalarImage(tensor=index))).x.data[0, ..., 0].long()


def _applyCropOrPad(transform, image, label, group, values, generator):
    image = None if image is None else _cropOrPad(transform, image)
    return image, None if label is None else _cropOrPad(transform, label[:, None])[:, 0]


def _cropOrPad(transform, images):
    """Crops and pads images (n, C, H, W), each by its own values."""
    sources = _sources(transform, *images.shape[2:])
    if sources.shape == images.shape[2:]:
        return images
    flat, isPadding = images.flatten(2), _send(sources < 0, images.device)
    new = flat.index_select(2, _send(sources.clamp(min=0).flatten(), images.device)).unflatten(2, sources.shape)
    mode = transform.padding_mode
    if mode in _PAD_VALUES:
        return torch.where(isPadding, _PAD_VALUES[mode](flat).to(images.dtype)[..., None, None], new)
    return new if isinstance(mode, str) else new.masked_fill_(isPadding, mode)


def _checkRemap(transform):
    if any(new % 1 for new in transform.remapping.values()):
        return f'remapping = {transform.remapping}: a class is a whole number'
    return _checkMask(transform)


def _applyRemap(transform, image, label, group, values, generator):
    new, mask = label, _mask(transform, label)
    for old, wanted in transform.remapping.items():
        new = new.masked_fill(mask & (label == old), int(wanted))
    return None, new


class _Kind(NamedTuple):
    check: callable  # (transform) -> why it cannot be honoured, or None
    draw: callable  # (transform, count, images, generator) -> group (n,), 0: leave as it is; values (n, ...)
    apply: callable  # (transform, image, label, group, values, generator of noise) -> image, label; either may be None
    onImages: bool = True
    onLabels: bool = False


_KINDS = {
    tio.RandomFlip: _Kind(_checkFlip, _drawFlip, _applyFlip, onLabels=True),
    tio.RandomAffine: _Kind(_checkAffine, _drawAffine, _applyAffine, onLabels=True),
    tio.RandomAnisotropy: _Kind(_checkAnisotropy, _drawAnisotropy, _applyAnisotropy, onLabels=True),
    tio.RandomElasticDeformation: _Kind(_checkInterpolation, _drawElastic, _applyElastic, onLabels=True),
    tio.RescaleIntensity: _Kind(_checkMask, _drawNothing, _applyRescale),
    StretchHistogram: _Kind(_checkMask, _drawNothing, _applyRescale),
    tio.RandomNoise: _Kind(lambda transform: None, _drawNoise, _applyNoise),
    tio.RandomBiasField: _Kind(lambda transform: None, _drawBias, _applyBias),
    tio.CropOrPad: _Kind(_checkCropOrPad, _drawNothing, _applyCropOrPad, onLabels=True),
    tio.RemapLabels: _Kind(_checkRemap, _drawNothing, _applyRemap, onImages=False, onLabels=True),
}
