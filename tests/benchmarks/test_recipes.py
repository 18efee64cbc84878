import itertools

import matplotlib.pyplot as plt
import pytest

import config
import engine
import phantom
from benchmarks import recipes


@pytest.fixture(autouse=True)
def closeFigures():
    yield
    plt.close('all')


def test_main_scoresEachPatientOnceByRecipe(tmp_path, monkeypatch):
    """Three patients in three folds, two recipes: each is scored twice; a second call trains nothing."""
    small = {'ENCODER_DEPTH': 3, 'DECODER_CHANNELS': (16, 8, 8), 'BATCHSIZE': 4}
    monkeypatch.setattr(recipes, 'SMALL', recipes.SMALL | small)
    phantom.makeCases(tmp_path / 'data', 3, shape=(40, 40, 36))
    tried = {'document': config.DOCUMENT, 'planes': {**config.DOCUMENT, 'PLANES': ('axial', 'sagittal')}}
    before = dict(vars(config))
    table = recipes.main(tmp_path / 'data', tmp_path / 'out', 10, 3, tried)
    assert vars(config) == before
    assert len(table) == 2 * 2 * 3 * 3 and sorted(table['step'].unique()) == [2, 10]
    assert (table.groupby(['recipe', 'step', 'region'])['patient'].nunique() == 3).all()
    assert table.groupby(['recipe', 'fold'])['seconds'].apply(lambda each: each.is_monotonic_increasing).all()
    assert (tmp_path / 'out' / 'recipes.png').is_file()
    monkeypatch.setattr(engine, 'train', None)
    again = recipes.main(tmp_path / 'data', tmp_path / 'out', 10, 3, tried)
    assert again['dice'].tolist() == pytest.approx(table['dice'].tolist())
    summary = recipes.summarize(table)
    assert list(summary.index) == ['document', 'planes'] and (summary['patients'] == 3).all()
    last = table[(table['step'] == 10) & (table['recipe'] == 'planes') & (table['region'] == 'WT')]
    assert summary.loc['planes', 'dice WT'] == pytest.approx(last['dice'].mean(), abs=1e-3)


def test_recipes_endWithTheDefault():
    """The last recipe changes nothing, and the first is the document's; each adds to the one before."""
    names = list(recipes.RECIPES)
    assert recipes.RECIPES[names[0]] == config.DOCUMENT and recipes.RECIPES[names[-1]] == {}
    for before, after in itertools.pairwise(names[:-1]):
        changed = {name for name, value in recipes.RECIPES[after].items() if recipes.RECIPES[before][name] != value}
        assert 1 <= len(changed) <= 2, after
