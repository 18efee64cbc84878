"""Cut patients into patches and write them to HDF5."""

import errno
import functools
import json
import zlib
from pathlib import Path

import h5py
import hdf5plugin
import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

import config
from atomic import writeAtomically
from patients.cohort import medianSpacing
from patients.parallel import attempt, forEachPatient, reportBad, withSegmentation
from patients.reading import maskFunction, patientOf, readCase, readVolumes
from patients.volumes import PLANES, alongMemory, inWords, windowStarts
from provenance import FORMAT, checksums, describe, differences, readProvenance
from transforms import makeTransforms, transformVolume, volumeTransform

__all__ = ['makeDataset', 'makeTransforms', 'partFile']

THICK = 3  # times as long along one axis as along the others: a slice across another axis would be coarse
USUAL_SHARE = 0.1  # of the background patches
EMPTY_IN_BRATS = 0.6  # of the brain slices: .52 on average in 28 patients, up to .60 in 4,000 draws of 12 of them


def makeDataset(dataframe, filename, transform=None, part=None):
    """Write the patches of the patients of a file list to an `.h5` file and return how many there are.

    In each of `config.PLANES`, every `config.SLICE_STEP`-th slice is covered by windows of `config.PATCH_SIZE` at
    `config.PATCH_STRIDE`. With `config.RANDOM_STARTS` there are as many windows, at random starts. Windows with tumor,
    or with resection cavity if that is a class, are kept as patches. Of the other windows with brain, the fraction
    `config.BACKGROUND_SHARE` is kept; if it is None, 0.1, or more where more slices have no tumor than in BraTS. First
    slices, starts and background patches are drawn from `config.SEED` and the patient's id.

    Thick slices, whose median voxel is over three times as long along one axis as along the others, are all cut, and no
    other plane is.

    The file appears under its name when it is complete. If it exists and was cut from the same files with the same
    settings, its checksums are verified and nothing is cut. Memory does not grow with the number of patients. A message
    names the classes that no patch has.

    The file has these datasets (128 stands for `config.PATCH_SIZE`):
    - `image` (N, C, 128, 128), float16 if all values lie in [-1, 1], else float32; one patch per chunk, compressed by
      Zstandard, so that another program has to import hdf5plugin to read it;
    - `label` (N, 128, 128), uint8 classes; one patch per chunk;
    - `patient`, `plane`, `slice`, `row`, `column` (N,), int32: where each patch comes from. `patient` and `plane` are
      indices into the provenance's lists;
    - `provenance`, JSON, see `provenance.py`;
    - `leftOut`, JSON, the patients that could not be used: id -> [reason, checksums of the files, or null if another
      attempt may succeed].

    Args:
        dataframe: file list; a message counts the patients without a segmentation, which are left out.
        filename: path of the file.
        transform: torchio transform of the whole volume, in place of `volumeTransform()`. It must not be random, as
            patients are cut in parallel. It cannot be compared with an earlier one, so patches are cut anew each time.
        part: (i, n) cuts shard i of n (from 0), every n-th patient, into the file `partFile(filename, part)`. The
            shards may be cut by n processes or machines; `utils.BRATSDataset` reads a list of their files as one.

    Returns:
        int, number of patches.

    Raises:
        ValueError, FileNotFoundError: bad data, as in `patients.readCase`; all bad patients are named at once. With
            `config.ON_BAD_PATIENT = 'leaveOut'` they are left out instead, unless all are bad.
        ValueError: there is no patch to keep, or a patient is in the file list twice.
    """
    reportBad({}, 0)  # raises a ValueError for an unknown ON_BAD_PATIENT
    dataframe = withSegmentation(dataframe, str(filename))
    if dataframe.index.has_duplicates:
        twice = dataframe.index[dataframe.index.duplicated()][0]
        raise ValueError(f'{filename}: patient {twice} is in the file list more than once.')
    everyone, known = dataframe, {}
    provenance = {'format': FORMAT, 'settings': _describe(everyone, transform)}
    if part is not None:
        dataframe, own = _takeShard(dataframe, part)
        filename, provenance = partFile(filename, part), provenance | own
    numPatches = _countIfCurrent(filename, provenance, dataframe, known)
    if numPatches is not None:
        print(f'{filename} exists, with {numPatches} patches of the same patients and settings.')
        return numPatches
    provenance['settings']['share'] = _findShare(everyone, provenance['settings'])
    # torchio draws a number even for a deterministic transform; with or without a cut, the run must go on equally
    with writeAtomically(filename) as temporary, torch.random.fork_rng(devices=[]):
        # if a value lies outside [-1, 1], usually in the first patient already, all are written again as float32
        numPatches = _writePatches(temporary, dataframe, transform, np.float16, provenance, known)
        if numPatches is None:
            numPatches = _writePatches(temporary, dataframe, transform, np.float32, provenance, known)
        if numPatches == 0:
            raise ValueError(f'{filename}: no patch with tumor in {len(dataframe)} patients.')
    megabytes = Path(filename).stat().st_size / 1e6
    print(f'{filename}: {numPatches} patches of {len(dataframe)} patients, {megabytes:.0f} MB.')
    return numPatches


