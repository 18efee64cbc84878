"""Read and write what a model folder says of itself: its `config.json`, with a checksum of every file."""

import hashlib
import json
from pathlib import Path

from atomic import writeAtomically

FORMAT = 1  # of the folder; raised when its layout changes


def writeAbout(folder, about):
    """Write `config.json` of a model folder: plain values, and a checksum of them."""
    about = {name: value for name, value in about.items() if name != 'checksum'}
    with writeAtomically(Path(folder, 'config.json')) as part:
        part.write_text(json.dumps({**about, 'checksum': _checksumOf(about)}, indent=1))


def readAbout(folder, endings):
    """Return the content of `config.json` of a model folder whose files are those that were packed.

    Args:
        folder: of `deploy.packModel`.
        endings: of the names of the files that are needed and compared with their checksums, a tuple.

    Raises:
        FileNotFoundError: no such folder, or a file of it is missing.
        ValueError: a file was changed or copied in part, or the folder is of a newer version.
    """
    file = Path(folder, 'config.json')
    if not file.is_file():
        raise FileNotFoundError(f'{folder} is no model folder, or only half copied: config.json is missing.')
    try:
        about = json.loads(file.read_text())
        found = about.pop('checksum')
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f'{file} is damaged, or not of a folder that deploy.packModel wrote: {error!r}.') from error
    if found != _checksumOf(about):
        raise ValueError(f'{file} was changed since it was packed. Pack the checkpoints again, with other settings.')
    if about['format'] > FORMAT:
        raise ValueError(f'{folder} has the format {about["format"]}, this version reads up to {FORMAT}: update it.')
    for name, expected in about['files'].items():
        if name.endswith(endings):
            if not Path(folder, name).is_file():
                raise FileNotFoundError(f'{Path(folder, name)} is missing: copy the whole folder again.')
            if hashFile(Path(folder, name)) != expected:
                raise ValueError(f'{Path(folder, name)} was changed or copied in part: copy the whole folder again.')
    return about


def _checksumOf(about):
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def hashFile(file):
    """Return the SHA-256 of a file as text."""
    with open(file, 'rb') as stream:
        return hashlib.file_digest(stream, 'sha256').hexdigest()
