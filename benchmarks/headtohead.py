"""Train this package and others on the same patients for the same minutes, and compare them.

    python -m benchmarks.headtohead FOLDER OUTPUT [MINUTES [FOLDS [SYSTEM ...]]]

Of each system a network is trained in each fold, one after the other, and scored on the whole patients of the fold. The
minutes are those of the training. What a system does once before it (patches, plans, crops) comes on top and is told
apart. A stopped run goes on where it was. With SYSTEM, only those named run. Two processes may share OUTPUT, each with
cores or a device of its own, if the two systems of this package run in one of them; a run without SYSTEM then makes the
table of all. nnU-Net needs `pip install 'nnunetv2>=2.8'`.
"""

import importlib.util
import sys
import time
from pathlib import Path

import pandas as pd

import config
import metrics
import train
import utils
from atomic import writeAtomically
from benchmarks import peers
from benchmarks.recipes import SMALL
from benchmarks.timing import describeMachine
from engine import precision
from patients import cohort
from patients.reading import spacingOf
from provenance import checksums

OWN = {'default': {}, 'small network': SMALL}  # both of this package
OTHERS = {
    'MONAI SegResNet': peers.SegResNet,
    'nnU-Net 2d': lambda: peers.NnUNet('2d'),
    'nnU-Net 3d_fullres': lambda: peers.NnUNet('3d_fullres'),
}


def main(folder, output, minutes=15, folds=4, *systems):
    """Train and score the systems, print and return their table.

    Args:
        folder: patients with segmentations.
        output: folder for runs and results.
        minutes: of each training.
        folds: number of folds.
        *systems: some of `OWN` and `OTHERS`; default all.

    Returns:
        DataFrame of `metrics.compareRecipes`, with the columns `minutes`, `steps` and `preparation` (seconds a
        patient): means over the folds; NaN where unknown.
    """
    systems, parts = systems or (*OWN, *OTHERS), []
    if unknown := [name for name in systems if name not in OWN and name not in OTHERS]:
        raise ValueError(f'No system is called {", ".join(unknown)}; known: {", ".join((*OWN, *OTHERS))}.')
    if any(name.startswith('nnU-Net') for name in systems) and importlib.util.find_spec('nnunetv2') is None:
        raise ModuleNotFoundError("nnU-Net is not installed: pip install 'nnunetv2>=2.8', or name other systems.")
    df, numFolds = utils.makeFileList(folder), folds
    output = Path(output, f'{minutes:g} minutes, {folds} folds')
    files, machine = {str(patient): checksums(paths) for patient, paths in df.iterrows()}, precision(config.DEVICE)
    train.checkRecipe(output, {'patients': files, 'machine': describeMachine(machine), 'crop': peers.CROP})
    alone = [config.DEVICE]  # the others use one device, too
    if own := {name: values for name, values in OWN.items() if name in systems}:
        parts.append(train.scoreRecipes(df, own, [None], numFolds, 1, None, minutes, output / 'own', alone))
        parts[0]['minutes'] = parts[0].pop('seconds') / 60
    for name in systems:
        if name in OWN:
            continue
        for fold, sets in enumerate(cohort.splitFolds(df, numFolds)):
            file = output / f'{name}-{fold}.csv'
            if not file.exists():
                with train.configured({'SEED': train.seedOf(fold, config.SEED)}):
                    table = _trainAndScore(OTHERS[name](), *sets, 60 * minutes, output / f'work {name}')
                with writeAtomically(file) as temporary:
                    table.to_csv(temporary, index=False)
            parts.append(pd.read_csv(file, dtype={'patient': str}).assign(recipe=name, fold=fold, seed=config.SEED))
    scores = pd.concat(parts, ignore_index=True)
    scores['subject'] = scores['patient'].map(cohort.findSubjects(df).rename(index=str))
    with train.configured({'CONFIDENCE': 1 - 0.05 / max(1, len(systems) - 1)}):  # of all comparisons together
        table = metrics.compareRecipes(scores)
    table[['minutes', 'steps', 'preparation']] = scores.groupby('recipe')[['minutes', 'steps', 'preparation']].mean()
    with writeAtomically(output / 'headtohead.csv') as temporary:
        table.to_csv(temporary)
    print(table.round(3).T.to_string())
    return table


def _trainAndScore(system, traindf, testdf, seconds, folder):
    """Return the scores of a system's patients of a fold, with minutes, steps and the preparation in s a patient."""
    preparation, begin = system.prepare(traindf, folder), time.monotonic()
    numSteps = system.train(seconds)
    minutes = (time.monotonic() - begin) / 60
    scores = {}
    for patient, paths in testdf.iterrows():
        scores[patient] = metrics.scorePatient(*system.predict(paths), spacingOf(paths))
    table = metrics.scoreTable(scores)
    table = table[table['region'].isin(config.MAIN_REGIONS)][['patient', 'region', 'dice', 'hd95']]
    return table.assign(minutes=minutes, steps=numSteps, preparation=preparation / len(traindf))


if __name__ == '__main__':
    main(*sys.argv[1:3], *map(float, sys.argv[3:4]), *map(int, sys.argv[4:5]), *sys.argv[5:])
