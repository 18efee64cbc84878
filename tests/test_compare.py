"""Which recipe is better: all are trained alike, a stopped comparison goes on, and nothing is claimed without proof."""

import itertools
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

import checkpoints
import config
import deploy
import engine
import phantom
import train
import utils
from conftest import SMALL


@pytest.fixture
def df(tmp_path):
    """The file list of four phantoms, and small numbers of a training."""
    phantom.makeCases(tmp_path / 'data', 4, shape=(40, 40, 16))
    vars(config).update(SMALL, DATA_FOLDER=str(tmp_path / 'data'))
    torch.set_num_threads(1)
    return utils.makeFileList()


@pytest.mark.slow
def test_compare_trainsEachRecipeInEachFoldWithEachSeed(df, tmp_path, monkeypatch):
    """Each patient is scored once a seed; a failed training is made up for, and nothing is trained twice."""
    recipes, trained, begun, real = {'rate': {}, 'slow': {'LEARN_RATE': 1e-5}}, [], set(), train.trainModel

    def trainModel(traindf, valdf, tell):
        place = Path(config.OUTPUT_FOLDER).name
        begun.add(config.SEED)
        trained.append((place, config.SEED % 1000, config.LEARN_RATE, tuple(traindf.index)))
        if len(trained) == 3:
            raise OSError('the disk is full')
        return real(traindf, valdf, tell)

    monkeypatch.setattr(train, 'trainModel', trainModel)
    before = dict(vars(config))
    options = {'folds': 2, 'seeds': 2, 'steps': 3, 'output': tmp_path / 'out'}
    with pytest.raises(RuntimeError, match=r'1 of 8 trainings failed; the others are complete(.|\n)*the disk is full'):
        train.compare(df, recipes, **options)
    table = train.compare(df, recipes, **options)
    assert vars(config) == before
    assert len(trained) == 2 * 2 * 2 + 1 and len(set(trained)) == 8
    for seed in (0, 1):  # the same patients, in the same order of the work
        sets = [{each for _, *its, each in trained if its == [seed, rate]} for rate in (config.LEARN_RATE, 1e-5)]
        assert sets[0] == sets[1] and len(sets[0]) == 2
    whom = [{each for _, seed, _, each in trained if seed == number} for number in (0, 1)]
    assert whom[0] != whom[1]  # each seed has folds of its own
    assert begun == {0, 1, 1000, 1001}  # no two trainings of a recipe begin with the same weights
    scores = pd.read_csv(tmp_path / 'out' / 'scores.csv')
    assert (scores['steps'] >= 3).all() and (scores['preparation'].dropna() > 0).all()  # whole epochs
    assert len(scores) == 2 * 2 * 4 * 3 and not scores.duplicated(['recipe', 'seed', 'patient', 'region']).any()
    assert list(table.index) == ['rate', 'slow']
    names = {'comparison.csv', 'comparison.html', 'comparison.png', 'recipe-rate', 'recipe-slow', 'scores.csv'}
    assert {file.name for file in (tmp_path / 'out').iterdir()} == names
    monkeypatch.setattr(engine, 'train', None)
    pd.testing.assert_frame_equal(train.compare(df, recipes, **options), table)
    with pytest.raises(ValueError, match=r'recipe-slow was begun with other numbers: LEARN_RATE\. Name the recipe'):
        train.compare(df, {**recipes, 'slow': {'LEARN_RATE': 1e-4}}, **options)


@pytest.mark.slow
def test_learningCurve_trainsOnNestedSets(df, tmp_path, monkeypatch):
    """The smaller sets are part of the larger ones; all are scored on the same patients."""
    seen, real = {}, train.trainModel

    def trainModel(traindf, valdf, tell):
        seen[Path(config.OUTPUT_FOLDER).name] = set(traindf.index)
        return real(traindf, valdf, tell)

    monkeypatch.setattr(train, 'trainModel', trainModel)
    table = train.learningCurve(df, (1, 2), folds=2, seeds=1, steps=2, output=tmp_path / 'out')
    assert list(table.index) == [('default', 1), ('default', 2), ('default', 4)]
    for fold in (0, 1):
        small, large = (seen[f'recipe-default_patients-{size}_fold-{fold}_seed-0'] for size in (1, 2))
        assert len(small) == 1 and small < large
    assert (tmp_path / 'out' / 'learningCurve.html').exists() and table['mean'].notna().tolist() == [True, True, False]


