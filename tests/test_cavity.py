"""The resection cavity is a class of its own where it is asked for, from the files to scores and figures."""

import warnings

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

import batched
import config
import engine
import metrics
import patients
import phantom
import pictures
import postprocess
import preprocess
import utils
from conftest import writePatchFile
from patients import cohort
from postprocess import components

AFTER = 'BraTS-GLI-00001-100'


@pytest.fixture(scope='module')
def mixedFolder(tmp_path_factory):
    """Phantoms as two patients of 2020 and two of 2024, whose shape differs and whose first necrosis is a cavity."""
    home = tmp_path_factory.mktemp('mixed')
    phantom.makeCases(home / 'large', 2, shape=(40, 40, 26))
    ids = phantom.makeCases(home / 'made', 2, seed=7, shape=(30, 36, 30))
    for number, patient in enumerate(ids, start=1):
        stem = f'BraTS-GLI-{number:05d}-100'
        for old, new in {'t1': 't1n', 't1ce': 't1c', 't2': 't2w', 'flair': 't2f', 'seg': 'seg'}.items():
            [file] = (home / 'made').rglob(f'{patient}_{old}.nii*')
            nifti = nib.load(file)
            volume = np.asarray(nifti.dataobj)
            if new == 'seg':
                volume = np.array([0, 4, 2, 0, 3], np.uint8)[volume]  # necrosis -> cavity, enhancing -> 3
            (home / 'after' / stem).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(volume, nifti.affine), home / 'after' / stem / f'{stem}-{new}.nii.gz')
            file.unlink()
    return home


@pytest.fixture
def mixed(mixedFolder):
    """The file list of the phantoms, and numbers at which a network trains within a second."""
    config.ENCODER_NAME, config.ENCODER_DEPTH, config.DECODER_CHANNELS = 'resnet18', 3, (16, 8, 8)
    config.BATCHSIZE, config.PLANES = 16, ('axial', 'coronal', 'sagittal')
    config.SLICE_STEP = 2
    return patients.makeFileList(mixedFolder)


def trainOnce(file):
    """Return a model after one epoch on a patch file, augmented on the device."""
    torch.manual_seed(0)
    model, scaler = engine.makeModel(), torch.amp.GradScaler('cuda', enabled=False)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    loader = torch.utils.data.DataLoader(utils.BRATSDataset(file), config.BATCHSIZE)
    transform = batched.Batched(preprocess.makeTransforms()[0])
    engine.train(model, engine.makeCriterion(), optimizer, scaler, loader, transform=transform)
    return model, loader


@pytest.mark.parametrize('numClasses', [2, 4, 5])
@pytest.mark.filterwarnings('ignore:The model was trained on')
def test_training_mixesEditionsShapesAndClasses(mixed, tmp_path, numClasses, capsys):
    """Patients with and without cavity, of two shapes, are cut, trained on, predicted, written and scored together."""
    config.NO_CLASSES = numClasses
    file = str(tmp_path / 'train.h5')
    preprocess.makeDataset(mixed, file)
    model, loader = trainOnce(file)
    label = utils.BRATSDataset(file).file['label'][:]
    assert label.max() == {2: 1, 4: 3, 5: 4}[numClasses]
    _, dice = engine.validate(model, engine.makeCriterion(), loader, dice=True)
    assert list(dice) == (['WT'] if numClasses == 2 else ['WT', 'TC', 'ET'])
    counts = 0
    for patient, paths in mixed.iterrows():
        x, y, yhat, probability = engine.predict(paths, model, probabilities=True)
        assert x.shape[2:] == y.shape[1:] == nib.load(paths['t1ce']).shape[:2] and probability.shape[1] == numClasses
        assert (y == 4).any() == (numClasses == 5 and patient.startswith('BraTS-GLI'))
        counts = counts + np.stack(metrics.countClasses(y, yhat))
        file = tmp_path / 'out' / f'{patient}.nii.gz'
        patients.saveSegmentation(y, paths, file)
        np.testing.assert_array_equal(postprocess.readPrediction(paths, tmp_path / 'out')[1], y)
        saved, truth = (np.asarray(nib.load(name).dataobj) for name in (file, paths['seg']))
        if numClasses == 2:
            truth = np.isin(truth, (1, 2, 3 if 'GLI' in patient else 4))
        elif numClasses == 4 and 'GLI' in patient:
            truth = np.where(truth == 4, 0, truth)
        np.testing.assert_array_equal(saved, truth)
    assert list(metrics.computeMetrics(*counts).index) == list(config.CLASS_NAMES[1:])
    table = postprocess.scoreFolder(mixed, tmp_path / 'out')
    assert set(table['region']) == set(config.REGIONS) and (table['dice'] == 1).all()
    assert list(cohort.describeCohort(mixed).columns[3:]) == list(config.CLASS_NAMES[1:])


