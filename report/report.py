"""Write one offline HTML page of a folder of segmentations."""

import base64
import datetime
import functools
import hashlib
import html
import io
import json
import re
from pathlib import Path

import jinja2
import matplotlib
import matplotlib.pyplot as plt
import pandas as pd

import config
import metrics
import pictures
from atomic import writeAtomically
from patients.cohort import readGrades
from patients.editions import withoutTime
from patients.parallel import forEachPatient
from patients.reading import COLUMNS, makeFileList
from pictures.figure import classColors, classNames
from pictures.slices import ERRORS, REGION_NAMES, SIDES
from postprocess.folder import readSettings, trainedIn
from report.followup import compareScans, plotScans
from report.review import WARNINGS, describeCase, editionOf, readQuality, tabulate
from report.sprites import VOXEL

_PAGE = Path(__file__).parent  # the template, its style and its script
_MOST = 300  # patients whose planes are on a page; a patient takes about 0.2 MB


def writeReport(folder, dataframe=None, file=None):
    """Write one self-contained HTML page of a folder of segmentations, by whatever program, and return its path.

    The page has a row per patient with a thumbnail, volumes, scores where there is a truth, and warnings; a click opens
    three planes with prediction and truth. Nothing is loaded from the network. Scores are computed anew from the files.
    A patient that cannot be used has a row with the reason. Of many patients, the first 300 in the page's order have
    planes and details.

    Args:
        folder: holds `<patient>.nii.gz` or `.nii` in the labels of the patient's edition, or has them in `upload`, as
            `postprocess.predictFolder` writes them. `settings.json` and `quality.csv` (see `postprocess.writeQuality`)
            are shown if they are there.
        dataframe: file list with the images and true segmentations. Each of its patients has a row, with a warning if
            the folder has no segmentation of it. None: the patients below `config.DATA_FOLDER`, if it is set; those
            that the folder has no segmentation of are counted only.
        file: path to write; None: `report.html` in the folder, but never in `upload`.

    Returns:
        Path of the page.

    Raises:
        FileNotFoundError: the folder does not exist, or neither it nor the dataframe has a patient.
        ValueError: `quality.csv` lacks a column or has a value that is no number; or as in `patients.makeFileList`.
    """
    place, upload = _placesOf(folder)
    df, numOthers = _listCases(upload, dataframe)
    quality, made = readQuality(place), readSettings(folder).get('prediction', {})
    work = functools.partial(describeCase, upload, quality, set(trainedIn(made, df)))
    cases = list(forEachPatient(work, df, 'report'))
    cases.sort(key=_urgencyOf)
    numCut = sum(case['packed'] is not None for case in cases[_MOST:])
    for case in cases[_MOST:]:
        case['packed'] = None
    scores = {case['patient']: case.pop('scores') for case in cases}
    scores = {patient: own for patient, own in scores.items() if own is not None}
    table = metrics.scoreTable(scores) if scores else None
    regions = list(dict.fromkeys(region for case in cases for region in case['volumes']))
    shown = [region for region in regions if region in config.MAIN_REGIONS or region == 'RC']
    for case in cases:
        if case['volumes']:  # of a region that only others have, the cavity, there are 0 ml
            case['volumes'] = {region: case['volumes'].get(region, 0.0) for region in regions}
        case['rows'] = tabulate(case, scores.get(case['patient']))
    content = {
        'title': place.resolve().name,
        'date': datetime.datetime.now().strftime('%Y-%m-%d %H:%M'),
        'cases': cases,
        'numOthers': numOthers,
        'numCut': numCut,
        'regions': shown,
        'scored': [region for region in shown if region in config.REGIONS],  # the cavity may be no class
        'hasTruth': bool(scores),
        'hasQuality': any(case['quality'] for case in cases),
        'summary': _summarize(table),
        'numScored': len(scores),
        'charts': _drawCharts(df, cases, table),
        'scans': _compareScans(cases),
        'warnings': {kind: text for kind, text in WARNINGS.items() if any(kind in case['kinds'] for case in cases)},
        'settings': _describeSettings(folder),
    }
    file = Path(file or place / 'report.html')
    with writeAtomically(file) as temporary:
        temporary.write_text(_render(content), encoding='utf-8')
    return file


def writeTable(file, table, figure):
    """Write one self-contained HTML page of a table and a figure, such as those of `train.compare`.

    Args:
        file: path to write.
        table: DataFrame; its index is shown too, and its numbers with three digits.
        figure: matplotlib Figure.
    """
    style = (_PAGE / 'report.css').read_text(encoding='utf-8')
    rows = table.reset_index().to_html(index=False, na_rep='', float_format='{:.3f}'.format, border=0)
    title = html.escape(Path(file).resolve().parent.name)
    with writeAtomically(file) as temporary:
        temporary.write_text(
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{style}</style>'
            f'<main><h1>{title}</h1><img src="{_toSvg(figure)}" alt="the table as a figure">{rows}</main></html>',
            encoding='utf-8',
        )


