import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import config
import pictures
from examples import legendTexts, linesOf, makeTable
from metrics import compare, scorePatient, scoreTable, summarize

EMPTY = 373.12866  # mm; the HD95 that stands for an empty mask


@pytest.fixture(autouse=True)
def closeFigures():
    config.BOOTSTRAP_RESAMPLES = 200
    yield
    plt.close('all')


def makeCohort():
    """Return five patients of four subjects: HGG, HGG, LGG of 2020, two of 2021; one without ET, one without seg."""
    volumes = [[1, 2, 3], [4, 5, 6], [0, 8, 0], [10, 20, 30], [np.nan] * 3]
    table = pd.DataFrame(volumes, list('abcde'), config.CLASS_NAMES[1:])
    table.insert(0, 'edition', ['BraTS2020'] * 3 + ['BraTS2021'] * 2)
    table.insert(1, 'grade', ['HGG', 'HGG', 'LGG', 'unknown', 'unknown'])
    table.insert(2, 'subject', list('abcdd'))
    return table


def test_plotCohort_countsEditionsAndGrades():
    """The bars of the two editions are 2 HGG + 1 LGG and 2 unknown, with 3 and 2 at their ends."""
    bars = pictures.plotCohort(makeCohort()).axes[0]
    widths = {drawn.get_label(): [bar.get_width() for bar in drawn] for drawn in bars.containers}
    assert widths == {'grade HGG': [2, 0], 'grade LGG': [1, 0], 'grade unknown': [0, 2]}
    assert [bar.get_x() for bar in bars.containers[1]] == [2, 0]  # LGG follows HGG
    assert [text.get_text() for text in bars.texts if text.get_text()][-2:] == ['3', '2']
    assert [text.get_text() for text in bars.get_yticklabels()] == ['BraTS2020', 'BraTS2021']


def test_plotCohort_showsEveryVolumeAndZeros():
    """Each volume is a dot, 0 ml a hollow one inside the axis; the title counts missing segmentations and ET."""
    figure = pictures.plotCohort(makeCohort())
    panel = figure.axes[1]
    full, hollow = linesOf(panel, 'full'), linesOf(panel, 'hollow')
    assert [sorted(line.get_ydata()) for line in full] == [[1, 4, 10], [2, 5, 8, 20], [3, 6, 30]]
    assert [list(line.get_ydata()) for line in hollow] == [[0], [], [0]]
    assert panel.get_ylim()[0] < 0 and panel.get_yscale() == 'symlog'
    ticks = [text.get_text() for text in panel.get_xticklabels()]
    assert ticks == ['necrotic core\n1 have none', 'edema\n0 have none', 'enhancing tumor\n1 have none']
    expected = '5 patients (4 subjects): 1 without a segmentation, 1 of the others without enhancing tumor'
    assert figure.get_suptitle() == expected
    none = pictures.plotCohort(makeCohort().iloc[4:])  # nobody has a segmentation
    assert none.axes[1].get_title() == 'Volumes of 0 patients with a segmentation'
    none.canvas.draw()


def test_plotCurves_marksTheEpochToPredictWith():
    """That of the lowest validation loss, named as in the column `epoch`; the last if the rate decays by the step."""
    history = pd.DataFrame({'epoch': [4, 5, 6, 7], 'trainLoss': [4, 3, 2, 1], 'valLoss': [4, np.nan, 2, 3]})
    panel = pictures.plotCurves(history).axes[0]
    assert [list(line.get_ydata()) for line in panel.lines[:1]] == [[4, 3, 2, 1]]
    assert (list(panel.lines[2].get_xdata()), list(panel.lines[2].get_ydata())) == ([6], [2])
    assert legendTexts(panel) == ['training', 'validation', 'best: 2 in epoch 6']
    assert panel.get_yscale() == 'linear'
    config.SCHEDULE = 'poly'
    panel = pictures.plotCurves(history).axes[0]
    assert (list(panel.lines[2].get_xdata()), list(panel.lines[2].get_ydata())) == ([7], [3])
    assert legendTexts(panel)[-1] == 'end: 3 in epoch 7'