def test_predictFolder_segmentsAndScoresTheCavity(mixed, tmp_path):
    """With five classes the folder's scores have RC, and scoring it again by 2020's rule gives the same."""
    config.NO_CLASSES = 5
    preprocess.makeDataset(mixed[2:], tmp_path / 'train.h5')
    model, _ = trainOnce(str(tmp_path / 'train.h5'))
    with warnings.catch_warnings(action='ignore'):  # of a cavity predicted before treatment
        scores = postprocess.predictFolder(mixed, model, tmp_path / 'out', rules=components.Tuning(N=1, ml=0.001))
    table = postprocess.scoreFolder(mixed, tmp_path / 'out' / 'upload', challenges=['BraTS2020', 'BraTS2024'])
    again = table.loc[table['rule'] == 'BraTS2020', scores.columns].reset_index(drop=True)
    pd.testing.assert_frame_equal(again, scores)
    assert 'RC' in set(scores['region'])


def test_scoreFolder_scoresTheCavityByDefaultOnlyWithFiveClasses(mixed, tmp_path):
    """Half of the cavity found is a Dice of 2/3 in RC; with four classes the same folder has no RC."""
    df = mixed.loc[[AFTER]]
    seg = nib.load(df.iloc[0]['seg'])
    volume = np.asarray(seg.dataobj).copy()
    places = np.argwhere(volume == 4)
    volume[tuple(places[: len(places) // 2].T)] = 0
    (tmp_path / 'out').mkdir()
    nib.save(nib.Nifti1Image(volume, seg.affine), tmp_path / 'out' / f'{AFTER}.nii.gz')
    config.NO_CLASSES = 5
    table = postprocess.scoreFolder(df, tmp_path / 'out').set_index('region')
    found = len(places) - len(places) // 2
    assert table.loc['RC', 'dice'] == pytest.approx(2 * found / (found + len(places)))
    assert (table.drop('RC')['dice'] == 1).all()
    config.NO_CLASSES = 4
    table = postprocess.scoreFolder(df, tmp_path / 'out').set_index('region')
    assert 'RC' not in table.index and (table['dice'] == 1).all()
    config.NO_CLASSES = 2
    with pytest.raises(ValueError, match=r'tells the tissues of a tumor apart, but config\.NO_CLASSES is 2'):
        postprocess.scoreFolder(df, tmp_path / 'out', challenges=['BraTS2024'])


def test_patchFilesAndModels_ofOtherClassesAreRefused(mixed, tmp_path, capsys):
    """A patch file or model of four classes is refused by a run of five, and the other way round, in words."""
    for number, other in ((4, 5), (5, 4)):
        config.NO_CLASSES = number
        file = writePatchFile(
            tmp_path / f'{number}.h5', np.zeros((4, 3, 32, 32), np.float16), np.ones((4, 32, 32), np.uint8)
        )
        model, _ = trainOnce(file)
        config.NO_CLASSES = other
        with pytest.raises(ValueError, match=r'cut with other settings: .*config\.NO_CLASSES.*Cut it again'):
            utils.BRATSDataset(file)
        with pytest.raises(ValueError, match=r'The model predicts .*config\.NO_CLASSES'):
            engine.predict(mixed.iloc[0], model)


def test_makeDataset_cutsAnewForAnotherNumberOfClasses(mixed, tmp_path, capsys):
    """Patches with the cavity as background are replaced when it becomes a class."""
    preprocess.makeDataset(mixed[2:], tmp_path / 'a.h5')
    config.NO_CLASSES = 5
    preprocess.makeDataset(mixed[2:], tmp_path / 'a.h5')
    assert 'is replaced: config.NO_CLASSES or config.CLASS_NAMES is' in capsys.readouterr().out


def test_removeSmallComponents_leavesTheCavity():
    """A small cavity stays, does not join two tumors, is never relabelled, and is no false positive of the tuning."""
    config.NO_CLASSES = 5
    yhat = np.array([[[4, 0, 3, 4, 2, 2, 2]]])
    removed = components.removeSmallComponents(yhat, 0.002)  # ml: components of one voxel
    np.testing.assert_array_equal(removed, [[[4, 0, 0, 4, 2, 2, 2]]])
    np.testing.assert_array_equal(components.relabelSmallET(yhat, 5), [[[4, 0, 1, 4, 2, 2, 2]]])
    y, yhat = np.zeros((2, 20, 20, 9), int)
    y[2:6, 2:6, 2:6] = yhat[2:6, 2:6, 2:6] = 2
    yhat[15, 15, 5] = 4
    assert components.tunePostprocessing({'a': (y, yhat)}).ml == 0


def test_postprocessing_ofTumorOrNot():
    """With two classes small components are removed; there is no enhancing tumor to relabel."""
    config.NO_CLASSES = 2
    y, yhat = np.zeros((2, 20, 20, 9), int)
    y[2:6, 2:6, 2:6] = yhat[2:6, 2:6, 2:6] = 1
    yhat[15, 15, 5] = 1
    tuning = components.tunePostprocessing({'a': (y, yhat)})
    assert tuning.N == 0 and tuning.ml > 0
    np.testing.assert_array_equal(components.applyRules(yhat, tuning), y)
    with pytest.raises(ValueError, match=r'N is 3; 0 was expected: config\.REGIONS has WT, not ET and NCR'):
        components.relabelSmallET(yhat, 3)


def test_scorePatient_scoresTheCavityAsARegion():
    """One of two voxels of cavity found is a Dice of 2/3 in RC; the cavity is in no other region, by any rule."""
    config.NO_CLASSES = 5
    y = np.zeros((8, 8, 8), int)
    y[0, 0, :2], y[4, 4, 4] = 4, 3
    yhat = y.copy()
    yhat[0, 0, 0] = 0
    for rule in ('BraTS2020', 'BraTS2026'):
        table = metrics.scorePatient(y, yhat, rule=rule)
        assert table.loc['RC', 'dice'] == pytest.approx(2 / 3)
        assert (table.loc[['WT', 'TC', 'ET'], 'dice'] == 1).all()
    assert (metrics.scoreLesions(y, yhat)['dice'] == 1).all()  # 2023 has no cavity


def test_plotModalities_leavesOutWhatOnlyItWouldRead(mixed, tmp_path, capsys):
    """A modality that the model does not use, and that cannot be read, stops no notebook."""
    paths, config.MODALITIES = mixed.loc[AFTER].copy(), ('t1ce', 't2', 'flair')
    paths['t1'] = str(tmp_path / paths['t1'].rpartition('/')[2])
    (tmp_path / paths['t1']).write_bytes(b'broken')
    titles = [panel.get_title() for panel in pictures.plotModalities(paths).axes]
    assert not any('T1,' in title or title == 'T1' for title in titles)
    assert paths['t1'] in capsys.readouterr().out


@pytest.mark.parametrize('numClasses', [2, 5])
def test_pictures_drawEveryClass(mixed, tmp_path, numClasses):
    """Each figure has all classes in its legend: the cavity as the fifth, or tumor alone; GIFs are written."""
    config.NO_CLASSES = numClasses
    paths = mixed.loc[AFTER]
    x, y, yhat, probability = engine.predict(paths, engine.makeModel(), probabilities=True)
    table = metrics.scoreTable({AFTER: metrics.scorePatient(y, y)})
    figures = [
        pictures.plotSample(paths),
        pictures.plotModalities(paths),
        pictures.plotModalities(mixed.iloc[-1]),
        pictures.plotPlanes(paths),
        pictures.plotPrediction(x, y, yhat),
        pictures.plotTransforms(x[10], y[10], {'as it is': None}),
        pictures.plotConfusion(metrics.confusionMatrix(y, yhat)),
        pictures.plotCalibration(pictures.countCalibration(probability, y)),
        pictures.plotCases(table, {AFTER: (x, y, yhat)}),
        pictures.plotCohort(cohort.describeCohort(mixed)),
        pictures.plotScores(table),
        pictures.plotVolumes(table),
    ]
    texts = [text.get_text() for panel in figures[0].axes if panel.get_legend() for text in panel.get_legend().texts]
    assert [text.split(',')[0] for text in texts] == list(config.CLASS_NAMES[1:])
    [file] = pictures.makeGifs(x, y, yhat, tmp_path)
    assert file.stat().st_size > 0
    for figure in figures:
        figure.canvas.draw()
    plt.close('all')
