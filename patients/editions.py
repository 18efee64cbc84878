"""How each data set names its patients and files, and which class each of its labels is."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import config

COLUMNS = ('t1', 't1ce', 't2', 'flair', 'seg')
CAVITY = 4  # the class of the resection cavity; with fewer classes it is background


@dataclass(frozen=True)
class Edition:
    """How one data set names its files and labels, in plain values, also as JSON has them. The code knows nothing else.

    Attributes:
        patient: regular expression of a patient id.
        suffixes: end of a file name, in any case -> column or columns of the file list, some of `COLUMNS`.
        classes: label in the files, 0 to 255 -> class: 0 background, 1 necrotic core, 2 edema, 3 enhancing tumor, 4
            resection cavity; or 0 and 1 only, for masks of tumor or not. If two labels have one class, the first is
            written.
        name: pattern of a file name without .nii or .nii.gz; with its folder where it has a slash.
        time: regular expression of the end of an id that tells the scans of one subject apart; None: one scan each.
        channels: column -> index in a 4-D file; None: one file per modality.
        automatic: suffixes of segmentations that nobody has corrected by hand; used only if there is no other.
        claims: regular expression of the ids that belong to this edition if `config.EDITION` names it; None: `patient`.
        note: what an unknown label may mean, for the error message.
    """

    patient: str
    suffixes: dict
    classes: dict
    name: str = r'{patient}[_-]{suffix}'
    time: str | None = None
    channels: dict | None = None
    automatic: tuple = ()
    claims: str | None = None
    note: str = ''

    def __post_init__(self):
        suffixes = {end: (some,) if isinstance(some, str) else tuple(some) for end, some in self.suffixes.items()}
        object.__setattr__(self, 'suffixes', suffixes)
        object.__setattr__(self, 'classes', {int(label): number for label, number in self.classes.items()})
        columns = {column for some in suffixes.values() for column in some}
        if not columns or not columns <= set(COLUMNS):
            raise ValueError(
                f'An edition has the columns {sorted(columns)}; some of {", ".join(COLUMNS)} were expected, each after '
                "the end of its file names, as in suffixes={'pre': 't1'}."
            )
        if self.classes.get(0) != 0 or not all(0 <= label <= 255 for label in self.classes):
            raise ValueError(f'An edition has the classes {self.classes}; labels 0 to 255 and 0: 0 were expected.')

    def parse(self, path, patient=None):
        """Return (patient id, columns, isAutomatic) of a file that is named as in this edition, else None.

        `patient` is a regular expression of the id in place of the edition's.
        """
        suffixes = {suffix.lower(): columns for suffix, columns in self.suffixes.items()}
        ends = '|'.join(map(re.escape, suffixes))
        pattern = self.name.format(patient=f'(?P<patient>{patient or self.patient})', suffix=f'(?P<suffix>{ends})')
        path = Path(path)
        stem = re.sub(r'\.nii(\.gz)?$', '', path.name, flags=re.IGNORECASE)
        name = f'{path.parent.name}/{MISNAMED.get(stem, stem)}'
        match = re.fullmatch(f'(?:.*/)?{pattern}', name, re.IGNORECASE)
        if match is None:
            return None
        suffix = match['suffix'].lower()
        return match['patient'], suffixes[suffix], suffix in self.automatic

    def isNameOf(self, patient):
        """Return whether an id is named as in this edition, or claimed by it."""
        return re.fullmatch(self.claims or self.patient, str(patient), re.IGNORECASE) is not None


_CLASSIC = {name: (name,) for name in COLUMNS}
_NEWER = {'t1n': ('t1',), 't1c': ('t1ce',), 't2w': ('t2',), 't2f': ('flair',), 'seg': ('seg',)}
_UCSF = {'t1': ('t1',), 't1c': ('t1ce',), 't2': ('t2',), 'flair': ('flair',), 'tumor_segmentation': ('seg',)}
_UPENN = {'t1': ('t1',), 't1gd': ('t1ce',), 't2': ('t2',), 'flair': ('flair',)}
_ALL = ('flair', 't1', 't1ce', 't2')  # the order in one 4-D file
_UNTIL_2021 = {0: 0, 1: 1, 2: 2, 4: 3}
_FROM_2023 = {0: 0, 1: 1, 2: 2, 3: 3}
EDITIONS = {
    'BraTS2017': Edition(r'Brats17_\w+', _CLASSIC, _UNTIL_2021),
    'BraTS2018': Edition(r'Brats18_\w+', _CLASSIC, _UNTIL_2021),
    'BraTS2019': Edition(r'BraTS19_\w+', _CLASSIC, _UNTIL_2021),
    'BraTS2020': Edition(r'BraTS20_(?:Training|Validation|Testing)_\d+', _CLASSIC, _UNTIL_2021),
    'BraTS2021': Edition(r'BraTS2021_\d+', _CLASSIC, _UNTIL_2021),
    # GLI of 2025 holds both: time points below 100 were scanned before treatment, the others after it
    'BraTS2023': Edition(
        r'BraTS-(?:GLI-\d+-0\d\d|SSA-\d+-\d+)',
        _NEWER,
        _FROM_2023,
        time=r'-\d+',
        claims=r'BraTS-(?:GLI|SSA)-\d+-\d+',
        note='A time point below 100 was scanned before treatment, and has no resection cavity (4). If this scan was '
        "made after treatment, set config.EDITION = 'BraTS2024'.",
    ),
    'BraTS2024': Edition(
        r'BraTS-GLI-\d+-[1-9]\d\d',
        _NEWER,
        {**_FROM_2023, 4: CAVITY},
        time=r'-\d+',
        claims=r'BraTS-GLI-\d+-\d+',
    ),
    'BraTS-GoAT': Edition(r'BraTS-GoAT-\d+', _NEWER, _FROM_2023),
    'UCSF-PDGM': Edition(r'UCSF-PDGM-\d+(?:_FU\d+d)?', _UCSF, _UNTIL_2021, time=r'_FU\d+d'),
    'UPENN-GBM': Edition(
        r'UPENN-GBM-\d+_\d+',
        {**_UPENN, 'segm': ('seg',), 'automated_approx_segm': ('seg',)},
        _UNTIL_2021,
        time=r'_\d+',
        automatic=('automated_approx_segm',),
    ),
    'Decathlon': Edition(
        r'BRATS_\d+',
        {'imagestr': _ALL, 'imagests': _ALL, 'labelstr': ('seg',)},
        {0: 0, 1: 2, 2: 1, 3: 3},
        name=r'{suffix}/{patient}',
        channels={column: place for place, column in enumerate(_ALL)},
    ),
}
# Files published under a wrong name: stem -> correct stem
MISNAMED = {'W39_1998.09.19_Segm': 'BraTS20_Training_355_seg'}
# Data sets that are not read: regular expression of the beginning of a file name -> why
REFUSED = {
    r'BraTS-PED-': 'it is BraTS-PED, tumors of children, where label 1 is the enhancing tumor, 2 the non-enhancing '
    'one, 3 the cystic component and 4 the edema',
    r'BraTS-MEN-RT-': 'it is BraTS-MEN-RT, meningiomas before radiotherapy: another disease, with one modality and the '
    'outline of the whole tumor only',
    r'BraTS-MEN-': 'it is BraTS-MEN, meningiomas: another disease',
    r'BraTS-MET-': 'it is BraTS-MET, metastases: another disease',
    r'PatientID_\d+_Timepoint_': 'it looks like MU-Glioma-Post, of which public descriptions disagree on what '
    'the labels mean',
}


class RefusedDataError(ValueError):
    """A file of a data set that is not read, such as another disease."""


def known():
    """Return all editions, name -> Edition: those of `config.OWN_EDITIONS` first, then `EDITIONS`."""
    own = {name: each if isinstance(each, Edition) else Edition(**each) for name, each in config.OWN_EDITIONS.items()}
    return own | EDITIONS | own  # first in order, and in place of a known one


class Found(NamedTuple):
    """What the name of a file says, see `detect`."""

    edition: str
    patient: str
    columns: tuple
    isAutomatic: bool  # a segmentation that nobody has corrected by hand


def detect(path):
    """Return what the name of a file says, a `Found`; None if it is not named like a patient's file.

    `config.EDITION` decides for the names that it claims, and for names of no known edition.

    Raises:
        ValueError: `config.EDITION` is unknown; or an image's name fits no edition while none is declared, or belongs
            to a data set that is not read.
    """
    found, declared = known(), config.EDITION
    if declared is not None:
        if declared not in found:
            raise ValueError(f'config.EDITION is {declared!r}; known are {", ".join(found)}.')
        if parsed := found[declared].parse(path, found[declared].claims):
            return Found(declared, *parsed)
    for name, edition in found.items():
        if parsed := edition.parse(path):
            return Found(name, *parsed)
    anyId = '[^/]+?'  # as few characters as possible: the longest of two suffixes with the same end
    # the Decathlon's folders have the same names for other organs, and any program may write a seg: no patient's
    parsed = [edition.parse(path, anyId) for edition in found.values() if not edition.channels]
    isImage = any(each and each[1] != ('seg',) for each in parsed)
    file = Path(path).name
    reason = next((why for pattern, why in REFUSED.items() if re.match(pattern, file, re.IGNORECASE)), None)
    if isImage and reason:
        raise RefusedDataError(f'{path} cannot be read: {reason}. Take its folder away, or see docs/editions.md.')
    if declared is not None and not reason:
        parsed = found[declared].parse(path, anyId)
        return parsed and Found(declared, *parsed)
    if isImage:
        raise ValueError(f'{path}: {undetected()}')
    return None


def detectPatient(patient):
    """Return the name of a patient's edition from the id alone, for segmentations without images.

    `config.EDITION` decides for the ids that it claims, and for ids of no known edition.

    Raises:
        ValueError: neither the id nor `config.EDITION` says it.
    """
    found, declared = known(), config.EDITION
    if declared in found and found[declared].isNameOf(patient):
        return declared
    names = (name for name, edition in found.items() if re.fullmatch(edition.patient, str(patient), re.IGNORECASE))
    name = next(names, declared)
    if name not in found:
        raise ValueError(f'{patient}: {undetected()}')
    return name


def isAutomatic(path):
    """Return whether a segmentation's name says that nobody has corrected it by hand."""
    return any(parsed and parsed[2] for parsed in (edition.parse(path) for edition in known().values()))


