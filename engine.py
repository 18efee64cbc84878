"""Make the network, teach it and question it."""

import gc
import logging
import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import segmentation_models_pytorch as smp
import torch
from tqdm.auto import tqdm

import config
from checkpoints import lastHistory
from patients import patientOf, readCase
from preprocess import windowStarts
from transforms import transformVolume

_CHECK_EVERY = 20  # batches between two looks at the loss: each look makes the GPU wait for the host


def precision(device):
    """Gives the dtype that autocast uses on a device, or None where it stays off.

    bfloat16 where the device computes in it natively (cards from Ampere on, processors with AVX512_BF16 or AMX);
    float16 on older cards, where the gradient needs a scaler (`torch.amp.GradScaler(device, enabled =
    precision(device) is torch.float16)`); none elsewhere.

    Args:
        device: torch device or its name.
    """
    kind = torch.device(device).type
    if kind == 'cuda':
        # without the argument a T4 says yes: it emulates bfloat16, slowly
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if kind == 'cpu':
        able = getattr(torch.cpu, 'get_capabilities', dict)()
        return torch.bfloat16 if able.get('avx512_bf16') or able.get('amx_bf16') else None
    return None


def _autocast(device):
    dtype = precision(device)
    return torch.autocast(torch.device(device).type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def _deviceOf(model):
    return next((parameter.device for parameter in model.parameters()), torch.device(config.DEVICE))


def makeNetwork():
    """Gives the U-Net that `config` describes, on `config.DEVICE`.

    Where the encoder's weights cannot be downloaded, it says so and goes on with random ones.

    Returns:
        smp.Unet: takes float (B, ENCODER_IN_CHANNEL, H, W), sides a multiple of 2 ** ENCODER_DEPTH, gives logits (B,
        NO_CLASSES, H, W).
    """
    hub = logging.getLogger('huggingface_hub')  # it would warn of each of its tries, which take half a minute offline
    level = hub.level
    hub.setLevel(logging.ERROR)
    try:
        network = _makeUnet(config.ENCODER_WEIGHTS)
    except OSError as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        print(f'No {config.ENCODER_WEIGHTS} weights for {config.ENCODER_NAME} ({reason})')
        print('The encoder starts from random weights instead: it needs more epochs.')
        network = _makeUnet(None)
    finally:
        hub.setLevel(level)
    return network.to(config.DEVICE)


def _makeUnet(weights):
    return smp.Unet(
        config.ENCODER_NAME,
        encoder_depth=config.ENCODER_DEPTH,
        encoder_weights=weights,
        decoder_channels=config.DECODER_CHANNELS,
        in_channels=config.ENCODER_IN_CHANNEL,
        classes=config.NO_CLASSES,
    )


def train(model, criterion, optimizer, scaler, loader, transform=None):
    """Teaches the model one epoch and gives the loss summed over samples.

    The forward pass runs under autocast (`precision`), the loss in float32; the gradient's norm is clipped to
    `config.GRADIENT_CLIP`. The model's parameters are laid out channels_last, in place.

    Args:
        model: takes float (B, C, H, W), gives logits (B, NO_CLASSES, H, W); its device is the device.
        criterion: takes logits and int64 (B, H, W), gives the mean loss of a batch.
        optimizer: of the model's parameters.
        scaler: torch.amp.GradScaler; does nothing where it is disabled.
        loader: gives batches of (image, label) as `utils.BRATSDataset` does.
        transform: `batched.Batched` or the like, called with (image, label) of every batch on the device.

    Returns:
        float; divided by the number of samples it is the epoch's loss.

    Raises:
        FloatingPointError: a loss is not finite. Epoch (that after the last checkpoint's), batch and learning rate are
            named; the last checkpoint stands.
    """
    if getattr(loader, 'persistent_workers', False):
        print('persistent_workers = True: a resumed run will not equal an uninterrupted one.')
    model.to(memory_format=torch.channels_last).train()
    device = _deviceOf(model)

    def learn(image, label):
        optimizer.zero_grad(set_to_none=True)
        loss = _loss(model, criterion, image, label)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.GRADIENT_CLIP)
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    rate = ', '.join(f'{group["lr"]:.2e}' for group in optimizer.param_groups)
    return _epoch('train', learn, model, loader, device, transform, f'learning rate {rate}')


def validate(model, criterion, loader):
    """Gives the loss summed over samples of one epoch, without learning.

    Args:
        model, criterion, loader: as in `train`.

    Returns:
        float; divided by the number of samples it is the epoch's loss.

    Raises:
        FloatingPointError: a loss is not finite; epoch and batch are named.
    """
    model.to(memory_format=torch.channels_last).eval()  # not below: weights laid out there could not learn again
    with torch.inference_mode():
        judge = lambda image, label: _loss(model, criterion, image, label)  # noqa: E731
        return _epoch('validate', judge, model, loader, _deviceOf(model), None, 'no learning')


def _loss(model, criterion, image, label):
    with _autocast(image.device):
        logits = model(image)
    return criterion(logits.float(), label)


