"""Files that a disk, a copy or a program has spoiled, in every way that chance finds."""

import gzip
import os
import random
import resource
import struct
from pathlib import Path

import numpy as np
import pytest

import checks
import patients
import utils

NO_FUZZED = int(os.environ.get('NO_FUZZED', 15))  # files of each kind; a long campaign sets more
SHAPE = (14, 12, 10)


def cut(packed, generator):
    """Ends somewhere."""
    return packed[: generator.randrange(len(packed))]


def flip(packed, generator):
    """Has one to three bits turned over, anywhere."""
    spoiled = bytearray(packed)
    for _ in range(generator.randint(1, 3)):
        spoiled[generator.randrange(len(spoiled))] ^= 1 << generator.randrange(8)
    return bytes(spoiled)


def swap(packed, generator):
    """Has a stretch replaced by noise."""
    start = generator.randrange(len(packed))
    noise = generator.randbytes(generator.randint(1, 64))
    return packed[:start] + noise + packed[start + len(noise) :]


def header(packed, generator):
    """Has bits turned over in the header, under a checksum that fits."""
    content = bytearray(gzip.decompress(packed))
    for _ in range(generator.randint(1, 4)):
        content[generator.randrange(352)] ^= 1 << generator.randrange(8)
    return gzip.compress(bytes(content))


def dimensions(packed, generator):
    """Promises other dimensions, up to terabytes."""
    content = bytearray(gzip.decompress(packed))
    sizes = [generator.choice([-1, 0, 1, 9, 240, 32767]) for _ in range(8)]
    content[40:56] = struct.pack('<8h', *sizes)
    return gzip.compress(bytes(content))


def values(packed, generator):
    """Holds float32 in the place of int16, some of them no numbers, infinite or huge."""
    content = bytearray(gzip.decompress(packed))
    voxels = np.frombuffer(content[352:], np.int16).astype(np.float32)
    voxels[generator.randrange(voxels.size)] = generator.choice([np.nan, np.inf, -np.inf, 1e30, -2e6])
    content[70:74] = struct.pack('<hh', 16, 32)
    return gzip.compress(bytes(content[:352]) + voxels.tobytes())


@pytest.fixture
def sound(writeCase):
    """The row of a patient of small volumes in which every voxel tells, and what is read of it."""
    generator = np.random.default_rng(0)
    volumes = {name: generator.integers(-50, 900, SHAPE).astype(np.int16) for name in ('t1ce', 't2', 'flair')}
    paths = writeCase({**volumes, 'seg': generator.choice([0, 1, 2, 4], SHAPE).astype(np.int16)})
    return paths, patients.readCase(paths)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('spoil', [cut, flip, swap, header, dimensions, values])
def test_readCase_ofSpoiledFilesIsRightOrSaysWhatIsWrong(sound, spoil, caplog):
    """What comes back is what was written, or an error that names patient and file; and checkFiles finds the same."""
    caplog.set_level('CRITICAL')  # nibabel tells its log of each header that it doubts
    paths, (image, label) = sound
    df = utils.makeFileList(Path(paths['t2']).parents[1])
    generator, noRefused = random.Random(0), 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(NO_FUZZED):
        name = ('t1ce', 't2', 'flair', 'seg')[number % 4]
        packed = Path(paths[name]).read_bytes()
        Path(paths[name]).write_bytes(spoil(packed, generator))
        try:
            found, foundLabel = patients.readCase(paths)
        except ValueError as error:
            noRefused += 1
            assert 'BraTS20_Training_001' in str(error)
            assert f'_{name}.nii.gz' in str(error) or (name == 't1ce' and spoil is header)  # the others' measure
            assert len(checks.checkFiles(df)) > 0
        else:
            assert found.shape == (3, *SHAPE) and np.isfinite(found).all() and foundLabel.max() <= 3
            if spoil is not header:  # there a sign, a type or a turned axis may be another's truth
                np.testing.assert_array_equal(found, image)
                np.testing.assert_array_equal(foundLabel, label)
        Path(paths[name]).write_bytes(packed)
    assert noRefused >= (NO_FUZZED // 10 if spoil is header else NO_FUZZED * 0.7)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB; refused before it is asked for


def test_readCase_ofAFileThatMayNotBeRead(sound):
    """No permission is told as such, with patient and file."""
    paths, _ = sound
    for folder in Path(paths['t2']).parents[:6]:
        if folder.owner() == Path(paths['t2']).owner():
            folder.chmod(0o755)
    Path(paths['t2']).chmod(0)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # root may read everything
        with pytest.raises(
            ValueError, match=r'BraTS20_Training_001: .*_t2\.nii\.gz cannot be used: .*Permission denied'
        ):
            patients.readCase(paths)
    finally:
        os.seteuid(user)


def test_makeFileList_passesLoopsOfLinks(sound, tmp_path):
    """A folder that links to one above it is walked once; a file that links to itself is told when it is read."""
    paths, (image, _) = sound
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
    assert '_t2.nii.gz' in checks.checkFiles(df).file.iloc[0]


def test_makeFileList_readsAnyAlphabet(sound, tmp_path):
    """Folders with spaces and letters of other alphabets."""
    paths, (image, label) = sound
    home = tmp_path / 'Мои данные (копия)' / '脳腫瘍 2020'
    home.parent.mkdir()
    Path(paths['t2']).parents[1].rename(home)
    df = utils.makeFileList(home.parent)
    found, foundLabel = patients.readCase(df.iloc[0])
    np.testing.assert_array_equal(found, image)
    np.testing.assert_array_equal(foundLabel, label)
    assert checks.checkFiles(df).empty
