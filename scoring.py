"""Score folders of segmentations that any program wrote, by the rules of one challenge or of several."""

import functools
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd

import config
import metrics
from components import applyRules
from editions import CAVITY, countWithCavity
from metrics.rules import RULES, findRule
from parallel import forEachPatient, leaveOut
from patients import checkGrid, detectEdition, hasFile, readVolume, spacingOf, toClasses


def readSettings(folder):
    """Return the content of the `settings.json` of a folder of predictions, or above its `upload`; {} if none."""
    for place in [Path(folder)] + [Path(folder).parent] * (Path(folder).name == 'upload'):
        if (place / 'settings.json').is_file():
            return json.loads((place / 'settings.json').read_text())
    return {}


def noScores():
    """Return an empty table of scores."""
    return pd.DataFrame(columns=['patient', 'region'])


def scoreFolder(df, folder, rules=None, challenges=None):
    """Score a folder of segmentations that any program wrote; `config.PREPROCESS_WORKERS` patients at a time.

    Args:
        df: file list of the patients with their true segmentations; patients without one are left out and counted, and
            so are those that the model was trained on, if `predictFolder` or `writeScores` has noted them.
        folder: holds `<patient>.nii.gz` or `.nii` for each patient, as `readPrediction` reads it.
        rules: against small components, from `tunePostprocessing`, applied before scoring. They leave the resection
            cavity as it is. A list of names is taken as `challenges`.
        challenges: names of the rules to score by, such as `['BraTS2020', 'BraTS2024']`; None: the rules of
            `metrics.scorePatient`, and predictions have to be complete. If given, a prediction that is missing, cannot
            be read, lies on another grid or has other labels is named, and counts as a missing one: every score of
            every region is 0, and HD95 the penalty of the rule, also where the truth lacks the region.

    Returns:
        DataFrame as `metrics.scoreTable` returns it. With `challenges` it begins with the column `rule`, and also has
        the columns of `metrics.scoreLesions`, named `lesionDice`, `lesionHd95` and so on; what a rule does not have is
        NaN. `metrics.summarize` takes both.

    Raises:
        FileNotFoundError: predictions are missing and `challenges` is None; nothing is scored, because a mean over the
            others would mislead.
        ValueError: as above for a prediction that cannot be scored; a truth cannot be used and
            `config.ON_BAD_PATIENT` is 'stop'; the rules do not fit the predictions, or were applied already; a
            challenge is unknown.
    """
    if isinstance(rules, (list, tuple)) and rules and all(isinstance(name, str) for name in rules):
        rules, challenges = None, rules
    about = readSettings(folder).get('prediction', {})
    if rules is not None and about.get('rules'):
        raise ValueError(f'The segmentations in {folder} have rules applied already: {about["rules"]}.')
    for name in challenges or ():
        findRule(name)
    rows = {patient: paths for patient, paths in df.iterrows() if hasFile(paths, 'seg')}
    if len(rows) < len(df):
        print(f'{len(df) - len(rows)} of {len(df)} patients have no true segmentation and are not scored.')
    trained = [str(patient) for patient in rows if str(patient) in about.get('trainedOn', ())]
    rows = {patient: paths for patient, paths in rows.items() if str(patient) not in trained}
    if trained:
        print(f'Not scored, because the model was trained on them: {", ".join(trained)}.')
    missing = [patient for patient in rows if findPrediction(patient, folder) is None]
    if missing and challenges is None:
        raise FileNotFoundError(
            f'{folder} has no segmentation of {len(missing)} patients: {", ".join(map(str, missing[:5]))} ...'
        )
    return _gather(df.loc[list(rows)], functools.partial(_scoreCase, folder, rules, about.get('kind'), challenges))


def _gather(df, score):
    """Return the scores of the patients of a file list as one table, and name those that count as missing.

    Args:
        df: file list.
        score: as `_scoreCase`, of a row.
    """
    scores, missing = {}, {}
    for patient, (tables, error) in zip(df.index, forEachPatient(score, df, 'score'), strict=True):
        if tables is None:
            leaveOut(error, f'{len(scores)} of {len(df)} patients were scored before.')
            continue
        scores[patient] = tables
        if error:
            missing[patient] = error
    if missing:
        print(f'{len(missing)} of {len(scores)} patients count as missing, with the worst scores:')
        print(*(f'{patient}: {error}' for patient, error in missing.items()), sep='\n')
    if not scores:
        return noScores()
    names = list(next(iter(scores.values())))
    if names == [None]:
        return metrics.scoreTable({patient: tables[None] for patient, tables in scores.items()})
    tables = {(name, patient): scores[patient][name] for name in names for patient in scores}
    return pd.concat(tables, names=['rule', 'patient', 'region']).reset_index()


def _scoreCase(folder, rules, kind, challenges, paths):
    """Return the scores of one patient, rule or None -> table, and the error of its prediction, or None.

    If its truth cannot be used, there are no scores (None), and the error is that of the truth.
    """
    try:
        truth, affine = _readTruth(paths)
    except (ValueError, OSError) as error:
        return None, error
    spacing = spacingOf(paths)
    yhat, bad = np.zeros_like(truth), None
    try:
        yhat = _readPredicted(paths, folder, truth, affine)
    except (ValueError, OSError) as error:
        if challenges is None:
            raise
        bad = error
    yhat = _applyRules(yhat, rules, spacing, kind)
    if challenges is None:
        return {None: metrics.scorePatient(withoutCavity(truth), withoutCavity(yhat), spacing)}, None
    tables = {name: _scoreByRule(truth, yhat, spacing, paths, name) for name in challenges}
    return {name: _worst(table, name) if bad else table for name, table in tables.items()}, bad


