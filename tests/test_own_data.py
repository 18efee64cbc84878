"""A data set of one's own: slices become NIfTI, thick ones are cut in their plane, and the page's own code runs."""

import json
import shlex
import warnings

import h5py
import imageio.v3
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from test_docs import HOME, blocksOf

import config
import engine
import patients
import phantom
import postprocess
import preprocess
import train
import utils
from conftest import PATCHES, listOf, save, touch
from patients import cohort, editions, volumes

SLICE, MASK = r'_(?P<slice>\d+)\.tif', r'_(?P<slice>\d+)_mask\.tif'
COLUMNS = ('t1', 'flair', 't1ce')
IDS = [
    'TCGA_CS_4941_19960909',
    'TCGA_CS_4942_19970222',
    'TCGA_CS_4943_20000902',
    'TCGA_CS_4944_20010208',
    'TCGA_CS_5393_19990606',
]


def writeSlices(folder, ids=IDS, numSlices=8, size=40):
    """Write patients in the layout of the Kaggle LGG set: an ellipsoid of brain, and in three slices one of tumor."""
    z, y, x = np.ogrid[:numSlices, :size, :size]
    for number, patient in enumerate(ids):
        generator = np.random.default_rng(number)
        isBrain = ((z - 3.5) / 5) ** 2 + ((y - 20) / 17) ** 2 + ((x - 20) / 14) ** 2 < 1
        isTumor = ((z - 4) / 1.5) ** 2 + ((y - 16) / 6) ** 2 + ((x - 14 - number) / 6) ** 2 < 1
        picture = isBrain[..., None] * generator.integers(60, 120, (numSlices, size, size, 3))
        picture[isTumor] += 100
        (folder / patient).mkdir(parents=True)
        for place in range(numSlices):
            file = folder / patient / f'{patient}_{place + 1}.tif'
            imageio.v3.imwrite(file, picture[place].astype(np.uint8))
            imageio.v3.imwrite(file.with_name(f'{file.stem}_mask.tif'), np.uint8(255) * isTumor[place])


def test_ownData_goesFromTiffToScores(tmp_path, monkeypatch, capsys):
    """The page's blocks, one after the other, turn TIFF into scores of its test patients, and warn of nothing."""
    monkeypatch.chdir(tmp_path)
    config.ENCODER_NAME, config.ENCODER_DEPTH, config.DECODER_CHANNELS = 'resnet18', 3, (16, 8, 8)
    config.BATCHSIZE, config.BOOTSTRAP_RESAMPLES = 8, 100
    config.PLANES, config.SLICE_STEP, config.BACKGROUND_SHARE = ('axial', 'coronal', 'sagittal'), 3, None
    config.EPOCHS, config.LOADER_WORKERS = 1, 0
    writeSlices(tmp_path / 'kaggle_3m')
    names = {}
    with warnings.catch_warnings():
        warnings.filterwarnings('error', '.*(A network fails|config differs)')
        for block in blocksOf('docs/own_data.md')[1:]:
            exec(block, names)
    assert list(names['df'].index) == IDS and len(names['traindf']) == 2 and len(names['valdf']) == 1
    printed = capsys.readouterr().out
    assert (
        'Thick slices: the median voxel measures 1 x 1 x 5 mm (W x H x D). Only axial slices are cut, and all'
        in printed
    )
    assert sorted(set(names['table']['patient'])) == [IDS[1], IDS[3]] and set(names['table']['region']) == {'WT'}
    segmentation = nib.load(f'predictions/upload/{IDS[1]}.nii.gz')
    assert segmentation.shape == (40, 40, 8) and set(np.unique(segmentation.dataobj)) <= {0, 255}
    config.OWN_EDITIONS = json.loads((tmp_path / 'predictions' / 'settings.json').read_text())['config']['OWN_EDITIONS']
    pd.testing.assert_frame_equal(utils.makeFileList(), names['df'])


