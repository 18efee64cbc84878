"""Write the NIfTI files of patients whose volumes are pictures of single slices, such as PNG or TIFF."""

import os
import re
from pathlib import Path

import nibabel as nib
import numpy as np

from patients.editions import COLUMNS
from patients.writing import writeNifti


def fromSlices(folder, pattern, output, spacing):
    r"""Write the 2-D slices below a folder as `<output>/<patient>/<patient>_<column>.nii.gz`; return the patients' ids.

    Each subfolder is a patient, and its name is the id. The lowest number is the lowest slice. In a slice the first row
    is at the front and the first column at the patient's right, as radiologists show it; the affine says so (LPS).

    Args:
        folder: folder with the subfolders. Hidden files, and files that fit no pattern, are ignored.
        pattern: dict of regular expression -> columns. The expression fits the end of a path below the subfolder, in
            any case, and its group `slice` is the number of the slice, as in r'_(?P<slice>\d+)\.tif'. The columns, some
            of `t1`, `t1ce`, `t2`, `flair` and `seg` (the mask), are the channels of such a picture, in order.
        output: folder to write to, not below `folder`; a second call writes the files again.
        spacing: mm from slice to slice, from row to row and from column to column, which pictures do not hold.

    Raises:
        FileNotFoundError: there is no subfolder, or a pattern fits no file.
        ValueError: another `spacing` or `pattern`; a slice is missing, there twice, or without a mask or modality that
            others have; a picture cannot be read, or has other channels, pixels or another dtype than expected.
    """
    sizes = np.array(spacing, float)
    if sizes.shape != (3,) or not ((sizes > 0) & (sizes < np.inf)).all():
        raise ValueError(
            f'spacing is {spacing}; mm from slice to slice, row to row and column to column were expected.'
        )
    pattern = {text: (some,) if isinstance(some, str) else tuple(some) for text, some in pattern.items()}
    columns = [column for some in pattern.values() for column in some]
    if not {*columns} <= {*COLUMNS} or len({*columns}) < len(columns):
        raise ValueError(f'pattern has the columns {columns}; each of {", ".join(COLUMNS)} once at most was expected.')
    if bad := [text for text in pattern if 'slice' not in re.compile(text).groupindex]:
        raise ValueError(rf'The pattern {bad[0]!r} has no group for the number of the slice, such as (?P<slice>\d+).')
    homes = [home for home in sorted(Path(folder).iterdir()) if home.is_dir() and not home.name.startswith('.')]
    found = {home.name: _findSlices(home, pattern) for home in homes}
    for text, some in pattern.items():
        if not any(series[some] for series in found.values()):
            raise FileNotFoundError(f'No file in the {len(homes)} subfolders of {folder} fits the pattern {text!r}.')
    for patient, series in found.items():
        volumes = {some: _readSlices(patient, some, files) for some, files in series.items() if files}
        for some, volume in volumes.items():
            for number, column in enumerate(some):
                image = nib.Nifti1Image(volume[..., number], np.diag([-sizes[2], -sizes[1], sizes[0], 1]))
                writeNifti(image, Path(output, patient, f'{patient}_{column}.nii.gz'))
    return list(found)


def _findSlices(home, pattern):
    """Return the files of a patient's folder, a dict of columns -> dict of slice number -> Path."""
    patient, series = home.name, {some: {} for some in pattern.values()}
    for file in sorted(home.rglob('[!.]*')):
        for text, some in pattern.items():
            if match := re.search(f'(?:{text})$', file.relative_to(home).as_posix(), re.IGNORECASE):
                other = series[some].setdefault(int(match['slice']), file)
                if other != file:
                    raise ValueError(f'{patient} has slice {match["slice"]} twice: {other} and {file}.')
    numbers = set().union(*series.values())
    if not numbers:
        raise FileNotFoundError(f'{patient}: no file of {home} fits a pattern: {sorted(os.listdir(home))[:5]}.')
    if missing := sorted({*range(min(numbers), max(numbers))} - numbers):
        raise ValueError(f'{patient}: the slices {missing[:9]} of {min(numbers)} to {max(numbers)} are not in {home}.')
    for some, files in series.items():
        for number in sorted(numbers - files.keys()) if files else ():
            other = next(each[number] for each in series.values() if number in each)
            raise ValueError(f'{patient}: {other} has no {", ".join(some)} beside it, but other slices have.')
    return series


def _readSlices(patient, columns, files):
    """Return the volume of all channels, (columns, rows, slices, channels), of a dict of slice number -> Path."""
    import imageio.v3  # here: no other part of `patients` needs it

    pictures = []
    for _, file in sorted(files.items()):
        try:
            pages = imageio.v3.imread(file, index=...)
        except Exception as error:  # each format has its own
            raise ValueError(f'{patient}: {file} cannot be read: {error}') from error
        picture = pages[0].reshape(*pages.shape[1:3], -1)
        if len(pages) != 1 or picture.shape[2] != len(columns):
            raise ValueError(f'{patient}: {file} has the shape {pages.shape}; one picture of {columns} was expected.')
        pictures.append(picture.astype(np.uint8) if picture.dtype == bool else picture)  # NIfTI has no bits
        own, first = (f'{each.shape[:2]} pixels of {each.dtype}' for each in (pictures[-1], pictures[0]))
        if own != first:
            raise ValueError(f'{patient}: {file} has {own}; {first} were expected, as in the first slice.')
    return np.stack(pictures, 2).swapaxes(0, 1)
