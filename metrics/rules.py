"""State the rules by which each year of the challenge scores a segmentation; `docs/scores.md` has them in words."""

from dataclasses import dataclass, field

import numpy as np

import config


@dataclass(frozen=True)
class Region:
    """How one region of a rule is separated into lesions.

    Attributes:
        classes: the region's classes; 4 is the resection cavity.
        dilation: iterations with 18 neighbours, in voxels whatever the spacing. Voxels in one 26-connected component
            of the dilated mask are one lesion. 0: the mask's own components.
        smallestPredicted: voxels; predicted lesions of this size or smaller are removed before anything is scored.
        smallestTrue: mm3; true lesions of this volume or smaller are not scored.
        mergedBy: names of regions. Lesions that touch the same lesion of such a region are one lesion; in this order.
    """

    classes: tuple
    dilation: int = 0
    smallestPredicted: int = 0
    smallestTrue: float = 0.0
    mergedBy: tuple = ()


@dataclass(frozen=True)
class Rule:
    """The rules of one challenge.

    Attributes:
        regions: name -> Region, in the order of the tables; None: `config.REGIONS`, and no lesion-wise scores.
        helpers: regions that are not scored; others are merged by them.
        hd95: rule of `hausdorff95`.
        ownPenalty: mm; None: the penalty is that of the rule `hd95`, in `config.HD95_EMPTY`.
        isPredictionDilated: predicted lesions are separated with the region's dilation, as true ones are; else they are
            the predicted components.
        isOneToOne: a true lesion is paired with one predicted lesion at most, and the reverse, so that the sum of the
            pairs' Dice is largest. Else a true lesion has all predicted lesions that touch its dilation.
        isMeanOverPairs: the mean covers the pairs only; else false negatives and false positives count with Dice 0 and
            the penalty.
        isEmptyScored: a region empty in truth and prediction has Dice 1, NSD 1 and HD95 0; else NaN.
        isOverlapNeeded: without a common voxel a region has Dice 0, NSD 0 and the penalty.
        tolerances: mm, of the NSD of the whole region.
        lesionTolerances: mm, of the NSD of lesions.
    """

    regions: dict | None
    helpers: dict = field(default_factory=dict)
    hd95: str = 'surface-distance'
    ownPenalty: float | None = None
    isPredictionDilated: bool = False
    isOneToOne: bool = False
    isMeanOverPairs: bool = False
    isEmptyScored: bool = True
    isOverlapNeeded: bool = False
    tolerances: tuple = ()
    lesionTolerances: tuple = ()

    @property
    def penalty(self):
        """The HD95 in mm of a region or lesion that only truth or prediction has."""
        return config.HD95_EMPTY[self.hd95] if self.ownPenalty is None else self.ownPenalty

    def namedRegions(self):
        """Return the scored regions, name -> Region."""
        if self.regions is None:
            return {name: Region(classes) for name, classes in config.REGIONS.items()}
        return self.regions

    def allRegions(self):
        """Return the scored regions and those that they are merged by, name -> Region."""
        return self.namedRegions() | self.helpers

    def isMerging(self):
        """Return whether lesions of one region are merged by those of another."""
        return any(region.mergedBy for region in self.namedRegions().values())

    def numClasses(self):
        """Return how many classes truth and prediction may have, the background included."""
        return max(config.NO_CLASSES, 1 + max(max(region.classes) for region in self.allRegions().values()))

    def classTable(self, name):
        """Return whether each class belongs to a region, bool (`numClasses`,)."""
        return np.isin(np.arange(self.numClasses()), self.allRegions()[name].classes)


_CLASSES = {'WT': (1, 2, 3), 'TC': (1, 3), 'ET': (3,), 'NETC': (1,), 'SNFH': (2,), 'RC': (4,)}

RULES = {
    'BraTS2020': Rule(None, hd95='challenge'),
    'BraTS2023': Rule(  # GLI and SSA
        {name: Region(_CLASSES[name], dilation=3, smallestTrue=50) for name in ('WT', 'TC', 'ET')}
    ),
    'BraTS2024': Rule(  # GLI of 2024 and 2025
        {
            'WT': Region((1, 2, 3), dilation=3, smallestPredicted=20, smallestTrue=20),
            'TC': Region((1, 3), dilation=3, smallestPredicted=20, smallestTrue=20),
            'ET': Region((3,), dilation=3, smallestPredicted=10, smallestTrue=10, mergedBy=('NETC', 'RC')),
            'NETC': Region((1,), dilation=5, smallestPredicted=20, smallestTrue=20, mergedBy=('ET', 'RC')),
            'SNFH': Region((2,), dilation=3, smallestPredicted=20, smallestTrue=20, mergedBy=('ET', 'RC', 'NETC')),
            'RC': Region((4,), dilation=5, smallestPredicted=20, smallestTrue=20, mergedBy=('ET', 'NETC')),
        },
        ownPenalty=337.0,
        isPredictionDilated=True,
        tolerances=(0.5, 1.0),
        lesionTolerances=(0.5, 1.0),
    ),
    'BraTS2024-SSA': Rule(  # BraTS-Africa of 2024 and 2025
        {
            'WT': Region((1, 2, 3), dilation=3, smallestPredicted=50, smallestTrue=50),
            'TC': Region((1, 3), dilation=3, smallestPredicted=50, smallestTrue=50),
            'ET': Region((3,), dilation=3, smallestPredicted=50, smallestTrue=50, mergedBy=('NETC',)),
        },
        helpers={'NETC': Region((1,), dilation=3, smallestPredicted=50)},
        isPredictionDilated=True,
        tolerances=(0.5, 1.0),
        lesionTolerances=(0.5, 1.0),
    ),
    'BraTS2026': Rule(
        {name: Region(classes) for name, classes in _CLASSES.items()},
        hd95='pooled',
        isOneToOne=True,
        isMeanOverPairs=True,
        isEmptyScored=False,
        isOverlapNeeded=True,
        tolerances=(0.5,),
        lesionTolerances=(1.0,),
    ),
}


def findRule(name, isLesionWise=False):
    """Return the Rule of a name in `RULES`.

    Raises:
        ValueError: there is no such rule, it has no lesion-wise scores but `isLesionWise` asks for them, or it has
            classes that `config` does not have.
    """
    known = [other for other, rule in RULES.items() if not isLesionWise or rule.regions]
    if name not in known:
        what = 'lesion-wise scores by' if isLesionWise else 'scores by'
        raise ValueError(f'rule is {name!r}; there are {what} {", ".join(known)}.')
    if RULES[name].regions and config.NO_CLASSES < 4:
        raise ValueError(
            f'rule is {name!r}, which tells the tissues of a tumor apart, but config.NO_CLASSES is '
            f'{config.NO_CLASSES}; BraTS2020 scores the regions of config.REGIONS.'
        )
    return RULES[name]