def test_ownData_describesTheEditionOnTheCommandLine(tmp_path, monkeypatch):
    """The command of the page gives `train.py` the file list that its script has."""
    monkeypatch.chdir(tmp_path)
    for column in (*COLUMNS, 'seg'):
        touch(tmp_path, f'nifti/{IDS[0]}/{IDS[0]}_{column}.nii.gz')
    [command] = [
        line for line in (HOME / 'docs/own_data.md').read_text().splitlines() if line.startswith('.venv/bin/python')
    ]
    vars(config).update(train.readArguments(shlex.split(command)[2:]))
    assert utils.makeFileList().notna().sum(axis=1).to_dict() == {IDS[0]: 4}
    assert editions.classesOf('LGG') == {0: 0, 255: 1}
    assert editions.withoutTime(IDS[0]) == 'TCGA_CS_4941'


# Slices


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_fromSlices_keepsValuesAndSays(tmp_path, dtype):
    """Each column gets its values, in LPS order with the given voxel size; written again, the same bytes."""
    generator = np.random.default_rng(0)
    for name in ('flair', 'mask'):
        written = generator.integers(0, np.iinfo(dtype).max, (12, 4, 5)).astype(dtype)
        (tmp_path / 'in/p/more').mkdir(parents=True, exist_ok=True)
        for number, picture in enumerate(written, start=7):  # 7 to 18: in the order of the numbers, not of the text
            imageio.v3.imwrite(tmp_path / f'in/p/more/{name}{number}.PNG', picture)
    touch(tmp_path / 'in', 'p/about.txt', 'p/._mask7.png', '.hidden/x.png', 'data.csv')
    pattern = {r'flair(?P<slice>\d+)\.png': ('flair',), r'mask(?P<slice>\d+)\.png': 'seg'}
    assert patients.fromSlices(tmp_path / 'in', pattern, tmp_path / 'out', (5, 0.5, 0.75)) == ['p']
    files = [tmp_path / 'out/p/p_flair.nii.gz', tmp_path / 'out/p/p_seg.nii.gz']
    found = nib.load(files[1])
    assert nib.aff2axcodes(found.affine) == ('L', 'P', 'S') and found.header.get_zooms() == (0.75, 0.5, 5)
    assert found.get_data_dtype() == dtype
    np.testing.assert_array_equal(np.asarray(found.dataobj), written.transpose(2, 1, 0))
    before = [file.read_bytes() for file in files]
    patients.fromSlices(tmp_path / 'in', pattern, tmp_path / 'out', (5, 0.5, 0.75))
    assert [file.read_bytes() for file in files] == before


def write(name, shape, dtype=np.uint8):
    """Return a function that writes a picture of zeros below a patient's folder."""
    return lambda home: imageio.v3.imwrite(home / name, np.zeros(shape, dtype))


