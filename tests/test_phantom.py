"""Phantoms have the layout, headers and labels of BraTS 2020, and a seed always gives the same ones."""

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

import phantom

SMALL = (48, 40, 16)
SUFFIXES = ('t1', 't1ce', 't2', 'flair', 'seg')


def _read(folder, patient, suffix):
    """Return a volume of a patient in the order of its file."""
    return np.asarray(nib.load(folder / patient / f'{patient}_{suffix}.nii.gz').dataobj)


def _bytes(folder):
    """Return a dict of path to content of all files below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob('*') if file.is_file()}


@pytest.fixture(scope='module')
def five(tmp_path_factory):
    """Return a folder of five patients and their ids."""
    folder = tmp_path_factory.mktemp('five')
    return folder, phantom.makeCases(folder, 5, seed=3, shape=(64, 64, 24))


def test_makeCases_hasTheLayoutOfBraTS2020(five):
    """Ids count from 001; the folder holds five files per patient and the mapping, and nothing else."""
    folder, ids = five
    assert ids == [f'BraTS20_Training_00{i}' for i in (1, 2, 3, 4, 5)]
    expected = {f'{patient}/{patient}_{suffix}.nii.gz' for patient in ids for suffix in SUFFIXES}
    assert set(_bytes(folder)) == expected | {'name_mapping.csv'}


def test_makeCases_writesTheHeaderOfBraTS(five):
    """Images are int16, labels uint8, unscaled; axes run left, back and top at 1 mm; both codes are 1."""
    folder, ids = five
    for suffix in SUFFIXES:
        image = nib.load(folder / ids[0] / f'{ids[0]}_{suffix}.nii.gz')
        assert image.shape == (64, 64, 24)
        assert image.get_data_dtype() == (np.uint8 if suffix == 'seg' else np.int16)
        assert np.array_equal(image.affine, [[-1, 0, 0, 0], [0, -1, 0, 63], [0, 0, 1, 0], [0, 0, 0, 1]])
        assert nib.aff2axcodes(image.affine) == ('L', 'P', 'S')
        assert image.get_qform(coded=True)[1] == image.get_sform(coded=True)[1] == 1
        assert np.array_equal(image.get_qform(), image.get_sform())
        assert image.dataobj.slope == 1 and image.dataobj.inter == 0


def test_makeCases_leavesTheBackgroundZero(five):
    """All modalities have the same brain, which does not touch the border; outside it, images and labels are 0."""
    folder, ids = five
    for patient in ids:
        volumes = {suffix: _read(folder, patient, suffix) for suffix in SUFFIXES}
        brain = volumes['t1'] != 0
        assert 0.1 < brain.mean() < 0.3
        assert all(volume.min() == 0 and volume[0].max() == volume[:, -1].max() == 0 for volume in volumes.values())
        assert all(np.array_equal(volumes[suffix] > 0, brain) for suffix in ('t1ce', 't2', 'flair'))
        assert not volumes['seg'][~brain].any()


def test_makeCases_orientsTheHead(five):
    """Low slices hold less brain (brainstem) and lie further back (cerebellum) than high ones."""
    folder, ids = five
    for patient in ids:
        brain = _read(folder, patient, 't1') > 0
        area = brain.sum(axis=(0, 1))
        assert area[14:18].mean() > 3 * area[1:5].mean()
        assert ndimage.center_of_mass(brain[:, :, :5])[1] > ndimage.center_of_mass(brain[:, :, 12:])[1] + 3


def test_makeCases_drawsPlausibleTumors(five):
    """Each has 10 to 200 ml, edema bright in flair, necrosis inside and, but for the fourth, a rim bright in t1ce."""
    folder, ids = five
    voxel = 240 * 240 * 155 / (64 * 64 * 24) / 1000  # ml, as the box has 240 x 240 x 155 mm at every shape
    for i, patient in enumerate(ids):
        t1ce, flair, seg = (_read(folder, patient, suffix) for suffix in ('t1ce', 'flair', 'seg'))
        labels, counts = np.unique(seg, return_counts=True)
        assert labels.tolist() == ([0, 1, 2] if i == 3 else [0, 1, 2, 4]) and counts.min() >= 4
        assert 10 < np.count_nonzero(seg) * voxel < 200
        around = ndimage.binary_dilation(seg == 1) & (seg != 1)
        assert np.isin(seg[around], (2, 4)).mean() > 0.6
        assert np.median(flair[seg == 2]) > 1.1 * np.median(flair[(flair > 0) & (seg == 0)])
        assert i == 3 or np.median(t1ce[seg == 4]) > 1.3 * np.median(t1ce[seg == 1])


def test_makeCases_cannotBeSolvedByAThreshold(five):
    """With the best flair threshold of each patient, the mean Dice of the whole tumor is below 0.75."""
    folder, ids = five
    best = []
    for patient in ids:
        flair, truth = _read(folder, patient, 'flair'), _read(folder, patient, 'seg') > 0
        masks = [flair > value for value in np.percentile(flair[flair > 0], range(50, 100))]
        best.append(max(2 * (mask & truth).sum() / (mask.sum() + truth.sum()) for mask in masks))
    assert np.mean(best) < 0.75


def test_makeCases_isReproducible(tmp_path):
    """The same seed writes the same bytes, also over older files and however many patients there are; others differ."""
    [first] = phantom.makeCases(tmp_path / 'a', 1, seed=5, shape=SMALL)
    phantom.makeCases(tmp_path / 'b', 1, seed=6, shape=SMALL)
    a, b = ({name: data for name, data in _bytes(tmp_path / folder).items() if '.nii' in name} for folder in 'ab')
    assert set(a) == set(b) and all(a[name] != b[name] for name in a)
    _, second = phantom.makeCases(tmp_path / 'b', 2, seed=5, shape=SMALL)
    b = _bytes(tmp_path / 'b')
    assert all(b[name] == a[name] != b[name.replace(first, second)] for name in a)


def test_makeCases_mapsNamesToGrades(five):
    """The mapping has BraTS 2020's columns; the patient without enhancing tumor is LGG; earlier names are missing."""
    folder, ids = five
    table = pd.read_csv(folder / 'name_mapping.csv')
    editions = ['BraTS_2017', 'BraTS_2018', 'TCGA_TCIA', 'BraTS_2019', 'BraTS_2020']
    assert table.columns.tolist() == ['Grade', *(f'{edition}_subject_ID' for edition in editions)]
    assert table['Grade'].tolist() == ['HGG', 'HGG', 'HGG', 'LGG', 'HGG']
    assert table['BraTS_2020_subject_ID'].tolist() == ids
    assert table.iloc[:, 1:5].isna().all(axis=None)


