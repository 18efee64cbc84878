"""Pack trained models into a folder with a model card that predicts with its own settings, also as ONNX."""

from deploy.load import loadModel, loadRules, pretrained, startFrom
from deploy.onnx import exportOnnx, quantizeOnnx
from deploy.pack import packModel

__all__ = ['exportOnnx', 'loadModel', 'loadRules', 'packModel', 'pretrained', 'quantizeOnnx', 'startFrom']
