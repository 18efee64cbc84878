import gzip

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from conftest import COLUMNS
from test_patients import makeCases, writeLayout

import checks
import config
import patients

SHAPE = (12, 13, 14)


@pytest.fixture
def cohortOf(tmp_path):
    """A function that writes patients, spoils the second one, and gives the file list."""

    def write(spoil=lambda home, stem: None, patient='BraTS20_Training_{:03d}', folder='data'):
        for number in (1, 2):
            generator = np.random.default_rng(number)
            name = patient.format(number)
            for column in COLUMNS:
                volume = np.zeros(SHAPE, np.int16)
                volume[2:10, 2:10, 2:10] = generator.integers(20, 900, (8, 8, 8))
                if column == 'seg':
                    volume = (volume > 700).astype(np.uint8) * 4
                save(tmp_path / folder / name / f'{name}_{column}.nii.gz', volume)
        spoil(tmp_path / folder / name, name)
        return patients.makeFileList(tmp_path)

    return write


def save(file, volume, affine=None):
    file.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(volume, np.eye(4) if affine is None else affine), file)


def edit(column, change, affine=None):
    """Gives a spoiler that rewrites one file with what `change` makes of its array."""

    def spoil(home, stem):
        file = home / f'{stem}_{column}.nii.gz'
        save(file, change(np.asarray(nib.load(file).dataobj)), affine)

    return spoil


def put(value, dtype=np.float32):
    def change(volume):
        volume = volume.astype(dtype)
        volume[5, 5, 5] = value
        return volume

    return change


def cut(column, kept):
    def spoil(home, stem):
        file = home / f'{stem}_{column}.nii.gz'
        file.write_bytes(file.read_bytes()[:kept])

    return spoil


def flip(column, place):
    """Gives a spoiler that turns over one byte in the middle of a packed file."""

    def spoil(home, stem):
        file = home / f'{stem}_{column}.nii.gz'
        content = bytearray(file.read_bytes())
        content[int(place * len(content))] ^= 0xFF
        file.write_bytes(content)

    return spoil


def promise(column, shape):
    """Gives a spoiler that lets a header promise another shape."""

    def spoil(home, stem):
        file = home / f'{stem}_{column}.nii.gz'
        nifti = nib.load(file)
        data = np.asarray(nifti.dataobj).tobytes()
        header = nifti.header.copy()
        header.set_data_shape(shape)
        header['vox_offset'] = 352
        file.write_bytes(gzip.compress(header.binaryblock + b'\0' * 4 + data))

    return spoil


def rewrite(column, field, value):
    """Gives a spoiler that puts a value into a header as it stands in the file."""

    def spoil(home, stem):
        file = home / f'{stem}_{column}.nii.gz'
        content = gzip.decompress(file.read_bytes())
        header = np.frombuffer(bytearray(content[:348]), nib.Nifti1Header.template_dtype)
        header[field] = value
        file.write_bytes(gzip.compress(header.tobytes() + content[348:]))

    return spoil


def move(one, other):
    def spoil(home, stem):
        (home / f'{stem}_{other}.nii.gz').write_bytes((home / f'{stem}_{one}.nii.gz').read_bytes())

    return spoil


def remove(column):
    return lambda home, stem: (home / f'{stem}_{column}.nii.gz').unlink()


def replace(column, content):
    return lambda home, stem: (home / f'{stem}_{column}.nii.gz').write_bytes(content)


