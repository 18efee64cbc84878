"""Record what patches were cut from and what a model was trained on, and compare the two.

A provenance is a dict of plain values: `settings` (how patients were cut, see `SETTINGS`) and `patients` (id -> column
-> checksum of the file). `preprocess.makeDataset` writes one into the patch file. A model that is trained on the file
has a copy as `model.provenance`, and so has every checkpoint. The copy also has `validated` (patients, in the same
form), `earlier` (patients of earlier trainings, if the run started from their weights) and, in `settings`, the
`activation` and the `dropout` of modalities. That of a model folder has `voxels` too (id -> checksums of the voxels).
"""

import json
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import torch
import torchio as tio

import config
from patients.cohort import haveVoxelsOf
from patients.editions import classesOf, known, withoutTime
from patients.reading import detectEdition, hasFile
from patients.volumes import planesOf
from transforms import volumeTransform

FORMAT = 6  # of the patch file; raised when its layout changes
INPUT = {  # input settings: they decide what of a patient a model is given; with their names in messages
    'modalities': 'config.MODALITIES',
    'classes': 'config.NO_CLASSES or config.CLASS_NAMES',
    'patchSize': 'config.PATCH_SIZE',
    'planes': 'config.PLANES',
    'stretching': '[config.STRETCH_PERCENTILES, config.STRETCH_RANGE]',
}
SETTINGS = {  # input settings, and those that decide which patches are cut
    **INPUT,
    'editions': "the labels' classes in each edition",
    'channels': 'the channels of 4-D files in each edition of config.OWN_EDITIONS',
    'patchStride': 'config.PATCH_STRIDE',
    'sliceStep': '[config.SLICE_STEP, config.SEED]',
    'randomStarts': 'the seed of config.RANDOM_STARTS',
    'background': '[config.BACKGROUND_SHARE, config.SEED]',
}


def describe(df, transform=None):
    """Return the settings with which the patients of a file list are cut.

    Args:
        df: file list.
        transform: torchio transform of the whole volume in place of `transforms.volumeTransform()`; `stretching` is
            then None.

    Returns:
        dict of plain values with the keys of `SETTINGS`: `modalities` in order, `classes` (names), `patchSize`,
        `planes`, `stretching` ([percentiles, range]), `editions` (name -> [label, class] pairs), `channels` (name ->
        modality -> index, where `config.OWN_EDITIONS` has 4-D files), `patchStride`, `sliceStep` ([step, seed], or None
        if every slice is cut), `randomStarts` (the seed, or None) and `background` ([fraction, seed], or None; fraction
        None: it follows the data). `preprocess.makeDataset` adds what it finds in the data: `share` (the fraction) and
        `spacing` (the median voxel size in mm along (D, W, H)).

    Raises:
        ValueError: an edition has other classes than `config`.
    """
    editions = sorted({_editionOf(paths) for _, paths in df.iterrows()} - {None})
    share, step, seed = plain(config.BACKGROUND_SHARE), plain(config.SLICE_STEP), plain(config.SEED)
    channels = {name: dict(known()[name].channels or {}) for name in editions if name in config.OWN_EDITIONS}
    return {
        **configured(),
        **({} if transform is None else {'stretching': None}),
        'editions': {name: [[*pair] for pair in classesOf(name).items()] for name in editions},
        **({'channels': channels} if any(channels.values()) else {}),
        'patchStride': plain(config.PATCH_STRIDE),
        'sliceStep': [step, seed] if step > 1 else None,
        'randomStarts': seed if config.RANDOM_STARTS else None,
        'background': None if share == 0 else [share, seed],
    }


def configured(planes=()):
    """Return the input settings, `INPUT`, that `config` has; with the `planes` that were cut, if they are among its."""
    wanted = planesOf(config.PLANES)
    return {
        'modalities': plain(config.MODALITIES),
        'classes': plain(config.CLASS_NAMES),
        'patchSize': plain(config.PATCH_SIZE),
        'planes': list(planes) if planes and set(planes) <= set(wanted) else wanted,
        'stretching': [[float(value) for value in pair] for pair in (config.STRETCH_PERCENTILES, config.STRETCH_RANGE)],
    }


