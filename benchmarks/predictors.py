"""Time the prediction of patients, reading included, by torch, onnxruntime and OpenVINO on CPU threads.

    python -m benchmarks.predictors FOLDER PATIENTS [THREADS]

FOLDER is a model folder with ONNX files, PATIENTS a folder of one or more patients. 8-bit integers are timed if
`deploy.quantizeOnnx` wrote them, OpenVINO if it is installed.
"""

import itertools
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import torch

import config
import deploy
import engine
import predictor
from patients.reading import findFiles


def _predictByTorch(model, dtype, paths, **options):
    """Return the classes of `engine.predict` with autocast to a dtype; None: float32."""
    with mock.patch.object(engine, 'precision', lambda device: dtype):
        return engine.predict(paths, model, device='cpu', **options)[2].numpy()


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


def methodsFor(folder, threads):
    """Return a dict of name -> function of a patient's paths and options that returns its classes (D, W, H)."""
    model, names = deploy.loadModel(folder), [Path(name).name for name in predictor.readAbout(folder, ())['files']]
    methods = {
        'torch float32': partial(_predictByTorch, model, None),
        'torch bfloat16': partial(_predictByTorch, model, torch.bfloat16),
    }
    if engine.precision('cpu') is None:  # emulated, it takes minutes
        del methods['torch bfloat16']
    networks = {
        f'onnxruntime {kind}': predictor.loadFolder(folder, threads, name)
        for kind, name in (('float32', 'model.onnx'), ('int8', predictor.INT8))
        if name in names
    }
    try:
        for precision in ('f32', 'bf16') if 'model.onnx' in names else ():
            networks[f'OpenVINO {precision}'] = _loadOpenvino(folder, threads, precision)
    except ImportError:
        print('OpenVINO is not installed.')
    for name, network in networks.items():
        methods[name] = partial(_predictByFolder, network)
    return methods


def _predictByFolder(network, paths, **options):
    return predictor.predict(paths, network, **options)


def main(folder, patients, threads=2):
    """Print the seconds of each method, in two looks and of the whole brain, and how many voxels have another class.

    They are medians over the patients; the voxels are compared with the whole brain by torch in float32. The methods
    are interleaved, and the first patient is predicted once before. Below are the seconds of a patient if the folder is
    predicted by one call that reads ahead and writes.
    """
    config.DEVICE = 'cpu'
    torch.set_num_threads(int(threads))
    methods, rows = methodsFor(folder, int(threads)), []
    ways = {'whole brain': {'twoLooks': False}, 'two looks': {'twoLooks': True}}
    found = findFiles(patients)
    for number, paths in enumerate([next(iter(found.values())), *found.values()]):
        reference = None
        for (way, options), (name, method) in itertools.product(ways.items(), methods.items()):
            begin = time.perf_counter()
            classes = method(paths, **options)
            seconds = time.perf_counter() - begin
            reference = classes if reference is None else reference
            if number > 0:
                voxels = np.count_nonzero(classes != reference)
                rows.append({'method': name, 'way': way, 'seconds': seconds, 'otherVoxels': voxels})
    table = pd.DataFrame(rows).groupby(['method', 'way'], sort=False).median().reset_index()
    print(table.to_string(index=False))
    with tempfile.TemporaryDirectory() as out:
        begin = time.perf_counter()
        predictor.predictFolder(found, predictor.loadFolder(folder, int(threads)), out)
        print(f'predictor.predictFolder, with writing: {(time.perf_counter() - begin) / len(found):.2f} s a patient')
    return table


if __name__ == '__main__':
    main(*sys.argv[1:])
