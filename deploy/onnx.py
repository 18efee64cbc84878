"""Export the models of a model folder for onnxruntime, in float32 and with 8-bit integers."""

import copy
import tempfile
import warnings
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import timm.layers
import torch

import config
import metrics
from atomic import writeAtomically
from deploy.load import buildMember
from patients.reading import hasFile, readLabel
from predictor import (
    INT8,
    Network,
    countCores,
    hashFile,
    loadFolder,
    prepare,
    readAbout,
    segment,
    startSession,
    writeAbout,
)

OPSET = 18  # of ONNX
LARGEST_DIFFERENCE = 1e-4  # allowed between a probability of torch and of onnxruntime
LARGEST_LOSS = 0.002  # allowed loss of mean Dice with 8-bit integers
FIRST = (1, 6)  # convolutions at the start that stay in float32: the first of these numbers whose loss is allowed


def exportOnnx(folder, patients=None):
    """Write each member of a model folder as ONNX for `predictor.predict`, if it predicts as torch does in float32.

    The networks take batches of any size; height and width have to be multiples of `multiple` in `config.json`.

    Args:
        folder: of `packModel`.
        patients: file list of patients for the comparison of torch and onnxruntime; None: a random image.

    Returns:
        float, the largest difference of a probability.

    Raises:
        FileNotFoundError, ValueError: as in `loadModel`.
        RuntimeError: a probability differs by more than `LARGEST_DIFFERENCE`, or a class differs though there was no
            tie. The folder then has no ONNX files.
    """
    about = readAbout(folder, ('.safetensors', '.json'))
    about['files'] = {name: value for name, value in about['files'].items() if not name.endswith('.onnx')}
    about['onnx'] = None
    writeAbout(folder, about)  # no ONNX files until they are compared
    for file in Path(folder).glob('*/*.onnx'):
        file.unlink()
    largest = 0.0
    with ExitStack() as stack:  # all files appear at its end, or none
        for member in about['members']:
            file, model = Path(folder, member['folder'], 'model.onnx'), buildMember(folder, about, member, 'cpu')
            temporary = stack.enter_context(writeAtomically(file))
            _export(model, len(about['modalities']), member['multiple'], temporary)
            own = {**about, 'members': [member]}
            pair = Network(own, [partial(_runTorch, model)]), Network(own, [startSession(temporary)], countCores())
            largest = max(largest, *(_compare(case, pair, file) for case in _casesOf(patients, about)))
            about['files'][f'{member["folder"]}/model.onnx'] = hashFile(temporary)
    about['onnx'] = {'opset': OPSET, 'largestDifference': largest, 'torch': torch.__version__}
    writeAbout(folder, about)
    return largest


def quantizeOnnx(folder, df):
    """Write each member of a model folder with 8-bit integers too, which processors compute much faster.

    `predictor.predict` uses these networks from then on; `exportOnnx` removes them. Patients 1, 3, 5, ... calibrate the
    range of values in each layer. On the others, the mean Dice of WT, TC and ET may not fall by more than
    `LARGEST_LOSS` compared with float32. The first and the last convolution stay in float32; if the loss is too large,
    the first six do, which costs no time in networks with depthwise convolutions, and they need it.

    Args:
        folder: of `packModel`, after `exportOnnx`.
        df: file list of two patients or more, with true segmentations.

    Returns:
        float, the loss of Dice; negative if the Dice rises.

    Raises:
        FileNotFoundError, ValueError: as in `predictor.loadFolder`; fewer than two patients, or one without a truth;
            other classes than those of `config`.
        RuntimeError: the loss is too large. The folder stays as it was.
    """
    network = loadFolder(folder, name='model.onnx')
    about = network.about
    if about['classes'] != list(config.CLASS_NAMES):  # the truth is read in the classes of config
        raise ValueError(f'{folder} predicts {about["classes"]}, but config.CLASS_NAMES is {list(config.CLASS_NAMES)}.')
    lacking = [str(patient) for patient, paths in df.iterrows() if not hasFile(paths, 'seg')]
    if len(df) < 2 or lacking:
        found = f'{", ".join(lacking[:5])} has none' if lacking else f'there are {len(df)}'
        raise ValueError(f'Two patients or more with a true segmentation were expected, but {found}.')
    files = [Path(folder, member['folder'], 'model.onnx') for member in about['members']]
    patches = _seenPatches(network, df[::2])
    with ExitStack() as stack:  # all files appear at its end, or none
        written = [stack.enter_context(writeAtomically(file.with_name(INT8))) for file in files]
        for numFirst in FIRST:
            for file, some, other in zip(files, patches, written, strict=True):
                _quantize(file, some, other, numFirst)
            quantized = network._replace(members=[startSession(file) for file in written])
            loss = float(np.mean([_lossOf(paths, network, quantized) for _, paths in df[1::2].iterrows()]))
            if loss <= LARGEST_LOSS:
                break
        else:
            raise RuntimeError(
                f'{folder}: with 8-bit integers the mean Dice falls by {loss:.4f}; they are not written.'
            )
        about['files'] |= {
            f'{file.parent.name}/{INT8}': hashFile(other) for file, other in zip(files, written, strict=True)
        }
    about['onnx']['int8'] = {'loss': loss, 'patients': len(df[1::2])}
    writeAbout(folder, about)
    return loss


