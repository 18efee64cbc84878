"""Show what the program sees and does: a patient, the transforms, the learning curves, a prediction.

In a notebook each figure appears once: at the end of the cell that made it, in a loop too, or where it is displayed.
Every slice lies as the contract has it: the patient's front up, the patient's right on the viewer's right.
"""

import copy

import matplotlib.pyplot as plt
import numpy as np
import torch
import torchio as tio
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

import config
from patients import patientOf, readCase
from transforms import transformCase

# Of a prediction against the truth; apart from one another, from CLASS_COLORS and from dark grey for every eye
ERRORS = {'missed': '#FFFFFF', 'wrongly added': '#7FD34E', 'wrong class': '#D9A6FF'}
OPACITY = 0.6  # of a class over the image: the anatomy must stay visible below it


class _NotebookFigure(Figure):
    """A figure that leaves pyplot as soon as it is shown.

    The inline backend shows what pyplot holds at the end of a cell, and IPython shows the value of the last line: a
    plain figure that a function returns there appears twice.
    """

    def _repr_mimebundle_(self, **kwargs):
        if 'inline' in plt.get_backend():
            plt.close(self)
        return {}  # and IPython goes on to the format that the backend has registered for figures


def newFigure(width, height):
    """Gives an empty figure of width x height inches that a notebook shows once."""
    return plt.figure(FigureClass=_NotebookFigure, figsize=(width, height), dpi=90, layout='constrained')


def plotSample(paths):
    """Gives a figure of one patient: each modality, and the classes over one of them, in a telling axial slice.

    The slice is the one with most tumor or, where there is no segmentation, with most brain.

    Args:
        paths: one row of the file list.

    Returns:
        matplotlib Figure; a panel for each of `config.MODALITIES` and, with a segmentation, one for the classes.

    Raises:
        ValueError, FileNotFoundError: what `patients.readCase` says of bad data.
    """
    image, label = readCase(paths)
    brains = image != 0
    brain = brains.any(0)
    number = tellingSlice(*(mask.transpose(2, 0, 1) for mask in (label, brain) if mask is not None))
    box = cropBox(brain[..., number])
    names = list(config.MODALITIES) + ([] if label is None else ['classes'])
    figure = newFigure(2.1 * len(names) + (0 if label is None else 2), 2.1 * tallness(box) + 0.6)
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for channel, (panel, name) in enumerate(zip(panels, names, strict=False)):
        if name == 'classes':
            channel = _shownChannel(len(image))
            name = f'classes over {config.MODALITIES[channel]}'
        showSlice(panel, image[channel, ..., number][box], displayWindow(image[channel], brains[channel]), name)
    markSides(panels[0])
    title = f'{patientOf(paths)}, axial slice {number} of {image.shape[3]}'
    if label is None:
        title += ', no segmentation'
    else:
        showClasses(panels[-1], label[..., number][box])
        place = {'loc': 'center left', 'bbox_to_anchor': (1, 0.5)}
        _addLegend(panels[-1], config.CLASS_NAMES[1:], config.CLASS_COLORS[1:], label, 'voxels', **place)
    figure.suptitle(title)
    return figure


