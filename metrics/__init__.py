"""Score a segmentation: voxels, surface distances, lesions, patients."""

from metrics.counts import confusionMatrix, countClasses, countsFromConfusion
from metrics.distances import hausdorff95, surfaceDice
from metrics.lesions import labelComponents, matchLesions, scoreLesions
from metrics.scores import compareAverages, computeMetrics, scorePatient, scoreTable, summarize

__all__ = [
    'compareAverages',
    'computeMetrics',
    'confusionMatrix',
    'countClasses',
    'countsFromConfusion',
    'hausdorff95',
    'labelComponents',
    'matchLesions',
    'scoreLesions',
    'scorePatient',
    'scoreTable',
    'summarize',
    'surfaceDice',
]
