"""Work on several patients of a file list at a time; leave out those that cannot be used, or stop, as config says."""

import functools
import os
import warnings

from joblib import Parallel, delayed, effective_n_jobs
from joblib.parallel import get_active_backend
from tqdm.auto import tqdm

import config

_AHEAD = 8  # patients per thread that may be ready before the caller takes them; bounds the memory


def withSegmentation(df, purpose):
    """Return the patients of a file list that have a segmentation, and print how many have none.

    Args:
        df: file list.
        purpose: what the patients are for, for the message.

    Raises:
        ValueError: no patient has a segmentation.
    """
    if df.empty:
        raise ValueError(f'There is no patient for {purpose}.')
    isSegmented = df['seg'].notna()
    if not isSegmented.any():
        raise ValueError(f'None of the {len(df)} patients has a segmentation: nothing is left for {purpose}.')
    if not isSegmented.all():
        print(f'{(~isSegmented).sum()} of {len(df)} patients have no segmentation and are left out of {purpose}.')
    return df[isSegmented]


def usesProcesses():
    """Return whether `joblib.parallel_config` has put the work on other processes or machines."""
    return not getattr(get_active_backend(prefer='threads')[0], 'supports_sharedmem', False)


def forEachPatient(function, df, description):
    """Yield `function(paths)` for each row of a file list, in order; joblib runs several patients at a time.

    `config.PREPROCESS_WORKERS` threads work on the patients: reading and counting release the interpreter's lock. Under
    `joblib.parallel_config` another backend takes their place; its processes get the values of `config`.

    Args:
        function: takes one row of the file list. The first error that it raises is raised here and ends the work.
        df: file list.
        description: text of the progress bar.
    """
    rows = [paths for _, paths in df.iterrows()]
    values = {name: value for name, value in vars(config).items() if name.isupper()}
    work = functools.partial(_work, function, os.getpid(), values)
    block = _AHEAD * effective_n_jobs(config.PREPROCESS_WORKERS)
    bar = tqdm(total=len(rows), desc=description, leave=False)
    with bar, Parallel(config.PREPROCESS_WORKERS, prefer='threads', return_as='generator') as parallel:
        for start in range(0, len(rows), block):  # joblib itself does not wait for the caller to take results
            # without arguments: Dask keeps those on one worker, and all is lost if it dies
            results = parallel(delayed(functools.partial(work, paths))() for paths in rows[start : start + block])
            try:
                for result in results:
                    bar.update()
                    yield result
            finally:
                with warnings.catch_warnings():  # joblib warns of unused results when the caller stops early
                    warnings.filterwarnings('ignore', r'.*\btasks\b')
                    results.close()


def _work(function, process, values, paths):
    """Return `function(paths)`; in another process than the given one, with the values of its `config`."""
    if os.getpid() != process:
        vars(config).update(values)
    return function(paths)


def attempt(function):
    """Return a function of one row of the file list that returns the ValueError or OSError that `function` raises."""
    return functools.partial(_attempt, function)


def _attempt(function, paths):
    try:
        return function(paths)
    except (ValueError, OSError) as error:
        return error


def leaveOut(error, progress=''):
    """Leave out a patient that cannot be used: print the error, or raise it, as `config.ON_BAD_PATIENT` says.

    Args:
        error: ValueError or OSError that names patient and file.
        progress: sentence on what was done before, added to the error.
    """
    if _stopsAtBad():
        raise type(error)(f"{error} {progress} config.ON_BAD_PATIENT = 'leaveOut' would go on.") from error
    print(f'Left out: {error}')


def reportBad(bad, numPatients):
    """Raise, or print, the errors of all bad patients at once, as `config.ON_BAD_PATIENT` says.

    Args:
        bad: dict of patient -> error.
        numPatients: how many patients there are, bad ones included.

    Raises:
        ValueError, OSError: a patient is bad and `config.ON_BAD_PATIENT` is 'stop', all are bad, or it is unknown.
    """
    stops, errors = _stopsAtBad(), list(bad.values())
    if errors and not stops and len(errors) == numPatients:
        raise ValueError(f'None of the {numPatients} patients can be used: {errors[0]}')
    if stops and len(errors) == 1:
        raise errors[0]
    if stops and errors:
        first = '\n'.join(map(str, errors[:20]))
        raise ValueError(f'{len(errors)} of {numPatients} patients cannot be used. The first of them:\n{first}')
    for error in errors:
        print(f'Left out: {error}')


def _stopsAtBad():
    """Return whether a patient that cannot be used stops the work."""
    if config.ON_BAD_PATIENT not in ('stop', 'leaveOut'):
        raise ValueError(f"config.ON_BAD_PATIENT is {config.ON_BAD_PATIENT!r}; 'stop' or 'leaveOut' was expected.")
    return config.ON_BAD_PATIENT == 'stop'


def resultsOf(function, df, description):
    """Return a dict of patient -> `function(paths)`; patients that cannot be used are treated as in `reportBad`.

    Args:
        function, df, description: as in `forEachPatient`.
    """
    results = dict(zip(df.index, forEachPatient(attempt(function), df, description), strict=True))
    bad = {patient: each for patient, each in results.items() if isinstance(each, Exception)}
    reportBad(bad, len(df))
    return {patient: each for patient, each in results.items() if patient not in bad}
