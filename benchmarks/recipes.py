"""Compare the steps from the document's recipe to the default by `train.compare`, and with another system.

    python -m benchmarks.recipes FOLDER OUTPUT [STEPS [FOLDS [SEEDS]]]

A recipe is a dict of `config` values. At the end another system is trained in each fold for as long as the last recipe,
on the same patients. A stopped run goes on where it was.
"""

import sys
from pathlib import Path

import pandas as pd

import config
import metrics
import train
import utils
from atomic import writeAtomically
from benchmarks import peers
from patients import cohort

# A small network, so that a processor trains it in minutes
SMALL = {
    'ENCODER_NAME': 'resnet18',
    'ENCODER_WEIGHTS': None,
    'DECODER_CHANNELS': (128, 64, 32, 16, 16),
    'BATCHSIZE': 16,
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


def main(folder, output, numSteps=1500, folds=4, seeds=1, recipes=None, withPeer=True):
    """Train and score recipes, print and return their table.

    Args:
        folder: patients with segmentations.
        output: folder for runs and results.
        numSteps, folds, seeds: as in `train.compare`.
        recipes: dict of name to `config` values; default `RECIPES`.
        withPeer: train `PEER` too, in each fold for the seconds of the last recipe.
    """
    df, output = utils.makeFileList(folder), Path(output)
    recipes = {name: {**SMALL, **values} for name, values in (RECIPES if recipes is None else recipes).items()}
    table = train.compare(df, recipes, folds, seeds, steps=numSteps, output=output)
    if withPeer:
        scores = pd.read_csv(output / 'scores.csv')
        last = scores[scores['recipe'] == list(recipes)[-1]]
        for (fold, seed), part in last.groupby(['fold', 'seed']):
            sets, file = cohort.splitFolds(df, folds)[fold], output / f'peer-{fold}-{seed}.csv'
            own = _scorePeer(*sets, part['seconds'].max(), file)
            scores = pd.concat([scores, own.assign(recipe=PEER, fold=fold, seed=seed)], ignore_index=True)
        table = metrics.compareRecipes(scores)
    print(table.round(3).T.to_string())
    return table


def _scorePeer(traindf, testdf, seconds, file):
    """Return the scores of the other system, trained for some seconds, and keep them in a file."""
    if not file.exists():
        model, _ = peers.trainSegResNet(traindf, seconds)
        cases = {patient: peers.predictSegResNet(paths, model) for patient, paths in testdf.iterrows()}
        scores = metrics.scoreTable({patient: metrics.scorePatient(y, yhat) for patient, (y, yhat) in cases.items()})
        with writeAtomically(file) as temporary:
            scores[scores['region'].isin(config.MAIN_REGIONS)].to_csv(temporary, index=False)
    return pd.read_csv(file)


if __name__ == '__main__':
    main(*sys.argv[1:3], *map(int, sys.argv[3:6]))
