"""Read one patient of a folder of segmentations for the report: volumes, scores, warnings and pictures."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd

import config
import metrics
from patients.cohort import MOST_OUTSIDE
from patients.editions import CAVITY, countWithCavity, detectPatient, known
from patients.reading import COLUMNS, checkGrid, detectEdition, hasFile, patientOf, readVolume, toClasses
from pictures.figure import shownChannel
from postprocess.folder import findPrediction, withoutCavity
from report.sprites import drawThumbnail, packVolumes

_SMALL, _LARGE = 2.0, 300.0  # ml of whole tumor: outside of them a look is worth its time
_MANY = 20  # components of whole tumor
_LOW = 0.5  # Dice
WARNINGS = {  # what each kind of warning means
    'cannot be read': 'the segmentation could not be used; the row says why',
    'no segmentation': 'the folder has no segmentation of this patient of the file list',
    'other files': 'an image or the true segmentation could not be used; the row says why',
    'empty': 'no voxel of tumor was predicted',
    'no ET': 'tumor, but no enhancing tumor was predicted',
    'many parts': f'the predicted tumor falls into more than {_MANY} components (26 neighbours)',
    'small': f'less than {_SMALL:g} ml of tumor were predicted',
    'large': f'more than {_LARGE:g} ml of tumor were predicted',
    'outside': f'more than {MOST_OUTSIDE:.0%} of the predicted tumor lies where all shown images are 0',
    'low Dice': f'a Dice below {_LOW:g}, of a main region',
    'flagged': 'quality.csv flags it: its Dice is expected to be low, or a region without a voxel has no estimate',
    'suspicious truth': 'a Dice below its interval in quality.csv: planes or members agree on something else; look at '
    'the true segmentation first',
    'stale': 'quality.csv is older than the segmentation, so its row is not shown',
    'trained on': 'the model was trained on this patient, so it is not scored',
}


def readQuality(place):
    """Return the table of a folder's `quality.csv` and the time it was written; None, 0 if there is none.

    Raises:
        ValueError: it lacks a column, or a value is no number.
    """
    file = place / 'quality.csv'
    if not file.is_file():
        return None, 0
    table = pd.read_csv(file, dtype={'patient': str})
    missing = [name for name in ('patient', 'region', 'predictedDice') if name not in table]
    if missing:
        raise ValueError(f'{file} lacks the columns {missing}; patient, region and predictedDice were expected.')
    names = ['predictedDice', 'low', 'high']
    try:
        table[names] = table.reindex(columns=names).astype(float)
    except ValueError as error:
        raise ValueError(f'{file} has a predictedDice, low or high that is no number: {error}.') from error
    return table.drop_duplicates(['patient', 'region'], keep='last'), file.stat().st_mtime


def describeCase(folder, quality, trained, paths):
    """Return what the page shows of one patient, as plain values, and its table of scores or None.

    Args:
        folder: of the segmentations.
        quality: table of `readQuality`.
        trained: set of the patients that the model was trained on.
        paths: row of the file list.
    """
    case = {'patient': patientOf(paths), 'error': None, 'warnings': [], 'volumes': {}, 'quality': {}, 'scores': None}
    case |= {'thumbnail': None, 'packed': None, 'file': None, 'classVolumes': {}}
    file = findPrediction(paths.name, folder)
    try:
        if file is None:
            _warn(case, 'no segmentation', f'{folder.name} has no {paths.name}.nii.gz or .nii')
        else:
            case['file'] = file.name
            _readCase(case, file, paths, trained)
            _addQuality(case, quality, file)
    except (ValueError, OSError) as error:
        case['error'] = str(error)
        _warn(case, 'cannot be read', _withoutFolders(error, paths, file))
    case['kinds'] = list(dict.fromkeys(kind for kind, _ in case['warnings']))
    return case


def _warn(case, kind, text):
    case['warnings'].append((kind, text))


def _withoutFolders(error, paths, file):
    """Return the text of an error without folders, which are private: a page may be passed on."""
    text = str(error)
    for path in (file, *(paths[name] for name in COLUMNS if hasFile(paths, name))):
        text = text.replace(str(path), Path(path).name)
    return text


def _readCase(case, file, paths, trained):
    """Add what a patient's files hold to `case`: volumes, scores, warnings and pictures.

    Shown are the modality of all figures and t1ce, in which enhancing tumor is bright.
    """
    row = pd.Series({**paths, 'seg': str(file)}, name=paths.name)
    edition = editionOf(paths)
    labels, affine = readVolume(str(file), paths.name)
    prediction = toClasses(labels, row, edition, countWithCavity())
    spacing = [float(value) for value in nib.affines.voxel_sizes(affine)]
    images = {}
    modality = config.MODALITIES[shownChannel(len(config.MODALITIES))]
    if not hasFile(paths, modality):
        modality = next((name for name in COLUMNS if hasFile(paths, name)), modality)
    for name in dict.fromkeys([modality, *{'t1ce'}.intersection(config.MODALITIES), 'seg']):
        if hasFile(paths, name):
            try:
                channel = (known()[edition].channels or {}).get(name)
                images[name], grid = readVolume(paths[name], paths.name, channel)
                title = 'the seg' if name == 'seg' else name
                checkGrid(row, 'seg', labels.shape, affine, title, images[name].shape, grid)
                if name == 'seg':
                    images[name] = toClasses(images[name], paths, edition, countWithCavity())
            except (ValueError, OSError) as error:
                images.pop(name, None)
                _warn(case, 'other files', _withoutFolders(error, paths, file))
    truth = images.pop('seg', None)
    ml = float(np.prod(spacing)) / 1000
    shown = {'prediction': prediction} | ({} if truth is None else {'truth': truth})
    counts = {name: np.bincount(each.ravel(), minlength=countWithCavity()) for name, each in shown.items()}
    case['classVolumes'] = {name: (own * ml).round(3).tolist() for name, own in counts.items()}
    case['volumes'] = _measureRegions(counts['prediction'], ml)
    if truth is not None and paths.name in trained:
        _warn(case, 'trained on', 'not scored')
    elif truth is not None:
        case['scores'] = metrics.scorePatient(withoutCavity(truth), withoutCavity(prediction), spacing)
    _addWarnings(case, prediction, images)
    case['packed'] = packVolumes(images, prediction, truth, spacing)
    case['thumbnail'] = drawThumbnail(next(iter(images.values()), None), prediction, spacing)


def editionOf(paths):
    """Return the edition of a row of the file list, by its files or, if it has none, by its id."""
    return detectEdition(paths) if any(hasFile(paths, name) for name in COLUMNS) else detectPatient(paths.name)


def _measureRegions(counts, ml):
    """Return a dict of each region to its ml, from voxels per class and ml per voxel; a cavity is a region, RC."""
    regions = dict(config.REGIONS)
    if counts[CAVITY:].any():
        regions.setdefault('RC', (CAVITY,))
    return {region: float(counts[list(members)].sum() * ml) for region, members in regions.items()}


def _addWarnings(case, prediction, images):
    """Add the warnings that a patient's own volumes, images and scores give."""
    isTumor = np.isin(prediction, config.REGIONS['WT'])
    volumes, numVoxels = case['volumes'], np.count_nonzero(isTumor)
    if not numVoxels:
        _warn(case, 'empty', 'no voxel of tumor')
    else:
        if 'ET' in volumes and not volumes['ET']:
            _warn(case, 'no ET', 'no enhancing tumor')
        if volumes['WT'] < _SMALL or volumes['WT'] > _LARGE:
            _warn(case, 'small' if volumes['WT'] < _SMALL else 'large', f'{volumes["WT"]:.1f} ml of tumor')
        numParts = metrics.labelComponents(isTumor)[1]
        if numParts > _MANY:
            _warn(case, 'many parts', f'{numParts} components')
        if images:
            isOutside = isTumor & np.all([image == 0 for image in images.values()], axis=0)
            fraction = np.count_nonzero(isOutside) / numVoxels
            if fraction > MOST_OUTSIDE:
                _warn(case, 'outside', f'{fraction:.0%} of the tumor lies outside the brain')
    if case['scores'] is not None:
        dice = case['scores']['dice'].reindex(config.MAIN_REGIONS).dropna()
        if (dice < _LOW).any():
            low = ', '.join(f'{region} {value:.2f}' for region, value in dice[dice < _LOW].items())
            _warn(case, 'low Dice', low)


