import errno

import pytest

from files import writeWhole


def test_writeWhole_keepsTheOldFileWhenWritingFails(tmp_path):
    """A failure in the middle leaves the file of before, and no part."""
    file = tmp_path / 'deep' / 'a.txt'
    with writeWhole(file) as part:
        part.write_text('old')
    with pytest.raises(RuntimeError), writeWhole(file) as part:
        part.write_text('ne')
        raise RuntimeError
    assert file.read_text() == 'old' and list(file.parent.iterdir()) == [file]


def test_writeWhole_overwritesWhatAKillLeft(tmp_path):
    """The part has one fixed name, so the next run writes over it."""
    (tmp_path / 'a.txt.part').write_text('half of something that was longer')
    with writeWhole(tmp_path / 'a.txt') as part:
        part.write_text('new')
    assert [path.name for path in tmp_path.iterdir()] == ['a.txt']
    assert (tmp_path / 'a.txt').read_text() == 'new'


def test_writeWhole_namesTheFileWhenTheDiskIsFull(tmp_path):
    """An error of the disk names the file that was asked for, and what the disk said."""
    message = r'a\.txt could not be written: No space left'
    with pytest.raises(OSError, match=message) as caught, writeWhole(tmp_path / 'a.txt') as part:
        part.write_text('x')
        raise OSError(errno.ENOSPC, 'No space left on device')
    assert caught.value.errno == errno.ENOSPC


def test_writeWhole_namesTheFileUnderWhatIsNoFolder(tmp_path):
    """Where a file stands in the place of the folder, the error names the file that was asked for."""
    (tmp_path / 'output').write_text('a file')
    with pytest.raises(OSError, match=r'output/a\.txt could not be written'), writeWhole(tmp_path / 'output' / 'a.txt'):
        pass
