import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import segmentation_models_pytorch as smp
import torch
from scipy import ndimage

import config
import metrics
import patients
import phantom
import postprocess
import transforms
from conftest import COLUMNS, NEWER, save, settingsOf
from metrics.rules import RULES
from patients import editions

PATIENT, AFTER = 'BraTS20_Training_001', 'BraTS-GLI-00001-101'

# Small components and small enhancing tumors


@pytest.mark.parametrize('kind', [torch.from_numpy, np.asarray])
def test_relabelSmallET_changesFewerThanNVoxels(kind):
    """Two voxels of ET become necrotic core for N = 3, not for N = 2, in a copy of the same type and dtype."""
    classes = np.array([[[0, 1, 2], [3, 3, 0]]], np.int16)
    yhat = kind(classes.copy())
    for N, expected in ((3, [[[0, 1, 2], [1, 1, 0]]]), (2, classes.tolist())):
        found = postprocess.relabelSmallET(yhat, N)
        assert type(found) is type(yhat) and found.dtype == yhat.dtype and found.tolist() == expected
        found[:] = 0
        assert yhat.tolist() == classes.tolist()


@pytest.mark.parametrize('kind', [torch.from_numpy, np.asarray])
def test_removeSmallComponents_removesComponentsBelowMl(kind):
    """Two voxels that touch at a corner are one component of 2 mm3; the single voxel is removed, they never are."""
    classes = np.zeros((4, 4, 4), np.uint8)
    classes[0, 0, 0], classes[1, 1, 1], classes[3, 3, 3] = 1, 3, 2
    yhat = kind(classes.copy())
    left = postprocess.removeSmallComponents(yhat, 0.002)
    assert type(left) is type(yhat) and left.dtype == yhat.dtype and yhat.tolist() == classes.tolist()
    assert (left[0, 0, 0], left[1, 1, 1], left[3, 3, 3]) == (1, 3, 0)
    assert (postprocess.removeSmallComponents(yhat, 1) != left).sum() == 0
    assert postprocess.removeSmallComponents(yhat, 0).tolist() == classes.tolist()


def test_removeSmallComponents_measuresByTheSpacing():
    """Beside a larger one, a voxel of 8 mm3 stays at 0.008 ml and goes at 0.009 ml; an empty prediction stays empty."""
    yhat = np.zeros((3, 3, 5), int)
    assert not postprocess.removeSmallComponents(yhat, 1).any()
    yhat[1, 1, 0], yhat[:, :, 3:] = 2, 2
    assert postprocess.removeSmallComponents(yhat, 0.008, spacing=(2, 2, 2))[1, 1, 0]
    assert not postprocess.removeSmallComponents(yhat, 0.009, spacing=(2, 2, 2))[1, 1, 0]


def test_rules_refuseBadInput():
    """Negative sizes, values that are not classes, a spacing that does not fit and no patients are refused."""
    yhat = np.zeros((3, 3, 3), int)
    with pytest.raises(ValueError, match='N is -1; 0 voxels or more'):
        postprocess.relabelSmallET(yhat, -1)
    with pytest.raises(ValueError, match=r'ml is -0\.5; 0 ml or more'):
        postprocess.removeSmallComponents(yhat, -0.5)
    for rule in (postprocess.relabelSmallET, postprocess.removeSmallComponents):
        with pytest.raises(ValueError, match='yhat has values from 0 to 4'):
            rule(yhat + np.eye(3, dtype=int) * 4, 5)
    with pytest.raises(ValueError, match=r'spacing is \(1, 1\)'):
        postprocess.removeSmallComponents(yhat, 1, spacing=(1, 1))
    with pytest.raises(ValueError, match='at least one patient'):
        postprocess.tunePostprocessing({})


def makePair(trueET, predictedET, shape=(6, 6, 6)):
    """Return truth and prediction with so many voxels of ET, counted from the same corner; the rest is edema."""
    y, yhat = np.full((2, *shape), 2)
    y.ravel()[:trueET] = 3
    yhat.ravel()[:predictedET] = 3
    return y, yhat


def test_tunePostprocessing_findsN():
    """ET is predicted with 2 voxels where there is none, and rightly with 5 and 9: N = 3 lifts the mean to 1."""
    tuning = postprocess.tunePostprocessing({'a': makePair(0, 2), 'b': makePair(5, 5), 'c': makePair(9, 9)})
    assert (tuning.N, tuning.withoutET, tuning.gained, tuning.lost) == (3, 1, 1, 0)
    curve = tuning.curve[tuning.curve['rule'] == 'N']
    assert curve['value'].tolist() == [0, 3, 6, 10]
    np.testing.assert_allclose(curve['score'], [2 / 3, 1, 2 / 3, 1 / 3])
    assert curve['gained'].tolist() == [0, 1, 1, 1] and curve['lost'].tolist() == [0, 0, 1, 2]


