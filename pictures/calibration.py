"""Compare the predicted probabilities of the classes with how often the classes are there."""

import numpy as np
from matplotlib.patheffects import withStroke

import config
from metrics.counts import asArray, asClasses
from pictures.figure import countText, newFigure


def countCalibration(probability, y, bins=10):
    """Return the calibration counts of one patient; sum them over patients.

    Args:
        probability: float (D, 4, W, H), 0 to 1, sums to 1 over the classes; `engine.predict(..., probabilities=True)`
            returns it.
        y: truth, integer (D, W, H), classes 0 to 3.
        bins: number of bins of equal width. Bin k holds k / bins <= probability < (k + 1) / bins; the last one holds 1
            too.

    Returns:
        float64 (3, 3 tumor classes, bins + 1): the number of voxels, the sum of their probabilities, and how many of
        them have the class in truth. The last column holds the voxels of the first bin that do not have the class in
        truth: they are most of the volume, and left out of the calibration. All others are in the column of their bin.

    Raises:
        ValueError: the shapes or classes are not as above, or the values are not probabilities.
    """
    probability, y = asArray(probability), asClasses(y, 'y')
    if y.ndim != 3 or probability.shape != (len(y), config.NO_CLASSES, *y.shape[1:]):
        raise ValueError(f'probability is {probability.shape}, y {y.shape}; (D, 4, W, H), (D, W, H) were expected.')
    counts = np.zeros((3, config.NO_CLASSES - 1, bins + 1))
    for image, classes in zip(probability, y, strict=True):  # slice by slice, to save memory
        if not (image.min() >= 0 and np.abs(image.sum(0, dtype=np.float32) - 1).max() < 0.01):
            raise ValueError(
                'The values are not probabilities: 0 or more, with a sum of 1 over the classes of a voxel.'
            )
        for number, (values, own) in enumerate(zip(image[1:], counts.transpose(1, 0, 2), strict=True), 1):
            places = np.minimum((values.astype(float) * bins).astype(int), bins - 1)
            places[(places == 0) & (classes != number)] = bins
            own[0] += np.bincount(places.ravel(), minlength=bins + 1)
            own[1] += np.bincount(places.ravel(), values.ravel(), minlength=bins + 1)
            own[2] += np.bincount(places[classes == number], minlength=bins + 1)
    return counts


def plotCalibration(counts):
    """Draw the calibration curves: how often a class is there against the probability that the model predicts.

    The last column of `countCalibration` is left out: these voxels would make any model look calibrated. A line below
    the figure says how many they are.

    Args:
        counts: sum of `countCalibration` over patients, or a list of its results, which are summed.

    Returns:
        matplotlib Figure. The legend holds the expected calibration error (ECE) of each class: the mean over voxels of
        the distance between the dot of their bin and the diagonal.

    Raises:
        ValueError: the shape is another one, or all voxels are left out.

    Reference:
        Guo et al., On calibration of modern neural networks (arXiv:1706.04599), section 2.
    """
    stack = np.asarray(counts, dtype=float)
    counts = stack.sum(0) if stack.ndim == 4 else stack
    if counts.ndim != 3 or counts.shape[:2] != (3, config.NO_CLASSES - 1) or not counts[0, :, :-1].any():
        raise ValueError(
            f'The counts have the shape {stack.shape}; (3, 3, bins + 1) were expected, with a voxel of a '
            'class in truth or prediction.'
        )
    figure = newFigure(5.6, 6)
    panel, below = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    bins = counts.shape[2] - 1
    _drawCalibration(panel, below, counts[..., :-1])
    panel.legend(frameon=False, fontsize=8, loc='upper left')
    panel.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), ylabel='fraction of voxels that have the class in truth')
    below.set(yscale='log', ylabel='voxels', xticks=np.linspace(0, 1, 6))
    below.set_ylim(bottom=0.5)  # half a voxel, so that a bin with one voxel has a visible bar
    below.set_xlabel(
        f'predicted probability of the class (a dot is the mean of one of {bins} bins)\n{_describeLeftOut(counts)}'
    )
    for axes in (panel, below):
        axes.spines[['top', 'right']].set_visible(False)
    of = f' of {countText(len(stack))}' if stack.ndim == 4 else ''
    panel.set_title(f'Calibration of the probabilities{of}', fontsize=11)
    return figure


def _drawCalibration(panel, below, counts):
    """Draw the diagonal, and the dots and bars of counts (3, 3 classes, bins); a bin without voxels has no dot."""
    panel.plot([0, 1], [0, 1], color='black', linewidth=1, linestyle='--', label='perfectly calibrated')
    voxels, sums, hits = counts
    bins = voxels.shape[1]
    for number, (color, marker) in enumerate(zip(config.CLASS_COLORS[1:], 'os^Dv', strict=False)):
        isFilled = voxels[number] > 0
        predicted, observed = (values[number, isFilled] / voxels[number, isFilled] for values in (sums, hits))
        error = (voxels[number, isFilled] * np.abs(observed - predicted)).sum() / max(voxels[number].sum(), 1)
        text = f'ECE {error:.3f}' if isFilled.any() else 'no voxels'
        style = {'color': color, 'marker': marker, 'markeredgecolor': '#555555', 'markersize': 6, 'linewidth': 1.6}
        style['path_effects'] = [withStroke(linewidth=2.6, foreground='#555555')]  # yellow on white needs an outline
        panel.plot(predicted, observed, label=f'{config.CLASS_NAMES[number + 1]}, {text}', **style)
        places = (np.arange(bins) + 0.5 + 0.27 * (number - 1)) / bins
        below.bar(places, voxels[number], 0.25 / bins, color=color, edgecolor='#555555', linewidth=0.5)


def _describeLeftOut(counts):
    """Return in words which voxels are left out, and how many."""
    voxels = counts[0]  # (classes, bins + 1)
    fraction = (voxels[:, -1] / voxels.sum(1)).min()
    kept = f'the class in truth, or its probability at least {1 / (voxels.shape[1] - 1):.2g}'
    return f'counted: {kept}\n(the others, at least {fraction:.2%} of all voxels, are left out)'
