"""Estimated quality: measures by hand, a fit that is known, and its honesty on patients that it has not seen."""

import json
import os

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

import config
import engine
import phantom
import pictures
import postprocess
import utils
from postprocess import quality


def makePart(classes, certainty=1.0):
    """Return probabilities (1, 4, 1, n) that give each of n voxels its class with a certainty."""
    part = torch.full((1, 4, 1, len(classes)), (1 - certainty) / 3)
    for place, number in enumerate(classes):
        part[0, number, 0, place] = certainty
    return part


def test_measureMember_isHandCounted():
    """Planes 0 2 2 0 and 0 0 2 2 of edema: Dice 1/2, volumes 2 and 2; where they agree the entropy is 0."""
    parts = [makePart([0, 2, 2, 0]), makePart([0, 0, 2, 2])]
    measured = quality.measureMember(parts)
    row = quality.describeDisagreement([measured], measured['classes']).loc['ED']
    assert row[['members', 'planes', 'planeDice', 'planeSpread']].tolist() == [1, 2, 0.5, 0]
    assert row[['memberDice', 'memberSpread']].isna().all()
    # the mean gives the class 2 to the voxel where both agree, and 1/2 to two where classes tie
    inside = measured['classes'].ravel() == 2
    assert row['entropy'] == pytest.approx((inside.sum() - 1) / inside.sum())
    assert row['voxels'] == inside.sum()


def test_measureMember_entropyIsThatOfTheRegion():
    """Probabilities .5 of NCR and .25 of ET: the core has .75, the whole tumor .75, NCR .5 bits of entropy 1."""
    part = torch.tensor([0.25, 0.5, 0.0, 0.25]).view(1, 4, 1, 1)
    entropy = quality.measureMember([part])['entropy']
    bits = -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25))
    assert entropy['WT'] == pytest.approx(bits) and entropy['TC'] == pytest.approx(bits)
    assert entropy['NCR'] == pytest.approx(1) and np.isnan(entropy['ET']) and np.isnan(entropy['ED'])


def test_describeDisagreement_comparesMembers():
    """Members 0 3 3 3 and 3 3 0 0: Dice 2/5, volumes 3 and 2 of mean 2.5; both empty is 1 and 0; one plane has none."""
    measured = [quality.measureMember([makePart(classes)]) for classes in ([0, 3, 3, 3], [3, 3, 0, 0])]
    table = quality.describeDisagreement(measured, np.zeros((1, 1, 4), int))
    row = table.loc['ET']
    assert row[['memberDice', 'memberSpread', 'voxels']].tolist() == pytest.approx([2 / 5, 0.5 / 2.5, 0])
    assert np.isnan(row['planeDice']) and np.isnan(row['planeSpread']) and row['planes'] == 1
    assert table.loc['NCR', ['memberDice', 'memberSpread']].tolist() == [1, 0]
    assert quality.describeDisagreement([], np.zeros((1, 1, 4), int))['members'].eq(0).all()


ONE_SUBJECT = [f'BraTS-GLI-00001-{100 + scan}' for scan in range(30)]


def makeTables(numPatients=30, noise=0.02, slope=0.8, **columns):
    """Return disagreement and scores of patients whose Dice is .95 - slope x (1 - planeDice) + noise."""
    generator = np.random.default_rng(0)
    agreement = generator.uniform(0.2, 1, numPatients)
    table = pd.DataFrame({'patient': [f'p{number:02}' for number in range(numPatients)], 'region': 'WT'})
    table = table.assign(members=1, planes=3, voxels=9, planeDice=agreement, planeSpread=0.0, entropy=0.1)
    table = table.assign(**{'memberDice': np.nan, 'memberSpread': np.nan, **columns})
    dice = np.clip(0.95 - slope * (1 - agreement) + noise * generator.normal(size=numPatients), 0, 1)
    return table, table[['patient', 'region']].assign(dice=dice)


