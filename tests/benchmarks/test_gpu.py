"""The measurements of a graphics card run on a processor too, in a small size."""

import pytest

import config
from benchmarks import gpu


@pytest.mark.slow
def test_main_writesARowForEachMeasurement(tmp_path, monkeypatch):
    """Steps, data, prediction and members have a figure; what needs a card says so."""
    vars(config).update(DEVICE='cpu', LOADER_WORKERS=0, PREPROCESS_WORKERS=1, BATCHSIZE=2, ENCODER_DEPTH=3)
    vars(config).update(PLANES=('axial',), PATCH_SIZE=32, PATCH_STRIDE=24)
    monkeypatch.setattr(gpu, 'ENCODERS', {'resnet18': (16, 8, 8)})
    monkeypatch.setattr(gpu, 'PATIENTS', 2)
    monkeypatch.setattr(gpu, 'STEPS', 2)
    monkeypatch.setattr(gpu, 'MEMBERS', 2)
    train = gpu.train.trainMembers
    monkeypatch.setattr(gpu.train, 'trainMembers', lambda df, members, devices: train(df, members, devices[:1]))
    table = gpu.main(tmp_path, (40, 40, 16)).set_index('what')['value']
    isMissing = table == gpu.NONE
    assert (table[~isMissing].astype(float) > 0).all()
    assert sum(isMissing) == 4 and table[isMissing].index.str.contains('memory|compiled|two cards').all()
    assert sum(table.index.str.contains('side by side')) == 2 and (tmp_path / 'gpu.csv').is_file()
