"""Write a file whole or not at all."""

import os
import re
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None


@contextmanager
def writeAtomically(file):
    """Yield a temporary path to write to; when the block ends, the temporary file becomes `file`.

    The temporary file is `<file>.part`. Its name is always the same, so the next run overwrites what a killed one left.
    An older `file` stays untouched until the temporary file is complete and synced. If the block raises, the temporary
    file is removed. It is locked, so that two processes do not write into it at once.

    Args:
        file: path of the file to write (str or Path). Missing folders are created.

    Yields:
        Path that ends in `.part`: name the format to a library that would guess it from the ending.

    Raises:
        OSError: the disk is full, read-only, or access is denied. The message names `file`.
        BlockingIOError: another process is writing the file.
    """
    file = Path(file)
    part = file.with_name(file.name + '.part')
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _locked(part, file):
            try:
                yield part
                with open(part, 'rb+') as written:
                    os.fsync(written.fileno())
                os.replace(part, file)
            except BaseException:
                with suppress(OSError):  # the first error says more
                    part.unlink(missing_ok=True)
                raise
    except BaseException as error:
        number = _errnoOf(error)
        if number:  # errors about bad input have no number
            raise OSError(number, f'{file} could not be written: {os.strerror(number)}') from error
        raise


@contextmanager
def _locked(part, file):
    """Hold a lock on a temporary file, which is made if it is missing; the system releases that of a killed process."""
    if fcntl is None:
        yield
        return
    with open(part, 'ab') as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                f'Another process is writing {file}: wait for it, or set another config.OUTPUT_FOLDER.'
            ) from None
        except OSError:
            pass  # a file system without locks
        yield


def _errnoOf(error):
    """Return the system's error number, or None if the error does not come from the system."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    reported = re.search(r'errno = (\d+)', str(error))  # HDF5 raises RuntimeError with the number in its text
    return reported and int(reported[1])
