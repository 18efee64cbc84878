"""Show what the numbers say: scores, errors, volumes and probabilities of many patients, one figure for each question.

In every figure a dot is a patient unless its legend says otherwise, and what is zero or missing is drawn as such.
"""

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

import config
import pictures
from metrics import summarize
from pictures import cropBox, displayWindow, isBrain, newFigure, tellingSlice, unpackPrediction
from reliability import countText

MAIN_REGIONS = ('WT', 'TC', 'ET')  # that the challenge ranks by
BLUE, ORANGE, GREY = '#0072B2', '#D55E00', '#8C8C8C'  # of Okabe and Ito: apart for every eye
GRADE_COLORS = {'HGG': BLUE, 'LGG': '#E69F00', 'unknown': '#BBBBBB'}
BELOW = {'loc': 'outside lower center', 'frameon': False, 'fontsize': 8}  # the place of a figure's legend


def plotCohort(table):
    """Gives a figure of the patients: how many of each edition and grade, and the volume of each class.

    Args:
        table: as `cohort.describeCohort` gives it: a row per patient; `edition`, `grade`, `person`, ml of each class.

    Returns:
        matplotlib Figure. Who has no segmentation is in the bars, not in the volumes.

    Raises:
        ValueError: no patients, or a column is missing.
    """
    names = list(config.CLASS_NAMES[1:])
    _require(table, ['edition', 'grade', 'person', *names])
    volumes = table[names].dropna()  # ml
    figure = newFigure(9.5, 3.9)
    bars, panel = figure.subplots(1, 2, width_ratios=(1, 1.25))
    _drawEditions(bars, pd.crosstab(table['edition'], table['grade']))
    scale = _setDecades(panel.yaxis, volumes)
    for place, name in enumerate(names):
        own = volumes[name].to_numpy(float)
        if own.size:
            style = {'color': '#444444', 'linewidth': 1}
            style = {'showfliers': False, 'showcaps': False, 'whis': 0, 'medianprops': style, 'boxprops': style}
            panel.boxplot(own, positions=[place], widths=0.72, **style)
        _drawDots(panel, place + _spread(scale(own)), own, own == 0, config.CLASS_COLORS[place + 1], edge='#555555')
    panel.set_xticks(range(len(names)), [f'{name}\n{(volumes[name] == 0).sum()} have none' for name in names])
    panel.set(xlim=(-0.6, len(names) - 0.4), ylabel='volume (ml)')
    panel.set_title(f'Volumes of {countText(len(volumes))} with a segmentation', fontsize=10)
    handles = [_dot(GREY), _dot(GREY, isHollow=True), Patch(facecolor='white', edgecolor='#444444')]
    texts = ['a patient', 'a patient who has none: 0 ml', 'median and quartiles of the patients']
    figure.legend(handles, texts, ncols=3, **BELOW)
    title = f'{countText(len(table))} ({table["person"].nunique()} persons): {len(table) - len(volumes)} without a '
    title += f'segmentation, {(volumes[names[-1]] == 0).sum()} of the others without enhancing tumor'
    figure.suptitle(title, fontsize=11)
    return figure


def _drawEditions(panel, counts):
    """Draws a bar for each edition (row), stacked by grade (column); the numbers stand in and behind it."""
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


