import numpy as np
import pytest

import transforms

GENERATOR = np.random.default_rng(0)
VALUES = {
    'brain': GENERATOR.normal(300, 80, 100_000).astype(np.int16),
    'skewed': GENERATOR.exponential(50, 30_000).astype(np.float32),
    'two': GENERATOR.integers(0, 2, 20_000).astype(np.int16),
    'one': np.full(10_000, 7, np.int16),
    'sorted': np.arange(50_000, dtype=np.float32),
    'rare': np.r_[np.zeros(20_000), np.full(50, 9), np.full(60, -9)].astype(np.float32),
    'periodic': np.tile(np.r_[np.full(6, 5), -100, 300], 4096).astype(np.int16),  # a sample of every 8th sees one kind
    'few': np.array([3, 1, 2], np.int16),
    'single': np.array([4], np.float32),
}


@pytest.mark.parametrize('kind', VALUES)
@pytest.mark.parametrize('percentile', [0, 0.5, 2, 30, 50, 75, 99.5, 100])
def test_percentile_isNumpys(kind, percentile):
    """Any values, also those that a sample does not foresee, any percentile: NumPy's, linear between values."""
    expected = np.percentile(VALUES[kind].astype(np.float64), percentile)
    assert transforms._percentile(VALUES[kind], percentile) == pytest.approx(expected, rel=1e-12)
