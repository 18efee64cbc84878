"""Predict patients into a folder of segmentations, and score such a folder."""

import functools
import json
import platform
import re
import time
import warnings
import zlib
from contextlib import suppress
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import segmentation_models_pytorch as smp
import torch
import torchio as tio

import config
import metrics
from atomic import writeAtomically
from engine import segment, segmentAll
from metrics.rules import RULES, findRule
from patients.cohort import haveVoxelsOf
from patients.editions import CAVITY, COLUMNS, Edition, countWithCavity, labelsOf
from patients.parallel import attempt, forEachPatient, leaveOut, usesProcesses
from patients.reading import checkGrid, detectEdition, hasFile, readVolume, spacingOf, toClasses
from patients.writing import isCorrected, isWritten, remarkOf, saveLabelNames, saveProbabilities, saveSegmentation
from postprocess.components import applyRules, kindOf
from postprocess.quality import describeDisagreement, measureMember
from provenance import inputsOf, membersFor, membersOf, provenanceOf, stretchingsIn, trainedAmong, warnOfTrained


def predictFolder(df, model, folder, transform=None, rules=None, probabilities=False, part=None, **options):
    """Predict the patients of a file list into a folder, for upload and for tables.

    Patients that the model was trained on are segmented, but not scored. Of an ensemble (a list of models), a patient
    is predicted by the members that were not trained on it, so those of a cross-validation predict and score all.
    A stopped call goes on with the patients that are missing in the folder, or whose files have changed; one that was
    corrected by hand is kept. Under `joblib.parallel_config` the processes of its backend predict the patients.

    Args:
        df: file list.
        model, transform: as in `engine.predict`.
        folder: gets `upload/<patient>.nii.gz` on each patient's grid in its edition's labels, the labels' names for
            ITK-SNAP and 3D Slicer, `scores.csv`, `disagreement.csv` (see `quality`), `settings.json` and, with
            probabilities, `maps/<patient>.nii.gz` and `maps/<patient>_entropy.nii.gz`.
        rules: Tuning of `tunePostprocessing` on validation patients; None: nothing is removed.
        probabilities: write the probabilities and their entropy too.
        part: (i, n): predict shard i of n (from 0), every n-th patient, on one of n processes or machines. Its scores
            are in `scores.<i>of<n>.csv`; `scoreFolder` scores all patients when all shards are predicted.
        **options: `patchStride`, `device`, `mirror`, `twoLooks` as in `engine.predict`.

    Returns:
        DataFrame as `metrics.scoreTable` returns it, of the patients of the shard; empty if none is scored.

    Raises:
        ValueError: the folder holds segmentations by other weights, options or rules; or as `engine.predictAll` and
            `applyRules`.
    """
    number, numParts = part or (0, 1)
    if not 0 <= number < numParts:
        raise ValueError(f'part is {part}; (i, n) with 0 <= i < n was expected.')
    folder, kind = Path(folder), kindOf(**options)
    made = {'weights': _checksumOfWeights(model), 'kind': kind}
    made['rules'] = None if rules is None else {'ml': float(rules.ml), 'N': int(rules.N)}
    with warnings.catch_warnings(action='ignore'):  # predictAll warns
        inputs = inputsOf(model, transform, kind['planes'])
        made['input'] = _describeInput(inputs, transform)
        trained = membersFor(model, df)[1]
    before = _refuseOthers(folder, made)
    about = {**made, 'trainedOn': _trainedOn(model, {*(before.get('trainedOn') or ()), *trained}), **options}
    if before != json.loads(json.dumps(about, default=str)):
        with suppress(BlockingIOError):  # shards that begin together write the same
            _writeSettings(folder, about)
    file = folder / (f'scores.{number}of{numParts}.csv' if part else 'scores.csv')
    read = inputs[0].modalities
    df = df.iloc[number::numParts].assign(**dict.fromkeys(set(COLUMNS) - {*read, 'seg'}))  # others may have other grids
    noted, ids = file.with_name(file.name.replace('scores', 'disagreement')), df.index.astype(str)
    isScored = df['seg'].notna().to_numpy() & ~ids.isin(trained)
    settings = [made, config.EDITION, repr(config.OWN_EDITIONS)]  # the labels are those of the edition
    remarks = {patient: remarkOf(settings, paths, (*read, 'seg')) for patient, paths in df.iterrows()}
    isLeft = ~ids.isin(_readScores(noted)['patient']) | (isScored & ~ids.isin(_readScores(file)['patient']))
    for row, patient in enumerate(df.index):
        written = folder / 'upload' / f'{patient}.nii.gz'
        isLeft[row] |= not (isWritten(written, remarks[patient]) or isCorrected(written))
        isLeft[row] |= probabilities and not (folder / 'maps' / f'{patient}_entropy.nii.gz').is_file()
    if not isLeft.all():
        print(f'{(~isLeft).sum()} of {len(df)} patients are finished in {folder}.')
    finish = functools.partial(_finishPatient, folder=folder, rules=rules, kind=kind, trained=trained, remarks=remarks)
    options |= {'transform': transform, 'probabilities': probabilities, 'measure': measureMember}
    if usesProcesses():
        results = _predictByProcesses(df[isLeft], model, finish, **options)
    else:
        results = (finish(df.loc[patient], found) for patient, found in segmentAll(df[isLeft], model, **options))
    with _GrowingTable(noted, ids[isLeft]) as disagreements, _GrowingTable(file, ids[isLeft]) as scored:
        for patient, disagreement, scores in results:
            if scores is not None:
                scored.add(patient, scores)
            disagreements.add(patient, disagreement)
    order, table = {patient: row for row, patient in enumerate(ids)}, _readScores(file)
    table = table[table['patient'].isin(order)]
    return table.sort_values('patient', key=lambda column: column.map(order), kind='stable', ignore_index=True)


