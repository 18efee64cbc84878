"""Find the patients in a folder and read one."""

import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from isal import igzip

import config

COLUMNS = ('t1', 't1ce', 't2', 'flair', 'seg')
MAX_MAGNITUDE = 1e6  # no scanner writes more; float32 and the percentiles stay exact below it
UNKNOWN = 255  # stands for a label without a class until it is refused
MAX_VOXELS = 2**27  # 512 x 512 x 512: a header that promises more is broken, and is refused before memory is asked for
MAX_OFFSET = 2**24  # bytes before the first voxel; likewise


@dataclass(frozen=True)
class Edition:
    """How one edition of BraTS names its files and its labels: all that the code knows of an edition."""

    patient: str  # regular expression of a patient id
    suffixes: dict  # what tells a file's content -> its columns in the file list
    classes: dict  # label in the files -> class; of two labels of one class, the first is written
    name: str = r'{patient}[_-]{suffix}'  # of a file, from its folder on, without its ending
    channels: dict | None = None  # column -> place in a 4-D file; None: a file per modality
    isTold: bool = True  # False: another edition has the same names, so this one has to be declared

    def labels(self):
        """Gives uint8 (NO_CLASSES,): the label that a class is written as."""
        written = {number: label for label, number in reversed(self.classes.items())}
        return np.array([written[number] for number in sorted(written)], np.uint8)

    def parse(self, path, anyPatient=False):
        """Gives (patient id, columns) of a file that is named as this edition names it, else None."""
        ends, patient = '|'.join(self.suffixes), '[^/]+' if anyPatient else self.patient
        pattern = self.name.format(patient=f'(?P<patient>{patient})', suffix=f'(?P<suffix>{ends})')
        match = re.fullmatch(f'(?:.*/)?{pattern}', _stem(path), re.IGNORECASE)
        return match and (match['patient'], self.suffixes[match['suffix'].lower()])


_CLASSIC = {name: (name,) for name in COLUMNS}
_NEWER = {'t1n': ('t1',), 't1c': ('t1ce',), 't2w': ('t2',), 't2f': ('flair',), 'seg': ('seg',)}
_ALL = ('flair', 't1', 't1ce', 't2')  # in one 4-D file, in this order
_UNTIL_2021 = {0: 0, 1: 1, 2: 2, 4: 3}
EDITIONS = {
    'BraTS2018': Edition(r'Brats18_\w+', _CLASSIC, _UNTIL_2021),
    'BraTS2019': Edition(r'BraTS19_\w+', _CLASSIC, _UNTIL_2021),
    'BraTS2020': Edition(r'BraTS20_(?:Training|Validation|Testing)_\d+', _CLASSIC, _UNTIL_2021),
    'BraTS2021': Edition(r'BraTS2021_\d+', _CLASSIC, _UNTIL_2021),
    'BraTS2023': Edition(r'BraTS-(?:GLI|SSA)-\d+-\d+', _NEWER, {0: 0, 1: 1, 2: 2, 3: 3}),
    # after treatment: 4 is the cavity of the resection, which is no tumor and never the enhancing one: background
    'BraTS2024': Edition(r'BraTS-GLI-\d+-\d+', _NEWER, {0: 0, 1: 1, 2: 2, 3: 3, 4: 0}, isTold=False),
    'Decathlon': Edition(
        r'BRATS_\d+',
        {'imagestr': _ALL, 'imagests': _ALL, 'labelstr': ('seg',)},
        {0: 0, 1: 2, 2: 1, 3: 3},
        name=r'{suffix}/{patient}',
        channels={column: place for place, column in enumerate(_ALL)},
    ),
}
# Files that were published under a wrong name: stem -> the stem it should have
MISNAMED = {'W39_1998.09.19_Segm': 'BraTS20_Training_355_seg'}