def plotScores(table):
    """Gives a figure of each patient's Dice and HD95 by region, with median, mean and the interval of the mean.

    Args:
        table: as `metrics.scoreTable` gives it, of the tables of `scorePatient` or of `scoreLesions`.

    Returns:
        matplotlib Figure. Mean and interval are those of `metrics.summarize`; the HD95 that stands for an empty mask
        (`config.HD95_EMPTY`) counts in them, and is marked by a line.

    Raises:
        ValueError: no patients, or a column is missing.
    """
    _require(table, ['patient', 'region', 'dice', 'hd95'])
    summary = summarize(table)
    parts = {region: table[table['region'] == region] for region in config.REGIONS if region in set(table['region'])}
    figure = newFigure(1.9 * max(len(parts), 3) + 1, 4.4)
    panels = dict(zip(('dice', 'hd95'), figure.subplots(1, 2), strict=True))
    panels['dice'].set(ylim=(-0.03, 1.03), ylabel='Dice (0 to 1; 1 is best)')
    scales = {'dice': np.asarray, 'hd95': _setDecades(panels['hd95'].yaxis, table['hd95'], threshold=1)}
    panels['hd95'].set_ylabel('HD95 (mm; 0 is best)')
    for score, panel in panels.items():
        labels = []
        for place, (region, part) in enumerate(parts.items()):
            values = part[score].to_numpy(float)
            isEmpty = part['volumeTruth'].to_numpy() == 0 if 'volumeTruth' in part else np.zeros(len(part), bool)
            color = BLUE if region in MAIN_REGIONS else GREY
            _drawDots(panel, place + _spread(scales[score](values)), values, isEmpty, color)
            labels.append(f'{region}\n{_drawSummary(panel, place, summary.loc[(region, score)])}')
            if score == 'hd95':
                _markEmptyMasks(panel, place, values, isEmpty if 'volumeTruth' in part else None)
        panel.set_xticks(range(len(parts)), labels, fontsize=8)
        panel.set_xlim(-0.5, len(parts) - 0.3)
        panel.grid(axis='y', color='#E5E5E5', linewidth=0.7)
        panel.set_axisbelow(True)
        panel.spines[['top', 'right']].set_visible(False)
    _addScoreLegend(figure)
    figure.suptitle(f'Scores of {countText(table["patient"].nunique())}', fontsize=11)
    return figure


def _addScoreLegend(figure):
    handles = [_dot(BLUE), _dot(BLUE, isHollow=True), Line2D([], [], color='black', linewidth=2)]
    handles.append(Line2D([], [], color=ORANGE, marker='D', markersize=5))
    texts = ['a patient', 'a patient whose truth has none of the region', 'median']
    texts.append(f'mean and its {config.CONFIDENCE:.0%} interval (bootstrap over patients)')
    figure.legend(handles, texts, ncols=4, **BELOW)


def _drawSummary(panel, place, row):
    """Draws median, mean and interval of one region, and gives mean and interval in words."""
    panel.plot([place - 0.3, place + 0.3], [row['median']] * 2, color='black', linewidth=2, label='median', zorder=2)
    reach = [[row['mean'] - row['low']], [row['high'] - row['mean']]]
    style = {'fmt': 'D', 'color': ORANGE, 'markersize': 5, 'capsize': 3, 'label': 'mean', 'zorder': 4}
    panel.errorbar(place + 0.42, row['mean'], reach, **style)
    if np.isnan(row['mean']):
        return 'no mean: a\nscore is missing'
    digits = 2 if row.name[1] == 'dice' else 1
    return f'mean {row["mean"]:.{digits}f}\n({row["low"]:.{digits}f} to {row["high"]:.{digits}f})'


def _markEmptyMasks(panel, place, values, isEmpty):
    """Marks, once there are any, the distances that stand for an empty mask, and counts them.

    `isEmpty` (n,) tells which truth is empty; None where the table does not say.
    """
    isMark = np.isclose(values[:, None], list(config.HD95_EMPTY.values())).any(1)
    if not isMark.any():
        return
    mark = values[isMark][0]
    if not panel.texts:
        panel.axhline(mark, color='#444444', linestyle=':', linewidth=1, label='empty')
        panel.set_title(f'at {mark:.0f} mm: truth or prediction has none of the region', fontsize=8, color='#444444')
        panel.set_ylim(top=2.6 * mark)
    kinds = {'patients': isMark.sum()}  # scores by lesion do not tell which of both masks is empty
    if isEmpty is not None:
        kinds = {'missed': (isMark & ~isEmpty).sum(), 'invented': (isMark & isEmpty).sum()}
    text = '\n'.join(f'{count} {kind}' for kind, count in kinds.items() if count)
    panel.annotate(text, (place, mark), (0, 5), textcoords='offset points', ha='center', va='bottom', fontsize=7)


