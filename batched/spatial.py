"""Run torchio's spatial transforms on a batch: they change where each pixel of the result comes from."""

import functools

import torch
import torchio as tio
from torch.nn.functional import grid_sample

from batched.operation import Operation, checkParameters, drawNothing, oneGroup, toDevice, uniform


def _checkAxes(transform):
    if not set(transform.axes) <= {0, 1}:
        return f'axes = {transform.axes}, only the numbers 0 and 1, the axes of a slice, are supported'
    return None


# Flip


def _drawFlip(transform, numSamples, numChannels, generator):
    """Draw the groups: 0 for no flip, plus 1 for a flip along the first axis, plus 2 along the second."""
    isFlipped = torch.rand(numSamples, 2, generator=generator) < transform.flip_probability
    groups = torch.zeros(numSamples, dtype=torch.int64)
    for axis in set(transform.axes):
        groups += isFlipped[:, axis].long() << axis
    return groups, isFlipped


def _applyFlip(transform, image, label, group, values, generator):
    axes = [axis - 2 for axis in (0, 1) if group >> axis & 1]
    return tuple(None if each is None else each.flip(axes) for each in (image, label))


# Affine and elastic: find where each pixel comes from, then read there


def _resample(image, label, row, column, labelFill):
    """Read images (linear) and label maps (nearest) at the coordinates `row` and `column`, float (n, H, W), in pixels.

    As in ITK, an image continues with its edge value for half a pixel beyond the outermost pixel centers. Further out
    are the image's minimum and `labelFill`.
    """
    height, width = row.shape[1:]
    # halves round up, as in ITK; grid_sample's nearest mode would round them to even
    wanted = (row + 0.5).floor_(), (column + 0.5).floor_()
    nearest = wanted[0].clamp(0, height - 1), wanted[1].clamp(0, width - 1)
    # 1 inside, 0 outside; as numbers, because comparing and selecting take several times longer on a CPU
    inside = 1 - ((wanted[0] - nearest[0]).abs_() + (wanted[1] - nearest[1]).abs_()).clamp_(max=1)
    if label is not None:
        index = (nearest[0] * width + nearest[1]).long().flatten(1)
        read = label.flatten(1).gather(1, index).view_as(label)
        # unsigned differences may wrap around, the sum wraps them back
        label = (read - labelFill) * inside.to(label.dtype) + labelFill
    if image is not None:
        grid = torch.stack([(2 * column + 1) / width - 1, (2 * row + 1) / height - 1]).movedim(0, -1)
        read = grid_sample(image, grid, padding_mode='border', align_corners=False)
        image = torch.lerp(image.amin((2, 3), keepdim=True), read, inside[:, None])
    return image, label


def _checkAffine(transform):
    return checkParameters(
        transform,
        translation=(0,) * 6,
        isotropic=False,
        center='image',
        default_pad_value='minimum',
        default_pad_label=0,
        image_interpolation='linear',
        label_interpolation='nearest',
    )


def _drawAffine(transform, numSamples, numChannels, generator):
    """Draw values (n, 3): the scales along both axes, and the rotation in degrees."""
    bounds = transform.scales[:2], transform.scales[2:4], transform.degrees[4:]
    values = torch.stack([uniform(each, numSamples, generator) for each in bounds], 1)
    torch.rand(2, numSamples, generator=generator)  # in place of a translation, so that old runs can be reproduced
    return oneGroup(numSamples), values


def _applyAffine(transform, image, label, group, values, generator):
    """Fill pixel p of the result from pixel R^T (p - c) / s + c, where c is the center."""
    like = label if image is None else image[:, 0]
    height, width = like.shape[1:]
    scales, angle = values[:, :2].double(), values[:, 2].double().deg2rad()
    cos, sin = angle.cos(), angle.sin()
    back = torch.stack([torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1)], 1)  # (n, 2, 2)
    matrix = back / scales[:, None]
    center = torch.tensor([(height - 1) / 2, (width - 1) / 2]).double()
    table = torch.cat([matrix.flatten(1), center - matrix @ center], 1).float()
    a, b, c, d, e, f = toDevice(table, like.device)[:, :, None, None].unbind(1)  # each (n, 1, 1)
    rows = torch.arange(height, device=like.device)[:, None]
    columns = torch.arange(width, device=like.device)
    row, column = a * rows + e + b * columns, c * rows + f + d * columns  # (n, H, W)
    return _resample(image, label, row, column, 0)


def _checkElastic(transform):
    return checkParameters(transform, image_interpolation='linear', label_interpolation='nearest')


def _drawElastic(transform, numSamples, numChannels, generator):
    """Draw values (n, nx, ny, nz, 2): the displacement of each control point along both axes, in pixels."""
    points = torch.rand(numSamples, *transform.num_control_points, 2, generator=generator) * 2 - 1
    points *= torch.tensor(transform.max_displacement[:2], dtype=torch.float32)
    for border in range(transform.num_locked_borders):
        for end in (border, -1 - border):
            points[:, end] = 0
            points[:, :, end] = 0
    return oneGroup(numSamples), points


