"""Define what an operation on a batch is, and provide what several operations need."""

from collections.abc import Callable
from typing import NamedTuple

import torch


class Operation(NamedTuple):
    """One torchio transform, computed for many samples at once.

    Attributes:
        check: (transform) -> why the transform is not supported, or None.
        draw: (transform, numSamples, numChannels, generator) -> groups, int64 (n,), and values, (n, ...), both on the
            host. Samples of one group are computed together; those of group 0 stay as they are.
        apply: (transform, image, label, group, values, generator) -> image, label. Either is None if the transform does
            not cover it. The generator is the one for noise, on the batch's device.
        onImages, onLabels: whether torchio applies the transform to images, and to label maps.
    """

    check: Callable
    draw: Callable
    apply: Callable
    onImages: bool = True
    onLabels: bool = False


def checkParameters(transform, **supported):
    """Return why a transform is not supported: its first parameter that has another value than the given one, or None.

    A parameter that this version of torchio does not have yet is supported.
    """
    for name, expected in supported.items():
        found = getattr(transform, name, expected)
        if found != expected:
            return f'{name} = {found!r}, only {expected!r} is supported'
    return None


def toDevice(tensor, device):
    """Copy a small tensor from the host to a device without waiting for the device."""
    if device.type == 'cuda':
        tensor = tensor.pin_memory()  # a copy from pageable memory would wait
    return tensor.to(device, non_blocking=True)


def uniform(bounds, shape, generator):
    """Draw float32 numbers of a shape, uniform between two bounds."""
    low, high = bounds
    return torch.rand(shape, generator=generator) * (high - low) + low


def oneGroup(numSamples):
    """Return group 1 for every sample."""
    return torch.ones(numSamples, dtype=torch.int64)


def drawNothing(transform, numSamples, numChannels, generator):
    """Return one group, and no values: the `draw` of a transform without chance."""
    return oneGroup(numSamples), torch.zeros(numSamples, 0)
