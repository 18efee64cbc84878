"""Write what was predicted, for a challenge and for a paper, and score what other programs wrote."""

import gzip
import json
import platform
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import segmentation_models_pytorch as smp
import torch
import torchio as tio
from tqdm.auto import tqdm

import config
import metrics
from engine import predictAll
from files import writeWhole
from patients import EDITIONS, checkGrid, hasFile, readVolume, spacingOf, tellEdition, toClasses


def saveSegmentation(yhat, paths, file):
    """Writes a segmentation as a challenge accepts it: on the grid of the patient's images, in the edition's labels.

    Args:
        yhat: integer (D, W, H), classes 0 to 3, as `engine.predict` gives it (tensor or array).
        paths: the patient's row of the file list; the grid (shape, axis order, sform and qform with their codes) is
            that of the first of `config.MODALITIES`, never that of the seg.
        file: where to write, `.nii.gz` or `.nii`; uint8 without scaling.

    Raises:
        ValueError: `yhat` does not have the images' shape, or holds other classes; or `file` ends otherwise.
    """
    classes = np.asarray(yhat)
    labels = EDITIONS[tellEdition(paths)].labels()
    if not np.isin(classes, np.arange(len(labels))).all():
        raise ValueError(f'{file}: the classes {np.unique(classes)[:9]} were given, 0 to {len(labels) - 1} expected.')
    _saveOnGrid(labels[classes], paths, file)


def saveProbabilities(probability, paths, file):
    """Writes the probabilities of the classes, and their entropy beside them, on the grid of the patient's images.

    Args:
        probability: float (D, NO_CLASSES, W, H), as `engine.predict(..., probabilities=True)` gives it.
        paths: the patient's row of the file list.
        file: where to write the 4-D probabilities, `.nii.gz` or `.nii`, float32 (W, H, D, NO_CLASSES). The entropy goes
            to `<name>_entropy.nii.gz` beside it: float32 (W, H, D), 0 where the network is certain and 1 where all
            classes are equally probable.

    Raises:
        ValueError: a shape that is not the images', or a file name of another format.
    """
    values = np.asarray(probability, dtype=np.float32)
    _saveOnGrid(values.transpose(0, 2, 3, 1), paths, file)  # (D, K, W, H) -> (D, W, H, K)
    entropy = -(values * np.log(np.maximum(values, np.finfo(np.float32).tiny))).sum(1) / np.log(values.shape[1])
    stem = str(file).removesuffix('.gz').removesuffix('.nii')
    _saveOnGrid(entropy.clip(0, 1).astype(np.float32), paths, f'{stem}_entropy.nii.gz')


def _saveOnGrid(values, paths, file):
    """Writes (D, W, H) or (D, W, H, K) values in the axis order and with the grid and codes of a patient's images."""
    if not str(file).endswith(('.nii', '.nii.gz')):
        raise ValueError(f'{file}: a name that ends in .nii or .nii.gz was expected.')
    source = nib.load(paths[config.MODALITIES[0]])
    toSource = nib.orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], nib.io_orientation(source.affine))
    stored = nib.apply_orientation(np.moveaxis(values, 0, 2), toSource)  # (D, W, H) -> (W, H, D) -> the file's order
    if stored.shape[:3] != source.shape[:3]:
        raise ValueError(f'{file}: volumes of shape {stored.shape[:3]} were given, the images are {source.shape[:3]}.')
    header = nib.Nifti1Header()
    header.set_data_dtype(values.dtype)
    header.set_data_shape(stored.shape)
    header['pixdim'][:4] = source.header['pixdim'][:4]
    for field in _GRID_FIELDS:
        header[field] = source.header[field]
    content = nib.Nifti1Image(np.ascontiguousarray(stored), None, header).to_bytes()
    with writeWhole(file) as part:
        # mtime = 0: the same volume gives the same bytes
        part.write_bytes(gzip.compress(content, 6, mtime=0) if str(file).endswith('.gz') else content)


_GRID_FIELDS = (
    'qform_code', 'sform_code', 'xyzt_units', 'quatern_b', 'quatern_c', 'quatern_d',
    'qoffset_x', 'qoffset_y', 'qoffset_z', 'srow_x', 'srow_y', 'srow_z',
)  # fmt: skip


