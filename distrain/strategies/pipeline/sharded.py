"""A pipeline whose ranks of the same stage share what ``strategy.shard`` says of it, instead of copying it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from distrain.checkpoint import module_state
from distrain.checkpoint.module_state import ModuleState
from distrain.gradients.bucket_sizes import MIB
from distrain.gradients.buckets import ReducedGradients, split_into_buckets
from distrain.strategies.base import StepResult
from distrain.strategies.fsdp.flat_block import FlatBlock
from distrain.strategies.fsdp.options import OPTIMIZER
from distrain.strategies.fsdp.scattered_gradients import ScatteredGradients
from distrain.strategies.fsdp.sharded_strategy import ShardedStrategy
from distrain.strategies.fsdp.sharded_update import ShardedUpdate
from distrain.strategies.pipeline.options import PipelineConfig
from distrain.strategies.pipeline.stage import Stage
from distrain.strategies.pipeline.strategy import Pipeline

if TYPE_CHECKING:
    from distrain.data.batch import Batch, Targets

log = logging.getLogger(__name__)


class ShardedPipeline(ShardedStrategy[PipelineConfig], Pipeline):
    """A pipeline of which several ranks hold each stage, and each of them updates its part of the stage.

    With ``shard=full`` the ranks of a stage gather its parameters once for all passes of a step: the ranks may have
    different numbers of microbatches, so they could not gather them for each pass together.
    """

    @override
    def _gradients_of_stages(self) -> dict[int, ReducedGradients]:
        parts = [part for stage in self.stages.values() for part in self._parts_of(stage)]
        value_of = torch.detach if self._shards_parameters else None
        self._sharded = ShardedUpdate(self._modules, parts, self._groups.shards, self.freezing, value_of)
        blocks: dict[int, list[FlatBlock]] = {}
        for index, stage in self.stages.items():
            names = {name for name, _ in stage.module.named_parameters()}
            blocks[index] = [block for block in self._sharded.blocks if block.names[0] in names]
        if self._shards_parameters:
            for index, stage in self.stages.items():
                stage.before_pass = functools.partial(self._begin_pass, blocks[index])
            self._log_gathering()
        gradients: dict[int, ReducedGradients]
        if self._sharding.shard == OPTIMIZER:
            gradients = super()._gradients_of_stages()
        else:
            gradients = {index: self._scatter(of_stage) for index, of_stage in blocks.items()}
        self._sharded.assign_gradients(gradients.values())
        return gradients

    def _log_gathering(self) -> None:
        resharding = ", whatever strategy.reshard_after_forward says" if self._sharding.reshard_after_forward else ""
        log.info("shard=full: the parameters of a stage are gathered once a step, and kept to its end%s", resharding)

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

    # --- parameters that are gathered --------------------------------------------------------------------------------

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        """In this block the stages have their parameters; all ranks of a shard group enter it together.

        A stage waits for them before its first pass, so that they travel while the stages before it compute.
        """
        if not self._shards_parameters:
            yield
            return
        with self.stopwatch.communication():
            for block in self._sharded.blocks:
                block.start_gathering()
        yield
        # Not after an error, since a block waits for what is still under way, and the other ranks may be gone.
        for block in self._sharded.blocks:
            block.detach()

    def _begin_pass(self, blocks: Sequence[FlatBlock]) -> None:
        """Waits for a stage's parameters before its first pass."""
        if all(block.is_attached for block in blocks):
            return
        with self.stopwatch.communication():
            for block in blocks:
                block.attach()

    @contextmanager
    def _whole_stages(self, *, writes: bool = False) -> Iterator[None]:
        """As :meth:`_gathered`, with all parameters there from the beginning.

        Args:
            writes: The parameters are written to, to the same values on all ranks.
        """
        with self._gathered():
            if self._shards_parameters:
                for block in self._sharded.blocks:
                    block.attach()
            yield
            if self._shards_parameters and writes:
                for block in self._sharded.blocks:
                    block.take_part_again()

    @override
    def _run_passes(self, pieces: list[tuple[Tensor, Targets]], batch: Batch) -> tuple[Tensor, Tensor]:
        with self._gathered():
            return super()._run_passes(pieces, batch)

    @override
    def eval_step(self, batch: Batch) -> StepResult:
        with self._gathered():
            return super().eval_step(batch)

    @override
    def _update(self) -> bool:
        skipped = super()._update()
        if not skipped and not self._shards_parameters:
            with self.stopwatch.communication():
                self._sharded.gather_updated()
        return skipped

    @override
    def uncompressed_bytes_per_step(self) -> int:
        sharded = self._sharded
        gathered = sum(block.bytes for block in sharded.blocks) if self._shards_parameters else sharded.trained_bytes
        return super().uncompressed_bytes_per_step() + sharded.bytes_to_gather(gathered)

    # --- state -------------------------------------------------------------------------------------------------------

    @override
    def _own_model_state(self) -> dict[str, Tensor]:
        with self._whole_stages():
            return super()._own_model_state()

    @override
    def saved_part(self, name: str, kept: Tensor) -> Tensor:
        return self._sharded.saved_part(name, kept, self.runtime.device, sliced=self._shards_parameters)

    @override
    def state_dict(self) -> dict[str, Any]:
        # A module that saves its state in its own way needs all its parameters for that.
        is_plain = all(module_state.has_plain_state(module) for module in self._modules)
        with nullcontext() if is_plain else self._whole_stages():
            return super().state_dict()

    @override
    def _saved_tensors(self, states: Sequence[ModuleState]) -> dict[str, Any]:
        saved = super()._saved_tensors(states)
        self._sharded.add_to(saved, self.optimizer, self.runtime.device, saves=self._groups.replicas.rank == 0)
        return saved

    @override
    def _load_model(self, tensors: Mapping[str, Tensor], plain: dict[str, Any] | None) -> None:
        with self._whole_stages(writes=True):
            super()._load_model(tensors, plain)

    @override
    def _load_optimizer(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        self._sharded.load_optimizer(self.optimizer, tensors, scalars)
