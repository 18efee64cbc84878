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
    """Yield a temporary path to write to, which is renamed to `file` when the block ends.

    The temporary file is `<file>.part`, so the next run overwrites what a killed one left. It is locked against other
    processes. An older `file` stays untouched until the temporary file is complete and synced to the disk. If the block
    raises, the temporary file is removed.

    Args:
        file: path of the file to write (str or Path). Missing folders are created.

    Yields:
        Path that ends in `.part`. A library that guesses the format from the ending has to be told it.

    Raises:
        OSError: the disk is full, read-only, or access is denied. The message names `file`.
        BlockingIOError: another process is writing the file.
    """
    file = Path(file)
    temporary = file.with_name(file.name + '.part')
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _locked(temporary, file):
            try:
                yield temporary
                with open(temporary, 'rb+') as written:
                    os.fsync(written.fileno())
                os.replace(temporary, file)
            except BaseException:
                with suppress(OSError):  # the first error tells more
                    temporary.unlink(missing_ok=True)
                raise
    except Exception as error:
        number = getattr(error, 'errno', None)
        if number is None and (reported := re.search(r'errno = (\d+)', str(error))):  # in HDF5's message
            number = int(reported[1])
        if number is None:  # not from the system, such as an error about bad input
            raise
        raise OSError(number, f'{file} could not be written: {os.strerror(number)}') from error


@contextmanager
def _locked(temporary, file):
    """Hold a lock on a temporary file, which is created if it is missing. It ends with the process, even if killed."""
    if fcntl is None:
        yield
        return
    with open(temporary, 'ab') as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                f'Another process is writing {file}: wait for it, or set another config.OUTPUT_FOLDER.'
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
