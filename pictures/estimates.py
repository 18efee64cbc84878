"""Draw the Dice that is estimated without truth against the true one."""

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

import config
from pictures.dots import BLUE, GREY, ORANGE, drawDots, makeDot
from pictures.figure import BELOW, cautionText, countText, newFigure, requireColumns
from quality import summarizeQuality


def plotQuality(crossed):
    """Draw each patient's true Dice against the one that was estimated without it, one panel per region.

    Args:
        crossed: DataFrame of `quality.crossFit`: every estimate is by a fit that did not use the patient.

    Returns:
        matplotlib Figure. A vertical line is the interval of an estimate, orange if the true Dice lies outside. In the
        grey areas are the patients with a true Dice below `config.QUALITY_LIMIT`: on the left they are flagged, on the
        right they are missed. The titles have the rank correlation and how many of the intervals hold the true Dice.
        With fewer than ten patients the title says that the figure says little.

    Raises:
        ValueError: the table has no rows or lacks a column.
    """
    requireColumns(crossed, ['patient', 'region', 'dice', 'predictedDice', 'low', 'high'])
    summary = summarizeQuality(crossed)
    figure = newFigure(3.1 * len(summary) + 0.4, 4.1)
    for panel, (region, row) in zip(
        figure.subplots(1, len(summary), squeeze=False)[0], summary.iterrows(), strict=True
    ):
        part = crossed[(crossed['region'] == region) & crossed['predictedDice'].notna()]
        _drawEstimates(panel, *part[['predictedDice', 'dice', 'low', 'high']].to_numpy(float).T)
        text = f'rank correlation {row["spearman"]:.2f}\n{row["coverage"]:.0%} of {row["patients"]:.0f} intervals hold'
        panel.set_title(f'{region}: {text}', fontsize=8)
    figure.axes[0].set_ylabel('true Dice')
    handles = [makeDot(BLUE), makeDot(ORANGE), Line2D([], [], color='black', linewidth=1)]
    handles.append(Patch(facecolor='#EEEEEE'))
    texts = ['a patient, with its interval', 'true Dice outside of it', 'estimate equals truth']
    texts.append(f'true Dice below {config.QUALITY_LIMIT}')
    figure.legend(handles, texts, ncols=4 if len(summary) > 2 else 2, **BELOW)
    number = crossed['patient'].nunique()
    caution = cautionText(number, 'the figure says little')
    figure.suptitle(f'Estimated quality of {countText(number)} that were not used to fit{caution}', fontsize=11)
    return figure


def _drawEstimates(panel, estimates, dice, low, high):
    """Draw the limit, the diagonal, and estimates (n,) with their intervals, turned around the true Dice."""
    limit = config.QUALITY_LIMIT
    panel.axhspan(-0.03, limit, color='#EEEEEE', zorder=0)
    panel.axvline(limit, color=GREY, linewidth=1, linestyle=':', label='limit')
    panel.plot([0, 1], [0, 1], color='black', linewidth=1, label='identity')
    isHeld = (low <= dice) & (dice <= high)
    for color, isShown in ((BLUE, isHeld), (ORANGE, ~isHeld)):
        panel.vlines(estimates[isShown], low[isShown], high[isShown], color=color, linewidth=1, alpha=0.4)
        drawDots(panel, estimates[isShown], dice[isShown], np.zeros(isShown.sum(), bool), color)
    panel.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel='estimated Dice', box_aspect=1)
    panel.spines[['top', 'right']].set_visible(False)
