"""Stretch the histogram of a volume to the range that the network sees."""

import numpy as np
import torch
import torchio as tio

from patients import alongMemory


def maskFunction(x):
    """Gives the brain mask of an image tensor: bool of its shape, True where it is not background (0)."""
    return x != 0


class StretchHistogram(tio.RescaleIntensity):
    """torchio's RescaleIntensity, but what the mask leaves out gets the lower end of the range.

    Inside the mask the result is RescaleIntensity's. Outside, the plain class maps background like any other intensity:
    to somewhere inside the range where the brain has negative ones. An image with an empty mask, or with one value in
    all of it, becomes the lower end everywhere; the plain class would leave its intensities as they are.
    """

    def rescale(self, tensor, mask, image_name):
        turn, turnBack = alongMemory(tensor.numpy())
        array, mask = turn(tensor.numpy()), turn(mask.numpy())
        values = array[mask]
        stretched = np.full(array.shape, self.out_min, np.float32)
        stretched[mask] = self.stretch(values, *self.findLimits(values))
        return torch.from_numpy(turnBack(stretched))

    def findLimits(self, values):
        """Gives the two intensities that become the ends of the range, of the intensities (N,) inside the mask."""
        if self.in_min_max is not None:
            return self.in_min_max
        return tuple(_percentile(values, percentile) if values.size else 0 for percentile in self.percentiles)

    def stretch(self, values, low, high):
        """Gives float32 intensities with `low` and what is below at the range's lower end, `high` at its upper end."""
        if not high > low:
            return np.full(values.shape, self.out_min, np.float32)
        stretched = values.astype(np.float32)
        np.clip(stretched, low, high, out=stretched)
        stretched -= low
        stretched *= (self.out_max - self.out_min) / (high - low)
        stretched += self.out_min
        return stretched


def _percentile(values, percentile):
    """Gives what `np.percentile` gives of values (N,), in a fifth of the time: only the tail it lies in is sorted."""
    place = percentile / 100 * (len(values) - 1)
    first = int(place)
    sample = np.sort(values[:: len(values) // 4096 + 1])  # tells about where the tail ends, with room to spare
    room = int(0.5 + len(sample) * (0.01 + 0.5 * min(percentile, 100 - percentile) / 100))
    middle = int(percentile / 100 * (len(sample) - 1))
    if percentile < 50:
        tail, first = values[values <= sample[min(middle + room, len(sample) - 1)]], first
    else:
        tail = values[values >= sample[max(middle - room, 0)]]
        first -= len(values) - len(tail)
    if not 0 <= first < len(tail) - 1:  # values that the sample did not foresee, or the very end of them
        tail, first = values, int(place)
    last = min(first + 1, len(tail) - 1)
    start, end = np.partition(tail, (first, last))[[first, last]].astype(np.float64)
    return float(start + (end - start) * (place - int(place)))