def plotCases(table, predict):
    """Gives a figure of the best, the median and the worst patient, truth beside prediction in a telling slice.

    They are ranked by the mean of their Dice of WT, TC and ET (of an even number the lower of the middle two is the
    median), and the slice is the one with most tumor in truth.

    Args:
        table: as `metrics.scoreTable` gives it.
        predict: gives `x, y, yhat` of a patient as `engine.predict` does: a function of the patient's id, such as
            `lambda patient: engine.predict(testdf.loc[patient], model)`, or a dict. One patient is held at a time.

    Returns:
        matplotlib Figure, a row for each of the three; of one patient or two, for each of these.

    Raises:
        ValueError: no patient with the three scores; what `pictures.unpackPrediction` says of a prediction.
    """
    cases = _rankCases(table)
    shown = [_cutCase(*(predict[patient] if hasattr(predict, 'keys') else predict(patient))[:3]) for patient in cases]
    heights = [1.35 * pictures.tallness(case['box']) for case in shown]
    figure = newFigure(4.4, sum(heights) + 0.9)
    rows = figure.subplots(len(cases), 3, height_ratios=heights, width_ratios=(0.95, 1, 1), squeeze=False)
    for row, text, case in zip(rows, cases.values(), shown, strict=True):
        row[0].axis('off')
        text = f'{text}\n\naxial slice {case["number"]}'
        row[0].text(0, 0.5, text, fontsize=8, va='center', transform=row[0].transAxes)
        for panel, name in zip(row[1:], ('truth', 'prediction'), strict=True):
            pictures.showSlice(panel, case['image'], case['window'], f'{name} over {case["modality"]}')
            pictures.showClasses(panel, case[name])
    pictures.markSides(rows[0][1])
    patches = [Patch(facecolor=color, edgecolor='#777777') for color in config.CLASS_COLORS[1:]]
    figure.legend(patches, config.CLASS_NAMES[1:], ncols=len(patches), **BELOW)
    count = countText(table['patient'].nunique())
    figure.suptitle(f'{count}, ranked by mean Dice of {", ".join(MAIN_REGIONS)}', fontsize=10)
    return figure


