"""Remember what a model was trained on, and show it a patient as it was trained."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import segmentation_models_pytorch as smp
import torch

import config
from editions import withoutTime
from identity import (
    CUT,
    SEEN,
    checksumOf,
    checksums,
    configured,
    differences,
    patientDifferences,
    stretchingsIn,
)
from patients import hasFile
from transforms import volumeTransform
from volumes import PLANES


def bare(model):
    """Return the model that a wrapper holds (DataParallel, AveragedModel, torch.compile), or the model itself."""
    while isinstance(inner := getattr(model, '_orig_mod', getattr(model, 'module', None)), torch.nn.Module):
        model = inner
    return model


def identityOf(model):
    """Return what a model was trained on, or None: the `identity` of `noteTraining`, or of its checkpoint."""
    return getattr(bare(model), 'identity', None)


def noteTraining(model, dataset, criterion):
    """Note at a model, as `model.identity`, what it is trained on.

    Args:
        model: torch module.
        dataset: of the training loader: `utils.BRATSDataset`, a subset or concatenation of such, or a dataset that
            holds one as its `dataset`. Nothing is noted for another one, with a warning if something was noted before.
        criterion: loss. smp's focal loss treats each class by itself (one against the rest), so the model's
            probabilities are sigmoids; for any other loss they are a softmax.

    Raises:
        ValueError: the model has been trained on other patients, files or settings, or with the other kind of loss.
    """
    found, before = datasetIdentity(dataset), identityOf(model)
    activation = 'sigmoid' if isinstance(criterion, smp.losses.FocalLoss) else 'softmax'
    if found is None:
        if before:
            warnings.warn('The patients of this loader are not known; scoring them later is not refused.', stacklevel=3)
        return
    if before and before['patients']:
        differing = [*differences(before, found, {**SEEN, **CUT}), patientDifferences(before, found)]
        if before['activation'] != activation:
            differing.append(f'the loss has a {before["activation"]}, not a {activation}')
        if any(differing):
            raise ValueError(
                f'The model has been trained on other data than this loader has: {"; ".join(filter(None, differing))}. '
                'Begin with a new model, or go on from saved weights (checkpoints.loadModel).'
            )
    elif before:
        seen = {name: words for name, words in SEEN.items() if name not in ('patchSize', 'planes')}
        if differing := differences(before, found, seen):
            raise ValueError(f'The weights were trained on other settings: {"; ".join(differing)}.')
    bare(model).identity = {
        **{name: found[name] for name in (*SEEN, *CUT, 'patients')},
        'activation': activation,
        'earlier': before['earlier'] if before else {},
        'validated': before['validated'] if before else {},
    }


def noteValidation(model, dataset):
    """Note at a model the patients it is validated on, and warn of those that it was trained on.

    Raises:
        ValueError: the patches were cut otherwise than those of the training.
    """
    found, before = datasetIdentity(dataset), identityOf(model)
    if found is None or not before:
        return
    compared = {**SEEN, 'transform': CUT['transform']}
    if before['patients'] and (differing := differences(before, found, compared)):
        raise ValueError(f'The validation patches were cut otherwise than those of training: {"; ".join(differing)}.')
    before['validated'] = found['patients']
    warnOfTrained(trainedAmong(model, found['patients']), len(found['patients']))


def asEarlier(identity):
    """Return the identity of weights from which a new run starts: its patients become `earlier` ones."""
    if not identity:
        return identity
    earlier = {**identity['earlier'], **identity['patients']}
    return {**identity, 'patients': {}, 'validated': {}, 'earlier': earlier}


def datasetIdentity(dataset):
    """Return the identity of a dataset of patches, with the patients that are in it; None for another dataset."""
    if isinstance(dataset, torch.utils.data.ConcatDataset):
        parts = [datasetIdentity(part) for part in dataset.datasets]
        if None in parts or any(differences(parts[0], part, {**SEEN, **CUT}) for part in parts):
            return None
        patients = {patient: content for part in parts for patient, content in part['patients'].items()}
        return {**parts[0], 'patients': patients}
    indices = slice(None)
    while not hasattr(dataset, 'identity') and hasattr(dataset, 'dataset'):
        if isinstance(dataset, torch.utils.data.Subset):
            indices = np.asarray(dataset.indices)[indices]
        dataset = dataset.dataset
    found = getattr(dataset, 'identity', None)
    if found is None or dataset.patientNumbers is None:
        return found
    ids, numbers = list(found['patients']), np.unique(dataset.patientNumbers[indices])
    return {**found, 'patients': {ids[number]: found['patients'][ids[number]] for number in numbers}}


def _trainedOn(model):
    """Return all patients that a model was trained on: id -> column -> checksum."""
    identity = identityOf(model) or {'earlier': {}, 'patients': {}}
    return {**identity['earlier'], **identity['patients']}


def trainedAmong(model, ids):
    """Return the patient ids of a list that a model was trained on: the same id, or another time point of the subject.

    Args:
        model: with an `identity`; without one nothing is known, and the list is empty.
        ids: patient ids.
    """
    subjects = {withoutTime(patient) for patient in _trainedOn(model)}
    return [str(patient) for patient in ids if withoutTime(patient) in subjects]


def trainedPatients(model, df):
    """Return the ids of a file list that a model was trained on, told by names and by the content of images.

    A patient counts as trained on if it has an image in common, or if it is another time point of a subject that was
    trained on. If it has the same id, but no image in common, it is another patient, and a warning says so.

    Args:
        model: as in `trainedAmong`.
        df: file list. Images under other ids are recognised in `.gz` files, whose checksum need not be computed.
    """
    seen = _trainedOn(model)
    if not seen:
        return []
    images = {value for columns in seen.values() for name, value in columns.items() if name != 'seg'}
    byName, trained = set(trainedAmong(model, df.index)), []
    for patient, paths in df.iterrows():
        patient = str(patient)
        if patient in seen and _isAnother(paths, seen[patient]):
            text = f'{patient} has the name of a patient that the model was trained on, but other images.'
            warnings.warn(text, stacklevel=3)
        elif patient in byName or _hasImageOf(paths, images):
            trained.append(patient)
    return trained


def _isAnother(paths, content):
    """Return whether a patient has none of the images of one with the same id, as far as both have them."""
    own = {name: value for name, value in checksums(paths).items() if name != 'seg' and value and content.get(name)}
    return bool(own) and all(content[name] != value for name, value in own.items())


def _hasImageOf(paths, images):
    """Return whether a patient has a packed image whose checksum is in a set."""
    files = [Path(paths[column]) for column in config.MODALITIES if hasFile(paths, column)]
    packed = [file for file in files if file.name.lower().endswith('.gz') and file.is_file()]
    return any(checksumOf(file, {}) in images for file in packed)


def membersOf(model):
    """Return the members of an ensemble: a list of models as it is, a model as a list of one.

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
    planes: list  # names of those whose slices are predicted
    activation: str  # that turns logits into probabilities: 'softmax' or 'sigmoid'


