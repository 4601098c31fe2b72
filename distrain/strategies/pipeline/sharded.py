"""A pipeline whose ranks of the same stage share its optimizer state, or its gradients too, instead of copying them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from distrain.checkpoint.module_state import ModuleState
from distrain.gradients.bucket_sizes import MIB
from distrain.gradients.buckets import ReducedGradients, split_into_buckets
from distrain.strategies.fsdp.flat_block import FlatBlock
from distrain.strategies.fsdp.options import OPTIMIZER
from distrain.strategies.fsdp.scattered_gradients import ScatteredGradients
from distrain.strategies.fsdp.sharded_strategy import ShardedStrategy
from distrain.strategies.fsdp.sharded_update import ShardedUpdate
from distrain.strategies.pipeline.options import PipelineConfig
from distrain.strategies.pipeline.stage import Stage
from distrain.strategies.pipeline.strategy import Pipeline


class ShardedPipeline(ShardedStrategy[PipelineConfig], Pipeline):
    """A pipeline of which several ranks hold each stage, and each of them updates its part of the stage.

    Parameters stay whole on each of these ranks, since every microbatch passes through all of a stage.
    """

    @override
    def _gradients_of_stages(self) -> dict[int, ReducedGradients]:
        parts = [part for stage in self.stages.values() for part in self._parts_of(stage)]
        self._sharded = ShardedUpdate(self._modules, parts, self._groups.shards, self.freezing)
        gradients: dict[int, ReducedGradients] = {}
        if self._sharding.shard == OPTIMIZER:
            gradients = super()._gradients_of_stages()
        else:
            for index, stage in self.stages.items():
                names = {name for name, _ in stage.module.named_parameters()}
                gradients[index] = self._scatter([block for block in self._sharded.blocks if block.names[0] in names])
        self._sharded.assign_gradients(gradients.values())
        return gradients

    def _parts_of(self, stage: Stage) -> list[list[tuple[str, nn.Parameter]]]:
        """The parameters of each block of a stage, in the order in which their gradients are sent."""
        return split_into_buckets([*stage.module.named_parameters()][::-1], *self._limits_of(stage))

    def _limits_of(self, stage: Stage) -> tuple[float, float, float]:
        first, others, last = self._sizes_of(stage)
        return first * MIB, others * MIB, last * MIB

    def _scatter(self, blocks: Sequence[FlatBlock]) -> ScatteredGradients:
        return ScatteredGradients(blocks, self._groups, self.stopwatch)

    @override
    def _rebuild_buckets(self) -> None:
        if self._sharding.shard == OPTIMIZER:
            super()._rebuild_buckets()
        for gradients in self.gradients.values():
            if isinstance(gradients, ScatteredGradients):
                gradients.rebuild()
        self._sharded.assign_gradients(self.gradients.values())

    @override
    def _update(self) -> bool:
        return self._gather_unless(super()._update())

    @override
    def uncompressed_bytes_per_step(self) -> int:
        return super().uncompressed_bytes_per_step() + self._sharded.bytes_to_gather(self._sharded.trained_bytes)

    @override
    def saved_part(self, name: str, kept: Tensor) -> Tensor:
        place = self._sharded.place_of(name)
        return kept if place is None else place.of_whole(kept)

    @override
    def _saved_tensors(self, states: Sequence[ModuleState]) -> dict[str, Any]:
        saved = super()._saved_tensors(states)
        names, saves = [name for state in states for name in state.tensors], self._groups.replicas.rank == 0
        self._sharded.add_to(saved, names, self.optimizer, self.runtime.device, saves=saves)
        return saved

    @override
    def _load_optimizer(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        self._sharded.load_optimizer(self.optimizer, tensors, scalars)
