import gzip
import itertools
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

import config
import patients
import transforms
import utils
from conftest import COLUMNS, LAYOUTS, drawCases, names, save, touch, volumesOf, writeLayout
from patients import editions, reading, volumes


def test_makeFileList_findsSeveralEditionsAtAnyDepth(tmp_path):
    """Training, validation and test sets of several editions are found below one folder, sorted by id."""
    touch(tmp_path, *(f'a/b/{name}' for name in names('BraTS20_Training_002', ending='.nii')))
    touch(tmp_path, *(f'c/{name}' for name in names('BraTS2021_00001')))
    touch(tmp_path, *(f'd/e/f/{name}' for name in names('BraTS20_Validation_001', COLUMNS[:4])))
    touch(tmp_path, *names('BraTS20_Testing_001', COLUMNS[:4]), 'imagesTs/BRATS_485.nii.gz')
    # the segmentation of patient 355 was published under another name
    touch(tmp_path, *names('BraTS20_Training_355', COLUMNS[:4]), 'BraTS20_Training_355/W39_1998.09.19_Segm.nii')
    table = patients.makeFileList(tmp_path)
    segmented = ['BraTS2021_00001', 'BraTS20_Training_002', 'BraTS20_Training_355']
    ids = ['BRATS_485', 'BraTS2021_00001', 'BraTS20_Testing_001', *segmented[1:], 'BraTS20_Validation_001']
    assert list(table.index) == ids and list(table.columns) == COLUMNS
    assert list(table.index[table['seg'].notna()]) == segmented and table.loc['BRATS_485', 'seg'] is None
    assert table.loc['BraTS2021_00001', 't2'] == str(tmp_path / 'c/BraTS2021_00001/BraTS2021_00001_t2.nii.gz')


@pytest.mark.parametrize('edition', [None, 'BraTS2020'])
def test_makeFileList_ignoresOtherFiles(tmp_path, capsys, edition):
    """Hidden files, tables, results, other organs of the Decathlon and segmentations without images are no patients."""
    config.EDITION = edition
    touch(tmp_path, *names('BraTS2021_00001'), 'BraTS2021_00001/._BraTS2021_00001_t1.nii.gz', '.DS_Store')
    touch(tmp_path, 'name_mapping.csv', 'results/BraTS2021_00001.nii.gz', 'atlas.nii', 'imagesTr/._BRATS_001.nii.gz')
    touch(tmp_path, 'Task02/imagesTr/la_003.nii.gz', 'Task02/labelsTr/la_003.nii.gz')
    touch(tmp_path, 'results/patient7_seg.nii.gz', 'BraTS2021_00002_seg.nii.gz')
    assert list(patients.makeFileList(tmp_path).index) == ['BraTS2021_00001']
    assert 'BraTS2021_00002_seg.nii.gz is ignored: BraTS2021_00002 has no image' in capsys.readouterr().out


def test_makeFileList_refusesAPatientTwice(tmp_path):
    """Two copies of a patient would leak from training into testing: both paths are named."""
    touch(tmp_path, *names('BraTS2021_00001'), *(f'copy/{name}' for name in names('BraTS2021_00001')))
    with pytest.raises(ValueError, match=r'BraTS2021_00001 has \w+ twice: .* and .*copy'):
        patients.makeFileList(tmp_path)


def test_makeFileList_refusesAPatientOfTwoEditions(tmp_path):
    """Images of 2020 and a mask of one's own under the same id: nobody knows which table its labels have."""
    config.OWN_EDITIONS = {
        'Mine': editions.Edition(r'BraTS20_Training_\d+', {'corrected': ('seg',)}, {0: 0, 1: 2, 2: 1, 4: 3})
    }
    touch(tmp_path, 'BraTS20_Training_001_flair.nii.gz', 'BraTS20_Training_001_corrected.nii.gz')
    with pytest.raises(ValueError, match=r'Patient BraTS20_Training_001 has files of the editions Mine and BraTS2020'):
        patients.makeFileList(tmp_path)


def test_makeFileList_entersALinkedFolderOnceAndTellsOfAClosedOne(tmp_path, monkeypatch, capsys):
    """A second name of a folder is no second patient; patients in a folder that cannot be listed are missed aloud."""
    touch(
        tmp_path,
        *(f'a/{name}' for name in names('BraTS2021_00001')),
        *(f'c/{name}' for name in names('BraTS2021_00002')),
    )
    (tmp_path / 'b').symlink_to(tmp_path / 'a')
    scandir = os.scandir

    def refuse(folder):
        if str(folder).endswith('c'):
            raise PermissionError(13, 'Permission denied', folder)
        return scandir(folder)

    monkeypatch.setattr(os, 'scandir', refuse)
    assert list(patients.makeFileList(tmp_path).index) == ['BraTS2021_00001']
    assert f'{tmp_path / "c"} cannot be listed (Permission denied)' in capsys.readouterr().out


