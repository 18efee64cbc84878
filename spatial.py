"""Run torchio's spatial transforms on a batch: where each pixel of the result comes from."""

import copy
import functools

import torch
import torchio as tio
from torch.nn.functional import grid_sample

from kinds import Kind, drawNothing, ones, send, uniform


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
    return sum(isFlipped[:, axis].long() << axis for axis in _flipAxes(transform)) + 0 * ones(count), isFlipped


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
    values = torch.stack([uniform(each, count, generator) for each in bounds], 1)
    if transform.isotropic:
        values[:, 1] = values[:, 0]
    return ones(count), values


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
    a, b, c, d, e, f = send(table, like.device)[:, :, None, None].unbind(1)  # each (n, 1, 1)
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
    return ones(count) * any(transform.max_displacement), points


def _applyElastic(transform, image, label, group, values, generator):
    """Control points lie in ITK's order, against both axes of the slice, and so do their displacements."""
    like = label if image is None else image[:, 0]
    height, width = like.shape[1:]
    sides = zip((height, width, 1), values.shape[1:4], strict=True)
    rows, columns, depth = (_splines(length, number) for length, number in sides)
    points = torch.einsum('nabck,c->nabk', values.flip(1, 2), depth[0])  # a single slice lies amid the mesh
    points, rows, columns = (send(each, like.device) for each in (points, rows, columns))
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
    return chosen + 1, uniform(transform.downsampling_range, count, generator)


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
        return send(table, like.device).to(like.dtype)

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
    index = send(index, image.device)
    if group == 2:
        return image.gather(3, index[:, None, None].expand(image.shape))
    first = torch.arange(0, image.shape[:3].numel(), image.shape[2], device=image.device).view(*image.shape[:2], 1)
    return image.flatten(0, 2).index_select(0, (first + index[:, None]).flatten()).view(image.shape)


# Shape

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
    flat, isPadding = images.flatten(2), send(sources < 0, images.device)
    new = flat.index_select(2, send(sources.clamp(min=0).flatten(), images.device)).unflatten(2, sources.shape)
    mode = transform.padding_mode
    if mode in _PAD_VALUES:
        return torch.where(isPadding, _PAD_VALUES[mode](flat).to(images.dtype)[..., None, None], new)
    return new if isinstance(mode, str) else new.masked_fill_(isPadding, mode)


KINDS = {
    tio.RandomFlip: Kind(_checkFlip, _drawFlip, _applyFlip, onLabels=True),
    tio.RandomAffine: Kind(_checkAffine, _drawAffine, _applyAffine, onLabels=True),
    tio.RandomAnisotropy: Kind(_checkAnisotropy, _drawAnisotropy, _applyAnisotropy, onLabels=True),
    tio.RandomElasticDeformation: Kind(_checkInterpolation, _drawElastic, _applyElastic, onLabels=True),
    tio.CropOrPad: Kind(_checkCropOrPad, drawNothing, _applyCropOrPad, onLabels=True),
}