def makeFileList(folder=None):
    """Gives the patients below a folder, one row each.

    Args:
        folder: where to look, however deep the patients lie; default `config.DATA_FOLDER`. Files that do not carry the
            name of a modality or a segmentation are passed over, and so are hidden ones (`._*`, `.DS_Store`).

    Returns:
        DataFrame indexed by patient id, sorted, columns `t1`, `t1ce`, `t2`, `flair`, `seg` with paths (str). A file
        that a patient does not have is None.

    Raises:
        FileNotFoundError: the folder does not exist, or no patient lies in it.
        ValueError: a file's edition cannot be told from its name, or a patient has a file twice.
    """
    folder = folder or config.DATA_FOLDER
    if folder is None:
        raise FileNotFoundError('No folder of patients: set config.DATA_FOLDER or the variable BRATS_FOLDER to it.')
    if not Path(folder).is_dir():
        raise FileNotFoundError(f'The folder of patients {folder} does not exist.')
    rows = {}
    for path in _niftiFiles(folder):
        told = _tellEdition(path)
        if told is None:
            continue
        _, patient, columns = told
        row = rows.setdefault(patient, dict.fromkeys(COLUMNS))
        for column in columns:
            if row[column] is not None:
                raise ValueError(f'Patient {patient} has {column} twice: {row[column]} and {path}. Keep one of them.')
            row[column] = str(path)
    if not rows:
        raise FileNotFoundError(
            f'No patient below {folder}. Expected files like BraTS20_Training_001_t1ce.nii.gz or '
            'BraTS-GLI-00000-000-t1c.nii.gz; files named otherwise need config.EDITION.'
        )
    table = pd.DataFrame.from_dict(rows, orient='index', columns=list(COLUMNS), dtype=object).sort_index()
    return table.where(table.notna(), None).rename_axis('patient')


def _niftiFiles(folder):
    """Yields the NIfTI files below a folder in a fixed order; a folder met again through a link is not entered."""
    seen = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(here))
        folders[:] = sorted(name for name in folders if os.path.realpath(os.path.join(here, name)) not in seen)
        for name in sorted(names):
            if re.search(r'\.nii(\.gz)?$', name, re.IGNORECASE) and not name.startswith('.'):
                yield Path(here, name)


def _stem(path):
    """Gives the name of a file with its folder's, without the ending, misnamed ones mended."""
    path = Path(path)
    stem = re.sub(r'\.nii(\.gz)?$', '', path.name, flags=re.IGNORECASE)
    return f'{path.parent.name}/{MISNAMED.get(stem, stem)}'


def _tellEdition(path):
    """Gives (name of the edition, patient id, columns) of a file, None where its name is not that of a patient's file.

    Names go before what is declared: `config.EDITION` decides between editions that name files alike, and for names
    that tell nothing.

    Raises:
        ValueError: the name has the suffix of a modality or segmentation but tells no edition, and none is declared.
    """
    declared = config.EDITION
    if declared is not None and declared not in EDITIONS:
        raise ValueError(f'config.EDITION is {declared!r}; known are {", ".join(EDITIONS)}.')
    told = [name for name, edition in EDITIONS.items() if edition.isTold and name != declared]
    for name in ([] if declared is None else [declared]) + told:
        if parsed := EDITIONS[name].parse(path):
            return name, *parsed
    if declared is not None:
        parsed = EDITIONS[declared].parse(path, anyPatient=True)
        return parsed and (declared, *parsed)
    # Decathlon's folders hold every organ's images, so a name there says nothing
    if any(edition.parse(path, anyPatient=True) for edition in EDITIONS.values() if not edition.channels):
        raise ValueError(f'{path}: {_UNTOLD}')
    return None


_UNTOLD = (
    'the edition cannot be told from the name, and labels mean different tissues in different editions. Say which it '
    f'is: config.EDITION = one of {", ".join(map(repr, EDITIONS))}.'
)


def tellEdition(paths):
    """Gives the name of the edition of one patient, a key of `EDITIONS`, as its file names or `config.EDITION` tell it.

    Args:
        paths: one row of the file list (Series or dict).

    Raises:
        ValueError: nothing tells the edition.
    """
    for column in COLUMNS:
        told = _tellEdition(paths[column]) if hasFile(paths, column) else None
        if told is not None:
            return told[0]
    if config.EDITION is None:
        raise ValueError(f'{patientOf(paths)}: {_UNTOLD}')
    return config.EDITION


def hasFile(paths, column):
    """Tells whether a row of the file list has a path in a column (an empty cell is None or NaN)."""
    return column in paths and not pd.isna(paths[column])


def fileOf(paths, column):
    """Gives the Path of a file of a row of the file list, which is there.

    Raises:
        FileNotFoundError: the row has no path in the column, or there is no file.
    """
    if not hasFile(paths, column):
        raise FileNotFoundError(f'{patientOf(paths)}: no file for the modality {column} of config.MODALITIES.')
    if not Path(paths[column]).is_file():
        raise FileNotFoundError(f'{patientOf(paths)}: {paths[column]} does not exist.')
    return Path(paths[column])


def patientOf(paths):
    """Gives the id of a row of the file list, or the folder of its first file where the row has no name."""
    name = getattr(paths, 'name', None)
    return str(name) if name is not None else Path(next(paths[c] for c in COLUMNS if hasFile(paths, c))).parent.name


