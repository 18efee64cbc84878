import gzip
import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

import config
import patients
import postprocess
import transforms
import utils
import volumes
from conftest import COLUMNS, LAYOUTS, drawCases, names, save, touch, volumesOf, writeLayout


def test_makeFileList_findsSeveralEditionsAtAnyDepth(tmp_path):
    """2020 as .nii and 2021 as .nii.gz are found below one folder, training and validation alike, sorted by id."""
    touch(tmp_path, *(f'a/b/{name}' for name in names('BraTS20_Training_002', ending='.nii')))
    touch(tmp_path, *(f'c/{name}' for name in names('BraTS2021_00001')))
    touch(tmp_path, *(f'd/e/f/{name}' for name in names('BraTS20_Validation_001', COLUMNS[:4])))
    table = patients.makeFileList(tmp_path)
    assert list(table.index) == ['BraTS2021_00001', 'BraTS20_Training_002', 'BraTS20_Validation_001']
    assert list(table.columns) == COLUMNS
    assert table.loc['BraTS2021_00001', 't2'] == str(tmp_path / 'c/BraTS2021_00001/BraTS2021_00001_t2.nii.gz')
    assert table.loc['BraTS20_Validation_001', 'seg'] is None


def test_makeFileList_correctsTheNameOfPatient355(tmp_path):
    """The segmentation of patient 355, published under another name, belongs to that patient."""
    touch(tmp_path, *names('BraTS20_Training_355', COLUMNS[:4]), 'BraTS20_Training_355/W39_1998.09.19_Segm.nii')
    table = patients.makeFileList(tmp_path)
    assert table.loc['BraTS20_Training_355', 'seg'].endswith('W39_1998.09.19_Segm.nii')


def test_makeFileList_ignoresOtherFiles(tmp_path):
    """Hidden files, tables, results for upload and other NIfTI files are not patients."""
    touch(tmp_path, *names('BraTS2021_00001'), 'BraTS2021_00001/._BraTS2021_00001_t1.nii.gz', '.DS_Store')
    touch(tmp_path, 'name_mapping.csv', 'results/BraTS2021_00001.nii.gz', 'atlas.nii', 'imagesTr/._BRATS_001.nii.gz')
    assert list(patients.makeFileList(tmp_path).index) == ['BraTS2021_00001']


@pytest.mark.parametrize('edition', [None, 'BraTS2020'])
def test_makeFileList_makesNoPatientOfASegmentation(tmp_path, capsys, edition):
    """A foreign file named like a segmentation, as programs write them, neither stops the list nor enters it."""
    config.EDITION = edition
    touch(tmp_path, *names('BraTS2021_00001'), 'results/patient7_seg.nii.gz', 'BraTS2021_00002_seg.nii.gz')
    assert list(patients.makeFileList(tmp_path).index) == ['BraTS2021_00001']
    assert 'BraTS2021_00002_seg.nii.gz is ignored: BraTS2021_00002 has no image' in capsys.readouterr().out


def test_makeFileList_entersALoopOfLinksOnce(tmp_path):
    """A link to a folder above it does not add files twice, nor run forever."""
    touch(tmp_path, *names('BraTS2021_00001'))
    (tmp_path / 'BraTS2021_00001' / 'loop').symlink_to(tmp_path, target_is_directory=True)
    assert list(patients.makeFileList(tmp_path).index) == ['BraTS2021_00001']


def test_makeFileList_refusesAPatientTwice(tmp_path):
    """Two copies of a patient would leak from training into testing: both paths are named."""
    touch(tmp_path, *names('BraTS2021_00001'), *(f'copy/{name}' for name in names('BraTS2021_00001')))
    with pytest.raises(ValueError, match=r'BraTS2021_00001 has \w+ twice: .* and .*copy'):
        patients.makeFileList(tmp_path)


