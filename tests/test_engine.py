import multiprocessing
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import segmentation_models_pytorch as smp
import torch
import torchio as tio
from monai.inferers import SlidingWindowInferer

import batched
import config
import engine
import preprocess
import utils


def batches(noBatches=5, size=6, seed=0):
    """Learnable batches: the class is told by the first channel's sign and the second's."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(noBatches):
        image = torch.randn(size, 3, 32, 32, generator=generator)
        result.append((image, (image[:, 0] > 0).long() + 2 * (image[:, 1] > 0).long()))
    return result


def makeRun(rate=1e-2):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 1), torch.nn.ReLU(), torch.nn.Conv2d(16, 4, 1))
    return model, smp.losses.FocalLoss(mode='multiclass'), torch.optim.Adam(model.parameters(), lr=rate)


SCALER = torch.amp.GradScaler('cuda', enabled=False)


def test_train_learnsInTwentySteps():
    """The loss falls to less than half within twenty steps."""
    model, criterion, optimizer = makeRun(0.05)
    first = engine.validate(model, criterion, batches(4)) / 24
    engine.train(model, criterion, optimizer, SCALER, batches(20))
    assert engine.validate(model, criterion, batches(4)) / 24 < first / 2


def test_validate_sumsOverSamples(monkeypatch):
    """The result is the mean loss of each batch times its size, summed; nothing is learned, the mode is evaluation."""
    monkeypatch.setattr(engine, 'precision', lambda device: None)
    model, criterion, _ = makeRun()
    data = [*batches(2, 6), *batches(1, 3, seed=1)]
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    expected = sum(criterion(model(image), label).item() * len(image) for image, label in data)
    assert engine.validate(model, criterion, data) == pytest.approx(expected, rel=1e-6)
    assert not model.training and all(torch.equal(before[name], one) for name, one in model.state_dict().items())


def test_train_isDeterministic():
    """The same seed gives the same weights, bit for bit."""
    results = []
    for _ in range(2):
        model, criterion, optimizer = makeRun()
        engine.train(model, criterion, optimizer, SCALER, batches())
        results.append(model[0].weight.detach())
    assert torch.equal(*results)


def test_train_appliesTheTransformToEveryBatch():
    """A transform that is given changes what the model sees: with labels all 0 the model learns class 0."""
    model, criterion, optimizer = makeRun(0.05)
    engine.train(model, criterion, optimizer, SCALER, batches(20), transform=lambda x, y: (x, torch.zeros_like(y)))
    assert (model(batches(1)[0][0]).argmax(1) == 0).float().mean() > 0.95


def test_train_clipsTheGradient():
    """After a step of plain descent at rate 1 the weights have moved by the norm config.GRADIENT_CLIP."""
    config.GRADIENT_CLIP = 1e-3
    model, criterion, _ = makeRun()
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    engine.train(model, criterion, torch.optim.SGD(model.parameters(), lr=1.0), SCALER, batches(1))
    moved = torch.nn.utils.parameters_to_vector(model.parameters()).detach() - before
    assert float(moved.norm()) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize('bad', [3, 22, 25])
def test_train_namesTheBatchOfALossThatIsNotFinite(bad):
    """The first batch whose loss is not finite is named, with epoch, learning rate and what is kept."""
    model, criterion, optimizer = makeRun()
    data = batches(25)
    data[bad - 1][0][0, 0, 0, 0] = float('nan')
    words = rf'batch {bad} of 25 is nan \(learning rate 1\.00e-02\)'
    with pytest.raises(FloatingPointError, match=rf'epoch 1 .* {words}\. There is no checkpoint yet'):
        engine.train(model, criterion, optimizer, SCALER, data)
    model, criterion, optimizer = makeRun()
    for epoch in range(2):
        utils.makeCheckpoint(epoch, model, optimizer, None, SCALER, 1, 1, 2)
    before = Path(config.LAST_CHECKPOINT).read_bytes()
    with pytest.raises(FloatingPointError, match=rf'epoch 3 .* {words}\. The checkpoint of epoch 2 stands'):
        engine.train(model, criterion, optimizer, SCALER, data)
    assert Path(config.LAST_CHECKPOINT).read_bytes() == before


def test_train_leavesNoWorkerBehindAnInterrupt():
    """Whoever interrupts an epoch, and keeps the traceback as notebooks do, has no loader's process left."""
    model, criterion, optimizer = makeRun()
    noCalls = 0

    def interrupted(logits, label):
        nonlocal noCalls
        noCalls += 1
        if noCalls == 2:
            assert len(multiprocessing.active_children()) == 2
            raise KeyboardInterrupt
        return criterion(logits, label)

    loader = torch.utils.data.DataLoader([(x[0], y[0]) for x, y in batches(16)], 2, num_workers=2)
    with pytest.raises(KeyboardInterrupt) as caught:
        engine.train(model, interrupted, optimizer, SCALER, loader)
    assert caught.tb is not None and not multiprocessing.active_children()


