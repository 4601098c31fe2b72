"""Parts of a training, each with one thing in it by which ranks part from one process."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from distrain.communication.collectives import Communicator
from distrain.communication.types import Pending
from distrain.compression.base import Compressor
from distrain.compression.bucket import Bucket
from distrain.config.groups import CompressionConfig, StrategyConfig, TaskConfig
from distrain.config.registry import register
from distrain.models.base import BlockSequence
from distrain.strategies.base import MakeOptimizer
from distrain.strategies.replicated import Replicated
from distrain.tasks.base import Task
from distrain.tasks.classification import Classification


class Plain(nn.Module):
    """Nothing is wrong."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class MixesSamples(nn.Module):
    """Takes the mean of the batch away, as contrastive heads and some normalisations do."""

    def forward(self, x: Tensor) -> Tensor:
        return x - 0.5 * x.mean(0, keepdim=True)


class Counts(nn.Module):
    """Grows with the samples that it has seen."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += len(x)
        return x * (1 + 0.01 * self.seen)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        context.count = len(x)
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        count: int = context.count
        return gradient / count


class ScalesGradient(nn.Module):
    """Divides its gradient by the number of samples that it got."""

    def forward(self, x: Tensor) -> Tensor:
        return _Scaled.apply(x)  # type: ignore[no-any-return,no-untyped-call]


class _Loud(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return 100 * gradient


class LoudGradient(nn.Module):
    """Has gradients that overflow in fp16 until the loss scale has become small; nothing else is wrong."""

    def forward(self, x: Tensor) -> Tensor:
        return _Loud.apply(x)  # type: ignore[no-any-return,no-untyped-call]


class NeverTwice(nn.Module):
    """Its result depends on numbers that no seed governs, as that of a kernel with races does."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 1e-3 * random.SystemRandom().random())


class Place(nn.Module):
    """Depends on the place of a sample in its batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.01 * torch.arange(len(x), dtype=x.dtype, device=x.device)[:, None]


SUSPECTS: dict[str, type[nn.Module]] = {
    each.__name__: each for each in (Plain, MixesSamples, Counts, ScalesGradient, LoudGradient, NeverTwice, Place)
}


class Net(BlockSequence):
    """Two layers with a suspect in between."""

    def __init__(self, in_channels: int, num_classes: int, suspect: str, dropout: float = 0.0) -> None:
        first = nn.Sequential(nn.Flatten(), nn.Linear(in_channels * 64, 16), nn.Tanh())
        between = nn.Dropout(dropout) if dropout else SUSPECTS[suspect]()
        super().__init__({"first": first, "suspect": between, "last": nn.Linear(16, num_classes)})


class Tied(nn.Module):
    """One matrix used twice."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.embed = nn.Linear(in_channels * 64, 16)
        self.one, self.two = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.two.weight = self.one.weight
        self.last = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x.flatten(1)).tanh()
        return self.last(self.two(self.one(hidden).tanh()).tanh())  # type: ignore[no-any-return]


class _Data(Replicated[StrategyConfig]):
    """Data parallelism in one bucket."""

    def __init__(self, config: Any, runtime: Any) -> None:
        super().__init__(config, runtime)
        self.mesh = runtime.mesh({"data": runtime.world.size})
        self.replicas = Communicator(self.mesh.get_group("data") if self.mesh else None, self.ledger)
        self.data_shard = (self.replicas.rank, self.replicas.size)


@register("strategy", "unties", StrategyConfig)
class Unties(_Data):
    """Gives each use of a parameter one of its own."""

    def setup(self, model: nn.Module, task: Task, make_optimizer: MakeOptimizer, example: Tensor) -> None:
        if isinstance(model, Tied):
            model.two.weight = nn.Parameter(model.one.weight.detach().clone())
        super().setup(model, task, make_optimizer, example)


@register("strategy", "forgets_a_rank", StrategyConfig)
class ForgetsARank(_Data):
    """Its last rank's gradient is lost."""

    def _update(self) -> bool:
        if self.replicas.size > 1:
            for bucket in self.gradients.buckets:
                bucket.flat.mul_(0.5)
        return super()._update()


@register("compression", "coarse", CompressionConfig)
class Coarse(Compressor):
    """Sends what it calls gradients."""

    def aggregate(self, bucket: Bucket, communicator: Communicator) -> Iterator[Pending]:
        coarse = bucket.flat.bfloat16().to(bucket.flat.dtype)
        yield communicator.start_all_reduce(coarse)
        bucket.flat.copy_(coarse)


@register("task", "mean_of_means", TaskConfig)
class MeanOfMeans(Classification):
    """Adds means up as if they were sums."""

    def loss(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        return 10 * F.cross_entropy(outputs, targets), len(outputs)


@register("task", "contrastive", TaskConfig)
class Contrastive(Classification):
    """Compares each sample with all others that it gets."""

    def loss(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        similar = outputs @ outputs.T
        same = (targets[:, None] == targets[None, :]).to(outputs.dtype)
        return -(similar.log_softmax(1) * same / same.sum(1, keepdim=True)).sum(), len(outputs)


class Samples(Dataset[Any]):
    """Random pictures; ``drawn`` anew whenever they are read, or in the order in which a set holds their names."""

    def __init__(self, drawn: bool = False, order: str = "fixed") -> None:
        generator = torch.Generator().manual_seed(0)
        names = [f"picture_{row}.png" for row in range(60)]
        # Processes that Python starts anew hash a text in other ways, unless PYTHONHASHSEED is set.
        rows = [names.index(name) for name in (set(names) if order == "set" else names)]
        self.images = torch.rand(60, 3, 8, 8, generator=generator)[rows]
        self.classes = ["a", "b", "c", "d"]
        self.labels = [row % 4 for row in rows]
        self.drawn = drawn

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        noise = 0.1 * random.SystemRandom().random() if self.drawn else 0.0
        return self.images[row] + noise, self.labels[row]