def _applyElastic(transform, image, label, group, values, generator):
    """Displace by cubic B-splines; ITK's order of control points, and its displacements, run against both axes."""
    like = label if image is None else image[:, 0]
    height, width = like.shape[1:]
    sides = zip((height, width, 1), values.shape[1:4], strict=True)
    rows, columns, depth = (_splines(length, number) for length, number in sides)
    points = torch.einsum('nabck,c->nabk', values.flip(1, 2), depth[0])  # a slice lies in the middle of the mesh
    points, rows, columns = (toDevice(each, like.device) for each in (points, rows, columns))
    shift = torch.einsum('ha,nabk,wb->nkhw', rows, points, columns)
    row = torch.arange(height, device=like.device)[:, None] - shift[:, 0]
    column = torch.arange(width, device=like.device) - shift[:, 1]
    return _resample(image, label, row, column, None if label is None else label.amin((1, 2), True))


@functools.cache
def _splines(length, numPoints):
    """Return the weights (length, numPoints) of control points at pixel centers, by uniform cubic B-splines.

    The mesh covers the pixels and an eighth of a pixel more at each end.

    Reference: itk::BSplineTransformInitializer.
    """
    numCells = numPoints - 3
    place = (torch.arange(length).double() + 0.625) / (length + 0.25) * numCells
    cell = place.floor()
    t = place - cell
    pieces = [(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]
    weights = torch.zeros(length, numPoints, dtype=torch.float64)
    return weights.scatter(1, cell.long()[:, None] + torch.arange(4), torch.stack(pieces, 1) / 6).float()


# Anisotropy


def _checkAnisotropy(transform):
    return _checkAxes(transform) or checkParameters(transform, image_interpolation='linear', scalars_only=True)


def _drawAnisotropy(transform, numSamples, numChannels, generator):
    """Draw the groups, 1 for the first axis and 2 for the second, and values (n,): the downsampling factor."""
    axes = torch.tensor(transform.axes)
    chosen = axes[torch.randint(len(axes), (numSamples,), generator=generator)]
    return chosen + 1, uniform(transform.downsampling_range, numSamples, generator)


def _applyAnisotropy(transform, image, label, group, values, generator):
    """Keep the nearest pixels of a coarse grid about the center, and read between them linearly.

    As in ITK, the result is 0 more than half a coarse pixel beyond the outermost coarse pixel centers.
    """
    length = image.shape[group - 3]
    factor = values.double()[:, None]
    numKept = (length / factor).floor()
    start = (length - 1 - (numKept - 1) * factor) / 2
    place = (torch.arange(length) - start) / factor  # (n, L), in coarse pixels

    def read(places):
        kept = torch.minimum(places.clamp(min=0), numKept - 1)
        return _readAlong(image, (start + kept * factor + 0.5).floor().long(), group)

    def spread(table):
        return toDevice(table.float()[:, None, :, None] if group == 1 else table.float()[:, None, None], image.device)

    first = place.floor()
    inside = (place >= -0.5) & (place < numKept - 0.5)
    return torch.lerp(read(first), read(first + 1), spread(place - first)) * spread(inside), None


def _readAlong(image, index, group):
    """Return images (n, C, H, W) made of their rows (group 1) or columns (2) `index`, (n, L) on the host."""
    index = toDevice(index, image.device)
    if group == 2:
        return image.gather(3, index[:, None, None].expand(image.shape))
    first = torch.arange(0, image.shape[:3].numel(), image.shape[2], device=image.device).view(*image.shape[:2], 1)
    return image.flatten(0, 2).index_select(0, (first + index[:, None]).flatten()).view(image.shape)


# Shape


def _checkCropOrPad(transform):
    if transform.target_shape is not None and (None in transform.target_shape or transform.target_shape[2] != 1):
        return f'target_shape = {transform.target_shape}, only (H, W, 1) is supported'
    supported = {'mask_name': None, 'location': 'center', 'units': 'voxels', 'only_crop': False, 'only_pad': False}
    return checkParameters(transform, padding_mode='minimum', **supported)


def _applyCropOrPad(transform, image, label, group, values, generator):
    height, width, _ = transform.target_shape
    return _cropOrPad(image, (height, width)), _cropOrPad(label, (height, width))


def _cropOrPad(images, shape):
    """Return images (..., H, W) cropped or padded to a shape about their center, each padded with its own minimum."""
    if images.shape[-2:] == shape:
        return images
    padded = images.amin((-2, -1), keepdim=True).expand(*images.shape[:-2], *shape).clone()
    source, target = [...], [...]
    for old, new in zip(images.shape[-2:], shape, strict=True):
        kept = min(old, new)
        # of an odd number of pixels, one more is removed or added at the start
        source.append(slice((old - kept + 1) // 2, (old - kept + 1) // 2 + kept))
        target.append(slice((new - kept + 1) // 2, (new - kept + 1) // 2 + kept))
    padded[tuple(target)] = images[tuple(source)]
    return padded


OPERATIONS = {
    tio.RandomFlip: Operation(_checkAxes, _drawFlip, _applyFlip, onLabels=True),
    tio.RandomAffine: Operation(_checkAffine, _drawAffine, _applyAffine, onLabels=True),
    tio.RandomAnisotropy: Operation(_checkAnisotropy, _drawAnisotropy, _applyAnisotropy),
    tio.RandomElasticDeformation: Operation(_checkElastic, _drawElastic, _applyElastic, onLabels=True),
    tio.CropOrPad: Operation(_checkCropOrPad, drawNothing, _applyCropOrPad, onLabels=True),
}
