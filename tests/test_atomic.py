import errno
import resource

import numpy as np
import pandas as pd
import pytest
import torch

import config
import preprocess
import utils
from atomic import writeAtomically


def writersOf(folder, paths, number):
    """Return a dict of file name -> function that writes it; another number makes another content."""
    classes = np.full((12, 40, 36), number)
    classes[:6] = np.random.default_rng(number).integers(0, 4, (6, 40, 36))
    model = torch.nn.Linear(200, 200)
    run = model, torch.optim.SGD(model.parameters(), lr=1), None, torch.amp.GradScaler('cpu', enabled=False)
    df = pd.DataFrame.from_dict({'P1': paths}, orient='index')
    return {
        'a.h5': lambda: preprocess.makeDataset(df, folder / 'a.h5'),
        'last.pt': lambda: utils.makeCheckpoint(number, *run, 1, 1, 0),
        'best.pt': lambda: utils.makeCheckpoint(number, *run, 1, 1, 2),
        'a.nii.gz': lambda: utils.saveSegmentation(classes, paths, folder / 'a.nii.gz'),
        'a_axial.gif': lambda: utils.makeGifs(classes[:, None] / 3, classes, classes, folder, name='a'),
    }


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('name', ['a.h5', 'last.pt', 'best.pt', 'a.nii.gz', 'a_axial.gif'])
def test_writeAtomically_keepsEachKindOfFileIfTheDiskIsFull(writeCase, tmp_path, name):
    """If a file may not grow any more, the error names it and says why; the last good one stays, and nothing else."""
    generator = np.random.default_rng(0)
    volumes = {name: generator.integers(1, 900, (40, 36, 12)).astype(np.int16) for name in ('t1ce', 't2', 'flair')}
    paths = writeCase({**volumes, 'seg': np.ones((40, 36, 12), np.uint8)})
    folder = tmp_path / 'out'
    config.OUTPUT_FOLDER = str(folder)
    writersOf(folder, paths, 0)[name]()
    config.PATCH_STRIDE = 20  # so that the patches are cut anew
    before, limits = (folder / name).read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=rf'out/{name} could not be written: File too large'):
            writersOf(folder, paths, 1)[name]()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (folder / name).read_bytes() == before and not list(folder.glob('*.part'))


def test_writeAtomically_keepsTheOldFileUntilTheNewOneIsComplete(tmp_path):
    """The name stands for the earlier file until the block ends, and for good if it raises; no temporary file stays."""
    file = tmp_path / 'deep' / 'a.txt'
    with writeAtomically(str(file)) as temporary:  # missing folders are created
        temporary.write_text('old')
    with pytest.raises(RuntimeError, match='stop'), writeAtomically(file) as temporary:
        temporary.write_text('ne')
        raise RuntimeError('stop')
    assert file.read_text() == 'old' and list(file.parent.iterdir()) == [file]
    (tmp_path / 'deep' / 'a.txt.part').write_text('half of something that a killed run wrote')
    with writeAtomically(file) as temporary:
        temporary.write_text('new')
        assert file.read_text() == 'old'
    assert file.read_text() == 'new' and list(file.parent.iterdir()) == [file]


def test_writeAtomically_namesTheFileThatCannotBeWritten(tmp_path):
    """An error of the system names the final file and what was reported, with its number: a full disk, no folder."""
    with (
        pytest.raises(OSError, match=r'a\.txt could not be written: No space left') as caught,
        writeAtomically(tmp_path / 'a.txt') as temporary,
    ):
        temporary.write_text('x')
        raise OSError(errno.ENOSPC, 'No space left on device')
    assert caught.value.errno == errno.ENOSPC
    (tmp_path / 'output').write_text('a file')
    message = r'output/a\.txt could not be written'
    with pytest.raises(OSError, match=message), writeAtomically(tmp_path / 'output' / 'a.txt'):
        pass


def test_writeAtomically_refusesAFileThatAnotherProcessWrites(tmp_path):
    """While one writer is at work, a second one is refused in words, and the first one's file is whole."""
    with writeAtomically(tmp_path / 'a.txt') as temporary:
        temporary.write_text('first')
        with pytest.raises(BlockingIOError, match='Another process is writing'), writeAtomically(tmp_path / 'a.txt'):
            raise AssertionError
    assert (tmp_path / 'a.txt').read_text() == 'first'
