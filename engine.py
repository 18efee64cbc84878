"""Make the model, train it, validate it and predict with it."""

import gc
import logging
import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import numpy as np
import segmentation_models_pytorch as smp
import torch
from scipy import ndimage
from torch.nn.functional import normalize
from tqdm.auto import tqdm

import config
from identity import follow, identityOf, noteTraining, trainedAmong, trainedPatients, warnOfTrained
from parallel import leaveOut
from patients import maskFunction, patientOf, readCase
from transforms import transformVolume, windowStarts

_CHECK_EVERY = 20  # batches between two checks of the loss: each makes the GPU wait for the host


def precision(device):
    """Return the dtype that autocast uses on a device, or None if autocast is off there.

    bfloat16 if the device computes in it natively (GPUs from Ampere on, processors with AVX512_BF16 or AMX); float16 on
    older GPUs, where the gradient needs a scaler (`torch.amp.GradScaler(device, enabled = precision(device) is
    torch.float16)`); None elsewhere.

    Args:
        device: torch device or its name.
    """
    kind = torch.device(device).type
    if kind == 'cuda':
        # without the argument it is True on a T4, which emulates bfloat16 slowly
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if kind == 'cpu':
        capabilities = getattr(torch.cpu, 'get_capabilities', dict)()
        return torch.bfloat16 if capabilities.get('avx512_bf16') or capabilities.get('amx_bf16') else None
    return None


def _autocast(device):
    dtype = precision(device)
    return torch.autocast(torch.device(device).type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def _deviceOf(model):
    return next((parameter.device for parameter in model.parameters()), torch.device(config.DEVICE))


def makeModel():
    """Return the U-Net that `config` describes, on `config.DEVICE`.

    Returns:
        smp.Unet: takes float (B, ENCODER_IN_CHANNEL, H, W), sides a multiple of 2 ** ENCODER_DEPTH; returns logits (B,
        NO_CLASSES, H, W).
    """
    return smp.Unet(
        config.ENCODER_NAME,
        encoder_depth=config.ENCODER_DEPTH,
        encoder_weights=availableWeights(),
        decoder_channels=config.DECODER_CHANNELS,
        in_channels=config.ENCODER_IN_CHANNEL,
        classes=config.NO_CLASSES,
    ).to(config.DEVICE)


def availableWeights():
    """Return `config.ENCODER_WEIGHTS`; or None, with a message, if they cannot be downloaded.

    The encoder then starts from random weights. The state of the random generators does not change.
    """
    if config.ENCODER_WEIGHTS is None:
        return None
    hub = logging.getLogger('huggingface_hub')  # offline it tries for half a minute and warns each time
    level = hub.level
    hub.setLevel(logging.ERROR)
    try:
        with torch.random.fork_rng(devices=[]):
            smp.encoders.get_encoder(config.ENCODER_NAME, weights=config.ENCODER_WEIGHTS)
        return config.ENCODER_WEIGHTS
    except OSError as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        print(f'The {config.ENCODER_WEIGHTS} weights of {config.ENCODER_NAME} cannot be loaded ({reason})')
        print('The encoder starts from random weights instead: it needs more epochs.')
        return None
    finally:
        hub.setLevel(level)


def makeCriterion():
    """Return the loss that `config` describes: smp's focal loss with `config.LOSS_GAMMA`.

    Returns:
        torch.nn.Module: takes logits (B, NO_CLASSES, H, W) and int64 (B, H, W), returns the mean loss of a batch.

    Reference:
        Lin et al., Focal Loss for Dense Object Detection (arXiv:1708.02002).
    """
    return smp.losses.FocalLoss(mode='multiclass', gamma=config.LOSS_GAMMA)


def train(model, criterion, optimizer, scaler, loader, transform=None):
    """Train the model for one epoch and return the loss summed over samples.

    The forward pass runs under autocast (`precision`), the loss in float32. The gradient's norm is clipped to
    `config.GRADIENT_CLIP`. The model's parameters are converted to channels_last, in place. What the model is trained
    on is noted as `model.identity`, and the learning rate as `optimizer.learnRate`, for the checkpoint.

    Args:
        model: takes float (B, C, H, W), returns logits (B, NO_CLASSES, H, W); batches go to its device.
        criterion: takes logits and int64 (B, H, W), returns the mean loss of a batch.
        optimizer: of the model's parameters.
        scaler: torch.amp.GradScaler; has no effect if it is disabled.
        loader: yields batches of (image, label), as a DataLoader over a `utils.BRATSDataset` does.
        transform: `batched.Batched` or another callable, applied to (image, label) of each batch on the device.

    Returns:
        float; divided by the number of samples it is the epoch's loss.

    Raises:
        FloatingPointError: a loss is not finite; batch and learning rate are named. Checkpoints are untouched.
        ValueError: the loader yields no batch, or the model has been trained on other patients, files or settings.
    """
    noteTraining(model, getattr(loader, 'dataset', None), criterion)
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group['params']):
        raise ValueError('The optimizer has none of the parameters of the model: make it after the model, from it.')
    if getattr(loader, 'persistent_workers', False):
        print('persistent_workers = True: a resumed run will differ from an uninterrupted one.')
    model.to(memory_format=torch.channels_last).train()
    device = _deviceOf(model)

    def step(image, label):
        optimizer.zero_grad(set_to_none=True)
        loss = _loss(model, criterion, image, label)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.GRADIENT_CLIP)
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    optimizer.learnRate = float(optimizer.param_groups[0]['lr'])
    rate = ', '.join(f'{group["lr"]:.2e}' for group in optimizer.param_groups)
    return _runEpoch('train', step, loader, device, transform, f' at learning rate {rate}')


