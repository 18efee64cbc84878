"""Pack trained models into a folder that needs no configuration, load it, and export it for onnxruntime."""

import json
import os
import shutil
import tempfile
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import safetensors.torch
import segmentation_models_pytorch as smp
import torch

import config
import metrics
from atomic import writeAtomically
from card import writeCard
from checkpoints import loadModel as loadCheckpointModel
from checkpoints import readCheckpoint
from components import Tuning
from editions import labelsFrom
from folders import FORMAT, hashFile, readAbout, writeAbout
from identity import SEEN, configured, differences
from patients import hasFile, readCase
from predictor import INT8, Network, loadFolder, prepare, runSession, segment, startSession
from recipe import buildModel
from trained import asEarlier

OPSET = 18  # of ONNX
LARGEST_DIFFERENCE = 1e-4  # of a probability between torch and onnxruntime
LARGEST_LOSS = 0.002  # of Dice with 8-bit integers
_SHARED = ('modalities', 'classes', 'stretching')  # what members of an ensemble must have in common


def packModel(checkpoints, folder, df=None, scores=None, rules=None):
    """Write the models of checkpoints into a folder that is all one needs to predict with them.

    The folder has `config.json` (modalities, classes, labels, stretching, planes, patch size, rules, checksums of the
    files, and the ids of the patients that were trained on, so that they are never scored), `README.md` (a model card
    to complete; it may be edited) and, for each member, a folder with `config.json` and `model.safetensors`, as
    `smp.from_pretrained` reads them. It appears when it is complete. If it is there with the same content, nothing is
    written.

    Args:
        checkpoints: path of a checkpoint such as `config.RESULT_CHECKPOINT`, or a list of them, the members of an
            ensemble.
        folder: to write.
        df: file list with the patients of the training, so that the card tells their grades.
        scores: of patients that were not trained on, as `postprocess.scoreFolder` or `predictFolder` returns them, for
            the card.
        rules: against small components, of `postprocess.tunePostprocessing`; `loadRules` returns them.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: not a checkpoint of this package, or one that does not say how the model was trained; members with
            other modalities, classes or stretching; classes other than those of `config`; or the folder holds something
            else.
    """
    paths = list(checkpoints) if isinstance(checkpoints, (list, tuple)) else [checkpoints]
    if not paths:
        raise ValueError('The list of checkpoints is empty; at least one was expected.')
    folder = Path(folder)
    part = folder.with_name(folder.name + '.part')
    shutil.rmtree(part, ignore_errors=True)
    try:
        about, found = _writeMembers(paths, part)
        about['rules'] = _describeRules(rules)
        writeCard(part / 'README.md', about, found, df, scores)
        writeAbout(part, about)
        if folder.exists() and any(folder.iterdir()):
            _checkIsSame(folder, about)
            print(f'{folder} exists with the same models.')
            return
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _writeMembers(paths, part):
    """Write the folder of each member; return the content of `config.json`, and the checkpoints without weights."""
    members, files, found = [], {}, []
    for number, path in enumerate(paths, start=1):
        model, checkpoint = loadCheckpointModel(path), readCheckpoint(path)
        identity = _identityOf(model, path)
        if members and (differing := differences(members[0]['identity'], identity, {n: SEEN[n] for n in _SHARED})):
            raise ValueError(f'{path} cannot be packed with {paths[0]}: {"; ".join(differing)}.')
        settings = {name: checkpoint['settings'][name] for name in _SETTINGS}
        smpConfig = {
            '_model_class': settings['model'],
            'encoder_name': settings['ENCODER_NAME'],
            'encoder_depth': settings['ENCODER_DEPTH'],
            'encoder_weights': None,
            'decoder_channels': settings['DECODER_CHANNELS'],
            'in_channels': len(identity['modalities']),
            'classes': settings['NO_CLASSES'],
        }
        home = part / str(number)
        with writeAtomically(home / 'model.safetensors') as file:
            weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
            file.write_bytes(safetensors.torch.save(weights))
        with writeAtomically(home / 'config.json') as file:
            file.write_text(json.dumps(smpConfig, indent=1))
        files |= {f'{number}/{name}': hashFile(home / name) for name in ('model.safetensors', 'config.json')}
        members.append(
            {
                'folder': str(number),
                'settings': settings,
                'planes': identity['planes'],
                'patchSize': identity['patchSize'],
                'activation': identity['activation'],
                'multiple': int(model.encoder.output_stride),
                'identity': identity,
            }
        )
        numValidated = len(checkpoint['identity']['validated'])
        found.append({'history': checkpoint['history'], 'recipe': checkpoint['recipe'], 'numValidated': numValidated})
    first = members[0]['identity']
    editions = {name: pairs for member in members for name, pairs in member['identity']['editions'].items()}
    about = {
        'format': FORMAT,
        **{name: first[name] for name in _SHARED},
        'colors': list(config.CLASS_COLORS[: len(first['classes'])]),
        'labels': {name: _labelsOf(pairs, len(first['classes'])) for name, pairs in sorted(editions.items())},
        'members': members,
        'files': files,
        'onnx': None,
    }
    return about, found


