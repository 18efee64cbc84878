"""The same work done the straightforward way and by the well-known packages, for `benchmark.py` to measure against."""

import math

import h5py
import nibabel as nib
import numpy as np
import torch
from PIL import Image
from scipy import ndimage

import config
from transforms import transformCase

# Augmentation: each gives a function of one patch (C, H, W) and its label (H, W), but kornia's, which takes a batch.
# What a package lacks is left out, in its favour.


def augmentByTorchio(transform):
    """Gives torchio's own way."""

    def augment(image, label):
        x, y = transformCase(image[..., None], label[..., None], transform)
        return x[0], y[0]

    return augment


def augmentByMonai(isStretched):
    """Gives MONAI's dictionary transforms; they stretch the whole patch, for they know no mask."""
    from monai import transforms as monai

    both, modes = ['image', 'label'], ('bilinear', 'nearest')
    pad = monai.SpatialPadd(both, (config.PATCH_SIZE, config.PATCH_SIZE), mode='minimum')
    flip = [monai.RandFlipd(both, prob=config.FLIP_PROBABILITY, spatial_axis=axis) for axis in config.FLIP_AXES]
    affine = monai.RandAffined(
        both,
        prob=1,
        rotate_range=math.radians(config.AFFINE_DEGREES[-1]),
        scale_range=config.AFFINE_SCALES,
        mode=modes,
        padding_mode='border',
    )
    low, high = config.ANISOTROPY_DOWNSAMPLING
    coarse = monai.RandSimulateLowResolutiond('image', prob=1, upsample_mode='bilinear', zoom_range=(1 / high, 1 / low))
    elastic = monai.Rand2DElasticd(
        both,
        spacing=config.PATCH_SIZE / 4,  # the mesh of 7 control points
        magnitude_range=(0, config.ELASTIC_DISPLACEMENT[0]),
        prob=1,
        mode=modes,
        padding_mode='border',
    )
    weights = np.array([config.FLIP_WEIGHT, config.AFFINE_WEIGHT, config.ANISOTROPY_WEIGHT, config.ELASTIC_WEIGHT])
    stay, p = monai.Identityd(both), config.SPATIAL_PROBABILITY
    spatial = monai.OneOf([monai.Compose(flip), affine, coarse, elastic, stay], [*(weights * p / weights.sum()), 1 - p])
    bounds = (*config.STRETCH_PERCENTILES, *config.STRETCH_RANGE)
    stretch = [monai.ScaleIntensityRangePercentilesd('image', *bounds, clip=True, channel_wise=True)] * isStretched
    noise = monai.RandGaussianNoised('image', prob=1, std=config.NOISE_STD)
    coefficients = (-config.BIAS_COEFFICIENTS, config.BIAS_COEFFICIENTS)
    bias = monai.RandBiasFieldd('image', prob=1, coeff_range=coefficients)
    p = config.INTENSITY_PROBABILITY / 2
    transform = monai.Compose([pad, spatial, *stretch, monai.OneOf([noise, bias, stay], [p, p, 1 - 2 * p])])

    def augment(image, label):
        done = transform({'image': image.float(), 'label': label[None]})
        return done['image'].as_tensor(), done['label'].as_tensor()[0].long()

    return augment


def augmentByBatchgenerators(isGamma):
    """Gives batchgeneratorsv2's way; for the bias field its brightness gradient, or the cheaper gamma correction."""
    from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
    from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
    from batchgeneratorsv2.transforms.local.brightness_gradient import BrightnessGradientAdditiveTransform
    from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
    from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform

    size, low, high = (config.PATCH_SIZE,) * 2, *config.ANISOTROPY_DOWNSAMPLING
    turn, scale = math.radians(config.AFFINE_DEGREES[-1]), (1 - config.AFFINE_SCALES, 1 + config.AFFINE_SCALES)
    shared = {'patch_center_dist_from_border': 0, 'random_crop': False, 'mode_seg': 'nearest'}
    shared |= {'padding_mode_image': 'border'}
    affine = SpatialTransform(size, p_rotation=1, rotation=(-turn, turn), p_scaling=1, scaling=scale, **shared)
    magnitude = (0, config.ELASTIC_DISPLACEMENT[0])
    bent = {'elastic_deform_scale': (0.2, 0.3), 'elastic_deform_magnitude': magnitude}
    elastic = SpatialTransform(size, p_elastic_deform=1, **bent, **shared)
    coarse = SimulateLowResolutionTransform((1 / high, 1 / low), False, False, ())
    spatial = [MirrorTransform(config.FLIP_AXES), affine, coarse, elastic]
    noise = GaussianNoiseTransform((0, config.NOISE_STD))
    gradient = BrightnessGradientAdditiveTransform((32, 128), max_strength=0.3, same_for_all_channels=False)
    field = GammaTransform((0.7, 1.5), 0, False, 1, 0) if isGamma else gradient
    weights = np.array([config.FLIP_WEIGHT, config.AFFINE_WEIGHT, config.ANISOTROPY_WEIGHT, config.ELASTIC_WEIGHT])
    shares = np.cumsum(weights / weights.sum())

    def augment(image, label):
        done = {'image': image.float(), 'segmentation': label[None].short()}
        if np.random.rand() < config.SPATIAL_PROBABILITY:
            done = spatial[np.searchsorted(shares, np.random.rand())](**done)
        if np.random.rand() < config.INTENSITY_PROBABILITY:
            done = (noise if np.random.rand() < 0.5 else field)(**done)
        return done['image'], done['segmentation'][0].long()

    return augment