def _describe(dataframe, transform):
    """Return the settings with which a file list is cut; of thick slices only their plane is, and every slice."""
    settings, spacing = describe(dataframe, transform), medianSpacing(dataframe)
    plane = next(name for name, axes in PLANES.items() if axes[0] == np.argmax(spacing))
    if plane in settings['planes'] and max(spacing) > THICK * sorted(spacing)[1]:
        text = f'the median voxel measures {inWords(spacing)} mm (W x H x D). Only {plane} slices are cut, and all'
        print(f'Thick slices: {text} of them (config.PLANES, config.SLICE_STEP).')
        settings |= {'planes': [plane], 'sliceStep': None}
    return settings | {'spacing': spacing}


def _findShare(dataframe, settings):
    """Return the fraction of the background patches of a file list to keep.

    If `config.BACKGROUND_SHARE` is None, it is 0.1 up to the fraction of brain slices without tumor that BraTS has, and
    rises in proportion above, to 1 where no slice has tumor. Only 0.1 was measured.
    """
    share = (settings['background'] or [0])[0]
    if share is not None:
        return share
    # without an image all slices count as brain, which can only raise the fraction: images are read only if it is high
    for modalities in ((), config.MODALITIES[:1]):
        count = functools.partial(_emptyFraction, plane=settings['planes'][0], modalities=modalities)
        found = [each for each in forEachPatient(attempt(count), dataframe, 'count') if isinstance(each, float)]
        empty = np.mean(found or [0]).item()
        if empty <= EMPTY_IN_BRATS:
            return USUAL_SHARE
    share = 1 - (1 - USUAL_SHARE) * (1 - empty) / (1 - EMPTY_IN_BRATS)
    text = f'{empty:.0%} of the brain slices have no tumor, more than in BraTS. Of the patches without tumor'
    print(f'{text} {share:.0%} are kept, not {USUAL_SHARE:.0%} (config.BACKGROUND_SHARE).')
    return share


def _emptyFraction(paths, plane, modalities):
    """Return the fraction of the slices with brain, those where the first of the modalities is not 0, without tumor."""
    volumes = (volume.transpose(2, 0, 1).transpose(PLANES[plane]) for volume in readVolumes(paths, modalities))
    isTumor, *isBrain = (maskFunction(volume).any((1, 2)) for volume in volumes)
    isBrain = isBrain[0] if isBrain else np.ones_like(isTumor)
    return 1 - (isTumor & isBrain).sum() / max(1, isBrain.sum())


def _takeShard(dataframe, part):
    """Return the rows of shard (i, n) of a file list, and a dict of what they add to the provenance."""
    number, numShards = part
    if not 0 <= number < numShards <= len(dataframe):
        raise ValueError(f'part is {part}; (i, n) with 0 <= i < n <= {len(dataframe)} patients was expected.')
    rows = {str(patient): row for row, patient in enumerate(dataframe.index) if row % numShards == number}
    return dataframe.iloc[number::numShards], {'shard': [number, numShards], 'rows': rows}


def partFile(filename, part):
    """Return the path of shard (i, n) of a patch file, such as 'train.0of4.h5'."""
    path = Path(filename)
    return str(path.with_name(f'{path.stem}.{part[0]}of{part[1]}{path.suffix}'))


