"""The committed notebooks and the README: one clean run, and the same figures in both."""

import json
import re
from pathlib import Path

import pytest
import torchio as tio

import config
import fingerprint
import preprocess

HOME = Path(__file__).resolve().parent.parent
README = HOME / 'README.md'
MAIN, MORE = HOME / 'brats_segmentation.ipynb', HOME / 'more_scores.ipynb'
both = pytest.mark.parametrize('notebook', [MAIN, MORE], ids=lambda path: path.stem)


def cellsOf(notebook, kind):
    """The cells of one kind."""
    return [cell for cell in json.loads(notebook.read_text())['cells'] if cell['cell_type'] == kind]


def sourcesOf(notebook):
    """The source of each code cell."""
    return [''.join(cell['source']) for cell in cellsOf(notebook, 'code')]


def printedBy(notebook):
    """All that the cells printed."""
    outputs = [output for cell in cellsOf(notebook, 'code') for output in cell['outputs']]
    return ''.join(''.join(output['text']) for output in outputs if output['output_type'] == 'stream')


@both
def test_notebook_holdsTheOutputsOfOneCleanRun(notebook):
    """Every code cell ran once, in order, without an error, a warning or a progress bar's widget; under 3 MB in all."""
    code = cellsOf(notebook, 'code')
    assert [cell['execution_count'] for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell['outputs'] if output['output_type'] == 'error']
    assert not [output for cell in code for output in cell['outputs'] if output.get('name') == 'stderr']
    assert 'widget' not in notebook.read_text() and notebook.stat().st_size < 3e6


@both
def test_notebook_definesNoFunctionsAndHasShortCells(notebook):
    """Functions live in the modules; cells have at most 25 lines; each step has a sentence."""
    sources = sourcesOf(notebook)
    assert not re.search(r'^\s*(def|class) ', '\n'.join(sources), re.MULTILINE)
    assert all(len(source.splitlines()) <= 25 for source in sources)
    assert len(cellsOf(notebook, 'markdown')) >= 8


def test_notebook_hasAtMost20CodeCells():
    """The walk stays short, and its set-up cell has fewer than ten lines."""
    sources = sourcesOf(MAIN)
    assert len(sources) <= 20 and len(sources[0].splitlines()) < 10


@both
def test_notebook_saysThatItsPicturesArePhantoms(notebook):
    """The committed outputs show synthetic patients, and the notebook prints so."""
    assert 'PHANTOMS' in printedBy(notebook)


def test_notebook_showsAGif():
    """One animated GIF is embedded."""
    outputs = [output for cell in cellsOf(MAIN, 'code') for output in cell['outputs']]
    assert sum('image/gif' in output.get('data', {}) for output in outputs) == 1


def test_notebook_showsTheTransformsThatMakeTransformsReturns():
    """The lists written out in the notebook equal `preprocess.makeTransforms()`, in every parameter."""
    config.PATCH_SIZE, config.CONTRAST_PROBABILITY = 128, 0.8
    [source] = [source for source in sourcesOf(MAIN) if 'trainTransform = ' in source]
    names = {'config': config, 'preprocess': preprocess, 'tio': tio}
    exec(source, names)
    written = [names[name] for name in ('trainTransform', 'valTransform', 'testTransform')]
    assert [fingerprint.fingerprint(each) for each in written] == [
        fingerprint.fingerprint(each) for each in preprocess.makeTransforms()
    ]


def test_readme_hasTheNotebooksTable():
    """README's table of scores has the figures that the committed notebook printed."""
    rows = re.findall(r'^(necrotic core|edema|enhancing tumor) +(.+)$', printedBy(MAIN), re.MULTILINE)
    assert len(rows) == 3
    for name, figures in rows:
        [line] = [line for line in README.read_text().splitlines() if line.startswith(f'| {name} |')]
        assert [float(figure) for figure in line.split('|')[2:-1]] == [float(figure) for figure in figures.split()]


def test_readme_isShort():
    """README has under 130 lines and two commands marked for CI."""
    text = README.read_text()
    assert len(text.splitlines()) < 130 and text.count('<!-- ci -->\n```bash\n') == 2