def _addQuality(case, quality, file):
    """Add a patient's predicted Dice, and a warning if it is flagged or older than its segmentation."""
    table, written = quality
    rows = None if table is None else table[table['patient'] == case['patient']]
    if rows is None or rows.empty:
        return
    if written < file.stat().st_mtime:
        _warn(case, 'stale', 'quality.csv is older than the segmentation')
        return
    rows = rows.set_index('region')
    values = rows[['predictedDice', 'low', 'high']]
    case['quality'] = {region: [_plain(value) for value in row] for region, row in values.T.items()}
    flags = rows.get('isFlagged', pd.Series(False, rows.index)).astype(str).str.strip().str.lower()
    isFlagged = ~flags.isin(['false', '0', '0.0', 'no', 'none', 'nan', ''])
    if isFlagged.any():
        flagged = values['predictedDice'][isFlagged].items()
        texts = [f'{region} no estimate' if pd.isna(dice) else f'{region} {dice:.2f}' for region, dice in flagged]
        _warn(case, 'flagged', ', '.join(texts))
    if case['scores'] is not None:
        table = values.assign(dice=case['scores']['dice'].reindex(values.index))
        below = table[table['dice'] < table['low']].iterrows()
        texts = [f'{region} {row.dice:.2f}, {row.low:.2f} to {row.high:.2f} was expected' for region, row in below]
        if texts:
            _warn(case, 'suspicious truth', '; '.join(texts))


def _plain(value):
    """Return a number for JSON: None for NaN."""
    return None if pd.isna(value) else float(value)


def tabulate(case, scores):
    """Return a dict of each region to its `volume`, `truth` (ml), `dice`, `hd95`, `expected` (Dice, low, high)."""
    rows = {}
    for region, volume in case['volumes'].items():
        rows[region] = {'volume': volume}
        if scores is not None and region in scores.index:
            row = scores.loc[region]
            rows[region] |= {'truth': row['volumeTruth'], 'dice': _plain(row['dice']), 'hd95': _plain(row['hd95'])}
        if region in case['quality']:
            rows[region]['expected'] = case['quality'][region]
    return rows
