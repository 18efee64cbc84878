"""Cut patients into patches and write them to HDF5."""

import functools
import hashlib
import json
import sys
import types
import zlib
from pathlib import Path

import h5py
import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

import config
from atomic import writeAtomically
from cohort import forEachPatient, withSegmentation
from patients import alongMemory, fileOf, maskFunction, patientOf, readCase, readVolumes
from transforms import makeTransforms, transformCase, transformVolume, volumeTransform, windowStarts

__all__ = ['fingerprint', 'makeDataset', 'makeTransforms', 'transformCase', 'volumeTransform', 'windowStarts']

FORMAT = 3  # of the patch file; raised when its layout changes, so that older files are replaced


def makeDataset(dataframe, filename, transform=None):
    """Write the patches of the patients of a file list to an `.h5` file and return how many there are.

    Each axial slice is cut into overlapping windows of `config.PATCH_SIZE` at `config.PATCH_STRIDE`. A patch with tumor
    is kept. Of the patches with brain but no tumor, a fraction `config.BACKGROUND_SHARE` is kept, drawn from
    `config.SEED` and the patient's id.

    The file is renamed to its final name when it is complete. If it exists with the same patients and settings, all its
    checksums are verified and nothing is cut. The memory needed does not grow with the number of patients.

    The datasets of the file, with one patch per chunk:
    - `image` (N, C, 128, 128), float16 if all values lie in [-1, 1], else float32;
    - `label` (N, 128, 128), uint8 classes;
    - `patient`, `slice`, `row`, `column` (N,), int32: where each patch comes from (`patient` counts the attribute
      `patients`).
    Its attributes, in JSON: `patients` (ids), `settings`, `leftOut` (ids of patients that could not be used, with
    reasons).

    Args:
        dataframe: file list; patients without a segmentation are left out and counted.
        filename: path of the file.
        transform: torchio transform of the whole volume, in place of `volumeTransform()`. It must not be random:
            patients are cut in parallel. A lambda or a function of a notebook cannot be compared with an earlier one,
            so the file is then always replaced. A function of a module is compared by its name only.

    Returns:
        int, number of patches.

    Raises:
        ValueError, FileNotFoundError: bad data, as in `patients.readCase`. All bad patients are named at once; with
            `config.ON_BAD_PATIENT = 'leaveOut'` they are left out instead, unless no other is left. Or no patch with
            tumor was found.
    """
    if config.ON_BAD_PATIENT not in ('stop', 'leaveOut'):
        raise ValueError(f"config.ON_BAD_PATIENT is {config.ON_BAD_PATIENT!r}; 'stop' or 'leaveOut' was expected.")
    dataframe = withSegmentation(dataframe, str(filename))
    settings = _settings(volumeTransform() if transform is None else transform, dataframe)
    numPatches = _countIfCurrent(filename, settings, list(dataframe.index.astype(str)))
    if numPatches is not None:
        print(f'{filename} exists, with {numPatches} patches of the same patients and settings.')
        return numPatches
    # torchio draws a number even for a deterministic transform: a run that finds the file must continue like this one
    with writeAtomically(filename) as part, torch.random.fork_rng(devices=[]):
        # values outside [-1, 1] usually show in the first patient; then all are written again as float32
        numPatches = _writePatches(part, dataframe, transform, np.float16, settings)
        if numPatches is None:
            numPatches = _writePatches(part, dataframe, transform, np.float32, settings)
        if numPatches == 0:
            raise ValueError(f'{filename}: no patch with tumor in {len(dataframe)} patients.')
    megabytes = Path(filename).stat().st_size / 1e6
    print(f'{filename}: {numPatches} patches of {len(dataframe)} patients, {megabytes:.0f} MB.')
    return numPatches


def _settings(transform, dataframe):
    """Return, as JSON, all that decides what a patch file holds besides the patients' ids."""
    names = ('MODALITIES', 'EDITION', 'PATCH_SIZE', 'PATCH_STRIDE', 'BACKGROUND_SHARE', 'SEED')
    values = {name: fingerprint(getattr(config, name)) for name in names}
    # the same ids may stand for other files: those of another folder, or corrected ones
    columns = (*config.MODALITIES, 'seg')
    sizes = [[_sizeOf(paths, column) for column in columns] for _, paths in dataframe.iterrows()]
    values['files'] = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()
    try:
        values['transform'] = fingerprint(transform)
    except ValueError as error:
        print(f'The transform cannot be compared with an earlier one, so patches are always cut anew: {error}')
        return None
    return json.dumps({'format': FORMAT, **values}, sort_keys=True)


def _sizeOf(paths, column):
    """Return the size of a patient's file in bytes; None if it is missing and bad patients are left out."""
    try:
        return fileOf(paths, column).stat().st_size
    except FileNotFoundError:
        if config.ON_BAD_PATIENT == 'stop':
            raise
        return None


