"""Write predictions as NIfTI files with their scores; and re-export what scores folders and removes components."""

import functools
import json
import platform
import warnings
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import segmentation_models_pytorch as smp
import torch
import torchio as tio

import config
import metrics
from atomic import writeAtomically
from components import Tuning, applyRules, kindOf, relabelSmallET, removeSmallComponents, tunePostprocessing
from editions import CAVITY, labelsOf
from engine import predict, predictAll
from fingerprint import fingerprint
from identity import stretchingOf
from parallel import attempt, forEachPatient, leaveOut, usesProcesses
from patients import detectEdition, hasFile, spacingOf
from quality import describeDisagreement, measureMember
from saving import saveLabelNames, saveProbabilities, saveSegmentation
from scoring import noScores, readPrediction, readSettings, scoreFolder
from trained import followAll, membersFor, membersOf, trainedAmong, warnOfTrained

__all__ = [
    'Tuning',
    'applyRules',
    'predictFolder',
    'readPrediction',
    'relabelSmallET',
    'removeSmallComponents',
    'saveProbabilities',
    'saveSegmentation',
    'scoreFolder',
    'tunePostprocessing',
    'writeScores',
]


def predictFolder(df, model, folder, transform=None, rules=None, probabilities=False, part=None, **options):
    """Predict the patients of a file list into a folder, for upload and for tables.

    Patients that the model was trained on are segmented, but not scored. Of an ensemble (a list of models), a patient
    is predicted by the members that were not trained on it, so those of a cross-validation predict and score all.
    What is finished stays in the folder: a stopped call goes on with the patients that are missing, or whose files are
    newer than their segmentation. Under `joblib.parallel_config` the processes of its backend predict the patients.

    Args:
        df: file list.
        model, transform: as in `engine.predict`.
        folder: gets `upload/<patient>.nii.gz` on each patient's grid in its edition's labels, the labels' names for
            ITK-SNAP and 3D Slicer, `scores.csv`, `disagreement.csv` (see `quality`), `settings.json` and, with
            probabilities, `maps/<patient>.nii.gz` and `maps/<patient>_entropy.nii.gz`.
        rules: against small components, from `tunePostprocessing` on validation patients; None: none.
        probabilities: write the probabilities and their entropy too.
        part: (i, n): predict part i of n (from 0), every n-th patient, so that n processes or machines share the
            patients. The scores are in `scores.<i>of<n>.csv`; `scoreFolder` scores all when all parts have ended.
        **options: `patchStride`, `device`, `mirror` as in `engine.predict`.

    Returns:
        DataFrame as `metrics.scoreTable` returns it, of the patients of the file list or part; empty if none is scored.

    Raises:
        ValueError: the folder holds segmentations by other weights, options or rules; or as `engine.predictAll` and
            `applyRules`.
    """
    number, numParts = part or (0, 1)
    if not 0 <= number < numParts:
        raise ValueError(f'part is {part}; (i, n) with 0 <= i < n was expected.')
    folder, kind = Path(folder), kindOf(**options)
    made = {'weights': _checksumOfWeights(model), 'kind': kind, 'rules': _plainRules(rules)}
    with warnings.catch_warnings(action='ignore'):  # predictAll warns
        made['input'] = _describeInput(followAll(model, transform, kind['planes']))
        trained = membersFor(model, df)[1]
    before = _refuseOthers(folder, made)
    about = {**made, 'trainedOn': sorted({*before.get('trainedOn', ()), *trained}), **options}
    if before != json.loads(json.dumps(about, default=str)):  # parts that begin together write the same
        _writeSettings(folder, about)
    file = folder / (f'scores.{number}of{numParts}.csv' if part else 'scores.csv')
    df = df.iloc[number::numParts]
    table, noted = _readScores(file), file.with_name(file.name.replace('scores', 'disagreement'))
    isScored = df['seg'].notna().to_numpy() & ~df.index.astype(str).isin(trained)
    isDone = [_isFinished(paths, folder / 'upload' / f'{patient}.nii.gz') for patient, paths in df.iterrows()]
    isLeft = ~np.array(isDone, bool) | (isScored & ~df.index.astype(str).isin(table['patient']))
    isLeft |= ~df.index.astype(str).isin(_readScores(noted)['patient'])
    if not isLeft.all():
        print(f'{(~isLeft).sum()} of {len(df)} patients are finished in {folder}.')
    finish = functools.partial(_finishPatient, folder=folder, rules=rules, kind=kind, trained=trained)
    predicted = _predictByProcesses if usesProcesses() else _predictHere
    options |= {'transform': transform, 'probabilities': probabilities, 'measure': measureMember}
    for patient, disagreement, scores in predicted(df[isLeft], model, finish, **options):
        _addScores(metrics.scoreTable({patient: disagreement}), noted)
        if scores is not None:
            _addScores(metrics.scoreTable({patient: scores}), file)
    return _rowsOf(_readScores(file), df)