@pytest.mark.parametrize(
    ('recipes', 'options', 'words'),
    [
        ({'a': {}}, {}, '1 recipes were given; two or more'),
        ({'a': {}, 'b': {'EPOCHS': 20}}, {}, 'The recipes a and b are alike'),
        ({'a': {}, 'b': {'EPOCHS': 7}}, {'steps': 3}, 'The recipes a and b are alike'),  # the steps decide
        ({'a': {}, 'b': {'MODALITIES': ['t1ce', 't2', 'flair']}}, {}, 'The recipes a and b are alike'),
        ({'a': {}, 'b': {'NOISE_STD': -1}}, {}, 'The recipe b cannot be trained: '),
        ({'a': {}, 'b': {'LEARN_RATE': 1e-5}}, {'seeds': 0}, 'at least one seed were expected'),
        ({'a': {}, 'b': {'LEARNRATE': 1}}, {}, 'config has no LEARNRATE; the nearest names are LEARN_RATE'),
        ({'a': {}, 'b': {'SEED': 1}}, {}, 'The recipe b sets SEED'),
        ({'a': {}, 'b': {'LEARN_RATE': 1e-5}}, {'folds': 5}, 'k is 5; 2 to 4'),
        ({'a': {}, 'b': {'LEARN_RATE': 1e-5}}, {'steps': 3, 'minutes': 1}, 'Both steps and minutes'),
        ({'a': {}, 'b': {'NO_CLASSES': 2}}, {}, 'The recipes a and b have other classes'),
        ({'a': {}, 'b': {'LOSS': 'dice'}}, {}, r"The recipe b cannot be trained: config\.LOSS is 'dice'"),
        ({'a': {}, 'b': {'START': 'nowhere'}}, {}, 'The recipe b cannot be trained: nowhere is no model folder'),
        ({'a': {}, 'b': {'SCHEDULE': 'cosine'}}, {}, "The recipe b cannot be trained: config.SCHEDULE is 'cosine'"),
    ],
)
def test_compare_refusesBeforeAnythingIsTrained(df, recipes, options, words):
    """Unclear recipes, too many folds and two lengths are told at once."""
    config.EPOCHS = 20
    with pytest.raises(ValueError, match=words):
        train.compare(df, recipes, **options)


@pytest.mark.slow
def test_compare_endsWithTheMinutes(df, tmp_path, monkeypatch):
    """Few batches an epoch, and a time: each training ends; a stopped one begins anew, as its minutes do."""
    recipes, out, saved, save = {'rate': {}, 'slow': {'LEARN_RATE': 1e-5}}, tmp_path / 'out', [], train._save
    vars(config).update(SCHEDULE='poly', AVERAGE=0.1)

    def saveOrStop(*arguments):
        saved.append(save(*arguments))
        if len(saved) == 1:
            raise OSError('stopped')
        return saved[-1]

    monkeypatch.setattr(train, '_save', saveOrStop)
    with pytest.raises(RuntimeError, match='stopped'):
        train.compare(df, recipes, folds=2, seeds=1, minutes=0.05, output=out)
    log = out / 'recipe-rate' / 'recipe-rate_patients-2_fold-0_seed-0' / 'log.txt'
    assert log.read_text().count('epoch   1 of') == 1
    table = train.compare(df, recipes, folds=2, seeds=1, minutes=0.05, output=out)
    assert list(table.index) == ['rate', 'slow']
    assert (pd.read_csv(out / 'scores.csv')['epochs'] > 1).all() and log.read_text().count('epoch   1 of') == 2


