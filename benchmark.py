"""Measure this package beside the straightforward way and the well-known packages, in one run of a few minutes."""

import copy
import functools
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import nibabel as nib
import numpy as np
import pandas as pd
import segmentation_models_pytorch as smp
import torch
import torchio as tio
from isal import igzip
from PIL import Image, ImageSequence
from torch.utils.data import DataLoader, RandomSampler, default_collate

import batched
import config
import counts
import distances
import engine
import gifs
import peers
import phantom
import preprocess
import transforms
import utils
from files import writeWhole
from measuring import Seconds, describeMachine, ifInstalled, measure, measurePeak, quietly, timed, waitForDevice

PATIENTS = 8  # phantoms of full size
BATCH = 32  # patches
COHORT = 369  # patients of BraTS 2020, to project to
PATCHES = 45_375 + 10_263  # that they give


def _forEach(augment, image, label):
    """Gives a function that augments a batch sample by sample, as a loader's worker would; None of None."""

    def run():
        done = [augment(*each) for each in zip(image, label, strict=True)]
        return tuple(torch.stack(each) for each in zip(*done, strict=True))

    return augment and run


def stretchingTransform():
    """Gives the training's transforms with the histogram stretched inside the list, as the document has them."""
    pad, spatial, intensity = preprocess.makeTransforms()[0].transforms
    images = transforms.imageKeys()
    stretch = tio.RescaleIntensity(
        config.STRETCH_RANGE, config.STRETCH_PERCENTILES, masking_method=transforms.maskFunction, include=images
    )
    return tio.Compose([pad, spatial, stretch, intensity], include=[*images, 'y'], label_keys=['y'])


def benchAugmentation(image, label):
    """Measures the augmentation of one batch, float16 (B, C, H, W) and uint8 (B, H, W), with and without stretching."""
    image, label = image.float(), label.long()
    there = image.to(config.DEVICE), label.to(config.DEVICE)
    tables = []
    for isStretched, transform in enumerate((preprocess.makeTransforms()[0], stretchingTransform())):
        makers = {'torchio, sample by sample': peers.augmentByTorchio(transform)}
        makers['MONAI, sample by sample'] = ifInstalled(peers.augmentByMonai, isStretched)
        ways = {'Batched': functools.partial(batched.Batched(transform), *there)}
        ways |= {name: _forEach(augment, image, label) for name, augment in makers.items()}
        if not isStretched:  # these do not stretch by percentiles
            for isGamma, name in enumerate(('batchgeneratorsv2', 'batchgeneratorsv2, gamma for the bias field')):
                augment = ifInstalled(peers.augmentByBatchgenerators, isGamma)
                ways[name] = _forEach(augment, image, label)
            kornia = ifInstalled(peers.augmentByKornia)
            ways['kornia, on the batch'] = kornia and functools.partial(kornia, *there)
        name = f'augmentation with{"" if isStretched else "out"} stretching, per patch'
        tables.append(measure(name, ways, len(image)))
    return pd.concat(tables)


class _Augmented(torch.utils.data.Dataset):
    """Patches after a peer's transform, for its loader."""

    def __init__(self, file, augment):
        self.stored, self.augment = utils.BRATSDataset(file), augment

    def __len__(self):
        return len(self.stored)

    def __getitem__(self, index):
        return self.augment(*self.stored[index])


def _firstBatch(dataset):
    return default_collate(dataset.__getitems__(list(range(BATCH))))


def _makeLoader(dataset, noBatches):
    """Gives a loader of so many batches, drawn anew from a dataset as large as may be."""
    sampler = RandomSampler(dataset, replacement=True, num_samples=noBatches * BATCH)
    options = {'num_workers': config.LOADER_WORKERS, 'pin_memory': config.DEVICE == 'cuda'}
    return DataLoader(dataset, BATCH, sampler=sampler, **options)


def _runLoader(dataset, noBatches, augment=None):
    """Loads batches, drawn anew, and augments them on the device; gives seconds a patch, from the first batch on.

    Starting workers is left out: an epoch of BraTS has a thousand batches and more.
    """
    for number, (image, label) in enumerate(_makeLoader(dataset, noBatches)):
        if number == 0:
            start = time.perf_counter()
        else:
            image, label = (each.to(config.DEVICE, non_blocking=True) for each in (image, label))
            if augment is not None:
                augment(image, label)
    waitForDevice()
    return Seconds((time.perf_counter() - start) / (noBatches - 1) / BATCH)