class Truth(torch.nn.Module):
    """An identity network: its fourth input channel holds the class, its output says it."""

    def forward(self, image):
        return 20.0 * torch.nn.functional.one_hot(image[:, 3].round().long().clamp(0, 3), 4).movedim(-1, 1)


def withTruth(subject):
    return {**subject, 'x4': subject['y'].float()}


def makePatient(writeCase, shape=(70, 45, 5)):
    generator = np.random.default_rng(0)
    image = np.zeros((4, *shape), np.int16)
    image[:, 5:60, 3:-1, 1:-1] = generator.integers(1, 900, (4, *(np.array((55, shape[1] - 4, shape[2] - 2)))))
    label = np.zeros(shape, np.uint8)
    label[5:60, 3:-1, 1:-1] = generator.choice([0, 1, 2, 4], (55, shape[1] - 4, shape[2] - 2))
    return writeCase({'t1': image[0], 't1ce': image[1], 't2': image[2], 'flair': image[3], 'seg': label}), label


@pytest.mark.parametrize('shape', [(70, 45, 5), (64, 64, 4), (60, 20, 3)])
@pytest.mark.parametrize('options', [{}, {'patchStride': 24}, {'patchStride': 7}, {'patchStride': 24, 'mirror': True}])
def test_predict_givesTheInputBackThroughAnIdentity(writeCase, shape, options):
    """A network that says what it sees gives the truth back at every voxel, in both modes, for any volume's size."""
    paths, label = makePatient(writeCase, shape)
    config.MODALITIES = ('t1', 't1ce', 't2', 'flair')
    config.PREDICT_BATCH = 3
    x, y, yhat = engine.predict(paths, Truth(), transform=withTruth, **options)
    assert x.shape == (shape[2], 4, *shape[:2]) and x.dtype == torch.float32
    assert y.shape == yhat.shape == (shape[2], *shape[:2]) and y.dtype == yhat.dtype == torch.int64
    np.testing.assert_array_equal(yhat, np.where(label == 4, 3, label).transpose(2, 0, 1))
    assert torch.equal(y, yhat)


def makeNetwork():
    torch.manual_seed(0)
    return smp.Unet('resnet18', encoder_weights=None, in_channels=3, classes=4, decoder_channels=(32, 16, 16, 8, 8))


def test_predict_equalsMonaisSlidingWindow(writeCase, monkeypatch):
    """At MONAI's window places the Gaussian mean of the probabilities is MONAI's, to 1e-5."""
    monkeypatch.setattr(engine, 'precision', lambda device: None)
    paths, _ = makePatient(writeCase, (64, 48, 4))  # 32 and 16 pixels from window to window: MONAI's places and ours
    network = makeNetwork().eval()
    x, _, yhat, ours = engine.predict(paths, network, patchStride=16, probabilities=True)
    infer = SlidingWindowInferer((32, 32), 4, overlap=0.5, mode='gaussian', sigma_scale=0.125)
    with torch.inference_mode():
        theirs = infer(x, lambda patches: network(patches).softmax(1))
    hasBrain = (x != -1).any(1)
    difference = (ours - theirs).abs().amax(1)[hasBrain]
    assert float(difference.max()) < 1e-5
    assert torch.equal(yhat[hasBrain], theirs.argmax(1)[hasBrain])


