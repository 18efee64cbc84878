"""Let several processes, the ranks of torchrun, train one network as one process would."""

from contextlib import contextmanager

import torch
import torch.distributed as dist


def isMany():
    """Return whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank():
    """Return the number of this rank, from 0; 0 without others."""
    return dist.get_rank() if isMany() else 0


def numRanks():
    """Return the number of ranks, 1 without others."""
    return dist.get_world_size() if isMany() else 1


def sumOverRanks(value):
    """Return the sum over all ranks of a number, or of a tensor on any device."""
    if not isMany():
        return value
    isTensor = torch.is_tensor(value)
    device = 'cuda' if dist.get_backend() == 'nccl' else 'cpu'
    total = value.to(device, copy=True) if isTensor else torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.to(value.device) if isTensor else float(total)


def fromFirst(value=None):
    """Return on every rank the plain value that rank 0 gives."""
    values = [value]
    if isMany():
        dist.broadcast_object_list(values)
    return values[0]


def inStep(numbers):
    """Yield on every rank what rank 0's iterable yields, so that all stop together; others may give None."""
    source = iter(numbers) if rank() == 0 else None
    while (number := fromFirst(next(source, None) if rank() == 0 else None)) is not None:
        yield number


@contextmanager
def firstBeforeOthers():
    """Run a block on rank 0, then on the others, which find what it has written."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and isMany():
        dist.barrier()


class TrainingBatches:
    """Batch sampler: this rank's part of each batch of an epoch. All ranks together see the batches of one process.

    The patches are shuffled by seed and epoch alone. Of a batch, rank r gets the patches r, r + n, ... of n ranks. All
    get equally many: what the last batch has beyond that is dropped.

    Args:
        numPatches: patches of the data set.
        batchSize: patches of a batch, over all ranks.
        seed: of the order.

    Attributes:
        epoch: set it before each epoch, from 0.
        numSamples: patches of an epoch, over all ranks.

    Raises:
        ValueError: the ranks cannot share a batch equally.
    """

    def __init__(self, numPatches, batchSize, seed):
        if batchSize % numRanks():
            raise ValueError(f'config.BATCHSIZE is {batchSize}; a multiple of the {numRanks()} ranks was expected.')
        self.numPatches, self.batchSize, self.seed, self.epoch = numPatches, batchSize, seed, 0
        self.numSamples = numPatches - numPatches % batchSize % numRanks()

    def __len__(self):
        return -(-self.numSamples // self.batchSize)

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = torch.randperm(self.numPatches, generator=generator)[: self.numSamples]
        for batch in order.split(self.batchSize):
            yield batch[rank() :: numRanks()].tolist()


def validationBatches(numPatches, batchSize):
    """Return the batches (lists of patch numbers) that this rank validates: whole batches of one process, none twice.

    Raises:
        ValueError: there are fewer batches than ranks.
    """
    batches = [batch.tolist() for batch in torch.arange(numPatches).split(batchSize)]
    if len(batches) < numRanks():
        raise ValueError(f'{numPatches} validation patches are {len(batches)} batches, fewer than {numRanks()} ranks.')
    return batches[rank() :: numRanks()]


def seedEpoch(seed, epoch):
    """Seed torch's generators for an epoch: other draws on each rank, and the same ones when a run is resumed."""
    torch.manual_seed((seed * 100_003 + epoch) * 1_009 + rank())


def share(model, criterion):
    """Return a model whose gradients are averaged over the ranks, so that a step equals that of the whole batch.

    Batch norm uses the mean and variance of the whole batch, and the criterion sees the whole batch: the Dice loss and
    batch norm of parts would not add up to those of the whole. The model and the criterion are changed in place.

    Args:
        model: on the device of this rank; before its optimizer and its average are made.
        criterion: torch module of logits and labels.
    """
    if not isMany():
        return model
    for layer in model.modules():
        if type(layer) is torch.nn.BatchNorm2d:
            layer.__class__ = SyncedBatchNorm
    criterion.register_forward_pre_hook(_gatherBatch)
    # as `engine.train` does, but that is too late for the buffers of the gradients
    model.to(memory_format=torch.channels_last)
    # an encoder of fewer stages keeps the weights of the others, unused
    return torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


class _Sum(torch.autograd.Function):
    """The sum of a tensor over all ranks, whose gradient is summed over them too."""

    @staticmethod
    def forward(ctx, values):
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return _Sum.forward(ctx, gradient)


def _gatherBatch(criterion, inputs):
    """Return logits and labels of all ranks in the place of this rank's, in training."""
    return tuple(map(_gather, inputs)) if torch.is_grad_enabled() else None


def _gather(part):
    """Return the parts (B, ...) of all ranks as one tensor (ranks * B, ...)."""
    others = torch.zeros_like(part)
    return _Sum.apply(torch.cat([part if number == rank() else others for number in range(numRanks())]))


class SyncedBatchNorm(torch.nn.BatchNorm2d):
    """Batch norm over the batch of all ranks. torch's SyncBatchNorm does the same, but on GPUs only."""

    def forward(self, image):
        if not self.training:
            return super().forward(image)
        values = image.float()
        count = values.numel() // values.shape[1] * numRanks()
        mean = _Sum.apply(values.sum((0, 2, 3))) / count
        centered = values - mean[:, None, None]
        variance = _Sum.apply(centered.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return torch.addcmul(self.bias[:, None, None], centered, scale[:, None, None]).to(image.dtype)