_SETTINGS = ('model', 'ENCODER_NAME', 'ENCODER_DEPTH', 'DECODER_CHANNELS', 'NO_CLASSES')


def _identityOf(model, path):
    """Return the identity of a model that can be packed; raise a ValueError for another one."""
    if model.identity is None:
        raise ValueError(
            f'{path} does not say how its model was trained: it is of an older version, or its patches were not of '
            'utils.BRATSDataset. Train an epoch more with this version, and pack that checkpoint.'
        )
    if model.identity['stretching'] is None:
        raise ValueError(f'{path}: the patches were made by a transform of your own, which a folder cannot hold.')
    if other := differences(configured(), model.identity, {'classes': SEEN['classes']}):  # colors and rules follow them
        raise ValueError(f'{path} predicts {model.identity["classes"]}, but {other[0]}.')
    return model.identity


def _labelsOf(pairs, numClasses):
    """Return [class, label] pairs as the classes are written, from (label, class) pairs; a class may be missing."""
    return [[*pair] for pair in labelsFrom(dict(pairs), numClasses).items()]


def _describeRules(rules):
    if rules is None:
        return None
    regions = {name: list(config.REGIONS.get(name, ())) for name in ('WT', 'ET')}
    regions['NCR'] = config.REGIONS.get('NCR', (0,))[0]
    return {'ml': float(rules.ml), 'N': int(rules.N), 'kind': rules.kind, **regions}


def _checkIsSame(folder, about):
    """Raise a ValueError unless a folder holds the same models, with or without ONNX files."""
    try:
        before = readAbout(folder, ('.safetensors', '.json'))
    except (ValueError, OSError) as error:
        raise ValueError(f'{folder} is not empty, and no whole model folder: {error} Choose another one.') from error
    files = {name: value for name, value in before['files'].items() if not name.endswith('.onnx')}
    if json.loads(json.dumps(about)) != {**before, 'files': files, 'onnx': None}:
        raise ValueError(f'{folder} holds other models or settings. Choose another folder, or delete it.')


def loadModel(folder):
    """Return the model of a folder, or the list of its members, on `config.DEVICE`, for `engine.predict`.

    It needs no configuration but `config.NO_CLASSES`, and nothing in the folder is executed.

    Args:
        folder: of `packModel`.

    Raises:
        FileNotFoundError, ValueError: a file is missing, was changed, or was copied in part; it is named.
    """
    about = readAbout(folder, ('.safetensors', '.json'))
    models = []
    for member in about['members']:
        model = _buildMember(folder, about, member, config.DEVICE)
        model.identity = asEarlier(member['identity'])
        models.append(model)
    return models if len(models) > 1 else models[0]


def _buildMember(folder, about, member, device):
    """Return the model of a member in evaluation mode; only a model class of smp is ever called."""
    kind = getattr(smp, member['settings']['model'], None)
    if not (isinstance(kind, type) and issubclass(kind, smp.base.SegmentationModel)):
        raise ValueError(f'{folder} has a {member["settings"]["model"]}; a model class of smp was expected.')
    model = buildModel(member['settings']['model'], member['settings'], len(about['modalities']))
    model.load_state_dict(safetensors.torch.load_file(Path(folder, member['folder'], 'model.safetensors')))
    return model.to(device).eval()


def loadRules(folder):
    """Return the rules against small components of a folder, for `postprocess.predictFolder`; None if it has none."""
    rules = readAbout(folder, ())['rules']
    return rules and Tuning(N=rules['N'], ml=rules['ml'], kind=rules['kind'])