def test_hasVoxelsOf_readsAnImageOnceUntilItChanges(writeCase, monkeypatch):
    """Five members of an ensemble ask five times for the same image; another image of the same name is read anew."""
    row, calls, real = writeCase(volumesOf(np.ones((3, 8, 9, 10)))), [], reading.voxelChecksums
    voxels = {'P1': real(row, ['t1ce'])}

    def voxelChecksums(paths, modalities):
        calls.append(modalities)
        return real(paths, modalities)

    monkeypatch.setattr(reading, 'voxelChecksums', voxelChecksums)
    assert [reading.hasVoxelsOf(row, voxels) for _ in range(5)] == [True] * 5 and calls == [['t1ce']]
    save(np.full((8, 9, 10), 7, np.int16), Path(row['t1ce']))
    assert not reading.hasVoxelsOf(row, voxels) and len(calls) == 2


def test_hasVoxelsOf_findsAPatientByAnyModality(writeCase):
    """The known ones may have other modalities, and one image of a patient may be changed or empty."""
    row = writeCase(volumesOf(np.arange(1, 2161, dtype=np.float32).reshape(3, 8, 9, 10)))
    voxels = {'another': {'t1ce': '00000000'}, 'P1': reading.voxelChecksums(row, ['t2', 'flair'])}
    assert reading.hasVoxelsOf(row, voxels)
    for value in (0, 7):  # the first of both
        save(np.full((8, 9, 10), value, np.int16), Path(row['t2']))
        assert reading.hasVoxelsOf(row, voxels)
    save(np.full((8, 9, 10), 7, np.int16), Path(row['flair']))
    assert not reading.hasVoxelsOf(row, voxels)


def test_makeFileList_needsTheEditionOfUnknownNames(tmp_path):
    """Names of no known edition need config.EDITION; known ones keep their edition; an unknown edition is refused."""
    touch(tmp_path, *names('BraTS2021_00001'), *names('Smith'))
    with pytest.raises(ValueError, match=r'Smith_\w+\.nii\.gz: the edition cannot be detected .* Set config\.EDITION'):
        patients.makeFileList(tmp_path)
    config.EDITION = 'BraTS2020'
    table = patients.makeFileList(tmp_path)
    assert [patients.detectEdition(paths) for _, paths in table.iterrows()] == ['BraTS2021', 'BraTS2020']
    config.EDITION = 'BraTS2022'
    with pytest.raises(ValueError, match="'BraTS2022'; known are BraTS2017, "):
        patients.makeFileList(tmp_path)


def test_makeFileList_readsTheFolderOfTheConfiguration(tmp_path):
    """Without an argument config.DATA_FOLDER is searched; None, no folder and one without patients are refused."""
    config.DATA_FOLDER = None
    with pytest.raises(FileNotFoundError, match=r'set config\.DATA_FOLDER'):
        patients.makeFileList()
    with pytest.raises(FileNotFoundError, match=rf'{tmp_path}/absent does not exist'):
        patients.makeFileList(tmp_path / 'absent')
    config.DATA_FOLDER = str(tmp_path)
    with pytest.raises(FileNotFoundError, match=f'No patient below {tmp_path}'):
        patients.makeFileList()
    touch(tmp_path, *names('BraTS2021_00001'))
    assert len(patients.makeFileList()) == 1


def test_patientOf_namesADictByItsFolder(writeCase):
    """A row given as a dict is named by the folder of its first file; empty cells of any kind are skipped."""
    paths = writeCase(volumesOf(np.ones((3, 4, 4, 4), np.int16)))
    for empty in (None, np.nan, pd.NA):
        assert patients.patientOf({'t1': empty, **paths}) == 'BraTS20_Training_001'


def test_readCase_returnsChannelsAndClasses(writeCase):
    """Channels follow config.MODALITIES, label 4 becomes class 3, values and dtypes are as documented."""
    image = np.arange(3 * 24, dtype=np.int16).reshape(3, 2, 3, 4) - 5
    label = np.array([0, 1, 2, 4], np.uint8) * np.ones((2, 3, 1), np.uint8)
    paths = writeCase(volumesOf(image, label))
    config.MODALITIES = ('flair', 't1ce')
    read, classes = patients.readCase(paths)
    assert read.dtype == np.float32 and classes.dtype == np.uint8
    np.testing.assert_array_equal(read, image[[2, 0]])
    np.testing.assert_array_equal(classes[0, 0], [0, 1, 2, 3])


