"""Write a patient as animated GIFs: image, truth and prediction beside one another."""

from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgb
from PIL import Image, ImageDraw, ImageFont

import config
from files import writeWhole
from pictures import OPACITY, cropBox, displayWindow, isBrain, unpackPrediction

# Of a volume (D, W, H): the axes that become frames, rows and columns, and where the patient then lies
VIEWS = {
    'axial': ((0, 2, 1), "front up, patient's right on the right"),
    'coronal': ((2, 0, 1), "head up, patient's right on the right"),
    'sagittal': ((1, 0, 2), 'head up, front on the right'),
}
LINE = 15  # pixels; the height of a line of text in a GIF


def makeGifs(x, y, yhat, folder, name='patient', views=('axial',)):
    """Writes animated GIFs that go through the volume: image, truth and prediction beside one another.

    Frames are cropped to the brain and start with its first slice. An existing file of the name is replaced.

    Args:
        x, y, yhat: float (D, C, W, H) and integer (D, W, H) twice, as `engine.predict` gives them; `y` may be None.
        folder: where to write; made if it is not there.
        name: how the file names begin; give the patient's id to keep several patients in one folder apart.
        views: which of 'axial', 'coronal' and 'sagittal', one GIF (about 3 MB) each.

    Returns:
        list of paths, `<folder>/<name>_<view>.gif`, a frame per slice with brain, 80 ms each, endless; one frame where
        there is no brain.

    Raises:
        ValueError: a view of another name, or shapes that do not agree.
    """
    if set(views) - set(VIEWS):
        raise ValueError(f'The views {list(views)} were given; known are {list(VIEWS)}.')
    volume, modality, shown = unpackPrediction(x, y, yhat)
    brain = isBrain(volume)
    mask = brain.copy()
    for classes in shown.values():
        mask |= classes > 0
    box = cropBox(mask, margin=0)
    grey = _toGrey(volume[box], displayWindow(volume, brain))
    # one byte says class and grey, as the palette has them
    panels = {modality: grey}
    panels |= {name: grey + _greyLevels() * classes[box].astype(np.uint8) for name, classes in shown.items()}
    paths = []
    for view in views:
        axes, caption = VIEWS[view]
        first = box[axes[0]].start
        turned = {panel: values.transpose(axes)[:, ::-1] for panel, values in panels.items()}  # the first row is on top
        if not mask.any():
            first = volume.shape[axes[0]] // 2
            turned = {panel: values[first : first + 1] for panel, values in turned.items()}
        paths.append(Path(folder) / f'{name}_{view}.gif')
        _writeGif(_drawFrames(turned, first, caption), paths[-1])
    return paths


def _greyLevels():
    return min(32, 256 // config.NO_CLASSES)  # of 256 colors; 64 look no better, and make the file a fifth larger


def _toGrey(volume, window):
    """Gives a volume as grey levels, uint8."""
    scale = _greyLevels() / (window[1] - window[0])
    return np.clip((volume - window[0]) * scale, 0, _greyLevels() - 1).astype(np.uint8)


def _palette():
    """Gives the 256 colors of every GIF, uint8 (256, 3): for each class the greys, tinted with its color."""
    greys = np.linspace(0, 1, _greyLevels())[:, None].repeat(3, axis=1)
    colors = [to_rgb(color) for color in config.CLASS_COLORS[1:]]
    tinted = [greys] + [(1 - OPACITY) * greys + OPACITY * np.array(color) for color in colors]
    return np.resize(np.rint(255 * np.concatenate(tinted)), (256, 3)).astype(np.uint8)


def _drawFrames(panels, firstNumber, caption):
    """Gives the frames of a GIF, palette indices uint8 (slices, rows, columns), from its panels of the same kind."""
    noSlices, height, width = next(iter(panels.values())).shape
    pitch = max(width + 2, 140)  # room for a name above each panel, and for the legend below two
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
    frames = np.repeat(np.asarray(canvas)[None], noSlices, axis=0)
    for number, panel in enumerate(panels.values()):
        frames[:, LINE : LINE + height, number * pitch : number * pitch + width] = panel
    for number, frame in enumerate(frames):
        text = Image.new('L', (60, LINE))
        ImageDraw.Draw(text).text((58, 2), f'slice {firstNumber + number}', white, font, anchor='ra')
        frame[:LINE, pitch - 62 : pitch - 2] = text
    return frames


def _writeGif(frames, file):
    """Writes palette indices as they are: nothing is quantized, which is what makes a GIF slow."""
    palette = _palette().tobytes()
    images = [Image.fromarray(frame) for frame in frames]
    for image in images:
        image.putpalette(palette)
    with writeWhole(file) as part:
        images[0].save(
            part, 'GIF', save_all=True, append_images=images[1:], duration=80, loop=0, optimize=False, disposal=1
        )