def test_makeFileList_needsTheEditionOfUnknownNames(tmp_path):
    """A name of no known edition is refused until config.EDITION declares one."""
    touch(tmp_path, *names('Smith'))
    with pytest.raises(ValueError, match=r'Smith_\w+\.nii\.gz: the edition cannot be detected .* Set config\.EDITION'):
        patients.makeFileList(tmp_path)
    config.EDITION = 'BraTS2020'
    assert list(patients.makeFileList(tmp_path).index) == ['Smith']


@pytest.mark.parametrize(('folder', 'found'), [('absent', 'absent does not exist'), ('', 'No patient below')])
def test_makeFileList_refusesAFolderWithoutPatients(tmp_path, folder, found):
    """A folder that does not exist, or holds no patient, is named."""
    with pytest.raises(FileNotFoundError, match=found) as caught:
        patients.makeFileList(tmp_path / folder)
    assert str(tmp_path) in str(caught.value)


def test_makeFileList_readsTheFolderOfTheConfiguration(tmp_path):
    """Without an argument config.DATA_FOLDER is searched; the error says to set it if it is None."""
    config.DATA_FOLDER = None
    with pytest.raises(FileNotFoundError, match=r'set config\.DATA_FOLDER'):
        patients.makeFileList()
    touch(tmp_path, *names('BraTS2021_00001'))
    config.DATA_FOLDER = str(tmp_path)
    assert len(patients.makeFileList()) == 1


def test_makeFileList_findsTestSets(tmp_path):
    """imagesTs of the Decathlon and the testing patients of 2020 are patients without a segmentation."""
    touch(tmp_path, 'imagesTs/BRATS_485.nii.gz', *names('BraTS20_Testing_001', COLUMNS[:4]))
    table = patients.makeFileList(tmp_path)
    assert list(table.index) == ['BRATS_485', 'BraTS20_Testing_001'] and table['seg'].isna().all()


def test_makeFileList_ignoresOtherOrgansOfTheDecathlon(tmp_path):
    """imagesTr of another task holds no patients of ours, and needs no declared edition."""
    touch(tmp_path, *names('BraTS2021_00001'), 'Task02/imagesTr/la_003.nii.gz', 'Task02/labelsTr/la_003.nii.gz')
    assert list(patients.makeFileList(tmp_path).index) == ['BraTS2021_00001']


def test_detectEdition_prefersNamesToWhatIsDeclared(tmp_path):
    """A declared edition is for names of no known edition: BraTS2021 stays BraTS2021. An unknown one is refused."""
    touch(tmp_path, *names('BraTS2021_00001'), *names('Smith'))
    config.EDITION = 'BraTS2020'
    table = patients.makeFileList(tmp_path)
    assert [patients.detectEdition(paths) for _, paths in table.iterrows()] == ['BraTS2021', 'BraTS2020']
    config.EDITION = 'BraTS2022'
    with pytest.raises(ValueError, match="'BraTS2022'; known are BraTS2017, "):
        patients.makeFileList(tmp_path)


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
            postprocess.saveSegmentation(label.transpose(2, 0, 1), paths, file)
            assert nib.aff2axcodes(nib.load(file).affine) == nib.aff2axcodes(nib.load(paths['t1ce']).affine)
            np.testing.assert_array_equal(np.asarray(nib.load(file).dataobj), nib.apply_orientation(label, toFile))


def test_readCase_roundsFloatLabelsUpToATolerance(writeCase):
    """1.0004 and 0.9996 are label 1; 1.4 is refused as interpolated."""
    image, label = np.ones((3, 4, 4, 4), np.int16), np.full((4, 4, 4), 4.0)
    label[0, 0, :2] = 1.0004, 0.9996
    _, classes = patients.readCase(writeCase(volumesOf(image, label)))
    assert classes[0, 0].tolist() == [1, 1, 3, 3] and classes.dtype == np.uint8
    label[0, 0, 0] = 1.4
    with pytest.raises(ValueError, match=r'BraTS20_Training_001.*values between the labels'):
        patients.readCase(writeCase(volumesOf(image, label)))


