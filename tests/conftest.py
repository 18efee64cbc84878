import json
import os

import h5py
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

import config
from provenance import FORMAT

# the tests run in several processes, one thread each; torch is slow where threads wait for one another
os.environ['OMP_NUM_THREADS'] = '1'
torch.set_num_threads(1)
COLUMNS = ['t1', 't1ce', 't2', 'flair', 'seg']
NEWER = ['t1n', 't1c', 't2w', 't2f', 'seg']  # the same columns in the file names of 2023 and 2024
UPENN = ['T1', 'T1GD', 'T2', 'FLAIR']
CLASSIC_LABELS, NEWER_LABELS = [0, 1, 2, 4], [0, 1, 2, 3]  # of the classes 0 to 3
LAYOUTS = {  # edition -> file name, columns, labels
    'BraTS2017': ('{g}/Brats17_TCIA_{i}_1/Brats17_TCIA_{i}_1_{c}.nii.gz', COLUMNS, CLASSIC_LABELS),
    'BraTS2018': ('{g}/Brats18_CBICA_A{i}_1/Brats18_CBICA_A{i}_1_{c}.nii.gz', COLUMNS, CLASSIC_LABELS),
    'BraTS2019': ('{g}/BraTS19_2013_{i}_1/BraTS19_2013_{i}_1_{c}.nii.gz', COLUMNS, CLASSIC_LABELS),
    'BraTS2020': ('BraTS20_Training_{i:03d}/BraTS20_Training_{i:03d}_{c}.nii', COLUMNS, CLASSIC_LABELS),
    'BraTS2021': ('BraTS2021_{i:05d}/BraTS2021_{i:05d}_{c}.nii.gz', COLUMNS, CLASSIC_LABELS),
    'GLI': ('BraTS-GLI-{i:05d}-000/BraTS-GLI-{i:05d}-000-{c}.nii.gz', NEWER, NEWER_LABELS),
    'SSA': (
        '95_Glioma/BraTS-SSA-{i:05d}-000/BraTS-SSA-{i:05d}-000-{c}.nii.gz',
        ['t1n', 't1c', 't2W', 't2f', 'seg'],
        NEWER_LABELS,
    ),
    'BraTS2024': ('BraTS-GLI-{i:05d}-101/BraTS-GLI-{i:05d}-101-{c}.nii.gz', NEWER, NEWER_LABELS),
    'GoAT': ('BraTS-GoAT-{i:05d}/BraTS-GoAT-{i:05d}-{c}.nii.gz', NEWER, NEWER_LABELS),
    'UCSF': (
        'UCSF-PDGM-{i:04d}_nifti/UCSF-PDGM-{i:04d}_{c}.nii.gz',
        ['T1', 'T1c', 'T2', 'FLAIR', 'tumor_segmentation'],
        CLASSIC_LABELS,
    ),
    'UPENN': (
        '{c}.nii.gz',
        [
            *(f'images_structural/UPENN-GBM-{{i:05d}}_11/UPENN-GBM-{{i:05d}}_11_{end}' for end in UPENN),
            'images_segm/UPENN-GBM-{i:05d}_11_segm',
        ],
        CLASSIC_LABELS,
    ),
    'Decathlon': ('Task01/{c}/BRATS_{i:03d}.nii.gz', ['imagesTr', 'labelsTr'], [0, 2, 1, 3]),
}

# Numbers with which a network is trained on phantoms within seconds
SMALL = {
    'PATCH_SIZE': 32, 'PATCH_STRIDE': 24, 'BATCHSIZE': 8, 'ENCODER_NAME': 'resnet18', 'ENCODER_DEPTH': 3,
    'DECODER_CHANNELS': (16, 8, 8), 'ENCODER_WEIGHTS': None, 'LOADER_WORKERS': 0, 'DEVICE': 'cpu',
    'PLANES': ('axial',), 'PREPROCESS_WORKERS': 1,
}  # fmt: skip


def pytest_collection_modifyitems(items):
    """Run the slow tests first, so that no process waits for the last one."""
    items.sort(key=lambda item: item.get_closest_marker('slow') is None)


def listOf(numPatients):
    """Return the file list of patients of 2021 whose files do not exist."""
    rows = {f'BraTS2021_{i:05d}': [f'BraTS2021_{i:05d}_{column}.nii' for column in COLUMNS] for i in range(numPatients)}
    return pd.DataFrame.from_dict(rows, orient='index', columns=COLUMNS)


