"""Re-export the functions that the notebook and scripts use as `utils.<name>`."""

from checkpoints import epochs, loadCheckpoint, loadModel, makeCheckpoint, readHistory
from dataset import BRATSDataset
from metrics import computeMetrics
from patients import makeFileList, maskFunction, saveProbabilities, saveSegmentation
from patients.cohort import checkFiles, describeCohort, readSplit, split, splitFolds, usable, writeSplit
from pictures import makeGifs, plotCurves, plotPrediction, plotSample, plotTransforms

__all__ = [
    'BRATSDataset',
    'checkFiles',
    'computeMetrics',
    'describeCohort',
    'epochs',
    'loadCheckpoint',
    'loadModel',
    'makeCheckpoint',
    'makeFileList',
    'makeGifs',
    'maskFunction',
    'plotCurves',
    'plotPrediction',
    'plotSample',
    'plotTransforms',
    'readHistory',
    'readSplit',
    'saveProbabilities',
    'saveSegmentation',
    'split',
    'splitFolds',
    'usable',
    'writeSplit',
]
