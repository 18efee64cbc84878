"""Run torchio's transforms on a whole batch at once, on the batch's device."""

import re
from dataclasses import dataclass

import torch
import torchio as tio

from batched import intensity, spatial
from batched.operation import toDevice

OPERATIONS = spatial.OPERATIONS | intensity.OPERATIONS


class Batched:
    """A torchio transform that takes a batch of slices.

    It draws from the same distributions as torchio and computes all samples with the same transform together. A sample
    with C channels stands for a `tio.Subject` with the images `x1` to `xC` and the label map `y`, each of depth 1. As
    in torchio, spatial parameters are drawn once per sample, and intensity parameters once per sample and channel;
    what concerns the third axis alone has no effect on a slice.

    All choices are drawn on the CPU, and no shape depends on pixel values, so the CPU never waits for the device.
    `torch.compile` skips the call (a graph break), because group sizes differ from batch to batch, and each new size
    would be compiled again.

    Args:
        transform: RandomFlip, RandomAffine, RandomAnisotropy, RandomElasticDeformation, CropOrPad, RescaleIntensity,
            `transforms.StretchHistogram`, RandomNoise, RandomBiasField, `transforms.RandomContrast` or RemapLabels, or
            a Compose or OneOf of them, nested in any way. Numbers and ranges are free. Modes have to be torchio's
            defaults, but for CropOrPad's `padding_mode = 'minimum'`. `axes` are 0 and 1, a `masking_method` is a
            function that `torch.vmap` can map over images, and each transform covers all images or none.
        generator: torch.Generator on the CPU from which each call draws its seed. None: torch's global one, whose state
            is part of a checkpoint.

    Raises:
        ValueError: if a transform, or one of its parameters, is not supported. The error names it.
    """

    def __init__(self, transform, generator=None):
        if generator is not None and generator.device.type != 'cpu':
            raise ValueError(f'The generator is on {generator.device}; expected one on the CPU.')
        _check(transform)
        self.transform, self.generator = transform, generator

    @torch.compiler.disable
    @torch.no_grad()
    def __call__(self, image, label):
        """Return the transformed batch, and leave the given one unchanged.

        Args:
            image: float (B, C, H, W), of any float dtype.
            label: integer (B, H, W), on the same device.

        Returns:
            image: float32 (B, C, H', W'). Only CropOrPad changes the shape.
            label: (B, H', W'), in its own dtype.

        Raises:
            ValueError: if a shape or dtype differs, or if a transform covers only some of the images.
        """
        isValid = image.ndim == 4 and label.shape == (len(image), *image.shape[2:])
        if not isValid or not image.is_floating_point() or label.is_floating_point():
            raise ValueError(
                f'Got image {image.dtype} {tuple(image.shape)} and label {label.dtype} {tuple(label.shape)}; '
                'expected float (B, C, H, W) and integer (B, H, W).'
            )
        _checkChannels(self.transform, image.shape[1])
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
    host: torch.Generator  # for parameters
    device: torch.Generator  # for noise


def _run(transform, batch, rows):
    """Apply a transform and its children to the samples `rows`, int64 on the host, of a batch, in place."""
    if transform.probability < 1:
        rows = rows[torch.rand(len(rows), generator=batch.host) < transform.probability]
    if len(rows) == 0:
        return
    children = _children(transform)
    if type(transform) is tio.OneOf:
        weights = torch.tensor(list(transform.transforms_dict.values()))
        chosen = torch.multinomial(weights, len(rows), replacement=True, generator=batch.host)
        for number, child in enumerate(children):
            _run(child, batch, rows[chosen == number])
    elif type(transform) is tio.Compose:
        for child in children:
            _run(child, batch, rows)
    else:
        _runOperation(transform, batch, rows)


