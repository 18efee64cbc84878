"""Draw the scores of patients, how those of models and recipes differ, and estimates of them. A dot is a patient."""

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

import config
from metrics import compare, compareRecipes, pairScores, summarize
from metrics.comparison import subtract
from metrics.rules import RULES
from metrics.scores import bootstrapMean
from pictures.dots import BLUE, GREY, ORANGE, drawDots, makeDot, scaleAxis, spreadDots
from pictures.figure import BELOW, countText, newFigure, requireColumns
from postprocess.quality import summarizeQuality

_WORDS = {'dice': 'Dice', 'hd95': 'HD95'}


def plotScores(table):
    """Draw each patient's Dice and HD95 by region, with the median, the mean and the interval of the mean.

    Args:
        table: DataFrame of `metrics.scoreTable`, made from tables of `scorePatient` or of `scoreLesions`, or of
            `postprocess.scoreFolder`. With a column `rule` each rule has a row of panels, and one more for its
            lesion-wise scores if the table has them.

    Returns:
        matplotlib Figure. Mean and interval are those of `metrics.summarize`. They include the HD95 that stands for an
        empty mask, which a line marks; an infinite one is drawn on that line. Patients without a score by the rule are
        counted below the region. With fewer than ten patients the title says that the interval says little.

    Raises:
        ValueError: the table has no rows or lacks a column.
    """
    requireColumns(table, ['patient', 'region', 'dice', 'hd95'])
    parts = _splitByRule(table)
    numRegions = max(part['region'].nunique() for _, _, part in parts)
    figure = newFigure(1.9 * max(numRegions, 3) + 1, 0.6 + 4 * len(parts))
    for row, (title, rule, part) in zip(figure.subplots(len(parts), 2, squeeze=False), parts, strict=True):
        _drawScores(dict(zip(('dice', 'hd95'), row, strict=True)), part, rule)
        if title:
            row[0].set_title(title, fontsize=9, loc='left')
    handles = [makeDot(BLUE), makeDot(BLUE, isHollow=True), Line2D([], [], color='black', linewidth=2)]
    handles.append(Line2D([], [], color=ORANGE, marker='D', markersize=5))
    texts = ['a patient', 'a patient without the region in truth', 'median']
    texts.append(f'mean and its {_level()} interval (bootstrap over patients)')
    figure.legend(handles, texts, ncols=4 if numRegions > 4 else 2, **BELOW)
    figure.suptitle(f'Scores of {countText(table["patient"].nunique(), "the interval says little")}', fontsize=11)
    return figure


def _level():
    """Return the level of the intervals in words, such as '98.33%'."""
    return f'{100 * config.CONFIDENCE:.4g}%'


def _splitByRule(table):
    """Return (title, rule, table) of each row of panels; without a column `rule` one, ('', None, table)."""
    if 'rule' not in table:
        return [('', None, table)]
    parts = []
    for rule, part in table.groupby('rule'):
        part = part.drop(columns='rule')
        parts.append((f'{rule}, whole volume', rule, part))
        if {'lesionDice', 'lesionHd95'} <= set(part) and part['lesionDice'].notna().any():
            lesions = part.drop(columns=['dice', 'hd95']).rename(columns={'lesionDice': 'dice', 'lesionHd95': 'hd95'})
            parts.append((f'{rule}, lesion by lesion', rule, lesions))
    return parts


