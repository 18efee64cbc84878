"""Train a model, validate it and predict with it."""

import gc
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from types import NoneType

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import SequentialSampler
from tqdm.auto import tqdm

import config
from parallel import leaveOut
from patients import maskFunction, patientOf, readCase, spacingOf
from ranks import sumOverRanks
from recipe import (
    MovingAverage,
    PolySchedule,
    autocast,
    availableWeights,
    makeAverage,
    makeCriterion,
    makeModel,
    makeScheduler,
    precision,
)
from trained import bare, followAll, identityOf, membersFor, membersOf, noteTraining, noteValidation, warnOfTrained
from transforms import transformVolume
from volumes import PLANES, boundingBox, planWindows, warnOfUnfit, withChannels
from windows import predictPatches, predictSlices

__all__ = [
    'availableWeights',
    'makeAverage',
    'makeCriterion',
    'makeModel',
    'makeScheduler',
    'precision',
    'predict',
    'predictAll',
    'train',
    'validate',
]

_CHECK_EVERY = 20  # batches between two checks of the loss: each makes the GPU wait for the host


def _deviceOf(model):
    return next((parameter.device for parameter in model.parameters()), torch.device(config.DEVICE))


def train(model, criterion, optimizer, scaler, loader, transform=None, scheduler=None, average=None):
    """Train the model for one epoch and return the loss summed over samples.

    The forward pass runs under autocast (`precision`), the loss in float32. The gradient's norm is clipped to
    `config.GRADIENT_CLIP`. The model's parameters are converted to channels_last, in place. What the model is trained
    on is noted as `model.identity`, and the last step's learning rate as `optimizer.learnRate`, for the checkpoint.

    Args:
        model: takes float (B, C, H, W), returns logits (B, NO_CLASSES, H, W); batches go to its device.
        criterion: takes logits and int64 (B, H, W), returns the mean loss of a batch.
        optimizer: of the model's parameters.
        scaler: torch.amp.GradScaler; has no effect if it is disabled.
        loader: yields batches of (image, label), as a DataLoader over a `utils.BRATSDataset` does.
        transform: `batched.Batched` or another callable, applied to (image, label) of each batch on the device.
        scheduler: stepped after each batch, unless it is a ReduceLROnPlateau, which waits for a validation loss. One of
            `makeScheduler` that decays by the step ends the epoch with its last step, and ends sooner if the time of
            `config.TIME_BUDGET` is short.
        average: of `makeAverage`; updated after each batch.

    Returns:
        float; divided by the number of samples it is the epoch's loss. If the schedule ends within the epoch, the
        batches that are left out count as the mean of the others.

    Raises:
        FloatingPointError: a loss is not finite; batch and learning rate are named. Checkpoints are untouched.
        ValueError: the loader yields no batch, or the model has been trained on other patients, files or settings, or
            the schedule has ended before.
    """
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group['params']):
        raise ValueError('The optimizer has none of the parameters of the model: make it after the model, from it.')
    schedule = scheduler if isinstance(scheduler, PolySchedule) else None
    if schedule is not None and schedule.hasEnded:
        raise ValueError(
            f'The schedule has ended after {schedule.numSteps} steps, and the learning rate is 0: the training is '
            'complete. `utils.epochs` stops there; for a longer training, begin a new run.'
        )
    noteTraining(model, getattr(loader, 'dataset', None), criterion)
    if getattr(loader, 'persistent_workers', False):
        print('persistent_workers = True: a resumed run will differ from an uninterrupted one.')
    model.to(memory_format=torch.channels_last).train()
    device, isStepped = _deviceOf(model), not isinstance(scheduler, (NoneType, ReduceLROnPlateau))
    if average is not None:
        bare(average).identity = identityOf(model)
        average.to(memory_format=torch.channels_last)
        average.n_averaged = average.n_averaged.cpu()  # a prediction may have moved it

    def step(image, label):
        optimizer.zero_grad(set_to_none=True)
        optimizer.learnRate = float(optimizer.param_groups[0]['lr'])
        loss = criterion(_logits(model, image), label)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.GRADIENT_CLIP)
        scaler.step(optimizer)
        scaler.update()
        if isStepped:
            scheduler.step()
        if average is not None:
            if schedule is not None and isinstance(average, MovingAverage):
                average.numSteps = schedule.numSteps
            average.update_parameters(bare(model))
        return loss.detach()

    rate = ', '.join(f'{group["lr"]:.2e}' for group in optimizer.param_groups)
    with warnings.catch_warnings():  # torch warns if the scaler skips the very first step
        warnings.filterwarnings('ignore', 'Detected call of .lr_scheduler.step')
        return _runEpoch('train', step, loader, device, transform, f' at learning rate {rate}', schedule)