def fingerprint(value):
    """Return plain values that are equal for equal transforms, in every process.

    Args:
        value: torchio transform, function of a module, or a number, text, array, dict, list, tuple or set of such.

    Raises:
        ValueError: a lambda, a nested function, or a function or class of a notebook or script: its name does not say
            what it does.
    """
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, dict):
        return [[fingerprint(key), fingerprint(item)] for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [fingerprint(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        return value.tolist()
    if isinstance(value, functools.partial):
        return [fingerprint(value.func), fingerprint(value.args), fingerprint(value.keywords)]
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
        found = getattr(sys.modules.get(value.__module__), value.__qualname__, None)
        if found is not value or value.__module__ == '__main__':
            raise ValueError(f'{value.__module__}.{value.__qualname__} is not at the top level of an imported module.')
        return f'{value.__module__}.{value.__qualname__}'
    if hasattr(value, '__dict__'):
        held = sorted(vars(value).items())
        # an object may hold one of its own methods, as CropOrPad does: the name says which
        held = {name: item.__name__ if getattr(item, '__self__', None) is value else item for name, item in held}
        return [fingerprint(type(value)), fingerprint(held)]
    return [fingerprint(type(value)), repr(value)]


def _countIfCurrent(filename, settings, patients):
    """Return the number of patches of a file with these settings and patients; else None, with a message."""
    if not Path(filename).exists():
        return None
    try:
        with h5py.File(filename, 'r') as file:
            kept, leftOut = json.loads(file.attrs['patients']), json.loads(file.attrs['leftOut'])
            isSame = file.attrs['settings'] == settings and kept == [name for name in patients if name not in leftOut]
            isSame = isSame and not (leftOut and config.ON_BAD_PATIENT == 'stop')
            numPatches = _verifyChecksums(file) if isSame else None
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        print(f'{filename} is damaged, or of another version ({error}), and is replaced.')
        return None
    if not isSame:
        print(f'{filename} has other patients or settings and is replaced.')
        return None
    for patient, reason in leftOut.items():
        print(f'{patient} is left out: {reason}')
    return numPatches


_DATASETS = ('image', 'label')
_ORIGINS = ('patient', 'slice', 'row', 'column')  # where a patch comes from


def _verifyChecksums(file):
    """Return the number of patches of a file after reading everything: HDF5 raises an OSError on a wrong checksum."""
    for name in (*_DATASETS, *_ORIGINS):
        for start in range(0, len(file[name]), 256):
            file[name][start : start + 256]
    return len(file['label'])


def _writePatches(part, dataframe, transform, dtype, settings):
    """Write every patient's patches and return how many; return None, and stop, if values do not fit float16."""
    size, kept, bad = config.PATCH_SIZE, [], {}
    shapes = {'image': (len(config.MODALITIES), size, size), 'label': (size, size)}
    # no chunk cache: on a full disk HDF5 would fail again when it closes the file, and crash the process at its end
    with h5py.File(part, 'w', rdcc_nbytes=0) as file:
        for name, kind in zip(_DATASETS, (dtype, np.uint8), strict=True):
            _createDataset(file, name, shapes[name], kind, compression='lzf')
        for name in _ORIGINS:
            _createDataset(file, name, (), np.int32)
        cut = functools.partial(_tryToCut, transform=transform, dtype=dtype)
        results = forEachPatient(cut, dataframe, 'cut')
        for patient, result in zip(dataframe.index.astype(str), results, strict=True):
            if result is None:
                return None
            if isinstance(result, Exception):
                bad[patient] = result
            elif not (bad and config.ON_BAD_PATIENT == 'stop'):  # otherwise the rest is only checked
                _append(file, len(kept), *result)
                kept.append(patient)
        _reportBad(bad, len(dataframe))
        file.attrs['settings'], file.attrs['patients'] = settings or '', json.dumps(kept)
        file.attrs['leftOut'] = json.dumps({patient: str(error) for patient, error in bad.items()})
        return len(file['label'])


def _createDataset(file, name, shape, dtype, **options):
    """Create an empty dataset (0, *shape) with checksums."""
    chunks = (1, *shape) if shape else (4096,)  # one patch per chunk: a shuffled read decompresses nothing else
    file.create_dataset(name, (0, *shape), dtype, chunks=chunks, maxshape=(None, *shape), fletcher32=True, **options)


def _append(file, number, origins, image, label):
    """Append the patches of one patient, number `number` of the file."""
    start, count = len(file['label']), len(origins)
    columns = zip(_ORIGINS, (np.full(count, number), *origins.T), strict=True)
    for name, values in {'image': image, 'label': label, **dict(columns)}.items():
        file[name].resize(start + count, axis=0)
        file[name][start:] = values


def _reportBad(bad, numPatients):
    """Raise, or print, the errors of all bad patients at once, as `config.ON_BAD_PATIENT` says."""
    if bad and config.ON_BAD_PATIENT == 'stop':
        if len(bad) == 1:
            raise next(iter(bad.values()))
        first = '\n'.join(str(error) for error in list(bad.values())[:20])
        raise ValueError(f'{len(bad)} of {numPatients} patients cannot be used. The first of them:\n{first}')
    if len(bad) == numPatients:
        raise ValueError(f'None of the {numPatients} patients can be used: {next(iter(bad.values()))}')
    for error in bad.values():
        print(f'Left out: {error}')


def _tryToCut(paths, transform, dtype):
    """Return what `_cutPatient` returns, or the error that bad data raised."""
    try:
        return _cutPatient(paths, transform, dtype)
    except (ValueError, OSError) as error:
        return error


def _cutPatient(paths, transform, dtype):
    """Return the patches of one patient: origins int (N, 3), image (N, C, 128, 128), label uint8 (N, 128, 128).

    None if `dtype` is float16 and a value lies outside [-1, 1].
    """
    cut = _cutStretched if transform is None else _cutTransformed
    origins, label, channels = cut(paths, transform)
    image = np.empty((len(origins), len(config.MODALITIES), config.PATCH_SIZE, config.PATCH_SIZE), dtype)
    for number, patches in enumerate(channels):
        if dtype == np.float16 and patches.size and max(-patches.min(), patches.max()) > 1:
            return None
        torch.from_numpy(image)[:, number].copy_(torch.from_numpy(patches))  # NumPy rounds to float16 far slower
    return origins, image, label


def _cutTransformed(paths, transform):
    """Return origins and label patches of a patient under a given transform, and an iterator of each channel's."""
    image, label = readCase(paths)
    isBrain = maskFunction(image).any(0).transpose(2, 0, 1)  # (W, H, D) -> (D, W, H)
    x, y = (tensor.numpy() for tensor in transformVolume(image, label, transform, patientOf(paths)))
    origins, lowest = _choosePatches(y > 0, isBrain, patientOf(paths)), x.min()
    # labels are padded with 0: their own minimum would be tumor where tumor fills the volume
    return origins, _cut(y, origins, 0), (_cut(x[:, channel], origins, lowest) for channel in range(x.shape[1]))


def _cutStretched(paths, _):
    """Return what `_cutTransformed` returns, for `volumeTransform()`: only patches are stretched, not whole volumes."""
    volumes, isBrain = readVolumes(paths), None
    y = next(volumes).transpose(2, 0, 1)
    if config.BACKGROUND_SHARE:
        volumes = list(volumes)
        isBrain = functools.reduce(np.logical_or, map(maskFunction, volumes)).transpose(2, 0, 1)
    origins = _choosePatches(y > 0, isBrain, patientOf(paths))
    return origins, _cut(y, origins, 0), map(functools.partial(_stretchAndCut, origins), volumes)


def _stretchAndCut(origins, volume):
    """Return the stretched patches of one modality; the limits come from the whole volume."""
    if volume.dtype.kind == 'f':
        volume = volume.astype(np.float32)  # as in `readCase`
    stretch, values = volumeTransform(), alongMemory(volume)[0](volume)
    patches = _cut(volume.transpose(2, 0, 1), origins, 0)
    return stretch.stretch(patches, maskFunction(patches), *stretch.findLimits(values[maskFunction(values)]))


def _choosePatches(isTumor, isBrain, patient):
    """Return the (slice, row, column) of the patches to keep, sorted, int (N, 3).

    Args:
        isTumor, isBrain: masks (D, W, H); the second is used only if `config.BACKGROUND_SHARE` is not 0.
        patient: id, from which background patches are drawn.
    """
    size, stride = config.PATCH_SIZE, config.PATCH_STRIDE
    rows, columns = (windowStarts(length, size, stride) for length in isTumor.shape[1:])

    def isIn(mask):  # (windows, D): whether a window holds a voxel of the mask
        windows = [mask[:, row : row + size, column : column + size] for row in rows for column in columns]
        return np.array([window.any((1, 2)) for window in windows])

    isKept = isIn(isTumor)
    if config.BACKGROUND_SHARE:
        generator = np.random.default_rng([config.SEED, zlib.crc32(str(patient).encode())])
        isKept |= isIn(isBrain) & (generator.uniform(size=isKept.shape) < config.BACKGROUND_SHARE)
    slices, windows = np.nonzero(isKept.T)
    return np.stack([slices, rows[windows // len(columns)], columns[windows % len(columns)]], axis=1)


def _cut(volume, origins, padding):
    """Return patches (N, 128, 128) of a volume (D, W, H); one smaller than a patch is padded with a value."""
    size = config.PATCH_SIZE
    missing = [max(size - length, 0) for length in volume.shape[1:]]
    if any(missing):
        volume = np.pad(volume, ((0, 0), (0, missing[0]), (0, missing[1])), constant_values=padding)
    windows = sliding_window_view(volume, (size, size), axis=(1, 2))  # (D, W', H', 128, 128)
    return windows[tuple(origins.T)]
