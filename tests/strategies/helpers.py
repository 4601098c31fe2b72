"""What tests of strategies share: a strategy around a model, and batches to feed it."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from distrain.config.schema import Config
from distrain.data.base import DataSpec
from distrain.data.batch import Batch
from distrain.data.sampler import shard_bounds
from distrain.optim.optimizers.build import build_optimizer
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.strategies import base
from distrain.strategies.replicated import Replicated
from distrain.tasks import base as tasks
from tests.runs import small

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, host="here")


def set_up(model: nn.Module, config: Config, runtime: Runtime | None = None) -> Replicated:
    """The configured strategy around a model; alone unless a runtime is given."""
    # Small tensors: more threads would only wait for each other.
    torch.set_num_threads(1)
    strategy = cast(Replicated, base.strategy_class(config)(config, runtime or Runtime(config, ALONE)))
    example = torch.zeros(0)
    task = tasks.build(config, DataSpec(3, 8, 8, tuple("abcdefghij")))
    strategy.setup(model, task, lambda named: build_optimizer(config.optimizer, named), example)
    return strategy


def single(model: nn.Module, *overrides: str) -> Replicated:
    """``strategy=single`` around a model, with plain SGD unless the overrides say otherwise."""
    return set_up(model, small("optimizer=sgd", *overrides))


def batch(images: Tensor, labels: Tensor, shard: tuple[int, int] = (0, 1)) -> Batch:
    """A shard's share of a global batch."""
    start, end = shard_bounds(len(labels), *shard)
    return Batch(images[start:end], labels[start:end], torch.arange(start, end), len(labels))


def drawn(count: int, *shape: int, seed: int = 0, classes: int = 4, dtype: torch.dtype = torch.float32) -> Batch:
    """A whole batch of normal noise with labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return batch(images, torch.randint(classes, (count,), generator=generator))


def parameters(model: nn.Module) -> Tensor:
    """All parameters as one vector, copied."""
    return torch.cat([parameter.detach().clone().flatten() for parameter in model.parameters()])


def once(function: Any) -> Any:
    """The function, called once for the same arguments, which need not be hashable."""
    results: dict[str, Any] = {}

    def remembered(*arguments: Any) -> Any:
        key = repr(arguments)
        if key not in results:
            results[key] = function(*arguments)
        return results[key]

    return remembered
