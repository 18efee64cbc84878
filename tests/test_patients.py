import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from conftest import COLUMNS, names, touch

import config
import patients
import results


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
    with pytest.raises(ValueError, match=r'Smith_\w+\.nii\.gz: the edition cannot be told .* config\.EDITION'):
        patients.makeFileList(tmp_path)
    config.EDITION = 'BraTS2020'
    assert list(patients.makeFileList(tmp_path).index) == ['Smith']


@pytest.mark.parametrize('folder', ['absent', ''])
def test_makeFileList_refusesAFolderWithoutPatients(tmp_path, folder):
    """A folder that is not there, or empty, is named."""
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        patients.makeFileList(tmp_path / folder)


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
            results.saveSegmentation(yhat, paths, Path(paths['seg']).parent / 'out.nii.gz')
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


def writeLayout(edition, folder, cases):
    """Writes cases (image (4, W, H, D) in the order of COLUMNS, classes (W, H, D)) as an edition lays them out."""
    names = {
        'BraTS2018': ('{g}/Brats18_CBICA_A{i}_1/Brats18_CBICA_A{i}_1_{c}', COLUMNS, '.nii.gz'),
        'BraTS2019': ('{g}/BraTS19_2013_{i}_1/BraTS19_2013_{i}_1_{c}', COLUMNS, '.nii.gz'),
        'BraTS2020': ('BraTS20_Training_{i:03d}/BraTS20_Training_{i:03d}_{c}', COLUMNS, '.nii'),
        'BraTS2021': ('BraTS2021_{i:05d}/BraTS2021_{i:05d}_{c}', COLUMNS, '.nii.gz'),
        'GLI': ('BraTS-GLI-{i:05d}-000/BraTS-GLI-{i:05d}-000-{c}', NEWER, '.nii.gz'),
        'SSA': (
            '95_Glioma/BraTS-SSA-{i:05d}-000/BraTS-SSA-{i:05d}-000-{c}',
            ['t1n', 't1c', 't2W', 't2f', 'seg'],
            '.nii.gz',
        ),
        'BraTS2024': ('BraTS-GLI-{i:05d}-101/BraTS-GLI-{i:05d}-101-{c}', NEWER, '.nii.gz'),
    }
    affine = np.array([[-1, 0, 0, 9], [0, -1, 0, 9], [0, 0, 1, 0], [0, 0, 0, 1]])
    for number, (image, classes) in enumerate(cases, start=1):
        label = LABELS.get(edition, np.array([0, 1, 2, 4]))[classes].astype(np.uint8)
        if edition == 'Decathlon':
            stacked = np.stack([image[3], image[0], image[1], image[2]], axis=-1)
            save(stacked, affine, folder / f'Task01/imagesTr/BRATS_{number:03d}.nii.gz')
            save(label, affine, folder / f'Task01/labelsTr/BRATS_{number:03d}.nii.gz')
            (folder / 'Task01/imagesTr' / f'._BRATS_{number:03d}.nii.gz').touch()
            continue
        template, columns, ending = names[edition]
        for column, volume in zip(columns, [*image, label], strict=True):
            name = template.format(g='HGG' if number % 2 else 'LGG', i=number, c=column)
            save(volume, affine, folder / f'{name}{ending}')


NEWER = ['t1n', 't1c', 't2w', 't2f', 'seg']
LABELS = dict.fromkeys(['GLI', 'SSA', 'BraTS2024'], np.arange(4)) | {'Decathlon': np.array([0, 2, 1, 3])}
LAYOUTS = ['BraTS2018', 'BraTS2019', 'BraTS2020', 'BraTS2021', 'GLI', 'SSA', 'BraTS2024', 'Decathlon']


def save(volume, affine, file):
    file.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(volume, affine), file)


def makeCases(noCases, seed):
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 999, (noCases, 4, 6, 5, 4)).astype(np.int16)
    return list(zip(images, generator.integers(0, 4, (noCases, 6, 5, 4)), strict=True))


@pytest.mark.parametrize(('one', 'other'), list(itertools.combinations_with_replacement(LAYOUTS, 2)))
def test_readCase_readsEveryPairOfEditionsInOneFolder(tmp_path, one, other):
    """Two editions below one folder, undeclared but for 2024: the same patients and classes, voxel for voxel."""
    if 'BraTS2024' in (one, other):
        config.EDITION = 'BraTS2024'
    config.MODALITIES = ('flair', 't1', 't1ce', 't2')
    wanted = {}
    for seed, edition in enumerate(dict.fromkeys([one, other])):
        cases = makeCases(2, seed)
        writeLayout(edition, tmp_path / edition, cases)
        found = patients.makeFileList(tmp_path / edition)
        wanted.update(zip(found.index, cases, strict=True))
    table = patients.makeFileList(tmp_path)
    assert list(table.index) == sorted(wanted)
    for patient, paths in table.iterrows():
        image, classes = patients.readCase(paths)
        np.testing.assert_array_equal(image, wanted[patient][0][[3, 0, 1, 2], ::-1, ::-1])
        np.testing.assert_array_equal(classes, wanted[patient][1][::-1, ::-1])
        file = tmp_path / 'results' / f'{patient}.nii.gz'
        results.saveSegmentation(classes.transpose(2, 0, 1), paths, file)
        np.testing.assert_array_equal(np.asarray(nib.load(file).dataobj), np.asarray(nib.load(paths['seg']).dataobj))
    assert list(patients.makeFileList(tmp_path).index) == sorted(wanted)  # the results are no patients


