import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import joblib
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
import torchio as tio

import config
import patients
import preprocess
import provenance
import transforms
from conftest import PATCHES, save, volumesOf
from patients import editions, reading

ORIGINS = ('slice', 'row', 'column')


def makePatient(writeCase, shape=(40, 44, 6), patient='BraTS20_Training_001', tumor=(slice(2, 5), slice(3, 6), 2)):
    """Write a patient with different values in all voxels, a brain in the middle and one small tumor."""
    generator = np.random.default_rng(len(patient) + shape[0])
    image = np.zeros((3, *shape), np.int16)
    image[:, 1:-1, 1:-1, 1:-1] = generator.integers(-50, 900, (3, *(size - 2 for size in shape)))
    label = np.zeros(shape, np.uint8)
    label[tumor] = 4
    return image, label, writeCase(volumesOf(image, label), patient)


def listOf(**rows):
    return pd.DataFrame.from_dict(rows, orient='index')


def identity(subject):
    return subject


def lower(subject):
    """Return negative intensities in -600 to 0, which float16 would round."""
    return {name: (x if name == 'y' else x.float().clamp(max=0) * 10 - 0.123) for name, x in subject.items()}


def test_makeDataset_storesEachPatchWithItsOrigin(writeCase, tmp_path):
    """Put back by patient, slice, row and column, the patches are the stretched volume and all of the label again."""
    image, label, paths = makePatient(writeCase, tumor=(slice(0, 40), slice(3, 44, 9), slice(1, 6, 2)))
    numPatches = preprocess.makeDataset(dataframe=listOf(P1=paths), filename=tmp_path / 'a.h5')
    stretched, classes = transforms.transformCase(image, label // 4 * 3, transforms.volumeTransform())
    rebuilt = np.zeros((6, 40, 44), np.uint8)
    with h5py.File(tmp_path / 'a.h5') as file:
        assert numPatches == len(file['image']) == 2 * 2 * 3
        assert file['image'].dtype == np.float16 and file['label'].dtype == np.uint8
        assert file['image'].chunks == (1, 3, 32, 32)
        assert sorted(set(file['slice'][:])) == [1, 3, 5] and set(file['patient'][:]) == {0}
        for number in range(numPatches):
            z, row, column = (int(file[name][number]) for name in ORIGINS)
            window = (slice(row, row + 32), slice(column, column + 32))
            expected = stretched[(z, slice(None), *window)].numpy().astype(np.float16)
            np.testing.assert_array_equal(file['image'][number], expected)
            rebuilt[(z, *window)] = file['label'][number]
    np.testing.assert_array_equal(rebuilt, classes)


@pytest.mark.parametrize('fraction', [0, 0.5])
@pytest.mark.parametrize('dtype', ['<i2', '>i2', '<f8', '>f4', 'u1'])
def test_makeDataset_cutsWhatPredictionSees(writeCase, tmp_path, fraction, dtype):
    """Stretching only what is cut equals cutting the volume that testTransform stretches for predict, to the bit."""
    config.BACKGROUND_SHARE = fraction
    *_, paths = makePatient(writeCase)
    for name in (*config.MODALITIES, 'seg'):
        volume = np.abs(nib.load(paths[name]).get_fdata()) % 250
        volume *= 1.1 if dtype[-2] == 'f' and name != 'seg' else 1
        nib.save(nib.Nifti1Image(volume.astype(dtype), np.diag([-1, -1, 1, 1])), paths[name])
    files = [tmp_path / 'part.h5', tmp_path / 'whole.h5']
    preprocess.makeDataset(dataframe=listOf(P1=paths), filename=files[0])
    preprocess.makeDataset(dataframe=listOf(P1=paths), filename=files[1], transform=transforms.makeTransforms()[2])
    with h5py.File(files[0]) as part, h5py.File(files[1]) as whole:
        for name in PATCHES:
            np.testing.assert_array_equal(part[name][:], whole[name][:])
        assert len(part['image']) >= 1 + bool(fraction) and part['image'].dtype == np.float16


def test_makeDataset_dropsPatchesWithoutTumor(writeCase, tmp_path):
    """Of four windows on six slices only the one with the tumor is written, with the patient's id and the settings."""
    *_, paths = makePatient(writeCase)
    assert preprocess.makeDataset(dataframe=listOf(P1=paths), filename=tmp_path / 'a.h5') == 1
    with h5py.File(tmp_path / 'a.h5') as file:
        assert [file[name][0] for name in ORIGINS] == [2, 0, 0]
        found = json.loads(file['provenance'][()])
        assert list(found['patients']) == ['P1'] and json.loads(file['leftOut'][()]) == {}
        assert found['settings']['patchStride'] == 24
        assert found['settings']['modalities'] == ['t1ce', 't2', 'flair']


def test_makeDataset_keepsAFractionOfTheBrainBySeed(writeCase, tmp_path):
    """1 keeps every window with brain, 0.5 about half of them, the same ones again for the same seed."""
    *_, paths = makePatient(writeCase, shape=(80, 80, 20))

    def origins(fraction, seed, name):
        config.BACKGROUND_SHARE, config.SEED = fraction, seed
        preprocess.makeDataset(dataframe=listOf(P1=paths), filename=tmp_path / name)
        with h5py.File(tmp_path / name) as file:
            return [file[name][:].tolist() for name in ORIGINS]

    assert len(origins(1, 0, 'a.h5')[0]) == 3 * 3 * 18  # the first and the last slice have no brain
    half = origins(0.5, 0, 'b.h5')
    assert 60 < len(half[0]) < 102
    assert origins(0.5, 0, 'c.h5') == half and origins(0.5, 1, 'd.h5') != half


@pytest.mark.parametrize('isGiven', [False, True])
def test_makeDataset_cutsEveryPlane(writeCase, tmp_path, isGiven):
    """Put back by plane, slice, row and column, patches are every third slice of each plane, from a drawn start."""
    config.PLANES, config.SLICE_STEP = ('sagittal', 'axial', 'coronal'), 3
    image, label, paths = makePatient(writeCase, (40, 44, 36), tumor=slice(None))
    transform = transforms.makeTransforms()[2] if isGiven else None
    numPatches = preprocess.makeDataset(listOf(P1=paths), tmp_path / 'a.h5', transform)
    x, y = transforms.transformCase(image, label // 4 * 3, transforms.volumeTransform())
    turned = [x.permute(2, 1, 3, 0), x, x.permute(3, 1, 2, 0)]  # (D, C, W, H) -> slices of (H, D), (W, H), (W, D)
    classes = [y.permute(1, 2, 0), y, y.permute(2, 1, 0)]
    with h5py.File(tmp_path / 'a.h5') as file:
        planes = file['plane'][:]
        assert numPatches == len(planes) and planes.tolist() == sorted(planes)
        for number in range(numPatches):
            plane, z, row, column = (int(file[name][number]) for name in ('plane', *ORIGINS))
            window = (slice(row, row + 32), slice(column, column + 32))
            expected = turned[plane][(z, slice(None), *window)].numpy().astype(np.float16)
            np.testing.assert_array_equal(file['image'][number], expected)
            np.testing.assert_array_equal(file['label'][number], classes[plane][(z, *window)])
        for plane, length in enumerate((40, 36, 44)):
            slices = np.unique(file['slice'][:][planes == plane])
            assert slices[0] < 3 and set(np.diff(slices)) == {3} and slices[-1] >= length - 3
            assert (planes == plane).sum() == 2 * 2 * len(slices)


def test_makeDataset_drawsTheFirstSliceOfEachPatientAndPlane(writeCase, tmp_path):
    """Starts differ between patients and planes, follow the seed, and stay the same in a second call."""
    config.PLANES, config.SLICE_STEP = ('axial', 'coronal', 'sagittal'), 3
    *_, paths = makePatient(writeCase, (40, 40, 40), tumor=slice(None))
    df = listOf(**{f'P{number}': paths for number in range(6)})

    def startsOf(name):
        preprocess.makeDataset(df, tmp_path / name)
        with h5py.File(tmp_path / name) as file:
            origins = zip(file['patient'][:], file['plane'][:], file['slice'][:], strict=True)
            starts = {}
            for patient, plane, z in origins:
                starts.setdefault((patient, plane), z)
            return starts

    starts = startsOf('a.h5')
    assert len(starts) == 18 and set(starts.values()) == {0, 1, 2} and startsOf('b.h5') == starts
    config.SEED = 1
    assert startsOf('c.h5') != starts


def test_makeDataset_drawsTheStartsOfWindows(writeCase, tmp_path):
    """As many windows as on the grid, inside the image, other ones in each slice; the same again for the same seed."""
    image, _, paths = makePatient(writeCase, (60, 40, 24), tumor=slice(None))
    config.RANDOM_STARTS = True
    expected = transforms.transformCase(image, None, transforms.volumeTransform())[0].numpy().astype(np.float16)

    def starts(name):
        assert preprocess.makeDataset(listOf(P1=paths), tmp_path / name) == 3 * 2 * 24
        with h5py.File(tmp_path / name) as file:
            origins = np.stack([file[name][:] for name in ORIGINS], axis=1)
            for number in (0, 77):
                z, row, column = origins[number]
                window = expected[z, :, row : row + 32, column : column + 32]
                np.testing.assert_array_equal(file['image'][number], window)
        return origins.tolist()

    first = starts('a.h5')
    rows, columns = ({origin[axis] for origin in first} for axis in (1, 2))
    assert min(rows) >= 0 and max(rows) <= 28 and len(rows) > 20 and columns == set(range(9))
    assert first == sorted(first, key=lambda origin: origin[0]) and starts('b.h5') == first
    config.SEED = 1
    assert starts('c.h5') != first


def test_makeDataset_padsAVolumeSmallerThanAPatch(writeCase, tmp_path):
    """The padding is background: -1 in the image, class 0 in the label, even where tumor fills the volume."""
    *_, paths = makePatient(writeCase, shape=(20, 30, 4), tumor=slice(None))
    assert preprocess.makeDataset(dataframe=listOf(P1=paths), filename=tmp_path / 'a.h5') == 4
    with h5py.File(tmp_path / 'a.h5') as file:
        assert file['label'].shape == (4, 32, 32)
        assert (file['label'][:, :20, :30] == 3).all() and file['label'][:].sum() == 4 * 20 * 30 * 3
        assert (file['image'][:, :, 20:] == -1).all() and (file['image'][:, :, :, 30:] == -1).all()


def test_makeDataset_numbersWindowsOfAnOblongVolume(writeCase, tmp_path):
    """In 3 x 2 windows a tumor in the last row and first column is cut from there."""
    *_, paths = makePatient(writeCase, shape=(80, 40, 4), tumor=(slice(70, 75), slice(0, 5), 2))
    preprocess.makeDataset(dataframe=listOf(P1=paths), filename=tmp_path / 'a.h5')
    with h5py.File(tmp_path / 'a.h5') as file:
        assert (file['row'][:].tolist(), file['column'][:].tolist()) == ([48], [0])
        assert file['label'][0, 22:27, :5].min() == 3


def test_makeDataset_numbersItsPatients(writeCase, tmp_path, capsys):
    """`patient` counts the patients of the identity; one without a segmentation is in neither; backgrounds differ."""
    ids = {f'P{i}': f'BraTS20_Training_00{i}' for i in (1, 2, 3)}
    rows = {name: makePatient(writeCase, patient=patient, shape=(80, 80, 12))[-1] for name, patient in ids.items()}
    rows['P2'] = {**rows['P2'], 'seg': None}
    config.BACKGROUND_SHARE = 0.5
    preprocess.makeDataset(dataframe=listOf(**rows), filename=tmp_path / 'a.h5')
    with h5py.File(tmp_path / 'a.h5') as file:
        numbers = file['patient'][:]
        assert set(numbers) == {0, 1} and list(json.loads(file['provenance'][()])['patients']) == ['P1', 'P3']
        first, second = ([file[name][numbers == number].tolist() for name in ORIGINS] for number in (0, 1))
    assert first != second
    assert '1 of 3 patients have no segmentation' in capsys.readouterr().out


def test_makeDataset_writesTheSameWithAnyNumberOfWorkers(writeCase, tmp_path):
    """One thread and three write the same datasets, more patients than one block of results included."""
    rows = {f'P{i:02d}': makePatient(writeCase, patient=f'BraTS20_Training_{"1" * i}')[-1] for i in range(1, 11)}
    for config.PREPROCESS_WORKERS in (1, 3):
        preprocess.makeDataset(listOf(**rows), tmp_path / f'{config.PREPROCESS_WORKERS}.h5')
    with h5py.File(tmp_path / '1.h5') as one, h5py.File(tmp_path / '3.h5') as three:
        assert one['patient'][:].tolist() == list(range(10))
        for name in PATCHES:
            np.testing.assert_array_equal(one[name][:], three[name][:])


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('transform', [identity, lower])
def test_makeDataset_storesValuesBeyondOneInFloat32(writeCase, tmp_path, transform):
    """Values above 1 or below -1, in any patient, are stored exactly, without a warning from the first attempt."""
    image, _, paths = makePatient(writeCase)
    preprocess.makeDataset(listOf(P1=paths, P2=paths, P3=paths), tmp_path / 'a.h5', transform=transform)
    expected = transform({'x': torch.from_numpy(image[:, :32, :32, 2])})['x']
    with h5py.File(tmp_path / 'a.h5') as file:
        assert file['image'].dtype == np.float32 and file['patient'][:].tolist() == [0, 1, 2]
        np.testing.assert_array_equal(file['image'][1], expected)


def isReplaced(capsys, file, df, transform=None):
    """Return whether makeDataset cuts anew, and check that one file is left."""
    capsys.readouterr()
    preprocess.makeDataset(dataframe=df, filename=file, transform=transform)
    assert [path.name for path in file.parent.glob('*.h5*')] == [file.name]
    found = 'of the same patients and settings' in capsys.readouterr().out
    return not found


def test_makeDataset_findsAFileOfTheSameSettingsAndPatients(writeCase, tmp_path, capsys):
    """A second call finds the file; other patients, or a file that is cut off, have it replaced."""
    *_, paths = makePatient(writeCase)
    *_, other = makePatient(writeCase, patient='BraTS20_Training_002')
    file = tmp_path / 'a.h5'
    assert isReplaced(capsys, file, listOf(P1=paths))
    assert not isReplaced(capsys, file, listOf(P1=paths))
    assert isReplaced(capsys, file, listOf(P1=paths, P2=other))
    file.write_bytes(file.read_bytes()[:1000])
    assert isReplaced(capsys, file, listOf(P1=paths, P2=other))


def test_makeDataset_cutsAnewForATransformOfOnesOwn(writeCase, tmp_path, capsys):
    """A given transform cannot be compared with an earlier one: patches are cut again on each call, and it says why."""
    df, file = listOf(P1=makePatient(writeCase)[-1]), tmp_path / 'a.h5'
    preprocess.makeDataset(df, file, transform=identity)
    preprocess.makeDataset(df, file, transform=identity)
    assert 'is replaced: a transform of your own cannot be compared' in capsys.readouterr().out
    with h5py.File(file) as opened:
        assert provenance.readProvenance(opened)['settings']['stretching'] is None


def test_makeDataset_refusesAPatientTwice(writeCase, tmp_path):
    """A file list that was joined carelessly would weigh a patient double."""
    df = listOf(P1=makePatient(writeCase)[-1])
    with pytest.raises(ValueError, match='patient P1 is in the file list more than once'):
        preprocess.makeDataset(pd.concat([df, df]), tmp_path / 'a.h5')


def test_makeDataset_readsAPatientAgainAfterADiskError(writeCase, tmp_path, monkeypatch):
    """A patient left out because of the disk is tried again; one left out because of its content is not."""
    config.ON_BAD_PATIENT = 'leaveOut'
    df = listOf(P1=makePatient(writeCase)[-1], P2=makePatient(writeCase, patient='BraTS20_Training_002')[-1])
    read = reading._decompress

    def fail(nifti, path, dimensions):
        if 'Training_002' in str(path):
            raise OSError(5, 'Input/output error')
        return read(nifti, path, dimensions)

    monkeypatch.setattr(reading, '_decompress', fail)
    preprocess.makeDataset(df, tmp_path / 'a.h5')
    monkeypatch.undo()
    preprocess.makeDataset(df, tmp_path / 'a.h5')
    with h5py.File(tmp_path / 'a.h5') as file:
        assert list(json.loads(file['provenance'][()])['patients']) == ['P1', 'P2']


def test_makeDataset_leavesOutAPatientWhoseFilesCannotBeOpened(writeCase, tmp_path, monkeypatch):
    """Its checksums are no error of the patch file; once that is there, it is not called damaged."""
    df = listOf(P1=makePatient(writeCase)[-1], P2=makePatient(writeCase, patient='BraTS20_Training_002')[-1])
    real = preprocess.checksums

    def checksums(paths, known):
        if paths.name == 'P2':
            raise PermissionError(13, 'Permission denied', paths['t2'])
        return real(paths, known)

    monkeypatch.setattr(preprocess, 'checksums', checksums)
    with pytest.raises(ValueError, match=r'P2: .*Permission denied'):
        preprocess.makeDataset(df, tmp_path / 'a.h5')
    config.ON_BAD_PATIENT = 'leaveOut'
    preprocess.makeDataset(df, tmp_path / 'a.h5')
    with h5py.File(tmp_path / 'a.h5') as file:
        assert list(json.loads(file['provenance'][()])['patients']) == ['P1']
    config.ON_BAD_PATIENT = 'stop'
    content = (tmp_path / 'a.h5').read_bytes()
    with pytest.raises(ValueError, match=r'P2: .*Permission denied'):
        preprocess.makeDataset(df, tmp_path / 'a.h5')
    assert (tmp_path / 'a.h5').read_bytes() == content


def test_makeDataset_cutsAnewWhenTheChannelsOfAnEditionWereMixedUp(tmp_path, capsys):
    """The files stay the same, but another of their volumes is T1ce now."""
    image, label = np.random.default_rng(0).integers(1, 900, (20, 20, 6, 2), np.int16), np.ones((20, 20, 6), np.uint8)
    save(image, tmp_path / 'case1_images.nii.gz')
    save(label, tmp_path / 'case1_mask.nii.gz')
    config.MODALITIES, config.NO_CLASSES = ('t1ce', 'flair'), 2
    suffixes, classes = {'images': ('t1ce', 'flair'), 'mask': ('seg',)}, {0: 0, 1: 1}
    first = []
    for channels in ({'t1ce': 0, 'flair': 1}, {'t1ce': 1, 'flair': 0}):
        config.OWN_EDITIONS = {'Clinic': editions.Edition(r'case\d', suffixes, classes, channels=channels)}
        preprocess.makeDataset(patients.makeFileList(tmp_path), tmp_path / 'a.h5')
        with h5py.File(tmp_path / 'a.h5') as file:
            first.append(file['image'][0])
    assert (
        'a.h5 is replaced: the channels of 4-D files in each edition of config.OWN_EDITIONS' in capsys.readouterr().out
    )
    np.testing.assert_array_equal(first[0], first[1][::-1])


def test_makeDataset_cutsTheSameInOtherProcesses(writeCase, tmp_path):
    """Under a backend of processes, the values set in this one are those that patients are cut with."""
    config.MODALITIES, config.STRETCH_RANGE = ('flair', 't2', 't1ce'), (-0.5, 0.5)
    df = listOf(P1=makePatient(writeCase)[-1])
    preprocess.makeDataset(df, tmp_path / 'threads.h5')
    with joblib.parallel_config('loky', n_jobs=2):
        preprocess.makeDataset(df, tmp_path / 'processes.h5')
    with h5py.File(tmp_path / 'threads.h5') as threads, h5py.File(tmp_path / 'processes.h5') as processes:
        for name in PATCHES:
            np.testing.assert_array_equal(threads[name][:], processes[name][:])


@pytest.mark.parametrize(
    ('name', 'value'),
    [('MODALITIES', ('t2', 't1ce', 'flair')), ('SEED', 1), ('BACKGROUND_SHARE', 0.6), ('PATCH_SIZE', 40),
     ('PLANES', ('coronal',)), ('SLICE_STEP', 2), ('RANDOM_STARTS', True),
     ('PATCH_STRIDE', 16), ('STRETCH_RANGE', (0, 1)), ('STRETCH_PERCENTILES', (1, 99))],
)  # fmt: skip
def test_makeDataset_replacesAFileOfOtherSettings(writeCase, tmp_path, capsys, name, value):
    """A file made with one number changed is not used."""
    df, config.BACKGROUND_SHARE = listOf(P1=makePatient(writeCase)[-1]), 0.5
    preprocess.makeDataset(df, tmp_path / 'a.h5')
    setattr(config, name, value)
    preprocess.makeDataset(df, tmp_path / 'a.h5')
    assert 'is replaced: ' in capsys.readouterr().out


def test_makeDataset_keepsThePatchesOfARun(writeCase, tmp_path):
    """Patches that a checkpoint was trained on are not replaced after a change of config: its run would be refused."""
    df, config.OUTPUT_FOLDER = listOf(P1=makePatient(writeCase)[-1]), str(tmp_path)
    count = preprocess.makeDataset(df, config.TRAIN_FILE)
    Path(config.LAST_CHECKPOINT).touch()
    before = Path(config.TRAIN_FILE).read_bytes()
    config.STRETCH_RANGE = (0, 1)
    with pytest.raises(ValueError, match=r'train\.h5 is part of the run of .*last\.pt and is not replaced, although '):
        preprocess.makeDataset(df, config.TRAIN_FILE)
    assert Path(config.TRAIN_FILE).read_bytes() == before
    preprocess.makeDataset(df, tmp_path / 'other.h5')
    config.STRETCH_RANGE = (-1, 1)
    assert preprocess.makeDataset(df, config.TRAIN_FILE) == count


def test_makeDataset_tellsThatNoPatientIsLeft(writeCase, tmp_path):
    """An empty set, as of one patient that is split, is not called one without segmentations."""
    with pytest.raises(ValueError, match=r'There is no patient for .*val\.h5'):
        preprocess.makeDataset(listOf(P1=makePatient(writeCase)[-1])[:0], tmp_path / 'val.h5')


def test_makeDataset_replacesAFileOfOtherLabels(writeCase, tmp_path, capsys, monkeypatch):
    """The same files read by another edition's table of labels are cut anew."""
    df = listOf(P1=makePatient(writeCase)[-1])
    preprocess.makeDataset(df, tmp_path / 'a.h5')
    edition = dataclasses.replace(editions.EDITIONS['BraTS2020'], classes={0: 0, 1: 1, 2: 2, 4: 1})
    monkeypatch.setitem(editions.EDITIONS, 'BraTS2020', edition)
    preprocess.makeDataset(df, tmp_path / 'a.h5')
    assert "replaced: the labels' classes in each edition is" in capsys.readouterr().out


@pytest.mark.parametrize('ending', ['.nii', '.nii.gz'])
@pytest.mark.parametrize('column', ['t2', 'seg'])
def test_makeDataset_replacesAFileOfAMendedPatient(writeCase, tmp_path, capsys, column, ending):
    """One voxel corrected in place, the file's size unchanged, has the patches cut anew; untouched files do not."""
    *_, paths = makePatient(writeCase)
    for name in paths:
        nib.save(nib.load(paths[name]), paths[name].replace('.nii.gz', ending))
        paths[name] = paths[name].replace('.nii.gz', ending)
    df, file = listOf(P1=paths), tmp_path / 'a.h5'
    assert isReplaced(capsys, file, df) and not isReplaced(capsys, file, df)
    volume = np.asarray(nib.load(paths[column]).dataobj).copy()
    volume[2, 3, 2] = 1
    nib.save(nib.Nifti1Image(volume, np.eye(4)), paths[column])
    preprocess.makeDataset(df, file)
    assert 'replaced: 1 other files (P1)' in capsys.readouterr().out
    assert not isReplaced(capsys, file, df)


def test_makeDataset_triesAMendedPatientAgain(badAmongGood, tmp_path, capsys):
    """A patient that was left out is read again once its file has been corrected."""
    config.ON_BAD_PATIENT = 'leaveOut'
    preprocess.makeDataset(badAmongGood, tmp_path / 'a.h5')
    df = badAmongGood.assign(seg=badAmongGood['seg'].iloc[1])
    preprocess.makeDataset(df, tmp_path / 'a.h5')
    with h5py.File(tmp_path / 'a.h5') as file:
        assert list(json.loads(file['provenance'][()])['patients']) == ['P2', 'P3']


def test_makeDataset_holdsMoreThanAnAttributeCan(writeCase, tmp_path, capsys):
    """The identity of many patients, far beyond the 64 kB of an HDF5 attribute, is written and found."""
    config.ON_BAD_PATIENT = 'leaveOut'
    *_, paths = makePatient(writeCase)
    rows = {f'P{number:04d}': {**paths, 't2': '/gone/' + 'x' * 200} for number in range(400)}
    df, file = listOf(good=paths, **rows), tmp_path / 'a.h5'
    assert isReplaced(capsys, file, df) and not isReplaced(capsys, file, df)


def test_makeDataset_namesAClassThatNoPatchHas(writeCase, tmp_path, capsys):
    """With enhancing tumor alone, the other two classes are named: a model cannot learn them."""
    preprocess.makeDataset(listOf(P1=makePatient(writeCase)[-1]), tmp_path / 'a.h5')
    printed = capsys.readouterr().out
    for name in ('necrotic core', 'edema'):
        assert f'None of these 1 patients has a patch with {name}' in printed
    assert 'enhancing' not in printed


@pytest.mark.parametrize('name', ['image', 'label', 'patient', *ORIGINS])
def test_makeDataset_replacesAFileWithADamagedChunk(writeCase, tmp_path, capsys, name):
    """One byte changed in any chunk of any dataset is found, and the file replaced by one that equals the good one."""
    *_, paths = makePatient(writeCase, tumor=(slice(2, 5), slice(3, 6), slice(1, 4)))
    file = tmp_path / 'a.h5'
    preprocess.makeDataset(listOf(P1=paths), file)
    good = file.read_bytes()
    with h5py.File(file) as patches:
        dataset = patches[name].id
        chunks = [dataset.get_chunk_info(number) for number in range(dataset.get_num_chunks())]
    assert len(chunks) == (3 if name in ('image', 'label') else 1)
    for chunk in chunks:
        for place in (0, chunk.size // 2, chunk.size - 1):
            damaged = bytearray(good)
            damaged[chunk.byte_offset + place] ^= 16
            file.write_bytes(damaged)
            capsys.readouterr()
            preprocess.makeDataset(listOf(P1=paths), file)
            assert 'is damaged' in capsys.readouterr().out
    with h5py.File(file) as patches, h5py.File(io.BytesIO(good)) as before:
        np.testing.assert_array_equal(patches[name][:], before[name][:])


def test_makeDataset_acceptsNumpyNumbers(writeCase, tmp_path):
    """A stride or a fraction computed with NumPy is a number like any other."""
    config.PATCH_STRIDE, config.BACKGROUND_SHARE = np.int64(24), np.float32(0)
    assert preprocess.makeDataset(listOf(P1=makePatient(writeCase)[-1]), tmp_path / 'a.h5') == 1


def test_makeDataset_refusesATransformThatChangesTheShape(writeCase, tmp_path):
    """A transform of patches, given for the whole volume, is refused with the patient and both shapes."""
    pad = tio.CropOrPad((32, 32, 1), include=['x1', 'x2', 'x3', 'y'], label_keys=['y'])
    with pytest.raises(ValueError, match=r'P1: the transform changed the shape \(40, 44, 6\) to \(1, 3, 32, 32\)'):
        preprocess.makeDataset(listOf(P1=makePatient(writeCase)[-1]), tmp_path / 'a.h5', transform=pad)


def test_makeDataset_leavesNoFileAfterAnError(writeCase, tmp_path):
    """A patient that cannot be read is named, patients without tumor are refused, and no part of a file is left."""
    *_, paths = makePatient(writeCase)
    bad = {**paths, 't2': str(tmp_path / 'gone.nii.gz')}
    with pytest.raises(FileNotFoundError, match=r'P2: .*gone\.nii\.gz does not exist'):
        preprocess.makeDataset(dataframe=listOf(P1=paths, P2=bad), filename=tmp_path / 'a.h5')
    healthy = writeCase({'seg': np.zeros((40, 44, 6), np.uint8)})
    with pytest.raises(ValueError, match='no patch with tumor in 1 patients'):
        preprocess.makeDataset(dataframe=listOf(P1=paths | healthy), filename=tmp_path / 'a.h5')
    assert not list(tmp_path.glob('*.h5*'))


FULL_DISK = """
import json, resource, sys
import pandas as pd
import config, preprocess
vars(config).update(config.DOCUMENT, PATCH_SIZE=32, PATCH_STRIDE=24)
df, limits = pd.DataFrame([json.loads(sys.argv[1])], ['P1']), resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
try:
    preprocess.makeDataset(df, 'a.h5')
except OSError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
print(preprocess.makeDataset(df, 'a.h5'))
"""


def test_makeDataset_canBeRepeatedAfterAFullDisk(writeCase, tmp_path):
    """The error names the file; with space again the same process writes it, and ends without a crash."""
    *_, paths = makePatient(writeCase, tumor=slice(None))
    command, home = [sys.executable, '-c', FULL_DISK, json.dumps(paths)], str(Path(preprocess.__file__).parent)
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, 'PYTHONPATH': home})
    assert done.returncode == 0, done.stderr
    assert 'a.h5 could not be written: File too large' in done.stdout and done.stdout.endswith('\n24\n')


@pytest.fixture
def badAmongGood(writeCase, tmp_path):
    """Return the file list of a patient whose t2 is cut off, a good one, and one whose seg has an unknown label."""
    *_, paths = makePatient(writeCase)
    Path(tmp_path / 'cut.nii.gz').write_bytes(Path(paths['t2']).read_bytes()[:-400])
    unknown = writeCase({'seg': np.full((40, 36, 6), 9, np.uint8)}, folder='unknown')['seg']
    rows = {'P1': {**paths, 't2': str(tmp_path / 'cut.nii.gz')}, 'P2': paths, 'P3': {**paths, 'seg': unknown}}
    return listOf(**rows)


def test_makeDataset_namesAllBadPatientsAtOnce(badAmongGood, tmp_path):
    """Two bad patients of three are named in one error, with what is wrong; no file is left."""
    with pytest.raises(ValueError, match=r'(?s)2 of 3 patients.*P1: .*cut\.nii\.gz cannot be used.*P3: .*labels \[9\]'):
        preprocess.makeDataset(dataframe=badAmongGood, filename=tmp_path / 'a.h5')
    assert not list(tmp_path.glob('*.h5*'))


def test_makeDataset_leavesOutBadPatientsOnRequest(badAmongGood, tmp_path, capsys):
    """The file equals that of the good patient alone, and lists who is left out; with 'stop' it is not accepted."""
    config.ON_BAD_PATIENT = 'leaveOut'
    preprocess.makeDataset(dataframe=badAmongGood[1:2], filename=tmp_path / 'alone.h5')
    for printed in ('Left out: P1: ', 'P1 is left out: '):  # when it is made, and when it is found
        capsys.readouterr()
        numPatches = preprocess.makeDataset(dataframe=badAmongGood, filename=tmp_path / 'a.h5')
        assert printed in capsys.readouterr().out
    with h5py.File(tmp_path / 'a.h5') as file, h5py.File(tmp_path / 'alone.h5') as alone:
        assert list(json.loads(file['provenance'][()])['patients']) == ['P2'] and len(file['image']) == numPatches > 0
        assert [*json.loads(file['leftOut'][()])] == ['P1', 'P3']
        for name in PATCHES:
            np.testing.assert_array_equal(file[name][:], alone[name][:])
    config.ON_BAD_PATIENT = 'stop'
    with pytest.raises(ValueError, match='2 of 3 patients'):
        preprocess.makeDataset(dataframe=badAmongGood, filename=tmp_path / 'a.h5')
    config.ON_BAD_PATIENT = 'go on'
    with pytest.raises(ValueError, match="'go on'; 'stop' or 'leaveOut' was expected"):
        preprocess.makeDataset(dataframe=badAmongGood, filename=tmp_path / 'a.h5')


def test_makeDataset_leavesOutAPatientWithoutAFile(writeCase, tmp_path):
    """A missing modality is a reason like any other; if nobody is left it is an error."""
    *_, paths = makePatient(writeCase)
    config.ON_BAD_PATIENT = 'leaveOut'
    gone = {**paths, 't2': None}
    preprocess.makeDataset(dataframe=listOf(P1=gone, P2=paths), filename=tmp_path / 'a.h5')
    with h5py.File(tmp_path / 'a.h5') as file:
        assert 'no file for the modality t2' in json.loads(file['leftOut'][()])['P1'][0]
    with pytest.raises(ValueError, match='None of the 1 patients can be used: P1: no file for the modality t2'):
        preprocess.makeDataset(dataframe=listOf(P1=gone), filename=tmp_path / 'b.h5')


def test_makeDataset_drawsNoRandomNumbers(writeCase, tmp_path):
    """A run that makes the file and one that finds it continue with the same random numbers, whatever the transform."""
    *_, paths = makePatient(writeCase)
    before = torch.get_rng_state()
    preprocess.makeDataset(listOf(P1=paths), tmp_path / 'a.h5', transform=transforms.makeTransforms()[2])
    assert torch.equal(torch.get_rng_state(), before)