def test_readCase_returnsTheSameFromEveryAxisOrder(writeCase):
    """All 48 axis orders of one volume are read to the same array, and results are written in the order of the file."""
    image = np.arange(3 * 60, dtype=np.int16).reshape(3, 3, 4, 5)
    label = (np.arange(60) % 3).astype(np.uint8).reshape(3, 4, 5)
    for order in itertools.permutations(range(3)):
        for flips in itertools.product((1, -1), repeat=3):
            toFile = nib.orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], np.stack([order, flips], axis=1))
            affine = nib.orientations.inv_ornt_aff(toFile, (3, 4, 5))
            turned = [nib.apply_orientation(volume, toFile) for volume in image]
            paths = writeCase(volumesOf(turned), affine=affine)
            paths |= writeCase({'seg': label})  # in RAS order, unlike the images
            read, classes = patients.readCase(paths)
            np.testing.assert_array_equal(read, image)
            np.testing.assert_array_equal(classes, label)
            file = Path(paths['seg']).parent / 'out.nii.gz'
            patients.saveSegmentation(label.transpose(2, 0, 1), paths, file)
            assert nib.aff2axcodes(nib.load(file).affine) == nib.aff2axcodes(nib.load(paths['t1ce']).affine)
            np.testing.assert_array_equal(np.asarray(nib.load(file).dataobj), nib.apply_orientation(label, toFile))


def test_readCase_roundsFloatLabelsUpToATolerance(writeCase):
    """1.0004 and 0.9996 are label 1."""
    label = np.full((4, 4, 4), 4.0)
    label[0, 0, :2] = 1.0004, 0.9996
    _, classes = patients.readCase(writeCase(volumesOf(np.ones((3, 4, 4, 4), np.int16), label)))
    assert classes[0, 0].tolist() == [1, 1, 3, 3] and classes.dtype == np.uint8


def test_readCase_returnsNoLabelWithoutSegmentation(writeCase):
    """No path, None and NaN all mean that there is no segmentation; then the name need not show an edition."""
    paths = writeCase(volumesOf(np.ones((3, 4, 4, 4), np.int16)), 'Smith')
    for row in (paths, {**paths, 'seg': None}, pd.Series({**paths, 'seg': np.nan}, name='P1')):
        assert patients.readCase(row)[1] is None


def test_readCase_comparesGridsAtTheFarCorner(writeCase):
    """A hundredth of a voxel is accepted; a tilt that moves only the far corner, by half a voxel, is refused."""
    paths, label = writeCase(volumesOf(np.ones((3, 4, 4, 40), np.int16))), np.zeros((4, 4, 40), np.uint8)
    patients.readCase(paths | writeCase({'seg': label}, affine=nib.affines.from_matvec(np.eye(3), [0, 0, 0.01])))
    tilt = np.eye(4)
    tilt[0, 2] = 0.02
    with pytest.raises(ValueError, match=r'_seg\.nii\.gz lies up to 0\.8 mm away from t1ce'):
        patients.readCase(paths | writeCase({'seg': label}, affine=tilt))


def test_readCase_refusesADamagedByteAnywhere(writeCase):
    """Each byte of the compressed data and of the checksum is changed in turn: patient and file are named each time."""
    config.MODALITIES = ('t2',)
    paths = writeCase({'t2': np.random.default_rng(0).integers(0, 999, (8, 8, 8)).astype(np.int16)})
    packed = gzip.compress(gzip.decompress(Path(paths['t2']).read_bytes()), mtime=0)
    for place in range(10, len(packed)):  # a gzip header without a file name has 10 bytes
        damaged = bytearray(packed)
        damaged[place] ^= 0x11
        Path(paths['t2']).write_bytes(damaged)
        with pytest.raises(ValueError, match=r'BraTS20_Training_001: .*_t2\.nii\.gz cannot be used'):
            patients.readCase(paths)


