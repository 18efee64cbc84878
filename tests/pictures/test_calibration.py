import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import pictures
from examples import legendTexts


@pytest.fixture(autouse=True)
def closeFigures():
    yield
    plt.close('all')


def makeCalibration(predicted, observed, count=1000):
    """Return probability (1, 4, 1, n) and y (1, 1, n) of classes 0 and 3.

    Class 3 has each of the `predicted` probabilities in `count` voxels, and is the truth in the fraction `observed` of
    them.
    """
    values = np.repeat(predicted, count)
    y = np.concatenate([np.arange(count) < round(fraction * count) for fraction in observed]) * 3
    probability = np.zeros((1, 4, 1, len(values)))
    probability[0, 3, 0], probability[0, 0, 0] = values, 1 - values
    return probability, y[None, None]


def test_countCalibration_countsByHand():
    """Six voxels by hand: below 0.1 only those of the class are counted; 0.1 lies in bin 1, 1 in the last bin."""
    values = np.array([0.05, 0.1, 0.1, 1.0, 0.0, 0.0])  # of class 3
    probability = np.zeros((1, 4, 2, 3))
    probability[0, 3] = values.reshape(2, 3)
    probability[0, 0] = 1 - probability[0, 3]
    counts = pictures.countCalibration(probability, np.array([[[0, 3, 0], [3, 0, 2]]]))
    assert counts.shape == (3, 3, 11)
    assert counts[0, 2].tolist() == [0, 2, 0, 0, 0, 0, 0, 0, 0, 1, 3]
    assert np.allclose(counts[1, 2], [0, 0.2, 0, 0, 0, 0, 0, 0, 0, 1, 0.05])
    assert counts[2, 2].tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0]
    assert counts[0, 0].tolist() == [0] * 10 + [6]
    assert counts[0, 1].tolist() == [1] + [0] * 9 + [5]
    assert counts[2, 1].tolist() == [1] + [0] * 10  # edema with a probability of 0 is missed, not left out


def test_countCalibration_addsUp():
    """The counts of two halves add up to those of the whole, also of float32 tensors."""
    generator = torch.Generator().manual_seed(0)
    probability = torch.randn(4, 4, 5, 6, generator=generator).mul(3).softmax(1)
    y = torch.randint(0, 4, (4, 5, 6), generator=generator)
    whole = pictures.countCalibration(probability, y)
    halves = pictures.countCalibration(probability[:2], y[:2]) + pictures.countCalibration(probability[2:], y[2:])
    assert np.allclose(whole, halves) and np.array_equal(whole[0], halves[0])
    assert whole[0].sum(1).tolist() == [120] * 3
    assert whole[2].sum(1).tolist() == [(y == number).sum() for number in (1, 2, 3)]


def test_countCalibration_refusesOtherValues():
    """Logits, NaN and shapes that do not agree are refused."""
    y = np.zeros((1, 2, 2), int)
    for probability in (np.full((1, 4, 2, 2), 3.0), np.full((1, 4, 2, 2), np.nan)):
        with pytest.raises(ValueError, match='not probabilities'):
            pictures.countCalibration(probability, y)
    with pytest.raises(ValueError, match='expected'):
        pictures.countCalibration(np.full((1, 3, 2, 2), 1 / 3), y)


def test_plotCalibration_calibratedLiesOnTheDiagonal():
    """If 1 in 4 voxels of probability 0.25 and 3 in 4 of 0.75 have the class, dots lie on the diagonal and ECE is 0."""
    counts = pictures.countCalibration(*makeCalibration([0.25, 0.75], [0.25, 0.75]))
    panel, below = pictures.plotCalibration(counts).axes
    assert np.allclose(panel.lines[3].get_data(), [[0.25, 0.75], [0.25, 0.75]])
    assert legendTexts(panel)[3] == 'enhancing tumor, ECE 0.000'
    assert [bar.get_height() for bar in below.containers[2]] == [0, 0, 1000, 0, 0, 0, 0, 1000, 0, 0]
    missed = pictures.countCalibration(*makeCalibration([0.0], [1.0]))  # in the first bin, 1 off the diagonal
    assert legendTexts(pictures.plotCalibration(missed).axes[0])[3] == 'enhancing tumor, ECE 1.000'


def test_plotCalibration_overconfidentLiesBelow():
    """1000 voxels of probability 0.9 with 600 hits and 1000 of 0.5 with 400 have the ECE (0.3 + 0.1) / 2."""
    probability, y = makeCalibration([0.9, 0.5], [0.6, 0.4])
    patient = pictures.countCalibration(probability, y)
    panel = pictures.plotCalibration([patient, patient]).axes[0]
    assert np.allclose(panel.lines[3].get_data(), [[0.5, 0.9], [0.4, 0.6]])
    assert legendTexts(panel)[3] == 'enhancing tumor, ECE 0.200'
    assert panel.get_title() == 'Calibration of the probabilities of 2 patients'


def test_plotCalibration_isNotFloodedByBackground():
    """Predicted at 0.9 where a quarter is tumor, the ECE is 0.65, whatever the number of background voxels at 0.01."""
    for numBackground in (10, 1_000_000):
        probability, y = makeCalibration([0.9], [0.25])
        background, _ = makeCalibration([0.01], [0.0], numBackground)
        probability = np.concatenate([probability, background], axis=3)
        y = np.concatenate([y, np.zeros((1, 1, numBackground), int)], axis=2)
        panel, below = pictures.plotCalibration(pictures.countCalibration(probability, y)).axes
        assert legendTexts(panel)[3] == 'enhancing tumor, ECE 0.650'
    assert 'the class in truth, or its probability at least 0.1\n' in below.get_xlabel()
    assert 'the others, at least 99.90% of all voxels, are left out' in below.get_xlabel()
    assert legendTexts(panel)[1] == 'necrotic core, no voxels'


def test_plotCalibration_refusesOtherCounts():
    """Counts with all voxels left out, or of another shape, are refused."""
    for counts in (np.zeros((3, 3, 11)), np.ones((3, 11))):
        with pytest.raises(ValueError, match='expected'):
            pictures.plotCalibration(counts)
