"""Show patients, transforms, predictions and scores as figures and animated GIFs."""

from pictures.calibration import countCalibration, plotCalibration
from pictures.charts import plotCohort, plotConfusion, plotCurves, plotVolumes
from pictures.gifs import makeGifs
from pictures.scores import plotComparison, plotLearningCurve, plotQuality, plotRecipes, plotScores
from pictures.slices import plotCases, plotModalities, plotPlanes, plotPrediction, plotSample, plotTransforms
from pictures.viewer import viewPatient

__all__ = [
    'countCalibration',
    'makeGifs',
    'plotCalibration',
    'plotCases',
    'plotCohort',
    'plotComparison',
    'plotConfusion',
    'plotCurves',
    'plotLearningCurve',
    'plotModalities',
    'plotPlanes',
    'plotPrediction',
    'plotQuality',
    'plotRecipes',
    'plotSample',
    'plotScores',
    'plotTransforms',
    'plotVolumes',
    'viewPatient',
]
