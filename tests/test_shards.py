"""The shards of a patch file, cut by several processes, are read as the one file."""

import pytest
import torch

import config
import phantom
import preprocess
import provenance
import utils


@pytest.fixture
def df(tmp_path):
    """The file list of five phantoms."""
    phantom.makeCases(tmp_path / 'data', 5, shape=(40, 40, 16))
    config.BACKGROUND_SHARE = 0.2
    return utils.makeFileList(tmp_path / 'data')


def cutShards(df, file, numShards):
    """Cut all shards of a patch file, the last one first; return their paths and numbers of patches."""
    shards = [(number, numShards) for number in reversed(range(numShards))]
    return [preprocess.partFile(file, part) for part in shards], [
        preprocess.makeDataset(df, file, part=part) for part in shards
    ]


@pytest.mark.parametrize('cache', [0, 1])
@pytest.mark.parametrize('numShards', [1, 2, 3, 5])
def test_shards_areReadAsTheOneFile(df, tmp_path, numShards, cache):
    """Patches, their order, patients and identity are those of the file cut at once, read from memory or the files."""
    config.CACHE_PATCHES = cache
    numPatches = preprocess.makeDataset(df, tmp_path / 'whole.h5')
    paths, counts = cutShards(df, tmp_path / 'train.h5', numShards)
    assert sum(counts) == numPatches
    whole, shards = utils.BRATSDataset(tmp_path / 'whole.h5'), utils.BRATSDataset(paths, raw=True)
    assert len(shards) == numPatches and shards.patientNumbers.tolist() == whole.patientNumbers.tolist()
    assert provenance.differences(shards.provenance, whole.provenance) == []
    assert list(shards.provenance['patients']) == list(whole.provenance['patients'])
    for number in (0, 1, numPatches // 2, numPatches - 1):
        for one, other in zip(shards[number], whole[number], strict=True):
            assert torch.equal(one, other)
    few = [utils.BRATSDataset(each, 7) for each in (paths, tmp_path / 'whole.h5')]
    assert provenance.differences(*map(provenance.ofDataset, few)) == []
    shards.file.close()
    assert torch.equal(shards[3][1].long(), whole[3][1])  # opened again


def test_shards_ofLoaderWorkers(df, tmp_path):
    """A worker process opens the files of its own; the batches are those of the whole."""
    config.CACHE_PATCHES = 0
    preprocess.makeDataset(df, tmp_path / 'whole.h5')
    paths, _ = cutShards(df, tmp_path / 'train.h5', 2)
    loaders = [torch.utils.data.DataLoader(utils.BRATSDataset(each), 8, num_workers=1) for each in (
        paths, tmp_path / 'whole.h5')]  # fmt: skip
    for one, other in zip(*loaders, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_shards_foundAgainAreNotCutAgain(df, tmp_path, capsys):
    """A second call finds the shard; with the patients in another order it is cut anew."""
    preprocess.makeDataset(df, tmp_path / 'train.h5', part=(1, 2))
    preprocess.makeDataset(df, tmp_path / 'train.h5', part=(1, 2))
    assert 'train.1of2.h5 exists, with' in capsys.readouterr().out
    preprocess.makeDataset(df.iloc[[2, 1, 0, 3, 4]], tmp_path / 'train.h5', part=(1, 2))
    assert 'exists, with' in capsys.readouterr().out  # its own patients stand where they stood
    preprocess.makeDataset(df.iloc[[1, 0, 2, 4, 3]], tmp_path / 'train.h5', part=(1, 2))
    assert 'is replaced: 2 only there' in capsys.readouterr().out


def test_shards_refusesGapsAndStrangers(df, tmp_path):
    """A missing shard, one twice, a shard of another list, and other settings are named."""
    paths, _ = cutShards(df, tmp_path / 'train.h5', 3)
    for given in (paths[:2], [paths[0], paths[0], paths[1]]):
        with pytest.raises(
            ValueError, match=r'The files are the shards .*all shards \[i, n\] of one file were expected'
        ):
            utils.BRATSDataset(given)
    preprocess.makeDataset(df[1:], tmp_path / 'train.h5', part=(0, 3))
    with pytest.raises(ValueError, match='The shards have patients in common'):
        utils.BRATSDataset(paths)
    config.BACKGROUND_SHARE = 0.1
    preprocess.makeDataset(df, tmp_path / 'train.h5', part=(0, 3))
    with pytest.raises(ValueError, match=r'The shards were cut with other settings: .*BACKGROUND_SHARE'):
        utils.BRATSDataset(paths)
    with pytest.raises(FileNotFoundError, match=r'train\.9of9\.h5 does not exist'):
        utils.BRATSDataset([*paths, preprocess.partFile(tmp_path / 'train.h5', (9, 9))])
    with pytest.raises(ValueError, match=r'part is \(3, 3\); \(i, n\) with 0 <= i < n <= 5 patients was expected'):
        preprocess.makeDataset(df, tmp_path / 'train.h5', part=(3, 3))