def test_tunePostprocessing_findsMl():
    """A lesion of 64 voxels and a false positive of 3: between 3 and 4 mm3 the score rises from 1/2 to 1."""
    y = np.zeros((10, 10, 30), int)
    y[3:7, 3:7, 2:6] = 2
    yhat = y.copy()
    yhat[0, 0, 25:28] = 3
    tuning = postprocess.tunePostprocessing({'a': (y, yhat)})
    assert 0.003 < tuning.ml < 0.004 and (postprocess.removeSmallComponents(yhat, tuning.ml) == y).all()
    curve = tuning.curve.set_index('rule')['score']
    assert curve['ml'].tolist() == [0.5, 1, 1]
    assert curve[['N']].tolist() == [1]  # the removed ET is not there to be relabelled
    assert 0.006 < postprocess.tunePostprocessing({'a': (y, yhat)}, spacing=(1, 1, 2)).ml < 0.008


def test_tunePostprocessing_takesTheSmallestOfEquals():
    """N and ml are 0 if no value helps, or if one gains as much as it loses.

    A component that matches a lesion too small to be scored is no false positive: nothing is to be removed.
    """
    tuning = postprocess.tunePostprocessing({'a': makePair(0, 5), 'b': makePair(4, 4)})
    assert (tuning.N, tuning.gained, tuning.lost) == (0, 0, 0)
    y = np.zeros((10, 10, 30), int)
    y[3:7, 3:7, 2:6] = 2  # 64 mm3
    y[3:5, 3:5, 20:22] = 2  # 8 mm3
    tuning = postprocess.tunePostprocessing({'a': (y, y)})
    assert tuning[:2] == (0, 0) and tuning.curve.set_index('rule')['score']['ml'].tolist() == [1, 1, 1]


def test_tunePostprocessing_equalsScoringEveryValue():
    """On random patients each point of both curves is the mean score after the rules were applied with its value."""
    generator = np.random.default_rng(3)
    predictions = {}
    for number in range(5):
        noise = [ndimage.gaussian_filter(generator.standard_normal((14, 16, 18)), 1) for _ in range(3)]
        truth, other = noise[0], noise[0] + 0.6 * noise[1]
        y, yhat = (np.where(field > 0.25, 2, 0) for field in (truth, other))
        y[(truth > 0.45) & (number != 2)] = 3
        yhat[other > 0.45 + 0.1 * generator.random()] = 3
        predictions[number] = y, yhat
    tuning = postprocess.tunePostprocessing(predictions)
    for rule, value, score in tuning.curve[['rule', 'value', 'score']].itertuples(index=False):
        scores = []
        for y, yhat in predictions.values():
            left = postprocess.removeSmallComponents(yhat, value if rule == 'ml' else tuning.ml)
            if rule == 'ml':
                scores.append(metrics.scoreLesions(y, left).loc['WT', 'dice'])
            else:
                isPredicted, isTrue = postprocess.relabelSmallET(left, value) == 3, y == 3
                total = isPredicted.sum() + isTrue.sum()
                scores.append(2 * (isPredicted & isTrue).sum() / total if total else 1)
        assert score == pytest.approx(np.mean(scores)), (rule, value)
    best, at = tuning.curve.groupby('rule')['score'].max(), tuning.curve.set_index(['rule', 'value'])['score']
    assert at['N', tuning.N] == best['N'] and at['ml', tuning.ml] == best['ml']
    assert len(tuning.curve) > 10 and tuning.ml > 0


# NIfTI files


def writeOnes(writeCase, **options):
    """Write a patient of 4 x 5 x 6 voxels and return its paths."""
    return writeCase(dict.fromkeys(config.MODALITIES, np.ones((4, 5, 6), np.int16)), **options)


def test_saveSegmentation_writesTheImagesGridAndTheEditionsLabels(writeCase, tmp_path):
    """The file has the labels 0, 1, 2, 4 as uint8 without scaling, and shape, sform, qform and codes of the images."""
    affine = np.array([[-1, 0, 0, 3], [0, -1, 0, 239], [0, 0, 1.5, -7], [0, 0, 0, 1]])
    paths = writeOnes(writeCase, affine=affine)
    image = nib.load(paths['t1ce'])
    image.set_qform(affine, 1)
    image.set_sform(affine, 4)
    nib.save(image, paths['t1ce'])
    yhat = np.zeros((6, 4, 5), np.int64)  # (D, W, H) in RAS order
    yhat[5, 0, 0], yhat[0, 3, 4], yhat[2, 1, 3] = 1, 2, 3
    patients.saveSegmentation(yhat, paths, tmp_path / 'new' / 'out.nii.gz')
    written = nib.load(tmp_path / 'new' / 'out.nii.gz')
    assert written.get_data_dtype() == np.uint8 and (written.dataobj.slope, written.dataobj.inter) == (1, 0)
    for kind in ('get_sform', 'get_qform'):
        (found, code), (expected, expectedCode) = getattr(written, kind)(True), getattr(image, kind)(True)
        np.testing.assert_array_equal(found, expected)
        assert code == expectedCode
    stored = np.asarray(written.dataobj)
    assert stored.shape == (4, 5, 6) and (stored > 0).sum() == 3
    assert stored[3, 4, 5] == 1 and stored[0, 0, 0] == 2 and stored[2, 1, 2] == 4  # LPS: both first axes are turned


