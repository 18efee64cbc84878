"""Describe what a network has seen, and compare it wherever patch file, checkpoint and prediction meet."""

import json
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import segmentation_models_pytorch as smp
import torch
import torchio as tio

import config
from cohort import withoutTime
from fingerprint import fingerprint
from patients import EDITIONS, detectEdition, hasFile, maskFunction
from transforms import StretchHistogram, volumeTransform

# Parts of an identity that decide what a network sees, with the words for them
SEEN = {
    'modalities': 'config.MODALITIES',
    'classes': 'config.CLASS_NAMES',
    'patchSize': 'config.PATCH_SIZE',
    'stretching': '[config.STRETCH_PERCENTILES, config.STRETCH_RANGE]',
}
# Further parts that decide which patches there are
CUT = {
    'editions': "the labels' classes in each edition",
    'patchStride': 'config.PATCH_STRIDE',
    'background': '[config.BACKGROUND_SHARE, config.SEED]',
    'transform': 'the transform of the volumes',
}


def identify(dataframe, transform=None):
    """Return all that decides what patches of a file list hold, but for the content of its files.

    Args:
        dataframe: file list.
        transform: torchio transform of the whole volume; None: `volumeTransform()`.

    Returns:
        dict of plain values, which JSON and a checkpoint can hold: `modalities` in order, `classes` (names), `editions`
        (name -> [label, class] pairs), `patchSize`, `patchStride`, `background` ([fraction, seed], or None without
        background patches), `stretching` ([percentiles, range], or None if another transform is given) and `transform`
        (its fingerprint, or None if it only stretches). `makeDataset` adds `patients`: id -> column -> checksum.

    Raises:
        ValueError: the transform has no fingerprint, see `fingerprint`.
    """
    stretching = stretchingOf(volumeTransform() if transform is None else transform)
    names = {_editionOf(paths) for _, paths in dataframe.iterrows()} - {None}
    share = plain(config.BACKGROUND_SHARE)
    return {
        **{name: value for name, value in _configured().items() if name != 'stretching'},
        'editions': {name: [[*pair] for pair in EDITIONS[name].classes.items()] for name in sorted(names)},
        'patchStride': plain(config.PATCH_STRIDE),
        'background': [share, plain(config.SEED)] if share else None,
        'stretching': stretching,
        'transform': None if stretching else fingerprint(transform),
    }


def _configured():
    """Return the parts `SEEN` of an identity as `config` sets them."""
    return {
        'modalities': plain(config.MODALITIES),
        'classes': plain(config.CLASS_NAMES),
        'patchSize': plain(config.PATCH_SIZE),
        'stretching': stretchingOf(volumeTransform()),
    }


def _editionOf(paths):
    try:
        return detectEdition(paths)
    except ValueError:  # raised again when the patient's labels are read
        return None


def plain(value):
    """Return a number or sequence as JSON returns it: no NumPy numbers, lists for tuples."""
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def stretchingOf(transform):
    """Return [percentiles, range] if a transform does nothing but stretch the histogram of a brain, else None.

    Args:
        transform: any callable; `volumeTransform()` and a Compose of it alone stretch.
    """
    while isinstance(transform, tio.Compose) and len(transform.transforms) == 1:
        [transform] = transform.transforms
    isPlain = type(transform) is StretchHistogram and transform.masking_method is maskFunction
    if not isPlain or transform.in_min_max is not None or transform.probability != 1:
        return None
    return _stretchingsIn(transform)[0]


def _stretchingsIn(transform):
    """Return [percentiles, range] of each stretching that a transform holds."""
    if isinstance(transform, tio.Compose):
        return [found for child in transform.transforms for found in _stretchingsIn(child)]
    if not isinstance(transform, tio.RescaleIntensity):
        return []
    pairs = transform.percentiles, (transform.out_min, transform.out_max)
    return [[[float(value) for value in pair] for pair in pairs]]


def checksums(paths, known=None):
    """Return a checksum of the content of each file of a patient that patches are cut from.

    A `.gz` file ends with the checksum and length of its content: these are taken. Any other file is read, unless its
    size and time are known.

    Args:
        paths: one row of the file list.
        known: dict of path -> [size, time, checksum] of earlier calls; what is read is added.

    Returns:
        dict of column -> checksum (text), for `config.MODALITIES` and `seg`; None for a file that does not exist.
    """
    known = {} if known is None else known
    found = {}
    for column in (*config.MODALITIES, 'seg'):
        file = Path(paths[column]) if hasFile(paths, column) else None
        found[column] = _checksum(file, known) if file and file.is_file() else None
    return found