def exportOnnx(folder, patients=None):
    """Write each member of a model folder as ONNX, for `predictor.predict`, after it was compared with torch.

    Batch, height and width are free; the sides are multiples of `multiple` in `config.json`. The opset is `OPSET`.

    Args:
        folder: of `packModel`.
        patients: rows of the file list, or a file list, on which torch in float32 and onnxruntime are compared; None: a
            random image.

    Returns:
        float, the largest difference of a probability.

    Raises:
        FileNotFoundError, ValueError: as in `loadModel`.
        RuntimeError: a probability differs by more than `LARGEST_DIFFERENCE`, or a class other than in a tie. No ONNX
            file is left.
    """
    import onnxruntime

    about = readAbout(folder, ('.safetensors', '.json'))
    about['files'] = {name: value for name, value in about['files'].items() if not name.endswith('.onnx')}
    about['onnx'] = None
    writeAbout(folder, about)  # until they are compared, there are none
    for file in Path(folder).glob(f'*/{INT8}'):  # of the networks before
        file.unlink()
    cases, largest, files = list(_casesOf(patients, about)), 0.0, {}
    try:
        for member in about['members']:
            file = Path(folder, member['folder'], 'model.onnx')
            model = _buildMember(folder, about, member, 'cpu')
            with writeAtomically(file) as part:
                _export(model, len(about['modalities']), member['multiple'], part)
                session = onnxruntime.InferenceSession(part.read_bytes(), providers=['CPUExecutionProvider'])
                runs = partial(_runTorch, model), partial(runSession, session)
                pair = [Network({**about, 'members': [member]}, [run]) for run in runs]
                largest = max(largest, *(_compare(case, pair, file) for case in cases))
            files[f'{member["folder"]}/model.onnx'] = hashFile(file)
    except BaseException:
        for member in about['members']:
            Path(folder, member['folder'], 'model.onnx').unlink(missing_ok=True)
        raise
    about['files'] |= files
    about['onnx'] = {'opset': OPSET, 'largestDifference': largest, 'torch': torch.__version__}
    writeAbout(folder, about)
    return largest


def quantizeOnnx(folder, df):
    """Write each member of a model folder with 8-bit integers too, which processors compute much faster.

    `predictor.predict` uses these networks from then on; `exportOnnx` removes them. The range of each layer's values is
    taken from every second patient, and the networks are compared with those in float32 on the others: the mean Dice of
    WT, TC and ET may not fall by more than `LARGEST_LOSS`.

    Args:
        folder: of `packModel`, after `exportOnnx`.
        df: file list of two patients or more, with true segmentations.

    Returns:
        float, the loss of Dice; negative if the Dice rises.

    Raises:
        FileNotFoundError, ValueError: as in `predictor.loadFolder`; fewer than two patients, or one without a truth;
            other classes than those of `config`.
        RuntimeError: the loss is too large. The folder is as it was.
    """
    network = loadFolder(folder, name='model.onnx')
    about = network.about
    if about['classes'] != list(config.CLASS_NAMES):  # the truth is read in the classes of config
        raise ValueError(f'{folder} predicts {about["classes"]}, but config.CLASS_NAMES is {list(config.CLASS_NAMES)}.')
    lacking = [str(patient) for patient, paths in df.iterrows() if not hasFile(paths, 'seg')]
    if len(df) < 2 or lacking:
        found = f'{", ".join(lacking[:5])} has none' if lacking else f'there are {len(df)}'
        raise ValueError(f'Two patients or more with a true segmentation were expected, but {found}.')
    files = [Path(folder, member['folder'], 'model.onnx') for member in about['members']]
    with tempfile.TemporaryDirectory() as place:
        written = [Path(place, f'{number}.onnx') for number in range(len(files))]
        for file, patches, other in zip(files, _seenPatches(network, df[::2]), written, strict=True):
            _quantize(file, patches, other)
        quantized = Network(about, [startSession(file) for file in written])
        loss = float(np.mean([_lossOf(paths, network, quantized) for _, paths in df[1::2].iterrows()]))
        if not loss <= LARGEST_LOSS:
            raise RuntimeError(
                f'{folder}: with 8-bit integers the mean Dice falls by {loss:.4f}; they are not written.'
            )
        for file, other in zip(files, written, strict=True):
            with writeAtomically(file.with_name(INT8)) as part:
                shutil.copyfile(other, part)
            about['files'][f'{file.parent.name}/{INT8}'] = hashFile(other)
    about['onnx']['int8'] = {'loss': loss, 'patients': len(df[1::2])}
    writeAbout(folder, about)
    return loss


