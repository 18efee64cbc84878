import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

import config
import patients

COLUMNS = ['t1', 't1ce', 't2', 'flair', 'seg']


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names(patient, columns=COLUMNS, ending='.nii.gz'):
    return [f'{patient}/{patient}_{column}{ending}' for column in columns]


def listOf(ids, seg=True):
    rows = {patient: [f'{patient}_{column}.nii' for column in COLUMNS] for patient in ids}
    table = pd.DataFrame.from_dict(rows, orient='index', columns=COLUMNS)
    return table if seg else table.assign(seg=None)


def test_makeFileList_findsBothYearsHoweverDeep(tmp_path):
    """2020 as .nii and 2021 as .nii.gz are found below one folder, training and validation together, sorted."""
    touch(tmp_path, *(f'a/b/{name}' for name in names('BraTS20_Training_002', ending='.nii')))
    touch(tmp_path, *(f'c/{name}' for name in names('BraTS2021_00001')))
    touch(tmp_path, *(f'd/e/f/{name}' for name in names('BraTS20_Validation_001', COLUMNS[:4])))
    table = patients.makeFileList(tmp_path)
    assert list(table.index) == ['BraTS2021_00001', 'BraTS20_Training_002', 'BraTS20_Validation_001']
    assert list(table.columns) == COLUMNS
    assert table.loc['BraTS2021_00001', 't2'] == str(tmp_path / 'c/BraTS2021_00001/BraTS2021_00001_t2.nii.gz')
    assert table.loc['BraTS20_Validation_001', 'seg'] is None


def test_makeFileList_knowsPatient355(tmp_path):
    """The segmentation of patient 355, published under another name, is that patient's."""
    touch(tmp_path, *names('BraTS20_Training_355', COLUMNS[:4]), 'BraTS20_Training_355/W39_1998.09.19_Segm.nii')
    table = patients.makeFileList(tmp_path)
    assert table.loc['BraTS20_Training_355', 'seg'].endswith('W39_1998.09.19_Segm.nii')


def test_makeFileList_passesOverStrayFiles(tmp_path):
    """Hidden files, tables, results for upload and other NIfTI files are no patients."""
    touch(tmp_path, *names('BraTS2021_00001'), 'BraTS2021_00001/._BraTS2021_00001_t1.nii.gz', '.DS_Store')
    touch(tmp_path, 'name_mapping.csv', 'results/BraTS2021_00001.nii.gz', 'atlas.nii')
    assert list(patients.makeFileList(tmp_path).index) == ['BraTS2021_00001']


def test_makeFileList_endsInALoopOfLinks(tmp_path):
    """A link to a folder above is entered once at most."""
    touch(tmp_path, *names('BraTS2021_00001'))
    (tmp_path / 'BraTS2021_00001' / 'loop').symlink_to(tmp_path, target_is_directory=True)
    assert list(patients.makeFileList(tmp_path).index) == ['BraTS2021_00001']


def test_makeFileList_refusesAPatientTwice(tmp_path):
    """Two copies of a patient would leak from training into testing: both paths are named."""
    touch(tmp_path, *names('BraTS2021_00001'), *(f'copy/{name}' for name in names('BraTS2021_00001')))
    with pytest.raises(ValueError, match=r'BraTS2021_00001 has \w+ twice: .*copy'):
        patients.makeFileList(tmp_path)


def test_makeFileList_asksForTheEditionOfForeignNames(tmp_path):
    """A name that tells no edition is refused until config.EDITION declares one."""
    touch(tmp_path, *names('Smith'))
    with pytest.raises(ValueError, match=r'Smith_\w+\.nii\.gz cannot be told .* config\.EDITION'):
        patients.makeFileList(tmp_path)
    config.EDITION = 'BraTS2020'
    assert list(patients.makeFileList(tmp_path).index) == ['Smith']


@pytest.mark.parametrize('folder', ['absent', ''])
def test_makeFileList_refusesAFolderWithoutPatients(tmp_path, folder):
    """A folder that is not there, or empty, is named."""
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        patients.makeFileList(tmp_path / folder)


def test_split_isAPartitionBySeed():
    """Every annotated patient is in one set; the same seed gives the same sets, another seed others."""
    table = listOf([f'BraTS2021_{number:05d}' for number in range(40)])
    sets = patients.split(table)
    assert [len(part) for part in sets] == [28, 6, 6]
    assert sorted(itertools.chain(*(part.index for part in sets))) == list(table.index)
    again = patients.split(table.sample(frac=1, random_state=1))
    assert all(list(a.index) == list(b.index) for a, b in zip(sets, again, strict=True))
    config.SEED = 1
    assert list(patients.split(table)[2].index) != list(sets[2].index)


@pytest.mark.parametrize('number', range(3, 12))
def test_split_leavesNoSetEmptyFromThreePatientsOn(number):
    """However few the patients, each of the three sets has one."""
    assert all(len(part) for part in patients.split(listOf([f'BraTS2021_{i:05d}' for i in range(number)])))