def readCase(paths):
    """Gives one patient as the network's channels and classes: the only place that reads the data's NIfTI.

    Args:
        paths: one row of the file list (Series or dict).

    Returns:
        image: float32 (C, W, H, D), intensities as in the files, a channel per entry of `config.MODALITIES`, axes
            rising to the patient's right, front and top (RAS+), whatever order the files have.
        label: uint8 (W, H, D), classes 0 to 3 by the edition's table; None where the patient has no segmentation.

    Raises:
        FileNotFoundError: a modality of `config.MODALITIES` is missing.
        ValueError: a file cannot be read, is not 3-D, is not finite or beyond 1e6, lies on another grid than the first
            modality, or has a label that its edition does not know. Patient and file are named.
    """
    label, *volumes = readVolumes(paths)
    # in memory as in the files, whose first axis is the fastest: to turn it around takes longer than to read it
    image = np.empty((len(volumes), *volumes[0].shape[::-1]), np.float32).transpose(0, 3, 2, 1)
    for channel, volume in zip(image, volumes, strict=True):
        channel[:] = volume
    return image, None if label is None else np.asfortranarray(label)


def readVolumes(paths):
    """Yields what `readCase` gives, and refuses what it refuses: the label, then each modality in its file's dtype.

    A volume is read when it is asked for, and none is held here: into memory that was just given back the next is read
    in two thirds of the time.
    """
    patient, opened, label = patientOf(paths), {}, None
    try:
        channels = EDITIONS[tellEdition(paths)].channels or {}
    except ValueError:
        channels = {}  # names that tell nothing: that matters only where there are labels
    files = [(modality, fileOf(paths, modality)) for modality in config.MODALITIES]
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
        for other in ('seg', modality):
            if other in grids:
                checkGrid(paths, other, *grids[other], *grids[config.MODALITIES[0]])
        yield volume
        del volume


def readLabel(paths):
    """Gives the segmentation of a patient alone: uint8 (W, H, D), classes 0 to 3, in RAS+ order, as `readCase` does."""
    return toClasses(readVolume(paths['seg'], patientOf(paths))[0], paths)


def spacingOf(paths):
    """Gives the size in mm of a patient's voxels along the axes of what `engine.predict` gives: (D, W, H)."""
    column = next(column for column in (*config.MODALITIES, *COLUMNS) if hasFile(paths, column))
    affine = nib.load(paths[column]).affine
    turned = affine @ nib.orientations.inv_ornt_aff(nib.io_orientation(affine), (1, 1, 1))
    width, height, depth = nib.affines.voxel_sizes(turned)
    return tuple(float(size) for size in (depth, width, height))


def readVolume(path, patient, channel=None, opened=None):
    """Gives one volume of a NIfTI file and its affine, both in RAS+ order, checked as far as one file can be.

    Args:
        path: of the file.
        patient: to be named in an error.
        channel: place of the volume in a 4-D file; None: the file is 3-D.
        opened: dict that keeps 4-D arrays from one call to the next, so that they are unpacked once.

    Returns:
        volume: (W, H, D) in the file's dtype, or float64 where the header scales.
        affine: (4, 4), mm.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it cannot be read, has another dimension or size, or values that are not finite or beyond 1e6.
    """
    opened = {} if opened is None else opened
    try:
        open(path, 'rb').close()  # the system says why it cannot be opened, nibabel does not
        nifti = nib.load(path)
        if channel is None:
            volume = _unpack(nifti, path, 3)
        else:
            if path not in opened:
                opened[path] = _unpack(nifti, path, 4)
            volume = opened[path][..., channel]
        isShort = volume.dtype.kind in 'iu' and volume.dtype.itemsize < 4  # such numbers end at 65,535
        low, high = (0, 0) if isShort else (volume.min(), volume.max())
        if not (low >= -MAX_MAGNITUDE and high <= MAX_MAGNITUDE):  # NaN fails both
            raise ValueError(f'its values run from {low} to {high}; finite values within 1e6 were expected')
        orientation = nib.io_orientation(nifti.affine)
        affine = nifti.affine @ nib.orientations.inv_ornt_aff(orientation, volume.shape)
        return nib.apply_orientation(volume, orientation), affine
    except FileNotFoundError:
        raise FileNotFoundError(f'{patient}: {path} does not exist.') from None
    except _UNREADABLE as error:
        raise ValueError(f'{patient}: {path} cannot be used: {error}.') from error


