"""Write a patient's segmentation as NIfTI, with the names and colors of its labels beside it."""

import gzip
import hashlib
import json
import os
import warnings
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np

import config
from atomic import writeAtomically
from patients.editions import CAVITY, COLUMNS, labelsOf
from patients.reading import UNREADABLE, detectEdition, firstFile, hasFile

_MADE = 'by this package: '  # begins the remark in the header of a segmentation


def saveSegmentation(yhat, paths, file, labels=None, remark=''):
    """Write a segmentation as the challenge accepts it: on the grid of the patient's images, in the edition's labels.

    Args:
        yhat: integer (D, W, H), classes, as `engine.predict` returns it (tensor or array). Class 4, the resection
            cavity, is written as background, with a warning, if the edition has no label for it. With two classes,
            tumor is written as the edition's first label of tumor.
        paths: the patient's row of the file list. Shape, axis order, sform and qform with their codes are those of the
            first of `config.MODALITIES` that the patient has.
        file: path to write, `.nii.gz` or `.nii`; uint8 without scaling.
        labels: class -> label, in place of those of the edition.
        remark: text of up to 70 characters for the header's field `descrip`; a checksum of the voxels follows it.

    Raises:
        ValueError: `yhat` has another shape than the images or other classes, or `file` another ending.
    """
    try:
        edition = detectEdition(paths)
    except ValueError:
        if labels is None:
            raise
        edition = 'the training'
    labels = labelsOf(edition) if labels is None else labels
    classes = np.asarray(yhat)
    isKnown = np.isin(np.arange(max(labels) + 1), list(labels))
    if classes.min() < 0 or classes.max() >= len(isKnown) or not isKnown[classes].all():
        raise ValueError(
            f'{file}: yhat has the classes {np.unique(classes)[:9]}; {", ".join(map(str, sorted(labels)))} were '
            f'expected, which have a label in {edition}.'
        )
    if labels.get(CAVITY) == 0 and (numVoxels := np.count_nonzero(classes == CAVITY)):
        text = f'{numVoxels} voxels of resection cavity are written as background'
        warnings.warn(f'{file}: {text}; {edition} has no label for it.', stacklevel=2)
    table = np.zeros(max(labels) + 1, np.uint8)
    table[list(labels)] = list(labels.values())
    _saveOnGrid(table[classes], paths, file, remark)


def remarkOf(about, paths, columns):
    """Return what is written into the header of a segmentation: a checksum of all that it was made of.

    Args:
        about: networks and settings, as JSON has them.
        paths: one row of the file list.
        columns: of the files that were read. Their names, sizes and times count.
    """
    files = [(name, Path(paths[name])) for name in columns if hasFile(paths, name)]
    states = [(name, file.name, os.stat(file)) for name, file in files if file.is_file()]
    made = [about, [(name, file, state.st_size, state.st_mtime_ns) for name, file, state in states]]
    return f'{_MADE}{hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:32]}'


def isWritten(file, remark):
    """Return whether a segmentation, `.nii.gz`, is there, not cut short, with this remark in its header."""
    try:
        image = nib.load(file)
        with open(file, 'rb') as stream:
            stream.seek(-4, os.SEEK_END)
            size = int.from_bytes(stream.read(), 'little')  # of the content, after the last block
    except UNREADABLE:
        return False
    isWhole = size == image.dataobj.offset + image.get_data_dtype().itemsize * np.prod(image.shape)
    return isWhole and image.header['descrip'].item().startswith(remark.encode())


def isCorrected(file):
    """Return whether a segmentation is there that was corrected by hand, or comes from elsewhere; a line says so.

    That is one with other voxels than those whose checksum stands in its header, or with no remark of ours.
    """
    try:
        image = nib.load(file)
        value = zlib.crc32(np.ascontiguousarray(image.dataobj))
    except UNREADABLE:
        return False
    made, found = (_MADE.encode(), b'predictor.py '), image.header['descrip'].item()  # the second: earlier versions
    if found.startswith(made) and (found.startswith(made[1]) or found.endswith(b'%08x' % value)):
        return False
    print(f'{file} is kept: it was corrected, or another program wrote it.')
    return True


