"""Turn a prediction into what is written and scored: small components, NIfTI files, folders."""

import gzip
import json
import platform
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pandas as pd
import segmentation_models_pytorch as smp
import torch
import torchio as tio
from tqdm.auto import tqdm

import config
import metrics
from atomic import writeAtomically
from engine import predictAll
from metrics.counts import asClasses, asSpacing, asVolumes, boundingBox
from metrics.lesions import labelComponents, matchLesions
from patients import EDITIONS, checkGrid, detectEdition, hasFile, readVolume, spacingOf, toClasses


def removeSmallComponents(yhat, ml, spacing=(1, 1, 1)):
    """Return the prediction without its small components of tumor, which become background.

    Args:
        yhat: tensor or array of integers, classes 0 to 3, one patient; it is not changed.
        ml: 26-connected components of the whole tumor below this volume in ml (1 ml = 1000 mm3) are removed, even if no
            other is left; 0 removes none. `tunePostprocessing` finds a value.
        spacing: mm between voxels along each axis.

    Returns:
        copy of yhat, tensor or array as given.

    Raises:
        ValueError: not classes, a negative ml, or a spacing that does not fit.
    """
    if ml < 0:
        raise ValueError(f'ml is {ml}; 0 ml or more was expected.')
    classes = asClasses(yhat, 'yhat')
    voxel = np.prod(asSpacing(spacing, classes.ndim)) / 1000  # ml
    box = boundingBox(classes)
    components, _ = labelComponents(classes[box])
    isSmall = np.bincount(components.ravel(), minlength=1) * voxel < ml
    removed = np.zeros(classes.shape, bool)
    removed[box] = isSmall[components]
    return _replace(yhat, removed, 0)


def relabelSmallET(yhat, N):
    """Return the prediction with its enhancing tumor relabelled as necrotic core if it is smaller than N voxels.

    Args:
        yhat: tensor or array of integers, classes 0 to 3, one patient; it is not changed.
        N: number of voxels; 0 changes nothing. `tunePostprocessing` finds a value.

    Returns:
        copy of yhat, tensor or array as given.

    Raises:
        ValueError: not classes, or a negative N.

    Reference:
        The winner of BraTS 2020 (arXiv:2011.00848) used N = 200.
    """
    if N < 0:
        raise ValueError(f'N is {N}; 0 voxels or more were expected.')
    isEnhancing = np.isin(asClasses(yhat, 'yhat'), config.REGIONS['ET'])
    if isEnhancing.sum() >= N:
        isEnhancing[:] = False
    return _replace(yhat, isEnhancing, config.REGIONS['NCR'][0])


def _replace(yhat, mask, value):
    """Return a copy of a tensor or array with a value where the mask (array) is True."""
    if isinstance(yhat, torch.Tensor):
        return yhat.masked_fill(torch.from_numpy(mask).to(yhat.device), value)
    out = np.array(yhat)
    out[mask] = value
    return out


class Tuning(NamedTuple):
    """The result of `tunePostprocessing`.

    Attributes:
        N: the best number of voxels for `relabelSmallET`.
        ml: the best volume for `removeSmallComponents`, in ml.
        curve: DataFrame with the columns `rule` ('ml' or 'N'), `value` (ml or voxels), `score` (mean over patients: the
            lesion-wise Dice of WT for 'ml', the Dice of ET for 'N'), `gained` and `lost` (patients with a better or
            worse score than at value 0). A score holds up to the next row's value.
        withoutET: number of patients without enhancing tumor in truth.
        gained: how many of those the best N lifts from Dice 0 to 1; no other patient can gain.
        lost: number of patients with enhancing tumor whose score falls at the best N.
    """

    N: int
    ml: float
    curve: pd.DataFrame
    withoutET: int
    gained: int
    lost: int