def test_fitQuality_findsTheLine():
    """Without noise the fit is the line itself and its interval has no width; the Dice of the members is not used."""
    table, scores = makeTables(noise=0)
    fit = quality.fitQuality(table, scores)
    own = fit['regions']['WT']
    assert own['measures'] == ['planeDice', 'planeSpread', 'entropy'] and own['patients'] == 30
    assert own['slopes'][0] == pytest.approx(0.8) and own['reach'] == pytest.approx(0, abs=1e-9)
    found = quality.predictQuality(table.assign(planeDice=0.5, members=5), fit)
    assert found['predictedDice'].to_numpy() == pytest.approx(0.55) and found['isFlagged'].all()
    assert found['reason'].eq('estimated Dice below 0.7').all()


def test_fitQuality_slopesAreNeverNegative():
    """Where the Dice is higher for more disagreement, the slopes are 0 and the estimate is the mean."""
    table, scores = makeTables(slope=-0.05)
    fit = quality.fitQuality(table, scores)['regions']['WT']
    assert fit['slopes'] == [0, 0, 0] and fit['intercept'] == pytest.approx(scores['dice'].mean())


def test_fitQuality_reachIsTheQuantileOfErrorsWithoutThePatient():
    """Of 19 patients, whose Dice no measure tells, the reach is the 18th relative error by hand; of eight, any Dice."""
    table, scores = makeTables(19)
    table['planeDice'] = 1.0
    scores['dice'] = np.linspace(0, 1, 19)
    estimates = (scores['dice'].sum() - scores['dice']) / 18  # the mean of the others
    errors = np.abs(scores['dice'] - estimates) / (1.05 - estimates)
    fit = quality.fitQuality(table, scores)['regions']['WT']
    assert fit['reach'] == pytest.approx(np.sort(errors)[17])  # ceil(20 x 0.9) = 18
    few = quality.fitQuality(table[:8], scores)['regions']['WT']
    assert few['reach'] == 20  # nine are needed for 90 %: 20 x .05 is any Dice
    found = quality.predictQuality(table, {'planes': 3, 'regions': {'WT': few}})
    assert found[['low', 'high']].eq([0, 1]).all(axis=None)


def test_crossFit_coversAndRanksUnseenPatients():
    """On 200 patients the intervals hold nine tenths of the unseen ones, and a patient never helps its own estimate."""
    table, scores = makeTables(200, 0.05)
    crossed = quality.crossFit(table, scores)
    row = quality.summarizeQuality(crossed).loc['WT']
    assert 0.84 < row['coverage'] < 0.96 and row['spearman'] > 0.9 and row['patients'] == 200
    isFailure = scores['dice'] < 0.7
    assert row['failures'] == isFailure.sum() and row['caught'] > 0.9 * row['failures']
    changed = scores.assign(dice=np.where(scores['patient'] == 'p07', 0.0, scores['dice']))
    again = quality.crossFit(table, changed).set_index('patient')['predictedDice']
    assert again['p07'] == crossed.set_index('patient')['predictedDice']['p07']


def test_crossFit_leavesOutOtherScansOfTheSubject():
    """Two time points of a subject are estimated by the same fit, which has seen neither."""
    table, scores = makeTables(8, 0.05)
    for each in (table, scores):
        each['patient'] = [f'BraTS-GLI-{number // 2:05}-{100 + number % 2}' for number in range(8)]
    crossed = quality.crossFit(table, scores)
    changed = scores.assign(dice=np.where(scores.index == 1, 0.0, scores['dice']))
    assert quality.crossFit(table, changed)['predictedDice'][0] == crossed['predictedDice'][0]


