import contextlib

import h5py
import numpy as np
import pytest
import torch

import benchmark
import config
import distances
import engine
import measuring
import peers
import phantom
import preprocess
import utils


@pytest.fixture
def smallCases(tmp_path):
    """The file list of two small phantoms."""
    phantom.makeCases(tmp_path / 'data', 2, shape=(48, 40, 16))
    return utils.makeFileList(tmp_path / 'data')


def test_measure_dividesByTheFirst():
    """3 s and 2 s beside 1 s and 4 s are medians of 2.5 s, ratios of 3 and 1/2, in the median 1.75."""
    ours, theirs = iter([0, 1, 4]), iter([0, 3, 2])
    ways = {
        'ours': lambda: measuring.Seconds(next(ours)),
        'theirs': lambda: measuring.Seconds(next(theirs)),
        'absent': None,
    }
    table = measuring.measure('work', ways, noUnits=10, rounds=2)
    assert table.way.tolist() == ['ours', 'theirs', 'absent']
    np.testing.assert_allclose(table.ms, [250, 250, np.nan])
    np.testing.assert_allclose(table.ratio, [1, 1.75, np.nan])


def test_measurePeak_seesWhatWasHeld():
    """A function that fills 300 MB and lets them go is seen at 0.3 GB."""
    peak = measuring.measurePeak({}, lambda: [np.ones(37_500_000).sum() for _ in range(3)])
    assert 0.25 < peak < 0.4


@pytest.mark.parametrize('isStretched', [False, True])
def test_augmentBy_keepsShapesAndClasses(isStretched):
    """Every peer gives finite float32 images and int64 labels of the shape it got, and no new class."""
    image, label = torch.rand(4, 3, 32, 32), torch.randint(0, 4, (4, 32, 32))
    transform = benchmark.stretchingTransform() if isStretched else preprocess.makeTransforms()[0]
    augment = [peers.augmentByTorchio(transform), peers.augmentByMonai(isStretched)]
    with contextlib.suppress(ImportError):  # these two are for whoever installs them
        augment += [peers.augmentByBatchgenerators(isGamma) for isGamma in (False, True)]
    for one in augment:
        for _ in range(10):
            for x, y in map(one, image, label):
                assert (x.dtype, x.shape, y.shape) == (torch.float32, (3, 32, 32), (32, 32))
                assert x.isfinite().all() and set(y.unique().tolist()) <= {0, 1, 2, 3}
    with contextlib.suppress(ImportError):
        x, y = peers.augmentByKornia()(image, label)
        assert (x.shape, y.dtype, y.shape) == (image.shape, torch.int64, label.shape)


def test_preprocessSimply_doesTheSameWork(smallCases, tmp_path):
    """The straightforward way writes the patches that makeDataset writes, to float16's rounding."""
    config.PATCH_STRIDE = 16  # 48 and 40 pixels: starts 0, 16 and 0, 8, as the simple way has them
    smallCases = smallCases[:1]
    simple, ours = str(tmp_path / 'simple.h5'), str(tmp_path / 'ours.h5')
    noPatches = peers.preprocessSimply(smallCases, simple)
    assert noPatches == preprocess.makeDataset(smallCases, ours) > 10
    with h5py.File(simple) as theirs, h5py.File(ours) as file:
        # the files' axes point left and back, ours right and front: each patch turned over, in another order
        turned = {name: values[:][..., ::-1, ::-1] for name, values in theirs.items()}
        kept = {name: file[name][:] for name in turned}
    for patches in (turned, kept):
        order = np.argsort([patch.tobytes() for patch in patches['label']])
        patches |= {name: values[order] for name, values in patches.items()}
    np.testing.assert_array_equal(turned['label'], kept['label'])
    np.testing.assert_allclose(turned['image'], kept['image'], atol=1e-3)


def test_predictByMonai_givesTheClassesOfPredict(smallCases, monkeypatch):
    """The peer that is timed predicts what we predict, but for background, where we do not look."""
    monkeypatch.setattr(engine, 'precision', lambda device: None)  # bfloat16 is too coarse to compare
    config.PATCH_STRIDE, config.PREDICT_BATCH, config.DECODER_CHANNELS = 16, 16, (16, 8, 8, 4, 4)
    config.ENCODER_NAME = 'resnet18'
    torch.manual_seed(0)
    model = engine.makeNetwork().eval()
    x, _, yhat = engine.predict(smallCases.iloc[0], model, patchStride=config.PATCH_STRIDE)
    theirs, isBrain = peers.predictByMonai(x, model, 'cpu'), (x > -1).any(1)
    assert (theirs == yhat)[isBrain].float().mean() > 0.999


def test_measureByTransform_givesHd95():
    """The slow way that is timed gives what we give."""
    truth, prediction = np.zeros((2, 12, 14, 16), bool)
    truth[2:8, 3:9, 4:10], prediction[3:10, 3:8, 5:12] = True, True
    assert peers.measureByTransform(truth, prediction) == pytest.approx(distances.hausdorff95(truth, prediction))


def test_main_measuresEveryStage(tmp_path, monkeypatch, capsys):
    """One run gives a time of every way of every stage, and leaves the table behind."""
    noThreads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors lose by more
    config.ENCODER_NAME, config.DECODER_CHANNELS, config.LOADER_WORKERS = 'resnet18', (16, 8, 8, 4, 4), 0
    monkeypatch.setattr(benchmark, 'BATCH', 2)
    monkeypatch.setattr(benchmark, 'benchMemory', lambda df, folder: None)  # starts processes
    try:
        table = benchmark.main(2, (48, 40, 16))
    finally:
        torch.set_num_threads(noThreads)
    stages = ['augmentation', 'loader', 'preprocessing', 'training', 'prediction', 'pooled', 'HD95', 'animated']
    assert [stage for stage in stages if not table.stage.str.startswith(stage).any()] == []
    measured = table[~table.way.str.contains('batchgenerators|kornia')]
    assert (measured.ms > 0).all() and (measured.ratio > 0).all()
    assert len((tmp_path / 'output' / 'benchmark.csv').read_text().splitlines()) == len(table) + 1
    assert 'Projected to 369 patients' in capsys.readouterr().out