def augmentByKornia():
    """Gives kornia's way, for a batch; each transform has the probability that it has in ours."""
    import kornia.augmentation as kornia

    weights = np.array([config.FLIP_WEIGHT, config.AFFINE_WEIGHT, config.ANISOTROPY_WEIGHT, config.ELASTIC_WEIGHT])
    flip, affine, _, elastic = weights / weights.sum() * config.SPATIAL_PROBABILITY
    scale, half = (1 - config.AFFINE_SCALES, 1 + config.AFFINE_SCALES), config.INTENSITY_PROBABILITY / 2
    transform = kornia.AugmentationSequential(
        kornia.RandomHorizontalFlip(p=flip * config.FLIP_PROBABILITY),
        kornia.RandomVerticalFlip(p=flip * config.FLIP_PROBABILITY),
        kornia.RandomAffine(config.AFFINE_DEGREES[-1], scale=(*scale, *scale), padding_mode='border', p=affine),
        kornia.RandomElasticTransform(p=elastic),
        kornia.RandomGaussianNoise(std=config.NOISE_STD, p=half),
        kornia.RandomGaussianIllumination(p=half),
        data_keys=['input', 'mask'],
    )

    def augment(image, label):
        image, label = transform(image.float(), label[:, None].float())
        return image, label[:, 0].long()

    return augment


# Preprocessing


def preprocessSimply(df, filename):
    """Writes a patch file as one would at first: float64 volumes, a loop over windows, one patch appended at a time."""
    size, noPatches = config.PATCH_SIZE, 0
    with h5py.File(filename, 'w') as file:
        for name, shape in (('image', (len(config.MODALITIES), size, size)), ('label', (size, size))):
            kind = {'dtype': 'f4' if name == 'image' else 'u1', 'chunks': (1, *shape), 'compression': 'lzf'}
            file.create_dataset(name, (0, *shape), maxshape=(None, *shape), **kind)
        for _, paths in df.iterrows():
            image = np.stack([_stretch(nib.load(paths[name]).get_fdata()) for name in config.MODALITIES])
            label = nib.load(paths['seg']).get_fdata()
            label[label == 4] = 3
            for depth in range(label.shape[2]):
                for row in (0, label.shape[0] - size):
                    for column in (0, label.shape[1] - size):
                        window = slice(row, row + size), slice(column, column + size), depth
                        if label[window].any():
                            noPatches += 1
                            for name, patch in (('image', image[:, *window]), ('label', label[window])):
                                file[name].resize(noPatches, axis=0)
                                file[name][-1] = patch
    return noPatches


def _stretch(volume):
    brain, (lowest, highest) = volume != 0, config.STRETCH_RANGE
    low, high = np.percentile(volume[brain], config.STRETCH_PERCENTILES)
    stretched = (np.clip(volume, low, high) - low) / (high - low) * (highest - lowest) + lowest
    return np.where(brain, stretched, lowest)


# Prediction


def predictPatchByPatch(x, model, device, every=1):
    """Sends the windows of a volume (D, C, W, H), or every so many of them, through the network one by one."""
    size = config.PATCH_SIZE
    starts = [(0, 0), (0, x.shape[3] - size), (x.shape[2] - size, 0), (x.shape[2] - size, x.shape[3] - size)]
    windows = [(depth, row, column) for depth in range(len(x)) for row, column in starts]
    with torch.inference_mode():
        for depth, row, column in windows[::every]:
            patch = x[depth : depth + 1, :, row : row + size, column : column + size]
            model(patch.to(device)).argmax(1).cpu()


def predictByMonai(x, model, device):
    """Gives the classes (D, W, H) that MONAI's SlidingWindowInferer makes of a volume (D, C, W, H), slice by slice."""
    from monai.inferers import SlidingWindowInferer

    size, overlap = config.PATCH_SIZE, 1 - config.PATCH_STRIDE / config.PATCH_SIZE
    inferer = SlidingWindowInferer((size, size), config.PREDICT_BATCH, overlap, 'gaussian', device='cpu')
    with torch.inference_mode():
        parts = x.split(config.PREDICT_BATCH // 4)  # four windows a slice
        return torch.cat([inferer(part.to(device), lambda each: model(each).softmax(1)).argmax(1) for part in parts])


# Scores


def measureByTransform(truth, prediction):
    """Gives HD95 in mm of two masks at 1 mm by the distance transform of the whole volume."""
    surfaces = [mask & ~ndimage.binary_erosion(mask) for mask in (truth, prediction)]
    away = [ndimage.distance_transform_edt(~surface) for surface in surfaces]
    return max(np.percentile(away[1][surfaces[0]], 95), np.percentile(away[0][surfaces[1]], 95))


def measureByMonai(truth, prediction):
    """Gives HD95 in mm of two masks at 1 mm by MONAI."""
    from monai.metrics import compute_hausdorff_distance

    masks = [torch.from_numpy(mask)[None, None] for mask in (prediction, truth)]
    return float(compute_hausdorff_distance(*masks, include_background=True, percentile=95))


def measureBySurfaceDistance(truth, prediction):
    """Gives HD95 in mm of two masks at 1 mm by surface-distance, whose rule is another."""
    import surface_distance

    return surface_distance.compute_robust_hausdorff(
        surface_distance.compute_surface_distances(truth, prediction, (1, 1, 1)), 95
    )


# Pictures


def writeFramesInColor(frames, file):
    """Writes RGB frames, uint8 (N, H, W, 3), as an animated GIF; the library finds each frame's palette."""
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(file, 'GIF', save_all=True, append_images=images[1:], duration=80, loop=0)
