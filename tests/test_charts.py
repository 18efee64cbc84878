import matplotlib

matplotlib.use('Agg')

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

import charts
import config
import reliability
from metrics import scorePatient, scoreTable, summarize
from smallparts import SmallTuning

MISS = 373.12866  # mm


@pytest.fixture(autouse=True)
def closeFigures():
    config.BOOTSTRAP_RESAMPLES = 200
    yield
    plt.close('all')


def makeTable(**dice):
    """Gives a table of `scoreTable`'s form: for each region, the Dice of patients a, b, c, ...; volumes of 2 ml."""
    rows = []
    for region, values in dice.items():
        for patient, value in zip('abcdefgh', values, strict=False):
            score = {'dice': value, 'hd95': 10 * (1 - value), 'volumeTruth': 2.0, 'volumePredicted': 2.0}
            rows.append({'patient': patient, 'region': region, **score})
    return pd.DataFrame(rows)


def linesOf(panel, label):
    return [line for line in panel.lines if line.get_label() == label]


def legendTexts(owner):
    legend = owner.legends[0] if hasattr(owner, 'legends') else owner.get_legend()
    return [text.get_text() for text in legend.get_texts()]


def makeCohort():
    """Gives five patients of four persons: HGG, HGG, LGG of 2020, two of 2021; one without ET, one without seg."""
    volumes = [[1, 2, 3], [4, 5, 6], [0, 8, 0], [10, 20, 30], [np.nan] * 3]
    table = pd.DataFrame(volumes, list('abcde'), config.CLASS_NAMES[1:])
    table.insert(0, 'edition', ['BraTS2020'] * 3 + ['BraTS2021'] * 2)
    table.insert(1, 'grade', ['HGG', 'HGG', 'LGG', 'unknown', 'unknown'])
    table.insert(2, 'person', list('abcdd'))
    return table


def makeReliability(predicted, observed, count=1000):
    """Gives probability (1, 4, 1, n) and y: class 3 has each predicted probability in `count` voxels, the rest is 0's.

    Of each, the share `observed` has class 3 in truth.
    """
    values = np.repeat(predicted, count)
    y = np.concatenate([np.arange(count) < round(share * count) for share in observed]) * 3
    probability = np.zeros((1, 4, 1, len(values)))
    probability[0, 3, 0], probability[0, 0, 0] = values, 1 - values
    return probability, y[None, None]


def makeTuning():
    curve = pd.DataFrame(
        [
            ['ml', 0.0, 0.5, 0, 0],
            ['ml', 0.0015, 0.75, 2, 0],
            ['ml', 2.5, 0.25, 1, 3],
            ['N', 0, 0.6, 0, 0],
            ['N', 11, 0.8, 2, 1],
            ['N', 200, 0.7, 2, 3],
        ],
        columns=['rule', 'value', 'score', 'gained', 'lost'],
    )
    return SmallTuning(N=11, ml=0.0015, curve=curve, withoutET=5, carriedBy=2, lost=1)


def test_plotCohort_countsEditionsAndGrades():
    """The bars of the two editions are 2 HGG + 1 LGG and 2 unknown, with 3 and 2 at their ends."""
    bars = charts.plotCohort(makeCohort()).axes[0]
    widths = {drawn.get_label(): [bar.get_width() for bar in drawn] for drawn in bars.containers}
    assert widths == {'grade HGG': [2, 0], 'grade LGG': [1, 0], 'grade unknown': [0, 2]}
    assert [bar.get_x() for bar in bars.containers[1]] == [2, 0]  # LGG stands behind HGG
    assert [text.get_text() for text in bars.texts if text.get_text()][-2:] == ['3', '2']
    assert [text.get_text() for text in bars.get_yticklabels()] == ['BraTS2020', 'BraTS2021']