def _countIfCurrent(filename, provenance, dataframe, known):
    """Return the number of patches of a file with these settings and patients; else None, with a message.

    The checksums that the file holds are added to `known`, for `provenance.checksums`. The patches of a run that has a
    checkpoint are not replaced: a ValueError says why they would be.
    """
    if not Path(filename).exists():
        return None
    try:
        with h5py.File(filename, 'r') as file:
            found, leftOut = readProvenance(file), json.loads(file['leftOut'][()])
            known.update(found['files'])
            reasons = _compare(found, provenance, leftOut, dataframe, known)
            numPatches = None if reasons else _verifyChecksums(file)
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        print(f'{filename} is damaged, or of another version ({error}), and is replaced.')
        return None
    isOfRun = str(filename) in (config.TRAIN_FILE, config.VAL_FILE) and Path(config.LAST_CHECKPOINT).exists()
    if reasons and isOfRun and provenance['settings']['stretching'] is not None:  # unlike a transform of one's own
        raise ValueError(
            f'{filename} is part of the run of {config.LAST_CHECKPOINT} and is not replaced, although '
            f'{"; ".join(reasons)}. Set another config.OUTPUT_FOLDER.'
        )
    if reasons:
        print(f'{filename} is replaced: {"; ".join(reasons)}.')
        return None
    for patient, (reason, _) in leftOut.items():
        print(f'{patient} is left out: {reason}')
    return numPatches


def _compare(found, provenance, leftOut, dataframe, known):
    """Return why a file with the provenance `found` has to be cut anew, a list of texts; empty if it is current."""
    reasons = differences(found, provenance, patients=False)
    if leftOut and config.ON_BAD_PATIENT == 'stop':
        reasons.append(f'{len(leftOut)} patients are left out')
    if provenance['settings']['stretching'] is None:
        reasons.append('a transform of your own cannot be compared with an earlier one')
    if reasons:
        return reasons
    sums = forEachPatient(attempt(functools.partial(_sumsOf, known=known)), dataframe, 'compare')
    sums = dict(zip(dataframe.index.astype(str), sums, strict=True))
    if bad := [str(each) for each in sums.values() if isinstance(each, Exception)]:
        return bad[:1]
    before = found['patients'] | {patient: content for patient, (_, content) in leftOut.items()}
    reasons = differences({**found, 'patients': before}, {**provenance, 'patients': sums})
    isReordered = list(found['patients']) != [patient for patient in sums if patient not in leftOut]
    isReordered |= found.get('rows') != provenance.get('rows')
    if isReordered and not reasons:
        reasons.append('the patients are in another order')
    return reasons


_DATASETS = ('image', 'label')
_ORIGINS = ('patient', 'plane', 'slice', 'row', 'column')  # where a patch comes from


def _verifyChecksums(file):
    """Return the number of patches of a file after reading everything: HDF5 raises an OSError on a wrong checksum."""
    for name in (*_DATASETS, *_ORIGINS):
        for start in range(0, len(file[name]), 256):
            file[name][start : start + 256]
    return len(file['label'])


def _writePatches(path, dataframe, transform, dtype, provenance, known):
    """Write the patches of every patient and return how many; stop and return None if values do not fit float16."""
    size, contents, kept, bad = config.PATCH_SIZE, {}, [], {}
    absent = set(range(1, config.NO_CLASSES))
    shapes = {'image': (len(config.MODALITIES), size, size), 'label': (size, size)}
    # no chunk cache: on a full disk HDF5 would fail again when it closes the file, and crash the process at exit
    # no lock of HDF5: it would come after the file was emptied; `writeAtomically` holds one
    with h5py.File(path, 'w', rdcc_nbytes=0, locking=False) as file:
        for name, kind in zip(_DATASETS, (dtype, np.uint8), strict=True):
            _createDataset(file, name, shapes[name], kind, **hdf5plugin.Zstd(clevel=1))
        for name in _ORIGINS:
            _createDataset(file, name, (), np.int32)
        options = {'transform': transform, 'dtype': dtype, 'settings': provenance['settings']}
        cut = functools.partial(_cutWithChecksums, known=known, **options)
        results = forEachPatient(cut, dataframe, 'cut')
        for patient, (content, result) in zip(dataframe.index.astype(str), results, strict=True):
            contents[patient] = content
            if result is None:
                return None
            if isinstance(result, Exception):
                bad[patient] = result
            elif not (bad and config.ON_BAD_PATIENT == 'stop'):  # otherwise the others are only checked
                _append(file, len(kept), *result)
                kept.append(patient)
                absent = {number for number in absent if not (result[-1] == number).any()}
        reportBad(bad, len(dataframe))
        patients = {patient: contents[patient] for patient in kept}
        for number in absent if kept else ():
            print(f'None of these {len(kept)} patients has a patch with {config.CLASS_NAMES[number]}.')
        # datasets, because attributes hold at most 64 kB
        file['provenance'] = json.dumps({**provenance, 'patients': patients, 'files': known})
        leftOut = {patient: [str(each), None if _mayPass(each) else contents[patient]] for patient, each in bad.items()}
        file['leftOut'] = json.dumps(leftOut)
        return len(file['label'])