def validate(model, criterion, loader, dice=False):
    """Return the loss summed over samples of one epoch, without training.

    A warning names patients of the loader that the model was trained on: their loss does not tell the best epoch. The
    patients are noted in `model.identity`, for the checkpoint.

    Args:
        model, criterion, loader: as in `train`; or the average of a model.
        dice: return the Dice of the regions too.

    Returns:
        float; divided by the number of samples it is the epoch's loss. With `dice`, also a dict of WT, TC and ET (those
        that `config.REGIONS` has) to their Dice: of the pixels of each patient's patches, then the mean over patients
        (macro average); 1 if a region is neither there nor predicted. Where the loader does not tell which patient a
        patch is of (it shuffles, or its dataset is not a `utils.BRATSDataset`), all patches count as one patient.

    Raises:
        FloatingPointError: a loss is not finite; the batch is named.
        ValueError: the loader yields no batch, or patches that were cut otherwise than those of the training.
    """
    noteValidation(model, getattr(loader, 'dataset', None))
    model.to(memory_format=torch.channels_last).eval()  # not in inference_mode: converted there, weights cannot train
    classes, device, patients = config.NO_CLASSES, _deviceOf(model), _patientsOf(loader)
    numPatients = 1 if patients is None else int(patients.max()) + 1
    # pixels of each (patient, true class, predicted class)
    counts = torch.zeros(numPatients * classes**2, dtype=torch.int64, device=device)
    numSeen = 0

    def step(image, label):
        nonlocal numSeen
        logits = _logits(model, image)
        if dice:
            own = 0 if patients is None else patients[numSeen : numSeen + len(label), None, None].to(device)
            # argmax takes ten times as long as max
            place = (own * classes + label) * classes + logits.max(1).indices
            counts.add_(torch.bincount(place.flatten(), minlength=len(counts)))
            numSeen += len(label)
        return criterion(logits, label)

    with torch.inference_mode():
        loss = _runEpoch('validate', step, loader, device)
    return (loss, _diceOf(sumOverRanks(counts.reshape(-1, classes, classes).cpu()))) if dice else loss


def _patientsOf(loader):
    """Return the number of the patient of each sample of a loader, int64, in its order; None if that is not known."""
    dataset, batches = getattr(loader, 'dataset', None), getattr(loader, 'batch_sampler', None)
    isOrdered = isinstance(batches, list) or isinstance(getattr(batches, 'sampler', None), SequentialSampler)
    indices = [index for batch in batches for index in batch] if isOrdered else None
    if isinstance(dataset, torch.utils.data.Subset):
        indices = [dataset.indices[index] for index in indices or ()]
        dataset = dataset.dataset
    numbers = getattr(dataset, 'patientNumbers', None)
    return None if numbers is None or not indices else torch.from_numpy(numbers.astype('int64'))[indices]


def _diceOf(counts):
    """Return the Dice of the main regions, a mean over patients, from the pixels (P, K, K) of the true and predicted
    classes of each patient."""
    counts, found = counts[counts.sum((1, 2)) > 0].double(), {}
    for region in [name for name in ('WT', 'TC', 'ET') if name in config.REGIONS]:
        numbers = list(config.REGIONS[region])
        total = counts[:, numbers].sum((1, 2)) + counts[:, :, numbers].sum((1, 2))
        both = counts[:, numbers][:, :, numbers].sum((1, 2))
        found[region] = float(torch.where(total > 0, 2 * both / total, 1.0).mean())
    return found


def _logits(model, image):
    with autocast(image.device):
        return model(image).float()