def tunePostprocessing(predictions, spacing=(1, 1, 1)):
    """Find the ml of `removeSmallComponents` and then the N of `relabelSmallET` that score best.

    ml maximises the mean lesion-wise Dice of WT (rules of 2023), in which a false positive component counts as much as
    a lesion; the ordinary Dice hardly changes with it. N maximises the mean Dice of ET, with the rules for empty
    regions, after small components were removed. Every value that changes a prediction is tried. Of equally good values
    the smallest is taken, so 0 means that the rule does not help. Apply the rules in the same order.

    Args:
        predictions: dict of patient to (y, yhat) as `engine.predict` returns them, of validation or out-of-fold
            patients. Not of test patients: their scores would no longer be a test.
        spacing: mm between voxels along each axis, the same for all patients.

    Returns:
        Tuning.

    Raises:
        ValueError: no patients, or bad input as in `metrics.scoreLesions`.
    """
    if not predictions:
        raise ValueError('There are no predictions to tune on; at least one patient was expected.')
    voxel = float(np.prod(asSpacing(spacing, 3))) / 1000  # ml
    patients = [_summarizeComponents(*asVolumes(*pair), spacing) for pair in predictions.values()]
    volumes = _traceCurve([_scoreRemoval(patient) for patient in patients])
    removed = _bestOf(volumes)
    numbers = _traceCurve([_scoreRelabelling(patient, removed) for patient in patients])
    relabelled = _bestOf(numbers)
    # a component of n voxels is below the volume of n + 1/2, whatever the rounding; n voxels are fewer than n + 1
    volumes['value'] = np.where(volumes['size'] > 0, (volumes['size'] + 0.5) * voxel, 0.0)
    numbers['value'] = np.where(numbers['size'] > 0, numbers['size'] + 1, 0)
    curve = pd.concat([volumes.assign(rule='ml'), numbers.assign(rule='N')], ignore_index=True)
    best = numbers.set_index('size').loc[relabelled]
    return Tuning(
        N=int(best['value']),
        ml=float(volumes.set_index('size').loc[removed, 'value']),
        curve=curve[['rule', 'value', 'score', 'gained', 'lost']],
        withoutET=sum(patient.trueET == 0 for patient in patients),
        gained=int(best['gained']),
        lost=int(best['lost']),
    )


class _Summary(NamedTuple):
    """What the rules need to know of a patient with C predicted components and L scored lesions of WT, in voxels."""

    sizes: np.ndarray  # (C,)
    enhancing: np.ndarray  # (C,), predicted ET of each component
    truePositiveET: np.ndarray  # (C,), of that, ET in truth
    trueET: int
    lesionSizes: np.ndarray  # (L,)
    isMatched: np.ndarray  # (L, C)
    overlap: np.ndarray  # (L, C)
    isFalsePositive: np.ndarray  # (C,), matches no lesion, scored or not


def _summarizeComponents(y, yhat, spacing):
    """Return the _Summary of one patient."""
    match = matchLesions(y > 0, yhat > 0, spacing)
    isTrue, isPredicted = (np.isin(classes[match.box], config.REGIONS['ET']) for classes in (y, yhat))
    shape = np.array(match.isMatched.shape) + 1
    pairs = match.lesions.astype(np.int64) * shape[1] + match.components
    overlap = np.bincount(pairs.ravel(), minlength=shape.prod()).reshape(shape)[1:, 1:]

    def count(mask):
        return np.bincount(match.components[mask], minlength=shape[1])[1:]

    return _Summary(
        sizes=match.componentSizes,
        enhancing=count(isPredicted),
        truePositiveET=count(isPredicted & isTrue),
        trueET=int(isTrue.sum()),
        lesionSizes=match.lesionSizes[match.isScored],
        isMatched=match.isMatched[match.isScored],
        overlap=overlap[match.isScored],
        isFalsePositive=~match.isMatched.any(0),
    )


def _scoreRemoval(patient):
    """Return the sizes (K,) of a patient's components and the lesion-wise Dice (K + 1,) with 0, 1, ... K removed."""
    sizes = np.unique(patient.sizes)
    scores = []
    for size in [0, *sizes]:
        isLeft = patient.sizes > size
        isMatched = patient.isMatched & isLeft
        predicted = isMatched @ patient.sizes  # voxels of the components left to each lesion
        dice = 2 * (patient.overlap * isMatched).sum(1) / (patient.lesionSizes + predicted)
        count = len(dice) + (patient.isFalsePositive & isLeft).sum()
        scores.append(dice.sum() / count if count else 1.0)
    return sizes, scores


def _scoreRelabelling(patient, removed):
    """Return a patient's ET voxels (1,) without components of up to `removed` voxels, and the Dice with and without."""
    isLeft = patient.sizes > removed
    predicted, truePositive = patient.enhancing[isLeft].sum(), patient.truePositiveET[isLeft].sum()
    total = predicted + patient.trueET
    return np.array([predicted]), [2 * truePositive / total if total else 1.0, float(patient.trueET == 0)]


def _traceCurve(steps):
    """Return the mean score over patients at every size at which a patient's score may change.

    Args:
        steps: for each patient, ascending sizes (K,) and scores (K + 1,): the first score is without any removal, the
            next with the first size removed, and so on.

    Returns:
        DataFrame with the columns `size` (0 first), `score`, `gained`, `lost` (patients, compared with size 0).
    """
    sizes = np.unique(np.concatenate([[0], *(changes for changes, _ in steps)]))
    score, gained, lost = np.zeros((3, len(sizes)))
    for changes, values in steps:
        scores = np.asarray(values)[np.searchsorted(changes, sizes, side='right')]
        score += scores
        gained += scores > values[0] + 1e-12
        lost += scores < values[0] - 1e-12
    gained, lost = gained.astype(int), lost.astype(int)
    return pd.DataFrame({'size': sizes, 'score': score / len(steps), 'gained': gained, 'lost': lost})


