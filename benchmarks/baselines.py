"""Do the work of this package naively or by a well-known package, for the comparison in `benchmark.py`."""

import math
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pandas as pd
import torch
import torchio as tio
from isal import igzip
from scipy import ndimage

import config
import transforms
import utils
from metrics.rules import RULES

_FACES_AND_EDGES = ndimage.generate_binary_structure(3, 2)  # 18 neighbours

# Augmentation: each function returns one that augments a patch (C, H, W) and its label (H, W); kornia's takes a batch.
# A transform that a package lacks is left out, which makes that package faster.


class AugmentedDataset(torch.utils.data.Dataset):
    """The patches of a patch file, augmented by a function of one patch and its label."""

    def __init__(self, file, augment):
        self.patches, self.augment = utils.BRATSDataset(file), augment

    def __len__(self):
        return len(self.patches)

    def __getitem__(self, index):
        return self.augment(*self.patches[index])


def makeTorchioAugment(transform):
    """Return a function that applies a torchio transform to one patch."""

    def augment(image, label):
        x, y = transforms.transformCase(image[..., None], label[..., None], transform)
        return x[0], y[0].long()

    return augment


def makeMonaiAugment():
    """Return a function that applies MONAI's dictionary transforms to one patch."""
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
    identity, p = monai.Identityd(both), config.SPATIAL_PROBABILITY
    methods = [monai.Compose(flip), affine, coarse, elastic, identity]
    spatial = monai.OneOf(methods, [*(weights * p / weights.sum()), 1 - p])
    noise = monai.RandGaussianNoised('image', prob=1, std=config.NOISE_STD)
    coefficients = (-config.BIAS_COEFFICIENTS, config.BIAS_COEFFICIENTS)
    bias = monai.RandBiasFieldd('image', prob=1, coeff_range=coefficients)
    p = config.INTENSITY_PROBABILITY / 2
    transform = monai.Compose([pad, spatial, monai.OneOf([noise, bias, identity], [p, p, 1 - 2 * p])])

    def augment(image, label):
        result = transform({'image': image.float(), 'label': label[None]})
        return result['image'].as_tensor(), result['label'].as_tensor()[0].long()

    return augment


def makeBatchgeneratorsAugment(isGamma):
    """Return a function that applies batchgeneratorsv2 to one patch.

    Args:
        isGamma: whether gamma correction stands for the bias field, which it lacks; otherwise a brightness gradient.
    """
    from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
    from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
    from batchgeneratorsv2.transforms.local.brightness_gradient import BrightnessGradientAdditiveTransform
    from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
    from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform

    size, low, high = (config.PATCH_SIZE,) * 2, *config.ANISOTROPY_DOWNSAMPLING
    angle, scale = math.radians(config.AFFINE_DEGREES[-1]), (1 - config.AFFINE_SCALES, 1 + config.AFFINE_SCALES)
    shared = {'patch_center_dist_from_border': 0, 'random_crop': False, 'mode_seg': 'nearest'}
    shared |= {'padding_mode_image': 'border'}
    affine = SpatialTransform(size, p_rotation=1, rotation=(-angle, angle), p_scaling=1, scaling=scale, **shared)
    magnitude = (0, config.ELASTIC_DISPLACEMENT[0])
    deform = {'elastic_deform_scale': (0.2, 0.3), 'elastic_deform_magnitude': magnitude}
    elastic = SpatialTransform(size, p_elastic_deform=1, **deform, **shared)
    coarse = SimulateLowResolutionTransform((1 / high, 1 / low), False, False, ())
    spatial = [MirrorTransform(config.FLIP_AXES), affine, coarse, elastic]
    noise = GaussianNoiseTransform((0, config.NOISE_STD))
    gradient = BrightnessGradientAdditiveTransform((32, 128), max_strength=0.3, same_for_all_channels=False)
    field = GammaTransform((0.7, 1.5), 0, False, 1, 0) if isGamma else gradient
    weights = np.array([config.FLIP_WEIGHT, config.AFFINE_WEIGHT, config.ANISOTROPY_WEIGHT, config.ELASTIC_WEIGHT])
    bounds = np.cumsum(weights / weights.sum())

    def augment(image, label):
        sample = {'image': image.float(), 'segmentation': label[None].short()}
        if np.random.rand() < config.SPATIAL_PROBABILITY:
            sample = spatial[np.searchsorted(bounds, np.random.rand())](**sample)
        if np.random.rand() < config.INTENSITY_PROBABILITY:
            sample = (noise if np.random.rand() < 0.5 else field)(**sample)
        return sample['image'], sample['segmentation'][0].long()

    return augment


