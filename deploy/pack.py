"""Pack trained models into a folder that predicts with its own settings."""

import functools
import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import config
from checkpoints import loadModel as loadCheckpointModel
from checkpoints import readCheckpoint
from deploy.card import writeCard
from deploy.onnx import exportOnnx, quantizeOnnx
from patients.editions import labelsFrom
from patients.parallel import forEachPatient
from patients.reading import hasFile, voxelChecksums
from predictor import FORMAT, hashFile, readAbout, writeAbout
from provenance import configured, differences, seenBy

_SETTINGS = ('model', 'ENCODER_NAME', 'ENCODER_DEPTH', 'DECODER_CHANNELS', 'NO_CLASSES')
_SHARED = ('modalities', 'classes', 'stretching')  # what members of an ensemble must have in common


def packModel(checkpoints, folder, df=None, scores=None, rules=None, half=False):
    """Write the models of checkpoints into a folder that holds all settings that a prediction needs.

    The folder has

    - `config.json`: the input settings, classes, labels, rules of post-processing, checksums of the files, and the ids
      of the training patients, so that they are never scored;
    - `README.md`: a model card, which you may complete and edit;
    - for each member a folder with `config.json` and `model.safetensors`, which `smp.from_pretrained` reads;
    - with `df`, the ONNX files for `predictor.py`, as `exportOnnx` and `quantizeOnnx` write them; or a line says why
      not: onnx or onnxruntime is not installed, too few patients have a truth, or the networks differ too much.

    The folder appears when it is complete but for the ONNX files. If it exists with the same content, only ONNX files
    that it lacks are written.

    Args:
        checkpoints: path of a checkpoint such as `config.RESULT_CHECKPOINT`, or a list of them, the members of an
            ensemble.
        folder: path of the folder to write.
        df: file list with the patients of the training. Their grades come on the card; checksums of their voxels into
            `config.json`, so that they are recognised under other names, as those of another year. Of those with a
            true segmentation, `quantizeOnnx` gets the first eight.
        scores: of patients that were not trained on, as `postprocess.scoreFolder` or `predictFolder` returns them, for
            the card.
        rules: `Tuning` that `postprocess.tunePostprocessing` returned; None: no post-processing.
        half: store the weights in float16, which takes half the space.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: a file is no checkpoint of this package, or has no provenance; the members differ in modalities,
            classes or stretching; the classes are not those of `config`; there are scores of a patient that every
            member was trained on; or the folder holds something else.
    """
    paths = list(checkpoints) if isinstance(checkpoints, (list, tuple)) else [checkpoints]
    if not paths:
        raise ValueError('The list of checkpoints is empty; at least one was expected.')
    folder = Path(folder)
    temporary = folder.with_name(folder.name + '.part')
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        about, found = _writeMembers(paths, temporary, half)
        for member in about['members'] if df is not None else ():
            member['provenance']['voxels'] = _voxelsOf(member['provenance'], df)
        about['rules'] = _describeRules(rules)
        writeCard(temporary / 'README.md', about, found, df, scores)
        writeAbout(temporary, about)
        if folder.exists() and any(folder.iterdir()):
            _checkIsSame(folder, about)
            print(f'{folder} exists with the same models.')
        else:
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if df is not None:
        _addNetworks(folder, df)


def _addNetworks(folder, df):
    """Write the ONNX files that a folder lacks, or say why not."""
    if absent := [name for name in ('onnx', 'onnxruntime') if find_spec(name) is None]:
        print(f'{folder} has no ONNX files: pip install {" ".join(absent)}, then call deploy.exportOnnx.')
        return
    found, known = readAbout(folder, ())['onnx'], df[[hasFile(paths, 'seg') for _, paths in df.iterrows()]][:8]
    try:
        if not found:
            exportOnnx(folder, df[:1])
        if len(known) < 2:
            print(f'{folder} has no 8-bit integers: two patients with a true segmentation are needed.')
        elif not found or 'int8' not in found:
            quantizeOnnx(folder, known)
    except RuntimeError as error:  # a network that differs too much
        print(error)