def test_plotCohort_showsEveryVolumeAndNone():
    """Every volume is a dot, a zero a hollow one within the axis; the missing segmentation and ET are in the title."""
    figure = charts.plotCohort(makeCohort())
    panel = figure.axes[1]
    full, hollow = linesOf(panel, 'full'), linesOf(panel, 'hollow')
    assert [sorted(line.get_ydata()) for line in full] == [[1, 4, 10], [2, 5, 8, 20], [3, 6, 30]]
    assert [list(line.get_ydata()) for line in hollow] == [[0], [], [0]]
    assert panel.get_ylim()[0] < 0 and panel.get_yscale() == 'symlog'
    ticks = [text.get_text() for text in panel.get_xticklabels()]
    assert ticks == ['necrotic core\n1 have none', 'edema\n0 have none', 'enhancing tumor\n1 have none']
    expected = '5 patients (4 persons): 1 without a segmentation, 1 of the others without enhancing tumor'
    assert figure.get_suptitle() == expected


def test_plotCohort_drawsWithoutSegmentations():
    """A cohort that has no segmentation at all is drawn."""
    figure = charts.plotCohort(makeCohort().iloc[4:])
    assert figure.axes[1].get_title() == 'Volumes of 0 patients with a segmentation'
    figure.canvas.draw()


def test_plotScores_dotsAreTheTable():
    """Each patient's Dice and HD95 is a dot of its region, WT, TC and ET in one color, NCR and ED in another."""
    dice = {'WT': [0.9, 0.8, 0.9], 'TC': [0.7, 0.6, 0.5], 'ET': [0.1, 0.2, 0.4], 'NCR': [0.3] * 3, 'ED': [0, 1, 0.5]}
    figure = charts.plotScores(makeTable(**dice))
    left, right = figure.axes
    assert [list(line.get_ydata()) for line in linesOf(left, 'full')] == list(dice.values())
    expected = [[10 * (1 - value) for value in values] for values in dice.values()]
    assert [list(line.get_ydata()) for line in linesOf(right, 'full')] == expected
    assert [np.round(line.get_xdata().mean(), 9) for line in linesOf(left, 'full')] == [0, 1, 2, 3, 4]
    assert len(set(zip(*linesOf(left, 'full')[0].get_data(), strict=True))) == 3  # equal dots lie side by side
    colors = [line.get_markerfacecolor() for line in linesOf(left, 'full')]
    assert colors == [colors[0]] * 3 + [colors[3]] * 2 and colors[0] != colors[3]
    assert figure.get_suptitle() == 'Scores of 3 patients'


def test_plotScores_meanAndIntervalAreThoseOfSummarize():
    """Mean, both ends of the interval and median of every region and score are where summarize says."""
    table = makeTable(WT=[0.9, 0.8, 0.3, 0.5], ET=[0.7, 0.1, 0.0, 0.2])
    summary = summarize(table)
    for score, panel in zip(('dice', 'hd95'), charts.plotScores(table).axes, strict=True):
        for place, region in enumerate(('WT', 'ET')):
            row = summary.loc[(region, score)]
            mean, _, (bar,) = panel.containers[place]
            assert mean.get_ydata() == [row['mean']]
            assert np.allclose(bar.get_segments()[0][:, 1], [row['low'], row['high']])
            assert list(linesOf(panel, 'median')[place].get_ydata()) == [row['median']] * 2
    assert charts.plotScores(table).axes[0].get_xticklabels()[1].get_text().startswith('ET\nmean 0.25\n(')


def test_plotScores_marksAnEmptyMask():
    """HD95 of 373 lies on a marked line within the axis: one missed, one invented; without any there is no line."""
    table = makeTable(WT=[0.9, 0.8, 0.7], ET=[0.9, 0.0, 0.0])
    plain = charts.plotScores(table).axes[1]
    assert not linesOf(plain, 'empty') and not plain.get_title()
    table.loc[4:, 'hd95'] = MISS
    table.loc[4, 'volumePredicted'] = table.loc[5, 'volumeTruth'] = 0
    left, right = charts.plotScores(table).axes
    (line,) = linesOf(right, 'empty')
    assert line.get_ydata()[0] == MISS < right.get_ylim()[1]
    assert right.get_title().startswith('at 373 mm')
    assert [text.get_text() for text in right.texts] == ['1 missed\n1 invented']
    for panel, values in ((left, [0]), (right, [MISS])):
        assert [list(dots.get_ydata()) for dots in linesOf(panel, 'hollow')] == [[], values]
    assert linesOf(right, 'hollow')[1].get_markerfacecolor() == 'white'