def _editionOf(paths):
    try:
        return detectEdition(paths)
    except ValueError:  # raised again when the patient's labels are read
        return None


def plain(value):
    """Return a number or sequence as JSON reads it: Python numbers for NumPy's, lists for tuples."""
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def checksums(paths, known=None):
    """Return the checksums of the files of a patient that patches are cut from.

    They are taken from the end of a `.gz` file. Any other file is read, unless its size, time and inode are known.

    Args:
        paths: one row of the file list.
        known: dict of path -> [size, time, inode, checksum] of earlier calls. New checksums are added to it.

    Returns:
        dict of column -> checksum (text), for `config.MODALITIES` and `seg`; None for a file that does not exist.
    """
    known, found = {} if known is None else known, {}
    for column in (*config.MODALITIES, 'seg'):
        file = Path(paths[column]) if hasFile(paths, column) else None
        found[column] = _checksumOf(file, known) if file and file.is_file() else None
    return found


def _checksumOf(file, known):
    """Return the CRC-32 and length of a file's content as text, equal for a file and its `.gz`; see `checksums`."""
    if file.name.lower().endswith('.gz'):
        with open(file, 'rb') as stream:
            stream.seek(-min(8, file.stat().st_size), 2)
            value, size = struct.unpack('<II', stream.read().rjust(8, b'\0'))
        if value or size:  # bgzip ends with an empty part
            return f'{value:08x}{size:x}'
    found = file.stat()
    state = [found.st_size, found.st_mtime_ns, found.st_ino]
    if known.get(str(file), [])[:3] != state:
        value = 0
        with open(file, 'rb') as stream:
            while block := stream.read(2**22):
                value = zlib.crc32(block, value)
        known[str(file)] = [*state, f'{value:08x}{found.st_size & 0xFFFFFFFF:x}']
    return known[str(file)][3]


def readProvenance(file):
    """Return the provenance of a patch file or shard, an open h5py.File or a path.

    Raises:
        KeyError, OSError, ValueError: not a patch file of this version.
    """
    if isinstance(file, h5py.File):
        found = json.loads(file['provenance'][()])
        if found['format'] != FORMAT:
            raise ValueError(f'{file.filename} has the format {found["format"]}, {FORMAT} was expected: cut it again.')
        return found
    with h5py.File(file, 'r') as opened:
        return readProvenance(opened)


def differences(found, expected, names=SETTINGS, patients=True):
    """Return how two provenances differ, a list of texts; empty if they agree.

    Args:
        found, expected: provenances; "only there" in a text means only in `found`.
        names: settings to compare, some of `SETTINGS`.
        patients: compare the patients too, by id and by the content of their files.
    """
    one, other = found['settings'], expected['settings']
    texts = [
        f'{SETTINGS[name]} is {one.get(name)}, not {other.get(name)}'
        for name in names
        if one.get(name) != other.get(name)
    ]
    one, other = (found['patients'], expected['patients']) if patients else ({}, {})
    for words, ids in (
        ('only there', one.keys() - other.keys()),
        ('only here', other.keys() - one.keys()),
        ('other files', {patient for patient in one.keys() & other.keys() if one[patient] != other[patient]}),
    ):
        if ids:
            texts.append(f'{len(ids)} {words} ({", ".join(sorted(ids)[:3])}{", ..." * (len(ids) > 3)})')
    return texts


def checkPatchFile(file, found):
    """Raise a ValueError if a patch file was cut with other input settings or another edition than `config` has.

    Args:
        file: its path, for the message.
        found: its provenance. `stretching` is not compared if a transform was given to `preprocess.makeDataset`.
    """
    expected = {'settings': configured(found['settings']['planes'])}
    names = [name for name in INPUT if name != 'stretching' or found['settings'][name]]
    texts = differences(found, expected, names, patients=False)
    editions, declared = found['settings']['editions'], config.EDITION
    if declared is not None and declared not in editions:
        pattern = known()[declared].claims or known()[declared].patient  # the ids that the declared edition takes
        if any(re.fullmatch(pattern, patient) for patient in found['patients']):
            texts.append(f'its patients are of {", ".join(editions)}, not config.EDITION = {declared!r}')
    if texts:
        raise ValueError(
            f'{file} was cut with other settings: {"; ".join(texts)}. Cut it again with preprocess.makeDataset, or '
            'set config as it was.'
        )