def benchLoading(file, few=13, many=65):
    """Measures loading and augmentation together, and each alone, over batches of a patch file.

    Args:
        file: of patches.
        few, many: batches that the slow and the fast ways load.
    """
    stored = utils.BRATSDataset(file, raw=True)
    image, label = (each.to(config.DEVICE) for each in _firstBatch(stored))
    tables = []
    for isStretched, transform in enumerate((preprocess.makeTransforms()[0], stretchingTransform())):
        augment = batched.Batched(transform)
        ways = {
            'raw patches, then Batched': functools.partial(_runLoader, stored, many, augment),
            'loading alone': functools.partial(_runLoader, stored, many),
            'Batched alone': timed(functools.partial(augment, image, label), BATCH),
            'torchio in the workers': functools.partial(_runLoader, utils.BRATSDataset(file, None, transform), few),
        }
        if not isStretched:
            kornia = ifInstalled(peers.augmentByKornia)
            ways['raw patches, then kornia'] = kornia and functools.partial(_runLoader, stored, few, kornia)
            makers = {'batchgeneratorsv2': ifInstalled(peers.augmentByBatchgenerators, False)}
        else:
            makers = {}
        makers['MONAI'] = ifInstalled(peers.augmentByMonai, isStretched)
        for name, maker in makers.items():
            way = maker and functools.partial(_runLoader, _Augmented(file, maker), few)
            ways[f'{name} in the workers'] = way
        name = f'loader and augmentation with{"" if isStretched else "out"} stretching, per patch'
        tables.append(measure(name, ways, rounds=3))
    return pd.concat(tables)


def benchPreprocessing(df, folder):
    """Measures patients to a finished patch file, and what only reading their files takes."""
    paths = [str(paths[name]) for _, paths in df.iterrows() for name in (*config.MODALITIES, 'seg')]

    def cut():
        Path(folder, 'cut.h5').unlink(missing_ok=True)
        return preprocess.makeDataset(df, str(Path(folder, 'cut.h5')))

    def read(reader):
        with ThreadPoolExecutor(config.PREPROCESS_WORKERS) as pool:
            list(pool.map(reader, paths))

    ways = {
        'makeDataset': cut,
        'only reading: isal': functools.partial(read, _readWithIsal),
        'only reading: nibabel': functools.partial(read, lambda path: np.asanyarray(nib.load(path).dataobj)),
        'only reading: SimpleITK': functools.partial(read, lambda path: tio.ScalarImage(path).load()),
        'straightforward': lambda: peers.preprocessSimply(df, str(Path(folder, 'simple.h5'))),
    }
    return measure('preprocessing, per patient', {name: quietly(way) for name, way in ways.items()}, len(df), rounds=3)


def _readWithIsal(path):
    with igzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8)