def test_plotScores_takesLesionScores():
    """A table without volumes, as of scoreLesions, has no hollow dots and does not claim what was missed."""
    table = makeTable(WT=[0.9, 0.0]).drop(columns=['volumeTruth', 'volumePredicted'])
    table['hd95'] = [3.0, 374.0]
    panel = charts.plotScores(table).axes[1]
    assert [text.get_text() for text in panel.texts] == ['1 patients']
    assert len(linesOf(panel, 'hollow')[0].get_ydata()) == 0


def test_plotScores_saysThatAScoreIsMissing():
    """A NaN has no dot and makes the mean undefined, in words."""
    panel = charts.plotScores(makeTable(WT=[0.9, np.nan])).axes[0]
    assert panel.get_xticklabels()[0].get_text() == 'WT\nno mean: a\nscore is missing'


def test_plotScores_layoutKeepsItsPanels():
    """Both panels keep more than a third of the figure's width: an empty row of dots does not collapse the layout."""
    figure = charts.plotScores(makeTable(WT=[0.9, 0.8], TC=[0.9, 0.8], ET=[0.9, 0.8]))
    figure.canvas.draw()
    assert all(panel.get_position().width > 0.33 for panel in figure.axes)


def makePrediction(number):
    """Gives x, y, yhat of a patient: a tumor of `number` pixels in slice 1 in truth, of class 3, and in prediction."""
    x, y = torch.full((3, 3, 12, 12), -1.0), torch.zeros(3, 12, 12, dtype=torch.int64)
    x[:, :, 2:10, 2:10] = torch.linspace(0, 1, 8)
    y[1, 3 : 3 + number, 4] = 3
    return x, y, torch.where(y == 3, 2, 0)


def test_plotCases_findsBestMedianAndWorst():
    """Of five, those of mean Dice 0.8, 0.5 and 0.2 are shown in this order, and only they are predicted."""
    table = makeTable(WT=[0.5, 0.9, 0.1, 0.6, 0.4], TC=[0.5, 0.8, 0.2, 0.6, 0.4], ET=[0.5, 0.7, 0.3, 0.6, 0.4])
    asked = []
    figure = charts.plotCases(
        table, lambda patient: asked.append(patient) or makePrediction('abcde'.index(patient) + 1)
    )
    assert asked == ['b', 'a', 'c']
    texts = [panel.texts[0].get_text() for panel in figure.axes[::3]]
    assert texts[0] == 'best:\nb\n\nDice\nWT  0.900\nTC  0.800\nET  0.700\nmean  0.800\n\naxial slice 1'
    assert texts[1].startswith('median:\na\n') and texts[2].startswith('worst:\nc\n')


def test_plotCases_showsTruthBesidePrediction():
    """The middle panel of a row has the truth's classes, the right one the prediction's, over the same image."""
    table = makeTable(WT=[0.9, 0.1], TC=[0.9, 0.1], ET=[0.9, 0.1])
    figure = charts.plotCases(table, {'a': makePrediction(2), 'b': (*makePrediction(5), 'probability')})
    truth, prediction = (panel.images[1].get_array() for panel in figure.axes[4:6])  # of b, the worst
    assert (truth.compressed().tolist(), prediction.compressed().tolist()) == ([3] * 5, [2] * 5)
    assert [panel.get_title() for panel in figure.axes[1:3]] == ['truth over flair', 'prediction over flair']
    assert np.array_equal(figure.axes[4].images[0].get_array(), figure.axes[5].images[0].get_array())
    assert legendTexts(figure) == list(config.CLASS_NAMES[1:])
    assert len(figure.axes) == 6  # of two patients none is the median


def test_plotCases_ofOnePatient():
    """A single patient is one row, and not called best or worst."""
    figure = charts.plotCases(makeTable(WT=[0.9], TC=[0.9], ET=[0.9]), {'a': makePrediction(2)})
    assert figure.axes[0].texts[0].get_text().startswith('the only patient:\na\n')


