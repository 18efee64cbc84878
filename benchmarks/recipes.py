"""Compare the steps from the document's recipe to the default by `train.compare`.

    python -m benchmarks.recipes FOLDER OUTPUT [STEPS [FOLDS [SEEDS]]]

A recipe is a dict of `config` values. A stopped run goes on where it was.
"""

import sys

import config
import train
import utils

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
    'Dice + cross-entropy, decay, fewer flips': LOSS,
    '+ average of the weights': AVERAGE,
    '+ background patches': BACKGROUND,
    '+ three planes': PLANES,
    '+ change of contrast': CONTRAST,
    '+ random starts of the windows (default)': {},
}


def main(folder, output, numSteps=1500, folds=4, seeds=1, recipes=None):
    """Train and score recipes, print and return their table.

    Args:
        folder: patients with segmentations.
        output: folder for runs and results.
        numSteps, folds, seeds: as in `train.compare`.
        recipes: dict of name to `config` values; default `RECIPES`.
    """
    recipes = {name: {**SMALL, **values} for name, values in (RECIPES if recipes is None else recipes).items()}
    with train.configured({'CONFIDENCE': 1 - 0.05 / max(1, len(recipes) - 1)}):  # of all comparisons together
        table = train.compare(utils.makeFileList(folder), recipes, folds, seeds, steps=numSteps, output=output)
    print(table.round(3).T.to_string())
    return table


if __name__ == '__main__':
    main(*sys.argv[1:3], *map(int, sys.argv[3:6]))
