"""The Python blocks of README and docs run as they are written."""

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

import config
import deploy
import engine
import patients
import phantom
import postprocess
import predictor
import preprocess
import report
import utils
from conftest import save

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


@pytest.mark.slow
@pytest.mark.filterwarnings('error:The model was trained on')
def test_crossValidation_testsEachPatientOnceInAFolderOfItsFold(home):
    """Five patients in five folds are each scored once, by a model that has not seen them; run again, none trains."""
    config.DATA_FOLDER, config.OUTPUT_FOLDER = 'patients', 'runs'
    ids = phantom.makeCases('patients', 5, shape=(40, 40, 16))
    [block] = blocksOf('docs/cross_validation.md')
    names = {'__name__': '__main__'}
    exec(block, names)
    assert sorted(set(names['table']['patient'])) == ids and len(names['table']) == 5 * len(config.REGIONS)
    seen = [set(member.provenance['earlier']) for member in names['members']]
    assert sorted(patient for patients in seen for patient in set(ids) - patients) == ids
    files = {file: file.read_bytes() for file in home.glob('runs/fold-*/last.pt')}
    exec(block, again := {'__name__': '__main__'})
    assert len(files) == 5 and all(file.read_bytes() == content for file, content in files.items())
    pd.testing.assert_frame_equal(again['table'], names['table'])


@pytest.mark.filterwarnings('ignore:The model was trained on')
def test_deploy_runsAsItIsWritten(home, monkeypatch):
    """A trained model becomes a folder that predicts by onnxruntime, in 8-bit integers, nearly what torch predicts."""
    pytest.importorskip('onnx')
    pytest.importorskip('onnxruntime')
    config.DATA_FOLDER = 'patients'
    monkeypatch.setattr(deploy.onnx, 'LARGEST_LOSS', 1)  # one epoch decides little
    phantom.makeCases('patients', 2, shape=(40, 40, 16))
    trainForOneEpoch(patients.makeFileList())
    names = {}
    inTheBox, doubt, start, *blocks = blocksOf('docs/deploy.md')
    for block in blocks:
        exec(block, names)
    found = predictor.predict(patients.makeFileList().iloc[0], 'mine')
    assert (found == names['yhat'].numpy()).mean() > 0.97  # 8-bit integers
    deploy.exportOnnx('mine')
    found = predictor.predict(patients.makeFileList().iloc[0], 'mine')
    assert (found == names['yhat'].numpy()).mean() > 0.99
    exec(inTheBox, names)
    exec(doubt, names)
    assert set(pd.read_csv('segmented/quality.csv')['region']) == {*config.REGIONS}
    assert names['x'].shape[1] == 4 and names['yhat'].shape == names['x'][:, 0].shape
    config.ENCODER_DEPTH = 5  # the default
    exec(start, {'config': config})
    deploy.startFrom(engine.makeModel())
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
    for block in blocksOf('README.md'):
        exec(block, names)
    plt.close('all')
    assert (home / 'BraTS20_Training_001.nii.gz').is_file() and (home / 'scores.png').is_file()
    assert sorted(set(names['table']['patient'])) == ids[1:]


@pytest.mark.slow
def test_experiments_runAsTheyAreWritten(home, capsys):
    """Its blocks compare two losses, and train on more and more patients; both give a table and a page."""
    phantom.makeCases('patients', 4, shape=(40, 40, 16))
    config.PLANES, config.LOSS = ('axial',), 'dice+ce'
    changed = [
        ("'/where/brats/is'", "'patients'"),
        ('steps=1500', 'folds=2, seeds=1, steps=2'),
        ('(2, 4, 8, 16)', '(1, 2)'),
    ]
    names = {'__name__': '__main__'}
    for block in blocksOf('docs/experiments.md'):
        for old, new in changed:
            block = block.replace(old, new)
        exec(block, names)
    assert 'verdict' in (shown := capsys.readouterr().out) and 'fittedHigh' in shown
    assert len(list(Path(config.OUTPUT_FOLDER).glob('*/*.html'))) == 2


