"""The naive baseline of the lesion-wise scores gives the same scores, or the comparison would mean nothing."""

import numpy as np
import pandas as pd
import pytest

import metrics
from benchmarks import lesions

pytest.importorskip('surface_distance')


@pytest.mark.parametrize('seed', range(4))
def test_scoreLesionsNaively_equalsScoreLesions(seed):
    """On random boxes of all classes, small ones and neighbours among them, every score agrees."""
    generator = np.random.default_rng(seed)
    y, yhat = np.zeros((2, 40, 36, 32), np.uint8)
    for volume, number in ((y, 14), (yhat, 14), (None, 6)):
        for _ in range(number):
            start, size = generator.integers(0, (34, 30, 26)), generator.integers(1, 7, 3)
            box = tuple(slice(low, low + length) for low, length in zip(start, size, strict=True))
            for each in (y, yhat) if volume is None else (volume,):
                each[box] = generator.integers(1, 5)
    expected = metrics.scoreLesions(y, yhat, rule='BraTS2024')
    found = lesions.scoreLesionsNaively(y, yhat)
    pd.testing.assert_frame_equal(found, expected[found.columns], check_dtype=False, rtol=1e-9)
    assert set(found) == set(expected) and (found['dice'] < 1).any()


def test_main_measuresBoth(capsys):
    """One call prints the time of both methods for a small phantom with several tumors."""
    table = lesions.main((48, 40, 32), 3)
    assert table['ms'].gt(0).all() and table['ratio'][0] == 1 and 'scoreLesions' in capsys.readouterr().out