def followAll(model, transform=None, planes=None):
    """Return how each member of an ensemble has to be shown a patient, a list of `Way`.

    Args:
        model: a model, or a list of models.
        transform, planes: as in `follow`, for all members.

    Raises:
        ValueError: as in `follow`; or the members were trained on other modalities or stretchings than the first.
    """
    ways = []
    for member in membersOf(model):
        ways.append(follow(member, transform, planes))
    inputs = [(way.modalities, stretchingsIn(way.transform)) for way in ways]
    for number, (modalities, stretching) in enumerate(inputs):
        if (modalities, stretching) != inputs[0]:
            raise ValueError(
                f'Model {number + 1} of the ensemble was trained on {modalities} stretched by {stretching}, the first '
                f'one on {inputs[0][0]} by {inputs[0][1]}: their probabilities cannot be averaged.'
            )
    return ways


def follow(model, transform=None, planes=None):
    """Return how a model has to be shown a patient: as it was trained, whatever `config` says; tell what differs.

    Args:
        model: with or without an `identity`; without one, `config` is followed.
        transform: torchio transform of the volume that the caller gave, or None.
        planes: names of planes that the caller gave, or None.

    Returns:
        Way.

    Raises:
        ValueError: the model was trained on patches that another transform made, and none is given; or the given one
            stretches otherwise; or the model predicts other classes, or a plane does not exist.
    """
    wanted, identity = configured(), identityOf(model)
    unknown = set(planes or wanted['planes']) - set(PLANES)
    if unknown:
        raise ValueError(f'There is no plane {", ".join(sorted(unknown))}; {", ".join(PLANES)} were expected.')
    if not identity:
        transform = volumeTransform() if transform is None else transform
        return Way(wanted['modalities'], transform, wanted['patchSize'], list(planes or wanted['planes']), 'softmax')
    if other := differences(wanted, identity, {'classes': SEEN['classes']}):
        raise ValueError(f'The model predicts {identity["classes"]}, but {other[0]}.')
    differing = differences(wanted, identity, {name: SEEN[name] for name in ('modalities', 'patchSize', 'planes')})
    trained = identity['stretching']
    if transform is None and trained is None:
        raise ValueError(
            'The model was trained on patches that a transform of your own made: give predict the same one '
            '(transform = ...).'
        )
    if transform is None:
        transform = volumeTransform(*trained, len(identity['modalities']))
        differing += differences(wanted, identity, {'stretching': SEEN['stretching']})
    elif others := [given for given in stretchingsIn(transform) if trained and given != trained]:
        raise ValueError(
            f'The transform stretches the percentiles {others[0][0]} to {others[0][1]}, but the model was trained on '
            f'{trained[0]} and {trained[1]}. Without a transform, predict follows the model.'
        )
    if differing:
        warnings.warn(f'The model is followed where config differs: {"; ".join(differing)}.', stacklevel=4)
    planes = list(planes or identity['planes'])
    return Way(identity['modalities'], transform, identity['patchSize'], planes, identity['activation'])
