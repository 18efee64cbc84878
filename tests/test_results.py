import json

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import segmentation_models_pytorch as smp
import torch
from conftest import COLUMNS

import config
import metrics
import patients
import phantom
import results


def volumesOf(image):
    return dict(zip(['t1ce', 't2', 'flair'], image, strict=True))


def test_saveSegmentation_writesTheImagesGridAndTheEditionsLabels(writeCase, tmp_path):
    """Opened again: labels 0, 1, 2, 4 as uint8 without scaling, shape, sform, qform and codes of the images."""
    affine = np.array([[-1, 0, 0, 3], [0, -1, 0, 239], [0, 0, 1.5, -7], [0, 0, 0, 1]])
    paths = writeCase(volumesOf(np.ones((3, 4, 5, 6), np.int16)), affine=affine)
    image = nib.load(paths['t1ce'])
    image.set_qform(affine, 1)
    image.set_sform(affine, 4)
    nib.save(image, paths['t1ce'])
    yhat = np.zeros((6, 4, 5), np.int64)  # (D, W, H) in RAS order
    yhat[5, 0, 0], yhat[0, 3, 4], yhat[2, 1, 3] = 1, 2, 3
    results.saveSegmentation(yhat, paths, tmp_path / 'new' / 'out.nii.gz')
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
    """Where sform and qform codes are 0, theirs are 0 too."""
    paths = writeCase(volumesOf(np.ones((3, 4, 5, 6), np.int16)))
    image = nib.load(paths['t1ce'])
    image.header['sform_code'] = image.header['qform_code'] = 0
    plain = nib.Nifti1Image(np.asarray(image.dataobj), None, image.header)
    for modality in config.MODALITIES:
        nib.save(plain, paths[modality])
    yhat = np.zeros((6, 4, 5), np.uint8)
    yhat[1, 0, 2] = 3
    results.saveSegmentation(yhat, paths, tmp_path / 'out.nii')
    written = nib.load(tmp_path / 'out.nii')
    assert written.header['sform_code'] == 0 and written.header['qform_code'] == 0
    np.testing.assert_array_equal(written.affine, nib.load(paths['t1ce']).affine)
    _, classes = patients.readCase({**paths, 'seg': str(tmp_path / 'out.nii'), 't1': paths['t2']})
    np.testing.assert_array_equal(classes.transpose(2, 0, 1), yhat)


def test_saveSegmentation_refusesWhatIsNotASegmentation(writeCase, tmp_path):
    """Another shape, a class beyond 3 and a name of another format are refused."""
    paths = writeCase(volumesOf(np.ones((3, 4, 5, 6), np.int16)))
    for yhat, name, words in (
        (np.zeros((6, 5, 4), int), 'a.nii.gz', r'shape \(5, 4, 6\) were given, the images are \(4, 5, 6\)'),
        (np.full((6, 4, 5), 4), 'a.nii.gz', r'classes \[4\] were given, 0 to 3 expected'),
        (np.zeros((6, 4, 5), int), 'a.png', r'ends in \.nii or \.nii\.gz'),
    ):
        with pytest.raises(ValueError, match=words):
            results.saveSegmentation(yhat, paths, tmp_path / name)
        assert not (tmp_path / name).exists()


def test_saveProbabilities_keepsPlaceAndMeasuresDoubt(writeCase, tmp_path):
    """Opened again on the images' grid; the entropy is 0 for certainty, 1 for four equal classes, 1/2 for two."""
    affine = np.array([[-1, 0, 0, 3], [0, -1, 0, 4], [0, 0, 1, 0], [0, 0, 0, 1]])
    paths = writeCase(volumesOf(np.ones((3, 4, 5, 6), np.int16)), affine=affine)
    probability = np.zeros((6, 4, 4, 5), np.float32)
    probability[:, 0] = 1
    probability[2, :, 1, 3] = 0.25
    probability[5, :, 0, 0] = [0, 0.5, 0, 0.5]
    results.saveProbabilities(torch.from_numpy(probability), paths, tmp_path / 'p.nii.gz')
    written, entropy = nib.load(tmp_path / 'p.nii.gz'), nib.load(tmp_path / 'p_entropy.nii.gz')
    assert written.shape == (4, 5, 6, 4) and written.get_data_dtype() == entropy.get_data_dtype() == np.float32
    np.testing.assert_array_equal(written.affine, affine)
    np.testing.assert_array_equal(np.asarray(written.dataobj)[3, 4, 5], [0, 0.5, 0, 0.5])  # LPS: two axes are turned
    found = np.asarray(entropy.dataobj)
    assert (
        found[3, 4, 5] == pytest.approx(0.5)
        and found[2, 1, 2] == pytest.approx(1)
        and found.sum() == pytest.approx(1.5)
    )