def _placesOf(folder):
    """Return the folder of the tables and the folder of the segmentations, which may be its `upload`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f'The folder of segmentations {folder} does not exist.')
    if folder.name == 'upload':
        return folder.parent, folder
    return folder, folder / 'upload' if (folder / 'upload').is_dir() else folder


def _listCases(folder, dataframe):
    """Return the file list of the patients to show, and how many others `config.DATA_FOLDER` has."""
    files = [file.name for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith('.')]
    found = [re.sub(r'\.nii(\.gz)?$', '', name) for name in files if name.endswith(('.nii', '.nii.gz'))]
    hasOwn = dataframe is not None
    if not hasOwn:
        isKnown = config.DATA_FOLDER is not None
        dataframe = makeFileList() if isKnown else pd.DataFrame(columns=list(COLUMNS), dtype=object)
    known = dataframe.set_axis(dataframe.index.astype(str))
    wanted = list(dict.fromkeys([*found, *(known.index if hasOwn else ())]))
    if not wanted:
        raise FileNotFoundError(f'{folder} has no segmentation; files named <patient>.nii.gz or .nii were expected.')
    numOthers = 0 if hasOwn else len(known.index.difference(wanted))
    df = known.reindex(wanted)
    return df.where(df.notna(), None), numOthers


def _urgencyOf(case):
    """Return the sort key of a patient: first what cannot be read, then the lowest predicted Dice, then the name."""
    predicted = [values[0] for values in case['quality'].values() if values[0] is not None]
    lowest = min(predicted, default=0 if case['quality'] else 2)  # no voxel of any region: look at it first
    return not {'cannot be read', 'no segmentation'} & set(case['kinds']), lowest, case['patient']


def _summarize(table):
    """Return a dict of each main region to `dice` and `hd95`, rows of `metrics.summarize`; empty without scores."""
    if table is None:
        return {}
    summary = metrics.summarize(table)
    regions = [region for region in config.MAIN_REGIONS if (region, 'dice') in summary.index]
    return {region: {score: summary.loc[(region, score)] for score in ('dice', 'hd95')} for region in regions}


def _drawCharts(df, cases, table):
    """Return the charts of the cohort, a list of (title, SVG as a data URI)."""
    charts = []
    rows = {case['patient']: case['classVolumes']['prediction'] for case in cases if case['volumes']}
    if rows:
        own = df.loc[list(rows)]
        hasFiles = own.reindex(columns=list(COLUMNS)).notna().any(axis=1)
        volumes = [row[1 : config.NO_CLASSES] for row in rows.values()]
        cohort = pd.DataFrame(volumes, list(rows), list(config.CLASS_NAMES[1:]))
        cohort['edition'] = [editionOf(own.loc[patient]) for patient in rows]
        cohort['grade'] = readGrades(own[hasFiles]).reindex(cohort.index).fillna('unknown')
        cohort['subject'] = [withoutTime(patient) for patient in rows]
        charts.append(('Patients and predicted volumes', _toSvg(pictures.plotCohort(cohort))))
    if table is not None:
        charts.append(('Scores', _toSvg(pictures.plotScores(table))))
        charts.append(('Predicted and true volumes', _toSvg(pictures.plotVolumes(table))))
    return charts


def _toSvg(figure):
    """Return a matplotlib figure as a data URI of SVG, and close it."""
    stream = io.BytesIO()
    with matplotlib.rc_context({'svg.hashsalt': 'report'}):  # the same figure, the same bytes
        figure.savefig(stream, format='svg', metadata={'Date': None}, transparent=True)
    plt.close(figure)
    return f'data:image/svg+xml;base64,{base64.b64encode(stream.getvalue()).decode()}'


def _compareScans(cases):
    """Return, for each subject with several scans, its name, the rows of `compareScans` and their figure."""
    volumes = pd.DataFrame.from_dict({case['patient']: case['volumes'] for case in cases}, orient='index')
    columns = [name for name in (*config.MAIN_REGIONS, 'RC') if name in volumes]
    if not columns:
        return []
    table = compareScans(volumes[columns])
    table = table[table.groupby('subject')[columns[0]].transform('count') > 1]  # two scans that could be read
    return [
        {'subject': subject, 'columns': columns, 'rows': rows.to_dict('records'), 'figure': _toSvg(figure)}
        for subject, rows in table.groupby('subject', sort=False)
        for figure in [plotScans(rows)]
    ]


def _describeSettings(folder):
    """Return a dict of section to name to text of a folder's `settings.json`, without paths, which are private."""
    return {
        section: {
            name: json.dumps(value, ensure_ascii=False)
            for name, value in values.items()
            if not str(name).endswith(('FOLDER', 'FILE', 'CHECKPOINT', 'START'))
        }
        for section, values in readSettings(folder).items()
        if isinstance(values, dict)
    }


def _render(content):
    """Return the page: the template with its style and script, which alone may run in it."""
    facts = {
        'regionNames': REGION_NAMES | {'RC': 'resection cavity'},
        'meanings': {kind: text for kind, text in WARNINGS.items() if kind != 'no ET' or 'ET' in config.REGIONS},
        'numClasses': config.NO_CLASSES,
        'classes': list(zip(classNames(), classColors(), strict=True)),
        'errors': ERRORS,
        'sides': SIDES,
        'voxel': VOXEL,
        'confidence': config.CONFIDENCE,
    }
    loader = jinja2.FileSystemLoader(_PAGE)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.policies['json.dumps_kwargs'] = {'sort_keys': False}  # regions in the order of config
    script = (_PAGE / 'report.js').read_text(encoding='utf-8')
    checksum = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    style = (_PAGE / 'report.css').read_text(encoding='utf-8')
    return environment.get_template('report.html').render(
        **content, **facts, script=script, style=style, checksum=checksum
    )