@pytest.mark.parametrize(
    ('n', 'options', 'message'),
    [
        (0, {}, 'n is 0, seed 0; at least 1 patient'),
        (1, {'seed': -1}, 'n is 1, seed -1'),
        (1, {'shape': (64, 64, 15)}, r'\(64, 64, 15\).*16'),
        (1, {'shape': (64, 64)}, r'\(64, 64\).*three'),
        (1, {'shape': (64, 64, 20.5)}, r'20\.5.*whole'),
    ],
)
def test_makeCases_refusesInvalidArguments(tmp_path, n, options, message):
    """An invalid argument raises a ValueError that names its value, and nothing is written."""
    with pytest.raises(ValueError, match=message):
        phantom.makeCases(tmp_path / 'none', n, **options)
    assert not (tmp_path / 'none').exists()


def test_makeCases_mixesWithNoOtherPatients(tmp_path):
    """Older phantoms beyond n, and patients that are no phantoms, are refused and stay."""
    options = {'shape': (16, 16, 16)}  # the smallest, which still holds every label
    for patient in phantom.makeCases(tmp_path, 2, **options):
        assert np.unique(_read(tmp_path, patient, 'seg')).tolist() == [0, 1, 2, 4]
    with pytest.raises(ValueError, match=r'other patients, such as BraTS20_Training_002_.*choose another folder'):
        phantom.makeCases(tmp_path, 1, **options)
    real = tmp_path / 'BraTS20_Training_001' / 'BraTS20_Training_001_t1.nii.gz'
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.int16), np.eye(4)), real)
    before = real.read_bytes()
    with pytest.raises(ValueError, match='such as BraTS20_Training_001_t1'):
        phantom.makeCases(tmp_path, 2, **options)
    assert real.read_bytes() == before