@pytest.mark.parametrize(
    ('damage', 'words'),
    [
        (write('p_2.tif', (40, 40)), r'p: .*p_2\.tif has the shape \(1, 40, 40\); one picture of .*t1ce'),
        (write('p_2.tif', (40, 41, 3)), r'p: .*p_2\.tif has \(40, 41\) pixels of uint8; \(40, 40\) pixels of uint8'),
        (write('p_2_mask.tif', (40, 40), np.float32), r'p: .*p_2_mask\.tif has .* float32; .* uint8 were expected'),
        (lambda home: (home / 'p_2.tif').write_bytes(b'no TIFF'), r'p: .*p_2\.tif cannot be read'),
        (write('p_2.tif', (2, 40, 40, 3)), r'p: .*p_2\.tif has the shape \(.*2, 40, 40, 3\)'),
        (lambda home: (home / 'p_3_mask.tif').unlink(), r'p: .*p_3\.tif has no seg beside it, but other slices have'),
        (lambda home: (home / 'p_3.tif').unlink(), r'p: .*p_3_mask\.tif has no t1, flair, t1ce beside it'),
        (lambda home: [file.unlink() for file in home.glob('p_[35]*')], r'p: the slices \[3, 5\] of 1 to 8 are not in'),
        (write('p_03.tif', (40, 40, 3)), r'p has slice 3 twice: .*p_03\.tif and .*p_3\.tif'),
    ],
)  # fmt: skip
def test_fromSlices_refusesEachFault(tmp_path, damage, words):
    """Patient and file are named, and of a patient before it nothing is half written."""
    writeSlices(tmp_path / 'in', ['a', 'p'])
    damage(tmp_path / 'in' / 'p')
    with pytest.raises(ValueError, match=words):
        patients.fromSlices(tmp_path / 'in', {SLICE: COLUMNS, MASK: 'seg'}, tmp_path / 'out', (5, 1, 1))
    assert not list(tmp_path.glob('out/p/*')) and not list(tmp_path.glob('out/*/*.part'))


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'spacing': (5, 0, 1)}, r'spacing is \(5, 0, 1\); mm from slice to slice'),
        ({'spacing': (-5, 1, 1)}, 'spacing is'),
        ({'spacing': (1, 1)}, 'spacing is'),
        ({'spacing': (1, 1, np.nan)}, 'spacing is'),
        ({'pattern': {SLICE: ('t1', 'T2')}}, r"the columns \['t1', 'T2'\]; each of t1, t1ce, t2, flair, seg once"),
        ({'pattern': {SLICE: COLUMNS, MASK: 't1'}}, 'once at most'),
        ({'pattern': {r'_\d+\.tif': COLUMNS}}, 'has no group for the number of the slice'),
        ({'pattern': {SLICE: COLUMNS, r'(?P<slice>\d)\.png': 'seg'}}, r'No file in the 1 subfolders .* fits'),
        ({'pattern': {r'(?P<slice>\d)\.png': 'seg'}}, r"p: no file of .* fits a pattern: \['p_1\.tif'"),
        ({'folder': 'in/p'}, 'No file in the 0 subfolders of in/p'),
    ],
)  # fmt: skip
def test_fromSlices_refusesWrongArguments(tmp_path, monkeypatch, changes, words):
    """A spacing or a pattern that cannot be meant is refused with what was found, before anything is written."""
    monkeypatch.chdir(tmp_path)
    writeSlices(tmp_path / 'in', ['p'], numSlices=2)
    given = {'folder': 'in', 'pattern': {SLICE: COLUMNS, MASK: 'seg'}, 'output': 'out', 'spacing': (5, 1, 1)}
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        patients.fromSlices(**given | changes)
    assert not (tmp_path / 'out').exists()


# Editions


@pytest.mark.parametrize(
    ('own', 'words'),
    [
        ({'suffixes': {'t1': 'pre'}}, r"has the columns \['pre'\]; .* as in suffixes=\{'pre': 't1'\}"),
        ({'suffix': {'pre': 't1'}}, "unexpected keyword argument 'suffix'"),
    ],
)
def test_known_refusesFieldsThatNoEditionHas(own, words):
    """Exchanged names and columns, and an unknown field, are said as they were given."""
    config.OWN_EDITIONS = {'Clinic': {'patient': r'case\d+', 'classes': {0: 0, 1: 1}} | own}
    with pytest.raises((ValueError, TypeError), match=words):
        editions.known()


def test_makeFileList_saysWhichColumnsAnOwnEditionLacks(tmp_path, capsys):
    """Of suffixes and modalities, those without any file are printed; none where all were found."""
    suffixes = {'pre': 't1', 'post': 't1ce', 'mask': 'seg'}
    config.OWN_EDITIONS = {'Clinic': {'patient': r'case\d+', 'suffixes': suffixes, 'classes': {0: 0, 1: 1}}}
    touch(tmp_path, 'case1_post.nii.gz', 'case1_mask.nii.gz')
    utils.makeFileList(tmp_path)
    assert 'Clinic: no file was found for t1, t2, flair; its suffixes are pre, post, mask.' in capsys.readouterr().out
    touch(tmp_path, 'case2_pre.nii.gz')
    config.MODALITIES = ('t1', 't1ce')
    utils.makeFileList(tmp_path)
    assert 'no file' not in capsys.readouterr().out