def makeKorniaAugment():
    """Return a function that applies kornia to a batch, with the same probabilities."""
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


# Reading


def readByIsal(path):
    """Return the volume of a `.nii.gz` file, decompressed at once by isal, as `patients.readCase` does."""
    return np.asanyarray(nib.Nifti1Image.from_bytes(igzip.decompress(Path(path).read_bytes())).dataobj)


def readByNibabel(path):
    """Return the volume of a NIfTI file, read by nibabel."""
    return np.asanyarray(nib.load(path).dataobj)


def readBySimpleITK(path):
    """Return the volume of a NIfTI file, read by torchio, which uses SimpleITK."""
    return tio.ScalarImage(path).data[0].numpy()


# Preprocessing


def preprocessNaively(df, filename):
    """Write a patch file naively: float64 volumes, a loop over windows, one patch appended at a time.

    Args:
        df: file list. Volumes keep the axes of their files.
        filename: path of the HDF5 file, with `image` float32 and `label` uint8 as in `preprocess.makeDataset`.

    Returns:
        number of patches. Windows lie in the four corners of a slice; those with tumor are kept.
    """
    size, numPatches = config.PATCH_SIZE, 0
    with h5py.File(filename, 'w') as file:
        for name, shape in (('image', (len(config.MODALITIES), size, size)), ('label', (size, size))):
            options = {'dtype': 'f4' if name == 'image' else 'u1', 'chunks': (1, *shape), 'compression': 'lzf'}
            file.create_dataset(name, (0, *shape), maxshape=(None, *shape), **options)
        for _, paths in df.iterrows():
            image = _readStretched(paths)
            label = nib.load(paths['seg']).get_fdata()
            label[label == 4] = 3
            for depth in range(label.shape[2]):
                for row in (0, label.shape[0] - size):
                    for column in (0, label.shape[1] - size):
                        window = slice(row, row + size), slice(column, column + size), depth
                        if label[window].any():
                            numPatches += 1
                            for name, patch in (('image', image[:, *window]), ('label', label[window])):
                                file[name].resize(numPatches, axis=0)
                                file[name][-1] = patch
    return numPatches


def _readStretched(paths):
    """Return the stretched image of a patient, float64 (C, W, H, D)."""
    return np.stack([_stretch(nib.load(paths[name]).get_fdata()) for name in config.MODALITIES])


def _stretch(volume):
    """Return a volume with the percentiles of its brain mapped to `config.STRETCH_RANGE`."""
    brain, (lowest, highest) = volume != 0, config.STRETCH_RANGE
    low, high = np.percentile(volume[brain], config.STRETCH_PERCENTILES)
    stretched = (np.clip(volume, low, high) - low) / (high - low) * (highest - lowest) + lowest
    return np.where(brain, stretched, lowest)


# Prediction


def predictNaively(paths, model):
    """Return the classes (D, W, H) of a patient, all slices in one float32 batch; the axes are those of the files."""
    x = torch.from_numpy(_readStretched(paths)).float().permute(3, 0, 1, 2)  # (C, W, H, D) -> (D, C, W, H)
    multiple = 2**config.ENCODER_DEPTH
    missing = [-length % multiple for length in x.shape[2:]]
    padded = torch.nn.functional.pad(x, (0, missing[1], 0, missing[0]), value=config.STRETCH_RANGE[0])
    with torch.inference_mode():
        probabilities = model.eval()(padded.to(config.DEVICE)).softmax(1).cpu()
    return probabilities[:, :, : x.shape[2], : x.shape[3]].argmax(1)


