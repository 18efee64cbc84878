"""The time of growing numbers of patients is measured stage by stage."""

import pytest

import phantom
from benchmarks import scaling


@pytest.mark.slow
def test_benchSizes_hasARowForEachSize(tmp_path):
    """One patient, and both, are cut, predicted and scored, each in a process of its own."""
    phantom.makeCases(tmp_path, 2, shape=(130, 130, 16))
    table = scaling.benchSizes(tmp_path)
    assert table['patients'].tolist() == [1, 2] and (table > 0).all().all()
