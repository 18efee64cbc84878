"""Train another system on the same patients for the same time, for the comparison in `recipes.py`."""

import math
import time

import monai
import numpy as np
import torch

import config
from engine import autocast, precision
from patients.reading import readCase

MODALITIES = ('t1', 't1ce', 't2', 'flair')  # all four, as in its tutorial
CROP = 128  # voxels; the tutorial's 224 x 224 x 144 need more memory than a free GPU has
OVERLAP = 0.5  # of the sliding window in prediction


def trainSegResNet(traindf, seconds):
    """Return MONAI's 3-D SegResNet, trained as in its tutorial on BraTS, and the number of its steps.

    Network, loss, random transforms, batches of one crop and Adam are the tutorial's. The rate falls over the given
    time, where the tutorial's falls over 300 epochs; the crop is smaller.

    Args:
        traindf: patients to train on; their volumes are kept in memory, 0.2 GB each.
        seconds: how long to train, reading not counted.

    Reference:
        MONAI's tutorials, 3d_segmentation/brats_segmentation_3d. Myronenko 2018, arXiv 1810.11654.
    """
    monai.utils.set_determinism(config.SEED)
    cases = [_readNormalized(paths) for _, paths in traindf.iterrows()]
    augment = monai.transforms.Compose(_randomTransforms()).set_random_state(config.SEED)
    model = monai.networks.nets.SegResNet(
        blocks_down=(1, 2, 2, 4), blocks_up=(1, 1, 1), init_filters=16, in_channels=4, out_channels=3, dropout_prob=0.2
    ).to(config.DEVICE)
    criterion = monai.losses.DiceLoss(smooth_nr=0, smooth_dr=1e-5, squared_pred=True, sigmoid=True)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, weight_decay=1e-5)
    scaler = torch.amp.GradScaler(config.DEVICE, enabled=precision(config.DEVICE) is torch.float16)
    generator, numSteps, begin = np.random.default_rng(config.SEED), 0, time.monotonic()
    while (elapsed := time.monotonic() - begin) < seconds:
        for group in optimizer.param_groups:
            group['lr'] = 1e-4 * (1 + math.cos(math.pi * elapsed / seconds)) / 2
        case = augment(cases[generator.integers(len(cases))])
        image, regions = (torch.as_tensor(case[key])[None].to(config.DEVICE) for key in ('image', 'regions'))
        with autocast(config.DEVICE):
            loss = criterion(model(image).float(), regions)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        numSteps += 1
    return model.eval(), numSteps


def predictSegResNet(paths, model):
    """Return y and yhat of one patient, as `engine.predict` does: int64 (D, W, H), classes 0 to 3."""
    case = _readNormalized(paths)
    inferer = monai.inferers.SlidingWindowInferer((CROP,) * 3, overlap=OVERLAP)
    with torch.inference_mode(), autocast(config.DEVICE):
        isIn = inferer(torch.as_tensor(case['image'])[None].to(config.DEVICE), model)[0].float().cpu() > 0
    yhat = torch.zeros(isIn.shape[1:], dtype=torch.int64)
    for number, mask in zip((2, 1, 3), isIn, strict=True):  # whole tumor, core and enhancing tumor, the later inside
        yhat[mask] = number
    return torch.from_numpy(case['label']).long().permute(2, 0, 1), yhat.permute(2, 0, 1)  # (W, H, D) -> (D, W, H)


def _readNormalized(paths):
    """Return a patient's image (4, W, H, D), normalized where it is not 0, the classes, and the regions."""
    image, label = readCase(paths, MODALITIES)
    normalize = monai.transforms.NormalizeIntensity(nonzero=True, channel_wise=True)
    regions = np.stack([np.isin(label, config.REGIONS[name]) for name in config.MAIN_REGIONS]).astype(np.float32)
    return {'image': normalize(np.ascontiguousarray(image)), 'label': label, 'regions': regions}


def _randomTransforms():
    both = ['image', 'regions']
    return [
        monai.transforms.RandSpatialCropd(both, (CROP,) * 3, random_size=False),
        *(monai.transforms.RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in range(3)),
        monai.transforms.RandScaleIntensityd('image', factors=0.1, prob=1.0),
        monai.transforms.RandShiftIntensityd('image', offsets=0.1, prob=1.0),
    ]