def plotTransforms(image, label, transforms):
    """Gives a figure of one patch under several transforms: a column for each, a row for each modality.

    What is random is drawn from `config.SEED`; the random state of the run stays as it was.

    Args:
        image: float (C, 128, 128), as `utils.BRATSDataset` hands it out.
        label: integer (128, 128), classes 0 to 3; outlined in the figure.
        transforms: dict of name to torchio transform, None for the patch as it is. Or a torchio transform such as
            `trainTransform`: the patch as stored, and then each transform in it by itself, made to happen.

    Returns:
        matplotlib Figure. All panels of a row have the same grey scale, that of its first.
    """
    columns = transforms.items() if isinstance(transforms, dict) else [('as stored', None), *_leaves(transforms)]
    image, label = torch.as_tensor(image), torch.as_tensor(label)
    figure = newFigure(max(1.2 * len(columns) + 0.4, 4.5), 1.2 * len(image) + 0.7)
    panels = figure.subplots(len(image), len(columns), squeeze=False)
    windows = [displayWindow(channel.numpy(), isBrain(channel.numpy())) for channel in image]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.SEED)
        for column, (name, transform) in enumerate(columns):
            images, classes = image, label
            if transform is not None:  # as a volume of depth 1
                (images,), (classes,) = transformCase(image[..., None], label[..., None], transform)
            for row, panel in enumerate(panels[:, column]):
                showSlice(panel, images[row].numpy(), windows[row], name if row == 0 else '')
                _outlineClasses(panel, classes.numpy())
    for panel, name in zip(panels[:, 0], _channelNames(len(image)), strict=True):
        panel.set_ylabel(name)
    markSides(panels[0, 0])
    lines = [Line2D([], [], color=color) for color in config.CLASS_COLORS[1:]]
    place = {'loc': 'outside lower center', 'ncols': len(lines), 'frameon': False, 'fontsize': 9}
    figure.legend(lines, config.CLASS_NAMES[1:], **place)
    return figure


def plotCurves(history):
    """Gives a figure of the learning curves, with the best epoch and the drops of the learning rate marked.

    Args:
        history: DataFrame, a row per epoch, columns `epoch`, `trainLoss`, `valLoss` (mean per patch) and, if it is
            there, `learnRate`.

    Returns:
        matplotlib Figure; the losses are on a logarithmic scale where they fall by more than a factor of 10.

    Raises:
        ValueError: a column is missing, or there is no epoch.
    """
    missing = {'epoch', 'trainLoss', 'valLoss'} - set(history)
    if missing or len(history) == 0:
        raise ValueError(f'A history of {len(history)} epochs without the columns {sorted(missing)} has no curves.')
    figure = newFigure(7, 4)
    panel = figure.subplots()
    style = {'marker': '.' if len(history) < 40 else None}
    panel.plot(history['epoch'], history['trainLoss'], color='#777777', label='training', **style)
    panel.plot(history['epoch'], history['valLoss'], color='#0072B2', label='validation', **style)
    losses = history[['trainLoss', 'valLoss']].to_numpy(float)
    losses = losses[np.isfinite(losses)]
    if losses.size and losses.min() > 0 and losses.max() > 10 * losses.min():
        panel.set_yscale('log')
    if history['valLoss'].notna().any():
        best = history.iloc[np.nanargmin(history['valLoss'].to_numpy(float))]
        text = f'best: {best["valLoss"]:.4g} in epoch {best["epoch"]:.0f}'
        panel.plot(best['epoch'], best['valLoss'], 'o', color='#D55E00', markersize=8, label=text)
    if 'learnRate' in history:
        _markDrops(panel, history['epoch'].to_numpy(), history['learnRate'].to_numpy(float))
    panel.set(xlabel='epoch', ylabel='loss, mean per patch', title='Learning curves')
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    panel.spines[['top', 'right']].set_visible(False)
    panel.legend(frameon=False)
    return figure


