"""Measure every stage of this package, compared with naive baselines and well-known packages."""

import contextlib
import copy
import io
import math
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import segmentation_models_pytorch as smp
import torch
from scipy import ndimage
from torch.utils.data import DataLoader, RandomSampler, default_collate

import batched
import config
import engine
import metrics
import patients
import phantom
import preprocess
import transforms
import utils
from atomic import writeAtomically
from benchmarks import baselines, timing

PATIENTS = 8  # phantoms of full size
BATCH = 32  # patches


def main(numPatients=PATIENTS, shape=phantom.BOX):
    """Print the tables of all stages, and write `benchmark.csv` and `memory.csv` to `config.OUTPUT_FOLDER`.

    Args:
        numPatients: number of phantoms, made in a temporary folder.
        shape: voxels of each phantom.

    Returns:
        table: of all stages, as `timing.measure` returns it.
        memory: as `benchMemory` returns it.
    """
    print(timing.describeMachine(engine.precision(config.DEVICE)))
    vars(config).update(config.DOCUMENT)  # the baselines cut and predict axial slices
    config.ENCODER_WEIGHTS = None  # their download is not measured
    tables = []

    def show(table):
        tables.append(table)
        print(table.to_string(index=False, float_format='{:.3g}'.format), '\n', flush=True)

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Default grid_sample')  # raised inside kornia and MONAI
        warnings.filterwarnings('ignore', 'monai')
        phantom.makeCases(folder, numPatients, shape=shape)
        df = utils.makeFileList(folder)
        file = str(Path(folder, 'patches.h5'))
        preprocess.makeDataset(df, file)
        show(benchAugmentation(*firstBatch(utils.BRATSDataset(file, raw=True))))
        show(benchLoading(file))
        show(benchPreprocessing(df, folder))
        show(benchReading(file))
        model = engine.makeModel()
        show(benchTraining(file, model))
        show(benchPrediction(df.iloc[0], model))
        _, y, _ = engine.predict(df.iloc[0], model)
        yhat = y.roll((1, 4, -6), (0, 1, 2))  # stands for a prediction that is somewhat wrong
        show(benchScores(y, yhat))
        memory = benchMemory(df, folder)
    table = pd.concat(tables, ignore_index=True)
    for name, values in (('benchmark.csv', table), ('memory.csv', memory)):
        print(f'\n{formatTable(values)}')
        with writeAtomically(Path(config.OUTPUT_FOLDER) / name) as temporary:
            values.to_csv(temporary, index=False)
    return table, memory


def benchAugmentation(image, label):
    """Measure the augmentation of one batch, float16 (B, C, H, W) and uint8 (B, H, W)."""
    image, label = image.float(), label.long()
    onDevice = image.to(config.DEVICE), label.to(config.DEVICE)
    transform = transforms.makeTransforms()[0]
    augments = {
        'torchio, sample by sample': baselines.makeTorchioAugment(transform),
        'MONAI, sample by sample': baselines.makeMonaiAugment(),
        'batchgeneratorsv2': baselines.makeBatchgeneratorsAugment(isGamma=False),
        'batchgeneratorsv2, gamma as bias field': baselines.makeBatchgeneratorsAugment(isGamma=True),
    }
    methods = {
        'Batched': partial(batched.Batched(transform), *onDevice),
        **{name: partial(_augmentSamples, augment, image, label) for name, augment in augments.items()},
        'kornia, on the batch': partial(baselines.makeKorniaAugment(), *onDevice),
    }
    return timing.measure('augmentation, per patch', methods, len(image))


def _augmentSamples(augment, image, label):
    """Return a batch that is augmented sample by sample, as the worker of a loader does."""
    samples = [augment(*sample) for sample in zip(image, label, strict=True)]
    return tuple(torch.stack(values) for values in zip(*samples, strict=True))