def predictFolder(df, model, folder, transform=None, smallET=0, smallPart=0.0, probabilities=False, **options):
    """Predicts the patients of a file list into a folder: what a challenge takes, and what a paper tells.

    Args:
        df: file list.
        model, transform: as in `engine.predict`.
        folder: gets `upload/<patient>.nii.gz` on each patient's grid in its edition's labels, `scores.csv`,
            `settings.json` and, with probabilities, `maps/<patient>.nii.gz` and `maps/<patient>_entropy.nii.gz`.
        smallET, smallPart: rules against small parts, tuned on validation patients by `metrics.tuneSmall`: fewer
            voxels of enhancing tumor become necrotic core, and parts of the tumor under so many ml background.
        probabilities: writes them and their entropy too.
        **options: `patchStride`, `device`, `mirror` as in `engine.predict`.

    Returns:
        DataFrame as `metrics.scoreTable` gives it; empty where no patient has a segmentation.
    """
    folder, scores = Path(folder), {}
    for patient, (_, y, yhat, *probability) in predictAll(df, model, transform, probabilities=probabilities, **options):
        paths = df.loc[patient]
        spacing = spacingOf(paths)
        yhat = metrics.relabelSmallET(metrics.dropSmall(yhat, smallPart, spacing), smallET)
        saveSegmentation(yhat, paths, folder / 'upload' / f'{patient}.nii.gz')
        if probabilities:
            saveProbabilities(*probability, paths, folder / 'maps' / f'{patient}.nii.gz')
        if y is not None:
            scores[patient] = metrics.scorePatient(y, yhat, spacing)
            writeScores(scores, folder, smallET=smallET, smallPart=smallPart, **options)  # whatever comes, this is kept
    return writeScores(scores, folder, smallET=smallET, smallPart=smallPart, **options)


def writeScores(scores, folder, **settings):
    """Writes `scores.csv` and `settings.json` into a folder.

    Args:
        scores: dict of patient to what `metrics.scorePatient` gives.
        folder: where to write.
        **settings: what else the scores depend on, beside the numbers of `config` and the versions of the libraries.

    Returns:
        DataFrame: what `metrics.scoreTable` makes of the scores.
    """
    table = metrics.scoreTable(scores) if scores else pd.DataFrame(columns=['patient', 'region'])
    with writeWhole(Path(folder) / 'scores.csv') as part:
        table.to_csv(part, index=False)
    numbers = {name: value for name, value in vars(config).items() if name.isupper() and not name.startswith('_')}
    versions = {'python': platform.python_version(), 'torch': torch.__version__}
    versions |= {'torchio': tio.__version__, 'segmentation_models_pytorch': smp.__version__}
    with writeWhole(Path(folder) / 'settings.json') as part:
        part.write_text(
            json.dumps({'prediction': settings, 'config': numbers, 'versions': versions}, indent=1, default=str)
        )
    return table


def scoreFolder(df, folder):
    """Scores a folder of segmentations that any program wrote, by the rules of `metrics.scorePatient`.

    Args:
        df: file list of the patients with their true segmentations.
        folder: holds `<patient>.nii.gz` or `.nii` for each of them, in the labels of the patient's edition and on the
            grid of its images; another axis order is mended.

    Returns:
        DataFrame as `metrics.scoreTable` gives it. Patients without a true segmentation are left out, and counted.

    Raises:
        FileNotFoundError: a patient has no prediction in the folder; nothing is scored then, for a mean over those that
            happen to be there is not to be believed.
        ValueError: a prediction cannot be read, lies on another grid or has other labels.
    """
    rows = {patient: paths for patient, paths in df.iterrows() if hasFile(paths, 'seg')}
    if len(rows) < len(df):
        print(f'{len(df) - len(rows)} of {len(df)} patients have no true segmentation and are not scored.')
    files = {patient: [Path(folder) / f'{patient}{end}' for end in ('.nii.gz', '.nii')] for patient in rows}
    absent = [patient for patient, both in files.items() if not any(file.is_file() for file in both)]
    if absent:
        raise FileNotFoundError(f'{folder} has no segmentation of {len(absent)} patients: {", ".join(absent[:5])} ...')
    scores = {}
    for patient, paths in tqdm(rows.items(), 'score', leave=False):
        truth, grid = readVolume(paths['seg'], patient)
        file = next(file for file in files[patient] if file.is_file())
        written, affine = readVolume(str(file), patient)
        predicted = pd.Series({**paths, 'seg': str(file)}, name=patient)
        checkGrid(predicted, 'seg', written.shape, affine, truth.shape, grid)
        edition = tellEdition(paths)  # of the truth: the other file's name need not tell one
        y, yhat = toClasses(truth, paths, edition), toClasses(written, predicted, edition)
        scores[patient] = metrics.scorePatient(y.transpose(2, 0, 1), yhat.transpose(2, 0, 1), spacingOf(paths))
    return metrics.scoreTable(scores)