# What a model was trained on


def unwrap(model):
    """Return the model that a wrapper holds (DataParallel, AveragedModel, torch.compile), or the model itself."""
    while isinstance(inner := getattr(model, '_orig_mod', getattr(model, 'module', None)), torch.nn.Module):
        model = inner
    return model


def provenanceOf(model):
    """Return the provenance of a model, or None."""
    return getattr(unwrap(model), 'provenance', None)


def ofDataset(dataset):
    """Return the provenance of a dataset, only with the patients whose patches it has; None if it is not known.

    Args:
        dataset: `dataset.BRATSDataset`, a subset or concatenation of them, or a wrapper with one as its `dataset`.
    """
    if isinstance(dataset, torch.utils.data.ConcatDataset):
        parts = [ofDataset(each) for each in dataset.datasets]
        if None in parts or any(differences(parts[0], each, patients=False) for each in parts):
            return None
        patients = {patient: sums for each in parts for patient, sums in each['patients'].items()}
        return {**parts[0], 'patients': patients}
    indices = slice(None)
    while not hasattr(dataset, 'provenance') and hasattr(dataset, 'dataset'):
        if isinstance(dataset, torch.utils.data.Subset):
            indices = np.asarray(dataset.indices)[indices]
        dataset = dataset.dataset
    found = getattr(dataset, 'provenance', None)
    if found is None:
        return None
    ids, numbers = list(found['patients']), np.unique(dataset.patientNumbers[indices])
    return {**found, 'patients': {ids[number]: found['patients'][ids[number]] for number in numbers}}


def noteTraining(model, dataset, activation):
    """Record in `model.provenance` what a model is trained on.

    Args:
        model: torch module.
        dataset: of the training loader, as in `ofDataset`. If its provenance is not known, nothing is recorded; a
            warning says so if the model has a provenance already.
        activation: 'softmax' or 'sigmoid', which the loss applies to the model's logits.

    Raises:
        ValueError: the model has been trained on other patients, files or settings, or with the other activation.
    """
    found, before = ofDataset(dataset), provenanceOf(model)
    if found is None:
        if before:
            warnings.warn('The patients of this loader are not known; scoring them later is not refused.', stacklevel=3)
        return
    if before and before['patients']:
        texts = differences(before, found)
        if before['settings']['activation'] != activation:
            texts.append(f'the loss has a {before["settings"]["activation"]}, not a {activation}')
        if texts:
            raise ValueError(
                f'The model has been trained on other data than this loader has: {"; ".join(texts)}. '
                'Begin with a new model, or go on from saved weights (checkpoints.loadModel).'
            )
    elif before and (texts := differences(before, found, ('modalities', 'classes', 'stretching'), patients=False)):
        raise ValueError(f'The weights were trained on other settings: {"; ".join(texts)}.')
    unwrap(model).provenance = {
        'settings': {**found['settings'], 'activation': activation, 'dropout': plain(config.MODALITY_DROPOUT)},
        'patients': found['patients'],
        'earlier': before['earlier'] if before else {},
        'validated': before['validated'] if before else {},
        'voxels': before.get('voxels', {}) if before else {},
    }


def noteValidation(model, dataset):
    """Record in `model.provenance` the patients of a validation, and warn of those that the model was trained on.

    Raises:
        ValueError: the patches were cut with other settings than those of the training.
    """
    found, before = ofDataset(dataset), provenanceOf(model)
    if found is None or not before:
        return
    planes = [set(each['settings']['planes']) for each in (found, before)]
    names = [name for name in INPUT if name != 'planes' or not planes[0] <= planes[1]]  # of thick slices one is cut
    if before['patients'] and (texts := differences(before, found, names, patients=False)):
        raise ValueError(f'The validation patches were cut otherwise than those of training: {"; ".join(texts)}.')
    before['validated'] = found['patients']
    warnOfTrained(trainedAmong(model, found['patients']), len(found['patients']))


