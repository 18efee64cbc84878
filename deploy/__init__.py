"""Pack trained models into a folder with a model card that predicts with its own settings, also as ONNX."""

from deploy.onnx import exportOnnx, quantizeOnnx
from deploy.pack import loadModel, loadRules, packModel, pretrained, startFrom

__all__ = ['exportOnnx', 'loadModel', 'loadRules', 'packModel', 'pretrained', 'quantizeOnnx', 'startFrom']
