"""A pipeline whose ranks divide the layers of their stages among each other.

Where a stage ends activations are whole, and each rank of a stage hands them to the rank of the next one that has the
same number in its group.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from distrain.checkpoint.restore_report import RestoredPart
from distrain.communication.collectives import Communicator
from distrain.config.schema import Config
from distrain.errors import config_error
from distrain.gradients.bucket_sizes import BucketSizes
from distrain.gradients.buckets import Gradients
from distrain.models.foreign import auxiliary_weight
from distrain.models.outputs import logits_of
from distrain.runtime.agreement import agreed
from distrain.strategies.base import MakeOptimizer
from distrain.strategies.mesh.options import MeshPipelineConfig
from distrain.strategies.pipeline.blocks import ActivationSpec, flatten, part_of
from distrain.strategies.pipeline.options import PipelineConfig
from distrain.strategies.pipeline.strategy import Pipeline
from distrain.strategies.pipeline.traced_model import images_like
from distrain.strategies.precision import Precision
from distrain.strategies.recomputation import set_up
from distrain.strategies.recomputation.block import recompute
from distrain.strategies.tensor_parallel import divided_state, plan
from distrain.strategies.tensor_parallel.cut import Cut
from distrain.strategies.tensor_parallel.divided_gradients import DividedGradients
from distrain.strategies.tensor_parallel.divided_strategy import DividedStrategy
from distrain.strategies.tensor_parallel.layer_group import LayerGroup
from distrain.strategies.tensor_parallel.layers import Division, divide
from distrain.strategies.tensor_parallel.strategy import largest
from distrain.strategies.tensor_parallel.trial import SAMPLES, Trial
from distrain.tasks.base import Task

if TYPE_CHECKING:
    from distrain.runtime.runtime import Runtime


class DividedPipeline(DividedStrategy[PipelineConfig], Pipeline):
    """Each rank holds a part of the channels of its stages' layers, and what is not divided whole.

    The ranks of a stage, which are neighbours, run the same microbatches with the same random draws.
    """

    slices_parameters = True

    def __init__(self, config: Config, runtime: Runtime) -> None:
        super().__init__(config, runtime)
        assert self.mesh is not None
        self.tensor_group = Communicator(self.mesh.get_group("tensor"), self.ledger)
        self._cuts: dict[str, Cut] = {}

    @classmethod
    def _dividing(cls, config: Config) -> MeshPipelineConfig:
        return cast(MeshPipelineConfig, cls.options_of(config))

    @override
    def _mesh_shape(self) -> dict[str, int]:
        replicas = self.data_parallel_size(self.config, self.runtime.world.size)
        options = self._dividing(self.config)
        return {"data": replicas, "pipeline": options.ranks, "tensor": options.tensor}

    @override
    @classmethod
    def check(cls, config: Config, world_size: int) -> None:
        super().check(config, world_size)
        cls._dividing(config).check(config, world_size)

    @override
    @classmethod
    def check_model(cls, config: Config, model: nn.Module) -> None:
        super().check_model(config, model)
        plan.check_patterns(cls._dividing(config), model)

    @override
    @classmethod
    def check_passes(cls, config: Config, model: nn.Module, images: Tensor, precision: Precision) -> None:
        super().check_passes(config, model, images, precision)
        auxiliary = auxiliary_weight(config.model) > 0
        plan.find_divisions(model, images, precision, cls._dividing(config), 1, auxiliary=auxiliary)

    @override
    @classmethod
    def data_parallel_size(cls, config: Config, world_size: int) -> int:
        return world_size // cls._dividing(config).ranks_of_replica(world_size)

    # --- set-up ------------------------------------------------------------------------------------------------------

    @override
    def setup(self, model: nn.Module, task: Task, make_optimizer: MakeOptimizer, example: Tensor) -> None:
        self._layers = LayerGroup.for_model(model, self.tensor_group, self.stopwatch.communication)
        # Of all stages, once it is known where they begin.
        self._divisions: dict[str, Division] | None = None
        self._whole, self._example = model, example
        super().setup(model, task, make_optimizer, example)
        del self._whole, self._example

    @override
    def _recompute(self, model: nn.Module, example: Tensor) -> None:
        # A block that is computed again is a module of another class, so it is made one after it was divided.
        self._recomputed = set_up.chosen_blocks(self.config, model, example, self.precision.autocast)

    @override
    def _part(self, index: int, model: nn.Sequential) -> nn.Module:
        part, everyone = super()._part(index, model), self.runtime.communicator()
        own = self._modules_of(part)
        trial = agreed(everyone, self.runtime, lambda: self._divide(index, model, part, own))
        problem = trial.difference(part, self._cuts, self._layers, self.runtime.device)
        # A stage may fail alone.
        agreed(everyone, self.runtime, lambda: self._refuse(problem))
        for name in self._recomputed:
            if name in own:
                recompute(name, part.get_submodule(name))
        return part

    def _divide(self, index: int, model: nn.Sequential, part: nn.Module, own: Collection[str]) -> Trial:
        """Divides the layers of a stage, those among its own modules; returns what it computed before."""
        if self._divisions is None:
            self._divisions = self._find_divisions(model)
        trial = Trial(part, lambda module: self._try_stage(index, module))
        divisions = {name: division for name, division in self._divisions.items() if name in own}
        self._cuts |= divide(part, divisions, self._layers)
        return trial

    def _refuse(self, problem: str) -> None:
        if problem:
            advice = "leave layers out by strategy.plan={NAME: replicated}, or choose other strategy.boundaries"
            raise config_error("strategy.plan", f"in a stage {problem}; {advice}")

    def _modules_of(self, part: nn.Module) -> frozenset[str]:
        """Names of the model's modules that a part of it has as they are; others it may have made of their pieces."""
        whole = dict(self._whole.named_modules())
        return frozenset(name for name, module in part.named_modules() if name and whole.get(name) is module)

    def _find_divisions(self, model: nn.Sequential) -> dict[str, Division]:
        parts = [part_of(model, *bounds) for bounds in zip(self._bounds, self._bounds[1:], strict=False)]
        homes = [self._modules_of(part) for part in parts]

        def together(names: Collection[str]) -> bool:
            return any(home.issuperset(names) for home in homes)

        auxiliary, ranks = auxiliary_weight(self.config.model) > 0, self.tensor_group.size
        divisions = plan.find_divisions(
            self._whole,
            self._example,
            self.precision,
            self._dividing(self.config),
            ranks,
            auxiliary=auxiliary,
            together=together,
        )
        for name in divisions:
            if not together([name]):
                raise config_error("strategy.plan", f"{name} is in several stages; choose other strategy.boundaries")
        self._note_divisions(self._whole, divisions)
        return divisions

    def _try_stage(self, index: int, module: nn.Module) -> list[Tensor]:
        """What a stage gives for a few samples: inputs like those that it will get, and always the same."""
        if index:
            before = self._outputs[index - 1]
            given = before.unflatten([self._activation_like(spec) for spec in before.tensors])
        else:
            given = images_like(self._example, SAMPLES)
        output = module(given)
        return [logits_of(output)] if index == len(self._bounds) - 2 else flatten(output)

    def _activation_like(self, spec: ActivationSpec) -> Tensor:
        shape = (SAMPLES, *spec.shape)
        if not spec.dtype.is_floating_point:
            return torch.zeros(shape, dtype=spec.dtype, device=self.runtime.device)
        # Of the parameters' type, since there is no autocast.
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(
            self.runtime.device, self.precision.dtype
        )
        return drawn.contiguous(memory_format=torch.channels_last) if spec.channels_last else drawn

    @override
    def _bucket_sizes(self, gradient_bytes: int) -> BucketSizes:
        return super()._bucket_sizes(largest(gradient_bytes, self.tensor_group, self.runtime.device))

    @override
    def _make_gradients(self, module: nn.Module, sizes: BucketSizes) -> Gradients:
        return DividedGradients(
            module.named_parameters(),
            self._cuts.keys(),
            self.tensor_group,
            self.replicas,
            self.compressor,
            self.stopwatch,
            sizes,
        )

    # --- the step ----------------------------------------------------------------------------------------------------

    @override
    def begin_epoch(self, epoch: int) -> None:
        super().begin_epoch(epoch)
        self._share_wholes({**super()._own_model_state(), **self.kept_parameters()})

    # --- state -------------------------------------------------------------------------------------------------------

    @override
    def _own_model_state(self) -> dict[str, Tensor]:
        tensors = super()._own_model_state()
        return divided_state.gathered_model(tensors, self._cuts, self.tensor_group, everywhere=True)

    @override
    def state_dict(self) -> dict[str, Any]:
        return divided_state.gathered(super().state_dict(), self._cuts, self.tensor_group)

    @override
    def load_state_dict(self, saved: Mapping[str, Any]) -> list[RestoredPart]:
        rank, optimizer, names = self.tensor_group.rank, saved["optimizer"], frozenset(self._names.values())
        own = {key: optimizer[key] for key in optimizer if key.rpartition("/")[0] in names}
        number = self.runtime.world.rank if self.is_arranged_as(saved["layout"]) else None
        parts = {
            "optimizer": divided_state.parts_of_optimizer(own, self._cuts, rank),
            "compressor": divided_state.parts_of_compressors(
                saved["compressor"], self._cuts, self.tensor_group, number
            ),
        }
        return super().load_state_dict({**saved, **parts})

    @override
    def _state_for(
        self, module: nn.Module, tensors: Mapping[str, Tensor], plain: Mapping[str, Any] | None
    ) -> tuple[Mapping[str, Tensor], dict[str, Any] | None]:
        own, of_modules = super()._state_for(module, tensors, plain)
        return divided_state.parts_of_model(own, self._cuts, self.tensor_group.rank), of_modules
