import os
import pickle

import h5py
import numpy as np
import psutil
import pytest
import torch

import config
import dataset
import preprocess
import utils
from conftest import writePatchFile


def writePatches(file, numPatches=12, value=None):
    """Write a patch file as makeDataset does; patch k has the value k / 100, or the given one, and class k % 4."""
    image = np.ones((numPatches, 3, 32, 32)) * np.arange(numPatches)[:, None, None, None] / 100
    image = image if value is None else np.full_like(image, value)
    label = np.zeros((numPatches, 32, 32), np.uint8)
    label[:, 4:20, 6:25] = np.arange(numPatches)[:, None, None] % 4
    return writePatchFile(file, image.astype(np.float16), label)


def makeLoader(dataset, **options):
    return torch.utils.data.DataLoader(dataset, batch_size=4, **options)


def test_BRATSDataset_returnsWhatIsStored(tmp_path):
    """Without a transform: the stored patches in order, as float32 (3, 32, 32) and int64 (32, 32)."""
    dataset = utils.BRATSDataset(writePatches(tmp_path / 'a.h5'), 10, None)
    assert len(dataset) == 10 and len(utils.BRATSDataset(tmp_path / 'a.h5')) == 12
    for index in (7, -3):
        image, label = dataset[index]
        assert image.shape == (3, 32, 32) and image.dtype == torch.float32
        assert label.shape == (32, 32) and label.dtype == torch.int64
        np.testing.assert_allclose(image, 0.07, atol=1e-4)
        assert label[10, 10] == 3 and label[0, 0] == 0
    with pytest.raises(IndexError, match='Patch 10 of 10'):
        dataset[10]


@pytest.mark.parametrize('cache', [0, 1])
@pytest.mark.parametrize('workers', [0, 2])
def test_BRATSDataset_loadsRawBatches(tmp_path, workers, cache):
    """A raw batch has the stored dtypes and the requested order, with repeats, from memory as from the file."""
    config.CACHE_PATCHES = cache
    dataset = utils.BRATSDataset(writePatches(tmp_path / 'a.h5'), 11, raw=True)
    order = [7, 3, 3, 10, 0, 5, 9, 1]
    images, labels = (
        torch.cat(parts) for parts in zip(*makeLoader(dataset, sampler=order, num_workers=workers), strict=True)
    )
    assert images.dtype == torch.float16 and labels.dtype == torch.uint8
    np.testing.assert_allclose(images[:, 2, 5, 5], np.array(order) / 100, atol=1e-4)
    assert labels[:, 10, 10].tolist() == [number % 4 for number in order]


def test_BRATSDataset_loadsFloat32UnlessRaw(tmp_path):
    """Without raw, batches are float32 and int64, with and without a transform; raw excludes a transform."""
    file = writePatches(tmp_path / 'a.h5')
    for transform in (None, preprocess.makeTransforms()[1]):
        image, label = next(iter(makeLoader(utils.BRATSDataset(file, 12, transform))))
        assert image.dtype == torch.float32 and label.dtype == torch.int64
    with pytest.raises(ValueError, match='cannot be combined with a transform'):
        utils.BRATSDataset(file, 12, preprocess.makeTransforms()[1], raw=True)


@pytest.mark.parametrize('value', [None, -1, 0])
def test_BRATSDataset_keepsShapesUnderEveryTransform(tmp_path, value):
    """Each transform, with probability 1, keeps shape and dtype, also on a patch of background only."""
    file = writePatches(tmp_path / 'a.h5', value=value)
    train, validation, test = preprocess.makeTransforms()
    leaves = [*train.transforms[1].transforms_dict, *train.transforms[2].transforms_dict, validation, test, train]
    for transform in leaves:
        transform.probability = 1
        image, label = utils.BRATSDataset(file, 12, transform)[3]
        assert image.shape == (3, 32, 32) and image.dtype == torch.float32 and image.isfinite().all()
        assert label.shape == (32, 32) and label.dtype == torch.int64 and set(label.unique().tolist()) <= {0, 3}


@pytest.mark.parametrize(('workers', 'context'), [(0, None), (2, 'fork'), (2, 'forkserver'), (2, 'spawn')])
def test_BRATSDataset_loadsTheSameInAnyProcess(tmp_path, workers, context):
    """Workers load the same patches however they are started; the file can be closed before and after."""
    config.CACHE_PATCHES = 0
    dataset = utils.BRATSDataset(writePatches(tmp_path / 'a.h5'), 12, preprocess.makeTransforms()[1])
    dataset.file.close()
    loader = makeLoader(dataset, num_workers=workers, multiprocessing_context=context)
    images = torch.cat([image for image, _ in loader])
    np.testing.assert_allclose(images[:, 0, 0, 0], np.arange(12) / 100, atol=1e-4)
    dataset.file.close()
    assert not dataset.file


def test_BRATSDataset_opensItsOwnHandleInAnotherProcess(tmp_path):
    """In another process, as after a fork, a dataset does not read through the handle it came with."""
    config.CACHE_PATCHES = 0
    dataset = utils.BRATSDataset(writePatches(tmp_path / 'a.h5'), 12, None)
    handle, dataset._process = dataset.file, -1
    assert dataset[5][0][0, 0, 0] == pytest.approx(0.05, abs=1e-4)
    assert dataset.file is not handle and dataset._process == os.getpid()


def test_BRATSDataset_canBePickledWithAnOpenFile(tmp_path):
    """A pickled copy reads the same, and the original's file stays open."""
    dataset = utils.BRATSDataset(writePatches(tmp_path / 'a.h5'), 12, None)
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[3][0], dataset[3][0]) and dataset.file