def test_saveSegmentation_keepsAGridWithoutSform(writeCase, tmp_path):
    """If the sform and qform codes of the images are 0, those of the segmentation are 0 too."""
    paths = writeOnes(writeCase)
    image = nib.load(paths['t1ce'])
    image.header['sform_code'] = image.header['qform_code'] = 0
    plain = nib.Nifti1Image(np.asarray(image.dataobj), None, image.header)
    for modality in config.MODALITIES:
        nib.save(plain, paths[modality])
    yhat = np.zeros((6, 4, 5), np.uint8)
    yhat[1, 0, 2] = 3
    patients.saveSegmentation(yhat, paths, tmp_path / 'out.nii')
    written = nib.load(tmp_path / 'out.nii')
    assert written.header['sform_code'] == 0 and written.header['qform_code'] == 0
    np.testing.assert_array_equal(written.affine, nib.load(paths['t1ce']).affine)
    _, classes = patients.readCase({**paths, 'seg': str(tmp_path / 'out.nii'), 't1': paths['t2']})
    np.testing.assert_array_equal(classes.transpose(2, 0, 1), yhat)


@pytest.mark.parametrize(
    ('yhat', 'name', 'words'),
    [
        (np.zeros((6, 5, 4), int), 'a.nii.gz', r'the volume has the shape \(5, 4, 6\), the images have \(4, 5, 6\)'),
        (np.full((6, 4, 5), 4), 'a.nii.gz', r'yhat has the classes \[4\]; 0, 1, 2, 3 were expected'),
        (np.zeros((6, 4, 5), int), 'a.png', r'ends in \.nii or \.nii\.gz'),
    ],
)
def test_saveSegmentation_refusesWhatIsNotASegmentation(writeCase, tmp_path, yhat, name, words):
    """Another shape, a class beyond 3 and a file name of another format are refused, and nothing is written."""
    with pytest.raises(ValueError, match=words):
        patients.saveSegmentation(yhat, writeOnes(writeCase), tmp_path / name)
    assert not (tmp_path / name).exists()


def test_saveProbabilities_writesProbabilitiesAndEntropy(writeCase, tmp_path):
    """Both lie on the images' grid; the entropy is 0 for one certain class, 1 for four equal classes, 1/2 for two."""
    affine = np.array([[-1, 0, 0, 3], [0, -1, 0, 4], [0, 0, 1, 0], [0, 0, 0, 1]])
    paths = writeOnes(writeCase, affine=affine)
    probability = np.zeros((6, 4, 4, 5), np.float32)
    probability[:, 0] = 1
    probability[2, :, 1, 3] = 0.25
    probability[5, :, 0, 0] = [0, 0.5, 0, 0.5]
    patients.saveProbabilities(torch.from_numpy(probability), paths, tmp_path / 'p.nii.gz')
    written, entropy = nib.load(tmp_path / 'p.nii.gz'), nib.load(tmp_path / 'p_entropy.nii.gz')
    assert written.shape == (4, 5, 6, 4) and written.get_data_dtype() == entropy.get_data_dtype() == np.float32
    np.testing.assert_array_equal(written.affine, affine)
    np.testing.assert_array_equal(np.asarray(written.dataobj)[3, 4, 5], [0, 0.5, 0, 0.5])  # LPS: two axes are turned
    found = np.asarray(entropy.dataobj)
    assert (found[3, 4, 5], found[2, 1, 2], found.sum()) == pytest.approx((0.5, 1, 1.5))


# Folders of predictions


@pytest.fixture
def df(tmp_path):
    """The file list of three phantoms, of which the second has no segmentation."""
    phantom.makeCases(tmp_path / 'data', 3, shape=(40, 40, 16))
    df = patients.makeFileList(tmp_path / 'data')
    df.loc['BraTS20_Training_002', 'seg'] = None
    return df


def makeUnet():
    torch.manual_seed(0)
    return smp.Unet('resnet18', encoder_weights=None, in_channels=3, classes=4, decoder_channels=(32, 16, 16, 8, 8))