def undetected():
    """Return, in words, that an edition cannot be detected and what to do."""
    return (
        'the edition cannot be detected from the file name, and labels mean different tissues in different editions. '
        f'Set config.EDITION to one of {", ".join(map(repr, known()))}, or describe your own in config.OWN_EDITIONS '
        '(docs/own_data.md).'
    )


def withoutTime(patient):
    """Return a patient id without its time point, the same for all scans of a subject; others as they are."""
    for edition in known().values():
        if edition.time and edition.isNameOf(patient):
            return re.sub(f'(?:{edition.time})$', '', str(patient), flags=re.IGNORECASE)
    return str(patient)


def classesOf(name, numClasses=None):
    """Return the class of each label of an edition, label -> class.

    With two classes every class of tumor is 1. The resection cavity is background unless there are five classes.

    Args:
        name: of the edition.
        numClasses: default `config.NO_CLASSES`.

    Raises:
        ValueError: the edition has a class beyond them, or masks of tumor or not while there are more than two.
    """
    numClasses = numClasses or config.NO_CLASSES
    classes = known()[name].classes
    if numClasses == 2:
        return {label: int(number not in (0, CAVITY)) for label, number in classes.items()}
    if set(classes.values()) - {CAVITY} == {0, 1}:
        raise ValueError(
            f'{name} has masks of tumor or not, and config.NO_CLASSES is {config.NO_CLASSES}: set it to '
            f'2; the class 1 would be {config.CLASS_NAMES[1]}.'
        )
    found = {label: 0 if number == CAVITY >= numClasses else number for label, number in classes.items()}
    if max(found.values()) >= numClasses:
        raise ValueError(
            f'{name} has the class {max(found.values())}; 0 to {numClasses - 1} were expected, as config.NO_CLASSES is '
            f'{config.NO_CLASSES}.'
        )
    return found


def countWithCavity():
    """Return `config.NO_CLASSES`, or 5 in place of 4, so that the resection cavity has a class of its own."""
    return CAVITY + 1 if config.NO_CLASSES == CAVITY else config.NO_CLASSES


def labelsOf(name, numClasses=None):
    """Return the label that each class of an edition is written as; arguments as in `classesOf`."""
    return labelsFrom(classesOf(name, numClasses), numClasses)


def labelsFrom(classes, numClasses=None):
    """Return the label that each class is written as, class -> label, in the order of the classes.

    The resection cavity is written as background where an edition has no label for it.

    Args:
        classes: label -> class, as `classesOf` returns it. If two labels have one class, the first is written.
        numClasses: default `config.NO_CLASSES`.
    """
    labels = {number: label for label, number in reversed(classes.items())}
    labels[0] = 0  # whatever else is background
    if (numClasses or config.NO_CLASSES) > CAVITY:
        labels.setdefault(CAVITY, 0)
    return dict(sorted(labels.items()))
