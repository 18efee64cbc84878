"""Several ranks train as one process does."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

import engine
import ranks

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group('ranks')]  # one process, as they share two others


def makeLayers():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 4, 3, padding=1),
    )


def makeBatch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 3, 16, 16, generator=generator), torch.randint(0, 4, (8, 16, 16), generator=generator)


def step(model, criterion, layers, image, label):
    """Return the loss of a step, all gradients, and the statistics of the batch norm."""
    loss = criterion(model(image), label)
    loss.backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in layers.parameters()])
    return loss.detach(), gradients, layers[1].running_mean.clone(), layers[1].running_var.clone()


def stepOnRank():
    layers, criterion = makeLayers(), engine.DiceAndCrossEntropy()
    model = ranks.share(layers, criterion)
    image, label = (part[ranks.rank() :: 2] for part in makeBatch())
    state = step(model, criterion, layers, image, label)
    with torch.inference_mode():  # in validation a rank has its own batches
        own = criterion(layers.eval()(image), label)
    return state, own, list(ranks.inStep([4, 5] if ranks.rank() == 0 else None)), ranks.sumOverRanks(ranks.rank() + 1)


def batchesOnRank(numPatches=11):
    batches = ranks.TrainingBatches(numPatches, 4)
    torch.manual_seed(3 + ranks.rank())
    return list(batches), len(batches), batches.numSamples, ranks.validationBatches(numPatches, 4)


def refuse():
    with pytest.raises(ValueError, match=r'config\.BATCHSIZE is 5; a multiple of the 2 ranks was expected'):
        ranks.TrainingBatches(20, 5)
    with pytest.raises(ValueError, match='3 validation patches are 1 batches, fewer than 2 ranks'):
        ranks.validationBatches(3, 4)
    return True


def onRank(number, folder):
    """On one of two ranks, save what each function returns."""
    dist.init_process_group('gloo', init_method=f'file://{folder}/meeting', rank=number, world_size=2)
    torch.set_num_threads(1)
    torch.save([stepOnRank(), batchesOnRank(), refuse()], f'{folder}/{number}.pt')
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def onTwoRanks(tmp_path_factory):
    """What the functions return on two ranks: a pair for each."""
    folder = tmp_path_factory.mktemp('ranks')
    torch.multiprocessing.spawn(onRank, (folder,), nprocs=2)
    return list(zip(*(torch.load(folder / f'{number}.pt', weights_only=False) for number in range(2)), strict=True))


def test_share_makesAStepOfTwoRanksEqualToOneOfTheWholeBatch(onTwoRanks):
    """Loss, gradients and statistics of batch norm are those of one process with the whole batch."""
    layers, criterion = makeLayers(), engine.DiceAndCrossEntropy()
    image, label = makeBatch()
    expected = step(layers, criterion, layers, image, label)
    with torch.inference_mode():
        own = [criterion(layers.eval()(image[number::2]), label[number::2]) for number in range(2)]
    for number, (found, validated, epochs, total) in enumerate(onTwoRanks[0]):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(validated, own[number], atol=1e-5, rtol=1e-5)
        assert epochs == [4, 5] and total == 3


def test_batches_ofTwoRanksAreThoseOfOneProcess(onTwoRanks):
    """Each batch is shared; the last one of 3 patches loses one; validation batches are whole, and none is twice."""
    alone = ranks.TrainingBatches(11, 4)
    torch.manual_seed(3)
    first, second = onTwoRanks[1]
    assert len(alone) == first[1] == second[1] == 3 and alone.numSamples == 11 and first[2] == second[2] == 10
    for whole, one, other in zip(alone, first[0], second[0], strict=True):
        assert len(one) == len(other)
        assert set(one) | set(other) == set(whole[: 2 * len(one)])
    assert sorted(number for batch in alone for number in batch) == list(range(11))
    assert first[3] == [[0, 1, 2, 3], [8, 9, 10]] and second[3] == [[4, 5, 6, 7]]


def test_batches_areThoseOfALoaderThatShuffles():
    """Alone, the order is that which torch's own sampler draws from the same state; each epoch has another one."""
    torch.manual_seed(0)
    batches = ranks.TrainingBatches(20, 4)
    first, second = list(batches), list(batches)
    torch.manual_seed(0)
    expected = torch.utils.data.BatchSampler(torch.utils.data.RandomSampler(range(20)), 4, False)
    assert first == list(expected) and second == list(expected) and first != second


def test_batches_refuseWhatRanksCannotShare(onTwoRanks):
    """A batch that two ranks cannot share equally, and too few validation batches, are refused."""
    assert onTwoRanks[2] == (True, True)
