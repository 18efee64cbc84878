"""Other systems, trained as their authors publish them, for the comparison in `headtohead.py`.

Each has `prepare(traindf, folder)`, which returns the seconds that it took, `train(seconds)`, which returns the number
of steps, and `predict(paths)`, which returns y and yhat of one patient as `engine.predict` does: int64 (D, W, H),
classes 0 to 3.
"""

import itertools
import math
import os
import shutil
import time
from pathlib import Path

import monai
import nibabel as nib
import numpy as np
import torch

import config
from engine import autocast, precision
from patients.reading import readCase, spacingOf

MODALITIES = ('t1', 't1ce', 't2', 'flair')  # all four, as both systems have it
CROP = 128  # voxels; the tutorial's 224 x 224 x 144 need more memory than a free GPU has
OVERLAP = 0.5  # of the sliding window in prediction


class SegResNet:
    """MONAI's 3-D SegResNet as in its tutorial on BraTS.

    Network, loss, random transforms, batches of one crop and Adam are the tutorial's. The rate falls over the given
    time, where the tutorial's falls over 300 epochs; the crop is smaller. The volumes are kept in memory, 0.2 GB each.

    Reference:
        MONAI's tutorials, 3d_segmentation/brats_segmentation_3d. Myronenko 2018, arXiv 1810.11654.
    """

    def prepare(self, traindf, folder):
        begin = time.monotonic()
        self.cases = [_readNormalized(paths) for _, paths in traindf.iterrows()]
        return time.monotonic() - begin

    def train(self, seconds):
        torch.manual_seed(config.SEED)
        torch.backends.cudnn.benchmark = True  # as the tutorial sets it
        dataset = monai.data.Dataset(self.cases, monai.transforms.Compose(_randomTransforms()))
        workers = {'num_workers': config.LOADER_WORKERS, 'persistent_workers': config.LOADER_WORKERS > 0}
        loader = monai.data.DataLoader(dataset, shuffle=True, **workers)
        cases = itertools.chain.from_iterable(itertools.repeat(loader))
        self.model = monai.networks.nets.SegResNet(
            blocks_down=(1, 2, 2, 4),
            blocks_up=(1, 1, 1),
            init_filters=16,
            in_channels=4,
            out_channels=3,
            dropout_prob=0.2,
        ).to(config.DEVICE)
        criterion = monai.losses.DiceLoss(smooth_nr=0, smooth_dr=1e-5, squared_pred=True, sigmoid=True)
        optimizer = torch.optim.Adam(self.model.parameters(), 1e-4, weight_decay=1e-5)
        scaler = torch.amp.GradScaler(config.DEVICE, enabled=precision(config.DEVICE) is torch.float16)
        numSteps, begin = 0, time.monotonic()
        while (elapsed := time.monotonic() - begin) < seconds:
            for group in optimizer.param_groups:
                group['lr'] = 1e-4 * (1 + math.cos(math.pi * elapsed / seconds)) / 2
            case = next(cases)
            image, regions = (torch.as_tensor(case[key]).to(config.DEVICE) for key in ('image', 'regions'))
            with autocast(config.DEVICE):
                loss = criterion(self.model(image).float(), regions)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            numSteps += 1
        self.model.eval()
        return numSteps

    def predict(self, paths):
        case = _readNormalized(paths)
        inferer = monai.inferers.SlidingWindowInferer((CROP,) * 3, overlap=OVERLAP)
        with torch.inference_mode(), autocast(config.DEVICE):
            isIn = inferer(torch.as_tensor(case['image'])[None].to(config.DEVICE), self.model)[0].float().cpu() > 0
        yhat = torch.zeros(isIn.shape[1:], dtype=torch.int64)
        for number, mask in zip((2, 1, 3), isIn, strict=True):  # whole tumor, core, enhancing tumor, the later inside
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