_UNREADABLE = (
    *(ValueError, IndexError, TypeError, OSError, EOFError, zlib.error),
    *(nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError, nib.orientations.OrientationError),
)


def _unpack(nifti, path, dimensions):
    """Gives the array of a file, refused by its header before memory is asked for."""
    shape = nifti.shape
    while len(shape) > dimensions and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != dimensions or min(shape) < 1 or np.prod(shape[:3], dtype=float) > MAX_VOXELS:
        raise ValueError(
            f'its header says {nifti.shape}; {dimensions} dimensions and at most 512 x 512 x 512 voxels were expected'
        )
    start, dtype = int(nifti.dataobj.offset), nifti.get_data_dtype()
    if dtype.kind not in 'iuf' or not 0 <= start <= MAX_OFFSET:
        raise ValueError(f'its header says {dtype} from byte {start} on; real numbers behind a header were expected')
    if not str(path).lower().endswith('.gz'):
        return np.asanyarray(nifti.dataobj).reshape(shape)
    # nibabel stops behind the last voxel and never meets the checksum that tells a damaged file
    count = int(np.prod(shape))
    with igzip.open(path) as file:
        content = file.read(start + count * dtype.itemsize)
        while file.read(2**20):
            pass
    volume = np.frombuffer(content, dtype, count, start).reshape(shape, order='F')
    slope, inter = nifti.dataobj.slope, nifti.dataobj.inter
    return volume if (slope, inter) == (1, 0) else volume * slope + inter


def checkGrid(paths, column, shape, affine, expectedShape, expectedAffine):
    """Refuses a volume whose voxels do not lie on those of the first modality, to half a voxel."""
    where = f'{patientOf(paths)}: {paths[column]}'
    if shape != expectedShape:
        raise ValueError(f'{where} has {shape} voxels, {config.MODALITIES[0]} has {expectedShape}.')
    corners = np.array([[x, y, z, 1] for x in (0, shape[0]) for y in (0, shape[1]) for z in (0, shape[2])])
    away = np.abs(corners @ (affine - expectedAffine).T).max()
    if not away <= 0.5 * np.linalg.norm(expectedAffine[:3, :3], axis=0).min():
        raise ValueError(
            f'{where} lies up to {away:.1f} mm away from {config.MODALITIES[0]}; their affines must agree.'
        )


def toClasses(volume, paths, edition=None):
    """Maps the labels of a segmentation, float or integer, to classes by its edition's table, or a given edition's."""
    labels = volume
    if volume.dtype.kind == 'f':
        labels = np.rint(volume)
        if np.abs(volume - labels).max() > 1e-3:
            raise ValueError(f'{patientOf(paths)}: {paths["seg"]} holds values between the labels; interpolated?')
    edition = edition or tellEdition(paths)
    table = np.full(256, UNKNOWN, np.uint8)
    for label, number in EDITIONS[edition].classes.items():
        table[label] = number
    # nearly all of a segmentation is 0, which is class 0 in every edition: only the rest is looked up
    turn, turnBack = alongMemory(labels)
    isLabelled = turn(labels) != 0
    given = turn(labels)[isLabelled]
    isByte = given.size == 0 or (given.min() >= 0 and given.max() <= 255)
    numbers = table[given.astype(np.uint8)] if isByte else None
    if numbers is None or (numbers == UNKNOWN).any():
        found, known = (sorted(int(label) for label in some) for some in (np.unique(labels), EDITIONS[edition].classes))
        others = [name for name in EDITIONS if not EDITIONS[name].isTold and EDITIONS[name].parse(paths['seg'])]
        hint = f' Is it config.EDITION = {others[0]!r}?' if others and config.EDITION is None else ''
        raise ValueError(
            f'{patientOf(paths)}: {paths["seg"]} has the labels {found[:9]}, but {edition} knows {known}.{hint}'
        )
    classes = np.zeros(isLabelled.shape, np.uint8)
    classes[isLabelled] = numbers
    return turnBack(classes)


def alongMemory(array):
    """Gives two functions: one views arrays of this one's axes as its memory runs, the other turns them back.

    Volumes come from files whose first axis is the fastest, and from axis orders that run backwards; masks of NumPy
    work twice as fast where the last axis is, and runs forwards.
    """
    forwards = tuple(slice(None, None, -1 if step < 0 else 1) for step in array.strides)
    order = np.argsort([-abs(step) for step in array.strides], kind='stable')
    back = np.argsort(order)
    return lambda each: each[forwards].transpose(order), lambda each: each.transpose(back)[forwards]
