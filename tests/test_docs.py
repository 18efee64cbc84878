"""The Python blocks of README and docs run as they are written."""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

import config
import engine
import patients
import phantom
import predictor
import preprocess
import utils

HOME = Path(__file__).resolve().parent.parent


def blocksOf(file):
    """Return the Python blocks of a Markdown file."""
    return re.findall(r'^```python\n(.*?)^```$', (HOME / file).read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty current folder, and sizes at which a network trains within a second."""
    monkeypatch.chdir(tmp_path)
    config.ENCODER_NAME, config.ENCODER_DEPTH, config.DECODER_CHANNELS = 'resnet18', 3, (16, 8, 8)
    config.EPOCHS, config.BATCHSIZE, config.BOOTSTRAP_RESAMPLES = 2, 8, 100
    return tmp_path


@pytest.mark.filterwarnings('error:The model was trained on')
def test_crossValidation_testsEachPatientOnceInAFolderOfItsFold(home):
    """Five patients in five folds are each scored once, by a model that has not seen them; run again, none trains."""
    config.DATA_FOLDER, config.OUTPUT_FOLDER = 'patients', 'runs'
    ids = phantom.makeCases('patients', 5, shape=(40, 40, 16))
    [block] = blocksOf('docs/cross_validation.md')
    names = {'__name__': '__main__'}
    exec(block, names)
    assert sorted(set(names['table']['patient'])) == ids and len(names['table']) == 5 * len(config.REGIONS)
    seen = [set(member.identity['earlier']) for member in names['members']]
    assert sorted(patient for patients in seen for patient in set(ids) - patients) == ids
    files = {file: file.read_bytes() for file in home.glob('runs/fold-*/last.pt')}
    exec(block, again := {'__name__': '__main__'})
    assert len(files) == 5 and all(file.read_bytes() == content for file, content in files.items())
    pd.testing.assert_frame_equal(again['table'], names['table'])


@pytest.mark.filterwarnings('ignore:The model was trained on')
def test_deploy_runsAsItIsWritten(home):
    """A trained model becomes a folder that predicts by onnxruntime what torch predicts."""
    pytest.importorskip('onnx')
    pytest.importorskip('onnxruntime')
    config.DATA_FOLDER = 'patients'
    phantom.makeCases('patients', 1, shape=(40, 40, 16))
    trainForOneEpoch(patients.makeFileList())
    names = {}
    for block in blocksOf('docs/deploy.md'):
        exec(block, names)
    found = predictor.predict(patients.makeFileList().iloc[0], 'glioma')
    assert (found == names['yhat'].numpy()).mean() > 0.99
    assert (home / 'predictions' / 'BraTS2020_itksnap.txt').is_file()


def trainForOneEpoch(df):
    """Train a new model on the patients and write its checkpoint."""
    preprocess.makeDataset(df, config.TRAIN_FILE)
    model, scaler = engine.makeModel(), torch.amp.GradScaler('cuda', enabled=False)
    optimizer = torch.optim.SGD(model.parameters(), config.LEARN_RATE)
    loader = torch.utils.data.DataLoader(utils.BRATSDataset(config.TRAIN_FILE), 8)
    loss = engine.train(model, engine.makeCriterion(), optimizer, scaler, loader)
    utils.makeCheckpoint(0, model, optimizer, None, scaler, loss, loss, 1e9)


@pytest.mark.filterwarnings('ignore:The model was trained on')
def test_readme_runsAsItIsWritten(home, monkeypatch):
    """After the demo, its blocks predict a patient, and segment, score and draw the patients that are no training."""
    monkeypatch.setattr(config, 'DEMO', config.DEMO | {'DECODER_CHANNELS': (16, 8, 8)})
    vars(config).update(config.DEMO)
    ids = phantom.makeCases(config.DATA_FOLDER, 3, shape=(40, 40, 16))
    trainForOneEpoch(utils.makeFileList()[:1])
    names = {}
    for block in [*blocksOf('README.md'), *blocksOf('docs/hardware.md')]:
        exec(block, names)
    assert len(names['dataset'].identity['patients']) == 3
    plt.close('all')
    assert (home / 'BraTS20_Training_001.nii.gz').is_file() and (home / 'scores.png').is_file()
    assert sorted(set(names['table']['patient'])) == ids[1:]