def _writeMembers(paths, temporary, half):
    """Write the folder of each member; return the content of `config.json`, and `checkpoints` for `writeCard`."""
    members, files, found = [], {}, []
    for number, path in enumerate(paths, start=1):
        model, checkpoint = loadCheckpointModel(path), readCheckpoint(path)
        provenance = _provenanceOf(model, path)
        if members and (texts := differences(members[0]['provenance'], provenance, _SHARED, patients=False)):
            raise ValueError(f'{path} cannot be packed with {paths[0]}: {"; ".join(texts)}.')
        seen = provenance['settings']
        home = temporary / str(number)
        (model.half() if half else model).save_pretrained(home)
        (home / 'README.md').unlink()  # smp's model card, which names a licence
        files |= {f'{number}/{name}': hashFile(home / name) for name in ('model.safetensors', 'config.json')}
        members.append(
            {
                'folder': str(number),
                'settings': {name: checkpoint['settings'][name] for name in _SETTINGS},
                'planes': seen['planes'],
                'patchSize': seen['patchSize'],
                'activation': seen['activation'],
                'multiple': int(model.encoder.output_stride),
                'provenance': provenance,
            }
        )
        numValidated = len(checkpoint['provenance']['validated'])
        found.append({'history': checkpoint['history'], 'recipe': checkpoint['recipe'], 'numValidated': numValidated})
    first, editions = members[0]['provenance']['settings'], {}
    for member in members:
        editions |= member['provenance']['settings']['editions']
    about = {
        'format': FORMAT,
        **{name: first[name] for name in _SHARED},
        'colors': list(config.CLASS_COLORS[: len(first['classes'])]),
        'labels': {  # [class, label] pairs
            name: list(labelsFrom(dict(pairs), len(first['classes'])).items())
            for name, pairs in sorted(editions.items())
        },
        'members': members,
        'files': files,
        'onnx': None,
    }
    return about, found


def _voxelsOf(provenance, df):
    """Return id -> checksums of the voxels of the patients of a file list that a model was trained on."""
    trained, modalities = df[df.index.astype(str).isin(seenBy(provenance))], provenance['settings']['modalities']
    sums = forEachPatient(functools.partial(voxelChecksums, modalities=modalities), trained, 'checksums')
    return {**provenance.get('voxels', {}), **dict(zip(map(str, trained.index), sums, strict=True))}


def _provenanceOf(model, path):
    """Return the provenance of a model; raise a ValueError if the model cannot be packed."""
    if model.provenance is None:
        raise ValueError(
            f'{path} does not say how its model was trained: its patches were not of utils.BRATSDataset. Train one '
            'more epoch with it, and pack that checkpoint.'
        )
    settings = model.provenance['settings']
    if settings['stretching'] is None:
        raise ValueError(f'{path}: the patches were made by a transform of your own, which a folder cannot hold.')
    # colors and rules are taken from config
    if texts := differences({'settings': configured()}, model.provenance, ['classes'], patients=False):
        raise ValueError(f'{path} predicts {settings["classes"]}, but {texts[0]}.')
    return model.provenance


def _describeRules(rules):
    if rules is None:
        return None
    regions = {name: list(config.REGIONS.get(name, ())) for name in ('WT', 'ET')}
    regions['NCR'] = config.REGIONS.get('NCR', (0,))[0]
    return {'ml': float(rules.ml), 'N': int(rules.N), 'kind': rules.kind, **regions}


def _checkIsSame(folder, about):
    """Add the voxels of patients to a folder; raise a ValueError unless it has the same models, whatever ONNX files."""
    try:
        before = readAbout(folder, ('.safetensors', '.json'))
    except (ValueError, OSError) as error:
        raise ValueError(f'{folder} is not empty, and no whole model folder: {error} Choose another one.') from error
    files = {name: value for name, value in before['files'].items() if not name.endswith('.onnx')}
    for own in zip(before['members'], about['members'], strict=False):  # one of them may be packed without the patients
        old, new = (member['provenance'] for member in own)
        if voxels := new.get('voxels', {}) | old.get('voxels', {}):
            old['voxels'] = new['voxels'] = voxels
    if json.loads(json.dumps(about)) != {**before, 'files': files, 'onnx': None}:
        raise ValueError(f'{folder} holds other models or settings. Choose another folder, or delete it.')
    writeAbout(folder, before)