def test_findSuspiciousTruth_listsSureFailures():
    """A patient with Dice .3 on whom all planes agree is listed; one with .3 on whom they do not is not."""
    table, scores = makeTables(40)
    scores.loc[[3, 5], 'dice'] = 0.31
    table.loc[3, 'planeDice'], table.loc[5, 'planeDice'] = 0.99, 0.2
    found = quality.findSuspiciousTruth(quality.crossFit(table, scores))
    assert found['patient'].iloc[0] == 'p03' and 'p05' not in set(found['patient'])
    assert found['gap'].iloc[0] > 0.5 and found['gap'].is_monotonic_decreasing


def test_predictQuality_flagsEmptyPredictions():
    """A region without a predicted voxel has no estimate and is flagged with the reason."""
    table, scores = makeTables()
    fit = quality.fitQuality(table, scores)
    found = quality.predictQuality(table.assign(voxels=0, entropy=np.nan)[:1], fit)
    assert found['predictedDice'].isna().all() and found['isFlagged'].all()
    assert found['reason'].tolist() == ['no voxel predicted']


@pytest.mark.parametrize(
    ('change', 'match'),
    [
        (lambda table, scores: (table, scores.assign(rule=['a', 'b'] * 15)), r"by the rules \['a', 'b'\]"),
        (lambda table, scores: (pd.concat([table, table[:1]]), scores), 'p00: twice in a table'),
        (lambda table, scores: (table, scores.assign(patient='q')[:1]), 'No patient has both'),
        (lambda table, scores: (table.assign(planes=[1, 3] * 15), scores), 'made of 1, 3 planes'),
        (lambda table, scores: (table[:4], scores), '4 patients: too few'),
        (lambda table, scores: (table.assign(voxels=0), scores), '30 patients: too few'),
        (lambda *tables: [each.assign(patient=ONE_SUBJECT) for each in tables], 'of at least two subjects'),
    ],
)
def test_fitQuality_refusesOtherTables(change, match):
    """Several rules, a patient twice, no common patient, other planes and too few patients are refused in words."""
    with pytest.raises(ValueError, match=match):
        quality.fitQuality(*change(*makeTables()))


def test_predictQuality_refusesOtherPredictions():
    """Another number of planes, and members that the new prediction lacks, are refused."""
    table, scores = makeTables(memberDice=0.9, memberSpread=0.1)[0].assign(members=2), makeTables()[1]
    fit = quality.fitQuality(table, scores)
    with pytest.raises(ValueError, match='The fit is of 3 planes, but predictions were made of 1; fit it anew'):
        quality.predictQuality(table.assign(planes=1), fit)
    with pytest.raises(ValueError, match=r'p00, p01, .*the fit of WT needs planeDice, .*memberDice'):
        quality.predictQuality(table.assign(memberDice=np.nan), fit)


@pytest.fixture(scope='module')
def phantoms(tmp_path_factory):
    """Return a folder of six phantoms."""
    folder = tmp_path_factory.mktemp('data')
    phantom.makeCases(folder, 6, shape=(40, 40, 16))
    return folder


@pytest.fixture
def trained(phantoms, tmp_path):
    """Return the file list of six phantoms, two models that have seen none, and an empty folder."""
    config.ENCODER_NAME, config.ENCODER_DEPTH, config.DECODER_CHANNELS = 'resnet18', 3, (16, 8, 8)
    config.PLANES = ('axial', 'coronal', 'sagittal')
    torch.manual_seed(0)
    return utils.makeFileList(phantoms), [engine.makeModel(), engine.makeModel()], tmp_path / 'out'


def test_segment_measuresWithoutChangingTheSegmentation(trained):
    """Each member is measured by its three planes, and everything else is as without, with windows too."""
    df, members, _ = trained
    for options in ({}, {'patchStride': 24, 'probabilities': True}):
        plain = engine.predict(df.iloc[0], members, **options)
        found = engine.segment(df.iloc[0], members, measure=quality.measureMember, **options)
        assert all(torch.equal(one, other) for one, other in zip(plain, found.plain(), strict=True))
        assert [each['counts'].shape for each in found.measured] == [(3, 4)] * 2
        assert all((each['counts'].sum(1) == each['classes'].size).all() for each in found.measured)