def _drawScores(panels, table, rule):
    """Draw the Dice and the HD95 of one rule into two panels, a dict of score to panel."""
    shown = ('patient', 'region', 'dice', 'hd95', 'volumeTruth', 'volumePredicted')
    table = table[[name for name in shown if name in table]]
    regions, isUnscored = table['region'].unique(), table['dice'].isna()
    if rule not in RULES or RULES[rule].isEmptyScored:
        isUnscored[:] = False  # a score is missing that the rule has: no mean is drawn
    numUnscored, table = isUnscored.groupby(table['region']).sum(), table[~isUnscored]
    summary = summarize(table) if len(table) else None
    highest = RULES[rule].penalty if rule in RULES else max(each.penalty for each in RULES.values())
    panels['dice'].set(ylim=(-0.03, 1.03), ylabel='Dice (0 to 1; 1 is best)')
    distances = table['hd95'].replace(np.inf, highest)
    scales = {'dice': np.asarray, 'hd95': scaleAxis(panels['hd95'].yaxis, distances, threshold=1)}
    panels['hd95'].set_ylabel('HD95 (mm; 0 is best)')
    for score, panel in panels.items():
        labels = []
        for place, region in enumerate(regions):
            part = table[table['region'] == region]
            values = part[score].to_numpy(float)
            heights = np.where(np.isinf(values), highest, values)
            isEmpty = part['volumeTruth'].to_numpy() == 0 if 'volumeTruth' in part else np.zeros(len(part), bool)
            color = BLUE if region in config.MAIN_REGIONS else GREY
            drawDots(panel, place + spreadDots(scales[score](heights)), heights, color, isEmpty)
            text = _drawSummary(panel, place, summary.loc[(region, score)]) if len(part) else 'nobody has a score'
            text += f'\n{numUnscored[region]} without a score' if numUnscored[region] else ''
            labels.append(f'{region}\n{text}')
            if score == 'hd95':
                _markEmptyMasks(panel, place, values, heights, isEmpty if 'volumeTruth' in part else None)
        _finishPanel(panel, labels)


def _finishPanel(panel, labels):
    """Write the labels below the places 0, 1, ... of a panel, and draw its grid."""
    panel.set_xticks(range(len(labels)), labels, fontsize=8)
    panel.set_xlim(-0.5, len(labels) - 0.3)
    panel.grid(axis='y', color='#E5E5E5', linewidth=0.7)
    panel.set_axisbelow(True)
    panel.spines[['top', 'right']].set_visible(False)


def _drawSummary(panel, place, row):
    """Draw the median, mean and interval of one region; return the mean and the interval in words."""
    if np.isfinite(row['median']):
        panel.plot(
            [place - 0.3, place + 0.3], [row['median']] * 2, color='black', linewidth=2, label='median', zorder=2
        )
    if not np.isfinite(row['mean']):
        return 'no mean: a\nscore is missing' if np.isnan(row['mean']) else 'the mean is\ninfinite'
    reach = [[row['mean'] - row['low']], [row['high'] - row['mean']]]
    style = {'fmt': 'D', 'color': ORANGE, 'markersize': 5, 'capsize': 3, 'label': 'mean', 'zorder': 4}
    panel.errorbar(place + 0.42, row['mean'], reach, **style)
    digits = 2 if row.name[1] == 'dice' else 1
    return f'mean {row["mean"]:.{digits}f}\n({row["low"]:.{digits}f} to {row["high"]:.{digits}f})'


def _markEmptyMasks(panel, place, values, heights, isEmpty):
    """Mark the distances that stand for an empty mask, or are infinite, and write their number, if there are any.

    Args:
        values: (n,), mm.
        heights: (n,), mm, where they are drawn.
        isEmpty: bool (n,), True where the truth is empty; None if the table does not say.
    """
    isMark = np.isinf(values) | np.isclose(values[:, None], [rule.penalty for rule in RULES.values()]).any(1)
    if not isMark.any():
        return
    mark = heights[isMark][0]
    if not panel.texts:
        panel.axhline(mark, color='#444444', linestyle=':', linewidth=1, label='empty')
        panel.set_ylim(top=2.6 * mark)
    infinite = 'infinite, drawn at ' if np.isinf(values).any() or panel.get_title().startswith('infinite') else ''
    meaning = 'no lesion was matched' if infinite else 'empty, or nothing was matched'
    panel.set_title(f'{infinite}{mark:.0f} mm: {meaning}', fontsize=8, color='#444444')
    text = countText(isMark.sum())
    if isEmpty is not None:
        counts = {'false negative': (isMark & ~isEmpty).sum(), 'false positive': (isMark & isEmpty).sum()}
        text = '\n'.join(f'{count} {kind}' for kind, count in counts.items() if count)
    panel.annotate(text, (place, mark), (0, 5), textcoords='offset points', ha='center', va='bottom', fontsize=7)