def test_split_countsThoseWithoutSegmentation(capsys):
    """Patients without a seg, None or NaN, are in no set, and their number is printed."""
    table = listOf([f'BraTS2021_{number:05d}' for number in range(6)])
    table.loc['BraTS2021_00001', 'seg'] = None
    table.loc['BraTS2021_00004', 'seg'] = np.nan
    sets = patients.split(table)
    assert sum(map(len, sets)) == 4
    assert '2 of 6 patients have no segmentation' in capsys.readouterr().out
    with pytest.raises(ValueError, match='None of the 6'):
        patients.split(table.assign(seg=None))


def test_split_keepsTheMixOfGrades(tmp_path):
    """With 30 HGG and 10 LGG in name_mapping.csv every set has three HGG to one LGG."""
    ids = [f'BraTS20_Training_{number:03d}' for number in range(40)]
    for patient in ids:
        touch(tmp_path, *names(patient))
    grades = ['HGG'] * 30 + ['LGG'] * 10
    pd.DataFrame({'Grade': grades, 'BraTS_2020_subject_ID': ids}).to_csv(tmp_path / 'name_mapping.csv', index=False)
    config.VAL_FRACTION = config.TEST_FRACTION = 0.2
    table = patients.makeFileList(tmp_path)
    told = patients.readGrades(table)
    assert list(told) == grades
    assert [told[part.index].value_counts().to_dict() for part in patients.split(table)] == [
        {'HGG': 18, 'LGG': 6},
        {'HGG': 6, 'LGG': 2},
        {'HGG': 6, 'LGG': 2},
    ]


def volumesOf(image, label=None):
    volumes = dict(zip(['t1ce', 't2', 'flair'], image, strict=True))
    return volumes if label is None else {**volumes, 'seg': label}


def test_readCase_givesChannelsAndClasses(writeCase):
    """Channels follow config.MODALITIES, label 4 becomes class 3, values and dtypes are as promised."""
    image = np.arange(3 * 24, dtype=np.int16).reshape(3, 2, 3, 4) - 5
    label = np.array([0, 1, 2, 4], np.uint8) * np.ones((2, 3, 1), np.uint8)
    paths = writeCase(volumesOf(image, label))
    config.MODALITIES = ('flair', 't1ce')
    read, classes = patients.readCase(paths)
    assert read.dtype == np.float32 and classes.dtype == np.uint8
    np.testing.assert_array_equal(read, image[[2, 0]])
    np.testing.assert_array_equal(classes[0, 0], [0, 1, 2, 3])


def test_readCase_mendsEveryAxisOrder(writeCase):
    """All 48 axis orders of one volume are read to the same array, an image in one order and its seg in another too."""
    image = np.arange(3 * 60, dtype=np.int16).reshape(3, 3, 4, 5)
    label = (np.arange(60) % 3).astype(np.uint8).reshape(3, 4, 5)
    for order in itertools.permutations(range(3)):
        for flips in itertools.product((1, -1), repeat=3):
            toFile = nib.orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], np.stack([order, flips], axis=1))
            affine = nib.orientations.inv_ornt_aff(toFile, (3, 4, 5))
            turned = [nib.apply_orientation(volume, toFile) for volume in image]
            paths = writeCase(volumesOf(turned), affine=affine)
            paths |= writeCase({'seg': label})
            read, classes = patients.readCase(paths)
            np.testing.assert_array_equal(read, image)
            np.testing.assert_array_equal(classes, label)
            yhat = label.transpose(2, 0, 1)
            patients.saveSegmentation(yhat, paths, Path(paths['seg']).parent / 'out.nii.gz')
            written, source = nib.load(Path(paths['seg']).parent / 'out.nii.gz'), nib.load(paths['t1ce'])
            assert nib.aff2axcodes(written.affine) == nib.aff2axcodes(source.affine)
            np.testing.assert_array_equal(np.asarray(written.dataobj), nib.apply_orientation(label, toFile))


def test_readCase_roundsFloatLabelsButNotInterpolatedOnes(writeCase):
    """A float seg is rounded where that moves nothing by more than 1e-3, and refused where it would."""
    image, label = np.ones((3, 4, 4, 4), np.int16), np.full((4, 4, 4), 4.0)
    label[0, 0, 0] = 1.0004
    _, classes = patients.readCase(writeCase(volumesOf(image, label)))
    assert classes[0, 0, 0] == 1 and classes[1, 1, 1] == 3
    label[0, 0, 0] = 1.4
    with pytest.raises(ValueError, match=r'BraTS20_Training_001.*between the labels'):
        patients.readCase(writeCase(volumesOf(image, label)))