def test_plotCases_refusesATableWithoutItsRegions():
    """A table that lacks ET ranks nobody."""
    with pytest.raises(ValueError, match='No patient'):
        charts.plotCases(makeTable(WT=[0.9], TC=[0.9]), {})


def test_plotConfusion_sharesOfEachRow():
    """Shares are of the row (truth): 3 of 4, 1 of 4; a class that truth lacks has none; counts in k and M."""
    joint = np.array([[2_999_000, 1000, 0, 0], [0, 0, 0, 0], [0, 1, 3, 0], [0, 0, 0, 34_500]])
    panel = reliability.plotConfusion(joint).axes[0]
    shares = panel.images[0].get_array().filled(np.nan)
    assert np.allclose(shares[2], [0, 0.25, 0.75, 0]) and np.isnan(shares[1]).all()
    assert panel.images[0].get_clim() == (0, 1)
    texts = np.array([text.get_text() for text in panel.texts]).reshape(4, 4)
    assert texts[0].tolist() == ['>99.9 %\n3.00 M', '<0.1 %\n1.00 k', '0.0 %\n0', '0.0 %\n0']
    assert texts[1].tolist() == ['none'] * 4
    assert texts[2].tolist() == ['0.0 %\n0', '25.0 %\n1', '75.0 %\n3', '0.0 %\n0']
    assert texts[3, 3] == '100.0 %\n34.5 k'
    assert (panel.get_xlabel(), panel.get_ylabel()[:14]) == ('class in prediction', 'class in truth')
    columns = [(text.get_position(), text.get_text()) for text in panel.texts]
    assert ((1, 2), '25.0 %\n1') in columns  # column, row


def test_plotConfusion_sumsPatients():
    """Two patients' counts are summed, and counted in the title."""
    figure = reliability.plotConfusion([np.eye(4, dtype=int) * 2, np.ones((4, 4), int)])
    assert figure.axes[0].texts[0].get_text() == '50.0 %\n3'
    assert figure.axes[0].get_title() == 'Confusion of the classes, 24 voxels of 2 patients'


@pytest.mark.parametrize('joint', [np.zeros((4, 4)), np.ones((3, 3)), -np.eye(4)])
def test_plotConfusion_refusesOtherCounts(joint):
    """No voxel, another shape and a negative count are refused."""
    with pytest.raises(ValueError, match='expected'):
        reliability.plotConfusion(joint)


def test_plotVolumes_showsZeros():
    """A zero in truth or prediction is a hollow dot within the axes, which are logarithmic above 0."""
    table = makeTable(ET=[0.9] * 4)
    table['volumeTruth'], table['volumePredicted'] = [0, 5, 40, 0], [0.2, 0, 50, 0]
    panel = charts.plotVolumes(table).axes[0]
    (full,), (hollow,) = linesOf(panel, 'full'), linesOf(panel, 'hollow')
    assert [list(values) for values in full.get_data()] == [[40], [50]]
    assert [list(values) for values in hollow.get_data()] == [[0, 5, 0], [0.2, 0, 0]]
    assert (panel.get_xscale(), panel.get_yscale()) == ('symlog', 'symlog')
    assert panel.get_xlim()[0] < 0 and panel.get_xlim() == panel.get_ylim()
    assert panel.get_xlim()[1] > 50
    (identity,) = linesOf(panel, 'identity')
    assert np.array_equal(identity.get_xdata(), identity.get_ydata()) and identity.get_xdata()[0] == 0


def test_plotVolumes_saysTheAgreement():
    """Differences of 1, 2, 3 ml: mean 2, limits 2 -+ 1.96 x 1, in words and as lines."""
    table = makeTable(WT=[0.9] * 3)
    table['volumeTruth'], table['volumePredicted'] = [10, 20, 30], [11, 22, 33]
    panel = charts.plotVolumes(table).axes[0]
    assert panel.get_title() == 'WT: mean difference +2 ml,\nlimits +0.04 to +3.96 ml'
    reach = [line.get_ydata() - line.get_xdata() for line in linesOf(panel, 'limit')]
    assert np.allclose(reach[0], 0.04) and np.allclose(reach[1], 3.96)
    assert panel.get_xscale() == 'linear'  # 10 to 33 ml is less than a factor of 30


