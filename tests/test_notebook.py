import json
import re
from pathlib import Path

import pytest

HOME = Path(__file__).resolve().parent.parent
NOTEBOOK = HOME / 'brats_segmentation.ipynb'


@pytest.fixture
def cells():
    return json.loads(NOTEBOOK.read_text())['cells']


def test_notebook_holdsTheOutputsOfOneCleanRun(cells):
    """Every code cell was run once, in order, without an error, a warning or a bar's widget; under 3 MB in all."""
    code = [cell for cell in cells if cell['cell_type'] == 'code']
    assert [cell['execution_count'] for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell['outputs'] if output['output_type'] == 'error']
    assert not [output for cell in code for output in cell['outputs'] if output.get('name') == 'stderr']
    assert 'widget' not in NOTEBOOK.read_text() and NOTEBOOK.stat().st_size < 3e6


def test_notebook_isTheStoryOnly(cells):
    """No function is defined in it, cells are short, and each step has a sentence."""
    code = [''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code']
    assert not re.search(r'^\s*(def|class) ', '\n'.join(code), re.MULTILINE)
    assert all(len(source.splitlines()) <= 25 for source in code)
    assert sum(cell['cell_type'] == 'markdown' for cell in cells) >= 8


def test_notebook_saysThatItsPicturesArePhantoms(cells):
    """The committed outputs show synthetic patients, and the top says so."""
    top = json.dumps([cell.get('outputs') for cell in cells[:8]])
    assert 'PHANTOMS' in top
