"""Pack a patient's volumes small enough for a web page: images as one picture each, labels exactly."""

import base64
import io
import zlib

import numpy as np
from PIL import Image
from scipy import ndimage

from pictures.figure import OPACITY, classColors, cropBox, displayWindow, mostInformativeSlice

VOXEL = 1.7  # mm, of a packed image: with it a page of 100 patients stays below 20 MB
_QUALITY = 40  # of WebP, 0 to 100
_TRUTH = 16  # a packed label is the predicted class + 16 x the true class


def packVolumes(images, prediction, truth, spacing):
    """Return a patient's volumes as plain values for JSON, cropped to the head and the tumor.

    Args:
        images: dict of modality -> (W, H, D) in RAS order, background 0; may be empty.
        prediction: uint8 (W, H, D), classes below 16.
        truth: the same, or None.
        spacing: mm along the axes.

    Returns:
        dict of
        - `shape`, `start`, `size`: voxels of the whole volume, and first voxel and size of what is cut out;
        - `spacing`: mm;
        - `focus`: voxel of the cut-out with the largest slices of tumor, at which a viewer opens;
        - `images`: dict of modality -> data URI of a WebP with all slices of a coarser grid side by side, row by row,
          the patient's front up; `coarse`: that grid's size; `columns`: slices in a row of the picture;
        - `labels`: base64 of zlib of uint8, predicted class + 16 x true class, first axis fastest; `labelStart` and
          `labelSize`: the box of the cut-out that they fill;
        - `hasTruth`.
    """
    labels = prediction if truth is None else prediction + np.uint8(_TRUTH) * truth
    isShown = np.any([image != 0 for image in images.values()], axis=0) if images else np.zeros(labels.shape, bool)
    box = cropBox(isShown | (labels > 0), margin=2)
    cut = labels[box]
    tight = cropBox(cut, margin=0) if cut.any() else (slice(0, 0),) * 3
    size = np.array(cut.shape)
    factors = np.minimum(np.asarray(spacing) / VOXEL, 1)
    coarse = {name: _shrink(image, box, factors) for name, image in images.items()}
    grid = next(iter(coarse.values())).shape if coarse else (0, 0, 0)
    columns = max(1, round(float(np.sqrt(grid[2] * grid[1] / max(grid[0], 1)))))  # a picture about as wide as high
    focus = [mostInformativeSlice(np.moveaxis(cut, axis, 0)) for axis in range(3)]
    return {
        'shape': list(labels.shape),
        'start': [edge.start for edge in box],
        'size': size.tolist(),
        'spacing': [float(value) for value in spacing],
        'focus': focus,
        'coarse': list(grid),
        'columns': columns,
        'images': {name: encodeImage(_tile(volume, columns)) for name, volume in coarse.items()},
        'labels': base64.b64encode(zlib.compress(cut[tight].transpose(2, 1, 0).tobytes(), 9)).decode(),
        'labelStart': [edge.start for edge in tight],
        'labelSize': [edge.stop - edge.start for edge in tight],
        'hasTruth': truth is not None,
    }


def _shrink(image, box, factors):
    """Return an image (W, H, D) cut to a box, on a coarser grid, in 256 greys: uint8."""
    low, high = displayWindow(image, image != 0)
    cut = image[box].astype(np.float32)
    if (factors < 1).any():
        cut = ndimage.zoom(cut, factors, order=1, mode='nearest', grid_mode=True)
    return np.clip((cut - low) * (255 / (high - low)), 0, 255).astype(np.uint8)


def _tile(volume, columns):
    """Return the axial slices of a volume (W, H, D) side by side: uint8 (rows x H, columns x W), front up."""
    width, height, depth = volume.shape
    rows = -(-depth // columns)
    tiles = np.zeros((rows * columns, height, width), volume.dtype)
    tiles[:depth] = volume[:, ::-1].transpose(2, 1, 0)  # (W, H, D) -> (D, H, W), the first row on top
    tiles = tiles.reshape(rows, columns, height, width).transpose(0, 2, 1, 3)
    return tiles.reshape(rows * height, columns * width)


def encodeImage(pixels):
    """Return a picture, uint8 (rows, columns) or (rows, columns, 3), as a data URI of WebP."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, 'WEBP', quality=_QUALITY)
    return f'data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}'


def drawThumbnail(image, classes, spacing, side=112):
    """Return a small picture of the axial slice with most tumor, classes over the image, as a data URI.

    Args:
        image: (W, H, D) in RAS order, background 0; None: the classes on black.
        classes: uint8 (W, H, D).
        spacing: mm along the axes.
        side: pixels of the longer side.
    """
    isHead = classes > 0 if image is None else (image != 0) | (classes > 0)
    number = mostInformativeSlice(*(np.moveaxis(mask, 2, 0) for mask in (classes, isHead)))
    box = (*cropBox(isHead[..., number]), number)
    grey = np.zeros(classes[box].shape, np.float32)
    if image is not None:
        low, high = displayWindow(image, image != 0)
        grey = np.clip((image[box] - low) / (high - low), 0, 1).astype(np.float32)
    colors = np.array([[int(text[place : place + 2], 16) for place in (1, 3, 5)] for text in classColors()])
    opacity = np.where(classes[box] > 0, OPACITY, 0)[..., None]
    mixed = (1 - opacity) * 255 * grey[..., None] + opacity * colors[classes[box]]  # (W, H, 3)
    picture = Image.fromarray(mixed.astype(np.uint8).transpose(1, 0, 2)[::-1])
    width, height = np.array(picture.size) * np.asarray(spacing)[:2]  # mm
    scale = side / max(width, height)
    picture = picture.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.LANCZOS)
    return encodeImage(np.asarray(picture))
