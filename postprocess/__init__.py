"""Predict and score folders, remove small components, and estimate the Dice without a truth."""

from postprocess.components import Tuning, applyRules, relabelSmallET, removeSmallComponents, tunePostprocessing
from postprocess.folder import predictFolder, readPrediction, scoreFolder, writeScores
from postprocess.quality import (
    crossFit,
    fitQuality,
    predictQuality,
    readDisagreement,
    readFit,
    summarizeQuality,
    writeFit,
    writeQuality,
)

__all__ = [
    'Tuning',
    'applyRules',
    'crossFit',
    'fitQuality',
    'predictFolder',
    'predictQuality',
    'readDisagreement',
    'readFit',
    'readPrediction',
    'relabelSmallET',
    'removeSmallComponents',
    'scoreFolder',
    'summarizeQuality',
    'tunePostprocessing',
    'writeFit',
    'writeQuality',
    'writeScores',
]