def test_predict_doesNotDependOnTheBatch(writeCase, monkeypatch):
    """However many windows go together, the probabilities are the same; they sum to 1 and decide the classes."""
    monkeypatch.setattr(engine, 'precision', lambda device: None)
    paths, _ = makePatient(writeCase)
    network = makeNetwork()
    for stride in (None, 12):
        results = []
        for batch in (1, 100):
            config.PREDICT_BATCH = batch
            results.append(engine.predict(paths, network, patchStride=stride, probabilities=True)[2:])
        torch.testing.assert_close(results[0][1], results[1][1], atol=1e-5, rtol=0)
        np.testing.assert_allclose(results[0][1].sum(1), 1, atol=1e-5)
        assert torch.equal(results[0][1].argmax(1), results[0][0])


def test_predict_mirrorsOverTheFourFlips(writeCase, monkeypatch):
    """With mirror the probabilities are the mean over the four flips of the box."""
    monkeypatch.setattr(engine, 'precision', lambda device: None)
    paths, _ = makePatient(writeCase, (64, 64, 3))
    network = makeNetwork().eval()
    config.PATCH_SIZE = 64
    x, _, _, found = engine.predict(paths, network, patchStride=64, mirror=True, probabilities=True)
    with torch.inference_mode():
        flips = [network(x[1:2].flip(axes)).softmax(1).flip(axes) for axes in ([], [2], [3], [2, 3])]
    torch.testing.assert_close(found[1:2], sum(flips) / 4, atol=1e-5, rtol=0)


def test_predict_worksWithoutSegAndWithoutBrain(writeCase):
    """Without a seg y is None; a slice, or a patient, with nothing in it is background with probability 1."""
    paths, _ = makePatient(writeCase)
    network = makeNetwork()
    for stride in (None, 24):
        _, y, yhat, probability = engine.predict({**paths, 'seg': None}, network, None, stride, probabilities=True)
        assert y is None and (yhat[0] == 0).all() and (probability[0, 0] == 1).all()
    empty = writeCase(dict.fromkeys(('t1ce', 't2', 'flair'), np.zeros((40, 40, 3), np.int16)))
    for stride in (None, 24):
        x, _, yhat = engine.predict({**empty, 'seg': None}, network, patchStride=stride)
        assert (yhat == 0).all() and (x == -1).all()


def test_predict_leavesTheModelsModeAlone(writeCase):
    """The network is asked in evaluation mode and gets back the mode that it had."""
    paths, _ = makePatient(writeCase)
    for mode in (True, False):
        network = makeNetwork().train(mode)
        before = network.encoder.bn1.running_mean.clone()
        engine.predict(paths, network)
        assert network.training is mode and torch.equal(before, network.encoder.bn1.running_mean)


def test_predict_refusesATransformThatChangesTheShape(writeCase):
    """A patch transform handed to predict by mistake is told."""
    paths, _ = makePatient(writeCase)
    pad = tio.CropOrPad((32, 32, 1), include=['x1', 'x2', 'x3', 'y'], label_keys=['y'])
    with pytest.raises(ValueError, match=r'made \(1, 3, 32, 32\) of \(70, 45, 5\); it must stay'):
        engine.predict(paths, makeNetwork(), transform=pad)
    with pytest.raises(ValueError, match='covers every pixel'):
        engine.predict(paths, makeNetwork(), patchStride=33)


def test_predict_seesWhatTheTrainingSees(writeCase, tmp_path):
    """x is, value for value, what makeDataset cuts its patches from."""
    paths, _ = makePatient(writeCase)
    x, _, _ = engine.predict(paths, makeNetwork())
    image, _ = preprocess.transformCase(engine.readCase(paths)[0], None, preprocess.volumeTransform())
    assert torch.equal(x, image)


def test_makeNetwork_followsConfig():
    """Channels follow the modalities, classes NO_CLASSES; the device is config.DEVICE."""
    config.ENCODER_NAME, config.DECODER_CHANNELS = 'resnet18', (32, 16, 16, 8, 8)
    config.MODALITIES = ('t1', 't1ce', 't2', 'flair')
    network = engine.makeNetwork()
    assert network(torch.zeros(2, 4, 64, 32)).shape == (2, 4, 64, 32)