def test_plotVolumes_ofOnePatient():
    """One patient has a difference and no limits."""
    table = makeTable(WT=[0.9]).assign(volumePredicted=3.0)
    panel = charts.plotVolumes(table).axes[0]
    assert panel.get_title() == 'WT: difference +1 ml' and not linesOf(panel, 'limit')


def test_countReliability_countsByHand():
    """Six voxels: 0.05 and 0.1 (bin 1, since it holds its lower end), 1 in the last bin, two certain ones aside."""
    values = np.array([0.05, 0.1, 0.1, 1.0, 0.0, 0.0])  # of class 3
    probability = np.zeros((1, 4, 2, 3))
    probability[0, 3] = values.reshape(2, 3)
    probability[0, 0] = 1 - probability[0, 3]
    counts = reliability.countReliability(probability, np.array([[[0, 3, 0], [3, 3, 2]]]))
    assert counts.shape == (3, 3, 11)
    assert counts[0, 2].tolist() == [1, 2, 0, 0, 0, 0, 0, 0, 0, 1, 2]
    assert np.allclose(counts[1, 2], [0.05, 0.2, 0, 0, 0, 0, 0, 0, 0, 1, 0])
    assert counts[2, 2].tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1]
    assert counts[0, 0].tolist() == [4] + [0] * 9 + [2]
    assert counts[2, 1].tolist() == [0] * 10 + [1]  # the edema, certainly missed


def test_countReliability_addsUp():
    """The counts of two halves add up to the whole's, for tensors of single precision too."""
    generator = torch.Generator().manual_seed(0)
    probability = torch.randn(4, 4, 5, 6, generator=generator).mul(3).softmax(1)
    y = torch.randint(0, 4, (4, 5, 6), generator=generator)
    whole = reliability.countReliability(probability, y)
    halves = reliability.countReliability(probability[:2], y[:2]) + reliability.countReliability(probability[2:], y[2:])
    assert np.allclose(whole, halves) and np.array_equal(whole[0], halves[0])
    assert whole[0].sum(1).tolist() == [120] * 3
    assert whole[2].sum(1).tolist() == [(y == number).sum() for number in (1, 2, 3)]


def test_countReliability_refusesWhatIsNoProbability():
    """Logits, NaN and shapes that do not belong together are refused."""
    y = np.zeros((1, 2, 2), int)
    for probability in (np.full((1, 4, 2, 2), 3.0), np.full((1, 4, 2, 2), np.nan)):
        with pytest.raises(ValueError, match='not probabilities'):
            reliability.countReliability(probability, y)
    with pytest.raises(ValueError, match='expected'):
        reliability.countReliability(np.full((1, 3, 2, 2), 1 / 3), y)


def test_plotReliability_calibratedLiesOnTheDiagonal():
    """Where 1 in 4 of the voxels given 0.25, and 3 in 4 of those given 0.75, have the class, the ECE is 0."""
    counts = reliability.countReliability(*makeReliability([0.25, 0.75], [0.25, 0.75]))
    panel, below = reliability.plotReliability(counts).axes
    dots = panel.lines[3]
    assert np.allclose(dots.get_data(), [[0.25, 0.75], [0.25, 0.75]])
    assert legendTexts(panel)[3] == 'enhancing tumor, ECE 0.000'
    assert [bar.get_height() for bar in below.containers[2]] == [0, 0, 1000, 0, 0, 0, 0, 1000, 0, 0]


def test_plotReliability_overconfidentLiesBelow():
    """1000 voxels given 0.9 of which 600 have the class, 1000 given 0.5 of which 400: ECE (0.3 + 0.1) / 2."""
    probability, y = makeReliability([0.9, 0.5], [0.6, 0.4])
    patient = reliability.countReliability(probability, y)
    panel = reliability.plotReliability([patient, patient]).axes[0]
    assert np.allclose(panel.lines[3].get_data(), [[0.5, 0.9], [0.4, 0.6]])
    assert legendTexts(panel)[3] == 'enhancing tumor, ECE 0.200'
    assert panel.get_title() == 'Reliability of the probabilities of 2 patients'


