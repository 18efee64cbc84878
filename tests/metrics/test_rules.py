"""Check what the rules of the years differ in, on cases counted by hand."""

import numpy as np
import pytest

import config
import metrics
from metrics.rules import RULES

SHAPE = (12, 12, 60)
SIX = ['WT', 'TC', 'ET', 'NETC', 'SNFH', 'RC']


def _volume(*boxes):
    """Return a volume of background with boxes; each is a class and three pairs (start, stop)."""
    volume = np.zeros(SHAPE, np.uint8)
    for value, *box in boxes:
        volume[tuple(slice(*ends) for ends in box)] = value
    return volume


def _cube(value, at, length=4):
    """Return a box of 4 x 4 x `length` voxels of a class that starts at `at` along the last axis."""
    return value, (4, 8), (4, 8), (at, at + length)


def _score(y, yhat, region, rule, **options):
    """Return Dice, HD95, false negatives and false positives of a region."""
    table = metrics.scoreLesions(y, yhat, rule=rule, **options)
    return table.loc[region, ['dice', 'hd95', 'missed', 'falsePositive']].tolist()


@pytest.mark.parametrize(
    ('rule', 'rows', 'more'),
    [
        ('BraTS2023', SIX[:3], []),
        ('BraTS2024', SIX, ['nsd0.5', 'nsd1.0']),
        ('BraTS2024-SSA', SIX[:3], ['nsd0.5', 'nsd1.0']),
        ('BraTS2026', SIX, ['nsd1.0']),
    ],
)
def test_scoreLesions_ofAPerfectPredictionByEachRule(rule, rows, more):
    """Rows and columns are those of the rule; any lesion compared with itself has Dice and NSD 1 and HD95 0."""
    y = _volume(_cube(1, 2), _cube(3, 6), _cube(2, 10), *[_cube(4, 40)] * (rule not in ('BraTS2023', 'BraTS2024-SSA')))
    table = metrics.scoreLesions(y, y, rule=rule)
    assert list(table.index) == rows
    names = ['dice', 'hd95', 'missed', 'falsePositive', *more]
    assert list(table.columns[: len(names)]) == names and (len(table.columns) > len(names)) == (rule == 'BraTS2026')
    assert table[names].to_numpy().tolist() == [[1, 0, 0, 0] + [1] * len(more)] * len(rows)


# 2024 and 2025: lesions are groups on both sides


@pytest.mark.parametrize(
    ('value', 'region', 'gap'), [(3, 'ET', 6), (2, 'SNFH', 6), (2, 'WT', 6), (1, 'NETC', 10), (4, 'RC', 10)]
)
def test_scoreLesions_of2024DilatesByTissue(value, region, gap):
    """Islands of ET, SNFH and WT are one lesion up to 6 voxels apart, of NETC and RC up to 10; farther they are two."""
    one, two = _volume(_cube(value, 10), _cube(value, 14 + gap)), _volume(_cube(value, 10), _cube(value, 15 + gap))
    yhat = _volume(_cube(value, 10))
    dice, _, missed, falsePositive = _score(one, yhat, region, 'BraTS2024')
    assert dice == pytest.approx(2 / 3) and (missed, falsePositive) == (0, 0)
    assert _score(two, yhat, region, 'BraTS2024') == [0.5, 337 / 2, 1, 0]


@pytest.mark.parametrize(('value', 'region', 'gap'), [(3, 'ET', 2), (1, 'NETC', 4)])
def test_scoreLesions_of2024ReachesAsFarAsItDilates(value, region, gap):
    """A prediction 2 voxels from a lesion of ET, 4 from one of NETC, matches it with Dice 0; one farther does not."""
    y = _volume(_cube(value, 10))
    dice, hd95, *counts = _score(y, _volume(_cube(value, 14 + gap)), region, 'BraTS2024')
    assert (dice, hd95, counts) == (0, gap + 4, [0, 0])
    assert _score(y, _volume(_cube(value, 15 + gap)), region, 'BraTS2024') == [0, 337, 1, 1]


