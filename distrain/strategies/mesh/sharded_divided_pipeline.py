"""A pipeline that divides the layers of its stages, of which several ranks share what updates each part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from typing_extensions import override

from distrain.checkpoint import named_state
from distrain.checkpoint.module_state import ModuleState
from distrain.strategies.fsdp.flat_block import FlatBlock
from distrain.strategies.fsdp.scattered_gradients import ScatteredGradients
from distrain.strategies.mesh.divided_pipeline import DividedPipeline
from distrain.strategies.pipeline.options import PipelineConfig
from distrain.strategies.pipeline.sharded import ShardedPipeline
from distrain.strategies.pipeline.stage import Stage
from distrain.strategies.pipeline.strategy import Pipeline
from distrain.strategies.tensor_parallel.divided_gradients import split_by_division
from distrain.strategies.tensor_parallel.sharded_division import ScatteredDividedGradients, ShardedDivision


class ShardedDividedPipeline(ShardedDivision[PipelineConfig], ShardedPipeline, DividedPipeline):
    """As both; a checkpoint has whole tensors, which the ranks of a stage put together one by one."""

    @override
    def _parts_of(self, stage: Stage) -> list[list[tuple[str, nn.Parameter]]]:
        return split_by_division([*stage.module.named_parameters()][::-1], self._cuts, *self._limits_of(stage))

    @override
    def _scatter(self, blocks: Sequence[FlatBlock]) -> ScatteredGradients:
        return ScatteredDividedGradients(blocks, self._cuts.keys(), self.tensor_group, self._groups, self.stopwatch)

    @override
    def _saved_tensors(self, states: Sequence[ModuleState]) -> dict[str, Any]:
        _, scalars = named_state.optimizer_state(self.optimizer, self._names)
        scalars = self._sharded.of_all_ranks(scalars, self.runtime.device)
        saved = self._without_parameters(Pipeline._saved_tensors(self, states))
        return {**saved, "scalars": {"optimizer": scalars}}
