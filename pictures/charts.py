"""Draw charts of numbers: the cohort, the learning curves, and the volumes and confused classes of patients.

In the charts of patients a dot is a patient, and a hollow dot a patient with an empty mask.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, MaxNLocator

import config
from pictures.dots import BLUE, GREY, ORANGE, drawDots, makeDot, scaleAxis, spreadDots
from pictures.figure import BELOW, countText, newFigure, requireColumns, requireOneRule

GRADE_COLORS = {'HGG': BLUE, 'LGG': '#E69F00', 'unknown': '#BBBBBB'}


def plotCohort(table):
    """Draw a cohort: the number of patients of each edition and grade, and the volumes of each class.

    Args:
        table: DataFrame of `patients.describeCohort`, one row per patient: `edition`, `grade`, `subject` and the ml of
            each class.

    Returns:
        matplotlib Figure. Patients without a segmentation count in the bars and are absent from the volumes.

    Raises:
        ValueError: the table has no rows or lacks a column.
    """
    names = list(config.CLASS_NAMES[1:])
    requireColumns(table, ['edition', 'grade', 'subject', *names])
    volumes = table[names].dropna()  # ml
    figure = newFigure(6.5 + len(names), 3.9)
    bars, panel = figure.subplots(1, 2, width_ratios=(1, 1.25))
    _drawEditions(bars, pd.crosstab(table['edition'], table['grade']))
    scale = scaleAxis(panel.yaxis, volumes)
    for place, name in enumerate(names):
        own = volumes[name].to_numpy(float)
        if own.size:
            style = {'color': '#444444', 'linewidth': 1}
            style = {'showfliers': False, 'showcaps': False, 'whis': 0, 'medianprops': style, 'boxprops': style}
            panel.boxplot(own, positions=[place], widths=0.72, **style)
        drawDots(panel, place + spreadDots(scale(own)), own, config.CLASS_COLORS[place + 1], own == 0, edge='#555555')
    panel.set_xticks(range(len(names)), [f'{name}\n{(volumes[name] == 0).sum()} have none' for name in names])
    panel.set(xlim=(-0.6, len(names) - 0.4), ylabel='volume (ml)')
    panel.set_title(f'Volumes of {countText(len(volumes))} with a segmentation', fontsize=10)
    handles = [makeDot(GREY), makeDot(GREY, isHollow=True), Patch(facecolor='white', edgecolor='#444444')]
    texts = ['a patient', 'a patient with 0 ml', 'median and quartiles of the patients']
    figure.legend(handles, texts, ncols=3, **BELOW)
    title = f'{countText(len(table))} ({table["subject"].nunique()} subjects): {len(table) - len(volumes)} without a '
    enhancing = names[min(2, len(names) - 1)]
    title += f'segmentation, {(volumes[enhancing] == 0).sum()} of the others without {enhancing}'
    figure.suptitle(title, fontsize=11)
    return figure


def _drawEditions(panel, counts):
    """Draw a bar per edition (row), stacked by grade (column), with the counts in it and the total behind it."""
    start = np.zeros(len(counts))
    colors = GRADE_COLORS | {grade: GREY for grade in counts if grade not in GRADE_COLORS}
    for grade in [grade for grade in colors if grade in counts]:
        style = {'color': colors[grade], 'edgecolor': 'white', 'height': 0.6}
        drawn = panel.barh(range(len(counts)), counts[grade], left=start, label=f'grade {grade}', **style)
        room = 0.07 * counts.sum(axis=1).max()
        texts = [count if count > room else '' for count in counts[grade]]
        panel.bar_label(drawn, texts, label_type='center', color='black' if grade != 'HGG' else 'white', fontsize=8)
        start += counts[grade]
    for place, total in enumerate(start):
        panel.annotate(f'{total:.0f}', (total, place), (4, 0), textcoords='offset points', va='center', fontsize=9)
    panel.set_yticks(range(len(counts)), counts.index, fontsize=9)
    panel.set(xlim=(0, 1.12 * start.max()), ylim=(len(counts) - 0.4, -0.6), xlabel='patients')
    panel.set_title('Editions and grades', fontsize=10)
    panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    panel.spines[['top', 'right']].set_visible(False)
    panel.legend(frameon=False, fontsize=8, loc='upper center', bbox_to_anchor=(0.5, -0.16), ncols=3)


def plotCurves(history):
    """Draw the learning curves, with the epoch to predict with and the drops of a learning rate that falls in steps.

    The epoch to predict with is the last one, or that of the lowest validation loss, as `config.RESULT_CHECKPOINT`
    says.

    Args:
        history: DataFrame of `checkpoints.readHistory`, one row per epoch: `epoch` (from 1), `trainLoss`, `valLoss`
            (mean per patch) and, optionally, `learnRate` (after the epoch) and `diceWT`, `diceTC`, `diceET`.

    Returns:
        matplotlib Figure: the losses, on a logarithmic scale if they fall by more than a factor of 10; and the Dice of
        the regions, if they are there.

    Raises:
        ValueError: the history has no epoch or lacks a column.
    """
    requireColumns(history, ['epoch', 'trainLoss', 'valLoss'])
    regions = [region for region in config.MAIN_REGIONS if f'dice{region}' in history]
    figure = newFigure(10.5 if regions else 7, 4)
    panel, *others = figure.subplots(1, 2 if regions else 1, squeeze=False)[0]
    style = {'marker': '.' if len(history) < 40 else None}
    panel.plot(history['epoch'], history['trainLoss'], color=GREY, label='training', **style)
    panel.plot(history['epoch'], history['valLoss'], color=BLUE, label='validation', **style)
    losses = history[['trainLoss', 'valLoss']].to_numpy(float)
    losses = losses[np.isfinite(losses)]
    if losses.size and losses.min() > 0 and losses.max() > 10 * losses.min():
        panel.set_yscale('log')
    if history['valLoss'].notna().any():
        isBest = config.RESULT_CHECKPOINT == config.BEST_CHECKPOINT
        row = history.iloc[np.nanargmin(history['valLoss'].to_numpy(float)) if isBest else -1]
        text = f'{"best" if isBest else "end"}: {row["valLoss"]:.4g} in epoch {row["epoch"]:.0f}'
        panel.plot(row['epoch'], row['valLoss'], 'o', color=ORANGE, markersize=8, label=text)
    if 'learnRate' in history:
        _markDrops(panel, history['epoch'].to_numpy(), history['learnRate'].to_numpy(float))
    panel.set(ylabel='loss, mean per patch', title='Learning curves')
    for dice in others:
        for region, line in zip(regions, ('-', '--', ':'), strict=False):
            dice.plot(history['epoch'], history[f'dice{region}'], line, color=BLUE, label=region, **style)
        dice.set(ylabel='Dice (0 to 1; 1 is best)', ylim=(0, 1.02), title='Validation, mean over patients')
    for axes in (panel, *others):
        axes.set(xlabel='epoch', xlim=(history['epoch'].min() - 0.5, history['epoch'].max() + 0.5))  # no epoch 0
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.spines[['top', 'right']].set_visible(False)
        axes.legend(frameon=False)
    return figure


def _markDrops(panel, epochs, rates):
    """Draw a line at each epoch after which the learning rate fell, with the new rate.

    No line is drawn for a decay, a rate that falls after more than half of the epochs.
    """
    if (np.diff(rates) < 0).sum() > len(rates) / 2:
        return
    style = {'rotation': 90, 'fontsize': 8, 'color': '#777777', 'ha': 'right', 'va': 'top'}
    for epoch, before, rate in zip(epochs[1:], rates, rates[1:], strict=False):
        if rate < before:
            panel.axvline(epoch, color='#AAAAAA', linestyle=':', linewidth=1, zorder=0)
            panel.text(epoch, 0.98, f'rate {rate:.2g}', transform=panel.get_xaxis_transform(), **style)


def plotVolumes(table):
    """Draw the predicted against the true volume, one panel per region.

    Args:
        table: DataFrame of `metrics.scoreTable` with the columns `volumeTruth` and `volumePredicted` (ml).

    Returns:
        matplotlib Figure. All panels have the same scale. It is logarithmic, and linear near 0, if the volumes span
        more than a factor of 30 or one of them is 0. The dashed lines are the limits of agreement: the mean difference,
        predicted minus true, +- 1.96 standard deviations. With fewer than ten patients the title says that they say
        little.

    Raises:
        ValueError: the table has no rows or lacks a column.

    Reference:
        Bland and Altman, Lancet 327 (1986), 307 to 310.
    """
    requireColumns(table, ['patient', 'region', 'volumeTruth', 'volumePredicted'])
    requireOneRule(table)
    regions = [region for region in config.REGIONS if region in set(table['region'])]
    volumes = table[['volumeTruth', 'volumePredicted']].to_numpy(float)
    numColumns = min(3, len(regions) + 1)
    numRows = len(regions) // numColumns + 1  # the last panel holds the legend
    figure = newFigure(8.6 * numColumns / 3, 3 * numRows + 0.4)
    figure.get_layout_engine().set(h_pad=0.1)
    panels = figure.subplots(numRows, numColumns, squeeze=False).ravel()
    for panel, region in zip(panels, regions, strict=False):
        pairs = volumes[(table['region'] == region).to_numpy()]
        for axis in (panel.xaxis, panel.yaxis):
            scaleAxis(axis, volumes)
        text = _drawAgreement(panel, pairs, np.nanmax(volumes))
        drawDots(panel, *pairs.T, BLUE if region in config.MAIN_REGIONS else GREY, (pairs == 0).any(1))
        panel.set(xlabel='true volume (ml)', ylabel='predicted volume (ml)', box_aspect=1)
        panel.set_title(f'{region}: {text}', fontsize=8)
    for panel in panels[len(regions) :]:
        panel.axis('off')
    handles = [makeDot(BLUE), makeDot(BLUE, isHollow=True), Line2D([], [], color='black', linewidth=1)]
    handles.append(Line2D([], [], color=ORANGE, linewidth=1, linestyle='--'))
    texts = ['a patient', '0 ml in truth or prediction', 'prediction equals truth']
    texts.append('limits of agreement:\nmean difference (predicted\nminus true) ± 1.96 SD')
    panels[-1].legend(handles, texts, frameon=False, fontsize=9, loc='center')
    figure.suptitle(f'Volumes of {countText(table["patient"].nunique(), "the limits say little")}', fontsize=11)
    return figure


def _drawAgreement(panel, pairs, top):
    """Draw the identity and the limits of agreement of pairs (n, 2) of true and predicted ml; return them in words."""
    line = np.concatenate([[0], np.geomspace(1e-4, 2, 200)]) * max(top, 1e-3)
    panel.plot(line, line, color='black', linewidth=1, label='identity')
    differences = pairs[:, 1] - pairs[:, 0]
    bias = differences.mean()
    if len(pairs) < 2 or np.isnan(bias):
        return f'difference {bias:+.3g} ml'
    reach = 1.96 * differences.std(ddof=1)
    for end in (bias - reach, bias + reach):
        style = {'color': ORANGE, 'linewidth': 1, 'linestyle': '--', 'label': 'limit'}
        panel.plot(line + max(-end, 0), line + max(end, 0), **style)  # from the point where one of the volumes is 0
    return f'mean difference {bias:+.3g} ml,\nlimits {bias - reach:+.3g} to {bias + reach:+.3g} ml'


def plotConfusion(matrix):
    """Draw the confusion matrix of the classes, with each row as fractions of its class in truth.

    Fractions per row show the tumor, which counts of voxels would hide behind the background.

    Args:
        matrix: voxels (4, 4) of `metrics.confusionMatrix`, rows truth, columns prediction; or a stack or list of such
            matrices, (patients, 4, 4), which are summed.

    Returns:
        matplotlib Figure.

    Raises:
        ValueError: the shape is another one, a count is negative, or all are 0.
    """
    stack = np.asarray(matrix)
    matrix = stack.sum(0) if stack.ndim == 3 else stack
    if matrix.shape != (config.NO_CLASSES,) * 2 or (matrix < 0).any() or not matrix.any():
        raise ValueError(
            f'The counts have the shape {stack.shape}, the minimum {stack.min(initial=0)} and the sum {stack.sum()}; '
            f'counts {(config.NO_CLASSES,) * 2} of 0 or more with a sum above 0 were expected.'
        )
    totals = matrix.sum(1, keepdims=True)
    fractions = np.divide(matrix, totals, out=np.full(matrix.shape, np.nan), where=totals > 0)
    figure = newFigure(6, 4.9)
    panel = figure.subplots()
    cmap = plt.get_cmap('Blues').with_extremes(bad='#DDDDDD')
    image = panel.imshow(fractions, cmap=cmap, vmin=0, vmax=1)
    for (row, column), fraction in np.ndenumerate(fractions):
        text = 'none' if np.isnan(fraction) else f'{fraction:.2%}\n{_shortText(matrix[row, column])}'
        color = 'white' if fraction > 0.55 else 'black'
        panel.text(column, row, text, ha='center', va='center', color=color, fontsize=9)
    names = [name.replace(' ', '\n') for name in config.CLASS_NAMES]
    panel.set_xticks(range(len(names)), names)
    rows = [f'{name}\n({_shortText(total)})' for name, total in zip(names, totals[:, 0], strict=True)]
    panel.set_yticks(range(len(names)), rows)
    panel.set(xlabel='class in prediction', ylabel='class in truth (voxels)')
    panel.tick_params(length=0)
    bar = figure.colorbar(image, shrink=0.8, label='fraction of the voxels of the class in truth')
    bar.ax.yaxis.set_major_formatter('{x:.0%}')
    of = f' of {countText(len(stack))}' if stack.ndim == 3 else ''
    panel.set_title(f'Confusion of the classes, {_shortText(matrix.sum())} voxels{of}', fontsize=11)
    return figure


def _shortText(count):
    """Return a count in three digits with a prefix of SI, such as 34.5 k."""
    return EngFormatter()(float(f'{count:.3g}'))