def test_BRATSDataset_readsCachedPatchesOnce(tmp_path, monkeypatch):
    """Images and labels that fit into CACHE_PATCHES of the memory are read once; with one byte less they are not."""
    file, size = writePatches(tmp_path / 'a.h5'), 12 * 32 * 32 * (3 * 2 + 1)  # bytes
    monkeypatch.setattr('dataset._memory', lambda: 1e6)
    for config.CACHE_PATCHES, isCached in ((size / 1e6, True), ((size - 1) / 1e6, False)):
        dataset = utils.BRATSDataset(file, 12, None)
        dataset.file.close()
        assert dataset[3][0].shape == (3, 32, 32) and bool(dataset.file) is not isCached


def test_BRATSDataset_refusesAFileThatDoesNotFit(tmp_path):
    """A missing file, more patches than it has, and a file of another version are refused."""
    with pytest.raises(FileNotFoundError, match=r'none\.h5 does not exist; preprocess\.makeDataset writes it'):
        utils.BRATSDataset(tmp_path / 'none.h5', 1, None)
    file = writePatches(tmp_path / 'a.h5')
    for number in (13, 0):
        with pytest.raises(ValueError, match=f'has 12 patches, {number} were requested'):
            utils.BRATSDataset(file, number, None)
    with h5py.File(tmp_path / 'old.h5', 'w') as old:
        old['image'], old['label'] = np.zeros((2, 3, 32, 32), np.float16), np.zeros((2, 32, 32), np.uint8)
    with pytest.raises(ValueError, match=r'old\.h5 is of another version .*; preprocess\.makeDataset cuts it anew'):
        utils.BRATSDataset(tmp_path / 'old.h5')


@pytest.mark.parametrize(
    ('name', 'value', 'words'),
    [
        ('MODALITIES', ('t1ce', 't2'), r"MODALITIES is \['t1ce', 't2', 'flair'\], not \['t1ce', 't2'\]"),
        ('MODALITIES', ('flair', 't2', 't1ce'), r"MODALITIES is .*, not \['flair', 't2', 't1ce'\]"),
        ('CLASS_NAMES', ('background', 'edema', 'necrotic core', 'enhancing tumor'), 'CLASS_NAMES is'),
        ('PATCH_SIZE', 64, r'config\.PATCH_SIZE is 32, not 64'),
        ('STRETCH_RANGE', (0, 1), r'-1, 1\]\], not .*0\.0, 1\.0\]\]'),
        ('STRETCH_PERCENTILES', (5, 95), r'0\.5, 99\.5\], .* not \[\[5\.0, 95\.0\]'),
    ],
)
def test_BRATSDataset_refusesAFileOfOtherSettings(tmp_path, name, value, words):
    """A file cut with other modalities or the same in another order, other classes, size, stretching or edition."""
    file = writePatches(tmp_path / 'a.h5')
    setattr(config, name, value)
    with pytest.raises(ValueError, match=rf'a\.h5 was cut with other settings: .*{words}.*Cut it again'):
        utils.BRATSDataset(file, 12, None)


def test_BRATSDataset_refusesAnotherEditionOfTheSameNames(tmp_path):
    """Patients cut by the labels of 2023 are refused where 2024 is declared; an edition of other names is no matter."""
    image, label = np.zeros((2, 3, 32, 32), np.float16), np.zeros((2, 32, 32), np.uint8)
    for patient, edition, isRefused in (('BraTS-GLI-00001-000', 'BraTS2023', True), ('P1', 'BraTS2020', False)):
        config.EDITION = None
        file = writePatchFile(tmp_path / f'{patient}.h5', image, label, [patient], editions={edition: []})
        config.EDITION = 'BraTS2024'
        if isRefused:
            with pytest.raises(ValueError, match=r"are of BraTS2023, not config\.EDITION = 'BraTS2024'"):
                utils.BRATSDataset(file)
        else:
            assert len(utils.BRATSDataset(file)) == 2


def test_BRATSDataset_refusesAFileThatWasCutAnew(tmp_path):
    """If the file is replaced under an open dataset, the next handle on it is refused; the old one still reads."""
    config.CACHE_PATCHES = 0
    dataset = utils.BRATSDataset(writePatches(tmp_path / 'a.h5'))
    (tmp_path / 'a.h5').rename(tmp_path / 'old.h5')
    writePatchFile(tmp_path / 'a.h5', np.zeros((12, 3, 32, 32)), np.zeros((12, 32, 32), np.uint8), ['P7'])
    assert dataset[3][0][0, 0, 0] == pytest.approx(0.03, abs=1e-4)
    dataset.file.close()
    with pytest.raises(ValueError, match=r'a\.h5 was cut anew since this dataset was made'):
        dataset[3]


def test_BRATSDataset_copiesAFileOfAMountedDrive(tmp_path, monkeypatch):
    """A file on Drive that does not fit into memory is read from a copy on the local disk."""
    config.CACHE_PATCHES = 0
    file = writePatches(tmp_path / 'a.h5')
    monkeypatch.setattr('dataset._DRIVE', str(tmp_path))
    dataset = utils.BRATSDataset(file, 12)
    assert dataset.path != file and dataset[3][0][0, 0, 0] == pytest.approx(0.03, abs=1e-4)


def test_memory_isThatOfTheMachine():
    """Outside a container with a limit, the memory is what the system reports; never more."""
    assert 0 < dataset._memory() <= psutil.virtual_memory().total
