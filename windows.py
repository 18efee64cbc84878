"""Predict the slices of a volume in windows, and average probabilities where windows overlap."""

import torch
from torch.nn.functional import normalize

import config
from recipe import autocast
from volumes import groupWindows


def predictSlices(x, isBrain, starts, size, predictBatch):
    """Yield the numbers (S,) and probabilities (S, K, H, W) of a few slices at a time, for all slices with brain.

    Slices are grouped until their windows with brain fill a batch, so memory does not grow with the patient.

    Args:
        x: (D, C, H, W), on the device of the model.
        isBrain: bool (D, H, W), on the CPU.
        starts: (row, column) of each window.
        size: height and width of a window.
        predictBatch: takes patches (B, C, height, width) and returns their probabilities (B, K, height, width).
    """
    (height, width), lowest = size, x.amin((0, 2, 3))
    batchSize = max(1, config.PREDICT_BATCH * config.PATCH_SIZE**2 // (height * width))
    for group in groupWindows(isBrain.numpy(), starts, size, batchSize):
        yield _averageWindows(x, group, lowest, size, batchSize, predictBatch)


def _averageWindows(x, windows, lowest, size, batchSize, predictBatch):
    """Return the slices of some windows and their probabilities, a weighted mean where windows overlap."""
    (height, width), shape, device = size, x.shape[2:], x.device
    slices = sorted({number for number, _, _ in windows})
    padded = [max(max(window[axis] + size[axis - 1] for window in windows), shape[axis - 1]) for axis in (1, 2)]
    # windows may reach beyond the image: there is background, which is the lowest value
    image = lowest[None, :, None, None].repeat(len(slices), 1, *padded)
    image[:, :, : shape[0], : shape[1]] = x[slices]
    weight = _gaussian(height, width).to(device)
    total = torch.zeros(len(slices), config.NO_CLASSES, *padded, device=device)
    weights = torch.zeros(len(slices), 1, *padded, device=device)
    for first in range(0, len(windows), batchSize):
        places = [
            (slices.index(number), slice(row, row + height), slice(column, column + width))
            for number, row, column in windows[first : first + batchSize]
        ]
        patches = torch.stack([image[number, :, rows, columns] for number, rows, columns in places])
        for (number, rows, columns), values in zip(places, predictBatch(patches), strict=True):
            total[number, :, rows, columns] += weight * values
            weights[number, :, rows, columns] += weight
    total /= weights.clamp_min(torch.finfo(torch.float32).tiny)
    total[:, :1] += weights == 0  # what no window covers is background
    return slices, total[:, :, : shape[0], : shape[1]]


def _gaussian(height, width):
    """Return the weights of a window's pixels (H, W): a Gaussian, 1 in the middle, sigma an eighth of the side.

    Reference:
        The weights of nnU-Net and of MONAI's `SlidingWindowInferer`, including the minimum of 1e-3.
    """
    sides = []
    for length in (height, width):
        offset = torch.arange(length) - (length - 1) / 2
        sides.append(torch.exp(-(offset**2) / (2 * (length / 8) ** 2)))
    return torch.outer(*sides).clamp_min(1e-3)


def predictPatches(model, patches, mirror, activation):
    """Return probabilities float32 (B, K, H, W) of patches (B, C, H, W).

    Args:
        mirror: average over the four flips.
        activation: 'softmax', or 'sigmoid' for a model of a one-vs-rest loss.
    """
    patches = patches.contiguous(memory_format=torch.channels_last)
    flips = [(), (2,), (3,), (2, 3)] if mirror else [()]
    total = 0
    for axes in flips:
        with autocast(patches.device):
            logits = model(patches.flip(axes) if axes else patches)
        logits = (logits.flip(axes) if axes else logits).float()
        # the sigmoids of a one-vs-rest loss need not sum to 1
        total = total + (normalize(logits.sigmoid(), 1, 1) if activation == 'sigmoid' else logits.softmax(1))
    return total / len(flips)