def test_makeNetwork_goesOnWithRandomWeightsOffline(monkeypatch, capsys, recwarn):
    """Where the download fails, that is printed, not warned of, and the network starts from random weights."""
    asked, real = [], smp.Unet

    def offline(name, encoder_weights, **options):
        asked.append(encoder_weights)
        if encoder_weights:
            raise OSError('the hub cannot be reached\nsecond line')
        return real(name, encoder_weights=None, **options)

    monkeypatch.setattr(smp, 'Unet', offline)
    config.ENCODER_NAME, config.ENCODER_WEIGHTS = 'resnet18', 'imagenet'
    assert isinstance(engine.makeNetwork(), real) and asked == ['imagenet', None]
    printed = capsys.readouterr().out
    assert 'No imagenet weights for resnet18 (the hub cannot be reached)' in printed and not recwarn.list


def test_precision_isOfTheDevice(monkeypatch):
    """A card with native bfloat16 gets it, an older one float16, mps none."""
    for native, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation, native=native: native)
        assert engine.precision('cuda') is expected
    assert engine.precision('mps') is None


def test_predictAll_givesWhatPredictGives(writeCase):
    """One patient after the other, in the list's order, each as predict gives it; an error names its patient."""
    rows = {name: makePatient(lambda volumes, name=name: writeCase(volumes, name))[0] for name in PATIENTS}
    df = pd.DataFrame.from_dict(rows, orient='index')
    network = makeNetwork()
    found = dict(engine.predictAll(df, network, patchStride=24))
    assert list(found) == PATIENTS
    for name in PATIENTS:
        for one, other in zip(found[name], engine.predict(df.loc[name], network, patchStride=24), strict=True):
            assert torch.equal(one, other)
    df.loc[PATIENTS[1], 't2'] = 'gone.nii.gz'
    with pytest.raises(FileNotFoundError, match=rf'{PATIENTS[1]}: gone\.nii\.gz'):
        list(engine.predictAll(df, network))


PATIENTS = ['BraTS20_Training_001', 'BraTS20_Training_002', 'BraTS20_Training_003']


def test_validate_sumsOverMoreBatchesThanOneLook(monkeypatch):
    """45 batches of 6 and one of 3, looked at in three goes, are summed as one."""
    monkeypatch.setattr(engine, 'precision', lambda device: None)
    model, criterion, _ = makeRun()
    data = [*batches(45), *batches(1, 3, seed=1)]
    with torch.no_grad():
        expected = sum(criterion(model(image), label).item() * len(image) for image, label in data)
    assert engine.validate(model, criterion, data) == pytest.approx(expected, rel=1e-6)


def test_train_clipsWhatTheScalerHasScaledBack(monkeypatch):
    """A scaler that is on changes nothing but rounding: the gradient is clipped after its scale is taken off."""
    monkeypatch.setattr(engine, 'precision', lambda device: None)
    weights = []
    for scaler in (SCALER, torch.amp.GradScaler('cpu', init_scale=2.0**12)):
        config.GRADIENT_CLIP = 0.1
        model, criterion, _ = makeRun()
        engine.train(model, criterion, torch.optim.SGD(model.parameters(), lr=1.0), scaler, batches())
        weights.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach())
    torch.testing.assert_close(*weights, atol=1e-6, rtol=1e-5)


def test_predictAll_keepsPatientsApart(writeCase):
    """Patients that differ keep their own volumes and predictions."""
    rows = {}
    for number, name in enumerate(('BraTS20_Training_001', 'BraTS20_Training_002', 'BraTS20_Training_003'), start=2):
        image = np.zeros((3, 40, 40, 4), np.int16)
        image[:, :20, :20, : number - 1] = np.arange(20)[:, None, None] + 1
        rows[name] = writeCase(dict(zip(('t1ce', 't2', 'flair'), image, strict=True)), name)
    network = makeNetwork()
    df = pd.DataFrame.from_dict(rows, orient='index')
    for number, (name, (x, _, yhat)) in enumerate(engine.predictAll(df, network, patchStride=24), start=1):
        assert (x != -1).any((1, 2, 3)).sum() == number, name
        assert torch.equal(yhat, engine.predict(df.loc[name], network, patchStride=24)[2])