def _bestOf(curve):
    """Return the smallest size with the best score; differences below 1e-12 are rounding."""
    return int(curve['size'][curve['score'] >= curve['score'].max() - 1e-12].iloc[0])


def saveSegmentation(yhat, paths, file):
    """Write a segmentation as the challenge accepts it: on the grid of the patient's images, in the edition's labels.

    Args:
        yhat: integer (D, W, H), classes 0 to 3, as `engine.predict` returns it (tensor or array).
        paths: the patient's row of the file list. Shape, axis order, sform and qform with their codes are those of the
            first of `config.MODALITIES`, never those of the seg.
        file: path to write, `.nii.gz` or `.nii`; uint8 without scaling.

    Raises:
        ValueError: `yhat` has another shape than the images or other classes, or `file` another ending.
    """
    classes = np.asarray(yhat)
    labels = EDITIONS[detectEdition(paths)].labels()
    if not np.isin(classes, np.arange(len(labels))).all():
        raise ValueError(
            f'{file}: yhat has the classes {np.unique(classes)[:9]}; 0 to {len(labels) - 1} were expected.'
        )
    _saveOnGrid(labels[classes], paths, file)


def saveProbabilities(probability, paths, file):
    """Write the classes' probabilities, and their entropy, on the grid of the patient's images.

    Args:
        probability: float (D, NO_CLASSES, W, H), as `engine.predict(..., probabilities = True)` returns it.
        paths: the patient's row of the file list.
        file: path of the probabilities, `.nii.gz` or `.nii`: float32 (W, H, D, NO_CLASSES). The entropy is written to
            `<name>_entropy.nii.gz` in the same folder: float32 (W, H, D), 0 if one class has probability 1, 1 if all
            classes are equally probable.

    Raises:
        ValueError: another shape than the images', or another file ending.
    """
    values = np.asarray(probability, dtype=np.float32)
    _saveOnGrid(values.transpose(0, 2, 3, 1), paths, file)  # (D, K, W, H) -> (D, W, H, K)
    entropy = -(values * np.log(np.maximum(values, np.finfo(np.float32).tiny))).sum(1) / np.log(values.shape[1])
    stem = str(file).removesuffix('.gz').removesuffix('.nii')
    _saveOnGrid(entropy.clip(0, 1).astype(np.float32), paths, f'{stem}_entropy.nii.gz')


def _saveOnGrid(values, paths, file):
    """Write values (D, W, H) or (D, W, H, K) in the axis order, grid and codes of a patient's images."""
    if not str(file).endswith(('.nii', '.nii.gz')):
        raise ValueError(f'{file}: a file name that ends in .nii or .nii.gz was expected.')
    source = nib.load(paths[config.MODALITIES[0]])
    toSource = nib.orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], nib.io_orientation(source.affine))
    stored = nib.apply_orientation(np.moveaxis(values, 0, 2), toSource)  # (D, W, H) -> (W, H, D) -> the file's order
    if stored.shape[:3] != source.shape[:3]:
        raise ValueError(f'{file}: the volume has the shape {stored.shape[:3]}, the images have {source.shape[:3]}.')
    header = nib.Nifti1Header()
    header.set_data_dtype(values.dtype)
    header.set_data_shape(stored.shape)
    header['pixdim'][:4] = source.header['pixdim'][:4]
    for field in _GRID_FIELDS:
        header[field] = source.header[field]
    content = nib.Nifti1Image(np.ascontiguousarray(stored), None, header).to_bytes()
    with writeAtomically(file) as part:
        # mtime = 0: the same volume is written as the same bytes
        part.write_bytes(gzip.compress(content, 6, mtime=0) if str(file).endswith('.gz') else content)


_GRID_FIELDS = (
    'qform_code', 'sform_code', 'xyzt_units', 'quatern_b', 'quatern_c', 'quatern_d',
    'qoffset_x', 'qoffset_y', 'qoffset_z', 'srow_x', 'srow_y', 'srow_z',
)  # fmt: skip