def validate(model, criterion, loader):
    """Return the loss summed over samples of one epoch, without training.

    A warning names patients of the loader that the model was trained on: their loss does not tell the best epoch.

    Args:
        model, criterion, loader: as in `train`.

    Returns:
        float; divided by the number of samples it is the epoch's loss.

    Raises:
        FloatingPointError: a loss is not finite; the batch is named.
        ValueError: the loader yields no batch.
    """
    patients = (identityOf(getattr(loader, 'dataset', None)) or {'patients': {}})['patients']
    warnOfTrained(trainedAmong(model, patients), len(patients))
    model.to(memory_format=torch.channels_last).eval()  # not in inference_mode: converted there, weights cannot train

    def step(image, label):
        return _loss(model, criterion, image, label)

    with torch.inference_mode():
        return _runEpoch('validate', step, loader, _deviceOf(model))


def _loss(model, criterion, image, label):
    with _autocast(image.device):
        logits = model(image)
    return criterion(logits.float(), label)


def _runEpoch(name, step, loader, device, transform=None, remark=''):
    """Return the sum over samples of the losses that `step` returns for each batch."""
    gc.collect()  # an earlier epoch's workers: collected later in a forked worker, they print errors there
    losses, sizes, total, number = [], [], 0.0, 0
    batches = iter(loader)
    try:
        bar = tqdm(batches, name, len(loader), leave=False)
        for number, (image, label) in enumerate(bar, start=1):
            image, label = image.to(device, non_blocking=True), label.to(device, non_blocking=True)
            if transform is not None:
                image, label = transform(image, label)
            image = image.float().contiguous(memory_format=torch.channels_last)
            losses.append(step(image, label.long()))
            sizes.append(len(image))
            if number % _CHECK_EVERY == 0:
                total += _sumLosses(name, losses, sizes, number, len(loader), remark)
                bar.set_postfix(loss=f'{losses[-1].item():.4f}')
                losses, sizes = [], []
        if losses:  # at the end, and not at batch len(loader): a loader may give fewer
            total += _sumLosses(name, losses, sizes, number, len(loader), remark)
    finally:
        # after an interrupt the traceback keeps the iterator, and its workers, alive
        if not getattr(loader, 'persistent_workers', False) and hasattr(batches, '_shutdown_workers'):
            batches._shutdown_workers()
    if number == 0:
        raise ValueError(f'{name}: the loader has no batch; are there fewer patches than config.BATCHSIZE?')
    return total


def _sumLosses(name, losses, sizes, number, numBatches, remark):
    """Return the sum over samples of some batches' losses; the last one belongs to batch `number`."""
    values = torch.stack(losses).cpu().double()  # copied first: mps has no float64
    if not values.isfinite().all():
        first = int((~values.isfinite()).nonzero()[0])
        raise FloatingPointError(
            f'{name}: the loss of batch {number - len(values) + 1 + first} of {numBatches} is {values[first].item()}'
            f'{remark}. The last checkpoint is untouched; a smaller config.LEARN_RATE, in a new config.OUTPUT_FOLDER, '
            'usually helps.'
        )
    return float(values @ torch.tensor(sizes, dtype=torch.float64))


@contextmanager
def _evaluationMode(model, device):
    """Move the model to a device and set evaluation mode; restore each layer's mode, not the device, at the end."""
    modes = [(layer, layer.training) for layer in model.modules()]
    model.to(device, memory_format=torch.channels_last).eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for layer, mode in modes:
            layer.training = mode