def test_compare_endsBeforeTheTimeDoesAndGoesOn(df, tmp_path, monkeypatch):
    """A part that would not end within the time budget is left for the next call; it shortens no training."""
    clock, counts, run, tried = itertools.count(), [], train._runPart, []
    monkeypatch.setattr(engine, 'availableWeights', lambda: tried.append(config.ENCODER_WEIGHTS))

    def runPart(jobs, folder, devices):
        left = run(jobs, folder, devices)
        counts.append(len(list((tmp_path / 'out').glob('*/*/scores.csv'))))
        assert not folder.exists()  # the patches of a fold make room for those of the next one
        return left

    monkeypatch.setattr(train, '_runPart', runPart)
    monkeypatch.setattr(engine, 'hoursUsed', lambda: next(clock))
    recipes = {'rate': {}, 'slow': {'LEARN_RATE': 1e-5}}
    options = {'folds': 2, 'seeds': 1, 'steps': 2, 'output': tmp_path / 'out'}
    config.TIME_BUDGET, config.ENCODER_WEIGHTS = 2.5, 'imagenet'  # each look at the clock takes an hour
    with pytest.raises(RuntimeError, match=r'1 of 2 parts .* within the 2\.5 hours of config\.TIME_BUDGET'):
        train.compare(df, recipes, **options)
    config.TIME_BUDGET = 99
    assert len(train.compare(df, recipes, **options)) == 2 and counts == [2, 2, 4]
    # that they cannot be loaded is found once for each recipe and call, and not in each training again
    assert [each for each in tried if each] == ['imagenet'] * 4


def test_trainAndScore_tellsOfLessThanAnEpochAndScores(df, tmp_path, monkeypatch):
    """Minutes for fewer batches than an epoch has are told, and what was trained is scored; none is an error."""
    told, clock = [], itertools.count()
    monkeypatch.setattr(engine, 'hoursUsed', lambda: next(clock) / 1000)  # 20 batches take .001 hours
    monkeypatch.setattr(checkpoints, 'hoursUsed', lambda: 0)
    vars(config).update(SCHEDULE='poly', EPOCHS=10**6, BATCHSIZE=1, OUTPUT_FOLDER=str(tmp_path / 'out'))
    train._trainAndScore(df[:3], df[3:], 0.15, 0, told.append)
    # after 40 batches, .002 of .15 / 60 / .95 hours: (.00263 - .002 - .05 (.00263 - .001)) / .001 * 20 = 11 more
    assert '0.15 minutes are 51 batches, less than the 76 of an epoch' in told[-1]
    assert pd.read_csv(tmp_path / 'out' / 'scores.csv')['steps'].eq(51).all()
    monkeypatch.setattr(checkpoints, 'hoursUsed', lambda: 9)
    config.OUTPUT_FOLDER = str(tmp_path / 'none')
    with pytest.raises(ValueError, match=r'0\.15 minutes were over before the first batch'):
        train._trainAndScore(df[:3], df[3:], 0.15, 0, told.append)


def test_compare_refusesOtherWeightsOfTheSameName(df, tmp_path, monkeypatch):
    """A folder for `config.START` that was packed anew would mix the scores of both, and so would another device."""
    config.EPOCHS, start = 1, tmp_path / 'start'
    deploy.packModel(train.trainModel(df[:1]), start)
    recipes, options = {'random': {}, 'start': {'START': str(start)}}, {'folds': 2, 'minutes': 5, 'output': tmp_path}

    def stop(*arguments):
        raise InterruptedError

    monkeypatch.setattr(train, '_runPart', stop)
    for _ in range(2):
        with pytest.raises(InterruptedError):
            train.compare(df[1:], recipes, **options)
    file = tmp_path / 'recipe-start' / 'recipe.json'
    text = file.read_text()
    file.write_text(text.replace('"the device": "cpu"', '"the device": "Tesla T4"'))
    with pytest.raises(ValueError, match='begun with other numbers: the device'):
        train.compare(df[1:], recipes, **options)
    file.write_text(text)
    shutil.rmtree(start)
    config.OUTPUT_FOLDER, config.SEED = str(tmp_path / 'again'), 1
    weights = train.trainModel(df[:1])
    config.SEED = 0
    deploy.packModel(weights, start)
    with pytest.raises(ValueError, match='begun with other numbers: the weights of START'):
        train.compare(df[1:], recipes, **options)


def test_compare_refusesAStartThatSawThePatients(df, tmp_path):
    """Weights that were trained on one of the patients would be tested on it."""
    config.EPOCHS = 1
    deploy.packModel(train.trainModel(df[1:2]), tmp_path / 'start', df)
    recipes = {'random': {}, 'start': {'START': str(tmp_path / 'start')}}
    with pytest.raises(ValueError, match=f'start: config.START was trained on {df.index[1]}, who are to be tested on'):
        train.compare(df, recipes, folds=2)