def plotComparison(tableA, tableB, names=('A', 'B')):
    """Draw by how much the Dice and HD95 of each patient differ between two models; up is always better for B.

    Args:
        tableA, tableB: as in `metrics.compare`. With a column `rule` each rule has rows of panels as in `plotScores`.
        names: of the models, for title and axes.

    Returns:
        matplotlib Figure. A dot is a patient, blue where B is better, orange where it is worse, grey where both are
        equal. The mean, its interval, how many are better and worse, and the p of the sign test are those of
        `metrics.compare`. If the interval contains 0, these patients do not show which model is better.

    Raises:
        ValueError: the tables cannot be compared, or have no Dice or HD95.
    """
    for table in (tableA, tableB):
        requireColumns(table, ['patient', 'region', 'dice', 'hd95'])
    pairScores(tableA, tableB)  # refuses the whole before a part
    rows = list(zip(_splitByRule(tableA), _splitByRule(tableB), strict=True))
    numRegions = tableA['region'].nunique()
    figure = newFigure(2.3 * max(numRegions, 3) + 1, 1 + 4 * len(rows))
    for panels, ((title, _, a), (_, _, b)) in zip(figure.subplots(len(rows), 2, squeeze=False), rows, strict=True):
        _drawDifferences(dict(zip(('dice', 'hd95'), panels, strict=True)), a, b, names)
        panels[0].set_title(title, fontsize=9, loc='left')
    handles = [makeDot(color) for color in (BLUE, GREY, ORANGE)]
    handles.append(Line2D([], [], color='black', marker='D', markersize=5))
    texts = [f'a patient: {names[1]} better', 'equal', f'{names[1]} worse']
    texts.append(f'mean and its {_level()} interval (bootstrap over patients); p: sign test')
    figure.legend(handles, texts, ncols=4, **BELOW)
    number = countText(tableA['patient'].nunique(), 'interval and test say little')
    figure.suptitle(f'{names[1]} compared with {names[0]}: {number}', fontsize=11)
    return figure


def _drawDifferences(panels, tableA, tableB, names):
    """Draw the differences of Dice and HD95 of one rule into two panels, a dict of score to panel."""
    a, b = (scores[['dice', 'hd95']] for scores in pairScores(tableA, tableB))
    summary, regions = compare(tableA, tableB), a.index.unique('region')
    for score, panel in panels.items():
        differences = subtract(a[score], b[score])
        top = max(np.abs(differences[np.isfinite(differences)]).max(initial=0), 0.01 if score == 'dice' else 0.5)
        heights, labels = np.clip(differences, -1.15 * top, 1.15 * top), []  # an infinite one lies beyond the others
        panel.axhline(0, color='black', linewidth=1, label='equal')
        for place, region in enumerate(regions):
            own = heights[a.index.get_level_values('region') == region]
            scaled = own / top if score == 'dice' else np.arcsinh(own) / np.arcsinh(top)
            gain = own if score == 'dice' else -own
            for color, isShown in ((BLUE, gain > 0), (GREY, gain == 0), (ORANGE, gain < 0)):
                drawDots(panel, (place + spreadDots(scaled / 2 + 0.5))[isShown], own[isShown], color)
            labels.append(f'{region}\n{_drawMean(panel, place, summary.loc[(region, score)])}')
        _finishPanel(panel, labels)
        if np.isinf(differences).any():
            panel.set_title('infinite: beyond all others', fontsize=8, color='#444444')
        panel.set_ylim(-1.25 * top, 1.25 * top)
        unit = '' if score == 'dice' else ', mm'
        panel.set_ylabel(f'{_WORDS[score]}, {names[1]} minus {names[0]}{unit}\n(up: {names[1]} is better)')
    _scaleDistances(panels['hd95'])


