"""Draw slices: a patient's modalities and classes, a patch under transforms, predictions compared with the truth.

In a notebook each figure appears once: at the end of the cell that made it, in a loop too, or where it is displayed.
In every axial slice the patient's front is up and the patient's right is on the viewer's right.
"""

import copy

import numpy as np
import torch
import torchio as tio
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

import config
from patients.editions import known, labelsOf
from patients.reading import COLUMNS, detectEdition, hasFile, maskFunction, patientOf, readCase, readVolume
from patients.volumes import PLANES, planesOf
from pictures.figure import (
    BELOW,
    aspectRatio,
    channelNames,
    countText,
    cropBox,
    displayWindow,
    foreground,
    mainRegions,
    markSides,
    mostInformativeSlice,
    newFigure,
    requireColumns,
    requireOneRule,
    showClasses,
    shownChannel,
    showSlice,
    unpackPrediction,
)
from transforms import transformCase

# Colors of errors, distinct for color-blind readers from each other, from CLASS_COLORS and from dark grey
ERRORS = {'false negative': '#FFFFFF', 'false positive': '#7FD34E', 'wrong class': '#D9A6FF'}
CAPTIONS = {  # what a modality shows
    't1': 'anatomy; tumor is dark',
    't1ce': 'enhancing tumor is bright (contrast agent)',
    't2': 'edema and fluid are bright',
    'flair': 'edema is bright, fluid dark',
}
SIDES = {'axial': ('front', 'R'), 'coronal': ('top', 'R'), 'sagittal': ('top', 'front')}  # up, and on the right
REGION_NAMES = {'WT': 'whole tumor', 'TC': 'tumor core', 'ET': 'enhancing tumor'}


def plotSample(paths):
    """Draw one patient: each modality, and the classes over one of them, in the most informative axial slice.

    That is the slice with most tumor or, without a segmentation, with most brain.

    Args:
        paths: one row of the file list.

    Returns:
        matplotlib Figure, a panel for each of `config.MODALITIES` and, with a segmentation, one for the classes.

    Raises:
        ValueError, FileNotFoundError: as `patients.readCase`.
    """
    image, label = readCase(paths)
    brains = maskFunction(image)
    brain = brains.any(0)
    number = mostInformativeSlice(*(mask.transpose(2, 0, 1) for mask in (label, brain) if mask is not None))
    box = cropBox(brain[..., number])
    names = list(config.MODALITIES) + ([] if label is None else ['classes'])
    figure = newFigure(2.1 * len(names) + (0 if label is None else 2), 2.1 * aspectRatio(box) + 0.6)
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for channel, (panel, name) in enumerate(zip(panels, names, strict=False)):
        if name == 'classes':
            channel = shownChannel(len(image))
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