def test_predictFolder_writesSegmentationsScoresAndSettings(df, tmp_path):
    """Each patient gets a NIfTI and maps; scores.csv holds those with a truth; scoreFolder finds the same scores."""
    config.OWN_EDITIONS = {'Clinic': editions.Edition(r'case\d+', {'flair': ('flair',)}, {0: 0})}
    table = postprocess.predictFolder(df, makeUnet(), tmp_path / 'out', patchStride=24, probabilities=True)
    ids = list(df.index)
    assert sorted(path.name for path in (tmp_path / 'out' / 'upload').iterdir()) == [f'{name}.nii.gz' for name in ids]
    assert len(list((tmp_path / 'out' / 'maps').iterdir())) == 6
    assert sorted(table['patient'].unique()) == [ids[0], ids[2]]
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / 'out' / 'scores.csv'), table, check_dtype=False)
    settings = json.loads((tmp_path / 'out' / 'settings.json').read_text())
    made = settings['prediction']
    assert made['kind'] == {'patchStride': 24, 'mirror': False, 'planes': None, 'twoLooks': True, 'sliceStep': 2}
    assert made['rules'] is None and made['trainedOn'] is None  # a model that this package has not trained
    assert settings['config']['PATCH_SIZE'] == 32 and settings['found']['TRAIN_FILE'].endswith('train.h5')
    assert settings['versions']['torch'] == torch.__version__
    assert settings['config']['OWN_EDITIONS']['Clinic']['suffixes'] == {'flair': ['flair']}
    pd.testing.assert_frame_equal(postprocess.scoreFolder(df, tmp_path / 'out' / 'upload'), table)


def test_predictFolder_scoresWhatIsWritten(df, tmp_path):
    """A cavity where the edition has none is written as background, and scored so: `scoreFolder` finds the same."""
    config.NO_CLASSES = 5

    class Cavity(torch.nn.Module):
        def forward(self, patches):
            classes = torch.full((len(patches), *patches.shape[2:]), 4)
            classes[:, :9] = 1
            return 9.0 * torch.nn.functional.one_hot(classes, 5).movedim(-1, 1)

    with pytest.warns(UserWarning, match='resection cavity'):
        table = postprocess.predictFolder(df, Cavity(), tmp_path / 'out')
    pd.testing.assert_frame_equal(postprocess.scoreFolder(df, tmp_path / 'out' / 'upload'), table)
    noted = pd.read_csv(tmp_path / 'out' / 'disagreement.csv').set_index('region')['voxels']
    assert (noted['RC'] == 0).all() and (noted['NCR'] > 0).all()


def test_predictFolder_appliesEachRule(writeCase, tmp_path):
    """ET of fewer than N voxels becomes necrotic core; ml is measured by the patient's own voxels."""
    image = np.zeros((40, 40, 4), np.int16)
    image[4:36, 4:36] = np.arange(1, 33)[:, None, None]
    volumes = {**dict.fromkeys(('t1ce', 't2', 'flair'), image), 'seg': np.ones((40, 40, 4), np.uint8)}
    paths = writeCase(volumes, PATIENT, affine=np.diag([2, 2, 2, 1]))
    df = pd.DataFrame([{**dict.fromkeys(COLUMNS), **paths}], index=[PATIENT])

    class Square(torch.nn.Module):
        def forward(self, patches):
            classes = torch.zeros(len(patches), *patches.shape[2:], dtype=torch.long)
            classes[:, 5:9, 5:9] = 3  # 16 pixels on 4 slices: 64 voxels of 8 mm3 = 0.512 ml
            classes[:, 15:30, 15:30] = 2  # larger: always stays
            return 9.0 * torch.nn.functional.one_hot(classes, 4).movedim(-1, 1)

    def labelsWith(**values):
        folder = tmp_path / str(values)
        postprocess.predictFolder(df, Square(), folder, rules=postprocess.Tuning(**values) if values else None)
        return set(np.unique(np.asarray(nib.load(folder / 'upload' / f'{PATIENT}.nii.gz').dataobj)).tolist())

    assert labelsWith() == labelsWith(N=64) == labelsWith(ml=0.5) == {0, 2, 4}
    assert labelsWith(N=65) == {0, 1, 2} and labelsWith(ml=0.52) == labelsWith(N=65, ml=0.52) == {0, 2}


def test_writeScores_writesAnEmptyTable(tmp_path):
    """Without scores the table has its columns and no row; the settings are written nevertheless."""
    table = postprocess.writeScores({}, tmp_path, mirror=True)
    assert list(table.columns) == ['patient', 'region'] and len(table) == 0
    assert (tmp_path / 'scores.csv').read_text() == 'patient,region\n'
    made = json.loads((tmp_path / 'settings.json').read_text())['prediction']
    assert (
        made['kind'] == {'patchStride': None, 'mirror': True, 'planes': None, 'twoLooks': True, 'sliceStep': 2}
        and made['mirror'] is True
    )


