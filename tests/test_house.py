"""Test that each module stays in its room: what it imports."""

import ast
from pathlib import Path

import pytest

HOME = Path(__file__).resolve().parent.parent

# Each room and the rooms that it may import, all of which stand above it, so that there is no circle; * is all of them
ROOMS = {
    'config': '',
    'atomic': '',
    'ranks': '',
    'volumes': '',
    'editions': 'config',
    'patients': 'config editions volumes',
    'parallel': 'config',
    'saving': 'config atomic editions patients',
    'folders': 'atomic',
    'predictor': 'editions folders patients saving volumes',
    'subjects': 'editions patients',
    'cohort': 'config atomic editions parallel patients subjects volumes',
    'transforms': 'config patients volumes',
    'fingerprint': '',
    'identity': 'config editions fingerprint patients transforms',
    'parts': 'identity',
    'trained': 'config editions identity patients transforms volumes',
    'recipe': 'config ranks trained',
    'preprocess': 'config atomic identity parallel patients transforms volumes',
    'batched': 'config transforms',
    'windows': 'config recipe volumes',
    'engine': 'config parallel patients ranks recipe trained transforms volumes windows',
    'checkpoints': 'config atomic identity ranks recipe trained',
    'metrics': 'config',
    'components': 'config metrics',
    'quality': 'config atomic editions',
    'scoring': 'config components editions metrics parallel patients',
    'postprocess': 'config atomic components editions engine fingerprint identity metrics parallel patients quality '
    'saving scoring trained',
    'pictures': 'config atomic editions patients transforms metrics quality volumes',
    'followup': 'editions',
    'review': 'config editions metrics patients pictures scoring',
    'report': 'config atomic editions followup metrics parallel patients pictures review scoring subjects',
    'utils': '*',
    'train': 'config batched checkpoints cohort engine preprocess ranks recipe utils',
    'card': 'atomic editions metrics subjects',
    'deploy': 'config atomic card checkpoints components editions folders identity metrics patients predictor recipe '
    'trained',
    'phantom': 'config atomic',
    'benchmarks': '*',
}
FAMILIES = ('batched', 'metrics', 'pictures', 'benchmarks')
FILES = sorted([*HOME.glob('*.py'), *(file for family in FAMILIES for file in (HOME / family).glob('*.py'))])


def nameOf(file):
    return str(file.relative_to(HOME))


def roomOf(file):
    """Return the family of a module, or its own name if it stands at the top."""
    return file.relative_to(HOME).parts[0].removesuffix('.py')


def above(room):
    """Return the rooms that stand above one in the table."""
    return list(ROOMS)[: list(ROOMS).index(room)]


def allowed(room):
    """Return the rooms that one may import."""
    return set(above(room) if ROOMS[room] == '*' else ROOMS[room].split())


def parse(file):
    return list(ast.walk(ast.parse(file.read_text())))


def importsOf(file):
    """Return the top-level names of all modules that a module imports, also inside functions."""
    modules = set()
    for node in parse(file):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module or roomOf(file))  # `from . import name` stays in the family
    return {module.split('.')[0] for module in modules}


def test_rooms_areThoseOfTheTable():
    """Every module belongs to a room of the table, and every room stands below those that it may import."""
    assert {roomOf(file) for file in FILES} == set(ROOMS)
    for room in ROOMS:
        assert allowed(room) <= set(above(room)), room


@pytest.mark.parametrize('file', FILES, ids=nameOf)
def test_module_importsOnlyWhatItsRoomMay(file):
    """Of our rooms, a module imports its own and those that the table allows."""
    assert (importsOf(file) & set(ROOMS)) - {roomOf(file)} <= allowed(roomOf(file))


def test_families_openWithReExportsOnly():
    """Only the families have an __init__.py, and it holds a docstring, imports from the family, and __all__."""
    doors = list(HOME.glob('*/__init__.py'))
    assert sorted(file.parent.name for file in doors) == sorted(FAMILIES)
    for file in doors:
        docstring, *others = ast.parse(file.read_text()).body
        assert isinstance(docstring, ast.Expr) and isinstance(docstring.value.value, str)
        for node in others:
            isReExport = isinstance(node, ast.ImportFrom) and node.module.startswith(f'{file.parent.name}.')
            isList = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == '__all__'
            assert isReExport or isList, f'{nameOf(file)}, line {node.lineno}'