def _epoch(name, step, model, loader, device, transform, remark):
    """Gives the sum over samples of the losses that `step` gives for each batch."""
    gc.collect()  # of an earlier epoch's workers: collected in a forked worker, they complain there
    losses, sizes, total = [], [], None
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
            if number % _CHECK_EVERY == 0 or number == len(loader):
                values = torch.stack(losses).cpu().double()  # in this order: mps has no float64
                _checkFinite(name, values, number, len(loader), remark)
                total = (total or 0.0) + float(values @ torch.tensor(sizes, dtype=torch.float64))
                bar.set_postfix(loss=f'{values[-1].item():.4f}')
                losses, sizes = [], []
    finally:
        # after an interrupt the traceback would keep the workers alive, in a notebook for good
        if not getattr(loader, 'persistent_workers', False) and hasattr(batches, '_shutdown_workers'):
            batches._shutdown_workers()
    if total is None:
        raise ValueError(f'{name}: the loader gave no batch; are there fewer patches than config.BATCHSIZE?')
    return total


def _checkFinite(name, values, number, noBatches, remark):
    """Refuses losses, float (n,), the last of which is that of batch `number`, that are not finite."""
    if values.isfinite().all():
        return
    first = int((~values.isfinite()).nonzero()[0])
    history = lastHistory()
    stands = f'The checkpoint of epoch {len(history)} stands' if history else 'There is no checkpoint yet'
    raise FloatingPointError(
        f'{name}: in epoch {len(history) + 1} the loss of batch {number - len(values) + 1 + first} of {noBatches} is '
        f'{values[first].item()} ({remark}). {stands}; a smaller config.LEARN_RATE is the usual cure.'
    )


@contextmanager
def _asked(model, device):
    """Puts the model on a device in evaluation mode for a while; its mode comes back, its device stays."""
    wasTraining = model.training
    model.to(device, memory_format=torch.channels_last).eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(wasTraining)


def predict(paths, model, transform=None, patchStride=None, device=None, mirror=False, probabilities=False):
    """Segments one patient, slice by slice.

    Args:
        paths: one row of the file list (Series or dict); the seg is not needed.
        model: takes float (B, C, H, W), gives logits (B, NO_CLASSES, H, W). It is moved to the device.
        transform: torchio transform of the whole volume, default `preprocess.volumeTransform()`; the training's, or the
            network sees intensities it does not know. It may not change the volume's shape.
        patchStride: pixels between windows of `config.PATCH_SIZE`, whose probabilities are averaged with Gaussian
            weights; windows without brain are skipped. None (default): the brain's bounding box goes through whole,
            which is faster.
        device: default `config.DEVICE`.
        mirror: averages the four flips of each slice: four times the time, slightly better.
        probabilities: returns them too.

    Returns:
        x: float32 (D, C, W, H), what the network saw, on the CPU like all that follows.
        y: int64 (D, W, H), the truth after the transform; None where there is no seg.
        yhat: int64 (D, W, H), classes 0 to 3; a voxel that no window covers is 0.
        probability: float32 (D, NO_CLASSES, W, H), only with `probabilities = True`.

    Raises:
        ValueError, FileNotFoundError: what `readCase` says of bad data; the transform changes the shape; a stride that
            leaves pixels out.
    """
    options = {'patchStride': patchStride, 'device': device, 'mirror': mirror, 'probabilities': probabilities}
    return _segment(*_prepare(paths, transform), model, **options)


def predictAll(df, model, transform=None, **options):
    """Segments the patients of a file list one after the other; the next is read while one is predicted.

    Args:
        df: file list.
        model, transform: as in `predict`.
        **options: `patchStride`, `device`, `mirror`, `probabilities` as in `predict`.

    Yields:
        (patient, what `predict` gives of it).

    Raises:
        ValueError, FileNotFoundError: as `predict` does, when the patient's turn comes.
    """
    rows = [paths for _, paths in df.iterrows()]
    with ThreadPoolExecutor(1) as reader:  # unpacking leaves the interpreter's lock
        coming = reader.submit(_prepare, rows[0], transform) if rows else None
        for number, patient in enumerate(tqdm(df.index, 'predict', leave=False)):
            case = coming.result()
            if number + 1 < len(rows):
                coming = reader.submit(_prepare, rows[number + 1], transform)
            yield patient, _segment(*case, model, **options)


def _prepare(paths, transform):
    """Gives x (D, C, W, H), y (D, W, H) or None, and where there is brain, bool (D, W, H), of one patient."""
    image, label = readCase(paths)
    isBrain = torch.from_numpy((image != 0).any(0)).permute(2, 0, 1)  # (W, H, D) -> (D, W, H)
    x, y = transformVolume(image, label, transform, patientOf(paths))
    return x, None if y is None else y.long(), isBrain