def test_scoreFolder_scoresTheTruthAsPerfectInAnyAxisOrder(df, tmp_path):
    """The truth itself, written in another axis order, has Dice 1 and HD95 0 everywhere.

    A truth without images is enough, and the name of the prediction need not reveal the edition.
    """
    rows = df[df['seg'].notna()].assign(t1=None, t1ce=None, t2=None, flair=None).rename({df.index[0]: 'somebody'})
    for patient, paths in rows.iterrows():
        nib.save(nib.as_closest_canonical(nib.load(paths['seg'])), tmp_path / f'{patient}.nii')
    table = postprocess.scoreFolder(rows, tmp_path)
    assert len(table) == 2 * len(config.REGIONS) and (table['dice'] == 1).all() and (table['hd95'] == 0).all()


def test_scoreFolder_measuresInMillimetres(writeCase, tmp_path):
    """Half of a truth with 2 x 1 x 3 mm voxels: sensitivity 1/2, precision 1, HD95 4 mm, 0.48 and 0.24 ml."""
    label = np.zeros((12, 11, 10), np.uint8)
    label[2:6, 2:6, 2:7] = 2
    volumes = {**dict.fromkeys(COLUMNS, np.ones(label.shape, np.int16)), 'seg': label}
    df = pd.DataFrame([writeCase(volumes, PATIENT, affine=np.diag([2, 1, 3, 1]))], index=[PATIENT])
    half = label.copy()
    half[2:4] = 0
    nib.save(nib.Nifti1Image(half, np.diag([2, 1, 3, 1])), tmp_path / f'{PATIENT}.nii.gz')
    row = postprocess.scoreFolder(df, tmp_path).set_index('region').loc['WT']
    assert (row['sensitivity'], row['precision']) == (0.5, 1) and row['hd95'] == pytest.approx(4)
    assert (row['volumeTruth'], row['volumePredicted']) == pytest.approx((0.48, 0.24))


def test_scoreFolder_refusesAMissingOrForeignPrediction(df, tmp_path):
    """A missing prediction, a label of another edition, another shape and an unknown challenge are refused by name."""
    rows = df[df['seg'].notna()]
    with pytest.raises(ValueError, match="rule is 'BraTS24'; there are scores by BraTS2020, BraTS2023"):
        postprocess.scoreFolder(rows, tmp_path, challenges=['BraTS2020', 'BraTS24'])
    with pytest.raises(FileNotFoundError, match=f'no segmentation of {PATIENT}'):
        postprocess.readPrediction(rows.iloc[0], tmp_path)
    with pytest.raises(FileNotFoundError, match='no segmentation of 2 of 2 patients: BraTS20_Training_001'):
        postprocess.scoreFolder(rows, tmp_path)
    for patient, paths in rows.iterrows():
        nib.save(nib.load(paths['seg']), tmp_path / f'{patient}.nii.gz')
    source, file = nib.load(rows['seg'].iloc[1]), tmp_path / f'{rows.index[1]}.nii.gz'
    nib.save(nib.Nifti1Image(np.full(source.shape, 3, np.uint8), source.affine), file)
    with pytest.raises(ValueError, match=r'BraTS20_Training_003.*labels \[3\], but BraTS2020 knows'):
        postprocess.scoreFolder(rows, tmp_path)
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), source.affine), file)
    with pytest.raises(ValueError, match=r'BraTS20_Training_003.*has \(4, 4, 4\) voxels'):
        postprocess.scoreFolder(rows, tmp_path)


def test_scoreFolder_scoresByEveryChallenge(df, tmp_path, capsys):
    """The rows of a rule are those of scorePatient, and of scoreLesions beside them; what a rule lacks is NaN.

    Patients without a truth are counted and left out. readPrediction returns what was written.
    """
    rows = df[df['seg'].notna()]
    moved = {}
    for patient, paths in rows.iterrows():
        moved[patient] = np.roll(patients.readLabel(paths).transpose(2, 0, 1), 2, axis=1)
        patients.saveSegmentation(moved[patient], paths, tmp_path / f'{patient}.nii.gz')
        y, yhat = postprocess.readPrediction(paths, tmp_path)
        assert y.dtype == yhat.dtype == np.uint8
        np.testing.assert_array_equal(yhat, moved[patient])
        np.testing.assert_array_equal(np.roll(y, 2, axis=1), yhat)
    names = list(RULES)
    table = postprocess.scoreFolder(rows, tmp_path, challenges=names)
    assert list(table['rule'].unique()) == names and set(table['patient']) == set(rows.index)
    for (name, patient), part in table.groupby(['rule', 'patient']):
        y, part = patients.readLabel(rows.loc[patient]).transpose(2, 0, 1), part.set_index('region')
        spacing = patients.spacingOf(rows.loc[patient])
        expected = metrics.scorePatient(y, moved[patient], spacing, name)
        pd.testing.assert_frame_equal(part[expected.columns], expected, check_names=False)
        if name == 'BraTS2020':
            assert part.filter(like='lesion').isna().all(axis=None) and part['nsd0.5'].isna().all()
        else:
            lesions = metrics.scoreLesions(y, moved[patient], spacing, name)
            for column in ('dice', 'hd95', 'falsePositive'):
                np.testing.assert_allclose(part[f'lesion{column[0].upper()}{column[1:]}'], lesions[column])
    plain = postprocess.scoreFolder(df, tmp_path)
    assert '1 of 3 patients have no true segmentation' in capsys.readouterr().out and 0 < plain['dice'].min() < 1
    first = table[table['rule'] == 'BraTS2020'][plain.columns].reset_index(drop=True)
    pd.testing.assert_frame_equal(first, plain)