def test_readCase_neverTakesTheCavityForEnhancingTumor(tmp_path):
    """Label 4 in a 2023 name is refused with the hint at 2024; declared as 2024 it is background."""
    image, classes = makeCases(1, 0)[0]
    writeLayout('GLI', tmp_path, [(image, classes)])
    paths = patients.makeFileList(tmp_path).iloc[0]
    label = classes.astype(np.uint8)
    label[classes == 0] = 4
    save(label, nib.load(paths['seg']).affine, Path(paths['seg']))
    with pytest.raises(
        ValueError, match=r"labels \[1, 2, 3, 4\], but BraTS2023 knows .* config\.EDITION = 'BraTS2024'"
    ):
        patients.readCase(paths)
    config.EDITION = 'BraTS2024'
    np.testing.assert_array_equal(patients.readCase(paths)[1], classes[::-1, ::-1])


def test_tellEdition_putsNamesBeforeWhatIsDeclared(tmp_path):
    """A declared edition is for names that tell nothing: BraTS2021 stays BraTS2021."""
    touch(tmp_path, *names('BraTS2021_00001'), *names('Smith'))
    config.EDITION = 'BraTS2020'
    table = patients.makeFileList(tmp_path)
    assert [patients.tellEdition(paths) for _, paths in table.iterrows()] == ['BraTS2021', 'BraTS2020']
    config.EDITION = 'BraTS2022'
    with pytest.raises(ValueError, match="'BraTS2022'; known are BraTS2018, "):
        patients.makeFileList(tmp_path)


def test_spacingOf_followsPredictsAxes(writeCase):
    """Voxels of 1 x 2 x 3 mm along right, front, top are (3, 1, 2) along predict's axes, whatever the file's order."""
    turned = np.array([[0, 0, -1, 0], [2, 0, 0, 0], [0, 3, 0, 0], [0, 0, 0, 1]])
    paths = writeCase(volumesOf(np.ones((3, 4, 5, 6), np.int16)), affine=turned)
    assert patients.spacingOf(paths) == (3, 1, 2)


def test_readCase_roundsBothWays(writeCase):
    """0.9996 is label 1 as much as 1.0004 is."""
    label = np.full((4, 4, 4), 0.9996)
    assert (patients.readCase(writeCase(volumesOf(np.ones((3, 4, 4, 4), np.int16), label)))[1] == 1).all()


def test_readCase_comparesGridsAtTheFarCorner(writeCase):
    """A seg with the images' origin but a tilt that moves the far corner by more than half a voxel is refused."""
    paths = writeCase(volumesOf(np.ones((3, 4, 4, 40), np.int16)))
    tilt = np.eye(4)
    tilt[0, 2] = 0.02
    seg = writeCase({'seg': np.zeros((4, 4, 40), np.uint8)}, affine=tilt)
    with pytest.raises(ValueError, match=r'lies up to 0\.8 mm away'):
        patients.readCase(paths | seg)


def test_readCase_takesATrailingAxisOfOne(writeCase):
    """A 3-D volume stored as (W, H, D, 1) is read."""
    image, classes = patients.readCase(
        writeCase(volumesOf(np.ones((3, 4, 5, 6, 1), np.int16), np.zeros((4, 5, 6, 1), np.uint8)))
    )
    assert image.shape == (3, 4, 5, 6) and classes.shape == (4, 5, 6)


def test_readCase_readsForeignNamesWithoutSeg(writeCase):
    """An image whose name tells no edition can be predicted: only labels need one."""
    paths = writeCase(volumesOf(np.ones((3, 4, 5, 6), np.int16)), 'Smith')
    assert patients.readCase(paths)[1] is None


def test_makeFileList_saysWhichFolderDoesNotExist(tmp_path):
    """A folder that is not there is named; without one, what to set; config.DATA_FOLDER is the default."""
    with pytest.raises(FileNotFoundError, match='absent does not exist'):
        patients.makeFileList(tmp_path / 'absent')
    config.DATA_FOLDER = None
    with pytest.raises(FileNotFoundError, match=r'set config\.DATA_FOLDER'):
        patients.makeFileList()
    touch(tmp_path, *names('BraTS2021_00001'))
    config.DATA_FOLDER = str(tmp_path)
    assert len(patients.makeFileList()) == 1


def test_makeFileList_findsTestSets(tmp_path):
    """imagesTs of the Decathlon and the testing patients of 2020 are patients without a seg."""
    touch(tmp_path, 'imagesTs/BRATS_485.nii.gz', *names('BraTS20_Testing_001', COLUMNS[:4]))
    table = patients.makeFileList(tmp_path)
    assert list(table.index) == ['BRATS_485', 'BraTS20_Testing_001'] and table['seg'].isna().all()


def test_makeFileList_passesOverOtherOrgansOfTheDecathlon(tmp_path):
    """imagesTr of another task holds no patients of ours, and asks for no edition."""
    touch(tmp_path, *names('BraTS2021_00001'), 'Task02/imagesTr/la_003.nii.gz', 'Task02/labelsTr/la_003.nii.gz')
    assert list(patients.makeFileList(tmp_path).index) == ['BraTS2021_00001']


def test_patientOf_namesADictByItsFolder(writeCase):
    """A row given as a dict is named by the folder of its first file; empty cells of any kind are passed over."""
    paths = writeCase(volumesOf(np.ones((3, 4, 4, 4), np.int16)))
    for empty in (None, np.nan, pd.NA):
        assert patients.patientOf({'t1': empty, **paths}) == 'BraTS20_Training_001'
