"""Provide what the figures share: the empty figure, the part of a volume to show, slices, classes and short texts."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

import config
from metrics.counts import boundingBox
from patients.editions import CAVITY

BELOW = {'loc': 'outside lower center', 'frameon': False, 'fontsize': 8}  # place and style of a figure's legend
OPACITY = 0.6  # of a class over the image: the anatomy stays visible below it
FEW_PATIENTS = 10  # with fewer, the title of a chart of scores says that it tells little


class _NotebookFigure(Figure):
    """A figure that leaves pyplot as soon as it is displayed.

    The inline backend displays what pyplot holds at the end of a cell, and IPython displays the value of the last line.
    A plain figure that is returned there appears twice.
    """

    def _repr_mimebundle_(self, **kwargs):
        if 'inline' in plt.get_backend():
            plt.close(self)
        return {}  # IPython then uses the format that the backend has registered for figures


def newFigure(width, height):
    """Return an empty figure of width x height inches that a notebook displays once."""
    return plt.figure(FigureClass=_NotebookFigure, figsize=(width, height), dpi=90, layout='constrained')


def unpackPrediction(x, y, yhat):
    """Return what is drawn of a prediction.

    Args:
        x, y, yhat: as `engine.predict` returns them, tensors or arrays; `y` may be None.

    Returns:
        volume: (D, W, H), the modality that is shown.
        modality: its name.
        classes: dict of 'truth' (absent without `y`) and 'prediction' to arrays (D, W, H).

    Raises:
        ValueError: the shapes do not agree, or a class does not exist.
    """
    classes = {'truth': y, 'prediction': yhat}
    x, classes = np.asarray(x), {name: np.asarray(each) for name, each in classes.items() if each is not None}
    for name, each in classes.items():
        if x.ndim != 4 or each.shape != x.shape[:1] + x.shape[2:]:
            raise ValueError(f'x is {x.shape}, the {name} {each.shape}; (D, C, W, H) and (D, W, H) were expected.')
        if each.size and not 0 <= each.min() <= each.max() < config.NO_CLASSES:
            found = np.unique(each)[:9]
            raise ValueError(f'The {name} has the classes {found}; 0 to {config.NO_CLASSES - 1} were expected.')
    channel = shownChannel(x.shape[1])
    if not np.ptp(x[:, channel]):  # a modality that is missing
        channel = next((number for number in range(x.shape[1]) if np.ptp(x[:, number])), channel)
    return x[:, channel], channelNames(x.shape[1])[channel], classes


def channelNames(numChannels):
    """Return the names of the channels: `config.MODALITIES`, or numbers where there are more or fewer channels."""
    names = config.MODALITIES
    return list(names) if len(names) == numChannels else [f'channel {number}' for number in range(numChannels)]


def shownChannel(numChannels):
    """Return the channel that is drawn below the classes: flair, which shows the whole tumor, or else the first."""
    names = channelNames(numChannels)
    return names.index('flair') if 'flair' in names else 0


def mainRegions():
    """Return those of `config.MAIN_REGIONS` that `config.REGIONS` has."""
    return [name for name in config.MAIN_REGIONS if name in config.REGIONS]


def foreground(volume):
    """Return the mask (bool) of what is above the background in a stretched image: the background is its minimum."""
    return volume > volume.min()


def displayWindow(volume, mask):
    """Return the intensities that are drawn black and white: the 1st and 99th percentile inside the mask."""
    values = volume[mask]
    if values.size == 0:
        return volume.min(), volume.min() + 1
    low, high = np.percentile(values[:: values.size // 100_000 + 1], (1, 99))
    return low, max(high, low + 1e-6)


def mostInformativeSlice(*volumes):
    """Return the number of the fullest slice of the first volume (D, W, H) that is not empty, else the middle one."""
    for volume in volumes:
        counts = np.count_nonzero(volume, axis=(1, 2))
        if counts.any():
            return int(counts.argmax())
    return len(volumes[-1]) // 2


def cropBox(mask, margin=4):
    """Return the slices, one per axis, that cut a mask to what is True, with a margin; the whole of an empty mask."""
    box = boundingBox(mask)
    if box[0].start == box[0].stop:
        return tuple(slice(0, size) for size in mask.shape)
    ends = zip(box, mask.shape, strict=True)
    return tuple(slice(max(cut.start - margin, 0), min(cut.stop + margin, size)) for cut, size in ends)


def aspectRatio(box):
    """Return height over width of a box of two slices, clipped to 0.5 to 2 for the size of a figure."""
    width, height = (cut.stop - cut.start for cut in box)
    return min(max(height / width, 0.5), 2)


def showSlice(panel, image, window, title):
    """Draw a slice (first axis to the right, second axis up) between two intensities, without ticks."""
    # 32 greys, which an eye cannot tell from 256, halve the size of the PNG
    style = {'cmap': plt.get_cmap('gray', 32), 'interpolation': 'nearest', 'origin': 'lower'}
    panel.imshow(image.T, vmin=window[0], vmax=window[1], **style)
    panel.set(xticks=[], yticks=[])
    panel.set_title(title, fontsize=9)
    panel.spines[:].set_visible(False)


def showClasses(panel, classes, colors=None, opacity=OPACITY):
    """Draw the classes 1, 2, ... of a slice over a panel; `colors` starts with that of class 0, which is not drawn."""
    colors = colors or config.CLASS_COLORS
    style = {'cmap': ListedColormap(colors), 'interpolation': 'nearest', 'origin': 'lower', 'alpha': opacity}
    panel.imshow(np.ma.masked_equal(classes.T, 0), vmin=0, vmax=len(colors) - 1, **style)


def markSides(panel, up='front', right='R'):
    """Write on a panel which side of the patient is up, and which on the right (R: the patient's right)."""
    style = {'transform': panel.transAxes, 'color': 'white', 'fontsize': 8}
    style['path_effects'] = [withStroke(linewidth=2, foreground='black')]  # readable over a bright brain too
    panel.text(0.5, 0.98, up, ha='center', va='top', **style)
    panel.text(0.98, 0.5, right, ha='right', va='center', **style)


def countText(number, caution=None):
    """Return a number of patients in words; a caution, if given, follows where they are fewer than `FEW_PATIENTS`."""
    text = f'{number} patient' if number == 1 else f'{number} patients'
    return f'{text} (so few that {caution})' if caution and number < FEW_PATIENTS else text


def requireColumns(table, columns):
    """Raise ValueError if a table has no rows or lacks a column."""
    missing = [name for name in columns if name not in table]
    if missing or len(table) == 0:
        raise ValueError(
            f'The table has {len(table)} rows and lacks the columns {missing or "none"}; '
            f'at least one row and the columns {list(columns)} were expected.'
        )


def requireOneRule(table):
    """Raise ValueError if a table has the scores of several challenges, each with other volumes and regions."""
    if 'rule' in table and table['rule'].nunique() > 1:
        first, *others = map(str, table['rule'].unique())
        text = f'one was expected, such as table[table.rule == {first!r}]'
        raise ValueError(f'The table has the rules {", ".join([first, *others])}; {text}.')


def classNames():
    """Return the names of the classes; with four classes, that of the resection cavity (4) too."""
    return [*config.CLASS_NAMES, *([config.CAVITY_CLASS[0]] if config.NO_CLASSES == CAVITY else [])]


def classColors():
    """Return the colors of the classes, '#RRGGBB'; with four classes, that of the resection cavity (4) too."""
    return [*config.CLASS_COLORS, *([config.CAVITY_CLASS[1]] if config.NO_CLASSES == CAVITY else [])]