def _scaleDistances(panel):
    """Scale the vertical axis of a panel: linear within 1 mm of 0, logarithmic beyond, and smaller values up."""
    bottom, top = panel.get_ylim()
    panel.set_yscale('symlog', linthresh=1, linscale=0.6)
    decades = 10.0 ** np.arange(np.floor(np.log10(max(top, 1))) + 1)
    ticks = [*-decades[::-1], 0, *decades]
    panel.set_yticks(ticks, [f'{tick:+g}' if tick else '0' for tick in ticks])
    panel.yaxis.set_ticks([], minor=True)
    panel.set_ylim(max(top, 1.2), min(bottom, -1.2))


def _drawMean(panel, place, row):
    """Draw the mean difference of one region and its interval; return what `compare` says of it in words."""
    counts = f'{row["better"]} better\n{row["worse"]} worse'
    if row['unscored']:
        counts += f'\n{row["unscored"]} without score'
    if not np.isfinite(row['mean']):
        return f'no mean\n{counts}'
    style = {'fmt': 'D', 'color': 'black', 'markersize': 5, 'capsize': 3, 'label': 'mean', 'zorder': 4}
    panel.errorbar(place + 0.42, row['mean'], [[row['mean'] - row['low']], [row['high'] - row['mean']]], **style)
    digits = 3 if row.name[1] == 'dice' else 1
    mean, low, high = (f'{row[name]:+.{digits}f}' for name in ('mean', 'low', 'high'))
    return f'mean {mean}\n{low} to {high}\n{counts}\np = {row["p"]:.2g}'


def plotRecipes(scores):
    """Draw the Dice of each patient by recipe, and its difference from the first recipe.

    Args:
        scores: DataFrame as in `metrics.compareRecipes`.

    Returns:
        matplotlib Figure. A dot is a patient, the mean over regions and seeds. Means, intervals and verdicts are those
        of `metrics.compareRecipes`; the interval of a recipe's own mean is that over the patients.
    """
    table = compareRecipes(scores.drop(columns='patients', errors='ignore'))
    patients = scores.pivot_table(index='patient', columns='recipe', values='dice', sort=False)[list(table.index)]
    figure = newFigure(2.1 * max(2 * len(table) - 1, 3) + 1.5, 4.6)
    left, right = figure.subplots(1, 2, width_ratios=[len(table), max(len(table) - 1, 1)])
    mean, (low, high) = patients.mean(), bootstrapMean(patients.to_numpy())
    _drawColumns(left, patients, mean, low, high, [f'{name}\nmean {mean[name]:.3f}' for name in table.index])
    left.set(ylim=(-0.03, 1.03), ylabel='Dice (0 to 1; 1 is best)')
    others = table.iloc[1:]
    texts = []
    for name, row in others.iterrows():
        verdict = row['verdict'].replace(': ', ':\n')
        texts.append(f'{name}\n{row["difference"]:+.3f} ({row["low"]:+.3f} to {row["high"]:+.3f})\n{verdict}')
    gains = patients[others.index].sub(patients[table.index[0]], axis=0)
    _drawColumns(right, gains, others['difference'], others['low'], others['high'], texts)
    right.axhline(0, color='#444444', linewidth=1)
    right.set_ylabel(f'Dice, difference from {table.index[0]}\n(up: better)')
    handles = [makeDot(BLUE), Line2D([], [], color=ORANGE, marker='D', markersize=5)]
    figure.legend(handles, ['a patient', f'mean and its {_level()} interval'], ncols=2, **BELOW)
    numRuns = scores.groupby(['fold', 'seed']).ngroups
    figure.suptitle(f'{len(patients)} patients, {numRuns} trainings of each recipe', fontsize=11)
    return figure


