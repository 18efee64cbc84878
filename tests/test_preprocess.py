import functools
import io
import json
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
import torchio as tio

import config
import preprocess
import transforms


def makePatient(writeCase, shape=(40, 44, 6), patient='BraTS20_Training_001', tumor=(slice(2, 5), slice(3, 6), 2)):
    """Writes a patient whose every voxel is telling, with a brain in the middle and one small tumor."""
    generator = np.random.default_rng(len(patient) + shape[0])
    image = np.zeros((3, *shape), np.int16)
    image[:, 1:-1, 1:-1, 1:-1] = generator.integers(-50, 900, (3, *(size - 2 for size in shape)))
    label = np.zeros(shape, np.uint8)
    label[tumor] = 4
    return image, label, writeCase({'t1ce': image[0], 't2': image[1], 'flair': image[2], 'seg': label}, patient)


def listOf(**rows):
    return pd.DataFrame.from_dict(rows, orient='index')


def test_volumeTransform_equalsTorchioInsideTheMask():
    """Inside the brain it is torchio's RescaleIntensity, outside it is -1, with negative intensities too."""
    generator = np.random.default_rng(0)
    image = generator.normal(100, 80, (3, 20, 20, 8)).astype(np.float32)
    image[:, :5] = 0
    plain = tio.RescaleIntensity(
        (-1, 1), (0.5, 99.5), masking_method=transforms.maskFunction, include=['x1', 'x2', 'x3']
    )
    stretched, _ = preprocess.transformCase(image, None, preprocess.volumeTransform())
    expected, _ = preprocess.transformCase(image, None, plain)
    isBrain = (image != 0).transpose(3, 0, 1, 2)
    np.testing.assert_allclose(stretched[isBrain], expected[isBrain], atol=1e-6)
    assert (stretched[~isBrain] == -1).all() and stretched[isBrain].min() == -1 and stretched[isBrain].max() == 1


@pytest.mark.parametrize('value', [0, 7])
@pytest.mark.filterwarnings('error')
def test_volumeTransform_makesBackgroundOfAnEmptyOrConstantImage(value):
    """A modality without contrast becomes -1 everywhere, without a warning."""
    stretched, _ = preprocess.transformCase(np.full((3, 4, 4, 4), value), None, preprocess.volumeTransform())
    assert (stretched == -1).all()


@pytest.mark.parametrize(
    ('length', 'size', 'stride', 'starts'),
    [
        (240, 128, 112, [0, 112]),
        (240, 128, 64, [0, 64, 112]),
        (182, 128, 112, [0, 54]),
        (218, 128, 112, [0, 90]),
        (128, 128, 112, [0]),
        (100, 128, 112, [0]),
        (129, 128, 128, [0, 1]),
        (256, 128, 128, [0, 128]),
    ],
)
def test_windowStarts_handCounted(length, size, stride, starts):
    """0, stride, ..., and the last one flush with the end."""
    assert preprocess.windowStarts(length, size, stride).tolist() == starts


def test_windowStarts_visitEveryPixel():
    """For any length, size and stride, every pixel is in a window and no window leaves the image."""
    for length in range(1, 40):
        for size in range(1, 12):
            for stride in range(1, size + 1):
                starts = preprocess.windowStarts(length, size, stride)
                seen = {start + offset for start in starts for offset in range(size)}
                assert seen >= set(range(length)) and max(seen) == max(length, size) - 1
    for stride in (0, -1, 13):
        with pytest.raises(ValueError, match='covers every pixel'):
            preprocess.windowStarts(40, 12, stride)


