"""Test that each room of the house imports only the rooms above it, and that a family's door only hands on names."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).resolve().parent.parent

# Each room and the rooms that it may import, all of which stand above it, so that there is no circle; * is all of them
ROOMS = {
    'config': '',
    'atomic': '',
    'ranks': '',
    'patients': 'config atomic',
    'phantom': 'config atomic',
    'transforms': 'config patients',
    'provenance': 'config patients transforms',
    'preprocess': 'config atomic patients transforms provenance',
    'dataset': 'config provenance transforms',
    'batched': 'config transforms',
    'engine': 'config patients transforms provenance ranks',
    'checkpoints': 'config atomic ranks provenance engine',
    'metrics': 'config',
    'postprocess': 'config atomic engine metrics patients provenance',
    'predictor': 'atomic patients',
    'deploy': 'config atomic checkpoints engine metrics patients postprocess predictor provenance',
    'pictures': 'config atomic metrics patients transforms postprocess',
    'utils': '*',
    'report': 'config atomic metrics patients pictures postprocess',
    'train': 'config atomic batched checkpoints dataset deploy engine metrics patients pictures preprocess provenance '
    'ranks report transforms',
    'benchmarks': '*',
}
FILES = sorted(
    file for pattern in ('*.py', '*/*.py') for file in HOME.glob(pattern) if file.relative_to(HOME).parts[0] != 'tests'
)


def roomOf(file):
    """Return the family of a module, or its own name if it stands at the top."""
    return file.relative_to(HOME).parts[0].removesuffix('.py')


def importsOf(file):
    """Return the top-level names of all modules that a module imports, also inside functions."""
    modules = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module or roomOf(file))  # `from . import name` stays in the family
    return {module.split('.')[0] for module in modules}


def test_rooms_importOnlyTheRoomsAbove():
    """Every module belongs to a room and imports only what the table allows, all of which stands above it."""
    assert {roomOf(file) for file in FILES} == set(ROOMS)
    for number, (room, names) in enumerate(ROOMS.items()):
        above = set(list(ROOMS)[:number])
        allowed = above if names == '*' else set(names.split())
        assert allowed <= above, room
        for file in FILES:
            if roomOf(file) == room:
                assert (importsOf(file) & set(ROOMS)) - {room} <= allowed, file


def test_doors_handOnNamesOnly():
    """A family's __init__ holds imports and __all__; that of `patients` opens what needs pandas when it is used."""
    for file in HOME.glob('*/__init__.py'):
        for node in ast.parse(file.read_text()).body[1:]:
            isLazy = file.parent.name == 'patients' and isinstance(node, ast.FunctionDef) and node.name == '__getattr__'
            assert isinstance(node, (ast.Import, ast.ImportFrom, ast.Assign)) or isLazy, f'{file}, line {node.lineno}'


@pytest.mark.parametrize(
    ('module', 'absent'),
    [
        ('patients', ('pandas', 'torch', 'joblib', 'tqdm', 'imageio')),
        ('predictor', ('pandas', 'torch', 'torchio', 'segmentation_models_pytorch')),
        ('dataset', ('matplotlib', 'segmentation_models_pytorch', 'engine', 'pictures')),
    ],
)
def test_import_loadsNoMoreThanItsRoomNeeds(module, absent):
    """The predictor starts without torch, and a spawned loader worker without pictures."""
    code = f'import sys, {module}; print([name for name in {absent} if name in sys.modules])'
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=HOME)
    assert found.stdout.strip() == '[]'