def test_plotCurves_logarithmicFromAFactorOf10():
    """The scale is logarithmic if losses fall by more than a factor of 10, and linear if a loss is 0."""
    history = pd.DataFrame({'epoch': [1, 2], 'trainLoss': [1, 0.09], 'valLoss': [1, 1]})
    assert pictures.plotCurves(history).axes[0].get_yscale() == 'log'
    assert pictures.plotCurves(history.assign(valLoss=0.0)).axes[0].get_yscale() == 'linear'


@pytest.mark.parametrize(
    ('rates', 'marked'),
    [([1e-3, 1e-3, 5e-4, 5e-4], [(3, 'rate 0.0005')]), ([1e-3, 8e-4, 5e-4, 1e-4], [])],
    ids=['steps', 'decay'],
)
def test_plotCurves_marksTheDropsOfTheLearningRate(rates, marked):
    """A line marks the epoch after which the rate fell; a rate that falls after every epoch is no event."""
    history = pd.DataFrame({'epoch': range(1, 5), 'trainLoss': 1, 'valLoss': 1, 'learnRate': rates})
    panel = pictures.plotCurves(history).axes[0]
    lines = [line.get_xdata()[0] for line in panel.lines[3:]]
    assert list(zip(lines, (text.get_text() for text in panel.texts), strict=True)) == marked


def test_plotCurves_showsTheDiceOfTheRegions():
    """With the Dice in the history, a second panel has a line for each region, from 0 to 1."""
    history = pd.DataFrame(
        {'epoch': [1, 2], 'trainLoss': 1.0, 'valLoss': 1.0, 'diceWT': [0.2, 0.8], 'diceET': [0.1, 0.5]}
    )
    _, panel = pictures.plotCurves(history).axes
    assert [list(line.get_ydata()) for line in panel.lines] == [[0.2, 0.8], [0.1, 0.5]]
    assert legendTexts(panel) == ['WT', 'ET'] and panel.get_ylim() == (0, 1.02)


@pytest.mark.parametrize('count', [1, 3, 30])
def test_plotCurves_countsEpochsFromOne(count):
    """All ticks of the axis are epochs of the history: none at 0 or after the last epoch."""
    history = pd.DataFrame({'epoch': range(1, count + 1), 'trainLoss': 1.0, 'valLoss': 1.0})
    panel = pictures.plotCurves(history).axes[0]
    low, high = panel.get_xlim()
    ticks = [tick for tick in panel.get_xticks() if low <= tick <= high]
    assert ticks and set(ticks) <= set(history['epoch'])


def test_plotScores_dotsAreTheTable():
    """Each patient's Dice and HD95 is a dot at its region; WT, TC and ET have one color, NCR and ED another."""
    dice = {'WT': [0.9, 0.8, 0.9], 'TC': [0.7, 0.6, 0.5], 'ET': [0.1, 0.2, 0.4], 'NCR': [0.3] * 3, 'ED': [0, 1, 0.5]}
    figure = pictures.plotScores(makeTable(**dice))
    left, right = figure.axes
    assert [list(line.get_ydata()) for line in linesOf(left, 'full')] == list(dice.values())
    expected = [[10 * (1 - value) for value in values] for values in dice.values()]
    assert [list(line.get_ydata()) for line in linesOf(right, 'full')] == expected
    assert [np.round(line.get_xdata().mean(), 9) for line in linesOf(left, 'full')] == [0, 1, 2, 3, 4]
    assert len(set(zip(*linesOf(left, 'full')[0].get_data(), strict=True))) == 3  # equal values lie side by side
    colors = [line.get_markerfacecolor() for line in linesOf(left, 'full')]
    assert colors == [colors[0]] * 3 + [colors[3]] * 2 and colors[0] != colors[3]
    assert figure.get_suptitle().startswith('Scores of 3 patients')


