"""What one training or evaluation step works on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

#: What the model is to learn: a tensor, or a dictionary of several; the first dimension of each counts the samples.
#: Only the task, which knows which of the two it is, looks inside.
Targets: TypeAlias = Any


def map_targets(function: Callable[[Tensor], Tensor], targets: Targets) -> Targets:
    """The targets with a function applied to each tensor."""
    if isinstance(targets, Tensor):
        return function(targets)
    return {name: function(tensor) for name, tensor in targets.items()}


def slice_targets(targets: Targets, start: int, stop: int) -> Targets:
    """The targets of the samples from ``start`` up to ``stop``, as views."""
    if isinstance(targets, Tensor):
        return targets[start:stop]
    return {name: tensor[start:stop] for name, tensor in targets.items()}


@dataclass(slots=True)
class Batch:
    """One shard's share of a global batch.

    Attributes:
        inputs: What the model takes, ``[n, …]``, on the device; n may be 0.
        targets: What the task compares outputs with, likewise.
        indices: int64 [n] on the CPU: positions in the split.
        global_count: Samples of the global batch, over all shards; what sums of losses are divided by.
    """

    inputs: Tensor
    targets: Targets
    indices: Tensor
    global_count: int

    def __len__(self) -> int:
        return len(self.inputs)

    def split(self, count: int) -> list[tuple[Tensor, Targets]]:
        """Inputs and targets of ``count`` pieces whose sizes differ by one sample at most."""
        inputs = self.inputs.tensor_split(count)
        if isinstance(self.targets, Tensor):
            return list(zip(inputs, self.targets.tensor_split(count), strict=True))
        parts = {name: tensor.tensor_split(count) for name, tensor in self.targets.items()}
        return [(piece, {name: part[i] for name, part in parts.items()}) for i, piece in enumerate(inputs)]
