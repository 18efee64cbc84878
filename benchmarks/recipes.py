"""Train named recipes on the same patients by folds, and compare the scores of whole patients that they have not seen.

    python -m benchmarks.recipes FOLDER OUTPUT [STEPS [FOLDS]]

A recipe is a dict of `config` values. Each fold of each recipe has a folder of its own below OUTPUT; a stopped run goes
on where it was, and finished folds are not trained again. At the end another system is trained for as long as the last
recipe, on the same patients.
"""

import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch

import batched
import config
import engine
import metrics
import preprocess
import train
import utils
from atomic import writeAtomically
from benchmarks import peers
from pictures.figure import MAIN_REGIONS

# A small network, so that a processor trains it in minutes
SMALL = {
    'ENCODER_NAME': 'resnet18',
    'ENCODER_WEIGHTS': None,
    'DECODER_CHANNELS': (128, 64, 32, 16, 16),
    'BATCHSIZE': 16,
}
LOSS = {**config.DOCUMENT, 'LOSS': 'dice+ce', 'SCHEDULE': 'poly'}
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
SCORED_AT = (0.2, 1.0)  # of all steps; there whole patients are scored and the run is saved


PEER = 'MONAI SegResNet (3-D)'


def main(folder, output, numSteps=1500, folds=4, recipes=None, withPeer=True):
    """Train and score recipes, print their table, and write `recipes.csv` and `recipes.png`.

    Args:
        folder: patients with segmentations.
        output: folder for runs and results.
        numSteps: batches of each training.
        folds: number of folds; fold i tests every `folds`-th patient by name, from the i-th on.
        recipes: dict of name to `config` values; default `RECIPES`.
        withPeer: train `PEER` too, in each fold for the seconds of the last recipe.

    Returns:
        DataFrame with a row for each recipe, fold, step, patient and region: `dice`, `hd95` (mm), and `seconds` of
        training up to the step.
    """
    df = utils.makeFileList(folder)
    rows = []
    for name, values in (RECIPES if recipes is None else recipes).items():
        for fold in range(folds):
            with train.configured({**SMALL, **values, 'OUTPUT_FOLDER': str(Path(output) / name / str(fold))}):
                table = _runFold(*_splitFold(df, fold, folds), numSteps)
            rows.append(table.assign(recipe=name, fold=fold))
        print(summarize(pd.concat(rows)).loc[[name]].to_string())
    durations = [table['seconds'].max() for table in rows[-folds:]]
    for fold, seconds in enumerate(durations if withPeer else ()):
        with train.configured({'OUTPUT_FOLDER': str(Path(output) / PEER / str(fold))}):
            table = _runPeer(*_splitFold(df, fold, folds), seconds)
        rows.append(table.assign(recipe=PEER, fold=fold))
    table = pd.concat(rows, ignore_index=True)
    print(summarize(table).to_string())
    with writeAtomically(Path(output) / 'recipes.csv') as part:
        table.to_csv(part, index=False)
    plotRecipes(table).savefig(Path(output) / 'recipes.png')
    return table


def _splitFold(df, fold, folds):
    """Return the patients that a fold trains on, and those that it tests."""
    isTested = [number % folds == fold for number in range(len(df))]
    return df[[not tested for tested in isTested]], df[isTested]


def _runFold(traindf, testdf, numSteps):
    """Train on some patients and return the scores of others, at the fractions `SCORED_AT` of the steps."""
    file = Path(config.OUTPUT_FOLDER) / 'scores.csv'
    table = pd.read_csv(file) if file.is_file() else pd.DataFrame(columns=['step'])
    ends = [0, *(round(fraction * numSteps) for fraction in SCORED_AT)]
    if numSteps in table['step'].tolist():
        return table
    config.EPOCHS = len(SCORED_AT)
    numTrain = preprocess.makeDataset(traindf, config.TRAIN_FILE)
    dataset = utils.BRATSDataset(config.TRAIN_FILE, numTrain, raw=True)
    augment = batched.Batched(preprocess.makeTransforms()[0])
    torch.manual_seed(config.SEED)
    model, criterion = engine.makeModel(), engine.makeCriterion()
    optimizer = torch.optim.Adam(model.parameters(), config.LEARN_RATE, weight_decay=config.WEIGHT_DECAY)
    scheduler, average = engine.makeScheduler(optimizer, numSteps), engine.makeAverage(model, numSteps)
    scaler = torch.amp.GradScaler(config.DEVICE, enabled=engine.precision(config.DEVICE) is torch.float16)
    run = (model, optimizer, scheduler, scaler)
    *_, start, loss, _, best = utils.loadCheckpoint(*run, config.LAST_CHECKPOINT, average)
    for epoch in range(start, config.EPOCHS):
        begin, numSamples = time.monotonic(), (ends[epoch + 1] - ends[epoch]) * config.BATCHSIZE
        sampler = torch.utils.data.RandomSampler(dataset, num_samples=numSamples)
        loader = torch.utils.data.DataLoader(dataset, config.BATCHSIZE, sampler=sampler)
        loss = engine.train(model, criterion, optimizer, scaler, loader, augment, scheduler, average)
        # a stopped run may have scored what it did not save
        table = table[table['step'] <= ends[epoch]]
        seconds = time.monotonic() - begin + (table['seconds'].max() if len(table) else 0)
        loss /= numSamples
        if config.SCHEDULE == 'plateau':
            scheduler.step(loss)
        scores = _score(testdf, model if average is None else average)
        scores = scores.assign(step=ends[epoch + 1], seconds=seconds)
        table = pd.concat([table, scores], ignore_index=True) if len(table) else scores
        with writeAtomically(file) as part:
            table.to_csv(part, index=False)
        best = utils.makeCheckpoint(epoch, *run, loss, loss, best, average)
    dataset.file.close()
    return table