def touch(folder, *names):
    """Create empty files below a folder."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names(patient, columns=COLUMNS, ending='.nii.gz'):
    """Return the names of a patient's files as BraTS laid them out until 2021."""
    return [f'{patient}/{patient}_{column}{ending}' for column in columns]


def namesNewer(patient):
    """Return the names of a patient's files as BraTS has laid them out since 2023."""
    return [f'{patient}/{patient}-{column}.nii.gz' for column in NEWER]


def save(volume, file, affine=None):
    """Write a volume as NIfTI, with missing folders."""
    file.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(volume), np.eye(4) if affine is None else affine), file)


def volumesOf(image, label=None):
    """Return a dict of column -> volume of an image (3, W, H, D) and a label, for `writeCase`."""
    volumes = dict(zip(['t1ce', 't2', 'flair'], image, strict=True))
    return volumes if label is None else {**volumes, 'seg': label}


def drawCases(numCases, seed):
    """Return random (image int16 (4, W, H, D) in the order of COLUMNS, classes (W, H, D)) pairs."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 999, (numCases, 4, 6, 5, 4)).astype(np.int16)
    return list(zip(images, generator.integers(0, 4, (numCases, 6, 5, 4)), strict=True))


def writeLayout(edition, folder, cases):
    """Write the pairs of `drawCases` with the file names and labels of an edition, a key of `LAYOUTS`."""
    affine = np.array([[-1, 0, 0, 9], [0, -1, 0, 9], [0, 0, 1, 0], [0, 0, 0, 1]])
    name, columns, labels = LAYOUTS[edition]
    for number, (image, classes) in enumerate(cases, start=1):
        volumes = [np.stack([image[3], *image[:3]], axis=-1)] if edition == 'Decathlon' else image
        volumes = [*volumes, np.array(labels, np.uint8)[classes]]
        for column, volume in zip(columns, volumes, strict=True):
            save(
                volume,
                folder / name.format(g='HGG' if number % 2 else 'LGG', i=number, c=column.format(i=number)),
                affine,
            )


PATCHES = (
    'image',
    'label',
    'patient',
    'plane',
    'slice',
    'row',
    'column',
)  # have a row a patch


def settingsOf(**changes):
    """Return the settings of a provenance as today's config gives them, or with some of them changed."""
    return {
        'modalities': list(config.MODALITIES),
        'classes': list(config.CLASS_NAMES),
        'patchSize': config.PATCH_SIZE,
        'planes': list(config.PLANES),
        'stretching': [list(config.STRETCH_PERCENTILES), list(config.STRETCH_RANGE)],
        'editions': {'BraTS2020': [[0, 0], [1, 1], [2, 2], [4, 3]]},
        'patchStride': config.PATCH_STRIDE,
        'sliceStep': None,
        'randomStarts': None,
        'background': None,
    } | changes


def writePatchFile(file, image, label, patients=('P1',), numbers=None, **changes):
    """Write a patch file with the settings of today's config, or with some of them changed.

    `numbers` are those of the patients that the patches come from; None: each patient has about as many.
    """
    provenance = {
        'format': FORMAT,
        'settings': settingsOf(**changes),
        'patients': {patient: {'t1ce': f'image of {patient}', 'seg': f'seg of {patient}'} for patient in patients},
        'files': {},
    }
    numbers = np.arange(len(image)) * len(patients) // len(image) if numbers is None else numbers
    file.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(file, 'w') as handle:
        handle['image'], handle['label'], handle['patient'] = image, label, np.asarray(numbers, np.int32)
        handle['provenance'] = json.dumps(provenance)
    return str(file)


def cellsOf(notebook, kind):
    """The cells of one kind."""
    return [cell for cell in json.loads(notebook.read_text())['cells'] if cell['cell_type'] == kind]


def sourcesOf(notebook):
    """The source of each code cell."""
    return [''.join(cell['source']) for cell in cellsOf(notebook, 'code')]


@pytest.fixture(autouse=True)
def freshConfig(tmp_path, monkeypatch):
    """Give each test the document's recipe, small numbers where size costs time, and restore config.py afterwards."""
    before = dict(vars(config))
    vars(config).update(config.DOCUMENT)
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
    """Return a function that writes one patient's volumes as NIfTI and returns its row of the file list."""

    def write(volumes, patient='BraTS20_Training_001', affine=None, folder='data'):
        home = tmp_path / folder / patient
        paths = {column: str(home / f'{patient}_{column}.nii.gz') for column in volumes}
        for column, volume in volumes.items():
            save(volume, home / f'{patient}_{column}.nii.gz', affine)
        return paths

    return write
