"""Time the prediction of one patient, reading included, by torch, onnxruntime and OpenVINO on CPU threads.

    python -m benchmarks.predictors FOLDER PATIENT [THREADS]

FOLDER is a model folder with ONNX files, PATIENT a folder of one patient. 8-bit integers are timed if
`deploy.quantizeOnnx` wrote them, OpenVINO if it is installed.
"""

import functools
import sys
import time
from pathlib import Path

import numpy as np
import torch

import config
import deploy
import engine
import patients
import predictor
import windows

ROUNDS = 3  # of which the fastest counts


def _predictByTorch(paths, model, dtype):
    """Return what `engine.predict` does with autocast to a dtype; None: float32."""
    before = windows.autocast
    windows.autocast = lambda device: torch.autocast('cpu', dtype=dtype or torch.bfloat16, enabled=dtype is not None)
    try:
        return engine.predict(paths, model, device='cpu')[2].numpy()
    finally:
        windows.autocast = before


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
        'torch float32': functools.partial(_predictByTorch, paths, model, None),
        'torch bfloat16': functools.partial(_predictByTorch, paths, model, torch.bfloat16),
        'onnxruntime float32': functools.partial(predictor.predict, paths, onnx),
    }
    if onnx.about['onnx'].get('int8'):
        int8 = predictor.loadFolder(folder, threads)
        methods['onnxruntime int8'] = functools.partial(predictor.predict, paths, int8)
    try:
        for precision in ('f32', 'bf16'):
            network = _loadOpenvino(folder, threads, precision)
            methods[f'OpenVINO {precision}'] = functools.partial(predictor.predict, paths, network)
    except ImportError:
        print('OpenVINO is not installed.')
    return methods


def main(folder, patient, threads=2):
    """Print the seconds of each method, interleaved, and the voxels in which its classes differ from the first's."""
    config.DEVICE = 'cpu'
    torch.set_num_threads(int(threads))
    [paths] = patients.findFiles(patient).values()
    methods = methodsFor(folder, paths, int(threads))
    found = {name: method() for name, method in methods.items()}  # also warms up
    seconds = {name: [] for name in methods}
    for _ in range(ROUNDS):
        for name, method in methods.items():
            start = time.perf_counter()
            method()
            seconds[name].append(time.perf_counter() - start)
    reference = found['torch float32']
    for name, values in seconds.items():
        print(f'{name:20} {min(values):6.2f} s, {np.count_nonzero(found[name] != reference)} other voxels')


if __name__ == '__main__':
    main(*sys.argv[1:])