def test_scoreLesions_of2024GroupsThePrediction():
    """Two predicted islands 6 voxels apart, far from any lesion, are one false positive in 2024 and two in 2023."""
    y = _volume(_cube(2, 4))
    yhat = _volume(_cube(2, 4), _cube(2, 30), _cube(2, 40))
    assert _score(y, yhat, 'WT', 'BraTS2024') == [1 / 2, 337 / 2, 0, 1]
    assert _score(y, yhat, 'WT', 'BraTS2023') == [1 / 3, pytest.approx(2 * 374 / 3), 0, 2]


@pytest.mark.parametrize(
    ('rule', 'value', 'region', 'removed', 'penalty'),
    [
        ('BraTS2024', 3, 'ET', 10, 337),
        ('BraTS2024', 2, 'SNFH', 20, 337),
        ('BraTS2024', 2, 'WT', 20, 337),
        ('BraTS2024-SSA', 3, 'ET', 50, 374),
        ('BraTS2024-SSA', 2, 'WT', 50, 374),
    ],
)
def test_scoreLesions_since2024RemovesSmallPredictions(rule, value, region, removed, penalty):
    """A predicted lesion of that many voxels is no false positive, whatever the spacing; with one more it is."""
    y, line = _volume(_cube(value, 50)), (value, (0, 1), (0, 1))
    small, large = y | _volume((*line, (0, removed))), y | _volume((*line, (0, min(removed, 40))))
    large[0, 1, : removed + 1 - min(removed, 40)] = value
    small[0, 0, 40:], small[0, 1, : max(removed - 40, 0)] = 0, value
    assert (small[:2] > 0).sum() == removed and (large[:2] > 0).sum() == removed + 1
    assert _score(y, small, region, rule, spacing=(3, 1, 1)) == [1, 0, 0, 0]
    assert _score(y, large, region, rule) == [0.5, penalty / 2, 0, 1]


def test_scoreLesions_of2024RemovesInEachRegionForItself():
    """15 predicted voxels of ET are a false positive of ET, and are removed from TC and WT."""
    yhat = _volume((3, (0, 1), (0, 1), (0, 15)))
    table = metrics.scoreLesions(_volume(), yhat, rule='BraTS2024')
    assert table.falsePositive.to_dict() == dict.fromkeys(SIX, 0) | {'ET': 1}
    assert table.loc['ET', 'hd95'] == 337 and (table.drop('ET').dice == 1).all()


@pytest.mark.parametrize(
    ('rule', 'value', 'region', 'dropped'),
    [('BraTS2024', 3, 'ET', 10), ('BraTS2024', 4, 'RC', 20), ('BraTS2024-SSA', 3, 'ET', 50)],
)
def test_scoreLesions_since2024DropsSmallTrueLesions(rule, value, region, dropped):
    """A true lesion of that many mm3 is not scored; one of a voxel more is, and so is one of larger voxels."""
    y = _volume((value, (0, 1), (0, 1), (0, dropped)))
    assert _score(y, _volume(), region, rule) == [1, 0, 0, 0]
    assert _score(y, _volume(), region, rule, spacing=(1, 1.1, 1))[2] == 1
    y[0, 0, dropped] = value
    assert _score(y, _volume(), region, rule)[2] == 1


# 2024 and 2025: lesions are merged by what they touch


def test_scoreLesions_of2024MergesBeforeItDrops():
    """Two necrotic lesions of 15 voxels that touch one enhancing lesion are one of 30, which is scored.

    Predicted ones, which are removed before, are merged too: two of 36 voxels are one false positive.
    """
    small = (1, (5, 8), (4, 9), (12, 13)), (1, (5, 8), (4, 9), (35, 36))
    large = (1, (5, 8), (4, 8), (12, 15)), (1, (5, 8), (4, 8), (33, 36))
    enhancing = (3, (4, 5), (4, 9), (10, 40))
    assert _score(_volume(*small), _volume(), 'NETC', 'BraTS2024') == [1, 0, 0, 0]
    assert _score(_volume(*small, enhancing), _volume(), 'NETC', 'BraTS2024') == [0, 337, 1, 0]
    assert _score(_volume(), _volume(*large), 'NETC', 'BraTS2024') == [0, 337, 0, 2]
    assert _score(_volume(), _volume(*large, enhancing), 'NETC', 'BraTS2024') == [0, 337, 0, 1]