def _mayPass(error):
    """Return whether an error came from the disk, other than a missing file, so that another attempt may succeed."""
    number = getattr(error.__cause__ or error, 'errno', None)
    return number is not None and number != errno.ENOENT


def _createDataset(file, name, shape, dtype, **options):
    """Create an empty dataset (0, *shape) with checksums."""
    chunks = (1, *shape) if shape else (4096,)  # one patch per chunk: a shuffled read decompresses nothing else
    file.create_dataset(name, (0, *shape), dtype, chunks=chunks, maxshape=(None, *shape), fletcher32=True, **options)


def _append(file, number, origins, image, label):
    """Append the patches of one patient, whose index in the file is `number`."""
    start, count = len(file['label']), len(origins)
    columns = zip(_ORIGINS, (np.full(count, number), *origins.T), strict=True)
    for name, values in {'image': image, 'label': label, **dict(columns)}.items():
        file[name].resize(start + count, axis=0)
        file[name][start:] = values


def _cutWithChecksums(paths, known, **options):
    """Return the checksums of a patient's files, and what `_cutPatient` returns or the error that it raised."""
    content = attempt(functools.partial(_sumsOf, known=known))(paths)
    if isinstance(content, Exception):
        return None, content
    return content, attempt(functools.partial(_cutPatient, **options))(paths)


def _sumsOf(paths, known):
    """Return `checksums`; raise a ValueError, as of any bad patient, if a file cannot be opened."""
    try:
        return checksums(paths, known)
    except OSError as error:
        raise ValueError(f'{patientOf(paths)}: {error}') from error


def _cutPatient(paths, transform, dtype, settings):
    """Return the patches of one patient: origins int (N, 4), image (N, C, 128, 128), label uint8 (N, 128, 128).

    Return None if `dtype` is float16 and a value lies outside [-1, 1].
    """
    cut = _cutStretched if transform is None else _cutTransformed
    origins, label, channels = cut(paths, transform, settings)
    image = np.empty((len(origins), len(config.MODALITIES), config.PATCH_SIZE, config.PATCH_SIZE), dtype)
    for number, patches in enumerate(channels):
        if dtype == np.float16 and patches.size and max(-patches.min(), patches.max()) > 1:
            return None
        torch.from_numpy(image)[:, number].copy_(torch.from_numpy(patches))  # NumPy rounds to float16 far slower
    return origins, image, label


def _cutTransformed(paths, transform, settings):
    """Return origins and label patches of a transformed patient, and an iterator over the patches of each channel."""
    image, label = readCase(paths)
    isBrain = maskFunction(image).any(0).transpose(2, 0, 1)  # (W, H, D) -> (D, W, H)
    x, y = (tensor.numpy() for tensor in transformVolume(image, label, transform, patientOf(paths)))
    origins, lowest = _choosePatches(y > 0, isBrain, patientOf(paths), settings), x.min()
    cut = functools.partial(_cut, origins=origins, planes=settings['planes'])
    # labels are padded with 0: their own minimum would be tumor where tumor fills the volume
    return origins, cut(y, padding=0), (cut(x[:, channel], padding=lowest) for channel in range(x.shape[1]))


