"""Write a file whole or not at all."""

import os
import re
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def writeWhole(file):
    """Gives a path beside `file` to write to; what was written there becomes `file` when the block ends.

    The path beside is `<file>.part`, always the same, so that the next run overwrites what a kill left. Until the
    block has ended, synced and moved, an older `file` stands untouched; when the block raises, the part is removed.

    Args:
        file: path of the file to be written (str or Path). Missing folders above it are made.

    Yields:
        Path of the part. Its name ends in `.part`: a library that reads the format from the ending must be told it.

    Raises:
        OSError: what the disk answered (full, read-only, no permission), naming `file` as it was asked for.
    """
    file = Path(file)
    part = file.with_name(file.name + '.part')
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with open(part, 'rb+') as written:
            os.fsync(written.fileno())
        os.replace(part, file)
    except BaseException as error:
        with suppress(OSError):  # of a disk that is gone, the first error tells more
            part.unlink(missing_ok=True)
        number = _errnoOf(error)
        if number:  # the disk's; ours about bad input have no number
            raise OSError(number, f'{file} could not be written: {os.strerror(number)}') from error
        raise


def _errnoOf(error):
    """Gives the number under which the system reported an error, None where it is not the system's."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    told = re.search(r'errno = (\d+)', str(error))  # HDF5's, which may come as a RuntimeError
    return told and int(told[1])
