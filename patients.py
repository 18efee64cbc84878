"""The folder of patients: find them, split them, read one, write one's segmentation."""

import gzip
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd

import config
from files import writeWhole

COLUMNS = ('t1', 't1ce', 't2', 'flair', 'seg')
MAX_MAGNITUDE = 1e6  # no scanner writes more; float32 and the percentiles stay exact below it
MAX_VOXELS = 2**27  # 512 x 512 x 512: a header that promises more is broken, and is refused before memory is asked for


@dataclass(frozen=True)
class Edition:
    """How one edition of BraTS names its files and its labels: all that the code knows of an edition."""

    patient: str  # regular expression of a patient id
    suffixes: dict  # the end of a file's name -> column of the file list
    classes: dict  # label in the files -> class; of two labels of one class, the first is written

    def labels(self):
        """Gives uint8 (NO_CLASSES,): the label that a class is written as."""
        written = {number: label for label, number in reversed(self.classes.items())}
        return np.array([written[number] for number in sorted(written)], np.uint8)


_CLASSIC = {name: name for name in COLUMNS}
EDITIONS = {
    'BraTS2020': Edition(r'BraTS20_(Training|Validation|Testing)_\d+', _CLASSIC, {0: 0, 1: 1, 2: 2, 4: 3}),
    'BraTS2021': Edition(r'BraTS2021_\d+', _CLASSIC, {0: 0, 1: 1, 2: 2, 4: 3}),
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
        patient, column = _parseName(path)
        if patient is None:
            continue
        row = rows.setdefault(patient, dict.fromkeys(COLUMNS))
        if row[column] is not None:
            raise ValueError(f'Patient {patient} has {column} twice: {row[column]} and {path}. Keep one of them.')
        row[column] = str(path)
    if not rows:
        raise FileNotFoundError(
            f'No patient below {folder}. Expected files like BraTS20_Training_001_t1ce.nii.gz or '
            'BraTS2021_00000_t1ce.nii.gz; files named otherwise need config.EDITION.'
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
    return re.sub(r'\.nii(\.gz)?$', '', Path(path).name, flags=re.IGNORECASE)


def _editionsInUse():
    if config.EDITION is None:
        return EDITIONS
    if config.EDITION not in EDITIONS:
        raise ValueError(f'config.EDITION is {config.EDITION!r}; known are {", ".join(EDITIONS)}.')
    return {config.EDITION: EDITIONS[config.EDITION]}


def _parseName(path):
    """Gives (patient id, column) of a file, or (None, None) where its name is not that of a modality or seg."""
    stem = MISNAMED.get(_stem(path), _stem(path))
    isOfSuffix = False
    for edition in _editionsInUse().values():
        ends = '|'.join(edition.suffixes)
        match = re.fullmatch(rf'(.+)[_-]({ends})', stem, re.IGNORECASE)
        if match:
            isOfSuffix = True
            if config.EDITION is not None or re.fullmatch(edition.patient, match[1], re.IGNORECASE):
                return match[1], edition.suffixes[match[2].lower()]
    if isOfSuffix:
        raise ValueError(
            f'The edition of {path} cannot be told from its name, and labels mean different tissues in different '
            f'editions. Say which it is: config.EDITION = one of {", ".join(map(repr, EDITIONS))}.'
        )
    return None, None


def editionOf(paths):
    """Gives the `Edition` of one patient: the one declared in `config.EDITION`, else the one its file names tell.

    Args:
        paths: one row of the file list (Series or dict).

    Raises:
        ValueError: the names do not tell the edition.
    """
    if config.EDITION is not None:
        return next(iter(_editionsInUse().values()))
    stems = [MISNAMED.get(_stem(paths[column]), _stem(paths[column])) for column in COLUMNS if hasFile(paths, column)]
    for stem in stems:
        for edition in EDITIONS.values():
            if re.match(rf'{edition.patient}([_-]|$)', stem, re.IGNORECASE):
                return edition
    raise ValueError(
        f'{patientOf(paths)}: the edition cannot be told from the names of its files. Say which it is: '
        f'config.EDITION = one of {", ".join(map(repr, EDITIONS))}.'
    )


def hasFile(paths, column):
    """Tells whether a row of the file list has a path in a column (an empty cell is None or NaN)."""
    return column in paths and paths[column] is not None and paths[column] == paths[column]


def patientOf(paths):
    """Gives the id of a row of the file list, or the folder of its first file where the row has no name."""
    name = getattr(paths, 'name', None)
    return str(name) if name is not None else Path(next(p for p in dict(paths).values() if p)).parent.name


def annotated(df, purpose):
    """Gives the patients of a file list that have a segmentation, and prints how many have none.

    Raises:
        ValueError: none has one.
    """
    has = df['seg'].notna()
    if not has.all():
        print(f'{(~has).sum()} of {len(df)} patients have no segmentation and are left out of {purpose}.')
    if not has.any():
        raise ValueError(f'None of the {len(df)} patients has a segmentation: nothing is left for {purpose}.')
    return df[has]


def readGrades(df):
    """Gives the grade of each patient of a file list, as its edition publishes it.

    Args:
        df: file list.

    Returns:
        Series indexed by patient: 'HGG' or 'LGG' as told by a `name_mapping*.csv` up to two folders above the
        patient's or by a folder HGG or LGG; 'unknown' where nothing tells it.
    """
    firstFiles = {
        patient: Path(next(row[column] for column in COLUMNS if hasFile(row, column))) for patient, row in df.iterrows()
    }
    told = {}
    for folder in sorted({parent for file in firstFiles.values() for parent in file.parents[1:3]}):
        for table in sorted(folder.glob('name_mapping*.csv')):
            names = pd.read_csv(table)
            if 'Grade' in names:
                for column in names.columns.drop('Grade'):
                    told.update(dict(zip(names[column], names['Grade'], strict=True)))
    grades = {
        patient: next((part for part in file.parts if part in ('HGG', 'LGG')), told.get(patient, 'unknown'))
        for patient, file in firstFiles.items()
    }
    return pd.Series(grades, dtype=object).reindex(df.index)


def split(df):
    """Splits a file list by patient into training, validation and test.

    The shares are `config.VAL_FRACTION` and `config.TEST_FRACTION`, the order is drawn from `config.SEED`, and each set
    has the same mix of grades where grades are known. Patients without a segmentation are left out, and counted.

    Args:
        df: file list.

    Returns:
        traindf, valdf, testdf: disjoint, together every patient with a segmentation; none empty from three patients on.
    """
    df = annotated(df, 'training and scoring').sort_index()
    order = _stratifiedOrder(readGrades(df))
    noTest = max(1, round(config.TEST_FRACTION * len(df))) if len(df) > 2 else 0
    noVal = max(1, round(config.VAL_FRACTION * len(df))) if len(df) > 1 else 0
    if noTest + noVal >= len(df) > 1:
        raise ValueError(
            f'VAL_FRACTION and TEST_FRACTION take {noVal} + {noTest} of {len(df)} patients: none to train.'
        )
    test, val, train = np.split(order, [noTest, noTest + noVal])
    print(f'{len(train)} patients to train, {len(val)} to validate, {len(test)} to test.')
    return tuple(df.iloc[np.sort(positions)] for positions in (train, val, test))


def _stratifiedOrder(strata):
    """Gives the positions of a series in a drawn order in which every run of neighbours has the strata's mix."""
    generator = np.random.default_rng(config.SEED)
    ranks = np.empty(len(strata))
    for stratum in sorted(strata.unique()):
        members = np.flatnonzero(strata == stratum)
        ranks[generator.permutation(members)] = (np.arange(len(members)) + generator.uniform()) / len(members)
    return np.argsort(ranks, kind='stable')


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
    patient = patientOf(paths)
    image = grid = None
    for channel, modality in enumerate(config.MODALITIES):
        if not hasFile(paths, modality):
            raise FileNotFoundError(f'{patient}: no file for the modality {modality} of config.MODALITIES.')
        volume, affine = _readVolume(paths[modality], patient)
        if image is None:
            image = np.empty((len(config.MODALITIES), *volume.shape), np.float32)
            grid = affine
        _checkGrid(paths, modality, volume.shape, affine, image.shape[1:], grid)
        image[channel] = volume
    if not hasFile(paths, 'seg'):
        return image, None
    volume, affine = _readVolume(paths['seg'], patient)
    _checkGrid(paths, 'seg', volume.shape, affine, image.shape[1:], grid)
    return image, _toClasses(volume, paths)


def _readVolume(path, patient):
    """Gives the array of a NIfTI file and its affine, both in RAS+ order, checked as far as one file can be."""
    try:
        nifti = nib.load(path)
        shape = nifti.shape[:3] if all(size == 1 for size in nifti.shape[3:]) else nifti.shape
        if len(shape) != 3 or min(shape) < 1 or np.prod(shape, dtype=float) > MAX_VOXELS:
            raise ValueError(f'its header says {nifti.shape}; a 3-D volume of at most 512 x 512 x 512 was expected')
        volume = np.asanyarray(nifti.dataobj).reshape(shape)
        low, high = volume.min(), volume.max()
        if not (low >= -MAX_MAGNITUDE and high <= MAX_MAGNITUDE):  # NaN fails both
            raise ValueError(f'its values run from {low} to {high}; finite values within 1e6 were expected')
        orientation = nib.io_orientation(nifti.affine)
        affine = nifti.affine @ nib.orientations.inv_ornt_aff(orientation, shape)
        return nib.apply_orientation(volume, orientation), affine
    except FileNotFoundError:
        raise FileNotFoundError(f'{patient}: {path} does not exist.') from None
    except (ValueError, OSError, EOFError, zlib.error, nib.filebasedimages.ImageFileError) as error:
        raise ValueError(f'{patient}: {path} cannot be used: {error}.') from error


def _checkGrid(paths, column, shape, affine, expectedShape, expectedAffine):
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


def _toClasses(volume, paths):
    """Maps the labels of a segmentation, float or integer, to classes by the edition's table."""
    labels = np.rint(volume)
    if np.abs(volume - labels).max() > 1e-3:
        raise ValueError(f'{patientOf(paths)}: {paths["seg"]} holds values between the labels; was it interpolated?')
    classes = editionOf(paths).classes
    found = {int(label) for label in np.unique(labels)}
    if found - set(classes):
        raise ValueError(
            f'{patientOf(paths)}: {paths["seg"]} has the labels {sorted(found)}; its edition knows {sorted(classes)}.'
        )
    table = np.zeros(max(classes) + 1, np.uint8)
    for label, number in classes.items():
        table[label] = number
    return table[labels.astype(np.uint8)]


def saveSegmentation(yhat, paths, file):
    """Writes a segmentation as a challenge accepts it: on the grid of the patient's images, in the edition's labels.

    Args:
        yhat: integer (D, W, H), classes 0 to 3, as `engine.predict` gives it (tensor or array).
        paths: the patient's row of the file list; the grid (shape, axis order, sform and qform with their codes) is
            that of the first of `config.MODALITIES`, never that of the seg.
        file: where to write, `.nii.gz` or `.nii`; uint8 without scaling.

    Raises:
        ValueError: `yhat` does not have the images' shape, or holds other classes; or `file` ends otherwise.
    """
    if not str(file).endswith(('.nii', '.nii.gz')):
        raise ValueError(f'{file}: a name that ends in .nii or .nii.gz was expected.')
    source = nib.load(paths[config.MODALITIES[0]])
    classes = np.asarray(yhat).transpose(1, 2, 0)  # (D, W, H) -> (W, H, D)
    labels = editionOf(paths).labels()
    if not np.isin(classes, np.arange(len(labels))).all():
        raise ValueError(f'{file}: the classes {np.unique(classes)[:9]} were given, 0 to {len(labels) - 1} expected.')
    fromSource = nib.io_orientation(source.affine)
    toSource = nib.orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], fromSource)
    stored = nib.apply_orientation(labels[classes], toSource)
    if stored.shape != source.shape[:3]:
        raise ValueError(f'{file}: a segmentation of shape {stored.shape} was given, the images are {source.shape}.')
    header = nib.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header.set_data_shape(stored.shape)
    for field in ('pixdim', 'qform_code', 'sform_code', 'xyzt_units', *_GRID_FIELDS):
        header[field] = source.header[field]
    nifti = nib.Nifti1Image(np.ascontiguousarray(stored), None, header)
    content = nifti.to_bytes()
    with writeWhole(file) as part:
        # mtime = 0: the same segmentation gives the same bytes
        part.write_bytes(gzip.compress(content, 6, mtime=0) if str(file).endswith('.gz') else content)


_GRID_FIELDS = tuple(f'{kind}_{axis}' for kind in ('srow', 'qoffset') for axis in 'xyz') + tuple(
    f'quatern_{axis}' for axis in 'bcd'
)
