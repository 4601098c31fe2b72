"""Divided layers of which several ranks hold each part, and share its optimizer state, or its gradients too."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from distrain.communication.collectives import Communicator
from distrain.gradients.bucket_sizes import MIB
from distrain.gradients.buckets import ReducedGradients
from distrain.reporting.metrics import Stopwatch
from distrain.strategies.fsdp.flat_block import FlatBlock
from distrain.strategies.fsdp.options import OPTIMIZER
from distrain.strategies.fsdp.scattered_gradients import ScatteredGradients
from distrain.strategies.fsdp.sharded_strategy import ShardedStrategy
from distrain.strategies.fsdp.sharded_update import ShardedUpdate, ShardGroups
from distrain.strategies.tensor_parallel import divided_state
from distrain.strategies.tensor_parallel.cut import Cut
from distrain.strategies.tensor_parallel.divided_gradients import split_by_division
from distrain.strategies.tensor_parallel.options import TensorParallelConfig
from distrain.strategies.tensor_parallel.strategy import TensorParallel


class ScatteredDividedGradients(ScatteredGradients):
    """As :class:`~distrain.strategies.fsdp.scattered_gradients.ScatteredGradients` of a model with divided parameters.

    Args:
        blocks: Each with parts of parameters alone, or with whole parameters alone.
        divided: Names of the parameters that are divided.
        tensor_group: The ranks that have the parts.
        groups: The ranks that share each block.
        stopwatch: Records exposed communication.
    """

    def __init__(
        self,
        blocks: Sequence[FlatBlock],
        divided: Collection[str],
        tensor_group: Communicator,
        groups: ShardGroups,
        stopwatch: Stopwatch,
    ) -> None:
        self._divided, self._tensor_group = frozenset(divided), tensor_group
        super().__init__(blocks, groups, stopwatch)

    @override
    def norm(self) -> Tensor:
        """Euclidean norm over the gradients of the unsplit model, a scalar; all ranks of a replica call it together."""
        if not self._blocks:
            return torch.zeros(())
        first = self._blocks[0].gradient
        assert first is not None
        whole, divided = first.new_zeros(()), first.new_zeros(())
        for block in self._blocks:
            assert block.gradient is not None
            squares = torch.linalg.vector_norm(block.gradient).square()
            (divided if block.names[0] in self._divided else whole).add_(squares)
        sums = self._group.all_reduce(torch.stack([whole, divided]))
        return (sums[0] + self._tensor_group.all_reduce(sums[1].clone())).sqrt()


class ShardedTensorParallel(ShardedStrategy[TensorParallelConfig], TensorParallel):
    """Divided layers of which several ranks hold each part, and each of them updates its slices of it."""

    @override
    def _make_gradients(self) -> ReducedGradients:
        gradients: ReducedGradients | None = None
        if self._sharding.shard == OPTIMIZER:
            gradients = super()._make_gradients()
        else:
            self._choose_bucket_sizes()
        sizes = [size * MIB for size in self._bucket_sizing.sizes(self._gradient_bytes())]
        parts = split_by_division([*self.model.named_parameters()][::-1], self._cuts, *sizes)
        self._sharded = ShardedUpdate([self.model], parts, self._groups.shards, self.freezing)
        if gradients is None:
            gradients = ScatteredDividedGradients(
                self._sharded.blocks, self._cuts.keys(), self.tensor_group, self._groups, self.stopwatch
            )
        self._sharded.assign_gradients([gradients])
        return gradients

    @override
    def _rebuild_buckets(self) -> None:
        if isinstance(self.gradients, ScatteredGradients):
            self.gradients.rebuild()
        else:
            super()._rebuild_buckets()
        self._sharded.assign_gradients([self.gradients])

    @override
    def _update(self) -> bool:
        return self._gather_unless(super()._update())

    @override
    def _optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        _, scalars = super()._optimizer_state()
        # The tensors follow in `state_dict`.
        return {}, self._sharded.of_all_ranks(scalars, self.runtime.device)

    @override
    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self._groups.replicas.rank == 0:
            state["optimizer"] = saved_optimizer(
                self._sharded, self.optimizer, self._cuts, self.tensor_group, self.runtime.device
            )
        return state

    @override
    def _load_optimizer(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        self._sharded.load_optimizer(self.optimizer, tensors, scalars)


def saved_optimizer(
    sharded: ShardedUpdate,
    optimizer: torch.optim.Optimizer,
    cuts: Mapping[str, Cut],
    tensor_group: Communicator,
    device: torch.device,
) -> dict[str, Tensor]:
    """What this rank saves of an optimizer's tensors, each whole.

    They are gathered one by one, so that no rank has more than it saves and one tensor.

    Args:
        sharded: What the shard group shares.
        optimizer: Of this rank's slices.
        cuts: How parameters were cut.
        tensor_group: The ranks that have the parts; they and their shard groups call it together.
        device: On which ranks communicate.
    """
    found = {}
    parts = sharded.whole_optimizer_state(optimizer, device)
    for key, tensor in divided_state.gathered_optimizer(parts, cuts, tensor_group):
        place = sharded.place_of(key.rpartition("/")[0])
        # Of the ranks that have gathered the same tensor, that with its first slice saves it.
        if place is not None and place.slice.start == 0:
            found[key] = tensor
    return found