def plotPrediction(x, y, yhat, title=None):
    """Gives a figure of a prediction beside the truth, and of where they differ, in a telling axial slice.

    The slice is the one with most tumor in the truth, else in the prediction, else with most brain.

    Args:
        x, y, yhat: float (D, C, W, H) and integer (D, W, H) twice, as `engine.predict` gives them; `y` may be None.
        title: stands above the figure, before the number of the slice; the patient's id, for example.

    Returns:
        matplotlib Figure: image, truth, prediction and errors, with pixel counts of the slice; without `y` image and
        prediction.
    """
    volume, modality, shown = unpackPrediction(x, y, yhat)
    brain = isBrain(volume)
    number = tellingSlice(*shown.values(), brain)
    shown = {name: classes[number] for name, classes in shown.items()}
    box = cropBox(brain[number] | np.any([classes > 0 for classes in shown.values()], axis=0))
    names = [modality, *shown] + ([] if y is None else ['errors'])
    heights = 2.2 * tallness(box), 0.65  # inches; of the images and of the legends below them
    figure = newFigure(2.2 * len(names), sum(heights) + 0.6)
    rows = figure.subplots(2, len(names), height_ratios=heights)
    panels, below = (dict(zip(names, row, strict=True)) for row in rows)
    for panel in below.values():
        panel.axis('off')
    low, high = displayWindow(volume, brain)
    for name, panel in panels.items():
        # half as bright below the errors, so that white stands for them alone
        showSlice(panel, volume[number][box], (low, 2 * high - low if name == 'errors' else high), name)
    for name, classes in shown.items():
        showClasses(panels[name], classes[box])
        _addLegend(below[name], config.CLASS_NAMES[1:], config.CLASS_COLORS[1:], classes, 'pixels', loc='upper center')
    if y is not None:
        errors = _errorMap(**shown)
        showClasses(panels['errors'], errors[box], ('#000000', *ERRORS.values()), opacity=1)
        _addLegend(below['errors'], ERRORS, ERRORS.values(), errors, 'pixels', loc='upper center')
    markSides(panels[modality])
    figure.suptitle(f'{title or "Prediction"}, axial slice {number} of {len(volume)}', fontsize=10)
    return figure


def unpackPrediction(x, y, yhat):
    """Gives the shown modality (D, W, H), its name, and the truth (if any) and the prediction (D, W, H) by name.

    Raises:
        ValueError: shapes that do not belong together, or a class that has no color.
    """
    shown = {'truth': y, 'prediction': yhat}
    x, shown = np.asarray(x), {name: np.asarray(classes) for name, classes in shown.items() if classes is not None}
    for name, classes in shown.items():
        if x.ndim != 4 or classes.shape != x.shape[:1] + x.shape[2:]:
            raise ValueError(f'x is {x.shape}, the {name} {classes.shape}; (D, C, W, H), (D, W, H) were expected.')
        if classes.size and not 0 <= classes.min() <= classes.max() < config.NO_CLASSES:
            raise ValueError(
                f'The {name} has the classes {np.unique(classes)[:9]}; 0 to {config.NO_CLASSES - 1} exist.'
            )
    channel = _shownChannel(x.shape[1])
    return x[:, channel], _channelNames(x.shape[1])[channel], shown


def _channelNames(noChannels):
    names = config.MODALITIES
    return list(names) if len(names) == noChannels else [f'channel {number}' for number in range(noChannels)]


def _shownChannel(noChannels):
    """Gives the channel that lies below the classes: flair, which shows all of a tumor, or else the first."""
    names = _channelNames(noChannels)
    return names.index('flair') if 'flair' in names else 0


def isBrain(volume):
    """Tells brain from background in an image that may be stretched: a corner of a head's scan is background."""
    return volume != volume[(0,) * volume.ndim]