def benchPrediction(paths, model, every=10):
    """Measures the prediction of one patient, and prints where the classes differ from those of MONAI's inferer.

    Args:
        paths: row of the file list.
        model: U-Net on `config.DEVICE`.
        every: the slow ways do every so many of the slices, and are projected to all.
    """
    x, _, yhat = engine.predict(paths, model.eval(), patchStride=config.PATCH_STRIDE)
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format).eval()  # as it was made
    some = x[every // 2 :: every]
    share = len(some) / len(x)

    def monai(network, dtype):
        kind = torch.device(config.DEVICE).type
        with torch.autocast(kind, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            return peers.predictByMonai(some, network, config.DEVICE)

    stride = {'patchStride': config.PATCH_STRIDE}
    ways = {
        'predict, the box whole, reading included': lambda: engine.predict(paths, model),
        'predict, windows at the stride, reading included': lambda: engine.predict(paths, model, **stride),
        'only reading and stretching': lambda: engine._prepare(paths, None),
        "MONAI's inferer in our precision and layout": lambda: monai(model, engine.precision(config.DEVICE)),
        "MONAI's inferer in float32": lambda: monai(plain, None),
        'forward passes alone, patch by patch': lambda: peers.predictPatchByPatch(some, plain, config.DEVICE),
    }
    for name in list(ways)[3:]:
        ways[name] = timed(ways[name], share)
    theirs = ifInstalled(monai, model, engine.precision(config.DEVICE))
    if theirs is None:
        ways = {name: None if 'MONAI' in name else way for name, way in ways.items()}
    else:
        isBrain = (some > some.amin()).any(1)
        same = (theirs == yhat[every // 2 :: every])[isBrain].float().mean()
        print(f"Classes equal to those of MONAI's inferer in the same precision: {same:.2%} of the brain's voxels")
    return measure('prediction, per patient', ways, rounds=3)


def benchScores(y, yhat):
    """Measures the scores of one patient, integer (D, W, H) twice."""
    y, yhat = y.numpy(), yhat.numpy()
    tensors = torch.from_numpy(yhat), torch.from_numpy(y)
    options = {'mode': 'multiclass', 'num_classes': config.NO_CLASSES}
    joint = {
        'countClasses': lambda: counts.countClasses(y, yhat),
        'smp get_stats': lambda: smp.metrics.functional.get_stats(*tensors, **options),
    }
    masks = y > 0, yhat > 0
    box = counts.boxOf(masks[0] | masks[1])
    cropped = [mask[box] for mask in masks]
    monai = ifInstalled(peers.measureByMonai, *masks)
    deepmind = ifInstalled(peers.measureBySurfaceDistance, *masks)
    ways = {
        'hausdorff95': lambda: distances.hausdorff95(*masks),
        'distance transform of the volume': lambda: peers.measureByTransform(*masks),
        'MONAI': monai and (lambda: peers.measureByMonai(*masks)),
        'MONAI, cropped beforehand': monai and (lambda: peers.measureByMonai(*cropped)),
        "hausdorff95, surface-distance's rule": lambda: distances.hausdorff95(*masks, rule='surface-distance'),
        'surface-distance': deepmind and (lambda: peers.measureBySurfaceDistance(*masks)),
    }
    print(f'HD95 of the whole tumor: {ways["hausdorff95"]():.6f} mm, by MONAI {monai} mm')
    return pd.concat([measure('pooled counts, per patient', joint), measure('HD95, per patient', ways)])


def benchGif(x, y, yhat, folder):
    """Measures the animated GIF of one patient, drawing included, against only writing the same frames in color."""
    [file] = gifs.makeGifs(x, y, yhat, folder)
    with Image.open(file) as movie:
        frames = np.stack([np.asarray(frame.convert('RGB')) for frame in ImageSequence.Iterator(movie)])
    ways = {
        'makeGifs': lambda: gifs.makeGifs(x, y, yhat, folder),
        'frames in color': lambda: peers.writeFramesInColor(frames, Path(folder, 'color.gif')),
    }
    return measure('animated GIF, per patient', ways, rounds=3)


class _Rest:
    """What is left of a loader's epoch, as a loader."""

    def __init__(self, batches, length):
        self.batches, self.length = batches, length

    def __len__(self):
        return self.length

    def __iter__(self):
        return self.batches


def benchTraining(file, model, noBatches=4):
    """Measures a training step: with its data path against a batch held on the device, and in other precisions.

    Args:
        file: of patches.
        model: U-Net on `config.DEVICE`; what it learns here is good enough to predict something.
        noBatches: steps of a round; on a GPU fifty times as many.
    """
    isCuda = config.DEVICE == 'cuda'
    noBatches *= 50 if isCuda else 1
    criterion = smp.losses.FocalLoss(mode='multiclass', gamma=config.LOSS_GAMMA)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.LEARN_RATE)
    trainTransform = preprocess.makeTransforms()[0]
    raw, slow = utils.BRATSDataset(file, raw=True), utils.BRATSDataset(file, None, trainTransform)
    held = [each.to(config.DEVICE) for each in _firstBatch(raw)]

    usual = engine.precision(config.DEVICE)

    def learn(loader=None, transform=None, dtype=usual, network=model):
        scaler = torch.amp.GradScaler(config.DEVICE, enabled=dtype is torch.float16)
        loader = [held] * (noBatches + 1) if loader is None else loader()
        batches = iter(loader)
        first, rest = next(batches), _Rest(batches, len(loader) - 1)

        def teach(some):
            engine.train(network, criterion, optimizer, scaler, some, transform)

        with mock.patch.object(engine, 'precision', lambda device: dtype):
            teach([first])  # starting workers is left out, and that memory shared with them is copied when written to
            return timed(lambda: teach(rest), BATCH * len(rest))()

    fast = functools.partial(_makeLoader, raw, noBatches + 1)
    ways = {
        'one batch held on the device': learn,
        'raw patches and Batched': lambda: learn(fast, batched.Batched(trainTransform)),
        'torchio in the workers': lambda: learn(functools.partial(_makeLoader, slow, noBatches // 4 + 1)),
        'held, float32': lambda: learn(dtype=None),
        'held, bfloat16': lambda: learn(dtype=torch.bfloat16),
    }
    if isCuda:
        ways['held, float16'] = lambda: learn(dtype=torch.float16)
        ways['held, compiled'] = functools.partial(learn, network=torch.compile(model))
    table = measure('training step, per patch', ways, rounds=3)
    if isCuda:
        print(f'Memory of the GPU that was used at most: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB')
    print(f'The network can learn {1e3 / table.ms[0]:.0f} patches a second here.')
    return table


def benchMemory(df, folder):
    """Prints by how much a fresh process grows at most while it cuts patients, and while it predicts one."""
    settings = {name: value for name, value in vars(config).items() if name.isupper() and not name.startswith('_')}
    settings['DEVICE'] = config.DEVICE
    jobs = {
        'makeDataset': (preprocess.makeDataset, df, str(Path(folder, 'memory.h5'))),
        'straightforward preprocessing': (peers.preprocessSimply, df, str(Path(folder, 'memory.h5'))),
        'predict': (_predictAnew, df.iloc[0]),
    }
    for name, job in jobs.items():
        with get_context('spawn').Pool(1) as pool:
            print(f'Memory of {name}: {pool.apply(measurePeak, (settings, *job)):.2f} GB')


def _predictAnew(paths):
    engine.predict(paths, engine.makeNetwork())


def main(noPatients=PATIENTS, shape=phantom.BOX):
    """Prints the tables, and writes them to `benchmark.csv` in `config.OUTPUT_FOLDER`.

    Args:
        noPatients: phantoms to make, in a temporary folder.
        shape: of each.

    Returns:
        DataFrame as `measure` gives it, of all stages.
    """
    print(describeMachine())
    config.ENCODER_WEIGHTS = None  # their download is not to be measured
    tables = []

    def show(table):
        tables.append(table)
        print(table.to_string(index=False, float_format='{:.3g}'.format, na_rep='not installed'), '\n', flush=True)

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Default grid_sample')  # kornia's and MONAI's, about themselves
        warnings.filterwarnings('ignore', 'monai')
        phantom.makeCases(folder, noPatients, shape=shape)
        df = utils.makeFileList(folder)
        file = str(Path(folder, 'patches.h5'))
        noPatches = preprocess.makeDataset(df, file)
        show(benchAugmentation(*_firstBatch(utils.BRATSDataset(file, raw=True))))
        show(benchLoading(file))
        show(benchPreprocessing(df, folder))
        model = engine.makeNetwork()
        show(benchTraining(file, model))
        show(benchPrediction(df.iloc[0], model))
        x, y, _ = engine.predict(df.iloc[0], model)
        yhat = y.roll((1, 4, -6), (0, 1, 2))  # a prediction that is somewhat off
        show(benchScores(y, yhat))
        show(benchGif(x, y, yhat, folder))
        benchMemory(df, folder)
        megabytes = Path(file).stat().st_size / 1e6 / noPatches
    table = pd.concat(tables, ignore_index=True)
    _project(table.set_index(['stage', 'way']).ms, megabytes)
    with writeWhole(Path(config.OUTPUT_FOLDER) / 'benchmark.csv') as part:
        table.to_csv(part, index=False)
    return table


def _project(ms, megabytes):
    """Prints what the medians, in ms by stage and way, and the size of a patch mean for all of BraTS 2020."""
    cutting, step = ms['preprocessing, per patient', 'makeDataset'], ms['training step, per patch']
    asking = ms['prediction, per patient'].iloc[0]
    print(f"Projected to {COHORT} patients and {PATCHES} patches, at these phantoms' pace:")
    print(f'  patches: {COHORT * cutting / 6e4:.1f} minutes, {PATCHES * megabytes / 1e3:.1f} GB')
    print(f'  an epoch of learning: {PATCHES * step["raw patches and Batched"] / 6e4:.1f} minutes')
    print(f'  predicting all: {COHORT * asking / 6e4:.1f} minutes')


if __name__ == '__main__':
    main()