def test_scoreLesions_of2024MergingIsNotTransitive():
    """Of three necrotic lesions, the second touches the enhancing lesions of the first and of the third.

    It goes to the lower-numbered of the two, so the third stays alone; and the two enhancing lesions stay two, because
    the first one's lowest neighbour is the first necrotic lesion, the second one's is the second.
    """
    enhancing = (3, (4, 5), (4, 8), (0, 21)), (3, (4, 5), (4, 8), (30, 60))
    necrotic = [(1, (5, 8), (4, 8), ends) for ends in ((2, 5), (19, 32), (50, 53))]
    y = _volume(*enhancing, *necrotic)
    assert metrics.scoreLesions(y, _volume(), rule='BraTS2024').missed.tolist() == [1, 1, 2, 2, 0, 0]
    assert metrics.scoreLesions(_volume(*necrotic), _volume(), rule='BraTS2024').loc['NETC', 'missed'] == 3


def test_scoreLesions_of2024MergesAcrossEdgesNotCorners():
    """Two necrotic lesions are one if the second touches the enhancing lesion across an edge, two across a corner."""
    common = (3, (4, 5), (4, 8), (0, 40)), (1, (5, 8), (4, 8), (2, 4))
    edge, corner = (1, (5, 8), (8, 12), (20, 23)), (1, (5, 8), (8, 12), (40, 43))
    assert _score(_volume(*common, edge), _volume(), 'NETC', 'BraTS2024')[2] == 1
    assert _score(_volume(*common, corner), _volume(), 'NETC', 'BraTS2024')[2] == 2


def test_scoreLesions_ofSSAMergesByNecrosis():
    """Two enhancing lesions that touch one necrotic lesion are one by the rule of BraTS-Africa, two by that of 2023."""
    y = _volume((1, (4, 5), (4, 8), (0, 40)), (3, (5, 9), (4, 8), (2, 8)), (3, (5, 9), (4, 8), (30, 36)))
    assert _score(y, _volume(), 'ET', 'BraTS2024-SSA')[2] == 1
    assert _score(y, _volume(), 'ET', 'BraTS2023')[2] == 2


def test_scoreLesions_of2024HasTheSurfaceDiceOfLesions():
    """Of a line of 40 voxels 25 are found: 25 of 40 surface voxels are within 0.5 mm, 26 within 1 mm; of 25 all are."""
    y, yhat = _volume((2, (4, 5), (4, 5), (10, 50))), _volume((2, (4, 5), (4, 5), (10, 35)))
    nsd = metrics.scoreLesions(y, yhat, rule='BraTS2024').loc['SNFH', ['nsd0.5', 'nsd1.0']].tolist()
    assert nsd == pytest.approx([(25 / 40 + 1) / 2, (26 / 40 + 1) / 2])
    missed = metrics.scoreLesions(y | _volume(_cube(2, 57, 3)), yhat, rule='BraTS2024').loc['SNFH']
    assert missed['nsd1.0'] == pytest.approx((26 / 40 + 1) / 4) and missed.missed == 1


# 2026: one-to-one


def test_scoreLesions_of2026PairsForTheLargestSum():
    """The best single pair, 32/46, would leave the others alone; 6/23 and 18/35 have the larger sum: two pairs."""
    y = _volume((2, (4, 5), (4, 5), (0, 20)), (2, (4, 5), (4, 5), (21, 30)))
    yhat = _volume((2, (4, 5), (4, 5), (4, 30)), (2, (4, 5), (4, 5), (0, 3)))
    row = metrics.scoreLesions(y, yhat, rule='BraTS2026').loc['WT']
    assert (row.found, row.missed, row.falsePositive) == (2, 0, 0)
    assert row.dice == pytest.approx((6 / 23 + 18 / 35) / 2)
    assert row.diceStd == pytest.approx((18 / 35 - 6 / 23) / 2)