@pytest.fixture
def cohortOf(tmp_path):
    phantom.makeCases(tmp_path / 'data', 3, shape=(40, 40, 16))
    df = patients.makeFileList(tmp_path / 'data')
    df.loc['BraTS20_Training_002', 'seg'] = None
    return df


def makeNetwork():
    torch.manual_seed(0)
    return smp.Unet('resnet18', encoder_weights=None, in_channels=3, classes=4, decoder_channels=(32, 16, 16, 8, 8))


def test_predictFolder_leavesWhatAChallengeTakes(cohortOf, tmp_path):
    """One NIfTI a patient under its own name, scores.csv of those with a truth, settings.json; maps if asked for."""
    table = results.predictFolder(cohortOf, makeNetwork(), tmp_path / 'out', patchStride=24, probabilities=True)
    ids = list(cohortOf.index)
    assert sorted(path.name for path in (tmp_path / 'out' / 'upload').iterdir()) == [f'{name}.nii.gz' for name in ids]
    assert len(list((tmp_path / 'out' / 'maps').iterdir())) == 6
    assert sorted(table['patient'].unique()) == [ids[0], ids[2]]
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / 'out' / 'scores.csv'), table, check_dtype=False)
    settings = json.loads((tmp_path / 'out' / 'settings.json').read_text())
    assert settings['prediction']['patchStride'] == 24 and settings['config']['PATCH_SIZE'] == 32
    assert settings['versions']['torch'] == torch.__version__
    again = results.scoreFolder(cohortOf, tmp_path / 'out' / 'upload')
    pd.testing.assert_frame_equal(again, table)


def test_predictFolder_needsNoTruth(cohortOf, tmp_path):
    """Patients without any segmentation, as a challenge's validation set, are predicted; the table is empty."""
    table = results.predictFolder(cohortOf.assign(seg=None), makeNetwork(), tmp_path / 'out')
    assert len(table) == 0 and len(list((tmp_path / 'out' / 'upload').iterdir())) == 3
    assert (tmp_path / 'out' / 'settings.json').is_file()


def test_predictFolder_appliesTheTunedRules(cohortOf, tmp_path):
    """With rules that no part survives every voxel written is background."""
    results.predictFolder(cohortOf, makeNetwork(), tmp_path / 'out', smallET=10**6, smallPart=10**6)
    for file in (tmp_path / 'out' / 'upload').iterdir():
        assert not np.asarray(nib.load(file).dataobj).any()


def test_scoreFolder_scoresTheTruthAsPerfectInAnyOrder(cohortOf, tmp_path):
    """The truth itself, written by another program in another axis order, has Dice 1 and HD95 0 everywhere."""
    for patient, paths in cohortOf[cohortOf['seg'].notna()].iterrows():
        nib.save(nib.as_closest_canonical(nib.load(paths['seg'])), tmp_path / f'{patient}.nii')
    table = results.scoreFolder(cohortOf, tmp_path)
    assert len(table) == 2 * len(config.REGIONS) and (table['dice'] == 1).all() and (table['hd95'] == 0).all()


def test_scoreFolder_refusesAMissingOrForeignPrediction(cohortOf, tmp_path):
    """A patient without a prediction, another shape and a label of another edition are named; nothing is scored."""
    rows = cohortOf[cohortOf['seg'].notna()]
    with pytest.raises(FileNotFoundError, match='no segmentation of 2 patients: BraTS20_Training_001'):
        results.scoreFolder(rows, tmp_path)
    for patient, paths in rows.iterrows():
        nib.save(nib.load(paths['seg']), tmp_path / f'{patient}.nii.gz')
    source = nib.load(rows['seg'].iloc[1])
    file = tmp_path / f'{rows.index[1]}.nii.gz'
    nib.save(nib.Nifti1Image(np.full(source.shape, 3, np.uint8), source.affine), file)
    with pytest.raises(ValueError, match=r'BraTS20_Training_003.*labels \[3\], but BraTS2020 knows'):
        results.scoreFolder(rows, tmp_path)
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), source.affine), file)
    with pytest.raises(ValueError, match=r'BraTS20_Training_003.*has \(4, 4, 4\) voxels'):
        results.scoreFolder(rows, tmp_path)


