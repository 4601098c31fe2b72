"""Divided layers of which several ranks hold each part, and share what ``strategy.shard`` says of it."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from distrain.checkpoint import module_state
from distrain.gradients.bucket_sizes import MIB
from distrain.gradients.buckets import ReducedGradients
from distrain.strategies.base import MakeOptimizer
from distrain.strategies.fsdp import module_blocks
from distrain.strategies.fsdp.gathering_strategy import GatheringStrategy
from distrain.strategies.fsdp.module_blocks import OBSERVED_SAMPLES, ModuleBlock
from distrain.strategies.fsdp.options import OPTIMIZER
from distrain.strategies.fsdp.sharded_update import ShardedUpdate
from distrain.strategies.tensor_parallel.agreement import Apart, WatchedRun
from distrain.strategies.tensor_parallel.divided_gradients import split_by_division
from distrain.strategies.tensor_parallel.options import TensorParallelConfig
from distrain.strategies.tensor_parallel.sharded_division import ScatteredDividedGradients, ShardedDivision
from distrain.strategies.tensor_parallel.strategy import TensorParallel
from distrain.tasks.base import Task

log = logging.getLogger(__name__)


class ShardedTensorParallel(
    GatheringStrategy[TensorParallelConfig], ShardedDivision[TensorParallelConfig], TensorParallel
):
    """Divided layers of which several ranks hold each part, and each of them updates its slices of it.

    With ``shard=full`` the ranks of a shard group gather parts of parameters where passes use them. All ranks do so at
    the same places among the exchanges of divided layers, since they have the same blocks.
    """

    # --- set-up ------------------------------------------------------------------------------------------------------

    @override
    def setup(self, model: nn.Module, task: Task, make_optimizer: MakeOptimizer, example: Tensor) -> None:
        self._observed = example.new_zeros(OBSERVED_SAMPLES, *example.shape[1:])
        super().setup(model, task, make_optimizer, example)

    @override
    def _begin_with_divided(self, model: nn.Module) -> None:
        if self._shards_parameters:
            # The calls of divided layers are not those of whole ones.
            self._module_blocks = self._choose_module_blocks(model)

    def _choose_module_blocks(self, model: nn.Module) -> list[ModuleBlock]:
        root, problem = module_blocks.Call("", parameters=[name for name, _ in model.named_parameters()]), ""
        try:
            run = WatchedRun(self.tensor_group, self.runtime.device)
            with self._layers.watched(run), self.precision.autocast():
                root, problem = run.run(lambda: module_blocks.observe(model, self._observed))
        except Apart as apart:
            problem = str(apart)
        module_blocks.warn_if(problem)
        chosen = module_blocks.blocks_of_model(model, root, self._sharding.block_mb)
        return module_blocks.agreed(chosen, self.training_group, self.runtime.device)

    @override
    def _make_gradients(self) -> ReducedGradients:
        gradients: ReducedGradients | None = None
        if self._sharding.shard == OPTIMIZER:
            gradients = super()._make_gradients()
        else:
            self._choose_bucket_sizes()
        named, value_of = dict(self.model.named_parameters()), None
        if self._shards_parameters:
            parts = [[(name, named[name]) for name in block.parameters] for block in self._module_blocks]
            value_of = torch.detach
        else:
            sizes = [size * MIB for size in self._bucket_sizing.sizes(self._gradient_bytes())]
            parts = split_by_division([*named.items()][::-1], self._cuts, *sizes)
        self._sharded = ShardedUpdate(
            [self.model], parts, self._groups.shards, self.freezing, value_of, divided=self._cuts
        )
        if gradients is None:
            gradients = self._scatter()
        self._sharded.assign_gradients([gradients])
        return gradients

    def _scatter(self) -> ScatteredDividedGradients:
        blocks, divided = self._sharded.blocks, self._cuts.keys()
        if not self._shards_parameters:
            return ScatteredDividedGradients(blocks, divided, self.tensor_group, self._groups, self.stopwatch)
        self._gatherer = self._make_gatherer(self._module_blocks, reshards=self._sharding.reshard_after_forward)
        log.info(
            "shard=full: parts of parameters in %d blocks, each of which %d ranks share",
            len(blocks),
            self._groups.shards.size,
        )
        return ScatteredDividedGradients(
            blocks[::-1], divided, self.tensor_group, self._groups, self.stopwatch, self._gatherer.pass_over
        )

    # --- state -------------------------------------------------------------------------------------------------------

    @override
    def _optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, scalars = super()._optimizer_state()
        return tensors, self._sharded.of_all_ranks(scalars, self.runtime.device)

    @override
    def _saved(self, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> dict[str, Any]:
        # A module that saves its state in its own way needs all its parameters for that.
        with nullcontext() if module_state.has_plain_state(self.model) else self._whole_model():
            return self._without_parameters(super()._saved(tensors, scalars))
