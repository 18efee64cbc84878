"""Time the prediction of one patient, reading included, by torch, onnxruntime and OpenVINO on CPU threads.

    python -m benchmarks.predictors FOLDER PATIENT [THREADS]

FOLDER is a model folder with ONNX files, PATIENT a folder of one patient. 8-bit integers are timed if
`deploy.quantizeOnnx` wrote them, OpenVINO if it is installed.
"""

import sys
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import config
import deploy
import engine
import predictor
from benchmarks import timing
from patients.reading import findFiles


def _predictByTorch(paths, model, dtype):
    """Return the classes of `engine.predict` with autocast to a dtype; None: float32."""
    with mock.patch.object(engine, 'precision', lambda device: dtype):
        return engine.predict(paths, model, device='cpu')[2].numpy()


def _loadOpenvino(folder, threads, precision):
    """Return a `predictor.Network` that runs on OpenVINO."""
    import openvino

    core, network = openvino.Core(), predictor.loadFolder(folder, threads)
    options = {'INFERENCE_NUM_THREADS': threads, 'INFERENCE_PRECISION_HINT': precision}

    def runnerOf(member):
        compiled = core.compile_model(Path(folder, member['folder'], 'model.onnx'), 'CPU', options)
        request = compiled.create_infer_request()
        return lambda patches: request.infer({'image': patches})['logits'].copy()

    return predictor.Network(network.about, [runnerOf(member) for member in network.about['members']])


def methodsFor(folder, paths, threads):
    """Return a dict of name -> function that returns the classes (D, W, H) of a patient."""
    model, onnx = deploy.loadModel(folder), predictor.loadFolder(folder, threads, 'model.onnx')
    methods = {
        'torch float32': partial(_predictByTorch, paths, model, None),
        'torch bfloat16': partial(_predictByTorch, paths, model, torch.bfloat16),
        'onnxruntime float32': partial(predictor.predict, paths, onnx),
    }
    if onnx.about['onnx'].get('int8'):
        int8 = predictor.loadFolder(folder, threads)
        methods['onnxruntime int8'] = partial(predictor.predict, paths, int8)
    try:
        for precision in ('f32', 'bf16'):
            network = _loadOpenvino(folder, threads, precision)
            methods[f'OpenVINO {precision}'] = partial(predictor.predict, paths, network)
    except ImportError:
        print('OpenVINO is not installed.')
    return methods


def main(folder, patient, threads=2):
    """Print the time of each method, and the number of voxels of another class than torch in float32."""
    config.DEVICE = 'cpu'
    torch.set_num_threads(int(threads))
    [paths] = findFiles(patient).values()
    methods = methodsFor(folder, paths, int(threads))
    reference = methods['torch float32']()
    others = [np.count_nonzero(method() != reference) for method in methods.values()]
    table = timing.measure('prediction, per patient', methods, rounds=3)
    print(table.assign(otherVoxels=others).to_string(index=False))


if __name__ == '__main__':
    main(*sys.argv[1:])