def test_makeFileList_pointsFromPicturesToFromSlices(tmp_path):
    """A folder of TIFF is told how they become NIfTI."""
    touch(tmp_path, 'p/p_1.tif')
    with pytest.raises(FileNotFoundError, match=r'TIFF or PNG become NIfTI by patients\.fromSlices'):
        utils.makeFileList(tmp_path)


# Planes


@pytest.mark.parametrize(
    ('planes', 'spacing', 'step', 'cut', 'cutStep'),
    [
        (('axial', 'coronal', 'sagittal'), (1, 1, 5), 3, ['axial'], None),
        (('axial', 'coronal', 'sagittal'), (1, 5, 1), 3, ['coronal'], None),
        (('axial', 'coronal', 'sagittal'), (5, 1, 1), 3, ['sagittal'], None),
        (('axial', 'coronal', 'sagittal'), (1, 1, 3), 3, ['axial', 'coronal', 'sagittal'], [3, 0]),
        (('axial', 'coronal'), (1, 4, 4), 2, ['axial', 'coronal'], [2, 0]),  # long along two axes
        (('coronal',), (1, 1, 5), 3, ['coronal'], [3, 0]),
        ('axial', (1, 1, 5), 3, ['axial'], None),
        ('axial', (1, 1, 1), 3, ['axial'], [3, 0]),
    ],
)
def test_makeDataset_cutsThickSlicesInTheirPlane(writeThick, capsys, planes, spacing, step, cut, cutStep):
    """Beyond three times as long, only that plane is cut, every slice; a text is one plane; the file is current."""
    config.PLANES, config.SLICE_STEP = planes, step
    df = writeThick(spacing)
    preprocess.makeDataset(df, config.TRAIN_FILE)
    assert ('Thick slices' in capsys.readouterr().out) == (cutStep is None)
    dataset = utils.BRATSDataset(config.TRAIN_FILE)
    settings = dataset.provenance['settings']
    assert [settings['planes'], settings['sliceStep']] == [cut, cutStep]
    assert settings['spacing'] == [spacing[2], *spacing[:2]]
    if cutStep is None:
        assert np.unique(dataset.file['slice'][:]).tolist() == list(range(12)) and not dataset.file['plane'][:].any()
    preprocess.makeDataset(df, config.TRAIN_FILE)
    assert 'exists, with' in capsys.readouterr().out


@pytest.fixture
def writeThick(writeCase):
    """Return a function that writes a patient of 12 slices along each axis, all tumor, and returns its file list."""

    def write(spacing):
        image = np.random.default_rng(0).integers(1, 999, (3, 12, 12, 12)).astype(np.int16)
        volumes = dict(zip((*config.MODALITIES, 'seg'), [*image, np.ones((12, 12, 12), np.uint8)], strict=True))
        return pd.DataFrame([writeCase(volumes, affine=np.diag([*spacing, 1]))], ['P1'])

    return write


@pytest.mark.parametrize('planes', ['oblique', ('axial', 'oblique'), ()])
def test_makeDataset_refusesUnknownPlanes(writeThick, planes):
    """A plane that does not exist is refused in words, before anything is cut."""
    config.PLANES = planes
    with pytest.raises(ValueError, match=r'The planes are .*; some of axial, coronal, sagittal were expected'):
        preprocess.makeDataset(writeThick((1, 1, 1)), config.TRAIN_FILE)


