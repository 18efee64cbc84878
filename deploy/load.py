"""Load the models of a model folder, or begin a training from their weights."""

from pathlib import Path

import safetensors.torch
import segmentation_models_pytorch as smp

import config
from engine import buildModel, copyImageNet
from patients.reading import modelFolder
from postprocess.components import Tuning
from predictor import readAbout
from provenance import asEarlier, plain, unwrap


def loadModel(folder):
    """Return the model of a folder, or the list of its members, on `config.DEVICE`, for `engine.predict`.

    `config.NO_CLASSES` has to be that of the training. No code of the folder is run.

    Args:
        folder: that `packModel` wrote; or 'glioma', the weights in the box.

    Raises:
        FileNotFoundError, ValueError: a file is missing, was changed, or was copied in part.
    """
    folder = modelFolder(folder)
    about = readAbout(folder, ('.safetensors', '.json'))
    models = []
    for member in about['members']:
        model = buildMember(folder, about, member, config.DEVICE)
        model.provenance = asEarlier(member['provenance'])
        models.append(model)
    return models if len(models) > 1 else models[0]


def pretrained():
    """Return the model of the weights in the box, `weights/glioma`, for `engine.predict`; its card says what it is."""
    return loadModel('glioma')


def startFrom(model):
    """Copy the weights of `config.START` into a model that is going to be trained; if it is None, `copyImageNet`.

    The channels of the first layer are those of the modalities' names. With another number of classes, the last layer
    keeps its own weights. `model.provenance` keeps the patients that the weights were trained on.

    Args:
        model: that `config` describes.

    Raises:
        FileNotFoundError, ValueError: there is no such folder, or it is not whole; it has several networks, or another
            architecture than `config`; or it does not know one of `config.MODALITIES`.
    """
    if config.START is None:
        return copyImageNet(model)
    folder = modelFolder(config.START)
    about = readAbout(folder, ('.safetensors',))
    if len(about['members']) > 1:
        raise ValueError(f'{folder} has {len(about["members"])} networks; a training can start from one.')
    [member], known, kind = about['members'], about['modalities'], type(unwrap(model)).__name__
    if kind != member['settings']['model']:
        raise ValueError(f'config.START, {folder}, is a {member["settings"]["model"]}, not a {kind}.')
    if unknown := [modality for modality in config.MODALITIES if modality not in known]:
        raise ValueError(f'config.START, {folder}, has the channels {", ".join(known)}; not {", ".join(unknown)}.')
    needed = {name: member['settings'][name] for name in ('ENCODER_NAME', 'ENCODER_DEPTH', 'DECODER_CHANNELS')}
    if other := [f'{name} = {value!r}' for name, value in needed.items() if value != plain(getattr(config, name))]:
        raise ValueError(f'config.START, {folder}, has another network: set config.{", config.".join(other)}.')
    if about['stretching'] != (stretching := plain([config.STRETCH_PERCENTILES, config.STRETCH_RANGE])):
        raise ValueError(
            f'config.START, {folder}, has the STRETCH_PERCENTILES and _RANGE {about["stretching"]}, not {stretching}.'
        )
    weights = safetensors.torch.load_file(folder / member['folder'] / 'model.safetensors')
    own = unwrap(model).state_dict()
    first = next(name for name, each in own.items() if name.startswith('encoder.') and each.ndim == 4)
    weights[first] = weights[first][:, [known.index(modality) for modality in config.MODALITIES]]
    unwrap(model).load_state_dict({**own, **{name: w for name, w in weights.items() if w.shape == own[name].shape}})
    changed = {'modalities': plain(config.MODALITIES), 'classes': plain(config.CLASS_NAMES)}
    earlier = asEarlier(member['provenance'])
    unwrap(model).provenance = {**earlier, 'settings': {**earlier['settings'], **changed}}


def buildMember(folder, about, member, device):
    """Return the model of a member, in evaluation mode; raise a ValueError if its class is not a model of smp."""
    kind = getattr(smp, member['settings']['model'], None)
    if not (isinstance(kind, type) and issubclass(kind, smp.base.SegmentationModel)):
        raise ValueError(f'{folder} has a {member["settings"]["model"]}; a model class of smp was expected.')
    model = buildModel(member['settings']['model'], member['settings'], len(about['modalities']))
    model.load_state_dict(safetensors.torch.load_file(Path(folder, member['folder'], 'model.safetensors')))
    return model.to(device).eval()


def loadRules(folder):
    """Return the `Tuning` of a folder, or of 'glioma', for `postprocess.predictFolder`; None if it has none."""
    rules = readAbout(modelFolder(folder), ())['rules']
    return rules and Tuning(N=rules['N'], ml=rules['ml'], kind=rules['kind'])