class NnUNet:
    """nnU-Net v2 with its own planner, preprocessing, trainer and prediction, trained on the regions as for BraTS.

    Its rate falls by the time, where it falls by 1,000 epochs of 250 steps, and it does not validate itself.

    Args:
        configuration: '2d' or '3d_fullres'.

    Reference:
        Isensee et al. 2021, Nature Methods 18.
    """

    def __init__(self, configuration):
        self.configuration = configuration

    def prepare(self, traindf, folder):
        shutil.rmtree(folder, ignore_errors=True)  # of another fold
        for name in ('raw', 'preprocessed', 'results'):
            os.environ[f'nnUNet_{name}'] = str(Path(folder, name))  # read when it is needed, from nnU-Net 2.8 on
        from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json
        from nnunetv2.experiment_planning import plan_and_preprocess_api

        raw = Path(folder, 'raw', 'Dataset001_BraTS')
        for name in ('imagesTr', 'labelsTr'):
            (raw / name).mkdir(parents=True)
        for patient, paths in traindf.iterrows():
            image, label = readCase(paths, MODALITIES)
            depth, width, height = spacingOf(paths)
            affine = np.diag([width, height, depth, 1])
            for number, volume in enumerate(image):
                nib.save(nib.Nifti1Image(volume, affine), raw / 'imagesTr' / f'{patient}_{number:04d}.nii.gz')
            nib.save(nib.Nifti1Image(label.astype(np.uint8), affine), raw / 'labelsTr' / f'{patient}.nii.gz')
        labels = {'background': 0, **{name: list(config.REGIONS[name]) for name in config.MAIN_REGIONS}}
        channels, begin = dict(enumerate(MODALITIES)), time.monotonic()
        generate_dataset_json(str(raw), channels, labels, len(traindf), '.nii.gz', regions_class_order=(2, 1, 3))
        plan_and_preprocess_api.extract_fingerprints([1], num_processes=2)
        plan_and_preprocess_api.plan_experiments([1])
        plan_and_preprocess_api.preprocess([1], configurations=[self.configuration], num_processes=[2])
        return time.monotonic() - begin

    def train(self, seconds):
        from nnunetv2.run.run_training import get_trainer_from_args

        torch.manual_seed(config.SEED)
        torch.backends.cudnn.benchmark = True  # as its command sets it
        device = torch.device(config.DEVICE)
        self.trainer = get_trainer_from_args('1', self.configuration, 'all', device=device)
        self.trainer.on_train_start()
        self.trainer.network.train()
        numSteps, begin = 0, time.monotonic()
        while (elapsed := time.monotonic() - begin) < seconds:
            for group in self.trainer.optimizer.param_groups:
                group['lr'] = self.trainer.initial_lr * (1 - elapsed / seconds) ** 0.9
            self.trainer.train_step(next(self.trainer.dataloader_train))
            numSteps += 1
        self.trainer.on_train_end()
        return numSteps

    def predict(self, paths):
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

        trainer = self.trainer
        trainer.set_deep_supervision_enabled(False)
        isOnGpu = trainer.device.type == 'cuda'
        predictor = nnUNetPredictor(device=trainer.device, perform_everything_on_device=isOnGpu, allow_tqdm=False)
        axes = trainer.inference_allowed_mirroring_axes
        weights = [getattr(trainer.network, '_orig_mod', trainer.network).state_dict()]
        predictor.manual_initialization(
            trainer.network,
            trainer.plans_manager,
            trainer.configuration_manager,
            weights,
            trainer.dataset_json,
            type(trainer).__name__,
            axes,
        )
        image, label = readCase(paths, MODALITIES)
        depth, width, height = spacingOf(paths)
        image = np.ascontiguousarray(image.transpose(0, 3, 2, 1), np.float32)  # (C, D, H, W), as it reads files
        found = predictor.predict_single_npy_array(image, {'spacing': [depth, height, width]})
        yhat = torch.from_numpy(found.astype(np.int64)).transpose(1, 2)  # (D, W, H)
        return torch.from_numpy(label).long().permute(2, 0, 1), yhat