def test_predict_usesThePlaneOfThickSlices(writeThick):
    """A model of thick slices predicts their plane alone, without a warning of config or its voxels."""
    config.PLANES = ('axial', 'coronal', 'sagittal')
    df = writeThick((1, 1, 5))
    preprocess.makeDataset(df, config.TRAIN_FILE)
    model = torch.nn.Conv2d(3, 4, 1)
    loader = torch.utils.data.DataLoader(utils.BRATSDataset(config.TRAIN_FILE), 8)
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler('cuda', enabled=False)
    engine.train(model, torch.nn.CrossEntropyLoss(), optimizer, scaler, loader)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        found = engine.predict(df.iloc[0], model, probabilities=True)[3]
        torch.testing.assert_close(found, engine.predict(df.iloc[0], model, probabilities=True, planes='axial')[3])
    with pytest.warns(UserWarning, match=r'its voxels measure 1 x 1 x 1 mm, those of the training 1 x 1 x 5 mm'):
        engine.predict(writeThick((1, 1, 1)).iloc[0], model)


# Background


@pytest.mark.parametrize(('numTumor', 'expected'), [(10, 0.1), (4, 0.1), (2, 0.55), (0, 1)])
def test_makeDataset_keepsMoreBackgroundWhereSlicesAreEmpty(writeCase, capsys, numTumor, expected):
    """Of ten brain slices 10, 4, 2 or none have tumor: 0.1 up to 0.6 without, then half of the way to 1, and 1."""
    image = np.ones((3, 8, 8, 12), np.int16)
    image[..., :2] = 0  # no brain: counted, the four would be too many
    label = np.zeros((8, 8, 12), np.uint8)
    label[2:4, 2:4, 2 : 2 + numTumor] = 1
    paths = writeCase(dict(zip((*config.MODALITIES, 'seg'), [*image, label], strict=True)))
    settings = {'background': [None, 0], 'planes': ['axial']}
    assert preprocess._findShare(pd.DataFrame([paths], ['P1']), settings) == pytest.approx(expected)
    assert ('of the brain slices have no tumor' in capsys.readouterr().out) == (expected > 0.1)


def test_makeDataset_cutsPhantomsAsBefore(tmp_path):
    """Where tumors are as large as in BraTS, the default cuts the patches of a fraction of 0.1, bit for bit."""
    phantom.makeCases(tmp_path / 'data', 1, seed=2, shape=(40, 40, 16))
    df = utils.makeFileList(tmp_path / 'data')
    files = {share: tmp_path / f'{share}.h5' for share in (None, 0.1)}
    for config.BACKGROUND_SHARE, file in files.items():
        preprocess.makeDataset(df, file)
    with h5py.File(files[None]) as one, h5py.File(files[0.1]) as other:
        for name in PATCHES:
            np.testing.assert_array_equal(one[name][:], other[name][:])


# A split


def test_split_testsTheNamedPatients(capsys):
    """The named ones are the test set; other scans of them are in no set; an unknown one is refused by name."""
    df = listOf(12)
    train, val, test = cohort.split(df, test=['BraTS2021_00003', 'BraTS2021_00001'])
    assert list(test.index) == ['BraTS2021_00001', 'BraTS2021_00003']
    assert len(val) == 2 and sorted([*train.index, *val.index, *test.index]) == list(df.index)
    for unknown in (['Smith'], 'Smith'):
        with pytest.raises(ValueError, match=r"test has \['Smith'\]: not in the file list"):
            cohort.split(df, test=unknown)
    with pytest.raises(ValueError, match='none is left to train'):
        cohort.split(df, test=list(df.index))
    scans = listOf(4).set_axis([f'BraTS-GLI-0000{i}-00{t}' for i in range(2) for t in range(2)])
    scans = scans.assign(t1ce=[f'{patient}-t1c.nii' for patient in scans.index], t1=None)
    config.VAL_FRACTION = 0
    train, val, test = cohort.split(scans, test=['BraTS-GLI-00001-001'])
    assert [list(part.index) for part in (train, val, test)] == [list(scans.index[:2]), [], ['BraTS-GLI-00001-001']]
    assert '1 other scans of the subjects to test are in no set.' in capsys.readouterr().out