def asEarlier(provenance):
    """Return the provenance for a run that starts from trained weights: their patients become `earlier` ones."""
    if not provenance:
        return None
    return {**provenance, 'patients': {}, 'validated': {}, 'earlier': seenBy(provenance)}


def seenBy(provenance):
    """Return all patients that a model was trained on, the `earlier` ones too: id -> column -> checksum."""
    return {**provenance['earlier'], **provenance['patients']} if provenance else {}


def trainedAmong(model, ids):
    """Return those of the patient ids whose subject a model was trained on, in the same scan or another one."""
    subjects = {withoutTime(patient) for patient in seenBy(provenanceOf(model))}
    return [str(patient) for patient in ids if withoutTime(patient) in subjects]


def trainedPatients(model, df):
    """Return the ids of the patients of a file list that a model was trained on.

    A patient counts as trained on if the training had its images, or a scan of the same subject. If the training
    had the same id with entirely different images, it is another patient, and a warning says so.

    Args:
        model: a model; if it has no provenance the list is empty.
        df: file list. Images under other ids are recognized in `.gz` files, whose checksums are at their ends; in any
            file if the model has the checksums of the voxels, as those of a folder of `deploy.packModel`.
    """
    provenance = provenanceOf(model)
    seen, voxels = seenBy(provenance), (provenance or {}).get('voxels', {})
    images = {value for sums in seen.values() for name, value in sums.items() if name != 'seg'}
    byName, trained = set(trainedAmong(model, df.index)), []
    if not seen:
        return trained
    for (patient, paths), isKnown in zip(df.iterrows(), haveVoxelsOf(df, voxels), strict=True):
        patient, isSame = str(patient), isKnown or _hasImagesOf(paths, seen, images)
        if not isSame and patient in seen and _isAnother(paths, seen[patient]):
            text = f'{patient} has the name of a patient that the model was trained on, but other images.'
            warnings.warn(text, stacklevel=3)
        elif isSame or patient in byName:
            trained.append(patient)
    return trained


def _isAnother(paths, sums):
    """Return whether all images of a patient differ from those of the training under the same id, `sums`."""
    own = {name: value for name, value in checksums(paths).items() if name != 'seg' and value and sums.get(name)}
    return bool(own) and all(sums[name] != value for name, value in own.items())


def _hasImagesOf(paths, seen, images):
    """Return whether the `.gz` images of a patient are those of one that was `seen`; `images` has all checksums.

    One image is not enough: where a modality is missing, several patients may have the same empty one.
    """
    files = {name: Path(paths[name]) for name in config.MODALITIES if hasFile(paths, name)}
    files = {name: file for name, file in files.items() if file.suffix.lower() == '.gz' and file.is_file()}
    own = {name: _checksumOf(file, {}) for name, file in files.items()}
    if images.isdisjoint(own.values()):
        return False
    pairs = ([(value, sums[name]) for name, value in own.items() if sums.get(name)] for sums in seen.values())
    return any(found and all(one == other for one, other in found) for found in pairs)


def membersOf(model):
    """Return the members of an ensemble as a list; of a single model, a list of one.

    Raises:
        ValueError: an empty list.
    """
    members = list(model) if isinstance(model, (list, tuple)) else [model]
    if not members:
        raise ValueError('The list of models is empty; at least one was expected.')
    return members


def membersFor(model, df):
    """Return the models that predict each patient: the members that were not trained on it, or all if all were.

    Args:
        model: a model, or a list of the members of an ensemble.
        df: file list.

    Returns:
        members: dict of patient -> list of models.
        trained: ids of the patients that every member was trained on.
    """
    models = membersOf(model)
    seen = [set(trainedPatients(member, df)) for member in models]
    unseen = {
        patient: [member for member, ids in zip(models, seen, strict=True) if str(patient) not in ids]
        for patient in df.index
    }
    return {patient: some or models for patient, some in unseen.items()}, [str(p) for p in df.index if not unseen[p]]


def warnOfTrained(trained, numPatients):
    """Warn if a model was trained on patients of a loader or file list.

    Args:
        trained: their ids; empty: no warning.
        numPatients: number of patients of the loader or file list.
    """
    if trained:
        names = ', '.join(trained[:5]) + ', ...' * (len(trained) > 5)
        warnings.warn(
            f'The model was trained on {len(trained)} of {numPatients} patients: {names}. Their scores are no test.',
            stacklevel=3,
        )


