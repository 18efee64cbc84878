"""Write a patient as animated GIFs: image, truth and prediction side by side."""

from pathlib import Path

import imageio.v3
import numpy as np
from matplotlib.colors import to_rgb
from PIL import Image, ImageDraw, ImageFont

import config
from atomic import writeAtomically
from pictures.figure import OPACITY, cropBox, displayWindow, foreground, unpackPrediction

# View: the axes of a volume (D, W, H) that become frames, rows and columns, and a caption
VIEWS = {
    'axial': ((0, 2, 1), "front up, patient's right on the right"),
    'coronal': ((2, 0, 1), "head up, patient's right on the right"),
    'sagittal': ((1, 0, 2), 'head up, front on the right'),
}
LINE = 15  # pixels; height of a line of text


def makeGifs(x, y, yhat, folder, name='patient', views=('axial',)):
    """Write animated GIFs that go through the volume: image, truth and prediction side by side.

    The frames are cropped to the brain and start at its first slice. An existing file of the same name is replaced.

    Args:
        x, y, yhat: float (D, C, W, H) and twice integer (D, W, H), as `engine.predict` returns them; `y` may be None.
        folder: where to write; created if missing.
        name: beginning of the file names, such as the patient's id if several patients share a folder.
        views: any of 'axial', 'coronal' and 'sagittal'; one GIF each, of about 3 MB for a BraTS patient.

    Returns:
        list of paths, `<folder>/<name>_<view>.gif`. A GIF has one frame per slice with brain, 80 ms each, in an endless
        loop. Without any brain it has one frame.

    Raises:
        ValueError: an unknown view, shapes that do not agree, or a class that does not exist.
    """
    if set(views) - set(VIEWS):
        raise ValueError(f'The views {list(views)} were given; any of {list(VIEWS)} were expected.')
    volume, modality, shown = unpackPrediction(x, y, yhat)
    brain = foreground(volume)
    mask = brain | np.any([classes > 0 for classes in shown.values()], axis=0)
    box = cropBox(mask, margin=0)
    low, high = displayWindow(volume, brain)
    scale = _greyLevels() / (high - low)
    grey = np.clip((volume[box] - low) * scale, 0, _greyLevels() - 1).astype(np.uint8)
    # the palette has all greys for each class, so one byte holds both
    panels = {modality: grey}
    panels |= {name: grey + _greyLevels() * classes[box].astype(np.uint8) for name, classes in shown.items()}
    paths = []
    for view in views:
        axes, caption = VIEWS[view]
        first = box[axes[0]].start
        turned = {panel: values.transpose(axes)[:, ::-1] for panel, values in panels.items()}  # row 0 is the top one
        if not mask.any():
            first = volume.shape[axes[0]] // 2
            turned = {panel: values[first : first + 1] for panel, values in turned.items()}
        paths.append(Path(folder) / f'{name}_{view}.gif')
        _writeGif(_drawFrames(turned, first, caption), paths[-1])
    return paths


def _greyLevels():
    """Return the number of greys; 64 instead of 32 look no better and make the file a fifth larger."""
    return min(32, 256 // config.NO_CLASSES)


def _palette():
    """Return the colors of every GIF, uint8 (classes * greys, 3): the greys, then the greys tinted with each class."""
    greys = np.linspace(0, 1, _greyLevels())[:, None].repeat(3, axis=1)
    colors = [to_rgb(color) for color in config.CLASS_COLORS[1:]]
    tinted = [greys] + [(1 - OPACITY) * greys + OPACITY * np.array(color) for color in colors]
    return np.rint(255 * np.concatenate(tinted)).astype(np.uint8)


def _drawFrames(panels, firstNumber, caption):
    """Return the frames, palette indices uint8 (slices, rows, columns), of panels (slices, height, width) by name."""
    numSlices, height, width = next(iter(panels.values())).shape
    pitch = max(width + 2, 140)  # room for the names above the panels and for the legend below them
    canvas = Image.new('L', (pitch * len(panels), height + 3 * LINE))
    draw, font, white = ImageDraw.Draw(canvas), ImageFont.load_default(11), _greyLevels() - 1
    for number, name in enumerate(panels):
        draw.text((number * pitch + 2, 2), name, white, font)
    left = 2
    for number, name in enumerate(config.CLASS_NAMES[1:], start=1):
        draw.rectangle((left, height + LINE + 4, left + 8, height + LINE + 12), _greyLevels() * number + 3 * white // 4)
        draw.text((left + 12, height + LINE + 2), name, white, font)
        left += int(draw.textlength(name, font)) + 22
    draw.text((2, height + 2 * LINE + 1), caption, white, font)
    frames = np.repeat(np.asarray(canvas)[None], numSlices, axis=0)
    for number, panel in enumerate(panels.values()):
        frames[:, LINE : LINE + height, number * pitch : number * pitch + width] = panel
    for number, frame in enumerate(frames):
        text = Image.new('L', (60, LINE))
        ImageDraw.Draw(text).text((58, 2), f'slice {firstNumber + number}', white, font, anchor='ra')
        frame[:LINE, pitch - 62 : pitch - 2] = text
    return frames


def _writeGif(frames, file):
    """Write palette indices as they are: quantizing colors is what makes a GIF slow to write."""
    # the palette has no color twice: Pillow looks for an index of its own for each, which takes 40 ms per frame
    options = {'palette': _palette().tobytes(), 'duration': 80, 'loop': 0, 'optimize': False, 'disposal': 1}
    content = imageio.v3.imwrite('<bytes>', frames, extension='.gif', plugin='pillow', is_batch=True, **options)
    with writeAtomically(file) as temporary:
        temporary.write_bytes(content)
