"""The weights in the box are made by one command, and say what they were measured on."""

import numpy as np
import pytest

import config
import deploy
import engine
import patients
import phantom
import predictor
from benchmarks import weights


@pytest.mark.slow
def test_main_makesAFolderThatPredictsWithoutSomeModalities(tmp_path, monkeypatch, capsys):
    """Each patient is scored out of fold with each subset; the folder has float16 and int8, and a card with all."""
    pytest.importorskip('onnxruntime')
    vars(config).update(PATCH_SIZE=32, PATCH_STRIDE=24, LOADER_WORKERS=0, DEVICE='cpu', PREPROCESS_WORKERS=1)
    monkeypatch.setattr(weights, 'SUBSETS', [weights.SUBSETS[0], ('flair',)])
    monkeypatch.setattr(weights, 'RECIPE', {**weights.RECIPE, 'STEPS': 2, 'BATCHSIZE': 4, 'PLANES': ('axial',)})
    phantom.makeCases(tmp_path / 'data', 8, shape=(40, 40, 16))
    scores = weights.main(tmp_path / 'data', tmp_path / 'out', 1)
    assert list(scores['patient'].unique()) == ['BraTS20_Training_002', 'BraTS20_Training_006']
    folder = weights.main(tmp_path / 'data', tmp_path / 'out')
    assert 'out/1/last.pt: starting' not in capsys.readouterr().out.split('out/0/last.pt')[1]  # trained once
    card = (folder / 'README.md').read_text()
    assert '8 patients in 4 folds, each predicted by a network of the same recipe that was not trained' in card
    assert 'BraTS20_Training_008' in card and 'Modalities may be missing, but not all.' in card
    assert sorted(file.name for file in (folder / '1').iterdir()) == [
        'config.json', 'model.int8.onnx', 'model.safetensors',
    ]  # fmt: skip
    df = patients.makeFileList(tmp_path / 'data')
    paths = {'flair': df['flair'].iloc[0]}
    with pytest.warns(UserWarning, match='used where config differs'):
        yhat = engine.predict(paths, deploy.loadModel(folder))[2]
    assert np.mean(predictor.predict(paths, folder) == yhat.numpy()) > 0.9