def _runOperation(transform, batch, rows):
    """Draw the parameters of a transform for some samples, and transform the samples of each group together."""
    operation, numChannels = OPERATIONS[type(transform)], batch.image.shape[1]
    onImages = operation.onImages and _coversImages(transform, numChannels)
    onLabels = operation.onLabels and _covers(transform, 'y')
    if not onImages and not onLabels:
        return
    groups, values = operation.draw(transform, len(rows), numChannels, batch.host)
    for group in sorted(set(groups.tolist()) - {0}):
        members = groups == group
        isWhole = len(rows) == len(batch.image) and bool(members.all())
        where = None if isWhole else toDevice(rows[members], batch.image.device)
        image = _take(batch.image, where) if onImages else None
        label = _take(batch.label, where) if onLabels else None
        image, label = operation.apply(transform, image, label, group, values[members], batch.device)
        batch.image, batch.label = _put(batch.image, where, image), _put(batch.label, where, label)


def _take(whole, where):
    """Return the samples `where` of a tensor; None means all."""
    return whole if where is None else whole.index_select(0, where)


def _put(whole, where, part):
    """Return `whole` with its samples `where` replaced by `part`, which is None if nothing changed."""
    if part is None or where is None:
        return whole if part is None else part
    return whole.index_copy_(0, where, part)


# What a transform covers, and which transforms are supported


def _children(transform):
    if type(transform) is tio.OneOf:
        return list(transform.transforms_dict)
    return transform.transforms if type(transform) is tio.Compose else []


def _covers(transform, name):
    """Return whether `include` and `exclude` of a transform cover an image or label map."""
    isIncluded = transform.include is None or name in transform.include
    return isIncluded and (transform.exclude is None or name not in transform.exclude)


def _coversImages(transform, numChannels):
    """Return whether a transform covers the images `x1` to `xC`; raise ValueError if it covers only some of them."""
    covered = {_covers(transform, f'x{number}') for number in range(1, numChannels + 1)}
    if len(covered) == 2:
        raise ValueError(
            f'{type(transform).__name__} covers only some of the images x1 to x{numChannels} '
            f'(include = {transform.include}, exclude = {transform.exclude}); expected all or none.'
        )
    return True in covered


def _checkChannels(transform, numChannels):
    """Raise ValueError if a transform or one of its children covers only some of the images `x1` to `xC`."""
    for child in _children(transform):
        _checkChannels(child, numChannels)
    if type(transform) in OPERATIONS and OPERATIONS[type(transform)].onImages:
        _coversImages(transform, numChannels)


def _check(transform, meetsAll=True):
    """Raise ValueError if a transform, or one of its children, is not supported.

    Args:
        transform: torchio transform.
        meetsAll: whether every sample of a batch meets this transform.
    """
    isNest = type(transform) in (tio.Compose, tio.OneOf)
    if not isNest and type(transform) not in OPERATIONS:
        supported = ', '.join(each.__name__ for each in (tio.Compose, tio.OneOf, *OPERATIONS))
        raise ValueError(f'{type(transform).__name__} is not supported by Batched; supported are {supported}.')
    meetsAll = meetsAll and transform.probability == 1
    reason = None
    if transform.keep is not None:
        reason = f'keep = {transform.keep!r}, only None is supported, as a batch has no place for copies'
    elif not isNest:
        reason = _checkKeys(transform, meetsAll) or OPERATIONS[type(transform)].check(transform)
    if reason:
        raise ValueError(f'{type(transform).__name__}: {reason}.')
    for child in _children(transform):
        _check(child, meetsAll and type(transform) is tio.Compose)


def _checkKeys(transform, meetsAll):
    """Return why a transform does not cover what a batch needs it to cover, or None; raise as `_coversImages`."""
    named = [*(transform.include or ()), *(transform.exclude or ())]
    if OPERATIONS[type(transform)].onImages:
        _coversImages(transform, max((int(name[1:]) for name in named if re.fullmatch(r'x\d+', name)), default=0))
    labels = transform.label_keys or ()
    if any(re.fullmatch(r'x\d+', key) for key in labels):
        return f'label_keys = {labels}, only y is a label map'
    if 'y' in (transform.include or ()) and 'y' not in labels:
        return 'include names y, but label_keys does not, so torchio would transform the label map as an image'
    if type(transform) is tio.CropOrPad and not meetsAll:
        return 'with p < 1 or in a OneOf, the samples of a batch would differ in shape'
    if type(transform) is tio.CropOrPad and not (_covers(transform, 'x1') and _covers(transform, 'y')):
        return 'images and label map would differ in shape, expected a transform that covers both'
    return None