def predictFolder(df, model, folder, transform=None, ml=0.0, N=0, probabilities=False, **options):
    """Predict the patients of a file list into a folder, for upload and for tables.

    Args:
        df: file list.
        model, transform: as in `engine.predict`.
        folder: gets `upload/<patient>.nii.gz` on each patient's grid in its edition's labels, `scores.csv`,
            `settings.json` and, with probabilities, `maps/<patient>.nii.gz` and `maps/<patient>_entropy.nii.gz`.
        ml, N: rules against small components, for `removeSmallComponents` and `relabelSmallET`; tune them on validation
            patients with `tunePostprocessing`.
        probabilities: write the probabilities and their entropy too.
        **options: `patchStride`, `device`, `mirror` as in `engine.predict`.

    Returns:
        DataFrame as `metrics.scoreTable` returns it; empty if no patient has a segmentation.
    """
    folder, scores = Path(folder), {}
    for patient, (_, y, yhat, *probability) in predictAll(df, model, transform, probabilities=probabilities, **options):
        paths = df.loc[patient]
        spacing = spacingOf(paths)
        yhat = relabelSmallET(removeSmallComponents(yhat, ml, spacing), N)
        saveSegmentation(yhat, paths, folder / 'upload' / f'{patient}.nii.gz')
        if probabilities:
            saveProbabilities(*probability, paths, folder / 'maps' / f'{patient}.nii.gz')
        if y is not None:
            scores[patient] = metrics.scorePatient(y, yhat, spacing)
            writeScores(scores, folder, ml=ml, N=N, **options)  # kept, whatever happens next
    return writeScores(scores, folder, ml=ml, N=N, **options)


def writeScores(scores, folder, **settings):
    """Write `scores.csv` and `settings.json` into a folder.

    Args:
        scores: dict of patient to the table of `metrics.scorePatient`.
        folder: folder to write to; made if missing.
        **settings: what else the scores depend on, besides `config` and the versions of the libraries.

    Returns:
        DataFrame: `metrics.scoreTable(scores)`.
    """
    table = metrics.scoreTable(scores) if scores else pd.DataFrame(columns=['patient', 'region'])
    with writeAtomically(Path(folder) / 'scores.csv') as part:
        table.to_csv(part, index=False)
    numbers = {name: value for name, value in vars(config).items() if name.isupper() and not name.startswith('_')}
    versions = {'python': platform.python_version(), 'torch': torch.__version__}
    versions |= {'torchio': tio.__version__, 'segmentation_models_pytorch': smp.__version__}
    with writeAtomically(Path(folder) / 'settings.json') as part:
        part.write_text(
            json.dumps({'prediction': settings, 'config': numbers, 'versions': versions}, indent=1, default=str)
        )
    return table


def scoreFolder(df, folder):
    """Score a folder of segmentations that any program wrote, by the rules of `metrics.scorePatient`.

    Args:
        df: file list of the patients with their true segmentations; patients without one are left out and counted.
        folder: holds `<patient>.nii.gz` or `.nii` for each patient, as `readPrediction` reads it.

    Returns:
        DataFrame as `metrics.scoreTable` returns it.

    Raises:
        FileNotFoundError: predictions are missing; nothing is scored, because a mean over the others would mislead.
        ValueError: a prediction cannot be read, lies on another grid or has other labels.
    """
    rows = {patient: paths for patient, paths in df.iterrows() if hasFile(paths, 'seg')}
    if len(rows) < len(df):
        print(f'{len(df) - len(rows)} of {len(df)} patients have no true segmentation and are not scored.')
    missing = [patient for patient in rows if _findPrediction(patient, folder) is None]
    if missing:
        raise FileNotFoundError(
            f'{folder} has no segmentation of {len(missing)} patients: {", ".join(missing[:5])} ...'
        )
    scores = {}
    for patient, paths in tqdm(rows.items(), 'score', leave=False):
        scores[patient] = metrics.scorePatient(*readPrediction(paths, folder), spacingOf(paths))
    return metrics.scoreTable(scores)


def readPrediction(paths, folder):
    """Return truth and prediction of one patient from a folder of segmentations.

    Args:
        paths: row of the file list (Series) with a true segmentation.
        folder: holds `<patient>.nii.gz` or `.nii` in the labels of the patient's edition, on the grid of its images;
            another axis order is corrected.

    Returns:
        y, yhat: uint8 (D, W, H), classes 0 to 3, slices first as `engine.predict` returns them.

    Raises:
        FileNotFoundError: the folder has no segmentation of the patient.
        ValueError: it cannot be read, lies on another grid or has other labels.
    """
    file = _findPrediction(paths.name, folder)
    if file is None:
        raise FileNotFoundError(f'{folder} has no segmentation of {paths.name}.')
    truth, grid = readVolume(paths['seg'], paths.name)
    volume, affine = readVolume(str(file), paths.name)
    predicted = pd.Series({**paths, 'seg': str(file)}, name=paths.name)
    checkGrid(predicted, 'seg', volume.shape, affine, truth.shape, grid)
    edition = detectEdition(paths)  # of the truth: the prediction's name may not reveal it
    y, yhat = toClasses(truth, paths, edition), toClasses(volume, predicted, edition)
    return y.transpose(2, 0, 1), yhat.transpose(2, 0, 1)  # (W, H, D) -> (D, W, H)


def _findPrediction(patient, folder):
    """Return the path of a patient's segmentation in a folder, or None."""
    files = (Path(folder) / f'{patient}{ending}' for ending in ('.nii.gz', '.nii'))
    return next((file for file in files if file.is_file()), None)
