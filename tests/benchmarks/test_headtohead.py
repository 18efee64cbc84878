"""Other systems are trained and scored on the patients of this package's own folds, for the same time."""

import pandas as pd
import pytest

import config
import engine
import phantom
from benchmarks import headtohead, peers
from conftest import SMALL


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of two phantoms, and small networks."""
    phantom.makeCases(tmp_path / 'data', 2, shape=(40, 40, 36))
    vars(config).update(SMALL)
    monkeypatch.setattr(headtohead, 'OWN', {'default': {}, 'small network': {'DECODER_CHANNELS': (8, 8, 8)}})
    monkeypatch.setattr(peers, 'CROP', 32)
    return tmp_path


@pytest.mark.slow
def test_main_comparesWithTheOtherSystem(folder, monkeypatch):
    """Each patient is scored once by each system; nothing is trained twice; the table tells minutes and steps."""
    arguments = (folder / 'data', folder / 'out', 0.03, 2)
    monkeypatch.setattr(headtohead, 'OTHERS', {'MONAI SegResNet': peers.SegResNet})
    alone, out = headtohead.main(*arguments, 'MONAI SegResNet'), folder / 'out' / '0.03 minutes, 2 folds'
    assert list(alone.index) == ['MONAI SegResNet'] and not (out / 'own').exists()
    assert list(headtohead.main(*arguments, 'default').index) == ['default']
    table = headtohead.main(*arguments)
    assert list(table.index) == ['default', 'small network', 'MONAI SegResNet']
    parts = [pd.read_csv(out / f'MONAI SegResNet-{fold}.csv') for fold in range(2)]
    assert [len(part['patient'].unique()) for part in parts] == [1, 1]
    peer = pd.concat(parts)
    assert table.loc['MONAI SegResNet', 'dice WT'] == pytest.approx(peer.loc[peer['region'] == 'WT', 'dice'].mean())
    assert (table.loc['MONAI SegResNet', ['minutes', 'steps']] >= [0.03, 1]).all()
    assert (table[['steps', 'preparation']] > 0).all(axis=None)
    monkeypatch.setattr(engine, 'train', None)
    monkeypatch.setattr(peers.SegResNet, 'train', None)
    pd.testing.assert_frame_equal(headtohead.main(*arguments), table)


def test_main_refusesBeforeAnythingIsTrained(folder, monkeypatch):
    """An unknown system, nnU-Net that is not installed, and other patients than those of the results."""
    out = folder / 'out'
    with pytest.raises(ValueError, match='No system is called nnU-Net 2D; known: default, small network, MONAI'):
        headtohead.main(folder / 'data', out, 1, 2, 'default', 'nnU-Net 2D')
    monkeypatch.setattr(headtohead.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ModuleNotFoundError, match='nnU-Net is not installed'):
        headtohead.main(folder / 'data', out, 1, 2)
    monkeypatch.setattr(headtohead.train, 'scoreRecipes', None)
    with pytest.raises(TypeError):
        headtohead.main(folder / 'data', out, 1, 2, 'default')
    phantom.makeCases(folder / 'data', 3, shape=(40, 40, 36))
    with pytest.raises(ValueError, match='was begun with other numbers: patients'):
        headtohead.main(folder / 'data', out, 1, 2, 'default')


@pytest.mark.slow
def test_nnUNet_predictsOnTheGridOfThePatient(folder, monkeypatch):
    """nnU-Net plans, trains for a moment and predicts: the truth is the patient's, the prediction has its shape."""
    pytest.importorskip('nnunetv2')
    monkeypatch.setenv('nnUNet_n_proc_DA', '1')
    df = headtohead.utils.makeFileList(folder / 'data')
    system = peers.NnUNet('2d')
    system.prepare(df[:1], folder / 'work')
    assert system.train(1) >= 1
    y, yhat = system.predict(df.iloc[1])
    assert y.shape == yhat.shape == (36, 40, 40) and yhat.max() <= 3
    _, truth, _ = engine.predict(df.iloc[1], engine.makeModel())
    assert (y == truth).all()