def test_predict_givesBackgroundWhereNoWindowLooked(writeCase):
    """In a slice with brain in one corner the windows without brain are background with probability 1."""
    image = np.zeros((3, 80, 80, 2), np.int16)
    image[:, :10, :10] = np.arange(1, 11)[:, None, None]
    paths = writeCase(dict(zip(('t1ce', 't2', 'flair'), image, strict=True)))
    asked = []

    class Edema(torch.nn.Module):
        def forward(self, patches):
            asked.append(len(patches))
            return torch.tensor([0.0, 0, 9, 0])[None, :, None, None].expand(len(patches), 4, *patches.shape[2:])

    _, _, yhat, probability = engine.predict(paths, Edema(), patchStride=24, probabilities=True)
    assert sum(asked) == 2 and (yhat[:, :32, :32] == 2).all() and (yhat[:, 32:] == 0).all()
    assert (probability[:, 0, 32:] == 1).all() and (probability[:, 0, :, 32:] == 1).all()


def test_train_setsTheModeOfTraining():
    """After validate, or predict, training goes on in training mode."""
    model, criterion, optimizer = makeRun()
    engine.validate(model, criterion, batches(1))
    engine.train(model, criterion, optimizer, SCALER, batches(1))
    assert model.training


def test_predict_boundsItsBatchAndPadsWithBackground(writeCase):
    """At most PREDICT_BATCH patches go together; beyond a small image lies its lowest value."""
    config.DEVICE, config.PREDICT_BATCH, config.PATCH_SIZE = 'cuda:77', 3, 64
    paths, _ = makePatient(writeCase, (70, 45, 9))
    asked = []

    class Spy(torch.nn.Module):
        def forward(self, patches):
            asked.append((len(patches), patches[..., 45:].min().item(), patches[..., 45:].max().item()))
            return patches.new_zeros(len(patches), 4, *patches.shape[2:])

    engine.predict(paths, Spy(), patchStride=6, device=torch.device('cpu'))
    assert max(size for size, _, _ in asked) in (2, 3) and {tuple(ends) for _, *ends in asked} == {(-1, -1)}


def test_validate_leavesTheWeightsAbleToLearn(monkeypatch):
    """Validation before the first epoch, without autocast as on most CPUs: training still works."""
    monkeypatch.setattr(engine, 'precision', lambda device: None)
    model, criterion, optimizer = makeRun()
    engine.validate(model, criterion, batches(1))
    engine.train(model, criterion, optimizer, SCALER, batches(1))
    assert not any(weight.is_inference() for weight in model.parameters())


def test_train_refusesALoaderWithoutABatch():
    """A loss of 0 over nothing would be the best of all: no batch is an error."""
    model, criterion, optimizer = makeRun()
    with pytest.raises(ValueError, match='train: the loader gave no batch'):
        engine.train(model, criterion, optimizer, SCALER, [])


@pytest.mark.parametrize('cache', [0, 4])
def test_train_growsNeitherMemoryNorHandles(writeCase, tmp_path, cache):
    """After three epochs five more take no memory, no file handle and no process, from file as from memory."""
    config.CACHE_PATCHES = cache
    volume = np.random.default_rng(0).integers(1, 900, (64, 64, 20)).astype(np.int16)
    paths = writeCase({**dict.fromkeys(('t1ce', 't2', 'flair'), volume), 'seg': volume % 3})
    noPatches = preprocess.makeDataset(pd.DataFrame.from_dict({'P1': paths}, orient='index'), tmp_path / 'a.h5')
    dataset = utils.BRATSDataset(tmp_path / 'a.h5', noPatches, raw=True)
    loader = torch.utils.data.DataLoader(dataset, 16, shuffle=True, num_workers=2)
    augment = batched.Batched(preprocess.makeTransforms()[0])
    model, criterion, optimizer = makeRun()
    process, held = psutil.Process(), []
    for _ in range(8):
        engine.train(model, criterion, optimizer, SCALER, loader, augment)
        engine.validate(model, criterion, loader)
        held.append((process.memory_info().rss, process.num_fds(), len(process.children())))
    grown = np.subtract(held[-1], held[2])
    assert noPatches == 180 and grown[0] < 15e6  # five epochs see 22 MB
    assert grown[1] <= 0 and grown[2] == 0
    dataset.file.close()
    assert not [file for file in process.open_files() if file.path.endswith('a.h5')]
