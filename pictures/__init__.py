"""Show patients, transforms, predictions and scores as figures and animated GIFs."""

from pictures.calibration import countCalibration, plotCalibration
from pictures.charts import plotCohort, plotConfusion, plotCurves, plotScores, plotVolumes
from pictures.gifs import makeGifs
from pictures.slices import plotCases, plotModalities, plotPlanes, plotPrediction, plotSample, plotTransforms

__all__ = [
    'countCalibration',
    'makeGifs',
    'plotCalibration',
    'plotCases',
    'plotCohort',
    'plotConfusion',
    'plotCurves',
    'plotModalities',
    'plotPlanes',
    'plotPrediction',
    'plotSample',
    'plotScores',
    'plotTransforms',
    'plotVolumes',
]