def saveProbabilities(probability, paths, file):
    """Write the classes' probabilities, and their entropy, on the grid of the patient's images.

    Args:
        probability: float (D, NO_CLASSES, W, H), as `engine.predict(..., probabilities = True)` returns it.
        paths: the patient's row of the file list.
        file: path of the probabilities, `.nii.gz` or `.nii`: float32 (W, H, D, NO_CLASSES). The entropy, float32
            (W, H, D), lies beside it as `<name>_entropy.nii.gz`: 0 if one class has probability 1, 1 if all classes are
            equally probable.

    Raises:
        ValueError: another shape than the images', or another file ending.
    """
    values = np.asarray(probability, dtype=np.float32)
    _saveOnGrid(values.transpose(0, 2, 3, 1), paths, file)  # (D, K, W, H) -> (D, W, H, K)
    entropy = -(values * np.log(np.maximum(values, np.finfo(np.float32).tiny))).sum(1) / np.log(values.shape[1])
    stem = str(file).removesuffix('.gz').removesuffix('.nii')
    _saveOnGrid(entropy.clip(0, 1).astype(np.float32), paths, f'{stem}_entropy.nii.gz')


def _saveOnGrid(values, paths, file, remark=''):
    """Write values (D, W, H) or (D, W, H, K) in the axis order, grid and codes of a patient's images."""
    if not str(file).endswith(('.nii', '.nii.gz')):
        raise ValueError(f'{file}: a file name that ends in .nii or .nii.gz was expected.')
    source = nib.load(firstFile(paths, (*config.MODALITIES, *COLUMNS)))
    toSource = nib.orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], nib.io_orientation(source.affine))
    stored = nib.apply_orientation(np.moveaxis(values, 0, 2), toSource)  # (D, W, H) -> (W, H, D) -> the file's order
    if stored.shape[:3] != source.shape[:3]:
        raise ValueError(f'{file}: the volume has the shape {stored.shape[:3]}, the images have {source.shape[:3]}.')
    header, stored = nib.Nifti1Header(), np.ascontiguousarray(stored)
    header['descrip'] = f'{remark} {zlib.crc32(stored):08x}'.encode() if remark else b''
    header.set_data_dtype(values.dtype)
    header.set_data_shape(stored.shape)
    header['pixdim'][:4] = source.header['pixdim'][:4]
    for field in source.header:
        if field.startswith(('qform', 'sform', 'xyzt', 'quatern', 'qoffset', 'srow')):
            header[field] = source.header[field]
    writeNifti(nib.Nifti1Image(stored, None, header), file)


def writeNifti(image, file):
    """Write an image of nibabel, whole or not at all, to a path that ends in `.nii.gz` or `.nii`."""
    content = image.to_bytes()
    with writeAtomically(file) as temporary:
        # mtime = 0: the same volume is written as the same bytes
        temporary.write_bytes(gzip.compress(content, 6, mtime=0) if str(file).endswith('.gz') else content)


def saveLabelNames(labels, stem, names=None, colors=None):
    """Write the names and colors of labels: `<stem>_itksnap.txt` and `<stem>_slicer.ctbl`.

    ITK-SNAP imports the first (*Segmentation > Import Label Descriptions*), 3D Slicer the second (as a color table).

    Args:
        labels: class -> label, as `editions.labelsOf` returns it.
        stem: path of the files without their endings.
        names, colors: of the classes, default `config.CLASS_NAMES` and `config.CLASS_COLORS`. The background, class 0,
            is transparent.
    """
    names, colors = names or config.CLASS_NAMES, colors or config.CLASS_COLORS
    rows = [
        (int(label), names[number], *bytes.fromhex(colors[number].removeprefix('#')), int(label != 0))
        for number, label in labels.items()
        if number == 0 or label != 0  # the cavity may be written as background
    ]
    snap = [f'{label} {r} {g} {b} {seen} {seen} {seen} "{name}"' for label, name, r, g, b, seen in rows]
    slicer = [f'{label} {name.replace(" ", "_")} {r} {g} {b} {255 * seen}' for label, name, r, g, b, seen in rows]
    for ending, head, lines in (
        ('_itksnap.txt', '# ITK-SNAP label description: label, red, green, blue, opacity, visible, in 3-D, name', snap),
        ('_slicer.ctbl', '# 3D Slicer color table: label, name, red, green, blue, opacity', slicer),
    ):
        file, text = Path(f'{stem}{ending}'), '\n'.join([head, *lines]) + '\n'
        if not file.is_file() or file.read_text(encoding='utf-8', errors='replace') != text:
            with writeAtomically(file) as temporary:
                temporary.write_text(text, encoding='utf-8')
