"""Batches: the input of one training or evaluation step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

#: What the task compares outputs with: a tensor, or a dictionary of tensors. The first dimension of each is the sample.
#: Only the task knows their meaning.
Targets: TypeAlias = Any


def map_targets(function: Callable[[Tensor], Tensor], targets: Targets) -> Targets:
    """Applies a function to each tensor of the targets."""
    if isinstance(targets, Tensor):
        return function(targets)
    return {name: function(tensor) for name, tensor in targets.items()}


def pick_targets(targets: Targets, positions: Tensor) -> Targets:
    """Targets of the samples at some positions, int64 [n], in that order."""
    return map_targets(lambda tensor: tensor.index_select(0, positions), targets)


def slice_targets(targets: Targets, start: int, stop: int) -> Targets:
    """Targets of the samples from ``start`` up to but not including ``stop``, as views."""
    if isinstance(targets, Tensor):
        return targets[start:stop]
    return {name: tensor[start:stop] for name, tensor in targets.items()}


@dataclass(slots=True)
class Batch:
    """One shard's share of a global batch.

    Attributes:
        inputs: Inputs of the model, ``[n, …]``, on the device; n may be 0.
        targets: Targets of the same samples, on the device.
        indices: Positions of the samples in the split, int64 [n] on the CPU.
        global_count: Number of samples in the global batch, over all shards; sums of losses are divided by it.
    """

    inputs: Tensor
    targets: Targets
    indices: Tensor
    global_count: int

    def __len__(self) -> int:
        return len(self.inputs)

    def split(self, count: int) -> list[tuple[Tensor, Targets]]:
        """Splits into ``count`` pairs of inputs and targets whose sizes differ by at most one sample."""
        inputs = self.inputs.tensor_split(count)
        if isinstance(self.targets, Tensor):
            return list(zip(inputs, self.targets.tensor_split(count), strict=True))
        parts = {name: tensor.tensor_split(count) for name, tensor in self.targets.items()}
        return [(piece, {name: part[i] for name, part in parts.items()}) for i, piece in enumerate(inputs)]