def test_scoreLesions_of2026MeanCoversThePairs():
    """A missed lesion and two false positives change the counts and F1, not the means."""
    y = _volume(_cube(2, 4), _cube(2, 20))
    yhat = _volume(_cube(2, 4), (2, (0, 1), (0, 1), (30, 31)), (2, (0, 1), (0, 1), (40, 41)))
    row = metrics.scoreLesions(y, yhat, rule='BraTS2026').loc['WT']
    assert row[['dice', 'hd95', 'nsd1.0', 'diceStd', 'hd95Std', 'nsd1.0Std']].tolist() == [1, 0, 1, 0, 0, 0]
    assert (row.found, row.missed, row.falsePositive) == (1, 1, 2)
    assert (row.precision, row.sensitivity, row.f1, row.pq) == pytest.approx((1 / 3, 1 / 2, 1 / 2.5, 1 / 2.5))
    assert row.volumeMatched == pytest.approx(0.064)


def test_scoreLesions_of2026ASecondPartIsAFalsePositive():
    """Two predicted parts on one lesion: the larger is its pair, the other a false positive."""
    y, yhat = _volume(_cube(2, 4, 10)), _volume(_cube(2, 4, 6), _cube(2, 11, 3))
    row = metrics.scoreLesions(y, yhat, rule='BraTS2026').loc['WT']
    assert row.dice == pytest.approx(2 * 6 / (10 + 6)) and (row.found, row.missed, row.falsePositive) == (1, 0, 1)


def test_scoreLesions_of2026WithoutAPair():
    """Without a common voxel Dice and F1 are 0 and HD95 is infinite; without any lesion there is no score."""
    y, yhat = _volume(_cube(2, 4)), _volume(_cube(2, 8))
    for other, counts in ((yhat, [1, 1]), (_volume(), [1, 0])):
        row = metrics.scoreLesions(y, other, rule='BraTS2026').loc['WT']
        assert row[['dice', 'nsd1.0', 'f1', 'pq', 'missed', 'falsePositive']].tolist() == [0, 0, 0, 0, *counts]
        assert row.hd95 == np.inf and np.isnan(row[['diceStd', 'volumeMatched']].astype(float)).all()
    row = metrics.scoreLesions(y, yhat, rule='BraTS2026').loc['ET']
    assert row[['missed', 'falsePositive', 'found']].tolist() == [0, 0, 0]
    assert np.isnan(row[['dice', 'hd95', 'nsd1.0', 'f1', 'pq', 'precision', 'sensitivity']].astype(float)).all()


# The whole volume


@pytest.mark.parametrize(
    ('rule', 'penalty', 'rows', 'more'),
    [
        ('BraTS2020', 373.12866, ['WT', 'TC', 'ET', 'NCR', 'ED'], []),
        ('BraTS2023', 374, SIX[:3], []),
        ('BraTS2024', 337, SIX, ['nsd0.5', 'nsd1.0']),
        ('BraTS2024-SSA', 374, SIX[:3], ['nsd0.5', 'nsd1.0']),
        ('BraTS2026', 373, SIX, ['nsd0.5']),
    ],
)
def test_scorePatient_ofEmptyRegionsByEachRule(rule, penalty, rows, more):
    """A region in truth or prediction alone has Dice 0 and the penalty; in neither it is perfect, by 2026 no score."""
    y, yhat = _volume(_cube(3, 4)), _volume(_cube(2, 30))
    table = metrics.scorePatient(y, yhat, rule=rule)
    assert list(table.index) == rows and list(table.columns[7:]) == more
    names = ['dice', 'sensitivity', 'hd95', *more]
    for region in ('TC', 'ET'):
        assert table.loc[region, names].tolist() == [0, 0, penalty] + [0] * len(more)
    empty = metrics.scorePatient(_volume(), _volume(), rule=rule)
    best = [np.nan] * 4 if rule == 'BraTS2026' else [1, 1, 0] + [1] * len(more)
    np.testing.assert_array_equal(empty.loc['ET', names].astype(float), best)
    assert (empty.specificity == 1).all()


def test_scorePatient_of2024RemovesSmallPredictions():
    """20 predicted voxels of SNFH, which the truth lacks, are removed from SNFH and WT; 21 stay, volume included."""
    y, yhat = _volume(), _volume((2, (0, 1), (0, 1), (0, 20)))
    table = metrics.scorePatient(y, yhat, rule='BraTS2024')
    assert table.loc['SNFH', ['dice', 'hd95', 'volumePredicted']].tolist() == [1, 0, 0]
    yhat[0, 0, 20] = 2
    table = metrics.scorePatient(y, yhat, rule='BraTS2024')
    assert table.loc['SNFH', ['dice', 'hd95', 'volumePredicted']].tolist() == [0, 337, pytest.approx(0.021)]