def test_readCase_readsAllEditionsInOneFolder(tmp_path):
    """All editions below one folder, undeclared: the same patients and classes as of each alone, voxel for voxel."""
    config.MODALITIES = ('flair', 't1', 't1ce', 't2')
    expected = {}
    for seed, edition in enumerate(LAYOUTS):
        cases = drawCases(2, seed)
        writeLayout(edition, tmp_path / edition, cases)
        expected.update(zip(patients.makeFileList(tmp_path / edition).index, cases, strict=True))
    table = patients.makeFileList(tmp_path)
    assert len(expected) == 2 * len(LAYOUTS) and list(table.index) == sorted(expected)
    for patient, paths in table.iterrows():
        image, classes = patients.readCase(paths)
        np.testing.assert_array_equal(image, expected[patient][0][[3, 0, 1, 2], ::-1, ::-1])
        np.testing.assert_array_equal(classes, expected[patient][1][::-1, ::-1])
        file = tmp_path / 'results' / f'{patient}.nii.gz'
        patients.saveSegmentation(classes.transpose(2, 0, 1), paths, file)
        np.testing.assert_array_equal(np.asarray(nib.load(file).dataobj), np.asarray(nib.load(paths['seg']).dataobj))
    assert list(patients.makeFileList(tmp_path).index) == sorted(expected)  # the results are not patients


def test_readCase_acceptsATrailingAxisOfOne(writeCase):
    """A 3-D volume stored as (W, H, D, 1) is read."""
    volumes = volumesOf(np.ones((3, 4, 5, 6, 1), np.int16), np.zeros((4, 5, 6, 1), np.uint8))
    image, classes = patients.readCase(writeCase(volumes))
    assert image.shape == (3, 4, 5, 6) and classes.shape == (4, 5, 6)


def test_readLabel_equalsTheLabelOfReadCase(writeCase):
    """The label alone is the one that readCase returns, in another axis order too."""
    label = np.random.default_rng(0).choice([0, 1, 2, 4], (4, 5, 6)).astype(np.uint8)
    paths = writeCase(volumesOf(np.ones((3, 4, 5, 6), np.int16), label), affine=np.diag([-1, 1, -1, 1]))
    expected = np.array([0, 1, 2, 0, 3])[label][::-1, :, ::-1]
    np.testing.assert_array_equal(patients.readLabel(paths), expected)
    np.testing.assert_array_equal(patients.readCase(paths)[1], expected)


def test_spacingOf_followsTheAxesOfPredict(writeCase):
    """Voxels of 1 x 2 x 3 mm along right, front, top are (3, 1, 2) along predict's axes, whatever the file's order."""
    turned = np.array([[0, 0, -1, 0], [2, 0, 0, 0], [0, 3, 0, 0], [0, 0, 0, 1]])
    paths = writeCase(volumesOf(np.ones((3, 4, 5, 6), np.int16)), affine=turned)
    assert patients.spacingOf(paths) == (3, 1, 2)


@pytest.mark.parametrize('ending', ['.nii', '.nii.gz'])
def test_readVolume_appliesTheScaleOfTheHeader(tmp_path, ending):
    """Stored 0, 1, 2, ... with slope 2 and intercept 1 are 1, 3, 5, ..."""
    nifti = nib.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.eye(4))
    nifti.header.set_slope_inter(2, 1)
    content = bytearray(nifti.to_bytes())
    content[112:120] = np.array([2, 1], np.float32).tobytes()  # nibabel resets the scale when it writes
    (tmp_path / f'a{ending}').write_bytes(gzip.compress(content) if ending == '.nii.gz' else content)
    volume, _ = patients.readVolume(tmp_path / f'a{ending}', 'P1')
    np.testing.assert_array_equal(volume, np.arange(1, 49, 2).reshape(2, 3, 4))


def test_maskFunction_isTrueWhereTheImageIsNotZero():
    """Negative intensities are brain, too; an array gives an array, a tensor a tensor; one function for all modules."""
    assert patients.maskFunction(np.array([-2.0, 0, 3])).tolist() == [True, False, True]
    assert patients.maskFunction(torch.tensor([[0, 1]])).tolist() == [[False, True]]
    assert transforms.maskFunction is utils.maskFunction is patients.maskFunction


def test_alongMemory_invertsItself():
    """For any axis order and direction, the view lies in memory order, and the inverse undoes it."""
    array = np.arange(24).reshape(2, 3, 4)
    for order in itertools.permutations(range(3)):
        for steps in itertools.product((1, -1), repeat=3):
            view = array[tuple(slice(None, None, step) for step in steps)].transpose(order)
            turn, turnBack = volumes.alongMemory(view)
            np.testing.assert_array_equal(turn(view), array)
            np.testing.assert_array_equal(turnBack(turn(view)), view)