def test_readCase_returnsNoLabelWithoutSegmentation(writeCase):
    """No path, None and NaN all mean that there is no segmentation."""
    paths = writeCase(volumesOf(np.ones((3, 4, 4, 4), np.int16)))
    for row in (paths, {**paths, 'seg': None}, pd.Series({**paths, 'seg': np.nan}, name='P1')):
        assert patients.readCase(row)[1] is None


def makeBad(kind):
    """Return the volumes of one kind of bad patient, and what the error must say."""
    image, label = np.ones((3, 4, 5, 6), np.float32), np.zeros((4, 5, 6), np.float32)
    volumes = volumesOf(image, label)
    if kind == 'unknown label':
        label[0, 0, 0] = 3
        return volumes, r'_seg\.nii\.gz has the labels \[0, 3\], but BraTS2020 knows \[0, 1, 2, 4\]'
    if kind in ('nan', 'inf', '2e6', '-2e6'):
        image[1, 0, 0, 0] = float(kind)
        return volumes, r'_t2\.nii\.gz cannot be used: its values run from'
    if kind == 'nan label':
        label[0, 0, 0] = np.nan
        return volumes, r'_seg\.nii\.gz cannot be used: its values run from'
    if kind == 'shape':
        return {**volumes, 'flair': np.ones((4, 5, 7), np.int16)}, r'flair\.nii\.gz has \(4, 5, 7\) voxels, t1ce has'
    if kind == 'dimension':
        return {**volumes, 't1ce': np.ones((4, 5, 6, 2), np.int16)}, r'its header says \(4, 5, 6, 2\); 3 dimensions'
    raise AssertionError(kind)


@pytest.mark.parametrize('kind', ['unknown label', 'nan', 'inf', '2e6', '-2e6', 'nan label', 'shape', 'dimension'])
def test_readCase_refusesBadVolumes(writeCase, kind):
    """Bad voxels, labels and shapes are refused with patient, file, what was found and what was expected."""
    volumes, words = makeBad(kind)
    with pytest.raises(ValueError, match='BraTS20_Training_001: .*' + words):
        patients.readCase(writeCase(volumes))


def test_readCase_refusesAnotherGrid(writeCase):
    """A segmentation one voxel away from the images is refused; a hundredth of a voxel is accepted."""
    image, label = np.ones((3, 4, 4, 4), np.int16), np.zeros((4, 4, 4), np.uint8)
    paths = writeCase(volumesOf(image))
    patients.readCase(paths | writeCase({'seg': label}, affine=nib.affines.from_matvec(np.eye(3), [0, 0, 0.01])))
    with pytest.raises(ValueError, match=r'_seg\.nii\.gz lies up to 1\.0 mm away from t1ce'):
        patients.readCase(paths | writeCase({'seg': label}, affine=nib.affines.from_matvec(np.eye(3), [0, 0, 1])))


def test_readCase_comparesGridsAtTheFarCorner(writeCase):
    """A segmentation with the images' origin, tilted so that the far corner is half a voxel away, is refused."""
    paths = writeCase(volumesOf(np.ones((3, 4, 4, 40), np.int16)))
    tilt = np.eye(4)
    tilt[0, 2] = 0.02
    seg = writeCase({'seg': np.zeros((4, 4, 40), np.uint8)}, affine=tilt)
    with pytest.raises(ValueError, match=r'lies up to 0\.8 mm away'):
        patients.readCase(paths | seg)


@pytest.mark.parametrize('kept', [0, 100, 500])
def test_readCase_refusesATruncatedFile(writeCase, kept):
    """A file that was cut off is named, however little of it is left."""
    generator = np.random.default_rng(0)
    paths = writeCase(volumesOf(generator.integers(0, 999, (3, 12, 12, 12)).astype(np.int16)))
    Path(paths['t2']).write_bytes(Path(paths['t2']).read_bytes()[:kept])
    with pytest.raises(ValueError, match=r'BraTS20_Training_001: .*_t2\.nii\.gz cannot be used'):
        patients.readCase(paths)


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


