"""Train named recipes on the same patients by folds, and compare the scores of whole patients that they have not seen.

    python -m benchmarks.recipes FOLDER OUTPUT [STEPS [FOLDS]]

A recipe is a dict of `config` values. Each fold of each recipe has a folder of its own below OUTPUT; a stopped run goes
on where it was, and finished folds are not trained again. At the end another system is trained for as long as the last
recipe, on the same patients.
"""

import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

import config
import engine
import metrics
import preprocess
import train
import utils
from atomic import writeAtomically
from benchmarks import peers

# A small network, so that a processor trains it in minutes
SMALL = {
    'ENCODER_NAME': 'resnet18',
    'ENCODER_WEIGHTS': None,
    'DECODER_CHANNELS': (128, 64, 32, 16, 16),
    'BATCHSIZE': 16,
    'TIME_BUDGET': None,  # equal steps, however long they take
}
LOSS = {**config.DOCUMENT, 'FLIP_PROBABILITY': config.FLIP_PROBABILITY, 'LOSS': 'dice+ce', 'SCHEDULE': 'poly'}
AVERAGE = {**LOSS, 'AVERAGE': 0.05}
BACKGROUND = {**AVERAGE, 'BACKGROUND_SHARE': 0.1}
PLANES = {**BACKGROUND, 'PLANES': config.PLANES, 'SLICE_STEP': config.SLICE_STEP}
CONTRAST = {**PLANES, 'CONTRAST_PROBABILITY': config.CONTRAST_PROBABILITY}
RECIPES = {
    'document': config.DOCUMENT,
    'Dice + cross-entropy, decay': LOSS,
    '+ average of the weights': AVERAGE,
    '+ background patches': BACKGROUND,
    '+ three planes': PLANES,
    '+ change of contrast': CONTRAST,
    '+ random starts of the windows (default)': {},
}
PEER = 'MONAI SegResNet (3-D)'


def main(folder, output, numSteps=1500, folds=4, recipes=None, withPeer=True):
    """Train and score recipes, print their table, and write it for each patient to `recipes.csv`.

    Args:
        folder: patients with segmentations.
        output: folder for runs and results.
        numSteps: batches of each training, rounded to whole epochs.
        folds: number of folds; fold i tests every `folds`-th patient by name, from the i-th on.
        recipes: dict of name to `config` values; default `RECIPES`.
        withPeer: train `PEER` too, in each fold for the seconds of the last recipe.

    Returns:
        DataFrame with a row for each recipe, fold, patient and region: `dice`, `hd95` (mm), and `step` and `seconds`
        of the training.
    """
    df = utils.makeFileList(folder)
    rows = []
    for name, values in (RECIPES if recipes is None else recipes).items():
        for fold in range(folds):
            table = _runOnce(_runFold, Path(output, name, str(fold)), {**SMALL, **values}, df, fold, folds, numSteps)
            rows.append(table.assign(recipe=name, fold=fold))
        print(summarize(pd.concat(rows)).loc[[name]].to_string())
    durations = [table['seconds'].max() for table in rows[-folds:]]
    for fold, seconds in enumerate(durations if withPeer else ()):
        table = _runOnce(_runPeer, Path(output, PEER, str(fold)), {}, df, fold, folds, seconds)
        rows.append(table.assign(recipe=PEER, fold=fold))
    table = pd.concat(rows, ignore_index=True)
    print(summarize(table).to_string())
    with writeAtomically(Path(output) / 'recipes.csv') as temporary:
        table.to_csv(temporary, index=False)
    return table


def _runOnce(run, folder, values, df, fold, folds, amount):
    """Return the scores of a fold's test patients from `scores.csv` in a folder; if it is missing, run the fold."""
    file = folder / 'scores.csv'
    if file.is_file():
        return pd.read_csv(file)
    isTested = np.arange(len(df)) % folds == fold
    with train.configured({**values, 'OUTPUT_FOLDER': str(folder)}):
        scores = run(df[~isTested], df[isTested], amount)
    with writeAtomically(file) as temporary:
        scores.to_csv(temporary, index=False)
    return scores


def _runFold(traindf, testdf, numSteps):
    """Train on some patients and return the scores of others."""
    stepsPerEpoch = -(-preprocess.makeDataset(traindf, config.TRAIN_FILE) // config.BATCHSIZE)
    config.EPOCHS = max(1, round(numSteps / stepsPerEpoch))
    begin = time.monotonic()
    model = utils.loadModel(train.trainModel(traindf))
    seconds = time.monotonic() - begin
    cases = engine.predictAll(testdf, model, patchStride=config.PATCH_STRIDE)
    scores = _scoreCases((patient, y, yhat) for patient, (_, y, yhat) in cases)
    return scores.assign(step=config.EPOCHS * stepsPerEpoch, seconds=seconds)


def _runPeer(traindf, testdf, seconds):
    """Train the other system for some seconds and return the scores of patients."""
    model, numSteps = peers.trainSegResNet(traindf, seconds)
    scores = _scoreCases((patient, *peers.predictSegResNet(paths, model)) for patient, paths in testdf.iterrows())
    return scores.assign(step=numSteps, seconds=seconds)


def _scoreCases(cases):
    """Return Dice and HD95 of the regions of (patient, y, yhat)."""
    regions, columns = list(config.MAIN_REGIONS), ['dice', 'hd95']
    return metrics.scoreTable({each: metrics.scorePatient(y, yhat).loc[regions, columns] for each, y, yhat in cases})


def summarize(table):
    """Return the mean Dice and HD95 of each region, the steps and the seconds of training, by recipe."""
    means = table.pivot_table(index='recipe', columns='region', values=['dice', 'hd95'], sort=False).round(3)
    means.columns = [f'{score} {region}' for score, region in means.columns]
    steps, seconds = (table.groupby('recipe', sort=False)[name].mean().round() for name in ('step', 'seconds'))
    return means.assign(patients=table.groupby('recipe')['patient'].nunique(), steps=steps, seconds=seconds)


if __name__ == '__main__':
    main(*sys.argv[1:3], *map(int, sys.argv[3:5]))
