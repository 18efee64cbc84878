"""The boxes of a second look, by hand and by chance."""

import ctypes

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from patients import volumes


def masksOf(boxes, shape=(64, 64, 64)):
    """Return a mask that is True in some boxes, and a brain that is everywhere."""
    mask = np.zeros(shape, bool)
    for box in boxes:
        mask[box] = True
    return mask, np.ones(shape, bool)


def test_keepMemory_doesNothingOnWindows(monkeypatch):
    """There a library without a name is a TypeError, and the predictor would stop."""

    def CDLL(name):
        raise TypeError

    with monkeypatch.context() as windows:
        windows.setattr(ctypes, 'CDLL', CDLL)
        windows.setattr(volumes.os, 'name', 'nt')
        volumes.keepMemory.__wrapped__()


@pytest.mark.parametrize(
    ('count', 'kept', 'filled'),
    [
        (1, [0], [0]),
        (2, [0, 1], [0, 1]),
        (5, [0, 2, 4], [0, 2, 4, 10, 16]),
        (6, [0, 2, 4, 5], [0, 2, 4, 10, 16, 25]),
    ],
)
def test_fillBetween_interpolatesWhatEverySecondLeavesOut(count, kept, filled):
    """The first, third, ... and last slice of a mask are kept; one between has the mean of its neighbours."""
    mask = np.zeros((9, 2, 2), bool)
    mask[3 : 3 + count] = True
    assert volumes.everySecond(mask) == [3 + number for number in kept]
    for make in (np.zeros, torch.zeros):
        values = make((count, 1, 2))
        for number in kept:
            values[number] = number**2
        volumes.fillBetween(values)
        assert values[:, 0, 1].tolist() == filled


def test_partsOf_hasABoxForEachPart():
    """Two parts far apart have boxes of their own, with a margin; one that is near to another shares its box."""
    mask, isBrain = masksOf([np.s_[8:16, 8:16, 8:16], np.s_[40:48, 40:48, 40:48], np.s_[16:20, 8:12, 8:12]])
    parts = volumes.partsOf(mask, isBrain)
    assert [volumes.boundingBox(part) for part in parts] == [np.s_[2:30, 2:22, 2:22], np.s_[34:54, 34:54, 34:54]]


def test_partsOf_leavesSmallPartsOut():
    """A part of 29 voxels is left out beside a larger one, not by itself; nothing at all means the whole brain."""
    speck = np.s_[40:41, 40:41, 32:61]
    parts = volumes.partsOf(*masksOf([np.s_[8:16, 8:16, 8:16], speck]))
    assert len(parts) == 1 and not parts[0][40, 40, 40]
    [part] = volumes.partsOf(*masksOf([speck]))
    assert part[speck].all() and not part[0].any()
    mask, isBrain = masksOf([])
    assert volumes.partsOf(mask, isBrain) == [isBrain]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 56)] * 3, st.integers(1, 8)), min_size=1, max_size=12))
def test_partsOf_holdAllThatIsLarge(places):
    """The boxes share no voxel, and every component of 30 voxels or more is in one of them."""
    mask, isBrain = masksOf([tuple(slice(start, start + side) for start in place) for *place, side in places])
    parts = volumes.partsOf(mask, isBrain)
    assert sum(part.astype(int) for part in parts).max() == 1
    labels, number = ndimage.label(mask, np.ones((3, 3, 3)))
    for component in (labels == each for each in range(1, number + 1)):
        if component.sum() >= 30:
            assert any(part[component].all() for part in parts)


@settings(max_examples=50, deadline=None)
@given(st.tuples(*[st.integers(1, 9)] * 3), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_labelComponents_areThoseOfScipy(shape, share, seed):
    """26-connected, numbered in the order of a scan; also of an empty and of a full mask."""
    mask = np.random.default_rng(seed).random(shape) < share
    expected, _ = ndimage.label(mask, np.ones((3, 3, 3)))
    np.testing.assert_array_equal(volumes.labelComponents(mask), expected)
