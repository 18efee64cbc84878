"""Count and draw what the network confuses, and how far its probabilities are to be believed."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patheffects import withStroke

import config
from counts import asArray, asClasses
from pictures import newFigure

CERTAIN = 0.999  # a background probability above it is left out of the reliability: nearly every voxel of a head


def plotConfusion(joint):
    """Gives a figure of which class the voxels of each class were given.

    Args:
        joint: counts of voxels (4, 4), rows truth, columns prediction, as `counts.countJoint` gives them; or a stack or
            list of such, (patients, 4, 4), which are summed.

    Returns:
        matplotlib Figure: each row in shares, so that the background, nearly all voxels, does not drown the tumor.

    Raises:
        ValueError: another shape, a negative count, or none above 0.
    """
    stack = np.asarray(joint)
    joint = stack.sum(0) if stack.ndim == 3 else stack
    if joint.shape != (config.NO_CLASSES,) * 2 or (joint < 0).any() or not joint.any():
        raise ValueError(f'The counts have the shape {stack.shape} and the sum {stack.sum()}; voxels (4, 4) expected.')
    totals = joint.sum(1, keepdims=True)
    shares = np.divide(joint, totals, out=np.full(joint.shape, np.nan), where=totals > 0)
    figure = newFigure(6, 4.9)
    panel = figure.subplots()
    cmap = plt.get_cmap('Blues').with_extremes(bad='#DDDDDD')
    image = panel.imshow(shares, cmap=cmap, vmin=0, vmax=1)
    for (row, column), share in np.ndenumerate(shares):
        text = 'none' if np.isnan(share) else f'{percentText(share)}\n{shortText(joint[row, column])}'
        panel.text(column, row, text, ha='center', va='center', color='white' if share > 0.55 else 'black', fontsize=9)
    names = [name.replace(' ', '\n') for name in config.CLASS_NAMES]
    panel.set_xticks(range(len(names)), names)
    rows = [f'{name}\n({shortText(total)})' for name, total in zip(names, totals[:, 0], strict=True)]
    panel.set_yticks(range(len(names)), rows)
    panel.set(xlabel='class in prediction', ylabel='class in truth (voxels)')
    panel.tick_params(length=0)
    bar = figure.colorbar(image, shrink=0.8, label='share of the voxels that have the class in truth')
    bar.ax.yaxis.set_major_formatter('{x:.0%}')
    of = f' of {countText(len(stack))}' if stack.ndim == 3 else ''
    panel.set_title(f'Confusion of the classes, {shortText(joint.sum())} voxels{of}', fontsize=11)
    return figure


def countReliability(probability, y, bins=10):
    """Gives what `plotReliability` needs to know of one patient; add it up over patients.

    Args:
        probability: float (D, 4, W, H), 0 to 1 and 1 in sum over the classes, as `engine.predict(..., probabilities =
            True)` gives it.
        y: truth, integer (D, W, H), classes 0 to 3.
        bins: of equal width; the k-th holds k / bins <= probability < (k + 1) / bins, the last one 1 too.

    Returns:
        float64 (3, 3 tumor classes, bins + 1): number of voxels, sum of their probabilities, how many of them have the
        class in truth. The last column holds the voxels whose background is certain (above `CERTAIN`), whatever their
        truth, the others hold all the rest.

    Raises:
        ValueError: other shapes or classes, or values that are not probabilities.
    """
    probability, y = asArray(probability), asClasses(y, 'y')
    if y.ndim != 3 or probability.shape != (len(y), config.NO_CLASSES, *y.shape[1:]):
        raise ValueError(f'probability is {probability.shape}, y {y.shape}; (D, 4, W, H), (D, W, H) were expected.')
    counts = np.zeros((3, config.NO_CLASSES - 1, bins + 1))
    for image, classes in zip(probability, y, strict=True):  # a slice at a time: the memory stays small
        if not (image.min() >= 0 and np.abs(image.sum(0, dtype=np.float32) - 1).max() < 0.01):
            raise ValueError('The values of a voxel are not probabilities: 0 or more, 1 in sum over the classes.')
        isCertain = image[0] > CERTAIN
        for number, (values, own) in enumerate(zip(image[1:], counts.transpose(1, 0, 2), strict=True), 1):
            places = np.minimum((values.astype(float) * bins).astype(int), bins - 1)
            places[isCertain] = bins
            own[0] += np.bincount(places.ravel(), minlength=bins + 1)
            own[1] += np.bincount(places.ravel(), values.ravel(), minlength=bins + 1)
            own[2] += np.bincount(places[classes == number], minlength=bins + 1)
    return counts


def plotReliability(counts):
    """Gives a figure of how often a class is there where the network gives it some probability.

    Voxels whose background is certain (above `CERTAIN`) are left out: they are nearly all, and would make any network
    look calibrated. The figure says how many of the tumor's voxels are among them, missed for certain.

    Args:
        counts: sum of `countReliability` over patients; or a list of its results, which are summed.

    Returns:
        matplotlib Figure; the expected calibration error (ECE) is the mean over voxels of the distance between their
        bin's dot and the diagonal.

    Raises:
        ValueError: another shape, or no voxel that is not certain.

    Reference:
        Guo et al., On calibration of modern neural networks (arXiv:1706.04599), section 2.
    """
    stack = np.asarray(counts, dtype=float)
    counts = stack.sum(0) if stack.ndim == 4 else stack
    if counts.ndim != 3 or counts.shape[:2] != (3, config.NO_CLASSES - 1) or not counts[0, :, :-1].any():
        raise ValueError(f'Counts {stack.shape}; (3, 3, bins + 1) with voxels that are not certain were expected.')
    figure = newFigure(5.6, 6)
    panel, below = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    bins = counts.shape[2] - 1
    _drawReliability(panel, below, counts[..., :-1])
    panel.legend(frameon=False, fontsize=8, loc='upper left')
    panel.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), ylabel='share of the voxels that have the class in truth')
    below.set(yscale='log', ylabel='voxels', xticks=np.linspace(0, 1, 6))
    below.set_ylim(bottom=0.5)  # half a voxel: a bin with one is seen
    below.set_xlabel(
        f'predicted probability of the class (a dot: mean of 1 of {bins} bins)\n{_describeCertain(counts)}'
    )
    for axes in (panel, below):
        axes.spines[['top', 'right']].set_visible(False)
    of = f' of {countText(len(stack))}' if stack.ndim == 4 else ''
    panel.set_title(f'Reliability of the probabilities{of}', fontsize=11)
    return figure


def _drawReliability(panel, below, counts):
    """Draws dots and bars of counts (3, 3 classes, bins), and the diagonal; a bin without voxels has no dot."""
    panel.plot([0, 1], [0, 1], color='black', linewidth=1, linestyle='--', label='calibrated: share = probability')
    voxels, sums, hits = counts
    bins = voxels.shape[1]
    for number, (color, marker) in enumerate(zip(config.CLASS_COLORS[1:], 'os^', strict=True)):
        isIn = voxels[number] > 0
        predicted, observed = (values[number, isIn] / voxels[number, isIn] for values in (sums, hits))
        error = (voxels[number, isIn] * np.abs(observed - predicted)).sum() / voxels[number].sum()
        style = {'color': color, 'marker': marker, 'markeredgecolor': '#555555', 'markersize': 6, 'linewidth': 1.6}
        style['path_effects'] = [withStroke(linewidth=2.6, foreground='#555555')]  # yellow on white is not seen
        panel.plot(predicted, observed, label=f'{config.CLASS_NAMES[number + 1]}, ECE {error:.3f}', **style)
        places = (np.arange(bins) + 0.5 + 0.27 * (number - 1)) / bins
        below.bar(places, voxels[number], 0.25 / bins, color=color, edgecolor='#555555', linewidth=0.5)


def _describeCertain(counts):
    """Says how many voxels, and how many of the tumor, were left out for a background that is certain."""
    voxels, tumor = counts[0, 0], counts[2].sum(0)
    missed = percentText(tumor[-1] / tumor.sum()) if tumor.any() else 'none'
    text = f'left out: background above {CERTAIN}, {percentText(voxels[-1] / voxels.sum())} of all voxels'
    return f'{text}\n(they hold {missed} of the true tumor)'


def countText(number):
    """Gives a number of patients in words."""
    return f'{number} patient' if number == 1 else f'{number} patients'


def shortText(count):
    """Gives a count in three digits: 512, 34.5 k, 1.20 M."""
    for unit, size in (('G', 1e9), ('M', 1e6), ('k', 1e3)):
        if count >= 0.9995 * size:
            return f'{count / size:#.3g}'.rstrip('.') + f' {unit}'
    return f'{count:.0f}'


def percentText(share):
    """Gives a share in percent; what is not all or nothing never reads 100 or 0."""
    if 0.9995 <= share < 1:
        return '>99.9 %'
    return '<0.1 %' if 0 < share < 0.0005 else f'{100 * share:.1f} %'