def test_scoreFolder_countsWhatCannotBeScoredAsMissing(df, tmp_path, capsys):
    """No file, and a file on another grid: named, Dice 0 and the penalty in every region; the mean is over both."""
    rows = df[df['seg'].notna()]
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)), tmp_path / f'{rows.index[1]}.nii.gz')
    table = postprocess.scoreFolder(rows, tmp_path, challenges=['BraTS2020', 'BraTS2024', 'BraTS2026'])
    printed = capsys.readouterr().out
    assert '2 of 2 patients count as missing' in printed and f'no segmentation of {rows.index[0]}' in printed
    assert f'{rows.index[1]}' in printed and 'has (4, 4, 4) voxels' in printed
    assert (table[['dice', 'sensitivity', 'specificity', 'volumePredicted']] == 0).all(axis=None)
    for name, penalty in (('BraTS2020', 373.12866), ('BraTS2024', 337), ('BraTS2026', 373)):
        part = table[table['rule'] == name]
        assert (part['hd95'] == penalty).all() and part['volumeTruth'].gt(0).any()
        if name != 'BraTS2020':
            assert (part['lesionHd95'] == penalty).all() and (part['lesionDice'] == 0).all()
            assert part['lesionMissed'].sum() > 0 and (part['lesionFalsePositive'] == 0).all()
    # RC is in neither truth nor prediction, and counts nevertheless
    assert {'RC'} < set(table['region']) and table.groupby('rule')['patient'].nunique().eq(2).all()


def test_scoreFolder_scoresTheCavityOfTheFiles(tmp_path):
    """Label 4 of an edition after treatment is RC by 2024's rule, and background by 2023's."""
    config.EDITION = 'BraTS2024'
    label = np.zeros((20, 20, 20), np.uint8)
    label[2:6, 2:6, 2:6], label[10:16, 10:14, 10:14] = 2, 4
    for name in NEWER:
        save(label if name == 'seg' else label * 0 + 1, tmp_path / f'{AFTER}/{AFTER}-{name}.nii.gz')
    df = patients.makeFileList(tmp_path)
    half = label.copy()
    half[13:][half[13:] == 4] = 0
    save(half, tmp_path / 'out' / f'{df.index[0]}.nii.gz')
    table = postprocess.scoreFolder(df, tmp_path / 'out', challenges=['BraTS2023', 'BraTS2024']).set_index('region')
    of2024 = table[table['rule'] == 'BraTS2024']
    assert of2024.loc['RC', ['dice', 'lesionDice']].tolist() == [pytest.approx(2 / 3)] * 2
    assert of2024.loc['RC', 'volumeTruth'] == pytest.approx(0.096)
    assert (of2024.drop('RC')['dice'] == 1).all() and (table[table['rule'] == 'BraTS2023']['dice'] == 1).all()


def test_scoreFolder_mergesAlongTheAxesOfTheFiles(writeCase, tmp_path):
    """Which lesions are merged follows the file's axes: the same voxels stored from left to right or right to left.

    Two necrotic lesions lie on an enhancing one each; a third touches both enhancing ones and joins the lower-numbered.
    """
    label = np.zeros((60, 12, 12), np.uint8)
    for start, stop in ((2, 5), (19, 32), (50, 53)):
        label[start:stop, 5:8, 4:8] = 1
    label[0:21, 4, 4:8], label[30:60, 4, 4:8] = 3, 3
    yhat = label.copy()
    yhat[2:5][yhat[2:5] == 1] = 0  # the first necrotic lesion is not found
    missed = []
    for number, direction in enumerate((1, -1)):
        patient = f'BraTS20_Training_00{number + 1}'
        seg = np.where(label == 3, 4, label)[::direction]
        volumes = {**dict.fromkeys(COLUMNS, np.ones(label.shape, np.int16)), 'seg': seg}
        affine = np.diag([direction, 1, 1, 1])
        df = pd.DataFrame([writeCase(volumes, patient, affine=affine)], index=[patient])
        folder = tmp_path / f'out{number}'
        save(np.where(yhat == 3, 4, yhat)[::direction], folder / f'{patient}.nii.gz', affine)
        table = postprocess.scoreFolder(df, folder, rules=['BraTS2024']).set_index('region')
        expected = metrics.scoreLesions(label[::direction], yhat[::direction], rule='BraTS2024')
        assert table.loc['NETC', 'lesionDice'] == expected.loc['NETC', 'dice']
        missed.append(expected.loc['NETC', 'missed'])
    assert missed == [0, 1]