def predict(paths, model, transform=None, patchStride=None, device=None, mirror=False, probabilities=False):
    """Segment one patient, slice by slice.

    A model that `train` or a checkpoint gave an `identity` is shown what it was trained on: modalities, stretching and
    patch size are taken from there, and a warning says where `config` differs.

    Args:
        paths: one row of the file list (Series or dict); a segmentation is not needed.
        model: takes float (B, C, H, W), returns logits (B, NO_CLASSES, H, W). It is moved to the device.
        transform: torchio transform of the whole volume that keeps its shape. None (default): the stretching that the
            model was trained with, or `transforms.volumeTransform()`.
        patchStride: pixels between windows of the patch size. Where windows overlap, their probabilities are
            averaged with Gaussian weights; windows without brain are skipped. None (default): the brain's bounding box
            is predicted as a whole, which is faster.
        device: default `config.DEVICE`.
        mirror: average the probabilities of the four flips of each slice; takes four times as long.
        probabilities: return them too: a softmax, or for a model trained with the focal loss, which treats each class
            by itself, the sigmoids divided by their sum.

    Returns:
        x: float32 (D, C, W, H), the model's input; on the CPU, as all that follows.
        y: int64 (D, W, H), the truth after the transform; None without a segmentation.
        yhat: int64 (D, W, H), classes 0 to 3; voxels that no window covers are 0.
        probability: float32 (D, NO_CLASSES, W, H), only with `probabilities = True`.

    Raises:
        ValueError, FileNotFoundError: bad data, as in `patients.readCase`; the transform changes the shape, or is not
            the one of the training; the stride leaves pixels out.
    """
    options = {'patchStride': patchStride, 'device': device, 'mirror': mirror, 'probabilities': probabilities}
    way = follow(model, transform)
    return _segment(*_prepare(paths, way), model, way, **options)


def predictAll(df, model, transform=None, **options):
    """Segment the patients of a file list one by one; the next is read while one is predicted.

    A warning names the patients that the model was trained on. A patient whose files cannot be used ends the
    prediction, or is left out and named, as `config.ON_BAD_PATIENT` says.

    Args:
        df: file list.
        model, transform: as in `predict`.
        **options: `patchStride`, `device`, `mirror`, `probabilities` as in `predict`.

    Yields:
        (patient, what `predict` returns for it).

    Raises:
        ValueError, FileNotFoundError: as in `predict`, when the bad patient is reached.
    """
    way, rows = follow(model, transform), [paths for _, paths in df.iterrows()]
    warnOfTrained(trainedPatients(model, df), len(df))
    with ThreadPoolExecutor(1) as reader:  # decompression releases the interpreter's lock
        following = reader.submit(_prepare, rows[0], way) if rows else None
        for number, patient in enumerate(tqdm(df.index, 'predict', leave=False)):
            prepared, following = following, None
            if number + 1 < len(rows):
                following = reader.submit(_prepare, rows[number + 1], way)
            try:
                case = prepared.result()
            except (ValueError, OSError) as error:
                leaveOut(error, f'{number} of {len(rows)} patients were segmented before.')
                continue
            yield patient, _segment(*case, model, way, **options)


def _prepare(paths, way):
    """Return x (D, C, W, H), y (D, W, H) or None, and the brain mask, bool (D, W, H), of one patient."""
    image, label = readCase(paths, way.modalities)
    isBrain = torch.from_numpy(maskFunction(image).any(0)).permute(2, 0, 1)  # (W, H, D) -> (D, W, H)
    x, y = transformVolume(image, label, way.transform, patientOf(paths))
    return x, None if y is None else y.long(), isBrain


def _segment(x, y, isBrain, model, way, patchStride=None, device=None, mirror=False, probabilities=False):
    """Return what `predict` returns, from what `_prepare` returns."""
    device = torch.device(device or config.DEVICE)
    yhat = torch.zeros(isBrain.shape, dtype=torch.int64)
    probability = torch.zeros(len(x), config.NO_CLASSES, *x.shape[2:]) if probabilities else None
    if probabilities:
        probability[:, 0] = 1
    if isBrain.any():
        multiple = getattr(getattr(model, 'encoder', None), 'output_stride', 2**config.ENCODER_DEPTH)
        box, starts, size = _planWindows(isBrain, patchStride, way.patchSize, multiple)
        ask = partial(_probabilities, model, mirror=mirror, activation=way.activation)
        with _evaluationMode(model, device):
            for slices, values in _predictSlices(x[:, :, *box], isBrain[:, *box], starts, size, ask, device):
                # on the device: less is copied; argmax takes ten times as long as max
                yhat[slices, *box] = values.max(1).indices.cpu()
                if probabilities:
                    probability[slices, :, *box] = values.cpu()
    return (x, y, yhat, probability) if probabilities else (x, y, yhat)