def _checksum(file, known):
    """Return the checksum of a file's content."""
    if file.name.lower().endswith('.gz'):
        with open(file, 'rb') as stream:
            stream.seek(-min(8, file.stat().st_size), 2)  # CRC-32 and length of what is packed
            return stream.read().hex()
    state = file.stat()
    before = known.get(str(file))
    if before is None or before[:2] != [state.st_size, state.st_mtime_ns]:
        value = 0
        with open(file, 'rb') as stream:
            while block := stream.read(2**22):
                value = zlib.crc32(block, value)
        known[str(file)] = before = [state.st_size, state.st_mtime_ns, f'{value:08x}{state.st_size:x}']
    return before[2]


def readIdentity(file):
    """Return the identity that `makeDataset` wrote into a patch file.

    Args:
        file: path, or open h5py.File.

    Returns:
        dict as `identify` returns it, with `patients` and, for `checksums`, `files`.

    Raises:
        KeyError, OSError, ValueError: not a patch file of this version.
    """
    if not isinstance(file, h5py.File):
        with h5py.File(file, 'r') as opened:
            return readIdentity(opened)
    return json.loads(file['identity'][()])


def differences(found, expected, names):
    """Return in words how two identities differ.

    Args:
        found, expected: identities.
        names: dict of the parts to compare -> words for each, such as `SEEN`.

    Returns:
        list of texts, empty if they agree.
    """
    differing = [name for name in names if found.get(name) != expected.get(name)]
    return [f'{names[name]} is {found.get(name)}, not {expected.get(name)}' for name in differing]


def patientDifferences(found, expected):
    """Return in words how the patients of two identities differ, by id or by content; '' if they agree."""
    one, other = found['patients'], expected['patients']
    texts = []
    for words, ids in (
        ('only there', one.keys() - other.keys()),
        ('only here', other.keys() - one.keys()),
        ('other files', {patient for patient in one.keys() & other.keys() if one[patient] != other[patient]}),
    ):
        if ids:
            texts.append(f'{len(ids)} {words} ({", ".join(sorted(ids)[:3])}{", ..." * (len(ids) > 3)})')
    return '; '.join(texts)


def checkPatchFile(file, found):
    """Raise a ValueError if a patch file was cut with other settings than `config` has.

    Args:
        file: its path, for the message.
        found: its identity. With another transform than stretching, the stretching is not compared.
    """
    names = SEEN if found['stretching'] else {name: words for name, words in SEEN.items() if name != 'stretching'}
    differing = differences(found, _configured(), names)
    if config.EDITION is not None and config.EDITION not in found['editions']:
        differing.append(f'its patients are of {", ".join(found["editions"])}, not config.EDITION = {config.EDITION!r}')
    if differing:
        raise ValueError(
            f'{file} was cut with other settings: {"; ".join(differing)}. Cut it again with preprocess.makeDataset, or '
            'set config as it was.'
        )


def noteTraining(model, dataset, criterion):
    """Note at a model, as `model.identity`, what it is trained on.

    Args:
        model: torch module.
        dataset: of the training loader: `utils.BRATSDataset` or a subset of one. Nothing is noted for another one.
        criterion: loss. smp's focal loss treats each class by itself (one against the rest), so the model's
            probabilities are sigmoids; for any other loss they are a softmax.

    Raises:
        ValueError: the model has been trained on other patients, files or settings.
    """
    found = identityOf(dataset)
    if found is None:
        return
    before = getattr(model, 'identity', None)
    if before and before['patients']:
        differing = [*differences(before, found, {**SEEN, **CUT}), patientDifferences(before, found)]
        if any(differing):
            raise ValueError(
                f'The model has been trained on other data than this loader has: {"; ".join(filter(None, differing))}. '
                'Begin with a new model, or go on from saved weights (checkpoints.loadModel).'
            )
    if before and not before['patients'] and (differing := differences(before, found, SEEN)):
        raise ValueError(f'The weights were trained on other settings: {"; ".join(differing)}.')
    isOneVsRest = isinstance(criterion, smp.losses.FocalLoss)
    model.identity = {
        **{name: found[name] for name in (*SEEN, *CUT, 'patients')},
        'activation': 'sigmoid' if isOneVsRest else 'softmax',
        'earlier': before['earlier'] if before else {},
    }