def _rowsOf(table, df):
    """Return the rows of a table of scores that belong to the patients of a file list, in its order."""
    order = {str(patient): row for row, patient in enumerate(df.index)}
    table = table[table['patient'].isin(order)]
    return table.sort_values('patient', key=lambda ids: ids.map(order), kind='stable', ignore_index=True)


def _predictHere(df, model, finish, **options):
    """Yield what `finish` returns for each patient, predicted in this process."""
    for patient, case in predictAll(df, model, **options):
        yield finish(df.loc[patient], case)


def _predictByProcesses(df, model, finish, **options):
    """Yield what `finish` returns for each patient; a process of joblib's predicts, writes and scores it."""
    members, trained = membersFor(model, df)
    warnOfTrained(trained, len(df))
    followAll(model, options['transform'], options.get('planes'))  # warns here: the processes' warnings are not seen
    function = functools.partial(_predictAndFinish, members=members, finish=finish, options=options)
    for number, result in enumerate(forEachPatient(function, df, 'predict')):
        if isinstance(result, Exception):
            leaveOut(result, f'{number} of {len(df)} patients were segmented before.')
        else:
            yield result


def _predictAndFinish(paths, members, finish, options):
    """Return what `finish` returns, or the error of bad data; other errors, such as a full disk, end the work."""
    case = attempt(functools.partial(predict, model=members[paths.name], **options))(paths)
    return case if isinstance(case, Exception) else finish(paths, case)


def _finishPatient(paths, case, folder, rules, kind, trained):
    """Write what `predict` returned for a patient; return its id, the table of disagreement, and the scores or None."""
    _, y, yhat, *probability, measured = case
    patient, spacing = paths.name, spacingOf(paths)
    yhat = applyRules(yhat, rules, spacing, kind)
    _saveWithNames(yhat, paths, folder)
    if labelsOf(detectEdition(paths)).get(CAVITY) == 0:
        yhat = yhat.masked_fill(yhat == CAVITY, 0)  # as it is written: the edition has no label for the cavity
    if probability:
        saveProbabilities(*probability, paths, folder / 'maps' / f'{patient}.nii.gz')
    isScored = y is not None and str(patient) not in trained
    scores = metrics.scorePatient(y, yhat, spacing) if isScored else None
    return patient, describeDisagreement(measured, yhat), scores


def _saveWithNames(yhat, paths, folder):
    """Write the segmentation of a patient into a folder, with the names and colors of its edition's labels."""
    saveSegmentation(yhat, paths, folder / 'upload' / f'{paths.name}.nii.gz')
    edition = detectEdition(paths)
    with suppress(BlockingIOError):  # another process is writing the same
        saveLabelNames(labelsOf(edition), folder / edition)


def _isFinished(paths, file):
    """Return whether a patient's segmentation is newer than its images and its truth."""
    given = [Path(paths[name]) for name in (*config.MODALITIES, 'seg') if hasFile(paths, name)]
    return file.is_file() and all(each.is_file() and each.stat().st_mtime <= file.stat().st_mtime for each in given)