def plotModalities(paths):
    """Draw what the modalities, the classes and the regions are, for one patient in one axial slice.

    The first row shows each modality that the patient has a file of, with what is bright in it. The second row shows
    each class alone, then the regions and the classes that make them. The slice has the largest fractions of the
    classes' volumes, so that all classes are seen; without a segmentation it has most brain.

    Args:
        paths: one row of the file list. Without a segmentation the second row is absent.

    Returns:
        matplotlib Figure.

    Raises:
        ValueError, FileNotFoundError: as `patients.readCase`, also for the modalities that are not in
            `config.MODALITIES`.
    """
    volumes, label = _readModalities(paths)
    brains = {name: maskFunction(volume) for name, volume in volumes.items()}
    brain = np.any(list(brains.values()), axis=0)
    number = mostInformativeSlice(brain.transpose(2, 0, 1)) if label is None else _sliceOfClasses(label, brain)
    box = cropBox(brain[..., number])
    cut = {name: volume[..., number][box] for name, volume in volumes.items()}
    windows = {name: displayWindow(volume, brains[name]) for name, volume in volumes.items()}
    heights = 2.3 * aspectRatio(box) + 0.7, 1.5 * aspectRatio(box) + 0.8  # inches
    width = max(9.6, 1.6 * (config.NO_CLASSES - 1 + len(mainRegions())))
    figure = newFigure(width, sum(heights if label is not None else heights[:1]) + 0.3)
    figure.suptitle(f'{patientOf(paths)}, axial slice {number} of {brain.shape[2]}', fontsize=11)
    above, below = (figure, None) if label is None else figure.subfigures(2, 1, height_ratios=heights)
    panels = above.subplots(1, len(cut), squeeze=False)[0]
    for panel, (name, image) in zip(panels, cut.items(), strict=True):
        showSlice(panel, image, windows[name], name if name in config.MODALITIES else f'{name} (not used)')
        panel.set_xlabel(CAPTIONS[name], fontsize=8)
    markSides(panels[0])
    if label is not None:
        name = config.MODALITIES[shownChannel(len(config.MODALITIES))]
        low, high = windows[name]
        labels = labelsOf(detectEdition(paths))
        # darker than above, so that the colors stand out
        _drawClassesAndRegions(below, cut[name], (low, 1.6 * high - 0.6 * low), label[..., number][box], labels, name)
    return figure


def plotPlanes(paths):
    """Draw one slice of each of `config.PLANES`: one network learns them all, and its predictions are averaged.

    Each slice is the one with most tumor or, without a segmentation, with most brain.

    Args:
        paths: one row of the file list.

    Returns:
        matplotlib Figure, a panel for each plane.

    Raises:
        ValueError, FileNotFoundError: as `patients.readCase`.
    """
    image, label = readCase(paths)
    channel = shownChannel(len(image))
    brains, window = maskFunction(image), displayWindow(image[channel], maskFunction(image[channel]))
    volumes = [each.transpose(2, 0, 1) for each in (image[channel], brains.any(0))]  # (W, H, D) -> (D, W, H)
    classes = None if label is None else label.transpose(2, 0, 1)
    planes = planesOf(config.PLANES)
    figure = newFigure(3 * len(planes), 3.6)
    panels = figure.subplots(1, len(planes), squeeze=False)[0]
    for panel, plane in zip(panels, planes, strict=True):
        values, brain = (each.transpose(PLANES[plane]) for each in volumes)
        tumor = None if label is None else classes.transpose(PLANES[plane])
        number = mostInformativeSlice(*(mask for mask in (tumor, brain) if mask is not None))
        box = cropBox(brain[number])
        showSlice(panel, values[number][box], window, f'{plane}, slice {number} of {len(values)}')
        if label is not None:
            showClasses(panel, tumor[number][box])
        markSides(panel, *SIDES[plane])
    figure.suptitle(f'{patientOf(paths)}, {config.MODALITIES[channel]}', fontsize=11)
    return figure


def _readModalities(paths):
    """Return the volumes (W, H, D) of the modalities that a patient has, by name, and the label (W, H, D) or None."""
    image, label = readCase(paths)
    volumes = dict(zip(config.MODALITIES, image, strict=True))
    try:
        channels = known()[detectEdition(paths)].channels or {}
    except ValueError:
        channels = {}  # unknown edition: readCase accepts it without a segmentation
    names = [name for name in COLUMNS if name in CAPTIONS and hasFile(paths, name)]
    for name in names:
        if name not in volumes:
            try:  # nothing else reads it, so it stops nothing
                volume, _ = readVolume(paths[name], patientOf(paths), channels.get(name))
            except (ValueError, FileNotFoundError) as error:
                print(error)
                continue
            if volume.shape != image.shape[1:]:
                raise ValueError(
                    f'{patientOf(paths)}: {paths[name]} has {volume.shape} voxels; '
                    f'{image.shape[1:]} were expected, as in {config.MODALITIES[0]}.'
                )
            volumes[name] = volume
    return {name: volumes[name] for name in names if name in volumes}, label