def predictByMonai(x, model, device):
    """Return the classes (D, W, H) of a volume (D, C, W, H) by MONAI's SlidingWindowInferer, slice by slice."""
    from monai.inferers import SlidingWindowInferer

    size, overlap = config.PATCH_SIZE, 1 - config.PATCH_STRIDE / config.PATCH_SIZE
    inferer = SlidingWindowInferer((size, size), config.PREDICT_BATCH, overlap, 'gaussian', device='cpu')
    with torch.inference_mode():
        parts = x.split(config.PREDICT_BATCH // 4)  # four windows per slice
        return torch.cat(
            [inferer(part.to(device), lambda windows: model(windows).softmax(1)).argmax(1) for part in parts]
        )


# Scores


def computeHd95ByTransform(truth, prediction):
    """Return HD95 in mm of two masks at 1 mm by the distance transform of the whole volume."""
    return max(np.percentile(distances, 95) for distances in _surfaceDistances(truth, prediction))


def _surfaceDistances(truth, prediction):
    """Return the distance in mm of each surface voxel of one mask to the surface of the other, in both directions."""
    surfaces = [mask & ~ndimage.binary_erosion(mask) for mask in (truth, prediction)]
    distances = [ndimage.distance_transform_edt(~surface) for surface in surfaces]
    return distances[1][surfaces[0]], distances[0][surfaces[1]]


def computeHd95ByMonai(truth, prediction):
    """Return HD95 in mm of two masks at 1 mm by MONAI."""
    from monai.metrics import compute_hausdorff_distance

    masks = [torch.from_numpy(mask)[None, None] for mask in (prediction, truth)]
    return float(compute_hausdorff_distance(*masks, include_background=True, percentile=95))


def computeHd95BySurfaceDistance(truth, prediction):
    """Return HD95 in mm of two masks at 1 mm by surface-distance, which weighs surface elements by their area."""
    import surface_distance

    return surface_distance.compute_robust_hausdorff(
        surface_distance.compute_surface_distances(truth, prediction, (1, 1, 1)), 95
    )


def scoreLesionsNaively(y, yhat):
    """Return the table of `metrics.scoreLesions(y, yhat, rule='BraTS2024')` at 1 mm.

    Each lesion is a mask of the whole volume, where it is dilated, compared and measured, as the challenge does.
    """
    regions = RULES['BraTS2024'].regions
    separated = {
        name: [_separate(np.isin(each, region.classes), region.dilation) for each in (y, yhat)]
        for name, region in regions.items()
    }
    for name, (_, prediction) in separated.items():
        for number in np.unique(prediction[prediction > 0]):
            if (prediction == number).sum() <= regions[name].smallestPredicted:
                prediction[prediction == number] = 0
    rows = {}
    for name, region in regions.items():
        merged = [each.copy() for each in separated[name]]
        for other in region.mergedBy:
            merged = [_merge(own, others) for own, others in zip(merged, separated[other], strict=True)]
        rows[name] = _scoreLesionsOf(*merged, region)
    return pd.DataFrame.from_dict(rows, orient='index').rename_axis('region')


def _separate(mask, dilation):
    """Return the number of the lesion at each voxel of a mask, 0 outside."""
    return ndimage.label(ndimage.binary_dilation(mask, _FACES_AND_EDGES, dilation), np.ones((3, 3, 3)))[0] * mask


def _merge(numbers, others):
    """Return numbers in which the lesions that touch the same lesion of another region have one number."""
    merged, first = numbers.copy(), {}
    for number in np.unique(numbers[numbers > 0]):
        lesion = numbers == number
        touched = others[ndimage.binary_dilation(lesion, _FACES_AND_EDGES)]
        if touched.any():
            merged[lesion] = first.setdefault(touched[touched > 0].min(), number)
    return merged


def _scoreLesionsOf(truth, prediction, region):
    """Return the scores of one region, name -> number, from the numbers of the lesions of truth and prediction."""
    from surface_distance import compute_robust_hausdorff, compute_surface_distances

    scores, missed, matched = [], 0, set()
    for number in np.unique(truth[truth > 0]):
        lesion = truth == number
        near = set(prediction[ndimage.binary_dilation(lesion, _FACES_AND_EDGES, region.dilation)]) - {0}
        matched |= near
        if lesion.sum() <= region.smallestTrue:
            continue
        missed += not near
        if near:
            found = np.isin(prediction, list(near))
            dice = 2 * (lesion & found).sum() / (lesion.sum() + found.sum())
            hd95 = compute_robust_hausdorff(compute_surface_distances(lesion, found, (1, 1, 1)), 95)
            distances = _surfaceDistances(lesion, found)
            nsd = [np.mean([(each <= limit).mean() for each in distances]) for limit in (0.5, 1.0)]
            scores.append([dice, hd95, *nsd])
    falsePositive = len(set(np.unique(prediction)) - {0} - matched)
    total = len(scores) + missed + falsePositive
    worst = np.array([0, RULES['BraTS2024'].penalty, 0, 0])
    summed = np.sum(scores, axis=0) + (missed + falsePositive) * worst
    dice, hd95, *nsd = summed / total if total else (1, 0, 1, 1)
    counts = {'missed': missed, 'falsePositive': falsePositive}
    return {'dice': dice, 'hd95': hd95, **counts, 'nsd0.5': nsd[0], 'nsd1.0': nsd[1]}