def test_plotScores_meanAndIntervalAreThoseOfSummarize():
    """Mean, interval and median of every region and score are those of `summarize`."""
    table = makeTable(WT=[0.9, 0.8, 0.3, 0.5], ET=[0.7, 0.1, 0.0, 0.2])
    summary = summarize(table)
    for score, panel in zip(('dice', 'hd95'), pictures.plotScores(table).axes, strict=True):
        for place, region in enumerate(('WT', 'ET')):
            row = summary.loc[(region, score)]
            mean, _, (bar,) = panel.containers[place]
            assert mean.get_ydata() == [row['mean']]
            assert np.allclose(bar.get_segments()[0][:, 1], [row['low'], row['high']])
            assert list(linesOf(panel, 'median')[place].get_ydata()) == [row['median']] * 2
    assert pictures.plotScores(table).axes[0].get_xticklabels()[1].get_text().startswith('ET\nmean 0.25\n(')


@pytest.mark.parametrize('count', [8, 9, 16, 17, 20])
def test_plotScores_drawsEqualDistances(count):
    """Where no patient has an enhancing tumor predicted, all have the same HD95; rounding does not stop the figure."""
    table = makeTable(WT=[0.3] * count).assign(hd95=EMPTY)
    row = summarize(table).loc[('WT', 'hd95')]
    assert row['low'] <= row['mean'] <= row['high']
    pictures.plotScores(table).canvas.draw()


def test_plotScores_marksAnEmptyMask():
    """HD95 of 373 mm lies on a line inside the axis: two false negatives, a false positive; without any, no line."""
    table = makeTable(WT=[0.9, 0.8, 0.7], ET=[0.9, 0.0, 0.0])
    plain = pictures.plotScores(table).axes[1]
    assert not linesOf(plain, 'empty') and not plain.get_title()
    table.loc[3:, 'hd95'] = EMPTY
    table.loc[3:4, 'volumePredicted'] = table.loc[5, 'volumeTruth'] = 0
    left, right = pictures.plotScores(table).axes
    (line,) = linesOf(right, 'empty')
    assert line.get_ydata()[0] == EMPTY < right.get_ylim()[1]
    assert right.get_title().startswith('373 mm')
    assert [text.get_text() for text in right.texts] == ['2 false negative\n1 false positive']
    for panel, values in ((left, [0]), (right, [EMPTY])):
        assert [list(dots.get_ydata()) for dots in linesOf(panel, 'hollow')] == [[], values]
    assert linesOf(right, 'hollow')[1].get_markerfacecolor() == 'white'
    lesions = table.drop(columns=['volumeTruth', 'volumePredicted'])  # as of scoreLesions: no hollow dots
    panel = pictures.plotScores(lesions).axes[1]
    assert [text.get_text() for text in panel.texts] == ['3 patients']
    assert not any(len(dots.get_ydata()) for dots in linesOf(panel, 'hollow'))


def test_plotScores_namesAMissingScore():
    """With a NaN among the scores the label says that there is no mean."""
    panel = pictures.plotScores(makeTable(WT=[0.9, np.nan])).axes[0]
    assert panel.get_xticklabels()[0].get_text() == 'WT\nno mean: a\nscore is missing'


def test_plotVolumes_showsZeros():
    """0 ml in truth or prediction is a hollow dot inside the axes, which are symlog."""
    table = makeTable(ET=[0.9] * 4)
    table['volumeTruth'], table['volumePredicted'] = [0, 5, 40, 0], [0.2, 0, 50, 0]
    panel = pictures.plotVolumes(table).axes[0]
    (full,), (hollow,) = linesOf(panel, 'full'), linesOf(panel, 'hollow')
    assert [list(values) for values in full.get_data()] == [[40], [50]]
    assert [list(values) for values in hollow.get_data()] == [[0, 5, 0], [0.2, 0, 0]]
    assert (panel.get_xscale(), panel.get_yscale()) == ('symlog', 'symlog')
    assert panel.get_xlim()[0] < 0 and panel.get_xlim() == panel.get_ylim()
    assert panel.get_xlim()[1] > 50
    (identity,) = linesOf(panel, 'identity')
    assert np.array_equal(identity.get_xdata(), identity.get_ydata()) and identity.get_xdata()[0] == 0