TURNED = np.diag([-1.0, -1, 1, 1]) + np.array([[0, 0, 0, 11], [0, 0, 0, 12], [0, 0, 0, 0], [0, 0, 0, 0]])
SHIFTED = nib.affines.from_matvec(np.eye(3), [0, 3, 0])
BAD = {
    'missing modality': (remove('t2'), 't2', 'this modality is missing'),
    'empty file': (cut('flair', 0), 'flair', 'cannot be used'),
    'cut in the header': (cut('flair', 60), 'flair', 'cannot be used'),
    'cut in the data': (cut('flair', 900), 'flair', 'cannot be used'),
    'a byte turned over early': (flip('t1ce', 0.3), 't1ce', 'cannot be used'),
    'a byte turned over late': (flip('t1ce', 0.8), 't1ce', 'cannot be used'),
    'a data type that does not exist': (rewrite('t1ce', 'datatype', 0), 't1ce', 'cannot be used'),
    'an affine without a first axis': (rewrite('t1ce', 'srow_x', (0, 0, 0, 0)), 't1ce', 'cannot be used'),
    'text for an image': (replace('t1ce', b'this is no NIfTI'), 't1ce', 'cannot be used'),
    'a header that promises terabytes': (
        promise('t2', (30000, 30000, 2000)),
        't2',
        r'header says \(30000, 30000, 2000\)',
    ),
    'a header that promises a slice too many': (promise('t2', (12, 13, 15)), 't2', 'cannot be used'),
    'a 2-D image': (edit('t2', lambda v: v[..., 0]), 't2', r'header says \(12, 13\); 3 dimensions'),
    'a 4-D image': (edit('t2', lambda v: np.stack([v, v], -1)), 't2', r'header says \(12, 13, 14, 2\); 3 dimensions'),
    'another shape': (edit('t2', lambda v: v[1:]), 't2', r'has \(11, 13, 14\) voxels, t1ce has \(12, 13, 14\)'),
    'a seg of another shape': (edit('seg', lambda v: v[..., 1:]), 'seg', r'has \(12, 13, 13\) voxels'),
    'another place': (edit('flair', lambda v: v, SHIFTED), 'flair', 'lies up to 3.0 mm away from t1ce'),
    'a seg at another place': (edit('seg', lambda v: v, SHIFTED), 'seg', 'lies up to 3.0 mm away'),
    'NaN': (edit('flair', put(np.nan)), 'flair', 'values run from nan to nan; finite values'),
    'infinite': (edit('flair', put(np.inf)), 'flair', 'to inf; finite values'),
    'minus infinite': (edit('flair', put(-np.inf)), 'flair', 'from -inf'),
    'beyond any scanner': (edit('flair', put(3e7)), 'flair', 'values within 1e6'),
    'NaN in the seg': (edit('seg', put(np.nan)), 'seg', 'finite values'),
    'a label of another edition': (edit('seg', put(3, np.uint8)), 'seg', r'labels \[0, 3, 4\], but BraTS2020 knows'),
    'a negative label': (edit('seg', put(-1, np.int16)), 'seg', r'labels \[-1, 0, 4\]'),
    'a label between two': (edit('seg', put(1.5)), 'seg', 'values between the labels'),
    'no tumor': (edit('seg', np.zeros_like), 'seg', 'no voxel of tumor'),
    'an empty modality': (edit('t2', np.zeros_like), 't2', 'every voxel is 0: this modality is empty'),
    'a constant modality': (edit('t2', lambda v: np.full_like(v, 7)), 't2', 'every voxel is 7'),
    'a seg for an image': (move('seg', 't2'), 't2', 'like a segmentation; an image was expected'),
    'an image for a seg': (move('t1', 'seg'), 'seg', 'but BraTS2020 knows'),
    'a copy of another modality': (move('t1ce', 'flair'), 'flair', 'flair looks like a copy of t1ce'),
    "another patient's seg": (edit('seg', lambda v: np.roll(v, 8, 0)), 'seg', 'of the tumor lies outside of the brain'),
    'an image in another order': (
        edit('t2', lambda v: v[::-1, ::-1], TURNED),
        't2',
        'stored in LPS order, t1ce in RAS',
    ),
    'a seg in another order': (
        edit('seg', lambda v: v[::-1, ::-1], TURNED),
        'seg',
        'LPS order.*mended when it is read',
    ),
}