def _cutStretched(paths, _, settings):
    """Return what `_cutTransformed` returns for `volumeTransform()`. To save time, only the patches are stretched."""
    volumes, isBrain = readVolumes(paths), None
    y = next(volumes).transpose(2, 0, 1)
    if settings['share']:
        volumes = list(volumes)
        isBrain = functools.reduce(np.logical_or, map(maskFunction, volumes)).transpose(2, 0, 1)
    origins = _choosePatches(y > 0, isBrain, patientOf(paths), settings)
    cut = functools.partial(_cut, origins=origins, planes=settings['planes'], padding=0)
    return origins, cut(y), map(functools.partial(_stretchAndCut, cut), volumes)


def _stretchAndCut(cut, volume):
    """Return the stretched patches of one modality (W, H, D); the percentiles are those of the whole volume."""
    if volume.dtype.kind == 'f':
        volume = volume.astype(np.float32)  # as in `readCase`
    stretch, values = volumeTransform(), alongMemory(volume)[0](volume)
    patches = cut(volume.transpose(2, 0, 1))
    return stretch.stretch(patches, maskFunction(patches), *stretch.findLimits(values[maskFunction(values)]))


def _choosePatches(isTumor, isBrain, patient, settings):
    """Return the (plane, slice, row, column) of the patches to keep, sorted by plane and slice, int (N, 4).

    Args:
        isTumor, isBrain: masks (D, W, H); `isBrain` may be None if the `share` is 0.
        patient: id, which seeds the random draws together with `config.SEED`.
    """
    chosen, step = [], (settings['sliceStep'] or [1])[0]
    for number, plane in enumerate(settings['planes']):
        generator = np.random.default_rng([config.SEED, zlib.crc32(f'{patient} {plane}'.encode())])
        masks = [mask if mask is None else mask.transpose(PLANES[plane]) for mask in (isTumor, isBrain)]
        places = _choosePlaces(*masks, generator, step, settings['share'])
        chosen.append(np.concatenate([np.full((len(places), 1), number), places], axis=1))
    return np.concatenate(chosen)


def _choosePlaces(isTumor, isBrain, generator, step, share):
    """Return the (slice, row, column) of the patches of one plane to keep, sorted by slice, int (N, 3)."""
    size, slices = config.PATCH_SIZE, np.arange(generator.integers(step), len(isTumor), step)
    grid = [windowStarts(length, size, config.PATCH_STRIDE) for length in isTumor.shape[1:]]
    starts = np.stack(np.meshgrid(*grid, indexing='ij'), -1).reshape(-1, 2)  # (windows, 2)
    starts = np.broadcast_to(starts, (len(slices), *starts.shape))
    if config.RANDOM_STARTS:
        starts = generator.integers([start[-1] + 1 for start in grid], size=starts.shape)

    def isIn(mask):  # bool (slices, windows): whether each window holds a voxel of the mask
        cut = [
            [mask[number, row : row + size, column : column + size].any() for row, column in windows]
            for number, windows in zip(slices, starts, strict=True)
        ]
        return np.array(cut).reshape(starts.shape[:2])

    isKept = isIn(isTumor)
    if share:
        isKept |= isIn(isBrain) & (generator.uniform(size=isKept.shape) < share)
    numbers, windows = np.nonzero(isKept)
    return np.column_stack([slices[numbers], starts[numbers, windows]])


def _cut(volume, origins, planes, padding):
    """Return the patches (N, 128, 128) of a volume (D, W, H) at origins (N, 4), which are sorted by plane."""
    planes = [volume.transpose(PLANES[plane]) for plane in planes]
    places = [origins[origins[:, 0] == number, 1:] for number in range(len(planes))]
    return np.concatenate([_cutPlane(*pair, padding) for pair in zip(planes, places, strict=True)])


def _cutPlane(volume, places, padding):
    """Return the patches (N, 128, 128) of slices (D, W, H) at places (N, 3); slices smaller than a patch are padded."""
    size = config.PATCH_SIZE
    missing = [max(size - length, 0) for length in volume.shape[1:]]
    if any(missing):
        volume = np.pad(volume, ((0, 0), (0, missing[0]), (0, missing[1])), constant_values=padding)
    windows = sliding_window_view(volume, (size, size), axis=(1, 2))  # (D, W', H', 128, 128)
    return windows[tuple(places.T)]