def test_plotReliability_saysWhatIsLeftOut():
    """1000 of 2000 voxels are certain, and hold 100 of the 600 of the tumor: the label says so, the ECE does not."""
    counts = reliability.countReliability(*makeReliability([0.0, 0.5], [0.1, 0.5]))
    panel, below = reliability.plotReliability(counts).axes
    assert 'background above 0.999, 50.0 % of all voxels\n(they hold 16.7 % of the true tumor)' in below.get_xlabel()
    assert legendTexts(panel)[3] == 'enhancing tumor, ECE 0.000'


def test_plotReliability_refusesNoVoxel():
    """Counts without a voxel that is not certain, or of another shape, are refused."""
    for counts in (np.zeros((3, 3, 11)), np.ones((3, 11))):
        with pytest.raises(ValueError, match='expected'):
            reliability.plotReliability(counts)


def test_plotTuning_marksTheBest():
    """Best ml and N are marked at their scores, with the scores before; the curve holds up to the next value."""
    volumes, numbers, _, _ = charts.plotTuning(makeTuning()).axes
    for panel, expected in ((volumes, (0.0015, 0.75)), (numbers, (11, 0.8))):
        (best,) = (line for line in panel.lines if line.get_marker() == 'D')
        assert (best.get_xdata()[0], best.get_ydata()[0]) == expected
    assert legendTexts(volumes)[1:] == ['without the rule: 0.500', 'best: 0.0015 ml, 0.750']
    assert legendTexts(numbers)[1:] == ['without the rule: 0.600', 'best: N = 11, 0.800']
    curve = numbers.lines[0]
    assert list(curve.get_xdata()[:3]) == [0, 11, 200] and curve.get_drawstyle() == 'steps-post'
    assert list(curve.get_ydata()) == [0.6, 0.8, 0.7, 0.7]


def test_plotTuning_saysWhoGains():
    """The patients without ET who carry the gain are in the title, gains and losses at each size below."""
    _, numbers, _, below = charts.plotTuning(makeTuning()).axes
    assert numbers.get_title() == 'At the best N, 2 of 5 patients without ET gain; 1 with ET lose'
    assert [list(line.get_ydata()) for line in below.lines[:2]] == [[0, 2, 2, 2], [0, 1, 3, 3]]
    assert legendTexts(below) == ['gain', 'lose']


def test_plotTuning_whereNothingHelps():
    """A curve of the value 0 alone, as of patients without any prediction, is drawn."""
    result = makeTuning()
    result = result._replace(N=0, ml=0.0, curve=result.curve[result.curve['value'] == 0])
    figure = charts.plotTuning(result)
    figure.canvas.draw()
    assert legendTexts(figure.axes[1])[2] == 'best: N = 0, 0.600'
    with pytest.raises(ValueError, match='no curve'):
        charts.plotTuning(result._replace(curve=result.curve[:0]))


@pytest.mark.parametrize('plot', [charts.plotScores, charts.plotVolumes, charts.plotCohort])
def test_plots_refuseAnEmptyTable(plot):
    """Neither a table without rows nor one without its columns is drawn."""
    full = makeCohort() if plot is charts.plotCohort else makeTable(WT=[1.0])
    for table in (full[:0], full.drop(columns=full.columns[1])):
        with pytest.raises(ValueError, match='table'):
            plot(table)


def test_plots_takeOnePatientOfScorePatient():
    """The table of one patient without any tumor, as scorePatient and scoreTable give it, is drawn."""
    table = scoreTable({'p1': scorePatient(np.zeros((2, 3, 4), int), np.zeros((2, 3, 4), int))})
    for plot in (charts.plotScores, charts.plotVolumes):
        figure = plot(table)
        figure.canvas.draw()
        assert figure.get_suptitle().endswith('of 1 patient')
    assert [list(line.get_ydata()) for line in linesOf(figure.axes[0], 'hollow')] == [[0]]