def _sliceOfClasses(label, brain):
    """Return the axial slice that holds the largest fractions of the classes' volumes; of most brain without tumor."""
    counts = np.stack([np.count_nonzero(label == number, axis=(0, 1)) for number in range(1, config.NO_CLASSES)])
    fractions = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)  # (3, D)
    return int(fractions.sum(0).argmax()) if counts.any() else mostInformativeSlice(brain.transpose(2, 0, 1))


def _drawClassesAndRegions(figure, image, window, classes, labels, name):
    """Draw each class, with its label in the files, and each region, outlined, over a slice of the modality `name`."""
    numbers, names = range(1, config.NO_CLASSES), mainRegions()
    left, right = figure.subfigures(1, 2, width_ratios=(len(numbers), len(names)))
    left.suptitle(f'Classes over {name}: each voxel has one', fontsize=10)
    right.suptitle('Regions: classes taken together, as they are scored', fontsize=10)
    for panel, number in zip(left.subplots(1, len(numbers), squeeze=False)[0], numbers, strict=True):
        showSlice(panel, image, window, f'{number} = {config.CLASS_NAMES[number]}')
        _drawMembers(panel, classes, (number,))
        text = f'label {labels[number]} in the files' if labels.get(number) else 'not in these files'
        panel.set_xlabel(text, fontsize=8)
    for panel, region in zip(right.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        members = config.REGIONS[region]
        showSlice(panel, image, window, f'{region} = {" + ".join(map(str, members))}')
        isIn = _drawMembers(panel, classes, members)
        if isIn.any() and not isIn.all():
            panel.contour(isIn.T, levels=[0.5], colors='white', linewidths=0.6)
        panel.set_xlabel(REGION_NAMES[region], fontsize=8)


def _drawMembers(panel, classes, members):
    """Draw those classes of a slice that are among `members`, and return where they are."""
    isIn = np.isin(classes, members)
    showClasses(panel, np.where(isIn, classes, 0))
    if not isIn.any():
        panel.text(0.5, 0.03, 'not in this slice', color='white', fontsize=8, ha='center', transform=panel.transAxes)
    return isIn


def plotTransforms(image, label, transforms):
    """Draw one patch under several transforms: a column for each transform, a row for each modality.

    Random parameters are drawn with `config.SEED`. The random state of the run is restored. The patch may be of any
    plane, so no side is marked.

    Args:
        image: float (C, H, W), a patch of `utils.BRATSDataset`.
        label: integer (H, W), classes 0 to 3, which are outlined. Choose a patch with all classes.
        transforms: dict of name to torchio transform, with None for the patch as it is. Or one torchio transform such
            as `trainTransform`: the figure then shows the patch as stored, and after each transform inside it, applied
            alone and with probability 1.

    Returns:
        matplotlib Figure. The panels of a row share the grey scale of the patch as it is.
    """
    isDict = isinstance(transforms, dict)
    columns = transforms.items() if isDict else [('as stored', None), *_listTransforms(transforms)]
    image, label = torch.as_tensor(image).float(), torch.as_tensor(label)
    figure = newFigure(max(1.2 * len(columns) + 0.4, 4.5), 1.2 * len(image) + 0.7)
    panels = figure.subplots(len(image), len(columns), squeeze=False)
    windows = [displayWindow(channel.numpy(), foreground(channel.numpy())) for channel in image]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.SEED)
        for column, (name, transform) in enumerate(columns):
            images, classes = image, label
            if transform is not None:  # as a volume of depth 1
                (images,), (classes,) = transformCase(image[..., None], label[..., None], transform)
            for row, panel in enumerate(panels[:, column]):
                showSlice(panel, images[row].numpy(), windows[row], name if row == 0 else '')
                _outlineClasses(panel, classes.numpy())
    for panel, name in zip(panels[:, 0], channelNames(len(image)), strict=True):
        panel.set_ylabel(name)
    lines = [Line2D([], [], color=color) for color in config.CLASS_COLORS[1:]]
    figure.legend(lines, config.CLASS_NAMES[1:], ncols=len(lines), **BELOW)
    return figure