def test_predictFolder_dividesThePatientsIntoShards(df, tmp_path):
    """Two shards write the files of one call; scoreFolder refuses while one is missing, then equals the one call."""
    df, model = patients.makeFileList(tmp_path / 'data'), makeUnet()
    expected = postprocess.predictFolder(df, model, tmp_path / 'whole', patchStride=24)
    first = postprocess.predictFolder(df, model, tmp_path / 'parts', part=(1, 2), patchStride=24)
    with pytest.raises(FileNotFoundError, match='has no segmentation of'):
        postprocess.scoreFolder(df, tmp_path / 'parts' / 'upload')
    with pytest.raises(FileNotFoundError, match='no segmentation of 3 of 3 patients'):  # not all scores 0
        postprocess.scoreFolder(df, tmp_path / 'parts', challenges=['BraTS2020'])
    second = postprocess.predictFolder(df, model, tmp_path / 'parts', part=(0, 2), patchStride=24)
    assert set(first['patient']) == set(df.index[1::2]) and set(second['patient']) == set(df.index[::2])
    for file in (tmp_path / 'whole' / 'upload').iterdir():
        assert file.read_bytes() == (tmp_path / 'parts' / 'upload' / file.name).read_bytes()
    pd.testing.assert_frame_equal(postprocess.scoreFolder(df, tmp_path / 'parts' / 'upload'), expected)
    assert sorted(path.name for path in (tmp_path / 'parts').glob('scores*')) == ['scores.0of2.csv', 'scores.1of2.csv']
    with pytest.raises(ValueError, match=r'part is \(2, 2\); \(i, n\) with 0 <= i < n was expected'):
        postprocess.predictFolder(df, model, tmp_path / 'parts', part=(2, 2), patchStride=24)


def test_predictFolder_goesOnWithWhatIsMissingOrOld(df, tmp_path, capsys):
    """A second call predicts a patient whose file is gone, one without scores, and one with a newer file.

    Without a truth, as in a challenge's validation set, the table is empty. A torch.device is noted by its name.
    """
    df, model, folder = patients.makeFileList(tmp_path / 'data'), makeUnet(), tmp_path / 'out'
    options = {'device': torch.device('cpu')}
    assert len(postprocess.predictFolder(df.assign(seg=None), model, folder, **options)) == 0
    assert json.loads((folder / 'settings.json').read_text())['prediction']['device'] == 'cpu'
    expected = postprocess.predictFolder(df, model, folder, **options)

    def goOn(numFinished):
        capsys.readouterr()
        pd.testing.assert_frame_equal(postprocess.predictFolder(df, model, folder, **options), expected)
        assert f'{numFinished} of {len(df)} patients are finished' in capsys.readouterr().out

    goOn(len(df))
    (folder / 'upload' / f'{df.index[0]}.nii.gz').unlink()
    scores = pd.read_csv(folder / 'scores.csv')
    scores[scores['patient'] != df.index[1]].to_csv(folder / 'scores.csv', index=False)
    goOn(len(df) - 2)
    os.utime(df['seg'].iloc[0], (2e9, 2e9))  # its truth was mended
    goOn(len(df) - 1)
    Path(df['t2'].iloc[1]).write_bytes(Path(df['t2'].iloc[0]).read_bytes())
    os.utime(df['t2'].iloc[1], (1, 1))  # another image, older than its segmentation
    file = folder / 'upload' / f'{df.index[1]}.nii.gz'
    expected = postprocess.predictFolder(df, model, tmp_path / 'fresh', **options)
    goOn(len(df) - 1)
    assert file.read_bytes() == (tmp_path / 'fresh' / 'upload' / file.name).read_bytes()
    file.write_bytes(file.read_bytes()[:-9])  # cut short, as by a full disk
    goOn(len(df) - 1)
    save(np.ones((40, 40, 16), np.uint8), file)  # corrected by hand
    before = file.read_bytes()
    goOn(len(df))
    assert file.read_bytes() == before
    postprocess.predictFolder(df, model, folder, probabilities=True, **options)
    assert len(list((folder / 'maps').iterdir())) == 2 * len(df) and file.read_bytes() == before
    os.utime(df['t2'].iloc[0], (2, 2))  # another image: its maps are those of the one before
    goOn(len(df) - 1)
    assert len(list((folder / 'maps').iterdir())) == 2 * len(df) - 2
    file, image = (folder / 'upload' / f'{df.index[0]}.nii.gz'), nib.load(folder / 'upload' / f'{df.index[0]}.nii.gz')
    nib.save(nib.Nifti1Image(np.ones(image.shape, np.uint8), None, image.header), file)  # corrected, with our header
    before = file.read_bytes()
    os.utime(df['seg'].iloc[0], (1e9, 1e9))
    goOn(len(df))
    assert file.read_bytes() == before
    config.OWN_EDITIONS = {'Clinic': editions.Edition(r'case\d+', {'flair': ('flair',)}, {0: 0})}
    goOn(2)  # the other is predicted again, as its labels may be others


