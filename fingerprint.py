"""Describe a transform so that it can be compared with that of an earlier run."""

import functools
import inspect
import json
import site
import sys
import sysconfig
import types
import zlib
from pathlib import Path

import numpy as np
import torch


def fingerprint(value):
    """Return plain values that are equal for equal transforms, in every process.

    Args:
        value: torchio transform, function of a module, or a number, text, array, dict, list, tuple or set of such.

    Raises:
        ValueError: it cannot be compared: a lambda, a nested function, a function or class of a notebook or script, or
            one that reads a global variable or another module's settings.
    """
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, dict):
        return [[fingerprint(key), fingerprint(item)] for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [fingerprint(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        return value.tolist()
    if isinstance(value, functools.partial):
        return [fingerprint(value.func), fingerprint(value.args), fingerprint(value.keywords)]
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
        return _fingerprintCode(value)
    if hasattr(value, '__dict__'):
        held = sorted(vars(value).items())
        # an object may hold one of its own methods, as CropOrPad does: the name says which
        held = {name: item.__name__ if getattr(item, '__self__', None) is value else item for name, item in held}
        return [fingerprint(type(value)), fingerprint(held)]
    return [fingerprint(type(value)), repr(value)]


def _fingerprintCode(value):
    """Return the name of a function or class and, unless a library has it, a checksum of its source."""
    name = f'{value.__module__}.{value.__qualname__}'
    found = getattr(sys.modules.get(value.__module__), value.__qualname__, None)
    if found is not value or value.__module__ == '__main__':
        raise ValueError(f'{name} is not at the top level of an imported module.')
    sources = []
    for code in value.__mro__ if isinstance(value, type) else [value]:
        if not _isOfLibrary(sys.modules[code.__module__]):
            sources.append(inspect.getsource(code))
            for member, item in vars(code).items() if isinstance(code, type) else [('', code)]:
                item = getattr(item, 'fget', getattr(item, '__func__', item))  # of a property or static method
                if isinstance(item, types.FunctionType):
                    sources += _readFunctions(item, name)
                elif not member.startswith('_') and isinstance(item, (str, int, float, tuple, list, dict)):
                    sources.append(json.dumps(fingerprint(item)))  # a class attribute may be set at run time
    return [name, zlib.crc32(''.join(sources).encode())] if sources else name


def _readFunctions(function, name):
    """Return the sources of the functions that a function reads from its module; refuse what else it reads there."""
    sources = []
    scope = function.__globals__
    for key, item in sorted((name, scope[name]) for name in _namesIn(function.__code__) if name in scope):
        if isinstance(item, types.ModuleType) and _isOfLibrary(item):
            continue
        if isinstance(item, (type, types.FunctionType, types.BuiltinFunctionType)):
            if item is not function and item.__qualname__ != function.__qualname__.split('.')[0]:
                sources.append(json.dumps(_fingerprintCode(item)))
            continue
        raise ValueError(f'{name} reads the global {key}, which may change.')
    return sources


def _namesIn(code):
    """Return the names that a code object and the functions within it read."""
    return set(code.co_names).union(*(_namesIn(each) for each in code.co_consts if isinstance(each, types.CodeType)))


def _isOfLibrary(module):
    """Return whether a module is Python's or an installed one, whose version is fixed."""
    file = getattr(module, '__file__', None)
    homes = {Path(site.getusersitepackages()).resolve()}
    homes |= {Path(sysconfig.get_path(name)).resolve() for name in ('stdlib', 'platstdlib', 'purelib', 'platlib')}
    return file is None or not homes.isdisjoint(Path(file).resolve().parents)
