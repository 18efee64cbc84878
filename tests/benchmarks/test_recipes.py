import itertools

import pandas as pd
import pytest

import config
import engine
import phantom
from benchmarks import peers, recipes


@pytest.mark.slow
def test_main_comparesTheRecipesAndTheOtherSystem(tmp_path, monkeypatch):
    """Each patient is scored once by each; the other system has as long as the last recipe; none is trained twice."""
    monkeypatch.setattr(recipes, 'SMALL', recipes.SMALL | {'ENCODER_DEPTH': 3, 'DECODER_CHANNELS': (16, 8, 8)})
    monkeypatch.setattr(peers, 'CROP', 32)
    given, real = [], peers.trainSegResNet
    monkeypatch.setattr(peers, 'trainSegResNet', lambda df, seconds: given.append(seconds) or real(df, seconds))
    phantom.makeCases(tmp_path / 'data', 3, shape=(40, 40, 36))
    tried = {'document': config.DOCUMENT, 'planes': {**config.DOCUMENT, 'PLANES': ('axial', 'sagittal')}}
    before, arguments = dict(vars(config)), (tmp_path / 'data', tmp_path / 'out', 2, 3, 1, tried)
    table = recipes.main(*arguments)
    assert vars(config) == before
    assert list(table.index) == ['document', 'planes', recipes.PEER]
    scores = pd.read_csv(tmp_path / 'out' / 'scores.csv')
    assert len(scores) == 2 * 3 * 3 and (scores.groupby(['recipe', 'region'])['patient'].nunique() == 3).all()
    assert given == scores[scores['recipe'] == 'planes'].groupby('fold')['seconds'].max().tolist()
    for name in ('document', 'planes'):
        own = scores[(scores['recipe'] == name) & (scores['region'] == 'WT')]
        assert table.loc[name, 'dice WT'] == pytest.approx(own['dice'].mean())
    monkeypatch.setattr(engine, 'train', None)
    pd.testing.assert_frame_equal(recipes.main(*arguments), table)
    assert len(given) == 3


def test_recipes_endWithTheDefault():
    """The last recipe changes nothing, and the first is the document's; each adds to the one before."""
    names = list(recipes.RECIPES)
    assert recipes.RECIPES[names[0]] == config.DOCUMENT and recipes.RECIPES[names[-1]] == {}
    for before, after in itertools.pairwise(names[:-1]):
        changed = {name for name, value in recipes.RECIPES[after].items() if recipes.RECIPES[before][name] != value}
        assert 1 <= len(changed) <= 3, after