def test_predictFolder_keepsNoOldScoresIfItIsKilled(df, tmp_path, monkeypatch):
    """A patient with another truth is not finished because its old scores are there."""
    df = patients.makeFileList(tmp_path / 'data')
    postprocess.predictFolder(df, makeUnet(), tmp_path / 'out')
    Path(df['seg'].iloc[0]).write_bytes(Path(df['seg'].iloc[1]).read_bytes())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(postprocess.folder._GrowingTable, 'add', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        postprocess.predictFolder(df, makeUnet(), tmp_path / 'out')
    scores = postprocess.predictFolder(df, makeUnet(), tmp_path / 'out')
    pd.testing.assert_frame_equal(scores, postprocess.predictFolder(df, makeUnet(), tmp_path / 'fresh'))


def test_predictFolder_goesOnWithATransformInAnotherProcess(df, tmp_path, capsys):
    """A function in the transform is another object there, which does not make it another transform."""
    for _ in range(2):
        transform = transforms.volumeTransform()
        transform.masking_method = lambda x, own=transform.masking_method: own(x)
        postprocess.predictFolder(df, makeUnet(), tmp_path / 'out', transform)
    assert '3 of 3 patients are finished' in capsys.readouterr().out


def test_predictFolder_takesTheGridOfTheImagesThatItReads(df, tmp_path):
    """An image that the model does not need may lie on another grid, though it is the first of `config`."""
    for file in df['t1ce']:
        save(np.ones((20, 40, 16), np.int16), Path(file), np.diag([2, 1, 1, 1]))
    model = smp.Unet('resnet18', encoder_weights=None, in_channels=2, classes=4, decoder_channels=(32, 16, 16, 8, 8))
    model.provenance = {
        'settings': settingsOf(modalities=['t2', 'flair'], planes=['axial'], activation='softmax'),
        'patients': {},
        'earlier': {},
        'validated': {},
    }
    with pytest.warns(UserWarning, match='MODALITIES'):
        table = postprocess.predictFolder(df, model, tmp_path / 'out')
    assert len(table) and (table['volumeTruth'] > 0).any()
    scored = postprocess.scoreFolder(df, tmp_path / 'out' / 'upload')
    pd.testing.assert_frame_equal(scored, table, check_dtype=False)  # by the voxels of the truth, not those of t1ce
    for patient, paths in df.iterrows():
        written, image = (nib.load(file) for file in (tmp_path / 'out' / 'upload' / f'{patient}.nii.gz', paths['t2']))
        assert written.shape == image.shape and (written.affine == image.affine).all()


def test_predictFolder_refusesTheFolderOfAnotherProgram(df, tmp_path):
    """Segmentations that it did not write are not overwritten."""
    file = tmp_path / 'out' / 'upload' / f'{df.index[0]}.nii.gz'
    save(np.zeros((40, 40, 16), np.uint8), file)
    with pytest.raises(ValueError, match='upload holds segmentations of another program'):
        postprocess.predictFolder(df, makeUnet(), tmp_path / 'out')


def test_predictFolder_losesNoScoresWhenItIsStopped(df, tmp_path, monkeypatch):
    """A large table is not written after each patient, but whenever the call ends."""
    finish, isDue = postprocess.folder._finishPatient, property(lambda table: float('inf'), lambda table, value: None)

    def finishOrStop(paths, *arguments, **options):
        if paths.name == df.index[2]:
            raise KeyboardInterrupt
        assert not (tmp_path / 'out' / 'scores.csv').exists()
        return finish(paths, *arguments, **options)

    monkeypatch.setattr(postprocess.folder._GrowingTable, 'due', isDue, raising=False)
    monkeypatch.setattr(postprocess.folder, '_finishPatient', finishOrStop)
    df = patients.makeFileList(tmp_path / 'data')
    with pytest.raises(KeyboardInterrupt):
        postprocess.predictFolder(df, makeUnet(), tmp_path / 'out')
    assert list(pd.read_csv(tmp_path / 'out' / 'scores.csv')['patient'].unique()) == list(df.index[:2])
    assert list(pd.read_csv(tmp_path / 'out' / 'disagreement.csv')['patient'].unique()) == list(df.index[:2])
