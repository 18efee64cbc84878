import nibabel as nib
import numpy as np
import pytest

import config

COLUMNS = ['t1', 't1ce', 't2', 'flair', 'seg']


def touch(folder, *names):
    """Makes empty files below a folder."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names(patient, columns=COLUMNS, ending='.nii.gz'):
    """Gives the names of a patient's files as BraTS laid them out until 2021."""
    return [f'{patient}/{patient}_{column}{ending}' for column in columns]


@pytest.fixture(autouse=True)
def freshConfig(tmp_path, monkeypatch):
    """Gives every test the numbers as they are in the file, small ones where size costs time, and takes them back."""
    before = dict(vars(config))
    monkeypatch.delenv('BRATS_FOLDER', raising=False)
    config.OUTPUT_FOLDER = str(tmp_path / 'output')
    config.DEVICE = 'cpu'
    config.ENCODER_WEIGHTS = None
    config.PATCH_SIZE, config.PATCH_STRIDE = 32, 24
    yield
    vars(config).clear()
    vars(config).update(before)


@pytest.fixture
def writeCase(tmp_path):
    """A function that writes one patient's volumes as NIfTI and gives its row of the file list."""

    def write(volumes, patient='BraTS20_Training_001', affine=None, folder='data'):
        home = tmp_path / folder / patient
        home.mkdir(parents=True, exist_ok=True)
        paths = {}
        for column, volume in volumes.items():
            paths[column] = str(home / f'{patient}_{column}.nii.gz')
            nib.save(nib.Nifti1Image(np.asarray(volume), np.eye(4) if affine is None else affine), paths[column])
        return paths

    return write