def _seenPatches(network, df):
    """Return, for each member, one of the patches float32 (1, C, H, W) of each batch that it runs on patients."""
    seen = [[] for _ in network.members]

    def runAndKeep(run, kept, patches):
        kept.append(patches[:1].copy())  # without the rest of its batch
        return run(patches)

    runs = [partial(runAndKeep, *pair) for pair in zip(network.members, seen, strict=True)]
    for _, paths in df.iterrows():
        segment(*prepare(paths, network.about), Network(network.about, runs))
    return seen


def _quantize(file, patches, other):
    """Write an ONNX file with 8-bit integers, in the ranges that its layers have on some patches."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        remaining = iter(patches)

        def get_next(self):
            return next(({'image': patch} for patch in self.remaining), None)

    folded = other.with_suffix('.folded.onnx')  # batch norms within their convolutions
    quant_pre_process(str(file), str(folded), skip_symbolic_shape=True)
    options = {'activation_type': quantization.QuantType.QUInt8, 'weight_type': quantization.QuantType.QInt8}
    # weights of 7 bits: processors without VNNI add two products in 16 bits, which 8 would overflow without a word
    quantization.quantize_static(str(folded), str(other), Reader(), reduce_range=True, **options)


def _lossOf(paths, network, other):
    """Return by how much the mean Dice of WT, TC and ET of a patient is lower by another network."""
    label = readCase(paths, network.about['modalities'])[1].transpose(2, 0, 1)  # (W, H, D) -> (D, W, H)
    case = prepare(paths, network.about)
    tables = [metrics.scorePatient(label, segment(*case, each)[0])['dice'] for each in (network, other)]
    before, after = (table.reindex(['WT', 'TC', 'ET']).mean() for table in tables)
    return before - after


def _export(model, numChannels, multiple, file):
    """Write a model as ONNX with free batch, height and width."""
    free = {0: 'batch', 2: 'height', 3: 'width'}
    example = torch.zeros(2, numChannels, 2 * multiple, 3 * multiple)
    with warnings.catch_warnings(action='ignore'):
        torch.onnx.export(
            model,
            (example,),
            str(file),
            input_names=['image'],
            output_names=['logits'],
            opset_version=OPSET,
            dynamic_axes={'image': free, 'logits': free},
            dynamo=False,
        )


def _runTorch(model, patches):
    with torch.inference_mode():
        return model(torch.from_numpy(patches)).numpy()


def _casesOf(patients, about):
    """Yield the image (D, C, W, H) and brain mask of each patient, or of one random image of blobs."""
    if isinstance(patients, pd.DataFrame):
        patients = [paths for _, paths in patients.iterrows()]
    elif patients is not None and not isinstance(patients, (list, tuple)):
        patients = [patients]
    for paths in patients or ():
        yield prepare(paths, about)
    if not patients:
        shape, low = (9, len(about['modalities']), 80, 70), about['stretching'][1][0]
        values = torch.randn(shape[0], shape[1], 8, 7, generator=torch.Generator().manual_seed(0))
        x = torch.nn.functional.interpolate(values, shape[2:], mode='bilinear').clamp(*about['stretching'][1]).numpy()
        isBrain = np.zeros((shape[0], *shape[2:]), bool)
        isBrain[1:, 6:70, 3:61] = True
        yield np.where(isBrain[:, None], x, np.float32(low)), isBrain


def _compare(case, networks, file):
    """Return the largest difference of a probability of two networks; raise a RuntimeError if it matters."""
    (yhat, probability), (other, values) = (segment(*case, network, probabilities=True) for network in networks)
    difference = float(np.abs(probability - values).max())
    first, second = np.sort(probability, axis=1)[:, -1], np.sort(probability, axis=1)[:, -2]
    isOther = (yhat != other) & (first - second > 2 * LARGEST_DIFFERENCE)
    if not difference <= LARGEST_DIFFERENCE or isOther.any():
        raise RuntimeError(
            f'{file} is not written: onnxruntime differs from torch by up to {difference:.2g} in a probability and in '
            f'{np.count_nonzero(isOther)} voxels.'
        )
    return difference
