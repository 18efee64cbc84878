import functools
import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchio as tio

import config
import fingerprint
import transforms


def identity(subject):
    return subject


def lower(subject):
    return {name: x - 1 for name, x in subject.items()}


def test_fingerprint_isTheSameInEveryProcess():
    """Equal transforms have one fingerprint, in another process too: no address of memory is in it."""
    config.PATCH_SIZE, config.CONTRAST_PROBABILITY = 128, 0.8  # as in config.py, which the other process reads
    expected, again = ([fingerprint.fingerprint(one) for one in transforms.makeTransforms()] for _ in range(2))
    code = 'import json, fingerprint, transforms;'
    code += 'print(json.dumps([*map(fingerprint.fingerprint, transforms.makeTransforms())]))'
    home = Path(fingerprint.__file__).parent
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=home)
    assert json.loads(found.stdout) == json.loads(json.dumps(expected)) == json.loads(json.dumps(again))


@pytest.mark.parametrize(
    ('one', 'other'),
    [
        (tio.RescaleIntensity((0, 1)), tio.RescaleIntensity((0, 2))),
        (tio.RescaleIntensity((0, 1)), tio.ZNormalization()),
        (tio.Compose([tio.ToCanonical()]), tio.Compose([tio.ToCanonical(), tio.ToCanonical()])),
        (tio.Lambda(identity), tio.Lambda(lower)),
        (tio.CropOrPad(9), tio.CropOrPad(9, mask_name='y')),
        (identity, lower),
        (functools.partial(lower, 2), functools.partial(lower, 3)),
        (np.abs, np.add),
        ({1, 2}, {1, 3}),
        ({'a': np.arange(2)}, {'a': np.arange(3)}),
        (torch.zeros(2), torch.ones(2)),
    ],
)
def test_fingerprint_differsForDifferentTransforms(one, other):
    """Other parameters, kinds, functions or arguments make another fingerprint; each can be written as JSON."""
    fingerprints = [json.dumps(fingerprint.fingerprint(value)) for value in (one, one, other)]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def makeNested():
    def nested(subject):
        return subject

    return nested


@pytest.mark.parametrize(
    'function',
    [lambda subject: subject, makeNested(), {}.get, tio.RescaleIntensity((0, 1)).apply_transform],
    ids=['lambda', 'nested', 'builtin method', 'method'],
)
def test_fingerprint_refusesFunctionsWithoutAName(function):
    """A lambda, a nested function and a method are refused, inside a torchio transform or a list too."""
    for value in (function, tio.Lambda(function), functools.partial(function, 1), [function]):
        with pytest.raises(ValueError, match='is not at the top level of an imported module'):
            fingerprint.fingerprint(value)


@pytest.mark.parametrize('kind', ['function', 'class'])
def test_fingerprint_refusesWhatANotebookDefines(monkeypatch, kind):
    """The cell may be edited and run again: a function of __main__, or an object of its class, is refused."""
    scope = {'__name__': '__main__'}
    exec('def mine(subject):\n    return subject\nclass Mine:\n    pass', scope)
    for name in ('mine', 'Mine'):
        monkeypatch.setattr(sys.modules['__main__'], name, scope[name], raising=False)
    with pytest.raises(ValueError, match=r'__main__\.[mM]ine is not at the top level of an imported module'):
        fingerprint.fingerprint(scope['mine'] if kind == 'function' else scope['Mine']())


@pytest.fixture
def writeModule(tmp_path, monkeypatch):
    """Return a function that writes a user's module and imports it anew."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(text):
        (tmp_path / 'mine.py').write_text(text)
        sys.modules.pop('mine', None)
        importlib.invalidate_caches()
        sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
        try:
            return importlib.import_module('mine')
        finally:
            sys.dont_write_bytecode = before

    yield write
    sys.modules.pop('mine', None)


FUNCTION = 'import numpy as np\ndef scale(x):\n    return half(x)\ndef half(x):\n    return np.divide(x, 2)\n'
CLASS = 'import torchio as tio\nclass Scale(tio.Transform):\n    def apply_transform(self, x):\n        return {}\n'


@pytest.mark.parametrize(
    ('text', 'name', 'change'),
    [
        (FUNCTION, 'scale', ('half(x)\ndef', 'half(x + 1)\ndef')),
        (FUNCTION, 'scale', ('2', '3')),
        (CLASS, 'Scale', ('{}', 'x')),
    ],
    ids=['function', 'function that it calls', 'class'],
)
def test_fingerprint_changesWithTheSource(writeModule, text, name, change):
    """A function or class of a module that was edited, or that calls one that was, has another fingerprint."""
    before = [fingerprint.fingerprint(getattr(writeModule(text), name)) for _ in range(2)]
    after = fingerprint.fingerprint(getattr(writeModule(text.replace(*change)), name))
    assert before[0] == before[1] != after


@pytest.mark.parametrize('reading', ['LEVEL', 'config.PATCH_SIZE', '(lambda: LEVEL)()'])
def test_fingerprint_refusesAFunctionThatReadsAGlobal(writeModule, reading):
    """A function that reads a variable of its module, or settings of another one, is not taken for the same."""
    module = writeModule(f'import config\nLEVEL = 2\ndef scale(x):\n    return x * {reading}\n')
    words = rf'mine\.scale reads the global {"config" if "config" in reading else "LEVEL"}, which may change'
    with pytest.raises(ValueError, match=words):
        fingerprint.fingerprint(tio.Lambda(module.scale))