def asEarlier(identity):
    """Return the identity of weights from which a new run starts: its patients become `earlier` ones."""
    return identity and {**identity, 'patients': {}, 'earlier': {**identity['earlier'], **identity['patients']}}


def identityOf(dataset):
    """Return the identity of a dataset of patches, or of a subset of one; None for another dataset."""
    while isinstance(dataset, torch.utils.data.Subset):
        dataset = dataset.dataset
    return getattr(dataset, 'identity', None)


def trainedAmong(model, ids):
    """Return the patient ids of a list that a model was trained on: the same id, or another time point of the subject.

    Args:
        model: with an `identity`; without one nothing is known, and the list is empty.
        ids: patient ids.
    """
    subjects = {withoutTime(patient) for patient in _trainedOn(model)}
    return [patient for patient in ids if withoutTime(patient) in subjects]


def _trainedOn(model):
    """Return all patients that a model was trained on: id -> column -> checksum."""
    identity = getattr(model, 'identity', None) or {'earlier': {}, 'patients': {}}
    return {**identity['earlier'], **identity['patients']}


def trainedPatients(model, df):
    """Return the ids of a file list that a model was trained on: as in `trainedAmong`, or by the content of an image.

    Args:
        model: as in `trainedAmong`.
        df: file list. The content is compared for `.gz` files only, whose checksum need not be computed.
    """
    images = {value for columns in _trainedOn(model).values() for name, value in columns.items() if name != 'seg'}
    byName = set(trainedAmong(model, df.index))
    return [patient for patient, paths in df.iterrows() if patient in byName or _hasImageOf(paths, images)]


def _hasImageOf(paths, images):
    """Return whether a patient has a packed image whose checksum is in a set."""
    if not images:
        return False
    files = [Path(paths[column]) for column in config.MODALITIES if hasFile(paths, column)]
    packed = [file for file in files if file.name.lower().endswith('.gz') and file.is_file()]
    return any(_checksum(file, {}) in images for file in packed)


def warnOfTrained(trained, numPatients):
    """Warn of the patients (ids) of a loader or file list that a model was trained on, in one sentence."""
    if trained:
        names = ', '.join(trained[:5]) + ', ...' * (len(trained) > 5)
        warnings.warn(
            f'The model was trained on {len(trained)} of {numPatients} patients: {names}. Their scores are no test.',
            stacklevel=3,
        )


class Way(NamedTuple):
    """How a model is shown a patient."""

    modalities: list  # names, in the order of the channels
    transform: Callable  # of the whole volume
    patchSize: int  # pixels of a window
    activation: str  # that turns logits into probabilities: 'softmax' or 'sigmoid'


def follow(model, transform):
    """Return how a model has to be shown a patient: as it was trained, whatever `config` says; tell what differs.

    Args:
        model: with or without an `identity`; without one, `config` is followed.
        transform: torchio transform of the volume that the caller gave, or None.

    Returns:
        Way.

    Raises:
        ValueError: the model was trained on patches that another transform made, and none is given; or the given one
            stretches otherwise; or the model predicts other classes.
    """
    configured, identity = _configured(), getattr(model, 'identity', None)
    if not identity:
        transform = volumeTransform() if transform is None else transform
        return Way(configured['modalities'], transform, configured['patchSize'], 'softmax')
    if identity['classes'] != configured['classes']:
        raise ValueError(f'The model predicts {identity["classes"]}, but {differences(configured, identity, SEEN)[0]}.')
    differing = differences(configured, identity, {name: SEEN[name] for name in ('modalities', 'patchSize')})
    trained = identity['stretching']
    if transform is None and trained is None:
        raise ValueError(
            'The model was trained on patches that a transform of your own made: give predict the same one '
            '(transform = ...).'
        )
    if transform is None:
        transform = volumeTransform(*trained, len(identity['modalities']))
        differing += differences(configured, identity, {'stretching': SEEN['stretching']})
    elif others := [given for given in _stretchingsIn(transform) if trained and given != trained]:
        raise ValueError(
            f'The transform stretches the percentiles {others[0][0]} to {others[0][1]}, but the model was trained on '
            f'{trained[0]} and {trained[1]}. Without a transform, predict follows the model.'
        )
    if differing:
        warnings.warn(f'The model is followed where config differs: {"; ".join(differing)}.', stacklevel=3)
    return Way(identity['modalities'], transform, identity['patchSize'], identity['activation'])
