"""Read files that were damaged at random, as by a disk, a copy or a program."""

import gzip
import os
import random
import resource
import struct
from pathlib import Path

import numpy as np
import pytest

import patients
import utils
from patients import cohort

NUM_FUZZED = int(os.environ.get('NUM_FUZZED', 15))  # files of each kind; set more for a long run
SHAPE = (40, 36, 30)  # larger than what is read for the header


def cut(packed, generator):
    """Return the file up to a random place."""
    return packed[: generator.randrange(len(packed))]


def flip(packed, generator):
    """Return the file with one to three bits inverted, anywhere."""
    damaged = bytearray(packed)
    for _ in range(generator.randint(1, 3)):
        damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
    return bytes(damaged)


def swap(packed, generator):
    """Return the file with 1 to 64 bytes replaced by noise."""
    start = generator.randrange(len(packed))
    noise = generator.randbytes(generator.randint(1, 64))
    return packed[:start] + noise + packed[start + len(noise) :]


def header(packed, generator):
    """Return the file with bits inverted in the header and a correct checksum."""
    content = bytearray(gzip.decompress(packed))
    for _ in range(generator.randint(1, 4)):
        content[generator.randrange(352)] ^= 1 << generator.randrange(8)
    return gzip.compress(bytes(content))


def dimensions(packed, generator):
    """Return the file with other dimensions in the header, up to terabytes."""
    content = bytearray(gzip.decompress(packed))
    sizes = [generator.choice([-1, 0, 1, 9, 240, 32767]) for _ in range(8)]
    content[40:56] = struct.pack('<8h', *sizes)
    return gzip.compress(bytes(content))


@pytest.fixture
def goodPatient(writeCase):
    """Return the row of a patient with random voxels, and what is read of it."""
    generator = np.random.default_rng(0)
    volumes = {name: generator.integers(-50, 900, SHAPE).astype(np.int16) for name in ('t1ce', 't2', 'flair')}
    paths = writeCase({**volumes, 'seg': generator.choice([0, 1, 2, 4], SHAPE).astype(np.int16)})
    return paths, patients.readCase(paths)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('damage', [cut, flip, swap, header, dimensions])
def test_readCase_readsWhatWasWrittenOrRefusesIt(goodPatient, damage, caplog):
    """A damaged file is read as it was, or refused with patient and file; what is refused has a finding, too."""
    caplog.set_level('CRITICAL')  # nibabel logs each unusual header
    paths, (image, label) = goodPatient
    df = utils.makeFileList(Path(paths['t2']).parents[1])
    generator, numRefused = random.Random(0), 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(NUM_FUZZED):
        name = ('t1ce', 't2', 'flair', 'seg')[number % 4]
        packed = Path(paths[name]).read_bytes()
        Path(paths[name]).write_bytes(damage(packed, generator))
        try:
            found, foundLabel = patients.readCase(paths)
        except ValueError as error:
            numRefused += 1
            assert 'BraTS20_Training_001' in str(error)
            # other files are compared with t1ce's grid
            assert f'_{name}.nii.gz' in str(error) or (name == 't1ce' and damage is header)
            assert len(cohort.checkFiles(df)) > 0
        else:
            assert found.shape == (3, *SHAPE) and np.isfinite(found).all() and foundLabel.max() <= 3
            if damage is not header:  # a header with another sign, dtype or axis order can be valid, too
                np.testing.assert_array_equal(found, image)
                np.testing.assert_array_equal(foundLabel, label)
        Path(paths[name]).write_bytes(packed)
    assert numRefused >= (NUM_FUZZED // 10 if damage is header else NUM_FUZZED * 0.7)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB; refused before it is allocated


def test_readCase_saysIfAFileMayNotBeRead(goodPatient):
    """A missing permission is reported as such, with patient and file."""
    paths, _ = goodPatient
    for folder in Path(paths['t2']).parents[:6]:
        if folder.owner() == Path(paths['t2']).owner():
            folder.chmod(0o755)
    Path(paths['t2']).chmod(0)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # root may read everything
        words = r'BraTS20_Training_001: .*_t2\.nii\.gz cannot be used: .*Permission denied'
        with pytest.raises(ValueError, match=words):
            patients.readCase(paths)
    finally:
        os.seteuid(user)


def test_makeFileList_survivesLoopsOfLinks(goodPatient):
    """A folder that links to one above it is entered once; a file that links to itself is named when it is read."""
    paths, (image, _) = goodPatient
    home = Path(paths['t2']).parent
    (home / 'up').symlink_to(home.parent)
    df = utils.makeFileList(home.parent)
    assert list(df.index) == ['BraTS20_Training_001']
    np.testing.assert_array_equal(patients.readCase(df.iloc[0])[0], image)
    Path(paths['t2']).unlink()
    Path(paths['t2']).symlink_to(paths['t2'])
    df = utils.makeFileList(home.parent)
    with pytest.raises(FileNotFoundError, match=r'BraTS20_Training_001: .*_t2\.nii\.gz does not exist'):
        patients.readCase(df.iloc[0])
    assert '_t2.nii.gz' in cohort.checkFiles(df).file.iloc[0]


def test_makeFileList_findsFoldersOfAnyAlphabet(goodPatient, tmp_path):
    """Folders with spaces and letters of other alphabets are found, read and checked."""
    paths, (image, label) = goodPatient
    home = tmp_path / 'Мои данные (копия)' / '脳腫瘍 2020'
    home.parent.mkdir()
    Path(paths['t2']).parents[1].rename(home)
    df = utils.makeFileList(home.parent)
    found, foundLabel = patients.readCase(df.iloc[0])
    np.testing.assert_array_equal(found, image)
    np.testing.assert_array_equal(foundLabel, label)
    assert cohort.checkFiles(df).empty
