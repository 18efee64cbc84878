"""What the transforms that `batched` runs have in common."""

from typing import NamedTuple

import torch


class Kind(NamedTuple):
    check: callable  # (transform) -> why it cannot be honoured, or None
    draw: callable  # (transform, count, images, generator) -> group (n,), 0: leave as it is; values (n, ...)
    apply: callable  # (transform, image, label, group, values, generator of noise) -> image, label; either may be None
    onImages: bool = True
    onLabels: bool = False


def send(tensor, device):
    """Copies a small tensor from the host to a device without waiting for the device."""
    if device.type == 'cuda':
        tensor = tensor.pin_memory()  # from pageable memory the copy would wait
    return tensor.to(device, non_blocking=True)


def uniform(bounds, shape, generator):
    low, high = bounds
    return torch.rand(shape, generator=generator) * (high - low) + low


def ones(count):
    return torch.ones(count, dtype=torch.int64)


def drawNothing(transform, count, noImages, generator):
    return ones(count), torch.zeros(count, 0)