def _predictByProcesses(df, model, finish, **options):
    """Yield what `finish` returns for each patient; a process of joblib's predicts, writes and scores it."""
    members, trained = membersFor(model, df)
    warnOfTrained(trained, len(df))
    inputsOf(model, options['transform'], options.get('planes'))  # warns here: the processes' warnings are not seen
    function = functools.partial(_predictAndFinish, members=members, finish=finish, options=options)
    for number, result in enumerate(forEachPatient(function, df, 'predict')):
        if isinstance(result, Exception):
            leaveOut(result, f'{number} of {len(df)} patients were segmented before.')
        else:
            yield result


def _predictAndFinish(paths, members, finish, options):
    """Return what `finish` returns, or the error of bad data; errors of `finish`, such as a full disk, are raised."""
    found = attempt(functools.partial(segment, members=members[paths.name], **options))(paths)
    return found if isinstance(found, Exception) else finish(paths, found)


def _finishPatient(paths, found, folder, rules, kind, trained, remarks):
    """Write the `engine.Segmentation` of a patient; return its id, its disagreement, and its scores or None."""
    patient, spacing = paths.name, spacingOf(paths)
    yhat = applyRules(found.yhat, rules, spacing, kind)
    edition = detectEdition(paths)
    labels, file = labelsOf(edition), folder / 'upload' / f'{patient}.nii.gz'
    maps = [folder / 'maps' / f'{patient}{end}.nii.gz' for end in ('', '_entropy')]
    for each in maps:
        each.unlink(missing_ok=True)  # of another image, it may be
    if found.probability is not None:
        saveProbabilities(found.probability, paths, maps[0])
    if not isCorrected(file):
        saveSegmentation(yhat, paths, file, remark=remarks[patient])
    with suppress(BlockingIOError):  # another process is writing the same
        saveLabelNames(labels, folder / edition)
    if labels.get(CAVITY) == 0:
        yhat = yhat.masked_fill(yhat == CAVITY, 0)  # as it is written: the edition has no label for the cavity
    isScored = found.y is not None and str(patient) not in trained
    scores = metrics.scorePatient(found.y, yhat, spacing) if isScored else None
    return patient, describeDisagreement(found.measured, yhat), scores


def _readScores(file):
    """Return the table of a file of scores; empty if there is none."""
    return pd.read_csv(file, dtype={'patient': str}) if file.is_file() else noScores()


class _GrowingTable:
    """A file of scores, to which patients are added one by one, after their rows of before are taken out.

    The whole file is written, so the larger it is, the more seldom: it takes a twentieth of the time. What a killed
    process had not written yet is computed again.
    """

    def __init__(self, file, patients):
        self.file, self.tables, self.due = file, {}, 0
        before = _readScores(file)
        if (isOld := before['patient'].isin(patients)).any():
            self._save(before[~isOld])

    def add(self, patient, table):
        self.tables[patient] = table
        if time.monotonic() >= self.due:
            self.write()

    def write(self):
        if not self.tables:
            return
        begin, before, table = time.monotonic(), _readScores(self.file), metrics.scoreTable(self.tables)
        self._save(pd.concat([before, table], ignore_index=True) if len(before) else table)
        self.tables, self.due = {}, time.monotonic() + 20 * (time.monotonic() - begin)

    def _save(self, table):
        with writeAtomically(self.file) as temporary:
            table.to_csv(temporary, index=False)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.write()


def trainedIn(made, df):
    """Return the ids (text) of those patients of a file list that the networks of a folder were trained on.

    Args:
        made: `prediction` of the folder's `settings.json`, which names them, or has the checksums of their voxels.
        df: file list.
    """
    known, named = haveVoxelsOf(df, made.get('voxels')), made.get('trainedOn') or ()
    return [each for each, isKnown in zip(df.index.astype(str), known, strict=True) if isKnown or each in named]


