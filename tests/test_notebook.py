"""The committed notebooks and the README: one clean run, and the same figures in both."""

import re
from pathlib import Path

import pytest

from conftest import cellsOf, sourcesOf

HOME = Path(__file__).resolve().parent.parent
README = HOME / 'README.md'
MAIN, MORE = HOME / 'brats_segmentation.ipynb', HOME / 'more_scores.ipynb'
both = pytest.mark.parametrize('notebook', [MAIN, MORE], ids=lambda path: path.stem)


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
def test_notebook_definesNoFunctions(notebook):
    """Functions live in the modules."""
    assert not re.search(r'^\s*(def|class) ', '\n'.join(sourcesOf(notebook)), re.MULTILINE)


@both
def test_notebook_saysThatItsPicturesArePhantoms(notebook):
    """The committed outputs show synthetic patients, and the notebook prints so."""
    assert 'PHANTOMS' in printedBy(notebook)


def test_notebook_showsAGif():
    """One animated GIF is embedded."""
    outputs = [output for cell in cellsOf(MAIN, 'code') for output in cell['outputs']]
    assert sum('image/gif' in output.get('data', {}) for output in outputs) == 1


def test_readme_hasTheNotebooksTable():
    """README's table of scores has the figures that the committed notebook printed."""
    rows = re.findall(r'^(necrotic core|edema|enhancing tumor) +(.+)$', printedBy(MAIN), re.MULTILINE)
    assert len(rows) == 3
    for name, figures in rows:
        [line] = [line for line in README.read_text().splitlines() if line.startswith(f'| {name} |')]
        assert [float(figure) for figure in line.split('|')[2:-1]] == [float(figure) for figure in figures.split()]