def test_plotVolumes_showsTheLimitsOfAgreement():
    """Differences of 1, 2, 3 ml have the mean 2 and the limits 2 -+ 1.96 x 1; one patient has no limits."""
    table = makeTable(WT=[0.9] * 3)
    table['volumeTruth'], table['volumePredicted'] = [10, 20, 30], [11, 22, 33]
    panel, legend = pictures.plotVolumes(table).axes  # of one region no panel is empty
    assert panel.get_title() == 'WT: mean difference +2 ml,\nlimits +0.04 to +3.96 ml' and legend.get_legend()
    reach = [line.get_ydata() - line.get_xdata() for line in linesOf(panel, 'limit')]
    assert np.allclose(reach[0], 0.04) and np.allclose(reach[1], 3.96)
    assert panel.get_xscale() == 'linear'  # 10 to 33 ml is less than a factor of 30
    panel = pictures.plotVolumes(table[:1]).axes[0]
    assert panel.get_title() == 'WT: difference +1 ml' and not linesOf(panel, 'limit')


def test_plotConfusion_showsFractionsOfEachRow():
    """Fractions are of the row (truth): 3 of 4, 1 of 4; a class absent in truth has none; counts are in k and M."""
    matrix = np.array([[2_999_000, 1000, 0, 0], [0, 0, 0, 0], [0, 1, 3, 0], [0, 0, 0, 34_500]])
    panel = pictures.plotConfusion(matrix).axes[0]
    fractions = panel.images[0].get_array().filled(np.nan)
    assert np.allclose(fractions[2], [0, 0.25, 0.75, 0]) and np.isnan(fractions[1]).all()
    assert panel.images[0].get_clim() == (0, 1)
    texts = {text.get_position(): text.get_text() for text in panel.texts}  # (column, row)
    assert [texts[column, 0] for column in range(4)] == ['99.97%\n3 M', '0.03%\n1 k', '0.00%\n0', '0.00%\n0']
    assert [texts[column, 1] for column in range(4)] == ['none'] * 4
    assert (texts[1, 2], texts[2, 2], texts[3, 3]) == ('25.00%\n1', '75.00%\n3', '100.00%\n34.5 k')
    assert (panel.get_xlabel(), panel.get_ylabel()[:14]) == ('class in prediction', 'class in truth')


def test_plotConfusion_sumsPatients():
    """The counts of two patients are summed, and the title says how many patients."""
    figure = pictures.plotConfusion([np.eye(4, dtype=int) * 2, np.ones((4, 4), int)])
    assert figure.axes[0].texts[0].get_text() == '50.00%\n3'
    assert figure.axes[0].get_title() == 'Confusion of the classes, 24 voxels of 2 patients'


@pytest.mark.parametrize('matrix', [np.zeros((4, 4)), np.ones((3, 3)), -np.eye(4)])
def test_plotConfusion_refusesOtherCounts(matrix):
    """Zero counts, another shape and a negative count are refused."""
    with pytest.raises(ValueError, match='expected'):
        pictures.plotConfusion(matrix)


@pytest.mark.parametrize('plot', ['plotScores', 'plotVolumes', 'plotCohort', 'plotCurves'])
def test_plots_refuseAnEmptyTable(plot):
    """A table without rows and one that lacks a column are refused."""
    history = pd.DataFrame({'epoch': [1], 'trainLoss': [1], 'valLoss': [1]})
    full = {'plotCohort': makeCohort(), 'plotCurves': history}.get(plot, makeTable(WT=[1.0]))
    for table in (full[:0], full.drop(columns=full.columns[1])):
        with pytest.raises(ValueError, match='expected'):
            getattr(pictures, plot)(table)


