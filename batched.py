"""Runs torchio's transforms on a whole batch at once, on the model's device."""

from dataclasses import dataclass

import torch
import torchio as tio

import intensity
import spatial
from kinds import send


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
            RescaleIntensity, `transforms.StretchHistogram`, RandomNoise, RandomBiasField, CropOrPad or RemapLabels,
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
        where = None if isWhole else send(rows[here], batch.image.device)
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


_KINDS = spatial.KINDS | intensity.KINDS
