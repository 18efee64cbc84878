import logging
import math

import pytest
import segmentation_models_pytorch as smp
import torch

import config
import engine
import recipe

SCALER = torch.amp.GradScaler('cuda', enabled=False)


def flatten(model):
    """Return all weights of a model as one vector."""
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def test_makeModel_followsConfig():
    """The channels follow the modalities, and the output has NO_CLASSES channels."""
    config.ENCODER_NAME, config.DECODER_CHANNELS = 'resnet18', (32, 16, 16, 8, 8)
    config.MODALITIES, config.NO_CLASSES = ('t1', 't1ce', 't2', 'flair'), 5
    assert recipe.makeModel()(torch.zeros(2, 4, 64, 32)).shape == (2, 5, 64, 32)


def test_availableWeights_areNoneOffline(monkeypatch, capsys, caplog):
    """If the download fails, one message says so; the model then equals one made without pretrained weights."""
    config.ENCODER_NAME, config.DECODER_CHANNELS = 'resnet18', (32, 16, 16, 8, 8)
    torch.manual_seed(0)
    expected, drawn = recipe.makeModel(), torch.rand(1)

    def fail(name, weights):
        assert (name, weights) == ('resnet18', 'imagenet')
        torch.rand(3)
        logging.getLogger('huggingface_hub').warning('retrying')
        raise OSError('the hub cannot be reached\nsecond line')

    monkeypatch.setattr(smp.encoders, 'get_encoder', fail)
    config.ENCODER_WEIGHTS = 'imagenet'
    torch.manual_seed(0)
    assert torch.equal(flatten(recipe.makeModel()), flatten(expected)) and torch.equal(torch.rand(1), drawn)
    printed = capsys.readouterr().out
    assert 'The imagenet weights of resnet18 cannot be loaded (the hub cannot be reached)' in printed
    assert not caplog.records
    logging.getLogger('huggingface_hub').warning('another')
    assert len(caplog.records) == 1


@pytest.mark.parametrize(('gamma', 'expected'), [(0, math.log(2)), (1, math.log(2) / 2), (2, math.log(2) / 4)])
def test_makeCriterion_weighsByGamma(gamma, expected):
    """With all logits 0 each class has probability 1/2, so the focal loss is log(2) / 2 ** gamma."""
    config.LOSS, config.LOSS_GAMMA = 'focal', gamma
    loss = recipe.makeCriterion()(torch.zeros(2, 4, 8, 8), torch.ones(2, 8, 8, dtype=torch.long))
    assert loss.shape == () and float(loss) == pytest.approx(expected)


def test_precision_dependsOnTheDevice(monkeypatch):
    """A GPU with native bfloat16 computes in it, an older one in float16; autocast is off on mps."""
    for native, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation, native=native: native)
        assert recipe.precision('cuda') is expected
    assert recipe.precision('mps') is None


def test_makeCriterion_sumsDiceAndCrossEntropy():
    """With equal logits: cross-entropy log(4); each class that is there has Dice 2 * 1/4 n / (1/4 N + n)."""
    config.LOSS = 'dice+ce'
    label = torch.zeros(1, 4, 4, dtype=torch.long)
    label[0, 0] = 2  # 4 of 16 pixels; the other two classes are absent and count 0
    losses = [1 - 2 * n / 4 / (16 / 4 + n) for n in (12, 4)]
    expected = math.log(4) + sum(losses) / 4
    assert float(recipe.makeCriterion()(torch.zeros(1, 4, 4, 4), label)) == pytest.approx(expected)
    config.LOSS = 'hinge'
    with pytest.raises(ValueError, match=r"config\.LOSS is 'hinge'"):
        recipe.makeCriterion()