def _runEpoch(name, step, loader, device, transform=None, remark='', schedule=None):
    """Return the sum over samples, those of all ranks, of the losses that `step` returns for each batch.

    A schedule that has ended ends the epoch; the other batches then count as the mean of those before.
    """
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
                if schedule is not None:
                    schedule.fit()
            if schedule is not None and schedule.hasEnded:
                break
        if losses:  # at the end, and not at batch len(loader): a loader may give fewer
            total += _sumLosses(name, losses, sizes, number, len(loader), remark)
    finally:
        # after an interrupt the traceback keeps the iterator, and its workers, alive
        if not getattr(loader, 'persistent_workers', False) and hasattr(batches, '_shutdown_workers'):
            batches._shutdown_workers()
    if number == 0:
        raise ValueError(f'{name}: the loader has no batch; are there fewer patches than config.BATCHSIZE?')
    if schedule is not None and schedule.hasEnded:
        total *= len(loader) / number
    return sumOverRanks(total)


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


def predict(
    paths,
    model,
    transform=None,
    patchStride=None,
    device=None,
    mirror=False,
    probabilities=False,
    planes=None,
    measure=None,
):
    """Segment one patient, slice by slice.

    A model that `train` or a checkpoint gave an `identity` is shown what it was trained on: modalities, planes,
    stretching and patch size are taken from there, and a warning says where `config` differs.

    Args:
        paths: one row of the file list (Series or dict); a segmentation is not needed.
        model: takes float (B, C, H, W), returns logits (B, NO_CLASSES, H, W). It is moved to the device. Or a list of
            models, the members of an ensemble: their probabilities are averaged, each with its own planes.
        transform: torchio transform of the whole volume that keeps its shape. None (default): the stretching that the
            model was trained with, or `transforms.volumeTransform()`.
        patchStride: pixels between windows of the patch size. Where windows overlap, their probabilities are
            averaged with Gaussian weights; windows without brain are skipped. None (default): the brain's bounding box
            is predicted as a whole, which is faster.
        device: default `config.DEVICE`.
        mirror: average the probabilities of the four flips of each slice; takes four times as long.
        probabilities: return them too: a softmax, or for a model trained with the focal loss, which treats each class
            by itself, the sigmoids divided by their sum.
        planes: the planes whose slices are predicted, some of `volumes.PLANES`; their probabilities are averaged.
            Default: those of the training.
        measure: function such as `quality.measureMember`, called for each member with the list of the probabilities
            that its planes give, float (d, NO_CLASSES, w, h) each, on the device, in the brain's bounding box.

    Returns:
        x: float32 (D, C, W, H), the model's input; on the CPU, as all that follows.
        y: int64 (D, W, H), the truth after the transform; None without a segmentation.
        yhat: int64 (D, W, H), classes 0 to 3; voxels that no window covers are 0.
        probability: float32 (D, NO_CLASSES, W, H), only with `probabilities = True`.
        measured: only with `measure`: list of what it returned for each member; empty for a patient without brain.

    A warning names a patient whose voxels do not measure 1 mm, or whose skull was not stripped.

    Raises:
        ValueError, FileNotFoundError: bad data, as in `patients.readCase`; the transform changes the shape, or is not
            the one of the training; the stride leaves pixels out.
    """
    options = {'patchStride': patchStride, 'device': device, 'mirror': mirror}
    options |= {'probabilities': probabilities, 'measure': measure}
    ways = followAll(model, transform, planes)
    return _segment(*_prepare(paths, ways[0]), membersOf(model), ways, **options)


def predictAll(df, model, transform=None, planes=None, **options):
    """Segment the patients of a file list one by one; the next is read while one is predicted.

    A warning names the patients that the model was trained on. Of an ensemble, a patient is predicted by the members
    that were not trained on it, as in a cross-validation, and by all if there is no such member. A patient whose files
    cannot be used ends the prediction, or is left out and named, as `config.ON_BAD_PATIENT` says.

    Args:
        df: file list.
        model, transform, planes: as in `predict`.
        **options: `patchStride`, `device`, `mirror`, `probabilities`, `measure` as in `predict`.

    Yields:
        (patient, what `predict` returns for it).

    Raises:
        ValueError, FileNotFoundError: as in `predict`, when the bad patient is reached.
    """
    models, ways, rows = membersOf(model), followAll(model, transform, planes), [paths for _, paths in df.iterrows()]
    members, trained = membersFor(models, df)
    warnOfTrained(trained, len(df))
    if numFew := sum(len(some) < len(models) for some in members.values()):
        print(f'{numFew} of {len(df)} patients are predicted only by the models that were not trained on them.')
    with ThreadPoolExecutor(1) as reader:  # decompression releases the interpreter's lock
        following = reader.submit(_prepare, rows[0], ways[0]) if rows else None
        for number, patient in enumerate(tqdm(df.index, 'predict', leave=False)):
            prepared, following = following, None
            if number + 1 < len(rows):
                following = reader.submit(_prepare, rows[number + 1], ways[0])
            try:
                case = prepared.result()
            except (ValueError, OSError) as error:
                leaveOut(error, f'{number} of {len(rows)} patients were segmented before.')
                continue
            chosen = [way for member, way in zip(models, ways, strict=True) if member in members[patient]]
            yield patient, _segment(*case, members[patient], chosen, **options)