def _trainedOn(model, trained):
    """Return the ids in order; None if there is none and it is not known whom a member was trained on."""
    return sorted(trained) or ([] if all(provenanceOf(member) for member in membersOf(model)) else None)


def _describeInput(inputs, transform):
    """Return the input settings of the members of an ensemble as JSON has them; of the transforms their stretchings."""
    given = re.sub(r' at 0x[0-9a-f]+', '', repr(transform)) if isinstance(transform, tio.Transform) else 'given'
    source = 'of the training' if transform is None else given
    described = [each._replace(transform=[stretchingsIn(each.transform), source])._asdict() for each in inputs]
    return json.loads(json.dumps(described))


def _checksumOfWeights(model):
    """Return a checksum of the weights and buffers of a model, or of all members of an ensemble."""
    value = 0
    for member in membersOf(model):
        for _, tensor in sorted(member.state_dict().items()):
            value = zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy(), value)
    return f'{value:08x}'


def _refuseOthers(folder, made):
    """Return what `settings.json` of a folder says of its segmentations; raise a ValueError if `made` differs."""
    before = readSettings(folder).get('prediction', {})
    differing = [name for name in made if before.get(name) != made[name]]
    if before and differing:
        raise ValueError(
            f'{folder} holds segmentations with other {" and ".join(differing)}. Choose another folder, or delete it.'
        )
    if not before and any((folder / 'upload').glob('*.nii*')):
        raise ValueError(f'{folder}/upload holds segmentations of another program. Choose another folder.')
    return before


def writeScores(scores, folder, model=None, df=None, **options):
    """Write `scores.csv` and `settings.json` into a folder, which is made if missing.

    Args:
        scores: dict of patient to the table of `metrics.scorePatient`.
        model: the model that made the predictions. Patients that it was trained on are left out and named.
        df: file list of the patients, so that they are recognised by their files too, under any id.
        **options: `patchStride`, `mirror` and `twoLooks` of the prediction, and what else the scores depend on.

    Returns:
        DataFrame: `metrics.scoreTable(scores)`.
    """
    if df is None:
        trained = [str(each) for each in scores if all(trainedAmong(member, [each]) for member in membersOf(model))]
    else:
        trained = membersFor(model, df.loc[list(scores)])[1]
    if trained:
        print(f'Not scored, because the model was trained on them: {", ".join(trained)}.')
    scores = {patient: table for patient, table in scores.items() if str(patient) not in trained}
    table = metrics.scoreTable(scores) if scores else noScores()
    with writeAtomically(Path(folder) / 'scores.csv') as temporary:
        table.to_csv(temporary, index=False)
    _writeSettings(
        folder, {'kind': kindOf(**options), 'rules': None, 'trainedOn': _trainedOn(model, trained), **options}
    )
    return table


def _writeSettings(folder, about):
    """Write `settings.json`: how predictions were made, the values of `config`, and versions of libraries."""
    names = {name for name in dir(config) if name.isupper() and not name.startswith('_')}
    written = names & vars(config).keys()
    settings = {
        'prediction': about,
        'config': {name: getattr(config, name) for name in sorted(written)},
        'found': {name: getattr(config, name) for name in sorted(names - written)},
        'versions': {
            'python': platform.python_version(),
            **{library.__name__: library.__version__ for library in (torch, tio, smp)},
        },
    }
    with writeAtomically(Path(folder) / 'settings.json') as temporary:
        temporary.write_text(
            json.dumps(settings, indent=1, default=lambda each: vars(each) if isinstance(each, Edition) else str(each))
        )


def readSettings(folder):
    """Return the content of the `settings.json` of a folder of predictions, or above its `upload`; {} if none."""
    folder = Path(folder)
    if folder.name == 'upload' and not (folder / 'settings.json').is_file():
        folder = folder.parent
    file = folder / 'settings.json'
    return json.loads(file.read_text()) if file.is_file() else {}


def noScores():
    """Return an empty table of scores."""
    return pd.DataFrame(columns=['patient', 'region'])