def test_scorePatient_of2026NeedsACommonVoxel():
    """Two cubes side by side: 373 mm and NSD 0 by 2026, the measured distance by 2023."""
    y, yhat = _volume(_cube(2, 4)), _volume(_cube(2, 8))
    assert metrics.scorePatient(y, yhat, rule='BraTS2026').loc['WT', ['dice', 'hd95', 'nsd0.5']].tolist() == [0, 373, 0]
    assert metrics.scorePatient(y, yhat, rule='BraTS2023').loc['WT', 'hd95'] == 4


def test_scorePatient_hd95FollowsTheRule():
    """Of eleven voxels at 0 to 10 mm from the predicted one: 9.5 by 2020, 9.45 by 2026 (twelve distances pooled)."""
    y, yhat = np.full((1, 1, 11), 2), np.zeros((1, 1, 11), int)
    yhat[0, 0, 0] = 2
    found = [metrics.scorePatient(y, yhat, rule=rule).loc['WT', 'hd95'] for rule in ('BraTS2020', 'BraTS2026')]
    assert found == pytest.approx([9.5, 9.45])


@pytest.mark.parametrize('axis', [0, 1, 2])
@pytest.mark.parametrize('rule', [rule for rule in RULES if rule != 'BraTS2020'])
def test_scores_measureInMmAlongEachAxis(rule, axis):
    """A lesion found one voxel off has the spacing of that axis as HD95, lesion-wise and of the whole volume."""
    y = _volume((2, (3, 8), (3, 8), (10, 15)))
    yhat, spacing = np.roll(y, 1, axis), (2.0, 3.0, 5.0)
    assert metrics.scoreLesions(y, yhat, spacing, rule).loc['WT', 'hd95'] == pytest.approx(spacing[axis])
    assert metrics.scorePatient(y, yhat, spacing, rule).loc['WT', 'hd95'] == pytest.approx(spacing[axis])


def test_rules_refuseWhatTheyDoNotKnow():
    """Unknown rules, lesion-wise scores of 2020 and a cavity where the rule has none are errors that say what is."""
    with pytest.raises(ValueError, match="rule is 'BraTS2022'; there are scores by BraTS2020, BraTS2023, BraTS2024"):
        metrics.scorePatient(_volume(), _volume(), rule='BraTS2022')
    with pytest.raises(ValueError, match="rule is 'BraTS2020'; there are lesion-wise scores by BraTS2023, BraTS2024"):
        metrics.scoreLesions(_volume(), _volume(), rule='BraTS2020')
    cavity = _volume(_cube(4, 10))
    for rule in ('BraTS2020', 'BraTS2023', 'BraTS2024-SSA'):
        with pytest.raises(ValueError, match='y has values from 0 to 4; classes 0 to 3'):
            metrics.scorePatient(cavity, _volume(), rule=rule)
    with pytest.raises(ValueError, match='yhat has values from 0 to 5; classes 0 to 4'):
        metrics.scoreLesions(cavity, _volume(_cube(5, 10)), rule='BraTS2026')


def test_rules_takeThePenaltyOfConfig(monkeypatch):
    """The penalty stands in one place: what is set there counts for distances, regions and lesions; 337 is 2024's."""
    monkeypatch.setitem(config.HD95_EMPTY, 'surface-distance', 99.0)
    y, yhat = _volume(_cube(3, 4)), _volume()
    assert metrics.hausdorff95(y > 0, yhat > 0, rule='surface-distance') == 99
    assert metrics.scorePatient(y, yhat, rule='BraTS2023').loc['ET', 'hd95'] == 99
    assert metrics.scoreLesions(y, yhat, rule='BraTS2024-SSA').loc['ET', 'hd95'] == 99
    assert metrics.scoreLesions(y, yhat, rule='BraTS2024').loc['ET', 'hd95'] == 337
