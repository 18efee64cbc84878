import itertools

import pandas as pd
import pytest

import config
import engine
import phantom
from benchmarks import peers, recipes


@pytest.mark.slow
def test_main_scoresEachPatientOnceByRecipe(tmp_path, monkeypatch):
    """Three patients in three folds, two recipes: each is scored twice; a second call trains nothing."""
    small = {'ENCODER_DEPTH': 3, 'DECODER_CHANNELS': (16, 8, 8)}
    monkeypatch.setattr(recipes, 'SMALL', recipes.SMALL | small)
    phantom.makeCases(tmp_path / 'data', 3, shape=(40, 40, 36))
    tried = {'document': config.DOCUMENT, 'planes': {**config.DOCUMENT, 'PLANES': ('axial', 'sagittal')}}
    before = dict(vars(config))
    table = recipes.main(tmp_path / 'data', tmp_path / 'out', 10, 3, tried, withPeer=False)
    assert vars(config) == before
    assert len(table) == 2 * 3 * 3 and table['step'].between(5, 15).all()  # 10, rounded to epochs
    assert (table.groupby(['recipe', 'region'])['patient'].nunique() == 3).all()
    assert len(pd.read_csv(tmp_path / 'out' / 'recipes.csv')) == len(table)
    monkeypatch.setattr(engine, 'train', None)
    again = recipes.main(tmp_path / 'data', tmp_path / 'out', 10, 3, tried, withPeer=False)
    assert again['dice'].tolist() == pytest.approx(table['dice'].tolist())
    summary = recipes.summarize(table)
    assert list(summary.index) == ['document', 'planes'] and (summary['patients'] == 3).all()
    planes = table[(table['recipe'] == 'planes') & (table['region'] == 'WT')]
    assert summary.loc['planes', 'dice WT'] == pytest.approx(planes['dice'].mean(), abs=1e-3)


@pytest.mark.slow
def test_peer_isTrainedForTheTimeAndScoresWholePatients(tmp_path, monkeypatch):
    """MONAI's network makes a step at least, predicts classes on the grid of the truth, and is not trained twice."""
    monkeypatch.setattr(peers, 'CROP', 32)
    phantom.makeCases(tmp_path / 'data', 2, shape=(40, 40, 36))
    tried = {'few': {**config.DOCUMENT, 'ENCODER_DEPTH': 3, 'DECODER_CHANNELS': (16, 8, 8), 'BATCHSIZE': 4}}
    table = recipes.main(tmp_path / 'data', tmp_path / 'out', 5, 2, tried)
    peer = table[table['recipe'] == recipes.PEER]
    assert peer['patient'].nunique() == 2 and len(peer) == 2 * 3 and peer['dice'].between(0, 1).all()
    ours = table[table['recipe'] == 'few']
    assert (peer['step'] >= 1).all() and peer['seconds'].tolist() == ours['seconds'].tolist()
    monkeypatch.setattr(peers, 'trainSegResNet', None)
    assert len(recipes.main(tmp_path / 'data', tmp_path / 'out', 5, 2, tried)) == len(table)


def test_recipes_endWithTheDefault():
    """The last recipe changes nothing, and the first is the document's; each adds to the one before."""
    names = list(recipes.RECIPES)
    assert recipes.RECIPES[names[0]] == config.DOCUMENT and recipes.RECIPES[names[-1]] == {}
    for before, after in itertools.pairwise(names[:-1]):
        changed = {name for name, value in recipes.RECIPES[after].items() if recipes.RECIPES[before][name] != value}
        assert 1 <= len(changed) <= 3, after
