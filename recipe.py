"""Make what a training needs, as `config` describes it: model, precision, loss, schedule and averaged weights."""

import logging

import segmentation_models_pytorch as smp
import torch

import config
from trained import bare


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
      the last step. `engine.train` steps it after each batch.
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
    warmup, power = min(config.WARMUP, numSteps // 10), config.POLY_POWER

    def factor(step):
        rest = max(0.0, 1 - step / numSteps)
        return min(1.0, (step + 1) / (warmup + 1)) * rest**power

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    scheduler.stepsPerEpoch = numSteps / config.EPOCHS  # in its state, so that a run is not resumed with other batches
    return scheduler


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
    if not config.AVERAGE:
        return None
    decay = 1 - 1 / max(1.0, config.AVERAGE * numSteps)

    def update(averaged, current, onDevice):
        count = int(average.n_averaged)  # on the host: to read the other one, the host would wait for the GPU
        early = min(decay, (1 + count) / (10 + count))
        torch.optim.swa_utils.get_ema_multi_avg_fn(early)(averaged, current, onDevice)

    average = torch.optim.swa_utils.AveragedModel(bare(model), multi_avg_fn=update, use_buffers=True)
    return average