def test_makeDataset_keepsEveryTumorVoxelWhereItWas(writeCase, tmp_path):
    """Put back by case, slice, row and column, the patches give the stretched image and all of the label again."""
    image, label, paths = makePatient(writeCase, tumor=(slice(0, 40), slice(3, 44, 9), slice(1, 6, 2)))
    noPatches = preprocess.makeDataset(dataframe=listOf(P1=paths), filename=tmp_path / 'a.h5')
    stretched, classes = preprocess.transformCase(image, label // 4 * 3, preprocess.volumeTransform())
    rebuilt = np.zeros((6, 40, 44), np.uint8)
    with h5py.File(tmp_path / 'a.h5') as file:
        assert noPatches == len(file['image']) == 2 * 2 * 3
        assert file['image'].dtype == np.float16 and file['label'].dtype == np.uint8
        assert file['image'].chunks == (1, 3, 32, 32)
        assert sorted(set(file['slice'][:])) == [1, 3, 5] and set(file['case'][:]) == {0}
        for number in range(noPatches):
            row, column, z = (int(file[name][number]) for name in ('row', 'column', 'slice'))
            where = (slice(row, row + 32), slice(column, column + 32))
            np.testing.assert_allclose(file['image'][number], stretched[(z, slice(None), *where)], atol=1e-3)
            rebuilt[(z, *where)] = file['label'][number]
    np.testing.assert_array_equal(rebuilt, classes)


def test_makeDataset_dropsPatchesWithoutTumor(writeCase, tmp_path):
    """Of four windows on six slices only the one that holds the tumor is written; its settings and patient with it."""
    *_, paths = makePatient(writeCase)
    assert preprocess.makeDataset(dataframe=listOf(P1=paths), filename=tmp_path / 'a.h5') == 1
    with h5py.File(tmp_path / 'a.h5') as file:
        assert (file['row'][0], file['column'][0], file['slice'][0]) == (0, 0, 2)
        assert json.loads(file.attrs['patients']) == ['P1']
        assert json.loads(file.attrs['settings'])['PATCH_STRIDE'] == 24


def test_makeDataset_keepsAShareOfTheBrainBySeed(writeCase, tmp_path):
    """A share of 1 keeps every brain window, half a share about half of them, the same ones again for one seed."""
    *_, paths = makePatient(writeCase, shape=(80, 80, 20))

    def places(share, seed, name):
        config.BACKGROUND_SHARE, config.SEED = share, seed
        preprocess.makeDataset(dataframe=listOf(P1=paths), filename=tmp_path / name)
        with h5py.File(tmp_path / name) as file:
            return [tuple(file[name][:].tolist()) for name in ('slice', 'row', 'column')]

    assert len(places(1, 0, 'a.h5')[0]) == 3 * 3 * 18  # the first and the last slice have no brain
    half = places(0.5, 0, 'b.h5')
    assert 60 < len(half[0]) < 102
    assert places(0.5, 0, 'c.h5') == half and places(0.5, 1, 'd.h5') != half


def test_makeDataset_padsAVolumeSmallerThanAPatch(writeCase, tmp_path):
    """What is added is background: -1 in the image, class 0 in the label, even where tumor fills the volume."""
    *_, paths = makePatient(writeCase, shape=(20, 30, 4), tumor=slice(None))
    assert preprocess.makeDataset(dataframe=listOf(P1=paths), filename=tmp_path / 'a.h5') == 4
    with h5py.File(tmp_path / 'a.h5') as file:
        assert file['label'].shape == (4, 32, 32)
        assert (file['label'][:, :20, :30] == 3).all() and file['label'][:].sum() == 4 * 20 * 30 * 3
        assert (file['image'][:, :, 20:] == -1).all() and (file['image'][:, :, :, 30:] == -1).all()


def test_makeDataset_isDoneOnlyForTheSameSettingsAndPatients(writeCase, tmp_path, capsys):
    """A second call finds the file; another stride, transform or list of patients makes it anew."""
    *_, paths = makePatient(writeCase)
    *_, other = makePatient(writeCase, patient='BraTS20_Training_002')
    file = tmp_path / 'a.h5'

    def isMadeAnew(df, transform=None):
        capsys.readouterr()
        preprocess.makeDataset(dataframe=df, filename=file, transform=transform)
        assert [path.name for path in tmp_path.glob('*.h5*')] == ['a.h5']
        return 'of the same patients and settings' not in capsys.readouterr().out

    assert isMadeAnew(listOf(P1=paths))
    assert not isMadeAnew(listOf(P1=paths))
    assert isMadeAnew(listOf(P1=paths, P2=other))
    config.PATCH_STRIDE = 16
    assert isMadeAnew(listOf(P1=paths, P2=other))
    assert isMadeAnew(listOf(P1=paths, P2=other), lambda subject: subject)
    assert not isMadeAnew(listOf(P1=paths, P2=other), lambda subject: subject)
    assert isMadeAnew(listOf(P1=paths, P2=other), lambda subject: dict(subject))
    file.write_bytes(file.read_bytes()[:1000])
    assert isMadeAnew(listOf(P1=paths), tio.RescaleIntensity((0, 1), include=['x1', 'x2', 'x3']))
    assert isMadeAnew(listOf(P1=paths), tio.RescaleIntensity((0, 0.5), include=['x1', 'x2', 'x3']))
    assert not isMadeAnew(listOf(P1=paths), tio.RescaleIntensity((0, 0.5), include=['x1', 'x2', 'x3']))


def test_makeDataset_storesRawIntensitiesExactly(writeCase, tmp_path):
    """With an identity for a volume transform the patches are the file's intensities, in float32."""
    image, _, paths = makePatient(writeCase)
    preprocess.makeDataset(dataframe=listOf(P1=paths), filename=tmp_path / 'a.h5', transform=lambda subject: subject)
    with h5py.File(tmp_path / 'a.h5') as file:
        assert file['image'].dtype == np.float32
        np.testing.assert_array_equal(file['image'][0], image[:, :32, :32, 2])


def test_makeDataset_leavesNothingBehindABadPatient(writeCase, tmp_path):
    """A patient that cannot be read is named, and no file nor part of one is left."""
    *_, paths = makePatient(writeCase)
    bad = {**paths, 't2': str(tmp_path / 'gone.nii.gz')}
    with pytest.raises(FileNotFoundError, match=r'P2: .*gone\.nii\.gz does not exist'):
        preprocess.makeDataset(dataframe=listOf(P1=paths, P2=bad), filename=tmp_path / 'a.h5')
    assert not list(tmp_path.glob('*.h5*'))
    with pytest.raises(ValueError, match='not one patch with tumor'):
        healthy = writeCase({'seg': np.zeros((40, 44, 6), np.uint8)})
        preprocess.makeDataset(dataframe=listOf(P1=paths | healthy), filename=tmp_path / 'a.h5')


def test_makeTransforms_readsItsNumbersFromConfig():
    """The objects carry the contract's numbers, and another number in config another object."""
    train, validation, test = preprocess.makeTransforms()
    pad, spatial, intensity = train.transforms
    assert tuple(pad.target_shape) == (32, 32, 1)
    weights = {type(one).__name__: weight for one, weight in spatial.transforms_dict.items()}
    expected = {'RandomFlip': 0.35, 'RandomAffine': 0.35, 'RandomAnisotropy': 0.15, 'RandomElasticDeformation': 0.15}
    assert weights == pytest.approx(expected) and spatial.probability == 0.95
    affine = next(one for one in spatial.transforms_dict if isinstance(one, tio.RandomAffine))
    assert affine.degrees == (0, 0, 0, 0, -20, 20) and affine.scales == (0.9, 1.1, 0.9, 1.1, 0.9, 1.1)
    assert [type(one).__name__ for one in intensity.transforms_dict] == ['RandomNoise', 'RandomBiasField']
    assert len(validation.transforms) == 1 and isinstance(test.transforms[0], transforms.StretchHistogram)
    config.AFFINE_DEGREES, config.MODALITIES = 5, ('t1', 'flair')
    affine = next(
        one for one in preprocess.makeTransforms()[0].transforms[1].transforms_dict if isinstance(one, tio.RandomAffine)
    )
    assert affine.degrees == (-5, 5) * 3 and affine.include == ['x1', 'x2', 'y']


def test_trainTransform_keepsShapesAndClasses():
    """Whatever is drawn, a patch keeps its shape and its label has no class that it had not."""
    transform = preprocess.makeTransforms()[0]
    image = torch.rand(3, 32, 32, 1) * 2 - 1
    label = torch.zeros(32, 32, 1, dtype=torch.uint8)
    label[8:20, 8:20] = 3
    for seed in range(40):
        torch.manual_seed(seed)
        changed, classes = preprocess.transformCase(image, label, transform)
        assert changed.shape == (1, 3, 32, 32) and changed.dtype == torch.float32
        assert classes.shape == (1, 32, 32) and classes.dtype == torch.uint8
        assert set(classes.unique().tolist()) <= {0, 3}


def test_describe_isTheSameForEqualTransforms():
    """Two equal functions that live at once are described alike, what they compute with tells them apart."""
    equal = [lambda subject: subject for _ in range(2)]
    assert preprocess.describe(equal[0]) == preprocess.describe(equal[1])
    assert '0x' not in json.dumps(preprocess.describe(preprocess.makeTransforms()[0]))


def test_makeDataset_numbersWindowsOfAnOblongVolume(writeCase, tmp_path):
    """In 3 x 2 windows a tumor in the last row and first column is cut from there, whatever the volume's sides."""
    *_, paths = makePatient(writeCase, shape=(80, 40, 4), tumor=(slice(70, 75), slice(0, 5), 2))
    preprocess.makeDataset(dataframe=listOf(P1=paths), filename=tmp_path / 'a.h5')
    with h5py.File(tmp_path / 'a.h5') as file:
        assert (file['row'][:].tolist(), file['column'][:].tolist()) == ([48], [0])
        assert file['label'][0, 22:27, :5].min() == 3


def test_makeTransforms_carriesEveryNumber():
    """Flip, anisotropy, elastic, noise and bias field are the contract's, and all of them config's."""

    def leaves():
        train, *_ = preprocess.makeTransforms()
        return train, {type(one).__name__: one for group in train.transforms[1:] for one in group.transforms_dict}

    train, one = leaves()
    assert train.transforms[0].padding_mode == 'minimum' and train.transforms[2].probability == 0.95
    assert one['RandomFlip'].axes == (0, 1) and one['RandomFlip'].flip_probability == 0.5
    assert one['RandomAnisotropy'].axes == (0, 1) and one['RandomAnisotropy'].downsampling_range == (1.5, 2.5)
    assert tuple(one['RandomElasticDeformation'].max_displacement) == (2, 2, 0)
    assert one['RandomNoise'].std_range == (0, 0.1) and one['RandomBiasField'].coefficients_range == (-0.1, 0.1)
    config.FLIP_AXES, config.ANISOTROPY_DOWNSAMPLING, config.NOISE_STD, config.BIAS_COEFFICIENTS = (0,), (2, 3), 1, 1
    _, one = leaves()
    assert one['RandomFlip'].axes == (0,) and one['RandomAnisotropy'].downsampling_range == (2, 3)
    assert one['RandomNoise'].std_range == (0, 1) and one['RandomBiasField'].coefficients_range == (-1, 1)


@pytest.mark.parametrize(
    ('name', 'value'),
    [('MODALITIES', ('t2', 't1ce', 'flair')), ('EDITION', 'BraTS2021'), ('SEED', 1), ('BACKGROUND_SHARE', 0.5),
     ('PATCH_SIZE', 40), ('PATCH_STRIDE', 16), ('STRETCH_RANGE', (0, 1)), ('STRETCH_PERCENTILES', (1, 99))],
)  # fmt: skip
def test_makeDataset_isMadeAnewForEverySetting(writeCase, tmp_path, capsys, name, value):
    """A file made with one number changed is not taken for this one."""
    *_, paths = makePatient(writeCase)
    preprocess.makeDataset(dataframe=listOf(P1=paths), filename=tmp_path / 'a.h5')
    setattr(config, name, value)
    preprocess.makeDataset(dataframe=listOf(P1=paths), filename=tmp_path / 'a.h5')
    assert 'is made anew' in capsys.readouterr().out


def test_makeDataset_numbersItsPatientsAndLeavesOutTheUnlabelled(writeCase, tmp_path, capsys):
    """`case` is the place in `patients`; one without a seg has none; each draws its own background."""
    rows = {
        f'P{i}': makePatient(writeCase, patient=f'BraTS20_Training_00{i}', shape=(80, 80, 12))[-1] for i in (1, 2, 3)
    }
    rows['P2'] = {**rows['P2'], 'seg': None}
    config.BACKGROUND_SHARE = 0.5
    preprocess.makeDataset(dataframe=listOf(**rows), filename=tmp_path / 'a.h5')
    with h5py.File(tmp_path / 'a.h5') as file:
        assert set(file['case'][:]) == {0, 1} and file.attrs['patients'] == '["P1", "P3"]'
        places = [[tuple(file[n][file['case'][:] == case]) for n in ('slice', 'row', 'column')] for case in (0, 1)]
    assert places[0] != places[1]
    assert '1 of 3 patients have no segmentation' in capsys.readouterr().out


def test_makeDataset_tellsNegativeIntensitiesFromStretchedOnes(writeCase, tmp_path):
    """Values from -600 to 1 do not fit float16 to the last digit either: float32."""
    *_, paths = makePatient(writeCase)
    lower = lambda subject: {k: (v if k == 'y' else v.float().clamp(max=0) * 10 - 0.123) for k, v in subject.items()}  # noqa: E731
    preprocess.makeDataset(dataframe=listOf(P1=paths), filename=tmp_path / 'a.h5', transform=lower)
    with h5py.File(tmp_path / 'a.h5') as file:
        assert file['image'].dtype == np.float32


def test_describe_tellsFunctionsApartByWhatTheyCompute():
    """Other constants, other held values, other arguments and a cell run again make another description."""
    hold = lambda factor: lambda subject: subject * factor  # noqa: E731
    scope = {}
    exec('def mine(subject):\n    return subject * 2', scope)
    first = scope['mine']
    exec('def mine(subject):\n    return subject * 3', scope)
    pairs = [
        (lambda subject: subject * 2, lambda subject: subject * 3),
        (hold(2), hold(3)),
        (functools.partial(hold, 2), functools.partial(hold, 3)),
        (first, scope['mine']),
    ]
    for one, other in pairs:
        assert preprocess.describe(one) != preprocess.describe(other)
    assert preprocess.describe(hold(2)) == preprocess.describe(hold(2))
    known = lambda subject: subject if b'x' in {b'x', b'y'} else ...  # noqa: E731
    assert json.dumps(preprocess.describe(known))  # whatever a function's code may hold can be written


def test_makeDataset_isMadeAnewForOtherFilesOfTheSameNames(writeCase, tmp_path, capsys):
    """A corrected copy of a patient, under the same name, is not taken for the one that was cut."""
    *_, paths = makePatient(writeCase)
    preprocess.makeDataset(dataframe=listOf(P1=paths), filename=tmp_path / 'a.h5')
    paths |= writeCase({'t2': np.ones((40, 44, 6), np.int16)}, folder='copy')
    preprocess.makeDataset(dataframe=listOf(P1=paths), filename=tmp_path / 'a.h5')
    assert 'is made anew' in capsys.readouterr().out


def test_makeDataset_takesNumpyNumbers(writeCase, tmp_path):
    """A stride or a share computed with NumPy is a number like any other."""
    config.PATCH_STRIDE, config.BACKGROUND_SHARE = np.int64(24), np.float32(0)
    *_, paths = makePatient(writeCase)
    assert preprocess.makeDataset(dataframe=listOf(P1=paths), filename=tmp_path / 'a.h5') == 1


def test_makeDataset_refusesATransformThatChangesTheShape(writeCase, tmp_path):
    """A patch transform given for the whole volume's is told, with the patient."""
    *_, paths = makePatient(writeCase)
    pad = tio.CropOrPad((32, 32, 1), include=['x1', 'x2', 'x3', 'y'], label_keys=['y'])
    with pytest.raises(ValueError, match=r'P1: the transform made \(1, 3, 32, 32\) of \(40, 44, 6\)'):
        preprocess.makeDataset(dataframe=listOf(P1=paths), filename=tmp_path / 'a.h5', transform=pad)


@pytest.mark.parametrize('share', [0, 0.5])
@pytest.mark.parametrize('dtype', ['<i2', '>i2', '<f8', '>f4', 'u1'])
def test_makeDataset_cutsWhatTheVolumeTransformMakes(writeCase, tmp_path, share, dtype):
    """Stretching only what is cut gives, to the bit, what stretching whole volumes and cutting them gives."""
    config.BACKGROUND_SHARE = share
    *_, paths = makePatient(writeCase)
    for name in config.MODALITIES:
        volume = np.abs(nib.load(paths[name]).get_fdata()) % 250 * (1 if dtype[-2] in 'iu' or dtype == 'u1' else 1.1)
        nib.save(nib.Nifti1Image(volume.astype(dtype), np.diag([-1, -1, 1, 1])), paths[name])
    nib.save(nib.Nifti1Image(nib.load(paths['seg']).get_fdata().astype(dtype), np.diag([-1, -1, 1, 1])), paths['seg'])
    df = listOf(P1=paths)
    files = [tmp_path / 'part.h5', tmp_path / 'whole.h5']
    preprocess.makeDataset(dataframe=df, filename=files[0])
    preprocess.makeDataset(dataframe=df, filename=files[1], transform=preprocess.makeTransforms()[2])
    with h5py.File(files[0]) as part, h5py.File(files[1]) as whole:
        for name in whole:
            np.testing.assert_array_equal(part[name][:], whole[name][:])
        assert len(part['image']) >= 1 + bool(share) and part['image'].dtype == np.float16


@pytest.fixture
def badAmongGood(writeCase, tmp_path):
    """A file list of a sound patient, one whose t2 is cut off, and one whose seg has a foreign label."""
    *_, paths = makePatient(writeCase)
    Path(tmp_path / 'cut.nii.gz').write_bytes(Path(paths['t2']).read_bytes()[:-400])
    foreign = writeCase({'seg': np.full((40, 36, 6), 9, np.uint8)}, folder='foreign')['seg']
    rows = {'P1': {**paths, 't2': str(tmp_path / 'cut.nii.gz')}, 'P2': paths, 'P3': {**paths, 'seg': foreign}}
    return listOf(**rows)


def test_makeDataset_namesAllBadPatientsAtOnce(badAmongGood, tmp_path):
    """Two bad patients of three are named in one error, with what is wrong; nothing is left behind."""
    with pytest.raises(ValueError, match=r'(?s)2 of 3 patients.*P1: .*cut\.nii\.gz cannot be used.*P3: .*labels \[9\]'):
        preprocess.makeDataset(dataframe=badAmongGood, filename=tmp_path / 'a.h5')
    assert not list(tmp_path.glob('*.h5*'))


def test_makeDataset_leavesOutBadPatientsWhenTold(badAmongGood, tmp_path, capsys):
    """The file is that of the sound patient alone, but says who is missing and why; 'stop' does not take it for its."""
    config.ON_BAD_PATIENT = 'leaveOut'
    preprocess.makeDataset(dataframe=badAmongGood[1:2], filename=tmp_path / 'alone.h5')
    for printed in ('Left out: P1: ', 'P1 is left out: '):  # made, then found
        capsys.readouterr()
        noPatches = preprocess.makeDataset(dataframe=badAmongGood, filename=tmp_path / 'a.h5')
        assert printed in capsys.readouterr().out
    with h5py.File(tmp_path / 'a.h5') as file, h5py.File(tmp_path / 'alone.h5') as alone:
        assert json.loads(file.attrs['patients']) == ['P2'] and len(file['image']) == noPatches > 0
        assert [*json.loads(file.attrs['leftOut'])] == ['P1', 'P3']
        for name in alone:
            np.testing.assert_array_equal(file[name][:], alone[name][:])
    config.ON_BAD_PATIENT = 'stop'
    with pytest.raises(ValueError, match='2 of 3 patients'):
        preprocess.makeDataset(dataframe=badAmongGood, filename=tmp_path / 'a.h5')
    config.ON_BAD_PATIENT = 'go on'
    with pytest.raises(ValueError, match="'go on'; 'stop' or 'leaveOut' was expected"):
        preprocess.makeDataset(dataframe=badAmongGood, filename=tmp_path / 'a.h5')


def test_makeDataset_leavesOutWhoHasNoFile(writeCase, tmp_path):
    """A modality that is missing is a reason like any other; where nobody is left it is an error."""
    *_, paths = makePatient(writeCase)
    config.ON_BAD_PATIENT = 'leaveOut'
    gone = {**paths, 't2': None}
    preprocess.makeDataset(dataframe=listOf(P1=gone, P2=paths), filename=tmp_path / 'a.h5')
    with h5py.File(tmp_path / 'a.h5') as file:
        assert 'no file for the modality t2' in json.loads(file.attrs['leftOut'])['P1']
    with pytest.raises(ValueError, match='None of the 1 patients can be used: P1: no file for the modality t2'):
        preprocess.makeDataset(dataframe=listOf(P1=gone), filename=tmp_path / 'b.h5')


@pytest.mark.parametrize('name', ['image', 'label', 'case'])
def test_makeDataset_makesADamagedFileAnew(writeCase, tmp_path, capsys, name):
    """One byte turned over in the last chunk of a data set is told, and the file made anew, equal to the sound one."""
    *_, paths = makePatient(writeCase)
    file = tmp_path / 'a.h5'
    preprocess.makeDataset(dataframe=listOf(P1=paths), filename=file)
    sound = file.read_bytes()
    with h5py.File(file) as patches:
        chunk = patches[name].id.get_chunk_info(patches[name].id.get_num_chunks() - 1)
    spoiled = bytearray(sound)
    spoiled[chunk.byte_offset + chunk.size // 2] ^= 16
    file.write_bytes(spoiled)
    preprocess.makeDataset(dataframe=listOf(P1=paths), filename=file)
    assert 'is damaged' in capsys.readouterr().out
    with h5py.File(file) as patches, h5py.File(io.BytesIO(sound)) as before:
        np.testing.assert_array_equal(patches[name][:], before[name][:])


def test_makeDataset_drawsNothing(writeCase, tmp_path):
    """A run that makes the file and one that finds it go on with the same random numbers, whatever the transform."""
    *_, paths = makePatient(writeCase)
    before = torch.get_rng_state()
    preprocess.makeDataset(listOf(P1=paths), tmp_path / 'a.h5', transform=preprocess.makeTransforms()[2])
    assert torch.equal(torch.get_rng_state(), before)
