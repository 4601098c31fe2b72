"""strategy=tensor_parallel: the layers of a model are divided among ranks, which train on the same batches.

Shoeybi et al. 2019, "Megatron-LM" (arXiv 1909.08053), §3.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from distrain.checkpoint import module_state, named_state
from distrain.checkpoint.restore_report import RestoredPart
from distrain.communication.collectives import Communicator, digest
from distrain.config.registry import register
from distrain.config.schema import Config
from distrain.errors import config_error
from distrain.gradients.buckets import ReducedGradients
from distrain.models.foreign import auxiliary_weight
from distrain.strategies.base import MakeOptimizer, StepResult
from distrain.strategies.precision import Precision
from distrain.strategies.replicated import Replicated
from distrain.strategies.tensor_parallel import divided_state, plan
from distrain.strategies.tensor_parallel.cut import Cut, model_format
from distrain.strategies.tensor_parallel.divided_gradients import DividedGradients
from distrain.strategies.tensor_parallel.layer_group import LayerGroup
from distrain.strategies.tensor_parallel.layers import divide
from distrain.strategies.tensor_parallel.options import TensorParallelConfig
from distrain.strategies.tensor_parallel.trial import Trial
from distrain.tasks.base import Task

if TYPE_CHECKING:
    from distrain.data.batch import Batch
    from distrain.runtime.runtime import Runtime

log = logging.getLogger(__name__)


@register("strategy", "tensor_parallel", TensorParallelConfig)
class TensorParallel(Replicated[TensorParallelConfig]):
    """Each rank holds a part of the channels of most layers, and everything else whole.

    All ranks run the same samples with the same random draws. Where divided layers begin and end, activations and their
    gradients are whole and equal on all ranks, so what is whole is trained alike on each of them without an exchange.
    """

    steps_alike = True
    slices_parameters = True
    divides_model = True
    # Activations are divided too, and only a step says how far.
    knows_memory = False

    def __init__(self, config: Config, runtime: Runtime) -> None:
        super().__init__(config, runtime)
        self.mesh = runtime.mesh({"tensor": runtime.world.size})
        self.tensor_group = Communicator(self.mesh.get_group("tensor") if self.mesh else None, self.ledger)
        self._bytes_of_step = 0
        self._cuts: dict[str, Cut] = {}

    @override
    @classmethod
    def check(cls, config: Config, world_size: int) -> None:
        cls.options_of(config).check(config, world_size)

    @override
    @classmethod
    def check_model(cls, config: Config, model: nn.Module) -> None:
        plan.check_patterns(cls.options_of(config), model)

    @override
    @classmethod
    def check_passes(cls, config: Config, model: nn.Module, images: Tensor, precision: Precision) -> None:
        auxiliary = auxiliary_weight(config.model) > 0
        plan.find_divisions(model, images, precision, cls.options_of(config), 1, auxiliary=auxiliary)

    @override
    @classmethod
    def data_parallel_size(cls, config: Config, world_size: int) -> int:
        return 1

    @override
    @classmethod
    def full_model_ranks(cls, config: Config, world_size: int) -> int:
        """None, since the whole model may not fit on a rank."""
        return 0

    # --- set-up ------------------------------------------------------------------------------------------------------

    @override
    def setup(self, model: nn.Module, task: Task, make_optimizer: MakeOptimizer, example: Tensor) -> None:
        self.sync_initial_state(model, self.tensor_group)
        if self.tensor_group.size > 1:
            self._divide(model, example)
        super().setup(model, task, make_optimizer, example)

    def _divide(self, model: nn.Module, example: Tensor) -> None:
        ranks, auxiliary = self.tensor_group.size, auxiliary_weight(self.config.model) > 0
        divisions = plan.find_divisions(model, example, self.precision, self.options, ranks, auxiliary=auxiliary)
        log.info("%s", plan.describe(model, divisions, ranks))
        if any(isinstance(module, nn.TransformerEncoderLayer) for module in model.modules()):
            # In evaluation its own code reads its weights, which it has a part of only.
            torch.backends.mha.set_fastpath_enabled(False)
        trial = Trial(model, example)
        group = LayerGroup(self.tensor_group, self.stopwatch.communication, model_format(model))
        self._cuts = divide(model, divisions, group)
        if problem := trial.difference(model):
            raise config_error("strategy.plan", f"{problem}; leave layers out by strategy.plan={{NAME: replicated}}")

    @override
    def _make_gradients(self) -> ReducedGradients:
        return DividedGradients(
            self.model.named_parameters(),
            self._cuts.keys(),
            self.tensor_group,
            self.replicas,
            self.compressor,
            self.stopwatch,
        )

    # --- the step ----------------------------------------------------------------------------------------------------

    @override
    def begin_epoch(self, epoch: int) -> None:
        super().begin_epoch(epoch)
        self._compare_wholes()

    @torch.no_grad()
    def _compare_wholes(self) -> None:
        """Gives all ranks the first one's values of what is whole, if they have come apart.

        They compute the same numbers, but processors of different kinds may round in different ways.
        """
        state = module_state.read(self.model).tensors
        wholes = {name: tensor for name, tensor in state.items() if name not in self._cuts}
        hashes = self.tensor_group.all_gather(digest(wholes.values()).to(self.runtime.device))
        if any(bool(other != hashes[0]) for other in hashes):
            log.warning("the ranks' processors round differently: all take the parameters that are whole from rank 0")
            for tensor in wholes.values():
                tensor.copy_(self.tensor_group.broadcast(tensor.contiguous()))

    @override
    def train_step(self, batch: Batch) -> StepResult:
        before = self.ledger.total()
        result = super().train_step(batch)
        self._bytes_of_step = self.ledger.total() - before
        return self._counted_once(result)

    @override
    def eval_step(self, batch: Batch) -> StepResult:
        return self._counted_once(super().eval_step(batch))

    def _counted_once(self, result: StepResult) -> StepResult:
        """Results that are equal on all ranks, on the first rank alone: sums over the ranks must count them once."""
        if self.tensor_group.rank == 0:
            return result
        sums = torch.zeros_like(result.loss_sum), torch.zeros_like(result.metric_sums)
        return StepResult(*sums, 0, skipped=result.skipped)

    @override
    def uncompressed_bytes_per_step(self) -> int:
        return self._bytes_of_step

    # --- state -------------------------------------------------------------------------------------------------------

    @override
    def model_state(self) -> dict[str, Tensor]:
        return divided_state.gathered_model(super().model_state(), self._cuts, self.tensor_group, everywhere=True)

    @override
    def state_dict(self) -> dict[str, Any]:
        self._prepare_model_state()
        tensors, scalars = named_state.optimizer_state(self.optimizer, self._names)
        model = module_state.read(self.model).tensors
        return {
            **self._saved({}, scalars),
            "model": divided_state.gathered_model(model, self._cuts, self.tensor_group, everywhere=False),
            "optimizer": divided_state.gathered_optimizer(tensors, self._cuts, self.tensor_group),
        }

    @override
    def load_state_dict(self, saved: Mapping[str, Any]) -> list[RestoredPart]:
        rank = self.tensor_group.rank
        model = divided_state.parts_of_model(saved["model"], self._cuts, rank)
        optimizer = divided_state.parts_of_optimizer(saved["optimizer"], self._cuts, rank)
        return super().load_state_dict({**saved, "model": model, "optimizer": optimizer})