def _listTransforms(transform):
    """Return (name, copy with probability 1) of each transform inside nested Compose and OneOf."""
    if isinstance(transform, tio.Compose | tio.OneOf):
        children = transform.transforms if isinstance(transform, tio.Compose) else transform.transforms_dict
        return [pair for child in children for pair in _listTransforms(child)]
    forced = copy.deepcopy(transform)
    for name in {'probability', 'flip_probability'} & set(vars(forced)):  # the latter is per axis
        setattr(forced, name, 1)
    return [(type(forced).__name__.removeprefix('Random'), forced)]


def _outlineClasses(panel, classes):
    """Draw the outlines of the classes of a slice."""
    # from the outside in, so that the outline of the inner class stays visible
    for number in sorted(range(1, config.NO_CLASSES), key=lambda number: {2: 0, 3: 1}.get(number, 2)):
        isClass = (classes == number).T
        if isClass.any() and not isClass.all():
            panel.contour(isClass, levels=[0.5], colors=[config.CLASS_COLORS[number]], linewidths=1)


def plotPrediction(x, y, yhat, title=None):
    """Draw a prediction, the truth and the errors in the most informative axial slice.

    That is the slice with most tumor in truth, else in the prediction, else with most brain.

    Args:
        x, y, yhat: float (D, C, W, H) and twice integer (D, W, H), as `engine.predict` returns them; `y` may be None.
        title: begins the title of the figure, before the number of the slice; for example the patient's id.

    Returns:
        matplotlib Figure: image, truth, prediction and errors, with pixel counts of the slice. Without `y` only image
        and prediction.

    Raises:
        ValueError: the shapes do not agree, or a class does not exist.
    """
    cut = _cutCase(x, y, yhat)
    names = [cut['modality'], *cut['classes']] + ([] if y is None else ['errors'])
    heights = 2.2 * aspectRatio(cut['box']), 0.65  # inches, of the images and of the legends below them
    figure = newFigure(2.2 * len(names), sum(heights) + 0.6)
    rows = figure.subplots(2, len(names), height_ratios=heights)
    panels, below = (dict(zip(names, row, strict=True)) for row in rows)
    for panel in below.values():
        panel.axis('off')
    low, high = cut['window']
    for name, panel in panels.items():
        # half as bright below the errors, so that only errors are white
        showSlice(panel, cut['image'], (low, 2 * high - low if name == 'errors' else high), name)
    for name, classes in cut['classes'].items():
        showClasses(panels[name], classes)
        _addLegend(below[name], config.CLASS_NAMES[1:], config.CLASS_COLORS[1:], classes, 'pixels', loc='upper center')
    if y is not None:
        truth, prediction = cut['classes'].values()
        errors = np.select([truth == prediction, prediction == 0, truth == 0], [0, 1, 2], default=3)  # as in ERRORS
        showClasses(panels['errors'], errors, ('#000000', *ERRORS.values()), opacity=1)
        _addLegend(below['errors'], ERRORS, ERRORS.values(), errors, 'pixels', loc='upper center')
    markSides(panels[cut['modality']])
    figure.suptitle(f'{title or "Prediction"}, axial slice {cut["number"]} of {len(x)}', fontsize=10)
    return figure


def _cutCase(x, y, yhat):
    """Return what is drawn of a prediction: the most informative slice of image and classes, cropped to the head."""
    volume, modality, classes = unpackPrediction(x, y, yhat)
    brain = foreground(volume)
    number = mostInformativeSlice(*classes.values(), brain)
    box = cropBox(brain[number] | np.any([values[number] > 0 for values in classes.values()], axis=0))
    return {
        'modality': modality,
        'number': number,
        'box': box,
        'window': displayWindow(volume, brain),
        # copies, because a view would keep the whole volume in memory
        'image': volume[number][box].copy(),
        'classes': {name: values[number][box].copy() for name, values in classes.items()},
    }