def _score(testdf, model):
    """Return Dice and HD95 of the regions of whole patients."""
    cases = engine.predictAll(testdf, model, patchStride=config.PATCH_STRIDE)
    return _scoreCases((patient, y, yhat) for patient, (_, y, yhat) in cases)


def _runPeer(traindf, testdf, seconds):
    """Train the other system for some seconds, unless that is done, and return the scores of patients."""
    file = Path(config.OUTPUT_FOLDER) / 'scores.csv'
    if file.is_file():
        return pd.read_csv(file)
    model, numSteps = peers.trainSegResNet(traindf, seconds)
    table = _scoreCases((patient, *peers.predictSegResNet(paths, model)) for patient, paths in testdf.iterrows())
    table = table.assign(step=numSteps, seconds=seconds)
    with writeAtomically(file) as part:
        table.to_csv(part, index=False)
    return table


def _scoreCases(cases):
    """Return Dice and HD95 of the regions of (patient, y, yhat)."""
    regions, columns = list(MAIN_REGIONS), ['dice', 'hd95']
    return metrics.scoreTable({each: metrics.scorePatient(y, yhat).loc[regions, columns] for each, y, yhat in cases})


def summarize(table):
    """Return the mean Dice and HD95 of each region at the last step, and the seconds of training, by recipe.

    Also at which scored step, and after how many seconds, the recipe is first as good as the first one at its end: the
    mean Dice of all patients and regions is as high; NaN if it never is.
    """
    last = table[table['step'] == table.groupby(['recipe', 'fold'])['step'].transform('max')]
    means = last.pivot_table(index='recipe', columns='region', values=['dice', 'hd95'], sort=False).round(3)
    means.columns = [f'{score} {region}' for score, region in means.columns]
    steps, seconds = (last.groupby('recipe', sort=False)[name].mean().round() for name in ('step', 'seconds'))
    means = means.assign(patients=last.groupby('recipe')['patient'].nunique(), steps=steps, seconds=seconds)
    aim = last.loc[last['recipe'] == table['recipe'].iloc[0], 'dice'].mean()
    overall = table.groupby(['recipe', 'step'])[['dice', 'seconds']].mean().reset_index()
    reached = overall[overall['dice'] >= aim].groupby('recipe').first()
    return means.assign(stepsToFirst=reached['step'], secondsToFirst=reached['seconds'].round())


def plotRecipes(table):
    """Return a figure of the mean Dice of WT, TC and ET against steps and against seconds of training, by recipe."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout='constrained')
    means = table.groupby(['recipe', 'step'], sort=False)[['dice', 'seconds']].mean().reset_index()
    for name, part in means.groupby('recipe', sort=False):
        for panel, column in zip(panels, ('step', 'seconds'), strict=True):
            panel.plot(part[column], part['dice'], marker='o', label=name)
    for panel, label in zip(panels, ('steps', 'seconds of training'), strict=True):
        panel.set(xlabel=label, xlim=(0, None))
        panel.grid(color='#E5E5E5')
    panels[0].set_ylabel(f'mean Dice of WT, TC, ET; {table["patient"].nunique()} patients by folds')
    panels[0].legend(frameon=False, fontsize=8)
    return figure


if __name__ == '__main__':
    main(*sys.argv[1:3], *map(int, sys.argv[3:5]))