def test_readCase_refusesDamageFarBehindTheHeader(writeCase):
    """Compressed data that breaks off into nonsense, beyond what is read for the header, is refused by name."""
    config.MODALITIES = ('t2',)
    paths = writeCase({'t2': np.random.default_rng(0).integers(0, 999, (48, 48, 48)).astype(np.int16)})
    packed = Path(paths['t2']).read_bytes()
    for place in np.linspace(50_000, len(packed) - 1000, 40, dtype=int):
        Path(paths['t2']).write_bytes(packed[:place] + b'\xff' * 64 + packed[place + 64 :])
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


@pytest.mark.parametrize(('one', 'other'), list(itertools.combinations_with_replacement(LAYOUTS, 2)))
def test_readCase_readsEveryPairOfEditionsInOneFolder(tmp_path, one, other):
    """Two editions below one folder, undeclared: the same patients and classes, voxel for voxel."""
    config.MODALITIES = ('flair', 't1', 't1ce', 't2')
    expected = {}
    for seed, edition in enumerate(dict.fromkeys([one, other])):
        cases = drawCases(2, seed)
        writeLayout(edition, tmp_path / edition, cases)
        found = patients.makeFileList(tmp_path / edition)
        expected.update(zip(found.index, cases, strict=True))
    table = patients.makeFileList(tmp_path)
    assert list(table.index) == sorted(expected)
    for patient, paths in table.iterrows():
        image, classes = patients.readCase(paths)
        np.testing.assert_array_equal(image, expected[patient][0][[3, 0, 1, 2], ::-1, ::-1])
        np.testing.assert_array_equal(classes, expected[patient][1][::-1, ::-1])
        file = tmp_path / 'results' / f'{patient}.nii.gz'
        postprocess.saveSegmentation(classes.transpose(2, 0, 1), paths, file)
        np.testing.assert_array_equal(np.asarray(nib.load(file).dataobj), np.asarray(nib.load(paths['seg']).dataobj))
    assert list(patients.makeFileList(tmp_path).index) == sorted(expected)  # the results are not patients


def test_readCase_readsTheCavityAsBackground(tmp_path):
    """Label 4 in a 2023 name is refused with a hint at 2024; declared as 2024 it is background, not enhancing tumor."""
    image, classes = drawCases(1, 0)[0]
    writeLayout('GLI', tmp_path, [(image, classes)])
    paths = patients.makeFileList(tmp_path).iloc[0]
    label = classes.astype(np.uint8)
    label[classes == 0] = 4
    save(label, Path(paths['seg']), nib.load(paths['seg']).affine)
    words = r"labels \[1, 2, 3, 4\], but BraTS2023 knows .* config\.EDITION = 'BraTS2024'"
    with pytest.raises(ValueError, match=words):
        patients.readCase(paths)
    config.EDITION = 'BraTS2024'
    np.testing.assert_array_equal(patients.readCase(paths)[1], classes[::-1, ::-1])


def test_readCase_acceptsATrailingAxisOfOne(writeCase):
    """A 3-D volume stored as (W, H, D, 1) is read."""
    volumes = volumesOf(np.ones((3, 4, 5, 6, 1), np.int16), np.zeros((4, 5, 6, 1), np.uint8))
    image, classes = patients.readCase(writeCase(volumes))
    assert image.shape == (3, 4, 5, 6) and classes.shape == (4, 5, 6)


def test_readCase_readsUnknownNamesWithoutSegmentation(writeCase):
    """An image whose name shows no edition can be predicted: only labels need one."""
    paths = writeCase(volumesOf(np.ones((3, 4, 5, 6), np.int16)), 'Smith')
    assert patients.readCase(paths)[1] is None


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
