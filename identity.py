"""Describe what patches were cut from and how, and compare it wherever patch file, checkpoint and model meet."""

import functools
import json
import re
import struct
import zlib
from pathlib import Path

import h5py
import numpy as np
import torchio as tio

import config
from editions import classesOf, known
from fingerprint import fingerprint
from patients import detectEdition, hasFile, maskFunction
from transforms import StretchHistogram, imageKeys, volumeTransform

# Parts of an identity that decide what a network sees, with the words for them
SEEN = {
    'modalities': 'config.MODALITIES',
    'classes': 'config.NO_CLASSES or config.CLASS_NAMES',
    'patchSize': 'config.PATCH_SIZE',
    'planes': 'config.PLANES',
    'stretching': '[config.STRETCH_PERCENTILES, config.STRETCH_RANGE]',
}
# Further parts that decide which patches there are
CUT = {
    'editions': "the labels' classes in each edition",
    'patchStride': 'config.PATCH_STRIDE',
    'sliceStep': '[config.SLICE_STEP, config.SEED]',
    'randomStarts': 'the seed of config.RANDOM_STARTS',
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
        (name -> [label, class] pairs), `patchSize`, `planes`, `patchStride`, `sliceStep` ([step, seed], or None if
        every slice is cut), `randomStarts` (the seed, or None if windows start at fixed places), `background`
        ([fraction, seed], or None without background patches), `stretching` ([percentiles, range], or None if another
        transform is given) and `transform` (its fingerprint, or None if it only stretches). `makeDataset` adds
        `patients`: id -> column -> checksum.

    Raises:
        ValueError: the transform has no fingerprint, see `fingerprint`; or an edition has other classes than `config`.
    """
    stretching = stretchingOf(volumeTransform() if transform is None else transform)
    names = {_editionOf(paths) for _, paths in dataframe.iterrows()} - {None}
    share, step = plain(config.BACKGROUND_SHARE), plain(config.SLICE_STEP)
    return {
        **{name: value for name, value in configured().items() if name != 'stretching'},
        'editions': {name: [[*pair] for pair in classesOf(name).items()] for name in sorted(names)},
        'patchStride': plain(config.PATCH_STRIDE),
        'sliceStep': [step, plain(config.SEED)] if step > 1 else None,
        'randomStarts': plain(config.SEED) if config.RANDOM_STARTS else None,
        'background': [share, plain(config.SEED)] if share else None,
        'stretching': stretching,
        'transform': None if stretching else fingerprint(transform),
    }


def configured():
    """Return the parts `SEEN` of an identity, as `config` sets them."""
    return {
        'modalities': plain(config.MODALITIES),
        'classes': plain(config.CLASS_NAMES),
        'patchSize': plain(config.PATCH_SIZE),
        'planes': plain(config.PLANES),
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
    isAlways = getattr(transform, 'probability', 1) == 1
    while isinstance(transform, tio.Compose) and len(transform.transforms) == 1:
        [transform] = transform.transforms
        isAlways = isAlways and transform.probability == 1
    isPlain = type(transform) is StretchHistogram and transform.masking_method is maskFunction
    if not (isPlain and isAlways) or transform.in_min_max is not None or transform.exclude:
        return None
    return stretchingsIn(transform)[0] if transform.include == imageKeys() else None


def stretchingsIn(transform):
    """Return [percentiles, range] of each stretching that a transform holds."""
    if isinstance(transform, tio.Compose):
        return [found for child in transform.transforms for found in stretchingsIn(child)]
    if isinstance(transform, tio.OneOf):
        return [found for child in transform.transforms_dict for found in stretchingsIn(child)]
    if not isinstance(transform, tio.RescaleIntensity):
        return []
    pairs = transform.percentiles, (transform.out_min, transform.out_max)
    return [[[float(value) for value in pair] for pair in pairs]]


def checksums(paths, known=None):
    """Return a checksum of the content of each file of a patient that patches are cut from.

    A `.gz` file ends with the checksum and length of its content: these are taken. Any other file is read, unless its
    size, time and inode are known.

    Args:
        paths: one row of the file list.
        known: dict of path -> [size, time, inode, checksum] of earlier calls; what is read is added.

    Returns:
        dict of column -> checksum (text), for `config.MODALITIES` and `seg`; None for a file that does not exist.
    """
    known = {} if known is None else known
    found = {}
    for column in (*config.MODALITIES, 'seg'):
        file = Path(paths[column]) if hasFile(paths, column) else None
        found[column] = checksumOf(file, known) if file and file.is_file() else None
    return found


def checksumOf(file, known):
    """Return the CRC-32 and length of a file's content, the same whether it is packed or not."""
    if file.name.lower().endswith('.gz'):
        with open(file, 'rb') as stream:
            stream.seek(-min(8, file.stat().st_size), 2)
            value, size = struct.unpack('<II', stream.read().rjust(8, b'\0'))
        return f'{value:08x}{size:x}'
    found = file.stat()
    state = [found.st_size, found.st_mtime_ns, found.st_ino]
    if known.get(str(file), [])[:3] != state:
        known[str(file)] = [*state, f'{_crcOf(str(file), *state):08x}{found.st_size & 0xFFFFFFFF:x}']
    return known[str(file)][3]


@functools.lru_cache(10_000)
def _crcOf(file, *state):
    """Return the CRC-32 of a file's content; a file of the same size, time and inode is read once."""
    value = 0
    with open(file, 'rb') as stream:
        while block := stream.read(2**22):
            value = zlib.crc32(block, value)
    return value


def readIdentity(file):
    """Return the identity that `makeDataset` wrote into a patch file.

    Args:
        file: path, or open h5py.File; or a list of the paths of all parts.

    Returns:
        dict as `identify` returns it, with `patients` and, for `checksums`, `files`.

    Raises:
        KeyError, OSError, ValueError: not a patch file of this version; or not all parts of one.
    """
    if isinstance(file, (list, tuple)):
        return _mergeIdentities([readIdentity(part) for part in file])
    if not isinstance(file, h5py.File):
        with h5py.File(file, 'r') as opened:
            return readIdentity(opened)
    return json.loads(file['identity'][()])


def _mergeIdentities(parts):
    """Return the identity of a patch file whose parts have these: that of the whole, its patients in their order."""
    numbers = [found.get('part', [0, 1]) for found in parts]
    if sorted(numbers) != [[number, len(parts)] for number in range(len(parts))]:
        raise ValueError(f'The files are the parts {numbers}; all parts [i, n] of one file were expected.')
    for found in parts[1:]:
        if differing := differences(parts[0], found, {**SEEN, **CUT}):
            raise ValueError(f'The parts were cut with other settings: {"; ".join(differing)}.')
    patients = {patient: content for found in parts for patient, content in found['patients'].items()}
    if len(patients) < sum(len(found['patients']) for found in parts):
        raise ValueError('The parts have patients in common: they are not of one file list.')
    rows = {patient: row for found in parts for patient, row in found.get('rows', {}).items()}
    files = {path: state for found in parts for path, state in found['files'].items()}
    ordered = {patient: patients[patient] for patient in sorted(patients, key=lambda patient: rows.get(patient, 0))}
    merged = {name: value for name, value in parts[0].items() if name not in ('part', 'rows')}
    return merged | {'patients': ordered, 'files': files}


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
    differing = differences(found, configured(), names)
    declared = config.EDITION
    if declared is not None and declared not in found['editions']:
        edition = known()[declared]
        pattern = edition.claims or edition.patient  # the declared edition takes the patients that have its names
        if any(re.fullmatch(pattern, patient) for patient in found['patients']):
            differing.append(f'its patients are of {", ".join(found["editions"])}, not config.EDITION = {declared!r}')
    if differing:
        raise ValueError(
            f'{file} was cut with other settings: {"; ".join(differing)}. Cut it again with preprocess.makeDataset, or '
            'set config as it was.'
        )