def _readScores(file):
    """Return the table of a file of scores; empty if there is none."""
    return pd.read_csv(file, dtype={'patient': str}) if file.is_file() else noScores()


def _addScores(table, file):
    """Write a file of scores with the rows of a table in place of the same patients' rows, others as they are there."""
    before = _readScores(file)
    before = before[~before['patient'].isin(set(table['patient'].astype(str)))]
    table = pd.concat([before, table], ignore_index=True) if len(before) else table
    with writeAtomically(file) as part:
        table.to_csv(part, index=False)


def _describeInput(ways):
    """Return, as plain values, what the members of an ensemble are shown of a patient; a dict if it is the same."""
    try:
        transform = stretchingOf(ways[0].transform) or fingerprint(ways[0].transform)
    except ValueError:
        transform = 'unknown'
    described = json.loads(json.dumps([{**way._asdict(), 'transform': transform} for way in ways]))
    return described[0] if all(each == described[0] for each in described) else described


def _checksumOfWeights(model):
    """Return a checksum of the weights and buffers of a model, or of all members of an ensemble."""
    value = 0
    for member in membersOf(model):
        for _, tensor in sorted(member.state_dict().items()):
            value = zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy(), value)
    return f'{value:08x}'


def _plainRules(rules):
    return None if rules is None else {'ml': float(rules.ml), 'N': int(rules.N)}


def _refuseOthers(folder, made):
    """Return what `settings.json` of a folder says of its segmentations; raise a ValueError if `made` differs."""
    before = readSettings(folder).get('prediction', {})
    differing = [name for name in made if before.get(name) != made[name]]
    if before and differing:
        raise ValueError(
            f'{folder} holds segmentations with other {" and ".join(differing)}. Choose another folder, or delete it.'
        )
    return before


def writeScores(scores, folder, model=None, df=None, **options):
    """Write `scores.csv` and `settings.json` into a folder.

    Args:
        scores: dict of patient to the table of `metrics.scorePatient`.
        folder: folder to write to; made if missing.
        model: that made the predictions. Patients that it was trained on are left out of the table and named.
        df: their file list, so that patients with other ids are recognised by their files.
        **options: `patchStride` and `mirror` of the prediction, and what else the scores depend on.

    Returns:
        DataFrame: `metrics.scoreTable(scores)`.
    """
    if df is None:
        trained = [
            patient for patient in map(str, scores) if all(trainedAmong(each, [patient]) for each in membersOf(model))
        ]
    else:
        trained = membersFor(model, df.loc[list(scores)])[1]
    if trained:
        print(f'Not scored, because the model was trained on them: {", ".join(trained)}.')
    about = {'kind': kindOf(**options), 'rules': None, 'trainedOn': trained, **options}
    return _writeTable({patient: scores[patient] for patient in scores if str(patient) not in trained}, folder, about)


def _writeTable(scores, folder, about):
    """Write the table of some scores and what they depend on, as `writeScores` does, and return the table."""
    table = metrics.scoreTable(scores) if scores else noScores()
    with writeAtomically(Path(folder) / 'scores.csv') as part:
        table.to_csv(part, index=False)
    _writeSettings(folder, about)
    return table


def _writeSettings(folder, about):
    """Write `settings.json`: how predictions were made, the values of `config`, and versions of libraries.

    Editions of one's own, which are no plain values, are left out.
    """
    names = [name for name in dir(config) if name.isupper() and not name.startswith('_')]
    isSet = {name: name in vars(config) for name in names}
    versions = {'python': platform.python_version(), 'torch': torch.__version__}
    versions |= {'torchio': tio.__version__, 'segmentation_models_pytorch': smp.__version__}
    settings = {
        'prediction': about,
        'config': {name: getattr(config, name) for name in names if isSet[name] and name != 'OWN_EDITIONS'},
        'found': {name: getattr(config, name) for name in names if not isSet[name]},
        'versions': versions,
    }
    with writeAtomically(Path(folder) / 'settings.json') as part:
        part.write_text(json.dumps(settings, indent=1, default=str))