def test_scoreFolder_isAsScorePatient(cohortOf, tmp_path):
    """The row of a patient is what scorePatient gives of the same arrays."""
    rows = cohortOf.iloc[[0]]
    label = patients.readLabel(rows.iloc[0]).transpose(2, 0, 1)
    moved = np.roll(label, 2, axis=1)
    results.saveSegmentation(moved, rows.iloc[0], tmp_path / f'{rows.index[0]}.nii.gz')
    spacing = patients.spacingOf(rows.iloc[0])
    expected = metrics.scoreTable({rows.index[0]: metrics.scorePatient(label, moved, spacing)})
    pd.testing.assert_frame_equal(results.scoreFolder(rows, tmp_path), expected)


def test_scoreFolder_knowsTruthFromPredictionAndTheVoxels(writeCase, tmp_path):
    """A prediction with half of a 2 x 1 x 3 mm truth: sensitivity 1/2, precision 1, volumes 0.48 and 0.24 ml."""
    label = np.zeros((12, 11, 10), np.uint8)
    label[2:6, 2:6, 2:7] = 2
    paths = writeCase(dict.fromkeys(('t1', 't1ce', 't2', 'flair'), np.ones((12, 11, 10), np.int16)) | {'seg': label},
                      affine=np.diag([2, 1, 3, 1]))  # fmt: skip
    df = pd.DataFrame([paths], index=['BraTS20_Training_001'])
    written = label.copy()
    written[2:4] = 0
    nib.save(nib.Nifti1Image(written, np.diag([2, 1, 3, 1])), tmp_path / 'BraTS20_Training_001.nii.gz')
    row = results.scoreFolder(df, tmp_path).set_index('region').loc['WT']
    assert (row['sensitivity'], row['precision']) == (0.5, 1) and row['hd95'] == pytest.approx(4)
    assert (row['volumeTruth'], row['volumePredicted']) == pytest.approx((0.48, 0.24))


def test_predictFolder_appliesEachRule(writeCase, tmp_path):
    """Enhancing tumor below smallET becomes necrotic core; smallPart is in ml, by the patient's own voxels."""
    image = np.zeros((3, 40, 40, 4), np.int16)
    image[:, 4:36, 4:36] = np.arange(1, 33)[:, None, None]
    paths = writeCase(dict(zip(('t1ce', 't2', 'flair'), image, strict=True)), affine=np.diag([2, 2, 2, 1]))
    paths |= writeCase({'seg': np.ones((40, 40, 4), np.uint8)}, affine=np.diag([2, 2, 2, 1]))
    df = pd.DataFrame([{**dict.fromkeys(COLUMNS), **paths}], index=['BraTS20_Training_001'])

    class Dots(torch.nn.Module):
        def forward(self, patches):
            classes = torch.zeros(len(patches), *patches.shape[2:], dtype=torch.long)
            classes[:, 5:9, 5:9] = 3  # 16 pixels on 4 slices: 64 voxels of 8 mm3 = 0.512 ml
            return 9.0 * torch.nn.functional.one_hot(classes, 4).movedim(-1, 1)

    def write(name, **rules):
        results.predictFolder(df, Dots(), tmp_path / name, **rules)
        return np.unique(
            np.asarray(nib.load(tmp_path / name / 'upload' / 'BraTS20_Training_001.nii.gz').dataobj)
        ).tolist()

    assert write('a') == [0, 4] and write('b', smallET=65) == [0, 1] and write('c', smallPart=0.5) == [0, 4]
    assert write('d', smallPart=0.52) == [0]


def test_scoreFolder_asksTheTruthForItsEdition(cohortOf, tmp_path):
    """A truth folder of segmentations alone is enough: the name of the prediction need not tell an edition."""
    rows = cohortOf.iloc[[0]].assign(t1=None, t1ce=None, t2=None, flair=None)
    nib.save(nib.load(rows['seg'].iloc[0]), tmp_path / f'{rows.index[0]}.nii.gz')
    assert (results.scoreFolder(rows, tmp_path)['dice'] == 1).all()