def _prepare(paths, way):
    """Return x (D, C, W, H), y (D, W, H) or None, and the brain mask, bool (D, W, H), of one patient."""
    image, label = readCase(paths, way.modalities)
    isBrain = torch.from_numpy(maskFunction(image).any(0)).permute(2, 0, 1)  # (W, H, D) -> (D, W, H)
    warnOfUnfit(patientOf(paths), isBrain.numpy(), spacingOf(paths))
    x, y = transformVolume(image, label, way.transform, patientOf(paths))
    return x, None if y is None else y.long(), isBrain


def _segment(
    x, y, isBrain, models, ways, patchStride=None, device=None, mirror=False, probabilities=False, measure=None
):
    """Return what `predict` returns, from what `_prepare` returns; a way for each model."""
    device = torch.device(device or config.DEVICE)
    yhat = torch.zeros(isBrain.shape, dtype=torch.int64)
    probability = torch.zeros(len(x), config.NO_CLASSES, *x.shape[2:]) if probabilities else None
    measured = []
    if probabilities:
        probability[:, 0] = 1
    if isBrain.any():
        box = boundingBox(isBrain.numpy())
        image, total = x.to(device), 0
        for model, way in zip(models, ways, strict=True):
            parts = None if measure is None else []
            total += _predictPlanes(image, isBrain, box, model, way, patchStride, mirror, parts) / len(way.planes)
            measured += [] if measure is None else [measure(parts)]
        slices, *inSlice = box
        yhat[box] = total.max(1).indices.cpu()  # on the device: less is copied; argmax takes ten times as long as max
        if probabilities:
            probability[slices, :, *inSlice] = total.cpu() / len(models)
    return (x, y, yhat, *[probability] * probabilities, *[measured] * (measure is not None))


def _multipleOf(model):
    """Return what the sides of a model's input have to be a multiple of: its encoder halves them several times."""
    encoder = getattr(bare(model), 'encoder', None)
    return getattr(encoder, 'output_stride', 2**config.ENCODER_DEPTH)


def _predictPlanes(x, isBrain, box, model, way, patchStride, mirror, parts=None):
    """Return the sum over the planes of the probabilities (D', K, W', H') in the brain's bounding box.

    If `parts` is a list, the probabilities of each plane are appended to it.
    """
    multiple, sides = _multipleOf(model), [part.stop - part.start for part in box]
    total = torch.zeros(sides[0], config.NO_CLASSES, *sides[1:], device=x.device)
    predictBatch = partial(predictPatches, model, mirror=mirror, activation=way.activation)
    with _evaluationMode(model, x.device):
        for plane in way.planes:
            order = PLANES[plane]
            own = total if parts is None else torch.zeros_like(total)
            (first, *inPlane), view = [box[axis] for axis in order], own.permute(withChannels(order))
            image, mask = x.permute(withChannels(order)), isBrain.permute(order)
            area, starts, size = planWindows(mask.numpy(), patchStride, way.patchSize, multiple)
            for slices, values in predictSlices(image[:, :, *area], mask[:, *area], starts, size, predictBatch):
                values = values if patchStride is None else values[:, :, *inPlane]
                view[[number - first.start for number in slices]] += values
            if parts is not None:
                total += own
                own[:, :1] += 1 - own.sum(1, keepdim=True)
                parts.append(own)
    total[:, :1] += len(way.planes) - total.sum(1, keepdim=True)  # what no window covers is background
    return total
