"""Draw patients as dots that lie side by side, on an axis that is linear or logarithmic."""

import numpy as np
from matplotlib.lines import Line2D

BLUE, ORANGE, GREY = '#0072B2', '#D55E00', '#8C8C8C'  # of Okabe and Ito: distinct for color-blind readers


def spreadDots(heights, bins=40, reach=0.3):
    """Return horizontal offsets (n,) of dots, so that dots of about the same height (0 to 1) lie side by side."""
    offsets = np.zeros(len(heights))
    rows = np.round(np.nan_to_num(heights) * bins)
    for row in np.unique(rows):
        members = np.flatnonzero(rows == row)
        step = min(0.07, 2 * reach / len(members))
        offsets[members] = (np.arange(len(members)) - (len(members) - 1) / 2) * step
    return offsets


def makeDot(color, isHollow=False, edge=None):
    """Return one dot, a line without points or a line between them."""
    style = {'marker': 'o', 'markersize': 4.5, 'linestyle': 'none', 'markeredgecolor': edge or color}
    style |= {'markerfacecolor': 'white' if isHollow else color, 'markeredgewidth': 1 if isHollow else 0.5}
    return Line2D([], [], **style)


def drawDots(panel, x, y, color, isHollow=None, edge=None):
    """Draw a dot for each pair of x and y (n,), labelled `full` or, where `isHollow` (n,) is True, `hollow`."""
    isHollow = np.zeros(len(x), bool) if isHollow is None else isHollow
    for label, mask in (('full', ~isHollow), ('hollow', isHollow)):
        dots = makeDot(color, label == 'hollow', edge)
        dots.set(xdata=np.asarray(x)[mask], ydata=np.asarray(y)[mask], label=label, clip_on=False, zorder=2.5)
        dots.set_in_layout(False)  # the layout takes a line without points to lie in the figure's corner
        dots.set_alpha(0.75 if label == 'full' else 1)
        panel.add_line(dots)


def scaleAxis(axis, values, threshold=None):
    """Scale an axis from 0 to the largest value, linear or symlog: logarithmic, and linear below a threshold.

    It is symlog if the values span more than a factor of 30 or one of them is 0.

    Args:
        axis: xaxis or yaxis of a panel.
        values: 0 or more; NaN is ignored.
        threshold: by default the decade of the smallest value, at most three decades below that of the largest. If it
            is given, the axis is always symlog.

    Returns:
        function that maps an array of values to their heights on the axis, 0 to 1.
    """
    values = np.asarray(values, dtype=float)
    positive = values[values > 0]
    low, top = (positive.min(), positive.max()) if positive.size else (1.0, 1.0)
    isWide = threshold is not None or top > 30 * low or (values == 0).any()
    limits = getattr(axis.axes, f'set_{axis.axis_name}lim')
    axis.axes.spines[['top', 'right']].set_visible(False)
    if not isWide:
        limits(-0.02 * top, 1.1 * top)
        return lambda array: array / top
    threshold = threshold or 10.0 ** max(np.floor(np.log10(low)), np.floor(np.log10(top)) - 3)
    top = max(top, threshold)
    decades = threshold * 10.0 ** np.arange(np.floor(np.log10(1.5 * top / threshold) + 1e-9) + 1)
    getattr(axis.axes, f'set_{axis.axis_name}scale')('symlog', linthresh=threshold, linscale=0.6)
    axis.set_ticks([0, *decades], labels=['0', *(f'{tick:g}' for tick in decades)])
    axis.set_ticks([], minor=True)
    limits(-0.25 * threshold, 1.5 * top)
    return lambda array: np.arcsinh(array / threshold) / np.arcsinh(top / threshold)
