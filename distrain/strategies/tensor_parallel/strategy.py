"""strategy=tensor_parallel: the layers of a model are divided among ranks, which train on the same batches.

Shoeybi et al. 2019, "Megatron-LM" (arXiv 1909.08053), §3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from distrain.checkpoint import module_state
from distrain.checkpoint.restore_report import RestoredPart
from distrain.communication.collectives import Communicator
from distrain.config.registry import register
from distrain.config.schema import Config
from distrain.errors import config_error
from distrain.gradients.buckets import ReducedGradients
from distrain.models.foreign import auxiliary_weight
from distrain.models.outputs import logits_of
from distrain.runtime.agreement import agreed
from distrain.strategies.base import MakeOptimizer
from distrain.strategies.data_parallel import DataParallel
from distrain.strategies.pipeline.traced_model import images_like
from distrain.strategies.precision import Precision
from distrain.strategies.tensor_parallel import divided_state, plan
from distrain.strategies.tensor_parallel.cut import Cut
from distrain.strategies.tensor_parallel.divided_gradients import DividedGradients
from distrain.strategies.tensor_parallel.divided_strategy import DividedStrategy
from distrain.strategies.tensor_parallel.layer_group import LayerGroup
from distrain.strategies.tensor_parallel.layers import divide
from distrain.strategies.tensor_parallel.options import TensorParallelConfig
from distrain.strategies.tensor_parallel.trial import SAMPLES, Trial
from distrain.tasks.base import Task

if TYPE_CHECKING:
    from distrain.runtime.runtime import Runtime


@register("strategy", "tensor_parallel", TensorParallelConfig)
class TensorParallel(DividedStrategy[TensorParallelConfig], DataParallel[TensorParallelConfig]):
    """Each rank holds a part of the channels of most layers, and everything else whole.

    The ranks of a replica, which are neighbours, run the same samples with the same random draws. Where divided layers
    begin and end, activations and their gradients are whole and equal on all of them, so what is whole is trained alike
    on each of them. Replicas share each batch, and sum their gradients as ddp's ranks do.
    """

    steps_alike = True
    slices_parameters = True
    divides_model = True
    # Activations are divided too, and only a step says how far.
    knows_memory = False

    def __init__(self, config: Config, runtime: Runtime) -> None:
        super().__init__(config, runtime)
        size = runtime.world.size
        ranks = self.options.ranks_of_replica(size)
        self.mesh = runtime.mesh({"data": size // ranks, "tensor": ranks} if ranks < size else {"tensor": ranks})
        self.tensor_group = Communicator(self.mesh.get_group("tensor") if self.mesh else None, self.ledger)
        if ranks < size:
            assert self.mesh is not None
            self.replicas = Communicator(self.mesh.get_group("data"), self.ledger)
        self.data_shard = (self.replicas.rank, self.replicas.size)
        self._layers = LayerGroup(self.tensor_group)
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
        return world_size // cls.options_of(config).ranks_of_replica(world_size)

    @override
    @classmethod
    def full_model_ranks(cls, config: Config, world_size: int) -> int:
        """None, since the whole model may not fit on a rank."""
        return 0

    # --- set-up ------------------------------------------------------------------------------------------------------

    @override
    def setup(self, model: nn.Module, task: Task, make_optimizer: MakeOptimizer, example: Tensor) -> None:
        everyone = self._setup_ranks
        self.sync_initial_state(model, everyone)
        if self.tensor_group.size > 1:
            trial = agreed(everyone, self.runtime, lambda: self._divide(model, example))
            problem = trial.difference(model, self._cuts, self._layers, self.runtime.device)
            # Groups whose ranks have different processors may find different things.
            agreed(everyone, self.runtime, lambda: self._refuse(problem))
            self._begin_with_divided(model)
        super().setup(model, task, make_optimizer, example)

    @property
    @override
    def _setup_ranks(self) -> Communicator:
        return self.runtime.communicator()

    @property
    @override
    def _passes_communicate(self) -> bool:
        return self.tensor_group.size > 1

    def _divide(self, model: nn.Module, example: Tensor) -> Trial:
        ranks, auxiliary = self.tensor_group.size, auxiliary_weight(self.config.model) > 0
        divisions = plan.find_divisions(model, example, self.precision, self.options, ranks, auxiliary=auxiliary)
        self._note_divisions(model, divisions)
        images = images_like(example, SAMPLES)
        # A copy: a model may write into its input.
        trial = Trial(model, lambda model: [logits_of(model(images.clone()))])
        self._layers = LayerGroup.for_model(model, self.tensor_group, self.stopwatch.communication)
        self._cuts = divide(model, divisions, self._layers)
        return trial

    def _begin_with_divided(self, model: nn.Module) -> None:
        """Called when the layers are divided, and before replicas communicate in any; all ranks call it together."""

    def _refuse(self, problem: str) -> None:
        if problem:
            raise config_error("strategy.plan", f"{problem}; leave layers out by strategy.plan={{NAME: replicated}}")

    @override
    def _make_gradients(self) -> ReducedGradients:
        sizes = self._choose_bucket_sizes()
        gradients = DividedGradients(
            self.model.named_parameters(),
            self._cuts.keys(),
            self.tensor_group,
            self.replicas,
            self.compressor,
            self.stopwatch,
            sizes,
        )
        self._bucket_sizing.log_choice([bucket.bytes for bucket in gradients.buckets])
        return gradients

    @override
    def _gradient_bytes(self) -> int:
        return largest(super()._gradient_bytes(), self.tensor_group, self.runtime.device)

    # --- the step ----------------------------------------------------------------------------------------------------

    @override
    def begin_epoch(self, epoch: int) -> None:
        super().begin_epoch(epoch)
        self._share_wholes({**module_state.read(self.model).tensors, **self.kept_parameters()})

    # --- state -------------------------------------------------------------------------------------------------------

    @override
    def model_state(self) -> dict[str, Tensor]:
        return divided_state.gathered_model(super().model_state(), self._cuts, self.tensor_group, everywhere=True)

    @override
    def state_dict(self) -> dict[str, Any]:
        self._prepare_model_state()
        return divided_state.gathered(super().state_dict(), self._cuts, self.tensor_group)

    @override
    def load_state_dict(self, saved: Mapping[str, Any]) -> list[RestoredPart]:
        rank = self.tensor_group.rank
        own = self.runtime.world.rank if self.is_arranged_as(saved["layout"]) else None
        parts = {
            "model": divided_state.parts_of_model(saved["model"], self._cuts, rank),
            "optimizer": divided_state.parts_of_optimizer(saved["optimizer"], self._cuts, rank),
            "compressor": divided_state.parts_of_compressors(saved["compressor"], self._cuts, self.tensor_group, own),
        }
        return super().load_state_dict({**saved, **parts})


def largest(size: int, group: Communicator, device: torch.device) -> int:
    """The largest of the ranks' numbers; all ranks of the group call it together."""
    return int(group.all_reduce(torch.tensor(size, device=device), "max"))