@pytest.mark.parametrize('kind', BAD)
def test_checkFiles_findsEachKindOfBadInput(cohortOf, kind):
    """One patient of two is spoiled: every finding is that patient's, one names the file and says what is wrong."""
    spoil, column, words = BAD[kind]
    table = checks.checkFiles(cohortOf(spoil))
    assert list(table.columns) == ['patient', 'file', 'finding'] and set(table['patient']) == {'BraTS20_Training_002'}
    file = column if kind == 'missing modality' else f'BraTS20_Training_002_{column}.nii.gz'
    assert table.loc[table['file'] == file, 'finding'].str.contains(words).any(), table['finding'].tolist()


def test_checkFiles_isEmptyWhenAllIsWell(cohortOf):
    """Two sound patients, and one of them without a seg, give no row but the columns."""
    table = checks.checkFiles(cohortOf())
    assert len(table) == 0 and list(table.columns) == ['patient', 'file', 'finding']
    assert len(checks.checkFiles(cohortOf(remove('seg')))) == 0


def test_checkFiles_agreesWithReadCase(cohortOf):
    """Whatever readCase refuses is found; what it mends or takes is no reason to refuse."""
    mended = {'an image in another order', 'a seg in another order'}
    taken = {kind for kind, (_, _, words) in BAD.items() if 'segmentation' in words or 'tumor' in words}
    taken |= {'an empty modality', 'a constant modality', 'a copy of another modality'}
    for number, (kind, (spoil, _, _)) in enumerate(BAD.items()):
        df = cohortOf(spoil, patient=f'BraTS20_Training_{number}{{:03d}}', folder=str(number))
        paths = df.loc[f'BraTS20_Training_{number}002']
        if kind in mended | taken:
            patients.readCase(paths)
        else:
            with pytest.raises((ValueError, FileNotFoundError), match=paths.name):
                patients.readCase(paths)


def test_checkFiles_countsTheCavity(tmp_path):
    """2024's label 4 is counted, file by file."""
    config.EDITION = 'BraTS2024'
    name = 'BraTS-GLI-00001-100'
    for end in ('t1c', 't2w', 't2f'):
        save(tmp_path / name / f'{name}-{end}.nii.gz', np.random.default_rng(len(end)).normal(size=SHAPE))
    label = np.zeros(SHAPE, np.uint8)
    label[0, 0, :5], label[1, 1, :7] = 4, 3
    save(tmp_path / name / f'{name}-seg.nii.gz', label)
    table = checks.checkFiles(patients.makeFileList(tmp_path))
    expected = '5 voxels of resection cavity (label 4) count as background'
    assert table.loc[table['file'].str.contains('seg'), 'finding'].tolist() == [expected]


def test_checkFiles_saysWhatIsNoGlioma(tmp_path):
    """A patient below 51_OtherNeoplasms is listed, and told."""
    name = 'BraTS-SSA-00001-000'
    for end in ('t1c', 't2w', 't2f'):
        volume = np.random.default_rng(len(end)).normal(size=SHAPE)
        save(tmp_path / '51_OtherNeoplasms' / name / f'{name}-{end}.nii.gz', volume)
    table = checks.checkFiles(patients.makeFileList(tmp_path))
    assert table['finding'].str.contains('not a glioma').sum() == 1


def test_checkFiles_readsTheDecathlon(tmp_path):
    """Sound 4-D patients give no finding; what a foreign name or a file that is gone gets."""
    cases = makeCases(2, 0)
    writeLayout('Decathlon', tmp_path, [(image, classes.clip(1)) for image, classes in cases])
    df = patients.makeFileList(tmp_path)
    assert len(checks.checkFiles(df)) == 0
    df.loc['BRATS_002', 'seg'] = str(tmp_path / 'gone.nii.gz')
    table = checks.checkFiles(df)
    assert table.values.tolist() == [['BRATS_002', 'gone.nii.gz', 'does not exist.']]
    config.EDITION = None
    foreign = pd.DataFrame({name: f'Smith_{name}.nii' for name in COLUMNS}, index=['Smith'])
    assert 'the edition cannot be told' in checks.checkFiles(foreign)['finding'].item()