def scoreFolder(df, folder, rules=None, challenges=None):
    """Return the scores of a folder of segmentations that any program wrote.

    Args:
        df: file list. Patients without a true segmentation are left out and counted, and so are those that the model
            was trained on, if `predictFolder`, `writeScores` or `predictor.py` has noted them.
        folder: holds `<patient>.nii.gz` or `.nii` for each patient, as `readPrediction` reads it.
        rules: Tuning of `tunePostprocessing`, applied before scoring; it leaves the resection cavity as it is. A list
            of names is taken as `challenges`.
        challenges: names of challenges to score by, keys of `metrics.rules.RULES`, such as `['BraTS2020',
            'BraTS2024']`. A prediction that is missing, cannot be read, lies on another grid or has other labels is
            named, and every score of every region is 0, and HD95 the penalty, also where the truth lacks the region.
            None: the rule of `metrics.scorePatient`, and such a prediction is an error.

    Returns:
        DataFrame as `metrics.scoreTable` returns it. With `challenges` it begins with the column `rule`, and also has
        the columns of `metrics.scoreLesions`, named `lesionDice`, `lesionHd95` and so on; scores that a challenge does
        not have are NaN. `metrics.summarize` takes both.

    Raises:
        FileNotFoundError: predictions are missing and `challenges` is None, or there is none.
        ValueError: a prediction cannot be scored and `challenges` is None; a truth cannot be used and
            `config.ON_BAD_PATIENT` is 'stop'; the Tuning does not fit the predictions, or one was applied already; a
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
    trained = trainedIn(about, df.loc[list(rows)])
    rows = {patient: paths for patient, paths in rows.items() if str(patient) not in trained}
    if trained:
        print(f'Not scored, because the model was trained on them: {", ".join(trained)}.')
    missing = [patient for patient in rows if findPrediction(patient, folder) is None]
    if missing and (challenges is None or len(missing) == len(rows)):  # none at all: another folder was meant
        raise FileNotFoundError(
            f'{folder} has no segmentation of {len(missing)} of {len(rows)} patients: '
            f'{", ".join(map(str, missing[:5]))} ...'
        )
    df = df.loc[list(rows)]
    score = functools.partial(_scoreCase, folder, rules, about.get('kind'), challenges)
    scores, bad = {}, {}
    for patient, (tables, error) in zip(df.index, forEachPatient(score, df, 'score'), strict=True):
        if tables is None:
            leaveOut(error, f'{len(scores)} of {len(df)} patients were scored before.')
            continue
        scores[patient] = tables
        if error:
            bad[patient] = error
    if bad:
        print(f'{len(bad)} of {len(scores)} patients count as missing, with the worst scores:')
        print(*(f'{patient}: {error}' for patient, error in bad.items()), sep='\n')
    if not scores:
        return noScores()
    if challenges is None:
        return metrics.scoreTable({patient: tables[None] for patient, tables in scores.items()})
    tables = {(name, patient): scores[patient][name] for name in challenges for patient in scores}
    return pd.concat(tables, names=['rule', 'patient', 'region']).reset_index()


def _scoreCase(folder, rules, kind, challenges, paths):
    """Return the scores of one patient, challenge (or None) -> table, and the error of its prediction, or None.

    If its truth cannot be used, the scores are None, and the error is that of the truth.
    """
    try:
        truth, affine = _readTruth(paths)
    except (ValueError, OSError) as error:
        return None, error
    spacing = tuple(np.roll(nib.affines.voxel_sizes(affine), 1).tolist())  # (W, H, D) -> (D, W, H)
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
    """Return the tables of `metrics.scorePatient` and `metrics.scoreLesions` by a rule, side by side.

    `truth` and `yhat` are uint8 (D, W, H), with the resection cavity, `spacing` is in mm along their axes.
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
    """Return a volume (D, W, H) and its spacing along the axes of the file of the true segmentation."""
    source = nib.io_orientation(nib.load(paths['seg']).affine)
    toSource = nib.orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], source)
    turned = nib.apply_orientation(np.moveaxis(volume, 0, 2), toSource)  # (D, W, H) -> (W, H, D) -> the file's order
    spacing = np.roll(spacing, -1)
    return turned, tuple(float(spacing[int(axis)]) for axis in source[:, 0])


def _worst(table, name):
    """Return the table of an empty prediction with the worst scores; the true volumes and lesions stay."""
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
    """Return the true classes of a patient with the cavity, uint8 (D, W, H), and the affine of their file."""
    labels, affine = readVolume(paths['seg'], paths.name)
    return _toClassesWithCavity(labels, paths, detectEdition(paths)), affine


def _readPredicted(paths, folder, truth, affine):
    """Return the predicted classes of a patient with the cavity, on the grid of its truth, uint8 (D, W, H)."""
    file = findPrediction(paths.name, folder)
    if file is None:
        raise FileNotFoundError(f'{folder} has no segmentation of {paths.name}.')
    volume, grid = readVolume(str(file), paths.name)
    predicted = pd.Series({**paths, 'seg': str(file)}, name=paths.name)
    shape = truth.shape[1:] + truth.shape[:1]  # (D, W, H) -> (W, H, D)
    checkGrid(predicted, 'seg', volume.shape, grid, 'the true seg', shape, affine)
    # the edition is that of the truth: the prediction's name may not reveal it
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