def _addLegend(panel, names, colors, classes, unit, **place):
    """Add a legend of the classes 1, 2, ... and their counts to a panel."""
    counts = np.bincount(classes.ravel(), minlength=len(names) + 1)[1:]
    texts = [f'{name}, {count:,} {unit}' for name, count in zip(names, counts, strict=True)]
    patches = [Patch(facecolor=color, edgecolor='#777777') for color in colors]
    panel.legend(patches, texts, frameon=False, fontsize=8, handlelength=1.2, **place)


def plotCases(table, predict):
    """Draw the best, the median and the worst patient: truth and prediction in the most informative slice.

    Patients are ranked by the mean of their Dice of those of WT, TC and ET that `config.REGIONS` has. Of an even number
    the median is the lower of the middle two. The slice is chosen as in `plotPrediction`.

    Args:
        table: DataFrame of `metrics.scoreTable`.
        predict: function of a patient's id that returns `x, y, yhat` as `engine.predict` does, for example
            `lambda patient: engine.predict(testdf.loc[patient], model)`; or a dict of such results. One patient is held
            in memory at a time.

    Returns:
        matplotlib Figure, one row per patient; fewer than three if there are fewer patients.

    Raises:
        ValueError: no patient has the three scores, or a prediction is not as `plotPrediction` expects it.
    """
    cases = _rankCases(table)
    shown = [_cutCase(*(predict[patient] if hasattr(predict, 'keys') else predict(patient))[:3]) for patient in cases]
    heights = [1.35 * aspectRatio(case['box']) for case in shown]
    figure = newFigure(4.4, sum(heights) + 0.9)
    rows = figure.subplots(len(cases), 3, height_ratios=heights, width_ratios=(0.95, 1, 1), squeeze=False)
    for row, text, case in zip(rows, cases.values(), shown, strict=True):
        row[0].axis('off')
        text += f'\n\naxial slice {case["number"]}'
        row[0].text(0, 0.5, text, fontsize=8, va='center', transform=row[0].transAxes)
        for panel, name in zip(row[1:], ('truth', 'prediction'), strict=True):
            showSlice(panel, case['image'], case['window'], f'{name} over {case["modality"]}')
            showClasses(panel, case['classes'][name])
    markSides(rows[0][1])
    patches = [Patch(facecolor=color, edgecolor='#777777') for color in config.CLASS_COLORS[1:]]
    figure.legend(patches, config.CLASS_NAMES[1:], ncols=len(patches), **BELOW)
    count = countText(table['patient'].nunique())
    figure.suptitle(f'{count}, ranked by mean Dice of {", ".join(mainRegions())}', fontsize=10)
    return figure


def _rankCases(table):
    """Return a dict of each patient to draw, best first, to the text beside it."""
    requireColumns(table, ['patient', 'region', 'dice'])
    requireOneRule(table)
    dice = table.pivot(index='patient', columns='region', values='dice').reindex(columns=mainRegions()).dropna()
    if dice.empty:
        raise ValueError(f'No patient of the table has a Dice of each of {", ".join(mainRegions())}.')
    dice['mean'] = dice.mean(axis=1)
    dice = dice.sort_values('mean', ascending=False, kind='stable')
    names = {len(dice) // 2: 'median'} | {0: 'best', len(dice) - 1: 'worst' if len(dice) > 1 else 'the only patient'}
    rows = {dice.index[place]: (name, dice.iloc[place]) for place, name in sorted(names.items())}
    return {
        patient: '\n'.join(
            [f'{name}:', str(patient), '', 'Dice', *(f'{region}  {value:.3f}' for region, value in row.items())]
        )
        for patient, (name, row) in rows.items()
    }
