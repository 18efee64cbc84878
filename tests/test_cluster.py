"""The processes of a Dask cluster do what one process does."""

import functools
import os
import signal
from pathlib import Path

import joblib
import pandas as pd
import pytest
import segmentation_models_pytorch as smp
import torch

import config
import patients
import phantom
import postprocess
import preprocess
import provenance
from patients import parallel

dask = pytest.importorskip('dask')
distributed = pytest.importorskip('dask.distributed')
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group('cluster')]  # one process, as they share a cluster


@pytest.fixture(scope='module')
def client():
    """Two processes on this machine that have torch in memory."""
    options = {'n_workers': 2, 'threads_per_worker': 1, 'processes': True, 'dashboard_address': None}
    patience = {'distributed.comm.timeouts.tcp': '10 minutes', 'distributed.scheduler.worker-ttl': None}  # busy machine
    with (
        dask.config.set(patience),
        distributed.LocalCluster(**options) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.fixture(scope='module')
def df(tmp_path_factory):
    """The file list of four phantoms."""
    folder = tmp_path_factory.mktemp('data')
    phantom.makeCases(folder, 4, shape=(40, 40, 16))
    return patients.makeFileList(folder)


@pytest.fixture
def model():
    """A small untrained model."""
    torch.manual_seed(0)
    return smp.Unet('resnet18', encoder_weights=None, in_channels=3, classes=4, decoder_channels=(32, 16, 16, 8, 8))


def filesOf(folder):
    """Return a dict of path -> content of all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_cluster_writesTheFilesOfOneProcess(client, df, model, tmp_path):
    """Patches, segmentations and scores are the same, byte for byte; the values of `config` reach the processes."""
    config.PLANES, config.PATCH_STRIDE = ('axial', 'sagittal'), 16
    with joblib.parallel_config('dask', n_jobs=2):
        preprocess.makeDataset(df, str(tmp_path / 'many.h5'))
        postprocess.predictFolder(df, model, tmp_path / 'many', probabilities=True)
        many = postprocess.scoreFolder(df, tmp_path / 'many' / 'upload')
    ran = client.run(lambda dask_worker: 'config' in __import__('sys').modules)
    assert list(ran.values()) == [True, True]
    preprocess.makeDataset(df, str(tmp_path / 'one.h5'))
    postprocess.predictFolder(df, model, tmp_path / 'one', probabilities=True)
    assert (tmp_path / 'many.h5').read_bytes() == (tmp_path / 'one.h5').read_bytes()
    expected = filesOf(tmp_path / 'one')
    assert len(expected) == 3 * 4 + 5 and filesOf(tmp_path / 'many') == expected  # 2 tables, settings, 2 of label names
    pd.testing.assert_frame_equal(many, postprocess.scoreFolder(df, tmp_path / 'one' / 'upload'))


def test_cluster_leavesOutAndNamesABadPatient(client, df, model, tmp_path, capsys):
    """A damaged file stops the prediction, or its patient is left out; the others are predicted."""
    df, file = df.copy(), tmp_path / Path(df['flair'].iloc[1]).name
    file.write_bytes(b'damaged')
    df.loc[df.index[1], 'flair'] = str(file)
    with joblib.parallel_config('dask', n_jobs=2):
        with pytest.raises(ValueError, match=rf'{df.index[1]}.*cannot be used'):
            postprocess.predictFolder(df, model, tmp_path / 'out')
        config.ON_BAD_PATIENT = 'leaveOut'
        table = postprocess.predictFolder(df, model, tmp_path / 'out')
    assert f'Left out: {df.index[1]}' in capsys.readouterr().out
    assert list(table['patient'].unique()) == [df.index[0], *df.index[2:]]


def test_cluster_stopsAtErrorsThatAreNotThoseOfAPatient(client, df, model, tmp_path):
    """A Tuning of other predictions ends the work, as in one process: no patient is left out for it."""
    config.ON_BAD_PATIENT = 'leaveOut'
    rules = postprocess.Tuning(N=10, kind={'patchStride': None, 'mirror': True, 'planes': None, 'twoLooks': True})
    with joblib.parallel_config('dask', n_jobs=2), pytest.raises(ValueError, match='The rules were tuned on'):
        postprocess.predictFolder(df, model, tmp_path / 'out', rules=rules)


def test_cluster_warnsWhereConfigDiffers(client, df, model, tmp_path):
    """The caller is warned that the settings of the training are used, and not only the processes."""
    settings = {**provenance.configured(), 'activation': 'softmax'}
    model.provenance = {'settings': settings, 'patients': {}, 'earlier': {}, 'validated': {}}
    config.PLANES = ('coronal',)
    with joblib.parallel_config('dask', n_jobs=2), pytest.warns(UserWarning, match='settings of the training are used'):
        postprocess.predictFolder(df, model, tmp_path / 'out')


def dieOnce(folder, paths):
    """Kill this process, but only the first one that comes here."""
    try:
        (folder / 'died').touch(exist_ok=False)
    except FileExistsError:
        return paths.name
    os.kill(os.getpid(), signal.SIGKILL)


def test_cluster_survivesTheDeathOfAProcess(client, df, tmp_path):
    """A process is killed in the middle of its work: another one does what it had to do."""
    with joblib.parallel_config('dask', n_jobs=2):
        results = list(parallel.forEachPatient(functools.partial(dieOnce, tmp_path), df, 'test'))
    assert results == list(df.index) and (tmp_path / 'died').exists()
