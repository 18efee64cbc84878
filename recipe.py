"""Make what a training needs, as `config` describes it: model, precision, loss, schedule and averaged weights."""

import logging
import time

import psutil
import segmentation_models_pytorch as smp
import torch

import config
from ranks import fromFirst, rank
from trained import bare

_STEPS_TO_MEASURE = 200  # after which the speed of a training is known
_TIME_USED = 0.95  # fraction of the time that is left which a shortened schedule fills; the rest is for validation


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


def autocast(device):
    """Return the autocast context of a device, switched off where `precision` is None."""
    dtype = precision(device)
    return torch.autocast(torch.device(device).type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def makeModel():
    """Return the U-Net that `config` describes, on `config.DEVICE`.

    Returns:
        smp.Unet: takes float (B, ENCODER_IN_CHANNEL, H, W), sides a multiple of 2 ** ENCODER_DEPTH; returns logits (B,
        NO_CLASSES, H, W).
    """
    names = ('ENCODER_NAME', 'ENCODER_DEPTH', 'DECODER_CHANNELS', 'NO_CLASSES')
    settings = {name: getattr(config, name) for name in names}
    return buildModel('Unet', settings, config.ENCODER_IN_CHANNEL, availableWeights())


def buildModel(name, settings, numChannels, weights=None):
    """Return a model of smp on `config.DEVICE`.

    Args:
        name: class of smp.
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
    """Return the loss that `config.LOSS` names.

    - `'dice+ce'`: smp's Dice loss plus cross-entropy. The Dice is computed over the pixels of the whole batch, for each
      class that is there, and averaged over the classes.
    - `'focal'`: smp's focal loss with `config.LOSS_GAMMA`, the document's. It treats each class by itself.

    Returns:
        torch.nn.Module: takes logits (B, NO_CLASSES, H, W) and int64 (B, H, W), returns the mean loss of a batch.

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


def makeScheduler(optimizer, numSteps):
    """Return the learning rate scheduler that `config.SCHEDULE` names.

    - `'poly'`: a linear warm-up of `config.WARMUP` steps, then a polynomial decay of power `config.POLY_POWER` to 0 at
      the last step. `engine.train` steps it after each batch. If fewer steps fit into `config.TIME_BUDGET`, it ends
      sooner.
    - `'plateau'`: the document's, torch's ReduceLROnPlateau; call `scheduler.step(valLoss)` after each epoch.

    Args:
        optimizer: whose rate is set.
        numSteps: batches of the whole training: `config.EPOCHS` times those of the loader.

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
    """A linear warm-up, then a polynomial decay to 0 at the last step, which `fit` moves if the time is short.

    Attributes:
        numSteps: steps of the whole training.
        planned: steps before the schedule was shortened.
        stepsPerEpoch: of the plan, so that a run is not resumed with other batches.
    """

    def __init__(self, optimizer, numSteps):
        self.numSteps = self.planned = numSteps
        self.stepsPerEpoch = numSteps / config.EPOCHS
        self._begun = None  # hours and step at which the speed of this process was measured first
        super().__init__(optimizer)

    def get_lr(self):
        """Return the rates of the next step, as torch's schedulers do."""
        warmup = min(config.WARMUP, self.planned // 10)
        rest = max(0.0, 1 - self.last_epoch / self.numSteps)
        factor = min(1.0, (self.last_epoch + 1) / (warmup + 1)) * rest**config.POLY_POWER
        return [rate * factor for rate in self.base_lrs]

    @property
    def hasEnded(self):
        """Whether the last step was made, after which the rate is 0."""
        return self.last_epoch >= self.numSteps

    def fit(self):
        """Shorten the schedule, with a message, if the steps that are left do not fit into `config.TIME_BUDGET`.

        `engine.train` calls it every few batches. The speed is that of this process so far, validation included. All
        ranks follow the first one. A schedule never becomes longer.
        """
        if config.TIME_BUDGET is None or self.hasEnded:
            return
        fitting = fromFirst(self._stepsThatFit())
        if fitting is None or self.last_epoch + fitting >= self.numSteps:
            return
        before, self.numSteps = self.numSteps, self.last_epoch + max(1, int(_TIME_USED * fitting))
        if rank() == 0:
            print(
                f'{self.numSteps} of {before} steps fit into the {config.TIME_BUDGET} hours of config.TIME_BUDGET: '
                f'the learning rate falls to 0 at step {self.numSteps}, and the training ends there.'
            )

    def _stepsThatFit(self):
        """Return how many more steps fit into the time; None if the speed is not known yet."""
        now = hoursUsed()
        if self._begun is None:
            self._begun = now, self.last_epoch
            return None
        hours, steps, left = now - self._begun[0], self.last_epoch - self._begun[1], config.TIME_BUDGET - now
        if steps < _STEPS_TO_MEASURE and hours < 0.05 * left:
            return None
        return max(0, int(left * steps / hours))

    def state_dict(self):
        """Return the state for a checkpoint; the speed belongs to this process."""
        return {name: value for name, value in super().state_dict().items() if name != '_begun'}

    def load_state_dict(self, state):
        """Restore a state; a schedule that was shortened stays so, otherwise its length is that of this object."""
        isShort = state['numSteps'] < state['planned']
        numSteps = min(state['numSteps'], self.planned) if isShort else self.planned
        super().load_state_dict({**state, 'numSteps': numSteps, 'planned': self.planned})


def hoursUsed():
    """Return the hours since this process started."""
    return (time.time() - psutil.Process().create_time()) / 3600


def makeAverage(model, numSteps):
    """Return the exponential moving average of a model's weights and buffers, or None if `config.AVERAGE` is 0.

    The average reaches back over about `config.AVERAGE` of all steps, and over fewer at the start of the training, so
    that a short run does not average its first random weights. `engine.train` updates it after each batch. It is a
    model: validate it, and predict with it.

    Args:
        model: the model that is trained, already on its device.
        numSteps: batches of the whole training.

    Returns:
        torch.optim.swa_utils.AveragedModel.
    """
    return MovingAverage(model, numSteps) if config.AVERAGE else None


class MovingAverage(torch.optim.swa_utils.AveragedModel):
    """The exponential moving average of `makeAverage`. `numSteps` follows a schedule that is shortened."""

    def __init__(self, model, numSteps):
        super().__init__(bare(model), multi_avg_fn=self._update, use_buffers=True)
        self.numSteps, self.fraction = numSteps, config.AVERAGE

    def _update(self, averaged, current, onDevice):
        count = int(self.n_averaged)  # on the host: to read the other one, the host would wait for the GPU
        decay = 1 - 1 / max(1.0, self.fraction * self.numSteps)
        early = min(decay, (1 + count) / (10 + count))
        torch.optim.swa_utils.get_ema_multi_avg_fn(early)(averaged, current, onDevice)
