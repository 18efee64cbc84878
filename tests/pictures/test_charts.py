import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import config
import pictures
from examples import legendTexts, linesOf, makeTable
from metrics import scorePatient, scoreTable, summarize

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


def test_plotCohort_drawsWithoutSegmentations():
    """A cohort without any segmentation is drawn."""
    figure = pictures.plotCohort(makeCohort().iloc[4:])
    assert figure.axes[1].get_title() == 'Volumes of 0 patients with a segmentation'
    figure.canvas.draw()


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


def test_plotCurves_marksTheDropsOfTheLearningRate():
    """A line marks the epoch whose rate is lower than that of the epoch before, and no other epoch."""
    history = pd.DataFrame({'epoch': range(1, 5), 'trainLoss': 1, 'valLoss': 1, 'learnRate': [1e-3, 1e-3, 5e-4, 5e-4]})
    panel = pictures.plotCurves(history).axes[0]
    assert [list(line.get_xdata()) for line in panel.lines[3:]] == [[3, 3]]
    assert [text.get_text() for text in panel.texts] == ['rate 0.0005']


def test_plotCurves_marksNoDropsOfASteadyDecay():
    """A rate that falls in every epoch is no event: no line is drawn."""
    history = pd.DataFrame({'epoch': range(1, 5), 'trainLoss': 1, 'valLoss': 1, 'learnRate': [1e-3, 8e-4, 5e-4, 1e-4]})
    assert len(pictures.plotCurves(history).axes[0].texts) == 0


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


def test_plotCurves_refusesNoEpochs():
    """An empty history and one without a column are refused."""
    empty = pd.DataFrame({'epoch': [], 'trainLoss': [], 'valLoss': []})
    for history in (empty, pd.DataFrame({'epoch': [1], 'trainLoss': [1]})):
        with pytest.raises(ValueError, match='history'):
            pictures.plotCurves(history)


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


def test_plotScores_takesLesionScores():
    """A table without volumes, like that of `scoreLesions`, has no hollow dots; empty masks are patients in it."""
    table = makeTable(WT=[0.9, 0.0]).drop(columns=['volumeTruth', 'volumePredicted'])
    table['hd95'] = [3.0, 374.0]
    panel = pictures.plotScores(table).axes[1]
    assert [text.get_text() for text in panel.texts] == ['1 patient']
    assert len(linesOf(panel, 'hollow')[0].get_ydata()) == 0


def test_plotScores_namesAMissingScore():
    """With a NaN among the scores the label says that there is no mean."""
    panel = pictures.plotScores(makeTable(WT=[0.9, np.nan])).axes[0]
    assert panel.get_xticklabels()[0].get_text() == 'WT\nno mean: a\nscore is missing'


@pytest.mark.parametrize('regions', [('WT', 'TC', 'ET'), ('WT', 'TC', 'ET', 'NCR', 'ED')])
def test_plotScores_textsLieOnTheFigure(regions):
    """The legend and the title above the panel of HD95 are not cut off, with few and with all regions."""
    table = makeTable(**{region: [0.9, 0.0] for region in regions})
    table.loc[1, 'hd95'] = EMPTY
    figure = pictures.plotScores(table)
    figure.canvas.draw()
    for text in (figure.axes[1].title, figure.legends[0]):
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1


def test_plotScores_layoutKeepsItsPanels():
    """Both panels keep more than a third of the figure's width though some rows of dots are empty."""
    figure = pictures.plotScores(makeTable(WT=[0.9, 0.8], TC=[0.9, 0.8], ET=[0.9, 0.8]))
    figure.canvas.draw()
    assert all(panel.get_position().width > 0.33 for panel in figure.axes)


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
    """Differences of 1, 2, 3 ml have the mean 2 and the limits 2 -+ 1.96 x 1, in the title and as lines."""
    table = makeTable(WT=[0.9] * 3)
    table['volumeTruth'], table['volumePredicted'] = [10, 20, 30], [11, 22, 33]
    panel = pictures.plotVolumes(table).axes[0]
    assert panel.get_title() == 'WT: mean difference +2 ml,\nlimits +0.04 to +3.96 ml'
    reach = [line.get_ydata() - line.get_xdata() for line in linesOf(panel, 'limit')]
    assert np.allclose(reach[0], 0.04) and np.allclose(reach[1], 3.96)
    assert panel.get_xscale() == 'linear'  # 10 to 33 ml is less than a factor of 30


def test_plotVolumes_ofOnePatient():
    """One patient has a difference and no limits of agreement."""
    table = makeTable(WT=[0.9]).assign(volumePredicted=3.0)
    panel = pictures.plotVolumes(table).axes[0]
    assert panel.get_title() == 'WT: difference +1 ml' and not linesOf(panel, 'limit')


def test_plotConfusion_showsFractionsOfEachRow():
    """Fractions are of the row (truth): 3 of 4, 1 of 4; a class absent in truth has none; counts are in k and M."""
    matrix = np.array([[2_999_000, 1000, 0, 0], [0, 0, 0, 0], [0, 1, 3, 0], [0, 0, 0, 34_500]])
    panel = pictures.plotConfusion(matrix).axes[0]
    fractions = panel.images[0].get_array().filled(np.nan)
    assert np.allclose(fractions[2], [0, 0.25, 0.75, 0]) and np.isnan(fractions[1]).all()
    assert panel.images[0].get_clim() == (0, 1)
    texts = np.array([text.get_text() for text in panel.texts]).reshape(4, 4)
    assert texts[0].tolist() == ['99.97%\n3 M', '0.03%\n1 k', '0.00%\n0', '0.00%\n0']
    assert texts[1].tolist() == ['none'] * 4
    assert texts[2].tolist() == ['0.00%\n0', '25.00%\n1', '75.00%\n3', '0.00%\n0']
    assert texts[3, 3] == '100.00%\n34.5 k'
    assert (panel.get_xlabel(), panel.get_ylabel()[:14]) == ('class in prediction', 'class in truth')
    columns = [(text.get_position(), text.get_text()) for text in panel.texts]
    assert ((1, 2), '25.00%\n1') in columns  # column, row


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


@pytest.mark.parametrize('plot', [pictures.plotScores, pictures.plotVolumes, pictures.plotCohort])
def test_plots_refuseAnEmptyTable(plot):
    """A table without rows and one that lacks a column are refused."""
    full = makeCohort() if plot is pictures.plotCohort else makeTable(WT=[1.0])
    for table in (full[:0], full.drop(columns=full.columns[1])):
        with pytest.raises(ValueError, match='expected'):
            plot(table)


def test_plots_drawOnePatient():
    """The scores of a single patient without tumor are drawn."""
    table = scoreTable({'p1': scorePatient(np.zeros((2, 3, 4), int), np.zeros((2, 3, 4), int))})
    for plot in (pictures.plotScores, pictures.plotVolumes):
        figure = plot(table)
        figure.canvas.draw()
        assert 'of 1 patient (' in figure.get_suptitle()
    assert [list(line.get_ydata()) for line in linesOf(figure.axes[0], 'hollow')] == [[0]]


@pytest.mark.parametrize('plot', [pictures.plotScores, pictures.plotVolumes])
def test_plots_warnOfFewerThanTenPatients(plot):
    """The title of nine patients, whatever the number of their regions, has a warning; that of ten has none."""
    few, enough = (makeTable(WT=[0.5] * count, ET=[0.5] * count) for count in (9, 10))
    assert 'of 9 patients (so few that the ' in plot(few).get_suptitle()
    assert plot(enough).get_suptitle().endswith('of 10 patients')