def _segment(x, y, isBrain, model, patchStride=None, device=None, mirror=False, probabilities=False):
    device = torch.device(device or config.DEVICE)
    yhat = torch.zeros(isBrain.shape, dtype=torch.int64)
    probability = torch.zeros(len(x), config.NO_CLASSES, *x.shape[2:]) if probabilities else None
    if probabilities:
        probability[:, 0] = 1
    if isBrain.any():
        box, starts, size = _planWindows(isBrain, patchStride)
        with _asked(model, device):
            for slices, values in _predictSlices(x[:, :, *box], isBrain[:, *box], starts, size, model, device, mirror):
                # where they were computed: less is to be carried; argmax takes ten times as long as max
                yhat[slices, *box] = values.max(1).indices.cpu()
                if probabilities:
                    probability[slices, :, *box] = values.cpu()
    return (x, y, yhat, probability) if probabilities else (x, y, yhat)


def _planWindows(isBrain, patchStride):
    """Gives the part of each slice to look at (two slice objects), the starts of the windows in it and their size."""
    if patchStride is not None:
        rows, columns = (windowStarts(length, config.PATCH_SIZE, patchStride) for length in isBrain.shape[1:])
        starts = [(int(row), int(column)) for row in rows for column in columns]
        return (slice(None), slice(None)), starts, (config.PATCH_SIZE, config.PATCH_SIZE)
    box = []
    for other in (2, 1):
        where = isBrain.any(other).any(0).nonzero()
        box.append(slice(int(where[0]), int(where[-1]) + 1))
    multiple = 2**config.ENCODER_DEPTH  # the network halves its input so often
    return tuple(box), [(0, 0)], tuple(math.ceil((part.stop - part.start) / multiple) * multiple for part in box)


def _predictSlices(x, isBrain, starts, size, model, device, mirror):
    """Yields the numbers of some slices and their probabilities (S, K, W, H), until all with brain are done.

    As many slices go together as fill a batch with windows that hold brain: memory does not grow with the patient.
    """
    height, width = size
    atOnce = max(1, config.PREDICT_BATCH * config.PATCH_SIZE**2 // (height * width))
    group = []
    for number, mask in enumerate(isBrain):
        windows = [
            (number, row, column) for row, column in starts if mask[row : row + height, column : column + width].any()
        ]
        if group and windows and len(group) + len(windows) > atOnce:
            yield _averageWindows(x, group, size, atOnce, model, device, mirror)
            group = []
        group += windows
    yield _averageWindows(x, group, size, atOnce, model, device, mirror)


def _averageWindows(x, windows, size, atOnce, model, device, mirror):
    """Gives the slices of some windows and their probabilities, the weighted mean where windows overlap."""
    (height, width), shape = size, x.shape[2:]
    slices = sorted({number for number, _, _ in windows})
    padded = [max(max(window[axis] + size[axis - 1] for window in windows), shape[axis - 1]) for axis in (1, 2)]
    # what lies outside of the image looks like background, which is the lowest value there is
    image = x.amin((0, 2, 3))[None, :, None, None].repeat(len(slices), 1, *padded)
    image[:, :, : shape[0], : shape[1]] = x[slices]
    image = image.to(device, non_blocking=True)
    weight = _gaussian(height, width).to(device)
    total = torch.zeros(len(slices), config.NO_CLASSES, *padded, device=device)
    weights = torch.zeros(len(slices), 1, *padded, device=device)
    for first in range(0, len(windows), atOnce):
        places = [
            (slices.index(number), slice(row, row + height), slice(column, column + width))
            for number, row, column in windows[first : first + atOnce]
        ]
        patches = torch.stack([image[number, :, rows, columns] for number, rows, columns in places])
        for (number, rows, columns), values in zip(places, _probabilities(model, patches, mirror), strict=True):
            total[number, :, rows, columns] += weight * values
            weights[number, :, rows, columns] += weight
    total /= weights.clamp_min(torch.finfo(torch.float32).tiny)
    total[:, :1] += weights == 0  # what no window covers is background
    return slices, total[:, :, : shape[0], : shape[1]]


def _gaussian(height, width):
    """Gives the weights of a window's pixels (H, W): 1 in its middle, a deviation of an eighth of the side.

    Reference: the weights of nnU-Net and of MONAI's `SlidingWindowInferer`, the floor of 1e-3 included.
    """
    sides = []
    for length in (height, width):
        away = torch.arange(length) - (length - 1) / 2
        sides.append(torch.exp(-(away**2) / (2 * (length / 8) ** 2)))
    return torch.outer(*sides).clamp_min(1e-3)


def _probabilities(model, patches, mirror):
    """Gives float32 (B, K, H, W) of patches (B, C, H, W); with `mirror` the mean over the four flips."""
    patches = patches.contiguous(memory_format=torch.channels_last)
    flips = [(), (2,), (3,), (2, 3)] if mirror else [()]
    total = 0
    for axes in flips:
        with _autocast(patches.device):
            logits = model(patches.flip(axes) if axes else patches)
        total = total + (logits.flip(axes) if axes else logits).float().softmax(1)
    return total / len(flips)