def _rankCases(table):
    """Gives the patients to show, best first, and the text that stands beside each."""
    _require(table, ['patient', 'region', 'dice'])
    dice = table.pivot(index='patient', columns='region', values='dice').reindex(columns=MAIN_REGIONS).dropna()
    if dice.empty:
        raise ValueError(f'No patient of the table has a Dice of each of {", ".join(MAIN_REGIONS)}.')
    dice['mean'] = dice.mean(axis=1)
    dice = dice.sort_values('mean', ascending=False, kind='stable')
    names = {len(dice) // 2: 'median'} | {0: 'best', len(dice) - 1: 'worst' if len(dice) > 1 else 'the only patient'}
    rows = {dice.index[place]: (name, dice.iloc[place]) for place, name in sorted(names.items())}
    return {
        patient: '\n'.join(
            [f'{name}:', patient, '', 'Dice', *(f'{region}  {value:.3f}' for region, value in row.items())]
        )
        for patient, (name, row) in rows.items()
    }


def _cutCase(x, y, yhat):
    """Gives what is drawn of one patient: the telling slice of the image, the truth and the prediction, cropped."""
    volume, modality, classes = unpackPrediction(x, y, yhat)
    brain = isBrain(volume)
    number = tellingSlice(*classes.values(), brain)
    box = cropBox(brain[number] | np.any([values[number] > 0 for values in classes.values()], axis=0))
    cut = {name: values[number][box].copy() for name, values in classes.items()}  # a view would keep the volume
    cut |= {'image': volume[number][box].copy(), 'window': displayWindow(volume, brain), 'modality': modality}
    return cut | {'number': number, 'box': box}


def plotVolumes(table):
    """Gives a figure of predicted against true volume, a panel for each region.

    Args:
        table: as `metrics.scoreTable` gives it, with the columns `volumeTruth` and `volumePredicted` (ml).

    Returns:
        matplotlib Figure. All panels have one scale: logarithmic with a linear stretch down to 0 where the volumes span
        more than a factor of 30 or one is 0. The dashed lines are the limits of agreement: mean difference,
        predicted less true, +- 1.96 standard deviations.

    Raises:
        ValueError: no patients, or a column is missing.

    Reference:
        Bland and Altman, Lancet 327 (1986), 307 to 310.
    """
    _require(table, ['patient', 'region', 'volumeTruth', 'volumePredicted'])
    regions = [region for region in config.REGIONS if region in set(table['region'])]
    volumes = table[['volumeTruth', 'volumePredicted']].to_numpy(float)
    noRows = len(regions) // 3 + 1  # three panels a row, the last one holds the legend
    figure = newFigure(8.6, 3 * noRows + 0.4)
    figure.get_layout_engine().set(h_pad=0.1)
    panels = figure.subplots(noRows, 3, squeeze=False).ravel()
    for panel, region in zip(panels, regions, strict=False):
        pairs = volumes[(table['region'] == region).to_numpy()]
        for axis in (panel.xaxis, panel.yaxis):
            _setDecades(axis, volumes)
        text = _drawAgreement(panel, pairs, np.nanmax(volumes))
        _drawDots(panel, *pairs.T, (pairs == 0).any(1), BLUE if region in MAIN_REGIONS else GREY)
        panel.set(xlabel='true volume (ml)', ylabel='predicted volume (ml)', box_aspect=1)
        panel.set_title(f'{region}: {text}', fontsize=8)
    for panel in panels[len(regions) :]:
        panel.axis('off')
    handles = [_dot(BLUE), _dot(BLUE, isHollow=True), Line2D([], [], color='black', linewidth=1)]
    handles.append(Line2D([], [], color=ORANGE, linewidth=1, linestyle='--'))
    texts = ['a patient', '0 ml in truth or prediction', 'prediction equals truth']
    texts.append('limits of agreement:\nmean difference (predicted\nless true) ± 1.96 SD')
    panels[-1].legend(handles, texts, frameon=False, fontsize=9, loc='center')
    figure.suptitle(f'Volumes of {countText(table["patient"].nunique())}', fontsize=11)
    return figure


def _drawAgreement(panel, pairs, top):
    """Draws identity and limits of agreement of pairs (n, 2) of true and predicted ml, and gives these in words."""
    line = np.concatenate([[0], np.geomspace(1e-4, 2, 200)]) * max(top, 1e-3)
    panel.plot(line, line, color='black', linewidth=1, label='identity')
    differences = pairs[:, 1] - pairs[:, 0]
    bias = differences.mean()
    if len(pairs) < 2 or np.isnan(bias):
        return f'difference {bias:+.3g} ml'
    reach = 1.96 * differences.std(ddof=1)
    for end in (bias - reach, bias + reach):
        style = {'color': ORANGE, 'linewidth': 1, 'linestyle': '--', 'label': 'limit'}
        panel.plot(line + max(-end, 0), line + max(end, 0), **style)  # from where one of both volumes is 0
    return f'mean difference {bias:+.3g} ml,\nlimits {bias - reach:+.3g} to {bias + reach:+.3g} ml'


def plotTuning(result):
    """Gives a figure of what `metrics.tuneSmall` tried: the score at each size, and who gains and loses by it.

    Args:
        result: a `smallparts.SmallTuning`.

    Returns:
        matplotlib Figure: on the left the volume for `dropSmall`, on the right the number for `relabelSmallET`.

    Raises:
        ValueError: a rule has no curve.
    """
    rules = {
        'ml': ('dropSmall: smaller parts of tumor go (ml)', 'mean lesion-wise Dice of WT', f'{result.ml:.3g} ml'),
        'N': ('relabelSmallET: fewer voxels of ET become core', 'mean Dice of ET', f'N = {result.N}'),
    }
    figure = newFigure(9, 4.6)
    columns = figure.subplots(2, 2, height_ratios=(2.4, 1), sharex='col').T
    for (panel, below), (rule, (meaning, score, best)) in zip(columns, rules.items(), strict=True):
        curve = result.curve[result.curve['rule'] == rule]
        if curve.empty:
            raise ValueError(f'The result has no curve of the rule {rule}; that of metrics.tuneSmall was expected.')
        _drawTuning(panel, below, curve, getattr(result, rule), best)
        panel.set_ylabel(score)
        below.set(xlabel=meaning, ylabel='patients')
        for axes in (panel, below):
            axes.spines[['top', 'right']].set_visible(False)
    text = (
        f'At the best N, {result.carriedBy} of {result.withoutET} patients without ET gain; {result.lost} with ET lose'
    )
    columns[1][0].set_title(text, fontsize=9)
    columns[0][0].set_title('Tried first; the right panel builds on its best', fontsize=9)
    figure.suptitle('Tuning of small parts', fontsize=11)
    return figure


def _drawTuning(panel, below, curve, best, text):
    """Draws one rule's curve (scores above, patients below) as steps, since a score holds up to the next value."""
    values = curve['value'].to_numpy(float)
    values = np.append(values, 1.5 * values[-1] if values[-1] else 1.0)  # the last step has a width too
    extend = lambda name: np.append(curve[name], curve[name].iloc[-1])  # noqa: E731
    chosen = int(np.abs(values[:-1] - best).argmin())
    scores = extend('score')
    panel.step(values, scores, where='post', color=BLUE, label='every size tried')
    panel.axhline(scores[0], color=GREY, linestyle='--', linewidth=1, label=f'without the rule: {scores[0]:.3f}')
    panel.plot(best, scores[chosen], 'D', color=ORANGE, label=f'best: {text}, {scores[chosen]:.3f}', zorder=3)
    below.step(values, extend('gained'), where='post', color=BLUE, label='gain')
    below.step(values, extend('lost'), where='post', color=ORANGE, linestyle='--', label='lose')
    below.axvline(best, color=ORANGE, linewidth=0.8, alpha=0.6)
    _setDecades(panel.xaxis, values[values > 0])
    below.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    low, high = scores.min(), scores.max()
    panel.set_ylim(low - 0.08 * max(high - low, 0.01), high + 0.08 * max(high - low, 0.01))
    for axes in (panel, below):
        axes.legend(frameon=False, fontsize=8)


def _require(table, columns):
    missing = [name for name in columns if name not in table]
    if missing or len(table) == 0:
        raise ValueError(f'A table of {len(table)} rows that lacks the columns {missing or "none"} shows no patient.')


def _spread(heights, bins=40, reach=0.3):
    """Gives how far aside (n,) each dot moves, so that those of about the same height (0 to 1) lie side by side."""
    offsets = np.zeros(len(heights))
    rows = np.round(np.nan_to_num(heights) * bins)
    for row in np.unique(rows):
        members = np.flatnonzero(rows == row)
        step = min(0.07, 2 * reach / len(members))
        offsets[members] = (np.arange(len(members)) - (len(members) - 1) / 2) * step
    return offsets


def _dot(color, isHollow=False, edge=None):
    style = {'marker': 'o', 'markersize': 4.5, 'linestyle': 'none', 'markeredgecolor': edge or color}
    style |= {'markerfacecolor': 'white' if isHollow else color, 'markeredgewidth': 1 if isHollow else 0.5}
    return Line2D([], [], **style)


def _drawDots(panel, x, y, isHollow, color, edge=None):
    """Draws a dot for each pair of x and y (n,), as a line without a line: `full` and, where bool (n,), `hollow`."""
    for label, mask in (('full', ~isHollow), ('hollow', isHollow)):
        dots = _dot(color, label == 'hollow', edge)
        dots.set(xdata=np.asarray(x)[mask], ydata=np.asarray(y)[mask], label=label, clip_on=False, zorder=2.5)
        dots.set_in_layout(False)  # a line without points would count as lying in the figure's corner
        dots.set_alpha(0.75 if label == 'full' else 1)
        panel.add_line(dots)


def _setDecades(axis, values, threshold=None):
    """Sets an axis from 0 to the largest value: linear, or where decades lie between them logarithmic.

    Logarithmic from a threshold on, below it linear, so that a zero has a place: symlog.

    Args:
        axis: xaxis or yaxis of a panel.
        values: 0 or more; NaN is passed over.
        threshold: by default the decade of the smallest value, at most three below that of the largest; if given, the
            axis is always logarithmic.

    Returns:
        function of an array of values to their heights on the axis, 0 to 1.
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