def _planWindows(isBrain, patchStride, patchSize, multiple):
    """Return the part of each slice to predict (two slice objects), the windows' starts in it, and their size.

    Without a stride, the size is a multiple of `multiple`: the encoder halves its input several times.
    """
    if patchStride is not None:
        rows, columns = (windowStarts(length, patchSize, patchStride) for length in isBrain.shape[1:])
        starts = [(int(row), int(column)) for row in rows for column in columns]
        return (slice(None), slice(None)), starts, (patchSize, patchSize)
    [box] = ndimage.find_objects(isBrain.any(0).numpy().astype(np.uint8))
    return box, [(0, 0)], tuple(math.ceil((part.stop - part.start) / multiple) * multiple for part in box)


def _predictSlices(x, isBrain, starts, size, ask, device):
    """Yield the numbers (S,) and probabilities (S, K, W, H) of a few slices at a time, for all slices with brain.

    Slices are grouped until their windows with brain fill a batch, so memory does not grow with the patient.
    """
    height, width = size
    batchSize = max(1, config.PREDICT_BATCH * config.PATCH_SIZE**2 // (height * width))
    group = []
    for number, mask in enumerate(isBrain):
        windows = [
            (number, row, column) for row, column in starts if mask[row : row + height, column : column + width].any()
        ]
        if group and windows and len(group) + len(windows) > batchSize:
            yield _averageWindows(x, group, size, batchSize, ask, device)
            group = []
        group += windows
    yield _averageWindows(x, group, size, batchSize, ask, device)


def _averageWindows(x, windows, size, batchSize, ask, device):
    """Return the slices of some windows and their probabilities, a weighted mean where windows overlap.

    `ask` takes patches (B, C, H, W) and returns their probabilities (B, K, H, W).
    """
    (height, width), shape = size, x.shape[2:]
    slices = sorted({number for number, _, _ in windows})
    padded = [max(max(window[axis] + size[axis - 1] for window in windows), shape[axis - 1]) for axis in (1, 2)]
    # windows may reach beyond the image: there is background, which is the lowest value
    image = x.amin((0, 2, 3))[None, :, None, None].repeat(len(slices), 1, *padded)
    image[:, :, : shape[0], : shape[1]] = x[slices]
    image = image.to(device, non_blocking=True)
    weight = _gaussian(height, width).to(device)
    total = torch.zeros(len(slices), config.NO_CLASSES, *padded, device=device)
    weights = torch.zeros(len(slices), 1, *padded, device=device)
    for first in range(0, len(windows), batchSize):
        places = [
            (slices.index(number), slice(row, row + height), slice(column, column + width))
            for number, row, column in windows[first : first + batchSize]
        ]
        patches = torch.stack([image[number, :, rows, columns] for number, rows, columns in places])
        for (number, rows, columns), values in zip(places, ask(patches), strict=True):
            total[number, :, rows, columns] += weight * values
            weights[number, :, rows, columns] += weight
    total /= weights.clamp_min(torch.finfo(torch.float32).tiny)
    total[:, :1] += weights == 0  # what no window covers is background
    return slices, total[:, :, : shape[0], : shape[1]]


def _gaussian(height, width):
    """Return the weights of a window's pixels (H, W): a Gaussian, 1 in the middle, sigma an eighth of the side.

    Reference:
        The weights of nnU-Net and of MONAI's `SlidingWindowInferer`, including the minimum of 1e-3.
    """
    sides = []
    for length in (height, width):
        offset = torch.arange(length) - (length - 1) / 2
        sides.append(torch.exp(-(offset**2) / (2 * (length / 8) ** 2)))
    return torch.outer(*sides).clamp_min(1e-3)


def _probabilities(model, patches, mirror, activation):
    """Return probabilities float32 (B, K, H, W) of patches (B, C, H, W); with `mirror` the mean over four flips."""
    patches = patches.contiguous(memory_format=torch.channels_last)
    flips = [(), (2,), (3,), (2, 3)] if mirror else [()]
    total = 0
    for axes in flips:
        with _autocast(patches.device):
            logits = model(patches.flip(axes) if axes else patches)
        logits = (logits.flip(axes) if axes else logits).float()
        # the sigmoids of a one-vs-rest loss need not sum to 1
        total = total + (normalize(logits.sigmoid(), 1, 1) if activation == 'sigmoid' else logits.softmax(1))
    return total / len(flips)