def _seenPatches(network, df):
    """Return for each member a list of patches float32 (1, C, H, W), the first of each batch that it predicts."""
    seen = [[] for _ in network.members]

    def runAndKeep(run, kept, patches):
        kept.append(patches[:1].copy())  # a view would keep the whole batch
        return run(patches)

    runs = [partial(runAndKeep, *pair) for pair in zip(network.members, seen, strict=True)]
    for _, paths in df.iterrows():
        segment(*prepare(paths, network.about), network._replace(members=runs), twoLooks=False)
    return seen


def _quantize(file, patches, other, numFirst):
    """Write to `other` the ONNX file with 8-bit integers; their ranges are those of each layer on the patches.

    The first `numFirst` convolutions and the last one stay in float32.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        remaining = iter(patches)

        def get_next(self):
            return next(({'image': patch} for patch in self.remaining), None)

    options = {'activation_type': quantization.QuantType.QUInt8, 'weight_type': quantization.QuantType.QInt8}
    with tempfile.TemporaryDirectory() as place:
        folded = str(Path(place, 'folded.onnx'))  # with batch norms folded into convolutions
        quant_pre_process(str(file), folded, skip_symbolic_shape=True)
        layers = [node.name for node in onnx.load(folded).graph.node if node.op_type == 'Conv']
        options['nodes_to_exclude'] = [*layers[:numFirst], layers[-1]]
        # weights of 7 bits: processors without VNNI sum two products in 16 bits, where 8 would silently overflow
        quantization.quantize_static(folded, str(other), Reader(), reduce_range=True, per_channel=True, **options)


def _lossOf(paths, network, other):
    """Return by how much a patient's mean Dice of WT, TC and ET falls from `network` to `other`."""
    label = readLabel(paths).transpose(2, 0, 1)  # (W, H, D) -> (D, W, H)
    case = prepare(paths, network.about)
    tables = [metrics.scorePatient(label, segment(*case, each)[0])['dice'] for each in (network, other)]
    before, after = (table.reindex(config.MAIN_REGIONS).mean() for table in tables)
    return before - after


def _export(model, numChannels, multiple, file):
    """Write a model as ONNX for any batch size, height and width."""
    free = {0: 'batch', 2: 'height', 3: 'width'}
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, timm.layers.Conv2dSame):
            layer.forward = partial(_padAndConvolve, layer)
    example = torch.zeros(2, numChannels, 2 * multiple, 3 * multiple)
    with warnings.catch_warnings(action='ignore'):
        torch.onnx.export(
            model,
            (example,),
            str(file),
            input_names=['image'],
            output_names=['logits'],
            opset_version=OPSET,
            dynamic_axes={'image': free, 'logits': free},
            dynamo=False,
        )


def _padAndConvolve(conv, x):
    """Return what a convolution of timm's makes of images whose sides are multiples of its stride.

    It derives its padding from the size of each image, as TensorFlow does. For these sizes it is always the same, and
    onnxruntime then makes it part of the convolution.
    """
    wide, high = (max(size - stride, 0) for size, stride in zip(conv.kernel_size[::-1], conv.stride[::-1], strict=True))
    pad = torch.nn.ZeroPad2d((wide // 2, wide - wide // 2, high // 2, high - high // 2))
    return torch.nn.Conv2d.forward(conv, pad(x))


def _runTorch(model, patches):
    with torch.inference_mode():
        return model(torch.from_numpy(patches)).numpy()


def _casesOf(patients, about):
    """Yield what `predictor.prepare` returns, of patients or of one random image."""
    if patients is not None and len(patients):
        yield from (prepare(paths, about) for _, paths in patients.iterrows())
        return
    low, high = about['stretching'][1]
    values = torch.randn(9, len(about['modalities']), 8, 7, generator=torch.Generator().manual_seed(0))
    x = torch.nn.functional.interpolate(values, (80, 70), mode='bilinear').clamp(low, high).numpy()
    isBrain = np.zeros((9, 80, 70), bool)
    isBrain[1:, 6:70, 3:61] = True
    yield 'a random image', np.where(isBrain[:, None], x, np.float32(low)), isBrain


def _compare(case, networks, file):
    """Return the largest difference of a probability; raise as `exportOnnx` if the two networks differ too much."""
    (yhat, probability), (other, values) = (
        segment(*case, network, probabilities=True, twoLooks=False) for network in networks
    )
    difference = float(np.abs(probability - values).max())
    first, second = np.sort(probability, axis=1)[:, -1], np.sort(probability, axis=1)[:, -2]
    isOther = (yhat != other) & (first - second > 2 * LARGEST_DIFFERENCE)
    if not difference <= LARGEST_DIFFERENCE or isOther.any():
        raise RuntimeError(
            f'{file} is not written: onnxruntime differs from torch by up to {difference:.2g} in a probability and in '
            f'{np.count_nonzero(isOther)} voxels.'
        )
    return difference
