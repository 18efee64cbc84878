"""Score a segmentation: voxels, surface distances, lesions, patients."""

from metrics.comparison import compare, compareRecipes, fitLearningCurve, pairScores
from metrics.counts import confusionMatrix, countClasses, countsFromConfusion
from metrics.distances import hausdorff95, surfaceDice
from metrics.lesions import labelComponents, matchLesions, scoreLesions
from metrics.scores import compareAverages, computeMetrics, scorePatient, scoreTable, summarize

__all__ = [
    'compare',
    'compareAverages',
    'compareRecipes',
    'computeMetrics',
    'confusionMatrix',
    'countClasses',
    'countsFromConfusion',
    'fitLearningCurve',
    'hausdorff95',
    'labelComponents',
    'matchLesions',
    'pairScores',
    'scoreLesions',
    'scorePatient',
    'scoreTable',
    'summarize',
    'surfaceDice',
]