@pytest.mark.parametrize(('fractions', 'sizes'), [((0, 0), (6, 0, 0)), ((0.2, 0), (5, 1, 0)), ((0, 0.2), (5, 0, 1))])
def test_split_takesNoneForAFractionOf0(tmp_path, fractions, sizes):
    """A fraction of 0 leaves its set empty, which a file of the split holds and returns."""
    config.VAL_FRACTION, config.TEST_FRACTION = fractions
    sets = cohort.split(listOf(6))
    assert tuple(map(len, sets)) == sizes
    cohort.writeSplit(sets, tmp_path / 'split.json')
    again = cohort.readSplit(tmp_path / 'split.json', listOf(6))
    assert all(list(one.index) == list(other.index) for one, other in zip(sets, again, strict=True))


# Odd images


def test_checkFiles_namesOddVoxelsAndSkulls(tmp_path):
    """Of three patients, the one with thicker slices and the one whose head fills more than a brain are findings."""
    shape = (20, 20, 16)
    for number, (spacing, fraction) in enumerate([((9, 9, 9), 0.4), ((9, 9, 11), 0.4), ((9, 9, 9), 1)], start=1):
        stem, generator = f'BraTS2021_0000{number}', np.random.default_rng(number)
        isBrain = np.arange(np.prod(shape)).reshape(shape) < fraction * np.prod(shape)
        for column in (*config.MODALITIES, 'seg'):
            volume = isBrain if column == 'seg' else isBrain * generator.integers(9, 999, shape)
            save(volume.astype(np.int16), tmp_path / stem / f'{stem}_{column}.nii.gz', np.diag([*spacing, 1]))
    voxels = 'its voxels measure 9 x 9 x 11 mm, the median 9 x 9 x 9 mm'
    skull = '4.7 litres of its images are not 0, more than a brain has: the skull is not stripped'
    assert cohort.checkFiles(utils.makeFileList(tmp_path)).values.tolist() == [
        ['BraTS2021_00002', 'BraTS2021_00002_t1ce.nii.gz', voxels, False],
        ['BraTS2021_00003', 'BraTS2021_00003_t1ce.nii.gz', skull, False],
    ]


def test_warnOfUnfit_comparesWithTheTraining():
    """Voxels like those of the training are fine, whatever they are; 1 mm is not, nor a skull."""
    trained, isBrain = [5, 0.9, 0.9], np.ones((24, 99, 99), bool)  # 1 litre
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        volumes.warnOfUnfit('P1', isBrain, (5, 0.91, 0.91), trained)
    with pytest.warns(UserWarning, match='measure 0.9 x 0.9 x 1 mm, those of the training 0.9 x 0.9 x 5 mm'):
        volumes.warnOfUnfit('P1', isBrain, (1, 0.9, 0.9), trained)
    with pytest.warns(UserWarning, match='skull'):
        volumes.warnOfUnfit('P1', np.ones((24, 256, 256), bool), (5, 0.9, 0.9), trained)


def test_settings_holdAnEdition(tmp_path):
    """Read from the settings of a folder, an edition is what it was."""
    edition = editions.Edition(r'case\d+', {'post': ('t1ce',), 'mask': ('seg',)}, {0: 0, 255: 1}, automatic=('mask',))
    config.OWN_EDITIONS = {'Clinic': edition}
    postprocess.writeScores({}, tmp_path)
    config.OWN_EDITIONS = postprocess.folder.readSettings(tmp_path)['config']['OWN_EDITIONS']
    assert editions.known()['Clinic'].suffixes == edition.suffixes
    assert editions.known()['Clinic'].parse('case7_post.nii.gz') == ('case7', ('t1ce',), False)
    assert editions.classesOf('Clinic', 2) == {0: 0, 255: 1}