def _drawColumns(panel, values, mean, low, high, labels):
    """Draw a column of dots for each column of a table (patients, columns), and the mean and its interval beside it."""
    for place, name in enumerate(values):
        heights = values[name].to_numpy()
        drawDots(panel, place + spreadDots((heights - heights.min()) / max(np.ptp(heights), 1e-9)), heights, BLUE)
        middle = np.asarray(mean)[place]
        reach = [[middle - np.asarray(low)[place]], [np.asarray(high)[place] - middle]]
        reach = np.maximum(reach, 0)  # equal but for rounding
        style = {'fmt': 'D', 'color': ORANGE, 'markersize': 5, 'capsize': 3, 'zorder': 4}
        panel.errorbar(place + 0.42, middle, reach if np.isfinite(reach).all() else None, **style)
    _finishPanel(panel, labels)


def plotLearningCurve(table):
    """Draw the Dice by the number of training patients, with the power law that is fitted to it.

    Args:
        table: DataFrame of `metrics.fitLearningCurve`.

    Returns:
        matplotlib Figure: for each recipe the means with their intervals, and the law with its interval as a band, up
        to twice the patients.
    """
    figure = newFigure(6.5, 4.4)
    panel = figure.subplots()
    colors = [BLUE, ORANGE, '#009E73', '#CC79A7', GREY]
    for number, (name, part) in enumerate(table.groupby('recipe', sort=False)):
        part, color = part.droplevel('recipe'), colors[number % len(colors)]
        own = part.dropna(subset='mean')
        reach = np.maximum([own['mean'] - own['low'], own['high'] - own['mean']], 0)
        panel.errorbar(own.index, own['mean'], reach, fmt='o', color=color, capsize=3, label=name)
        panel.plot(part.index, part['fitted'], color=color, linestyle='--', linewidth=1)
        panel.fill_between(part.index, part['fittedLow'], part['fittedHigh'], color=color, alpha=0.12, linewidth=0)
    panel.set_xscale('log', base=2)
    sizes = table.index.get_level_values('patients').unique().sort_values()
    panel.set_xticks(sizes, [str(size) for size in sizes])
    panel.set(xlabel='patients to train on', ylabel='Dice (0 to 1; 1 is best)')
    panel.grid(axis='y', color='#E5E5E5', linewidth=0.7)
    panel.spines[['top', 'right']].set_visible(False)
    panel.legend(frameon=False)
    figure.suptitle(f'Mean Dice and its {_level()} interval; dashed: 1 - Dice = a n^-b', fontsize=10)
    return figure


def plotQuality(crossed):
    """Draw each patient's true Dice against the one that was estimated without it, one panel per region.

    Args:
        crossed: DataFrame of `postprocess.crossFit`: every estimate is by a fit that did not use the patient.

    Returns:
        matplotlib Figure. A dot and its interval are orange if the true Dice lies outside the interval. In the grey
        area are the patients with a true Dice below `config.QUALITY_LIMIT`: left of the dotted line they are flagged,
        right of it they are missed. The titles have the rank correlation and how many of the intervals hold the true
        Dice. With fewer than ten patients the title says that the figure says little.

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
    number = countText(crossed['patient'].nunique(), 'the figure says little')
    figure.suptitle(f'Estimated quality, by fits that did not use the patient: {number}', fontsize=11)
    return figure


def _drawEstimates(panel, estimates, dice, low, high):
    """Draw the limit, the diagonal, and estimates (n,) with their intervals against the true Dice (n,)."""
    limit = config.QUALITY_LIMIT
    panel.axhspan(-0.03, limit, color='#EEEEEE', zorder=0)
    panel.axvline(limit, color=GREY, linewidth=1, linestyle=':', label='limit')
    panel.plot([0, 1], [0, 1], color='black', linewidth=1, label='identity')
    isHeld = (low <= dice) & (dice <= high)
    for color, isShown in ((BLUE, isHeld), (ORANGE, ~isHeld)):
        panel.vlines(estimates[isShown], low[isShown], high[isShown], color=color, linewidth=1, alpha=0.4)
        drawDots(panel, estimates[isShown], dice[isShown], color)
    panel.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel='estimated Dice', box_aspect=1)
    panel.spines[['top', 'right']].set_visible(False)