def displayWindow(volume, mask):
    """Gives the intensities that are shown black and white: the 1st and 99th percentile in the brain."""
    values = volume[mask]
    if values.size == 0:
        return volume.min(), volume.min() + 1
    low, high = np.percentile(values[:: values.size // 100_000 + 1], (1, 99))
    return low, max(high, low + 1e-6)


def tellingSlice(*volumes):
    """Gives the number of the fullest slice of the first volume (D, W, H) that has any, else the middle one."""
    for volume in volumes:
        counts = np.count_nonzero(volume, axis=(1, 2))
        if counts.any():
            return int(counts.argmax())
    return len(volumes[-1]) // 2


def cropBox(mask, margin=4):
    """Gives the slices that cut out what is True in a mask, with a margin; all of it where nothing is True."""
    box = []
    for axis in range(mask.ndim):
        where = np.flatnonzero(mask.any(tuple(other for other in range(mask.ndim) if other != axis)))
        ends = (where[0] - margin, where[-1] + 1 + margin) if where.size else (0, mask.shape[axis])
        box.append(slice(max(int(ends[0]), 0), min(int(ends[1]), mask.shape[axis])))
    return tuple(box)


def tallness(box):
    """Gives height over width of what a box of two slices cuts out, within what a figure can take."""
    width, height = (cut.stop - cut.start for cut in box)
    return min(max(height / width, 0.5), 2)


def showSlice(panel, image, window, title):
    """Shows one slice (first axis to the right, second up) between two intensities, without ticks."""
    # voxels as they are, in the greys that an eye tells apart: also a PNG of half the size
    style = {'cmap': plt.get_cmap('gray', 32), 'interpolation': 'nearest', 'origin': 'lower'}
    panel.imshow(image.T, vmin=window[0], vmax=window[1], **style)
    panel.set(xticks=[], yticks=[])
    panel.set_title(title, fontsize=9)
    panel.spines[:].set_visible(False)


def showClasses(panel, classes, colors=None, opacity=OPACITY):
    """Lays the classes 1, 2, ... of one slice over what a panel shows; `colors` has one for class 0 too."""
    colors = colors or config.CLASS_COLORS
    style = {'cmap': ListedColormap(colors), 'interpolation': 'nearest', 'origin': 'lower', 'alpha': opacity}
    panel.imshow(np.ma.masked_equal(classes.T, 0), vmin=0, vmax=len(colors) - 1, **style)


def _outlineClasses(panel, classes):
    for number in (2, 3, 1):  # from the outside in: where two outlines meet, the inner class's is seen
        isClass = (classes == number).T
        if isClass.any() and not isClass.all():
            panel.contour(isClass, levels=[0.5], colors=[config.CLASS_COLORS[number]], linewidths=1)


def markSides(panel):
    """Says on a panel where the patient's front and right are."""
    style = {'transform': panel.transAxes, 'color': 'white', 'fontsize': 8}
    style['path_effects'] = [withStroke(linewidth=2, foreground='black')]  # to be read over a bright brain, too
    panel.text(0.5, 0.98, 'front', ha='center', va='top', **style)
    panel.text(0.98, 0.5, 'R', ha='right', va='center', **style)


def _addLegend(panel, names, colors, classes, unit, **place):
    """Puts a legend of the classes 1, 2, ... beside a panel, and how often each is there."""
    counts = np.bincount(classes.ravel(), minlength=len(names) + 1)[1:]
    texts = [f'{name}, {count:,} {unit}' for name, count in zip(names, counts, strict=True)]
    patches = [Patch(facecolor=color, edgecolor='#777777') for color in colors]
    panel.legend(patches, texts, frameon=False, fontsize=8, handlelength=1.2, **place)


def _errorMap(truth, prediction):
    """Gives 1 where tumor was missed, 2 where it was wrongly added, 3 where it has the wrong class, else 0."""
    errors = np.where(truth != prediction, 3, 0)
    errors[(truth > 0) & (prediction == 0)] = 1
    errors[(truth == 0) & (prediction > 0)] = 2
    return errors


def _markDrops(panel, epochs, rates):
    style = {'rotation': 90, 'fontsize': 8, 'color': '#777777', 'ha': 'right', 'va': 'top'}
    for epoch, before, rate in zip(epochs[1:], rates, rates[1:], strict=False):
        if rate < before:
            panel.axvline(epoch, color='#AAAAAA', linestyle=':', linewidth=1, zorder=0)
            panel.text(epoch, 0.98, f'rate {rate:.2g}', transform=panel.get_xaxis_transform(), **style)


def _leaves(transform):
    """Gives (name, copy that happens each time) of the transforms that a Compose or OneOf is made of, however deep."""
    if isinstance(transform, tio.Compose | tio.OneOf):
        children = transform.transforms if isinstance(transform, tio.Compose) else transform.transforms_dict
        return [leaf for child in children for leaf in _leaves(child)]
    forced = copy.deepcopy(transform)
    for chance in {'probability', 'flip_probability'} & set(vars(forced)):  # the latter is a flip's, of each axis
        setattr(forced, chance, 1)
    return [(type(forced).__name__.removeprefix('Random'), forced)]