# Prediction


class Input(NamedTuple):
    """The input settings of a prediction."""

    modalities: list  # names, in the order of the channels
    transform: Callable  # torchio transform of the whole volume
    patchSize: int  # pixels of a window
    planes: list  # names of the planes whose slices are predicted
    activation: str  # 'softmax' or 'sigmoid': turns logits into probabilities
    spacing: list | None  # median voxel size of the training in mm along (D, W, H); None: unknown
    mayLack: bool  # modalities may be missing, as some were in the training


def inputsOf(model, transform=None, planes=None):
    """Return a list of the `Input` of each member of an ensemble; see `inputOf`.

    Raises:
        ValueError: as in `inputOf`; or the members were trained on other modalities or stretchings than the first.
    """
    inputs = [inputOf(member, transform, planes) for member in membersOf(model)]
    for number, each in enumerate(inputs):
        own, first = ([one.modalities, stretchingsIn(one.transform)] for one in (each, inputs[0]))
        if own != first:
            raise ValueError(
                f'Model {number + 1} of the ensemble was trained on {own[0]} stretched by {own[1]}, the first one on '
                f'{first[0]} by {first[1]}: their probabilities cannot be averaged.'
            )
    return [each._replace(mayLack=all(other.mayLack for other in inputs)) for each in inputs]


def inputOf(model, transform=None, planes=None):
    """Return the input settings of the training. Warn where `config` differs; fewer planes than its are no difference.

    Args:
        model: if it has no provenance, the settings of `config` are returned.
        transform: torchio transform of the whole volume; None: the stretching of the training.
        planes: names of planes; None: those of the training.

    Returns:
        Input.

    Raises:
        ValueError: the training used a transform of your own, and none is given; the given transform stretches in
            another way than the training; the model predicts other classes than `config`; or a plane does not exist.
    """
    provenance, planes = provenanceOf(model), planes and planesOf(planes)
    if not provenance:
        own, transform = configured(), volumeTransform() if transform is None else transform
        return Input(own['modalities'], transform, own['patchSize'], planes or own['planes'], 'softmax', None, False)
    settings = provenance['settings']
    wanted = {'settings': configured(settings['planes'])}
    if texts := differences(wanted, provenance, ['classes'], patients=False):
        raise ValueError(f'The model predicts {settings["classes"]}, but {texts[0]}.')
    compared = ['modalities', 'patchSize', 'planes']
    if transform is None and settings['stretching'] is None:
        raise ValueError(
            'The model was trained on patches that a transform of your own made: give predict the same one '
            '(transform = ...).'
        )
    if transform is None:
        transform = volumeTransform(*settings['stretching'], len(settings['modalities']))
        compared.append('stretching')
    for given in stretchingsIn(transform) if settings['stretching'] else ():
        if given != settings['stretching']:
            raise ValueError(
                f'The transform stretches the percentiles {given[0]} to {given[1]}, but the model was trained on '
                f'{settings["stretching"][0]} and {settings["stretching"][1]}. Without a transform, predict uses the '
                'settings of the training.'
            )
    if texts := differences(wanted, provenance, compared, patients=False):
        warnings.warn(f'The settings of the training are used where config differs: {"; ".join(texts)}.', stacklevel=4)
    planes, spacing = planes or list(settings['planes']), settings.get('spacing')
    mayLack = bool(settings.get('dropout'))
    own = settings['modalities'], transform, settings['patchSize'], planes, settings['activation'], spacing, mayLack
    return Input(*own)


def stretchingsIn(transform):
    """Return a list of [percentiles, range], one for each stretching within a torchio transform."""
    if isinstance(transform, tio.Compose):
        return [found for child in transform.transforms for found in stretchingsIn(child)]
    if isinstance(transform, tio.OneOf):
        return [found for child in transform.transforms_dict for found in stretchingsIn(child)]
    if not isinstance(transform, tio.RescaleIntensity):
        return []
    pairs = transform.percentiles, (transform.out_min, transform.out_max)
    return [[[float(value) for value in pair] for pair in pairs]]