@pytest.mark.parametrize('plot', [pictures.plotScores, pictures.plotVolumes])
def test_plots_warnOfFewerThanTenPatients(plot):
    """The title of one or nine patients, whatever the number of their regions, has a warning; that of ten has none."""
    table = scoreTable({'p1': scorePatient(np.zeros((2, 3, 4), int), np.zeros((2, 3, 4), int))})  # without tumor
    few, enough = (makeTable(WT=[0.5] * count, ET=[0.5] * count) for count in (9, 10))
    assert 'of 1 patient (so few that the ' in plot(table).get_suptitle()
    assert 'of 9 patients (so few that the ' in plot(few).get_suptitle()
    assert plot(enough).get_suptitle().endswith('of 10 patients')


def makeRules():
    """Return a table of two rules: of 2020 with two regions, of 2024 with RC and lesion-wise scores."""
    first = makeTable(WT=[0.9, 0.8], NCR=[0.5, 0.6]).assign(rule='BraTS2020', lesionDice=np.nan, lesionHd95=np.nan)
    second = makeTable(WT=[0.7, 0.6], RC=[0.1, 0.0]).assign(rule='BraTS2024')
    second['lesionDice'], second['lesionHd95'] = second['dice'] / 2, [10.0, 20.0, 30.0, 337.0]
    return pd.concat([first, second], ignore_index=True)


def test_plotScores_drawsEachRule():
    """Each rule has a row with its own regions, and one more for lesions; the penalty of 2024 is marked."""
    figure = pictures.plotScores(makeRules())
    assert [panel.get_title(loc='left') for panel in figure.axes[::2]] == [
        'BraTS2020, whole volume',
        'BraTS2024, whole volume',
        'BraTS2024, lesion by lesion',
    ]
    dice = [[list(line.get_ydata()) for line in linesOf(panel, 'full')] for panel in figure.axes[::2]]
    assert dice == [[[0.9, 0.8], [0.5, 0.6]], [[0.7, 0.6], [0.1, 0]], [[0.35, 0.3], [0.05, 0]]]
    labels = [[text.get_text().split('\n')[0] for text in panel.get_xticklabels()] for panel in figure.axes[::2]]
    assert labels == [['WT', 'NCR'], ['WT', 'RC'], ['WT', 'RC']]
    lesions = figure.axes[-1]
    assert lesions.get_title().startswith('337 mm') and linesOf(lesions, 'empty')[0].get_ydata()[0] == 337
    figure.canvas.draw()
    one = pictures.plotScores(makeRules().query('rule == "BraTS2020"'))
    assert len(one.axes) == 2


def test_plots_refuseSeveralRulesInOneFigure():
    """Volumes and ranks of two challenges are not pooled."""
    for plot in (pictures.plotVolumes, lambda table: pictures.plotCases(table, {})):
        with pytest.raises(ValueError, match=r"rules BraTS2020, BraTS2024; one was expected, .*== 'BraTS2020'\]"):
            plot(makeRules())


def test_plotComparison_countsWhatHasNoScore():
    """A region that a patient's truth and both predictions lack has no score by 2026: the label says how many."""
    table = makeTable(ET=[np.nan, 0.4, 0.5])
    config.CONFIDENCE = 1 - 0.05 / 3
    figure = pictures.plotComparison(table, table)
    assert '1 without score' in figure.axes[0].get_xticklabels()[0].get_text()
    assert 'its 98.33% interval' in legendTexts(figure)[3]


def test_plotScores_countsWhatHasNoScoreBy2026():
    """By 2026 an empty region has no score: it is left out of the mean, and the label says of how many."""
    table = makeTable(WT=[0.9, 0.7], ET=[np.nan, 0.4], RC=[np.nan] * 2).assign(rule='BraTS2026')
    panel = pictures.plotScores(table).axes[0]
    texts = [text.get_text() for text in panel.get_xticklabels()]
    assert texts[0].startswith('WT\nmean 0.80') and 'without' not in texts[0]
    assert texts[1] == 'ET\nmean 0.40\n(0.40 to 0.40)\n1 without a score'
    assert texts[2] == 'RC\nnobody has a score\n2 without a score'
    assert 'no mean' in pictures.plotScores(table.assign(rule='BraTS2020')).axes[0].get_xticklabels()[1].get_text()


