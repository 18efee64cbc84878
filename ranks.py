"""Let several processes, the ranks of torchrun, train one model as one process would."""

from contextlib import contextmanager

import torch
import torch.distributed as dist


def isMany():
    """Return whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank():
    """Return the number of this rank, from 0; 0 if there is only one process."""
    return dist.get_rank() if isMany() else 0


def numRanks():
    """Return the number of ranks; 1 if there is only one process."""
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
    """Return on every rank the value that rank 0 passed; it has to be picklable."""
    values = [value]
    if isMany():
        dist.broadcast_object_list(values)
    return values[0]


def inStep(numbers):
    """Yield on every rank what the iterable of rank 0 yields, so that all stop together; that of others is ignored."""
    source = iter(numbers) if rank() == 0 else None
    while (number := fromFirst(next(source, None) if rank() == 0 else None)) is not None:
        yield number


@contextmanager
def firstBeforeOthers():
    """Run a block on rank 0 first, then on the others, which find the files that rank 0 wrote."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and isMany():
        dist.barrier()


class TrainingBatches:
    """Batch sampler of this rank's part of each batch. All ranks together see the batches of one process.

    Rank 0 shuffles the patches, as a DataLoader with `shuffle = True` does. Of n ranks, rank r gets the patches r,
    r + n, ... of each batch. If the last batch cannot be divided equally, the remainder is dropped.

    Args:
        numPatches: patches of the dataset.
        batchSize: patches of a batch, over all ranks.

    Attributes:
        numSamples: patches of an epoch, over all ranks.

    Raises:
        ValueError: the ranks cannot share a batch equally.
    """

    def __init__(self, numPatches, batchSize):
        if batchSize % numRanks():
            raise ValueError(f'config.BATCHSIZE is {batchSize}; a multiple of the {numRanks()} ranks was expected.')
        self.numPatches, self.batchSize = numPatches, batchSize
        self.numSamples = numPatches - numPatches % batchSize % numRanks()

    def __len__(self):
        return -(-self.numSamples // self.batchSize)

    def __iter__(self):
        drawn = list(torch.utils.data.RandomSampler(range(self.numPatches))) if rank() == 0 else None
        order = fromFirst(drawn)[: self.numSamples]
        for start in range(0, len(order), self.batchSize):
            yield order[start : start + self.batchSize][rank() :: numRanks()]


def validationBatches(numPatches, batchSize):
    """Return the batches (lists of patch indices) that this rank validates.

    They are whole batches of one process: of n ranks, rank r gets the batches r, r + n, ...

    Raises:
        ValueError: there are fewer batches than ranks.
    """
    batches = [batch.tolist() for batch in torch.arange(numPatches).split(batchSize)]
    if len(batches) < numRanks():
        raise ValueError(f'{numPatches} validation patches are {len(batches)} batches, fewer than {numRanks()} ranks.')
    return batches[rank() :: numRanks()]


def seedEpoch(seed, epoch):
    """Seed torch on all ranks but 0 for an epoch, each differently, so that a resumed run draws the same.

    Rank 0 is not seeded: the checkpoint holds the states of its generators.
    """
    if rank() > 0:
        torch.manual_seed((seed * 100_003 + epoch) * 1_009 + rank())


def share(model, criterion):
    """Return a model whose gradients are averaged over the ranks, so that a step equals that of the whole batch.

    Batch norm and the criterion are computed over the whole batch, because neither batch norm nor the Dice loss is the
    mean of those of its parts. The model and the criterion are changed in place.

    Args:
        model: on the device of this rank. Call this before its optimizer and its average are made.
        criterion: torch module that takes logits (B, K, H, W) and classes int64 (B, H, W).
    """
    if not isMany():
        return model
    for layer in model.modules():
        if type(layer) is torch.nn.BatchNorm2d:
            layer.__class__ = SyncedBatchNorm
    criterion.register_forward_pre_hook(_gatherBatch)
    # `engine.train` does it too, but the buffers of the gradients are made here
    model.to(memory_format=torch.channels_last)
    # an encoder that is cut to fewer stages keeps the weights of the others, unused
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
    """Return the logits and classes of all ranks in place of this rank's; None, to change nothing, in validation."""
    return tuple(map(_gather, inputs)) if torch.is_grad_enabled() else None


def _gather(part):
    """Return the tensors (B, ...) of all ranks as one (ranks * B, ...), through which gradients flow."""
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