def _applyRules(yhat, rules, spacing, kind):
    """Return a prediction with the resection cavity as it was, after the rules against small components."""
    kept = applyRules(withoutCavity(yhat), rules, spacing, kind)
    return np.where((yhat == CAVITY) & (kept == 0), np.uint8(CAVITY), kept)


def _scoreByRule(truth, yhat, spacing, paths, name):
    """Return the table of `metrics.scorePatient` by a rule, with the columns of `metrics.scoreLesions` beside it.

    Args:
        truth, yhat: uint8 (D, W, H), with the resection cavity.
        spacing: mm along their axes.
        paths: row of the file list.
        name: key of `RULES`.
    """
    if RULES[name].numClasses() <= CAVITY:  # no region of the rule is the cavity
        truth, yhat = withoutCavity(truth), withoutCavity(yhat)
    table = metrics.scorePatient(truth, yhat, spacing, name)
    if RULES[name].regions is None:
        return table
    # lesions are numbered, and so merged, along the axes of the files
    turned, spacing = zip(*(_toFileAxes(volume, spacing, paths) for volume in (truth, yhat)), strict=True)
    lesions = metrics.scoreLesions(*turned, spacing[0], name)
    return table.join(lesions.rename(columns=lambda column: f'lesion{column[0].upper()}{column[1:]}'))


def _toFileAxes(volume, spacing, paths):
    """Return a volume (D, W, H) and its spacing in the order and direction of the axes of the true segmentation."""
    source = nib.io_orientation(nib.load(paths['seg']).affine)
    toSource = nib.orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], source)
    turned = nib.apply_orientation(np.moveaxis(volume, 0, 2), toSource)  # (D, W, H) -> (W, H, D) -> the file's order
    spacing = np.roll(spacing, -1)
    return turned, tuple(float(spacing[int(axis)]) for axis in source[:, 0])


def _worst(table, name):
    """Return a table of an empty prediction as it counts for a patient without one; what the truth has stays."""
    worst = {column: 0.0 for column in table if column not in ('volumeTruth', 'lesionMissed')}
    return table.assign(**worst | {column: RULES[name].penalty for column in ('hd95', 'lesionHd95') if column in table})


def readPrediction(paths, folder):
    """Return truth and prediction of one patient from a folder of segmentations.

    Args:
        paths: row of the file list (Series) with a true segmentation.
        folder: holds `<patient>.nii.gz` or `.nii` in the labels of the patient's edition, on the grid of its images;
            another axis order is corrected.

    Returns:
        y, yhat: uint8 (D, W, H), classes of `config.NO_CLASSES`, slices first as `engine.predict` returns them.

    Raises:
        FileNotFoundError: the folder has no segmentation of the patient.
        ValueError: it cannot be read, lies on another grid or has other labels.
    """
    truth, affine = _readTruth(paths)
    return withoutCavity(truth), withoutCavity(_readPredicted(paths, folder, truth, affine))


def _readTruth(paths):
    """Return the true classes of a patient, the cavity among them, uint8 (D, W, H), and the affine of their file."""
    labels, affine = readVolume(paths['seg'], paths.name)
    return _toClassesWithCavity(labels, paths, detectEdition(paths)), affine


def _readPredicted(paths, folder, truth, affine):
    """Return the predicted classes of a patient, the cavity among them, on the grid of its truth, uint8 (D, W, H)."""
    file = findPrediction(paths.name, folder)
    if file is None:
        raise FileNotFoundError(f'{folder} has no segmentation of {paths.name}.')
    volume, grid = readVolume(str(file), paths.name)
    predicted = pd.Series({**paths, 'seg': str(file)}, name=paths.name)
    shape = truth.shape[1:] + truth.shape[:1]  # (D, W, H) -> (W, H, D)
    checkGrid(predicted, 'seg', volume.shape, grid, 'the true seg', shape, affine)
    # by the edition of the truth: the prediction's name may not reveal it
    return _toClassesWithCavity(volume, predicted, detectEdition(paths))


def _toClassesWithCavity(labels, paths, edition):
    """Return the classes of labels (W, H, D) by an edition's table, and class 4 for the cavity, uint8 (D, W, H)."""
    return toClasses(labels, paths, edition, countWithCavity()).transpose(2, 0, 1)  # (W, H, D) -> (D, W, H)


def withoutCavity(classes):
    """Return classes with the resection cavity as background, unless `config.NO_CLASSES` has it as a class."""
    if config.NO_CLASSES > CAVITY:
        return classes
    return np.where(classes == CAVITY, np.uint8(0), classes) if (classes == CAVITY).any() else classes


def findPrediction(patient, folder):
    """Return the path of a patient's segmentation in a folder, or None."""
    files = (Path(folder) / f'{patient}{ending}' for ending in ('.nii.gz', '.nii'))
    return next((file for file in files if file.is_file()), None)
