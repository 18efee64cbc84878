"""From volumes to patches in HDF5: cut and write."""

import functools
import hashlib
import json
import math
import types
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import h5py
import numpy as np
import torch
from isal import isal_zlib
from numpy.lib.stride_tricks import sliding_window_view
from tqdm.auto import tqdm

import config
from cohort import annotated
from files import writeWhole
from patients import alongMemory, fileOf, readCase, readVolumes
from transforms import makeTransforms, maskFunction, transformCase, transformVolume, volumeTransform

__all__ = ['describe', 'makeDataset', 'makeTransforms', 'transformCase', 'volumeTransform', 'windowStarts']

FORMAT = 2  # of the patch file; raised when its layout changes, so that older files are made anew


def windowStarts(length, size, stride):
    """Gives the starts of windows that cover an axis: 0, stride, ..., and the last one flush with the end.

    Args:
        length: pixels of the axis.
        size: pixels of a window; an axis that is shorter gets one window, at 0.
        stride: pixels from one window to the next; more than `size` would leave pixels out.

    Raises:
        ValueError: a stride that leaves pixels out, or none.
    """
    if not 0 < stride <= size:
        raise ValueError(f'A patch stride of {stride} was given; 1 to {size} (PATCH_SIZE) covers every pixel.')
    last = max(length - size, 0)
    return np.unique([*range(0, last, int(stride)), last])


def makeDataset(dataframe, filename, transform=None):
    """Writes the patches of the patients of a file list to an `.h5` file and gives how many there are.

    Each axial slice is cut into overlapping windows of `config.PATCH_SIZE` at `config.PATCH_STRIDE`. A patch with tumor
    is kept; of those with brain but no tumor `config.BACKGROUND_SHARE` is, drawn from `config.SEED` and the patient's
    name. The file holds `image` (N, C, 128, 128), float16 where all values lie in [-1, 1], else float32; `label`
    (N, 128, 128), uint8 classes; `case`, `slice`, `row`, `column` (N,), where the patch comes from; and in JSON, as
    attributes, `patients`, `settings` and `leftOut`, a dict of the patients that could not be used to the reasons. It
    is moved to its name when complete; a second call with the same patients and settings finds it, checks that every
    patch is sound, and cuts nothing. Memory is that of one patient for each of `config.PREPROCESS_WORKERS`.

    Args:
        dataframe: file list; patients without a segmentation are left out, and counted.
        filename: path of the file.
        transform: torchio transform of the whole volume, in the place of `volumeTransform()`; one that draws nothing,
            for patients are cut side by side.

    Raises:
        ValueError, FileNotFoundError: what `patients.readCase` says of bad data, of all bad patients at once (where
            `config.ON_BAD_PATIENT` is 'leaveOut', of none of them, unless there are no others); no patch was found.
    """
    if config.ON_BAD_PATIENT not in ('stop', 'leaveOut'):
        raise ValueError(f"config.ON_BAD_PATIENT is {config.ON_BAD_PATIENT!r}; 'stop' or 'leaveOut' was expected.")
    dataframe = annotated(dataframe, str(filename))
    settings = _settings(volumeTransform() if transform is None else transform, dataframe)
    noPatches = _countIfDone(filename, settings, list(dataframe.index.astype(str)))
    if noPatches is not None:
        print(f'{filename} is there, with {noPatches} patches of the same patients and settings.')
        return noPatches
    # torchio draws a number even where nothing is left to chance: a run that finds the file must go on as this one
    with writeWhole(filename) as part, torch.random.fork_rng(devices=[]):
        # values outside of [-1, 1] show with the first patient as a rule: then float16 gives way to float32
        noPatches = _writePatches(part, dataframe, transform, np.float16, settings)
        if noPatches is None:
            noPatches = _writePatches(part, dataframe, transform, np.float32, settings)
        if noPatches == 0:
            raise ValueError(f'{filename}: not one patch with tumor in {len(dataframe)} patients.')
    megabytes = Path(filename).stat().st_size / 1e6
    print(f'{filename}: {noPatches} patches of {len(dataframe)} patients, {megabytes:.0f} MB.')
    return noPatches