def test_readCase_withoutSegGivesNone(writeCase):
    """No path, None and NaN all mean that there is no segmentation."""
    paths = writeCase(volumesOf(np.ones((3, 4, 4, 4), np.int16)))
    for row in (paths, {**paths, 'seg': None}, pd.Series({**paths, 'seg': np.nan}, name='P1')):
        assert patients.readCase(row)[1] is None


def spoil(kind):
    """Gives volumes, and what the error must say, for one kind of bad patient."""
    image, label = np.ones((3, 4, 5, 6), np.float32), np.zeros((4, 5, 6), np.float32)
    volumes = volumesOf(image, label)
    if kind == 'unknown label':
        label[0, 0, 0] = 3
        return volumes, r'_seg\.nii\.gz has the labels \[0, 3\]; its edition knows \[0, 1, 2, 4\]'
    if kind in ('nan', 'inf', '2e6', '-2e6'):
        image[1, 0, 0, 0] = float(kind)
        return volumes, r'_t2\.nii\.gz cannot be used: its values run from'
    if kind == 'nan label':
        label[0, 0, 0] = np.nan
        return volumes, r'_seg\.nii\.gz cannot be used: its values run from'
    if kind == 'shape':
        return {**volumes, 'flair': np.ones((4, 5, 7), np.int16)}, r'flair\.nii\.gz has \(4, 5, 7\) voxels, t1ce has'
    if kind == 'dimension':
        return {**volumes, 't1ce': np.ones((4, 5, 6, 2), np.int16)}, r'its header says \(4, 5, 6, 2\); a 3-D volume'
    raise AssertionError(kind)


@pytest.mark.parametrize('kind', ['unknown label', 'nan', 'inf', '2e6', '-2e6', 'nan label', 'shape', 'dimension'])
def test_readCase_refusesBadVolumesByName(writeCase, kind):
    """Bad voxels, labels and shapes are refused with patient, file, what was found and what was expected."""
    volumes, words = spoil(kind)
    with pytest.raises(ValueError, match='BraTS20_Training_001: .*' + words):
        patients.readCase(writeCase(volumes))


def test_readCase_refusesAnotherGrid(writeCase):
    """A seg that lies a voxel beside the images is refused; a hair's breadth is not."""
    image, label = np.ones((3, 4, 4, 4), np.int16), np.zeros((4, 4, 4), np.uint8)
    paths = writeCase(volumesOf(image))
    patients.readCase(paths | writeCase({'seg': label}, affine=nib.affines.from_matvec(np.eye(3), [0, 0, 0.01])))
    with pytest.raises(ValueError, match=r'_seg\.nii\.gz lies up to 1\.0 mm away from t1ce'):
        patients.readCase(paths | writeCase({'seg': label}, affine=nib.affines.from_matvec(np.eye(3), [0, 0, 1])))


@pytest.mark.parametrize('kept', [0, 100, 500])
def test_readCase_refusesATruncatedFile(writeCase, kept):
    """A file that was cut off is named, whatever of it is left."""
    generator = np.random.default_rng(0)
    paths = writeCase(volumesOf(generator.integers(0, 999, (3, 12, 12, 12)).astype(np.int16)))
    Path(paths['t2']).write_bytes(Path(paths['t2']).read_bytes()[:kept])
    with pytest.raises(ValueError, match=r'BraTS20_Training_001: .*_t2\.nii\.gz cannot be used'):
        patients.readCase(paths)


def test_readCase_refusesAMissingModality(writeCase):
    """A modality without a path, or whose file is gone, is named."""
    paths = writeCase(volumesOf(np.ones((3, 4, 4, 4), np.int16)))
    with pytest.raises(FileNotFoundError, match=r'no file for the modality flair'):
        patients.readCase({**paths, 'flair': None})
    Path(paths['flair']).unlink()
    with pytest.raises(FileNotFoundError, match=r'_flair\.nii\.gz does not exist'):
        patients.readCase(paths)


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
    """Where sform and qform codes are 0, theirs are 0 too."""
    paths = writeCase(volumesOf(np.ones((3, 4, 5, 6), np.int16)))
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


def test_saveSegmentation_refusesWhatIsNotASegmentation(writeCase, tmp_path):
    """Another shape, a class beyond 3 and a name of another format are refused."""
    paths = writeCase(volumesOf(np.ones((3, 4, 5, 6), np.int16)))
    for yhat, name, words in (
        (np.zeros((6, 5, 4), int), 'a.nii.gz', r'shape \(5, 4, 6\) was given, the images are \(4, 5, 6\)'),
        (np.full((6, 4, 5), 4), 'a.nii.gz', r'classes \[4\] were given, 0 to 3 expected'),
        (np.zeros((6, 4, 5), int), 'a.png', r'ends in \.nii or \.nii\.gz'),
    ):
        with pytest.raises(ValueError, match=words):
            patients.saveSegmentation(yhat, paths, tmp_path / name)
        assert not (tmp_path / name).exists()