@pytest.mark.slow
def test_lesson_trainsOnWithCorrectedPatients(home, monkeypatch):
    """The two patients with the lowest estimates are trained on, both ways are compared, and the better is packed."""
    monkeypatch.setattr(config, 'DEMO', config.DEMO | {'DECODER_CHANNELS': (16, 8, 8)})
    vars(config).update(config.DEMO, DEMO_SHAPE=(40, 40, 16), PLANES=('axial', 'coronal'))
    phantom.makeCases(config.DATA_FOLDER, 1, shape=config.DEMO_SHAPE)
    trainForOneEpoch(utils.makeFileList())
    names = {'__name__': '__main__'}
    for block in blocksOf('docs/lesson.md'):
        for old, new in (
            (', 26,', ', 11,'),
            ('10:22', '1:8'),
            ('22:', '8:'),
            ('folds=3, seeds=2, steps=60', 'folds=2, seeds=1, steps=2'),
            ('STEPS=200', 'STEPS=2'),
        ):
            block = block.replace(old, new)
        exec(block, names)
    plt.close('all')
    quality = pd.read_csv('lesson/new/quality.csv')
    lowest = quality.groupby('patient')['predictedDice'].mean().sort_values(na_position='first').index[:2]
    known = [f'BraTS20_Training_{number:03d}' for number in range(2, 9)]
    assert sorted(lowest) == sorted(set(names['mine'].index) - set(known))
    assert names['new']['seg'].isna().all() and not list(home.glob('lesson/new/scores.csv'))
    table = pd.read_csv('lesson/comparison/comparison.csv', index_col='recipe')
    assert list(table.index) == ['anew', 'train on'] and table['verdict'].notna().all()
    trained = set(deploy.loadModel('better').provenance['earlier'])
    assert trained == {'BraTS20_Training_001', *known, *lowest}


def test_hardware_cutsTheTrainingPatientsInShards(home):
    """The shards, read as one, hold the training patients of the split, and no other."""
    config.DATA_FOLDER = 'patients'
    phantom.makeCases('patients', 4, shape=(40, 40, 16))
    [block] = blocksOf('docs/hardware.md')
    exec(block, names := {})
    assert len(names['traindf']) == 2
    assert sorted(names['dataset'].provenance['patients']) == list(names['traindf'].index)


def test_editions_listsTheValues():
    """The page names each value of `config.EDITION`, and no other."""
    [listed] = re.findall(r"^    'BraTS2017'.*?\n\n", (HOME / 'docs/editions.md').read_text(), re.MULTILINE | re.DOTALL)
    assert re.findall(r"'(.+?)'", listed) == list(patients.editions.EDITIONS)


def test_training_runsAsItIsWritten(home):
    """Its blocks train, score the test patient, do so again from the folder, and predict with rules."""
    config.EPOCHS = 1
    phantom.makeCases('patients', 3, shape=(40, 40, 16))
    names, after = ({'__name__': '__main__'} for _ in range(2))
    predicts, trains, *others = blocksOf('docs/training.md')
    for block in (predicts, trains):
        assert "'/where/brats/is'" in block
    exec(trains.replace("'/where/brats/is'", "'patients'"), names)
    exec(predicts.replace("'/where/brats/is'", "'patients'"), after)
    pd.testing.assert_frame_equal(after['table'], names['table'])
    for block in others:
        exec(block, names)
    for name, df in zip(('traindf', 'valdf', 'testdf'), names['sets'], strict=True):
        pd.testing.assert_frame_equal(names[name], df)
    for folder in ('results', 'predictions', 'with_rules'):
        settings = json.loads((home / 'run1' / folder / 'settings.json').read_text())
        assert settings['prediction']['trainedOn'] == []
    assert settings['prediction']['rules'] == {'ml': names['rules'].ml, 'N': names['rules'].N}
    assert set(names['table']['patient']) == set(names['testdf'].index)


