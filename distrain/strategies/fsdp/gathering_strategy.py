"""What strategies have in common whose ranks run the whole forward pass, and may keep slices of parameters alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from distrain.checkpoint import module_state
from distrain.checkpoint.saved_tensors import described
from distrain.data.sampler import accumulated_pieces
from distrain.files import mapped_memory
from distrain.models.outputs import logits_of
from distrain.strategies.base import MakeOptimizer, OptionsT_co, StepResult
from distrain.strategies.fsdp import sliced_state
from distrain.strategies.fsdp.gatherer import Gatherer
from distrain.strategies.fsdp.module_blocks import ModuleBlock
from distrain.strategies.fsdp.scattered_gradients import ScatteredGradients
from distrain.strategies.fsdp.sharded_update import ShardedUpdate
from distrain.strategies.replicated import Replicated
from distrain.tasks.base import Task

if TYPE_CHECKING:
    from distrain.data.batch import Batch


class GatheringStrategy(Replicated[OptionsT_co]):
    """The first base class of a strategy whose ranks update slices of the parameters of a model that each of them runs.

    With ``shard=full`` the parameters are gathered block by block where passes use them; else every rank has them, and
    they are gathered after each update.
    """

    _sharded: ShardedUpdate
    #: Only with ``shard=full``.
    _gatherer: Gatherer | None = None

    # --- set-up ------------------------------------------------------------------------------------------------------

    @override
    def setup(self, model: nn.Module, task: Task, make_optimizer: MakeOptimizer, example: Tensor) -> None:
        super().setup(model, task, make_optimizer, example)
        if self._gatherer is not None:
            self._gatherer.gather_for_recomputed(model)
        # A sample for passes of an evaluation in which this rank has none.
        self._stand_in = example.new_zeros(1, *example.shape[1:])

    def _make_gatherer(self, module_blocks: Sequence[ModuleBlock], *, reshards: bool) -> Gatherer:
        """Gathers blocks of parameters in passes.

        Args:
            module_blocks: What the parts of :attr:`_sharded` were made of.
            reshards: As ``strategy.reshard_after_forward``.
        """
        uses, first = [], 0
        with_parameters = [block for block in module_blocks if block.parameters]
        for module_block, blocks in zip(with_parameters, self._sharded.blocks_of_parts, strict=True):
            modules = [self.model.get_submodule(name) for name in module_block.modules]
            uses.append((modules, first, first + len(blocks) - 1))
            first += len(blocks)
        return Gatherer(self.model, self._sharded.blocks, uses, self.stopwatch, reshard_after_forward=reshards)

    @override
    def _updated_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [*self._sharded.slices.items()]

    @override
    def _rebuild_buckets(self) -> None:
        if isinstance(self.gradients, ScatteredGradients):
            self.gradients.rebuild()
            if self._gatherer is not None:
                self._gatherer.rebuild()
        else:
            super()._rebuild_buckets()
        self._sharded.assign_gradients([self.gradients])

    # --- the step ----------------------------------------------------------------------------------------------------

    @override
    def _accumulate(self, batch: Batch, count: int, *, sends: bool) -> StepResult:
        if self._gatherer is not None:
            # First, so that the last pieces, after which gradients are sent, coincide.
            pieces = accumulated_pieces(self.config.trainer.largest_pass, batch.global_count, self.data_shard[1])
            for _ in range(pieces - len(self._pieces(batch))):
                self._gatherer.pass_without_samples()
        return super()._accumulate(batch, count, sends=sends)

    @override
    def _update(self) -> bool:
        if self._gatherer is not None:
            self._gatherer.end_step()
        skipped = super()._update()
        if self._gatherer is None and not skipped:
            with self.stopwatch.communication():
                self._sharded.gather_updated()
        return skipped

    @override
    def eval_step(self, batch: Batch) -> StepResult:
        if len(batch) or self._gatherer is None or self._evaluates_together:
            return super().eval_step(batch)
        self._prepare_model_state()
        self._forward.eval()
        # The others gather blocks, so this rank runs a sample that is not counted.
        with torch.no_grad(), self.precision.autocast():
            self.task.evaluate(lambda inputs: logits_of(self._forward(inputs)), self._stand_in)
        return self._no_samples()

    @override
    def uncompressed_bytes_per_step(self) -> int:
        gathered = self._sharded.trained_bytes if self._gatherer is None else sum(self._gatherer.bytes_per_pass)
        return super().uncompressed_bytes_per_step() + self._sharded.bytes_to_gather(gathered)

    # --- state -------------------------------------------------------------------------------------------------------

    @contextmanager
    def _whole_model(self, *, writes: bool = False) -> Iterator[None]:
        """Inside this block the model has all its parameters on every rank; all ranks enter it together.

        Args:
            writes: The parameters are written to, to the same values on all ranks.
        """
        if self._gatherer is not None:
            for block in self._sharded.blocks:
                block.attach()
        try:
            yield
            if writes and self._gatherer is not None:
                for block in self._sharded.blocks:
                    block.take_part_again()
        finally:
            if self._gatherer is not None:
                for block in self._sharded.blocks:
                    block.detach()

    @override
    def model_state(self) -> dict[str, Tensor]:
        with self._whole_model():
            state = super().model_state()
            return {name: tensor.clone() for name, tensor in state.items()} if self._gatherer else state

    @override
    def _load_model(self, tensors: Mapping[str, Tensor], plain: dict[str, Any] | None) -> None:
        if self._gatherer is not None and module_state.has_plain_state(self.model):
            self._load_parts(tensors, plain)
        else:
            with self._whole_model(writes=True):
                super()._load_model(tensors, plain)

    @torch.no_grad()
    def _load_parts(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any] | None) -> None:
        """Loads a saved model without ever having more of it than this rank's slices and one tensor.

        Raises:
            ValueError: Names or shapes differ from the model's.
        """
        sharded = self._sharded
        shapes = {name: block.shapes[index] for block in sharded.blocks for index, name in enumerate(block.names)}
        own = {name: sliced_state.shaped(shapes[first]) for name, first in sharded.first_names.items()}
        module_state.check_entries({**self.model.state_dict(), **own}, described(tensors))
        others = {name: tensors[name] for name in tensors if name not in sharded.first_names}
        module_state.load(self.model, others, plain, apart=sharded.first_names)
        for name, place in sharded.places.items():
            place.part.copy_(place.of_whole(tensors[name]))
            mapped_memory.release(place.part)

    @override
    def _load_optimizer(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        self._sharded.load_optimizer(self.optimizer, tensors, scalars)