def test_predictFolder_notesDisagreement(trained, capsys):
    """disagreement.csv has every patient; one whose row is gone is predicted again; the fit writes quality.csv."""
    df, members, folder = trained
    scores = postprocess.predictFolder(df, members, folder)
    table = quality.readDisagreement(folder)
    assert set(table['patient']) == set(df.index) and len(table) == 6 * len(config.REGIONS)
    assert table['members'].eq(2).all() and table['planes'].eq(3).all()
    table[table['patient'] != df.index[2]].to_csv(folder / 'disagreement.csv', index=False)
    postprocess.predictFolder(df, members, folder)
    assert '5 of 6 patients are finished' in capsys.readouterr().out
    again, keys = quality.readDisagreement(folder), ['patient', 'region']
    pd.testing.assert_frame_equal(again.set_index(keys).sort_index(), table.set_index(keys).sort_index())
    table = table.assign(voxels=table['voxels'] + 1, entropy=table['entropy'].fillna(0))
    quality.writeFit(quality.fitQuality(table, scores), folder / 'fit.json')
    written = quality.writeQuality(folder, quality.readFit(folder / 'fit.json'))
    read = pd.read_csv(folder / 'quality.csv').fillna('')
    pd.testing.assert_frame_equal(read, written.fillna(''), check_dtype=False)
    assert 'patients are flagged' in capsys.readouterr().out


def test_readDisagreement_takesTheNewestOfAPatient(tmp_path):
    """Parts are read as one table; of a patient that two files have, the rows of the newer file count."""
    table, _ = makeTables(3)
    for name, voxels, time in (('disagreement.0of2.csv', 1, 2e9), ('disagreement.csv', 2, 1e9)):
        part = table[: 2 if voxels == 1 else 3].assign(voxels=voxels)
        part.to_csv(tmp_path / name, index=False)
        os.utime(tmp_path / name, (time, time))
    found = quality.readDisagreement(tmp_path).set_index('patient')['voxels']
    assert found.to_dict() == {'p00': 1, 'p01': 1, 'p02': 2}


def test_files_refuseOthers(tmp_path):
    """A folder without disagreement and a JSON of something else are refused by name."""
    with pytest.raises(FileNotFoundError, match=r'has no disagreement\.csv; postprocess\.predictFolder writes it'):
        quality.readDisagreement(tmp_path)
    for content in ('{"a": 1}', '[1]', 'x'):
        (tmp_path / 'fit.json').write_text(content)
        with pytest.raises(ValueError, match=r'fit\.json is no fit of the quality'):
            quality.readFit(tmp_path / 'fit.json')
    table, scores = makeTables()
    fit = quality.fitQuality(table, scores)
    quality.writeFit(fit, tmp_path / 'fit.json')
    assert quality.readFit(tmp_path / 'fit.json') == fit == json.loads(json.dumps(fit))


def test_plotQuality_showsEstimatesAgainstTruth():
    """Dots are estimated and true Dice, by color of whether the interval holds; the title has correlation and count."""
    table, scores = makeTables(30, 0.05)
    crossed = quality.crossFit(table, scores)
    figure = pictures.plotQuality(crossed)
    (panel,) = figure.axes
    dots = [np.array(line.get_data()) for line in panel.lines if line.get_label() == 'full']
    isHeld = crossed['dice'].between(crossed['low'], crossed['high'])
    for found, part in zip(dots, (crossed[isHeld], crossed[~isHeld]), strict=True):
        np.testing.assert_array_equal(found, part[['predictedDice', 'dice']].to_numpy().T)
    row = quality.summarizeQuality(crossed).loc['WT']
    title = f'WT: rank correlation {row["spearman"]:.2f}\n{row["coverage"]:.0%} of 30 intervals hold'
    assert panel.get_title() == title
    figure.canvas.draw()
    plt.close('all')