def benchLoading(file, numSlow=13, numFast=65):
    """Measure loading and augmentation together, and each alone, over batches of a patch file.

    Args:
        file: path of the patch file.
        numSlow, numFast: number of batches that the slow and the fast methods load.
    """
    stored = utils.BRATSDataset(file, raw=True)
    image, label = (values.to(config.DEVICE) for values in firstBatch(stored))
    transform = transforms.makeTransforms()[0]
    augment = batched.Batched(transform)
    monai, batchgenerators = baselines.makeMonaiAugment(), baselines.makeBatchgeneratorsAugment(isGamma=False)
    loadings = {  # dataset, number of batches, augmentation on the device
        'raw patches, then Batched': (stored, numFast, augment),
        'loading alone': (stored, numFast, None),
        'torchio in the workers': (utils.BRATSDataset(file, None, transform), numSlow, None),
        'raw patches, then kornia': (stored, numSlow, baselines.makeKorniaAugment()),
        'MONAI in the workers': (baselines.AugmentedDataset(file, monai), numSlow, None),
        'batchgeneratorsv2 in the workers': (baselines.AugmentedDataset(file, batchgenerators), numSlow, None),
    }
    methods = {
        name: partial(timing.timeLoader, makeLoader(dataset, numBatches), onDevice)
        for name, (dataset, numBatches, onDevice) in loadings.items()
    }
    methods['Batched alone'] = timing.makeTimed(partial(augment, image, label), BATCH)
    return timing.measure('loader and augmentation, per patch', methods, rounds=3)


def firstBatch(dataset):
    """Return the first patches of a dataset as a batch."""
    return default_collate(dataset.__getitems__(list(range(BATCH))))


def makeLoader(dataset, numBatches):
    """Return a loader of a number of batches, drawn with replacement so that a small dataset suffices."""
    sampler = RandomSampler(dataset, replacement=True, num_samples=numBatches * BATCH)
    options = {'num_workers': config.LOADER_WORKERS, 'pin_memory': config.DEVICE == 'cuda'}
    return DataLoader(dataset, BATCH, sampler=sampler, **options)


def benchPreprocessing(df, folder):
    """Measure patients to a finished patch file, and reading their files alone."""
    files = [str(paths[name]) for _, paths in df.iterrows() for name in (*config.MODALITIES, 'seg')]

    def cut():
        Path(folder, 'cut.h5').unlink(missing_ok=True)
        preprocess.makeDataset(df, str(Path(folder, 'cut.h5')))

    def read(reader):
        with ThreadPoolExecutor(config.PREPROCESS_WORKERS) as pool:
            for _ in pool.map(reader, files):
                pass

    methods = {
        'makeDataset': cut,
        'reading only: isal': partial(read, baselines.readByIsal),
        'reading only: nibabel': partial(read, baselines.readByNibabel),
        'reading only: SimpleITK': partial(read, baselines.readBySimpleITK),
        'naive baseline': lambda: baselines.preprocessNaively(df, str(Path(folder, 'naive.h5'))),
    }
    with contextlib.redirect_stdout(io.StringIO()):
        return timing.measure('preprocessing, per patient', methods, len(df), rounds=3)


def benchReading(file, numBatches=32):
    """Measure reading shuffled batches of patches, collated as in a loader, from memory and from the file."""
    datasets = {}
    for name, fraction in (('from memory', math.inf), ('from the file', 0)):
        with mock.patch.object(config, 'CACHE_PATCHES', fraction):
            datasets[name] = utils.BRATSDataset(file, raw=True)
    generator = torch.Generator().manual_seed(config.SEED)
    order = torch.randperm(len(datasets['from memory']), generator=generator)[: numBatches * BATCH]

    def read(dataset):
        for indices in order.split(BATCH):
            default_collate(dataset.__getitems__(indices.tolist()))

    methods = {name: partial(read, dataset) for name, dataset in datasets.items()}
    return timing.measure('reading shuffled patches, per patch', methods, len(order))


