"""Scores by several rules, and the differences of two models, are drawn as the tables have them."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import config
import pictures
from examples import legendTexts, linesOf, makeTable
from metrics import compare


@pytest.fixture(autouse=True)
def closeFigures():
    config.BOOTSTRAP_RESAMPLES = 200
    yield
    plt.close('all')


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
    with pytest.raises(ValueError, match='other patients'):
        pictures.plotComparison(a, b.replace('a', 'x'))
    with pytest.raises(ValueError, match='lacks the columns'):
        pictures.plotComparison(a, b.drop(columns='hd95'))