def _settings(transform, dataframe):
    """Gives, as JSON, all that decides what a patch file holds besides the names of the patients."""
    names = ('MODALITIES', 'EDITION', 'PATCH_SIZE', 'PATCH_STRIDE', 'BACKGROUND_SHARE', 'SEED')
    values = {name: describe(getattr(config, name)) for name in names}
    # the same names may stand for other files: those of another folder, or mended ones
    columns = (*config.MODALITIES, 'seg')
    sizes = [[_sizeOf(paths, column) for column in columns] for _, paths in dataframe.iterrows()]
    values['files'] = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()
    return json.dumps({'format': FORMAT, **values, 'transform': describe(transform)}, sort_keys=True)


def _sizeOf(paths, column):
    try:
        return fileOf(paths, column).stat().st_size
    except FileNotFoundError:
        if config.ON_BAD_PATIENT == 'stop':
            raise
        return None


def describe(value):
    """Gives a transform, or anything a transform holds, as plain values that are equal in every process."""
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, dict):
        return [[describe(key), describe(item)] for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        return value.tolist()
    if isinstance(value, types.CodeType):
        return [value.co_code.hex(), describe(value.co_consts), describe(value.co_names)]
    if isinstance(value, types.FunctionType):
        # the name is not enough: a notebook's cell may define another function under it
        held = [cell.cell_contents for cell in value.__closure__ or ()]
        return [f'{value.__module__}.{value.__qualname__}', *map(describe, (value.__code__, held, value.__defaults__))]
    if isinstance(value, functools.partial):
        return [describe(value.func), describe(value.args), describe(value.keywords)]
    if hasattr(value, '__qualname__'):
        return f'{value.__module__}.{value.__qualname__}'
    held = describe(dict(sorted(vars(value).items()))) if hasattr(value, '__dict__') else repr(value)
    return [describe(type(value)), held]


def _countIfDone(filename, settings, patients):
    """Gives the number of patches of a file made with these settings and patients, else None and says why."""
    if not Path(filename).exists():
        return None
    try:
        with h5py.File(filename, 'r') as file:
            kept, leftOut = json.loads(file.attrs['patients']), json.loads(file.attrs['leftOut'])
            isSame = file.attrs['settings'] == settings and kept == [name for name in patients if name not in leftOut]
            isSame = isSame and not (leftOut and config.ON_BAD_PATIENT == 'stop')
            noPatches = _countSound(file) if isSame else None
    except (OSError, KeyError, ValueError, RuntimeError, isal_zlib.error) as error:
        print(f'{filename} is damaged, or of another version ({error}), and is made anew.')
        return None
    if not isSame:
        print(f'{filename} was made of other patients or with other settings and is made anew.')
        return None
    for patient, reason in leftOut.items():
        print(f'{patient} is left out: {reason}')
    return noPatches


def _countSound(file):
    """Gives the number of patches of a file, after unpacking each: its checksum tells what a disk or a copy spoiled."""
    for name in _PLACES:
        file[name][:]
    for name in ('image', 'label'):
        patches, expected = file[name], math.prod(file[name].chunks) * file[name].dtype.itemsize
        for place in range(len(patches)):
            _, chunk = patches.id.read_direct_chunk((place, *(0,) * (patches.ndim - 1)))
            if len(isal_zlib.decompress(chunk, bufsize=expected)) != expected:
                raise ValueError(f'{name} {place} is cut off')
    return len(file['label'])


_PLACES = ('case', 'slice', 'row', 'column')  # where a patch comes from: datasets (N,) of int32


def _writePatches(part, dataframe, transform, dtype, settings):
    """Writes every patient's patches and gives how many; None, and stops, where values do not fit float16."""
    size, kept, bad = config.PATCH_SIZE, [], {}
    with h5py.File(part, 'w') as file:
        kinds = {
            'image': ((len(config.MODALITIES), size, size), dtype),
            'label': ((size, size), np.uint8),
            **dict.fromkeys(_PLACES, ((), np.int32)),
        }
        sets = {}
        for name, (shape, kind) in kinds.items():
            chunks = (1, *shape) if shape else (4096,)  # one patch a chunk: a shuffled read fetches nothing else
            packing = {'compression': 'gzip', 'compression_opts': _LEVEL, 'shuffle': True}
            options = {'chunks': chunks, 'maxshape': (None, *shape), **(packing if shape else {'fletcher32': True})}
            sets[name] = file.create_dataset(name, (0, *shape), kind, **options)
        cases = zip(dataframe.index.astype(str), _cutAhead(dataframe, transform, dtype), strict=True)
        for patient, cutting in tqdm(cases, 'cut', len(dataframe), leave=False):
            try:
                case = cutting.result()
            except (ValueError, OSError) as error:
                bad[patient] = error
                continue
            if case is None:
                return None
            if not (bad and config.ON_BAD_PATIENT == 'stop'):  # then the rest is only looked through
                _append(sets, len(kept), *case)
                kept.append(patient)
        _reportBad(bad, len(dataframe))
        file.attrs['settings'], file.attrs['patients'] = settings, json.dumps(kept)
        file.attrs['leftOut'] = json.dumps({patient: str(error) for patient, error in bad.items()})
        return len(sets['label'])


def _append(sets, number, where, packed):
    """Writes the packed patches of one patient, the `number`-th of the file, behind those that are there."""
    start = len(sets['case'])
    for values in sets.values():
        values.resize(start + len(where), axis=0)
    for name, chunks in packed.items():
        corner = (0,) * (sets[name].ndim - 1)
        for place, chunk in enumerate(chunks, start):
            sets[name].id.write_direct_chunk((place, *corner), chunk)
    if len(where):
        for name, values in zip(_PLACES, (number, *where.T), strict=True):
            sets[name][start:] = values


def _reportBad(bad, noPatients):
    """Raises, or prints, the errors of bad patients, all at once, as `config.ON_BAD_PATIENT` has it."""
    if bad and config.ON_BAD_PATIENT == 'stop':
        if len(bad) == 1:
            raise next(iter(bad.values()))
        few = '\n'.join(str(error) for error in list(bad.values())[:20])
        raise ValueError(f'{len(bad)} of {noPatients} patients cannot be used, the first of them:\n{few}')
    if len(bad) == noPatients:
        raise ValueError(f'None of the {noPatients} patients can be used: {next(iter(bad.values()))}')
    for error in bad.values():
        print(f'Left out: {error}')


_LEVEL = 1  # of gzip; higher ones take longer and save next to nothing


def _cutAhead(dataframe, transform, dtype):
    """Yields the future of what `_cutCase` gives of each patient, in order; threads cut the next few meanwhile.

    Threads, not processes: nearly all of the work leaves the interpreter's lock, and nothing has to be started.
    """
    rows = iter(dataframe.iterrows())
    with ThreadPoolExecutor(config.PREPROCESS_WORKERS) as pool:
        waiting = deque()
        while True:
            ahead = islice(rows, config.PREPROCESS_WORKERS + 1 - len(waiting))
            waiting.extend(pool.submit(_cutCase, *row, transform, dtype) for row in ahead)
            if not waiting:
                return
            yield waiting.popleft()


def _cutCase(patient, paths, transform, dtype):
    """Gives of one patient where its patches lie, int (N, 3), and dict of `image` and `label` to N packed chunks each.

    None where an image's values lie outside of [-1, 1] and `dtype` is float16.
    """
    cut = _cutStretched if transform is None else _cutTransformed
    where, label, channels = cut(patient, paths, transform)
    image = np.empty((len(where), len(config.MODALITIES), config.PATCH_SIZE, config.PATCH_SIZE), dtype)
    for place, patches in enumerate(channels):
        if dtype == np.float16 and patches.size and max(-patches.min(), patches.max()) > 1:
            return None
        torch.from_numpy(image)[:, place].copy_(torch.from_numpy(patches))  # NumPy rounds to float16 far slower
    return where, {'image': _pack(image), 'label': _pack(label)}


def _cutTransformed(patient, paths, transform):
    """Gives where the patches of a transformed patient lie, those of the label, and yields those of each channel."""
    image, label = readCase(paths)
    isBrain = (image != 0).any(0).transpose(2, 0, 1)  # (W, H, D) -> (D, W, H)
    x, y = (tensor.numpy() for tensor in transformVolume(image, label, transform, patient))
    where, lowest = _choosePatches(y > 0, isBrain, patient), x.min()
    # a label's minimum is 0 or, where the tumor fills all of the volume, would make tumor of padding
    return where, _cut(y, where, 0), (_cut(x[:, channel], where, lowest) for channel in range(x.shape[1]))


def _cutStretched(patient, paths, _):
    """Gives the same for `volumeTransform`, which is computed only where it is cut, one modality after the other."""
    volumes, isBrain = readVolumes(paths), None
    y = next(volumes).transpose(2, 0, 1)
    if config.BACKGROUND_SHARE:
        volumes = list(volumes)
        isBrain = functools.reduce(np.logical_or, map(maskFunction, volumes)).transpose(2, 0, 1)
    where = _choosePatches(y > 0, isBrain, patient)
    return where, _cut(y, where, 0), map(functools.partial(_stretchAndCut, where), volumes)  # lets go of each volume


def _stretchAndCut(where, volume):
    if volume.dtype.kind == 'f':
        volume = volume.astype(np.float32)  # as `readCase` gives it
    stretch, values = volumeTransform(), alongMemory(volume)[0](volume)
    limits = stretch.findLimits(values[maskFunction(values)])
    patches = _cut(volume.transpose(2, 0, 1), where, 0)
    stretched = stretch.stretch(patches, *limits)
    np.copyto(stretched, stretch.out_min, where=~maskFunction(patches))
    return stretched


def _pack(patches):
    """Gives each patch as HDF5's filters shuffle and gzip would store it, by a faster gzip, outside of HDF5's lock."""
    numbers = patches.view(f'u{patches.itemsize}').reshape(len(patches), math.prod(patches.shape[1:]))
    planes = ([(each >> 8 * byte).astype(np.uint8) for byte in range(patches.itemsize)] for each in numbers)
    return [isal_zlib.compress(np.concatenate(bytesOfAll), _LEVEL) for bytesOfAll in planes]


def _choosePatches(isTumor, isBrain, patient):
    """Gives the (slice, row, column) of the patches to keep, sorted: int (N, 3), of masks (D, W, H).

    The mask of the brain is asked for only where `config.BACKGROUND_SHARE` is not 0.
    """
    size, stride = config.PATCH_SIZE, config.PATCH_STRIDE
    rows, columns = (windowStarts(length, size, stride) for length in isTumor.shape[1:])

    def holds(mask):  # (windows, D)
        windows = [mask[:, row : row + size, column : column + size] for row in rows for column in columns]
        return np.array([window.any((1, 2)) for window in windows])

    isKept = holds(isTumor)
    if config.BACKGROUND_SHARE:
        generator = np.random.default_rng([config.SEED, zlib.crc32(str(patient).encode())])
        isKept |= holds(isBrain) & (generator.uniform(size=isKept.shape) < config.BACKGROUND_SHARE)
    slices, windows = np.nonzero(isKept.T)
    return np.stack([slices, rows[windows // len(columns)], columns[windows % len(columns)]], axis=1)


def _cut(volume, where, padding):
    """Cuts patches (N, 128, 128) from a volume (D, W, H); one smaller than a patch is padded with a value."""
    size = config.PATCH_SIZE
    short = [max(size - length, 0) for length in volume.shape[1:]]
    if any(short):
        volume = np.pad(volume, ((0, 0), (0, short[0]), (0, short[1])), constant_values=padding)
    windows = sliding_window_view(volume, (size, size), axis=(1, 2))  # (D, W', H', 128, 128)
    return windows[tuple(where.T)]