def test_plotScores_drawsInfiniteDistances():
    """An infinite HD95 is drawn at the penalty of the rule, which the title says, and there is no mean."""
    table = makeTable(WT=[0.9, 0.0]).assign(rule='BraTS2026')
    table['hd95'] = [3.0, np.inf]
    figure = pictures.plotScores(table)
    panel = figure.axes[1]
    assert panel.get_title() == 'infinite, drawn at 373 mm: no lesion was matched'
    assert list(linesOf(panel, 'full')[0].get_ydata()) == [3, 373]
    assert panel.get_xticklabels()[0].get_text() == 'WT\nthe mean is\ninfinite'
    figure.canvas.draw()


def test_plotComparison_pairsTheRulesByTheirNames():
    """The same scores with the rules in another order: no difference anywhere."""
    parts = [makeTable(WT=values).assign(rule=rule) for rule, values in (('A', [0.4, 0.5]), ('B', [0.8, 0.9]))]
    figure = pictures.plotComparison(pd.concat(parts), pd.concat(parts[::-1]))
    assert all(not np.any(line.get_ydata()) for panel in figure.axes for line in linesOf(panel, 'full'))


def test_plotComparison_showsTheDifferences():
    """Dots are the differences by color of their direction; mean, interval and counts are those of compare."""
    a, b = makeTable(WT=[0.5, 0.6, 0.7], ET=[0.1, 0.2, 0.3]), makeTable(WT=[0.6, 0.6, 0.5], ET=[0.1, 0.2, 0.3])
    figure = pictures.plotComparison(a, b, ('old', 'new'))
    dice, hd95 = figure.axes
    summary = compare(a, b)
    dots = [list(np.round(line.get_ydata(), 9)) for line in linesOf(dice, 'full')]
    assert dots == [[0.1], [0.0], [-0.2], [], [0, 0, 0], []]
    assert [list(np.round(line.get_ydata(), 9)) for line in linesOf(hd95, 'full')][:3] == [[-1], [0], [2]]
    colors = [[line.get_markerfacecolor() for line in linesOf(panel, 'full')][:3] for panel in figure.axes]
    assert colors[0] == colors[1] and len(set(colors[0])) == 3
    for score, panel in (('dice', dice), ('hd95', hd95)):
        mean, _, (bar,) = panel.containers[0]
        row = summary.loc[('WT', score)]
        assert mean.get_ydata() == [row['mean']]
        assert np.allclose(bar.get_segments()[0][:, 1], [row['low'], row['high']])
    text = dice.get_xticklabels()[0].get_text()
    assert text.startswith('WT\nmean -0.033\n-') and text.endswith('1 better\n1 worse\np = 1')
    assert hd95.get_ylim()[0] > 0 > hd95.get_ylim()[1]  # smaller distances are up
    assert hd95.get_ylim()[0] > 2 and dice.get_ylim()[0] < -0.2
    assert figure.get_suptitle().startswith('new compared with old: 3 patients (so few that')
    assert legendTexts(figure)[0] == 'a patient: new better'


def test_plotComparison_drawsEachRule():
    """Each rule has its rows, infinite differences lie beyond the others, and other tables are refused."""
    a = makeRules()
    b = a.assign(dice=a['dice'] + 0.05, hd95=a['hd95'].where(a.index != 0, np.inf))
    figure = pictures.plotComparison(a, b)
    assert len(figure.axes) == 6
    figure.canvas.draw()
    (worse,) = [line for line in linesOf(figure.axes[1], 'full')[:3] if len(line.get_ydata()) and line.get_ydata()[0]]
    assert np.isfinite(worse.get_ydata()).all() and worse.get_ydata()[0] < figure.axes[1].get_ylim()[0]
    assert [panel.get_title() for panel in figure.axes[:4]] == ['', 'infinite: beyond all others', '', '']
    with pytest.raises(ValueError, match='other patients'):
        pictures.plotComparison(a, b.replace('a', 'x'))
    with pytest.raises(ValueError, match='lacks the columns'):
        pictures.plotComparison(a, b.drop(columns='hd95'))