def benchTraining(file, model, numBatches=4):
    """Measure a training step with a batch held on the device, with each data path, and in the device's precisions.

    Args:
        file: path of the patch file.
        model: U-Net on `config.DEVICE`; it is trained.
        numBatches: steps of a round; on a GPU fifty times as many.
    """
    isCuda = config.DEVICE == 'cuda'
    numBatches *= 50 if isCuda else 1
    criterion = smp.losses.FocalLoss(mode='multiclass', gamma=config.LOSS_GAMMA)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.LEARN_RATE)
    trainTransform = transforms.makeTransforms()[0]
    raw, slow = utils.BRATSDataset(file, raw=True), utils.BRATSDataset(file, None, trainTransform)
    held = [values.to(config.DEVICE) for values in firstBatch(raw)]
    usual = engine.precision(config.DEVICE)

    def train(makeLoader=None, transform=None, dtype=usual):
        scaler = torch.amp.GradScaler(config.DEVICE, enabled=dtype is torch.float16)
        loader = [held] * (numBatches + 1) if makeLoader is None else makeLoader()
        batches = iter(loader)
        first, rest = next(batches), timing.RestOfEpoch(batches, len(loader) - 1)

        def trainOn(part):
            engine.train(model, criterion, optimizer, scaler, part, transform)

        with mock.patch.object(engine, 'precision', lambda device: dtype):
            trainOn([first])  # not timed: starts the workers and copies the memory that they share
            return timing.makeTimed(lambda: trainOn(rest), BATCH * len(rest))()

    fast = partial(makeLoader, raw, numBatches + 1)
    methods = {
        'one batch held on the device': train,
        'raw patches, then Batched': lambda: train(fast, batched.Batched(trainTransform)),
        'torchio in the workers': lambda: train(partial(makeLoader, slow, numBatches // 4 + 1)),
    }
    if usual is not None:  # a processor that emulates bfloat16 takes minutes for a step
        methods['held, float32'] = lambda: train(dtype=None)
        methods['held, bfloat16'] = lambda: train(dtype=torch.bfloat16)
    if isCuda:
        methods['held, float16'] = lambda: train(dtype=torch.float16)
    return timing.measure('training step, per patch', methods, rounds=3)


def benchPrediction(paths, model, every=10):
    """Measure the prediction of one patient, and print how many classes agree with MONAI's inferer.

    Args:
        paths: row of the file list.
        model: U-Net on `config.DEVICE`.
        every: the slow methods predict every n-th slice; their time is projected to all slices.
    """
    x, _, yhat = engine.predict(paths, model.eval(), patchStride=config.PATCH_STRIDE)
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format).eval()  # torch's default layout
    some = x[every // 2 :: every]
    fraction = len(some) / len(x)

    def monai(model, dtype):
        kind = torch.device(config.DEVICE).type
        with torch.autocast(kind, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            return baselines.predictByMonai(some, model, config.DEVICE)

    stride = {'patchStride': config.PATCH_STRIDE}
    slow = {
        "MONAI's inferer in our precision and layout": lambda: monai(model, engine.precision(config.DEVICE)),
        "MONAI's inferer in float32": lambda: monai(plain, None),
    }
    methods = {
        'predict, bounding box, with reading': lambda: engine.predict(paths, model),
        'predict, windows at the stride, with reading': lambda: engine.predict(paths, model, **stride),
        'reading and stretching only': lambda: transforms.transformCase(
            *patients.readCase(paths), transforms.volumeTransform()
        ),
        **{name: timing.makeTimed(method, fraction) for name, method in slow.items()},
    }
    classes, isBrain = monai(model, engine.precision(config.DEVICE)), (some > some.amin()).any(1)
    same = (classes == yhat[every // 2 :: every])[isBrain].float().mean()
    print(f"Classes equal to those of MONAI's inferer in the same precision: {same:.2%} of the brain's voxels")
    return timing.measure('prediction, per patient', methods, rounds=3)


def benchScores(y, yhat):
    """Measure counts, HD95 and lesion-wise scores of truth and prediction, integer tensors (D, W, H)."""
    y, yhat = y.numpy(), yhat.numpy()
    tensors = torch.from_numpy(yhat), torch.from_numpy(y)
    options = {'mode': 'multiclass', 'num_classes': config.NO_CLASSES}
    counting = {
        'countClasses': lambda: metrics.countClasses(y, yhat),
        'smp get_stats': lambda: smp.metrics.functional.get_stats(*tensors, **options),
    }
    masks = y > 0, yhat > 0
    (box,) = ndimage.find_objects((masks[0] | masks[1]).astype(np.uint8))
    cropped = [mask[box] for mask in masks]
    measuring = {
        'hausdorff95': lambda: metrics.hausdorff95(*masks),
        'distance transform of the volume': lambda: baselines.computeHd95ByTransform(*masks),
        'MONAI': lambda: baselines.computeHd95ByMonai(*masks),
        'MONAI, cropped beforehand': lambda: baselines.computeHd95ByMonai(*cropped),
        "hausdorff95, surface-distance's rule": lambda: metrics.hausdorff95(*masks, rule='surface-distance'),
        'surface-distance': lambda: baselines.computeHd95BySurfaceDistance(*masks),
    }
    scoring = {
        "scoreLesions, 2024's rule": lambda: metrics.scoreLesions(y, yhat, rule='BraTS2024'),
        'whole volumes, lesion by lesion': lambda: baselines.scoreLesionsNaively(y, yhat),
    }
    tables = [
        timing.measure('counts of voxels, per patient', counting),
        timing.measure('HD95, per patient', measuring),
        timing.measure('lesion-wise scores, per patient', scoring, rounds=1),
    ]
    return pd.concat(tables)


def benchMemory(df, folder):
    """Measure by how much a fresh process grows at most while it cuts patients, and while it predicts one.

    Args:
        df: file list.
        folder: for the patch files.

    Returns:
        DataFrame with the columns `stage`, `method`, `GB` (with the model) and `ratio` (to the first method of the
        stage).
    """
    settings = {name: value for name, value in vars(config).items() if name.isupper() and not name.startswith('_')}
    settings['DEVICE'] = config.DEVICE
    cut, naive = (str(Path(folder, f'memory{number}.h5')) for number in range(2))
    jobs = {
        ('memory of preprocessing', 'makeDataset'): (preprocess.makeDataset, df, cut),
        ('memory of preprocessing', 'naive baseline'): (baselines.preprocessNaively, df, naive),
        ('memory of prediction', 'predict'): (_predictAnew, engine.predict, df.iloc[0]),
        ('memory of prediction', 'naive baseline'): (_predictAnew, baselines.predictNaively, df.iloc[0]),
    }
    with ProcessPoolExecutor(1, mp_context=get_context('spawn'), max_tasks_per_child=1) as pool:
        peaks = [(*names, pool.submit(timing.measurePeak, settings, *job).result()) for names, job in jobs.items()]
    table = pd.DataFrame(peaks, columns=['stage', 'method', 'GB'])
    return table.assign(ratio=table.GB / table.groupby('stage').GB.transform('first'))


def _predictAnew(predict, paths):
    predict(paths, engine.makeModel())


def formatTable(table):
    """Return the markdown table of `README.md`: one row per stage, its first method compared with the others.

    Args:
        table: DataFrame with the columns `stage`, `method`, `ms` or `GB`, and `ratio`.

    Returns:
        str, without a trailing newline.
    """
    unit = 'GB' if 'GB' in table else 'ms'
    lines = [f'| stage | method, {unit} | compared with, {unit} (ratio) |', '|---|---|---|']
    for stage, rows in table.groupby('stage', sort=False):
        cells = [
            f'{method} {_round(value)} ({_round(ratio)}x)'
            for method, value, ratio in zip(rows['method'], rows[unit], rows['ratio'], strict=True)
        ]
        first = cells[0].rsplit(' (', 1)[0]
        lines.append(f'| {stage} | {first} | {"; ".join(cells[1:])} |')
    return '\n'.join(lines)


def _round(value):
    """Return a number with about two digits, never as a power of ten."""
    digits = max(0, 1 - math.floor(math.log10(value)))
    return f'{value:.{digits}f}'


if __name__ == '__main__':
    main()