def test_makeScheduler_warmsUpAndDecays():
    """100 steps with a warm-up of 4: fifths of the rate at first, half ** 0.9 in the middle, 0 after the last."""
    config.SCHEDULE, config.WARMUP, config.POLY_POWER = 'poly', 4, 0.9
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 2.0)
    scheduler, rates = recipe.makeScheduler(optimizer, 100), []
    for _ in range(101):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(2 / 5) and rates[2] == pytest.approx(2 * 3 / 5 * 0.98**0.9)
    assert rates[50] == pytest.approx(2 * 0.5**0.9) and rates[100] == 0 and max(rates) == rates[4]
    config.SCHEDULE = 'plateau'
    assert isinstance(recipe.makeScheduler(optimizer, 9), torch.optim.lr_scheduler.ReduceLROnPlateau)
    config.SCHEDULE = 'cosine'
    with pytest.raises(ValueError, match=r"config\.SCHEDULE is 'cosine'"):
        recipe.makeScheduler(optimizer, 9)


def test_makeAverage_reachesBackOverAFractionOfTheSteps():
    """After many steps of weight 1 following steps of weight 0, the average is 1 - (1 - 1/20) ** steps; early, more."""
    config.AVERAGE = 0.05
    model = torch.nn.Linear(1, 1, bias=False)
    average = recipe.makeAverage(model, 400)  # 20 steps
    with torch.no_grad():
        model.weight.fill_(0)
        for _ in range(300):
            average.update_parameters(model)
        model.weight.fill_(1)
        for _ in range(10):
            average.update_parameters(model)
    assert average.module.weight.item() == pytest.approx(1 - 0.95**10, abs=1e-5)
    early = recipe.makeAverage(model, 400)
    with torch.no_grad():
        for value in (5.0, 3.0):
            model.weight.fill_(value)
            early.update_parameters(model)
    assert early.module.weight.item() == pytest.approx(5 * 2 / 11 + 3 * 9 / 11, rel=1e-5)
    config.AVERAGE = 0
    assert recipe.makeAverage(model, 400) is None


def makeLoader():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, 4, 3, 8, 8, generator=generator)
    return [(image, (image[:, 0] > 0).long()) for image in images]


def test_train_stepsTheScheduleAndTheAverage():
    """After an epoch of 6 of 12 steps the rate is half decayed, and the average lies between start and end."""
    config.SCHEDULE, config.AVERAGE, config.POLY_POWER = 'poly', 0.5, 1.0
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    scheduler, average = recipe.makeScheduler(optimizer, 12), recipe.makeAverage(model, 12)
    engine.train(model, torch.nn.CrossEntropyLoss(), optimizer, SCALER, makeLoader(), None, scheduler, average)
    assert optimizer.param_groups[0]['lr'] == pytest.approx(0.05)
    assert int(average.n_averaged) == 6 and not torch.equal(flatten(average.module), flatten(model))
    assert torch.isfinite(average.module[1].running_mean).all()
    assert not torch.equal(average.module[1].running_mean, model[1].running_mean)


def test_train_leavesAPlateauToItsLoss():
    """ReduceLROnPlateau is not stepped by batches: it waits for a validation loss."""
    config.SCHEDULE = 'plateau'
    model = torch.nn.Conv2d(3, 4, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = recipe.makeScheduler(optimizer, 12)
    engine.train(model, torch.nn.CrossEntropyLoss(), optimizer, SCALER, makeLoader(), None, scheduler)
    assert scheduler.last_epoch == 0 and optimizer.param_groups[0]['lr'] == 0.1


def test_document_isTheDocumentsRecipe():
    """config.DOCUMENT puts the focal loss, the plateau and axial patches with tumor in place, without an average."""
    vars(config).update(config.DOCUMENT)
    model = torch.nn.Conv2d(3, 4, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    assert isinstance(recipe.makeCriterion(), smp.losses.FocalLoss)
    assert isinstance(recipe.makeScheduler(optimizer, 12), torch.optim.lr_scheduler.ReduceLROnPlateau)
    assert recipe.makeAverage(model, 12) is None
    assert (config.PLANES, config.SLICE_STEP, config.BACKGROUND_SHARE) == (('axial',), 1, 0)