def test_ownData_readsNifti(home):
    """The described masks become one class of tumor, beside a patient of BraTS, and are cut, predicted and scored."""
    config.DATA_FOLDER = 'clinic'
    phantom.makeCases('clinic', 1, shape=(40, 40, 16))
    [paths] = [paths for _, paths in utils.makeFileList().iterrows()]
    for column, name in {'t1ce': 'contrast', 'flair': 'flair', 'seg': 'mask'}.items():
        nifti = nib.load(paths[column])
        volume = np.asarray(nifti.dataobj)
        volume = np.uint8(255) * (volume > 0) if column == 'seg' else volume
        nib.save(nib.Nifti1Image(volume, nifti.affine), f'clinic/case7_{name}.nii.gz')
    block = blocksOf('docs/own_data.md')[0]
    exec(block, names := {})
    df = names['df']
    assert list(df.index) == ['BraTS20_Training_001', 'case7']
    labels = [patients.readLabel(paths) for _, paths in df.iterrows()]
    assert labels[0].max() == 1 and (labels[0] == labels[1]).all()
    preprocess.makeDataset(df, config.TRAIN_FILE)
    dataset = utils.BRATSDataset(config.TRAIN_FILE)
    assert dataset[0][0].shape == (2, 32, 32)
    x, y, yhat = engine.predict(df.loc['case7'], engine.makeModel())
    assert x.shape[1] == 2 and yhat.max() <= 1
    utils.saveSegmentation(y, df.loc['case7'], 'out/case7.nii.gz')
    table = postprocess.scoreFolder(df[1:], 'out')
    assert table['region'].tolist() == ['WT'] and table['dice'].tolist() == [1]


def test_scores_comparesTwoFolders(home):
    """The block of docs/scores.md compares the tables of two folders and draws them."""
    for folder, dice in (('A', 0.5), ('B', 0.6)):
        (home / folder).mkdir()
        rows = [{'patient': f'p{number}', 'region': 'WT', 'dice': dice, 'hd95': 5.0} for number in range(3)]
        pd.DataFrame(rows).to_csv(home / folder / 'scores.csv', index=False)
    [block] = blocksOf('docs/scores.md')
    exec(block, {})
    plt.close('all')
    assert (home / 'comparison.png').is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:The model was trained on')
def test_quality_estimatesNewPatients(home):
    """The block of docs/quality.md tests a fit on seven patients, and estimates the Dice of a new one."""
    config.DATA_FOLDER, config.OUTPUT_FOLDER, config.EPOCHS = 'patients', 'runs', 1
    config.PLANES = ('axial', 'coronal')
    phantom.makeCases('patients', 7, shape=(40, 40, 16))
    phantom.makeCases('new', 1, seed=9, shape=(40, 40, 16))
    [block] = blocksOf('docs/quality.md')
    assert "'of': 5} for number in range(5)]" in block  # two folds take less time
    exec(
        block.replace("'of': 5} for number in range(5)]", "'of': 2} for number in range(2)]"), {'__name__': '__main__'}
    )
    plt.close('all')
    assert len(pd.read_csv('predictions/quality.csv')) and (home / 'quality.png').is_file()


def test_report_runsAsItIsWritten(home, monkeypatch):
    """Its blocks write the page of two scans of a subject, draw their volumes, and show or name the viewer."""
    monkeypatch.setattr(report.report, '_drawCharts', lambda *arguments: [])  # they take the longest
    for number in (0, 1):
        patient = f'BraTS-GLI-00001-00{number}'
        volume = np.zeros((24, 24, 24), np.uint8)
        volume[4:-4, 4:-4, 4:-4] = 1
        for column in ('t1c', 't2w', 't2f', 'seg'):
            save(volume, home / 'patients' / patient / f'{patient}-{column}.nii.gz')
        save(volume, home / 'predictions' / f'{patient}.nii.gz')
    names = {}
    for block in blocksOf('docs/report.md'):
        exec(block.replace('/where/brats/is', 'patients'), names)
    assert (home / 'predictions' / 'report.html').is_file() and (home / 'BraTS-GLI-00001.png').is_file()
    assert names['scans']['necrotic core'].tolist() == [4.096, 4.096]
