"""strategy=pipeline: stages of the model on different ranks, through which batches pass in microbatches."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from distrain.checkpoint import module_state, named_state
from distrain.checkpoint.module_state import ModuleState
from distrain.checkpoint.restore_report import RestoredPart
from distrain.communication.collectives import Communicator
from distrain.config.registry import register
from distrain.config.schema import Config
from distrain.data.sampler import part_sizes
from distrain.errors import ConfigError
from distrain.files.writing import losing_on_disk_errors
from distrain.gradients.bucket_sizes import BucketSizes, BucketSizing, gradient_bytes_of
from distrain.gradients.buckets import Gradients, ReducedGradients
from distrain.models.foreign import auxiliary_weight
from distrain.models.freezing import ever_still, freeze_schedule, train_only
from distrain.optim.optimizers import modes
from distrain.runtime.agreement import agreed
from distrain.strategies import batchnorm
from distrain.strategies.base import MakeOptimizer, StepResult, Strategy
from distrain.strategies.buffer_snapshot import BufferSnapshot
from distrain.strategies.pipeline import hand_overs, report, split, timeline
from distrain.strategies.pipeline.blocks import TracedBlock, part_of, state_names, trace_blocks
from distrain.strategies.pipeline.executor import ScheduleExecutor
from distrain.strategies.pipeline.options import PipelineConfig
from distrain.strategies.pipeline.schedule import SCHEDULES, rank_of_stages
from distrain.strategies.pipeline.stage import Stage
from distrain.strategies.pipeline.transfers import StageTransfers
from distrain.strategies.precision import Precision
from distrain.strategies.recomputation import set_up
from distrain.strategies.sharpness import Sharpness
from distrain.strategies.update import clip_and_step
from distrain.tasks.base import Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from distrain.data.batch import Batch, Targets
    from distrain.runtime.runtime import Runtime

log = logging.getLogger(__name__)


@register("strategy", "pipeline", PipelineConfig)
class Pipeline(Strategy[PipelineConfig]):
    """Each rank holds one or more stages of the model; replicas of the pipeline share each batch as ddp's ranks do.

    Ranks of one pipeline are consecutive. On several nodes, activations then stay inside a node where possible, and
    only gradients are sent between nodes, once per step.
    """

    divides_model = True
    steps_alike = True

    def __init__(self, config: Config, runtime: Runtime) -> None:
        super().__init__(config, runtime)
        ranks = self.options.ranks
        self.mesh = runtime.mesh(self._mesh_shape())
        assert self.mesh is not None, "a pipeline of one rank was refused"
        self.replicas = Communicator(self.mesh.get_group("data"), self.ledger)
        # Activations and gradients travel in opposite directions. On a backend with one queue per pair of ranks (NCCL)
        # they would block each other, so each direction has its own group.
        self.pipeline_group = Communicator(self.mesh.get_group("pipeline"), self.ledger)
        self._forward_group = Communicator(runtime.duplicate_group(self.mesh, "pipeline"), self.ledger)
        self.data_shard = (self.replicas.rank, self.replicas.size)
        self.precision = Precision(
            config.trainer.precision, runtime.device, check_gradients=config.trainer.on_nonfinite != "stop"
        )
        self._schedule = SCHEDULES[self.options.schedule]
        self._rank_of_stage = rank_of_stages(self._schedule, ranks, self.options.stages_per_rank)
        self._has_last_stage = self._rank_of_stage[-1] == self.pipeline_group.rank
        self._norm: Tensor | None = None
        self._recorder = timeline.SpanRecorder(runtime.device)
        self._figures: dict[str, Figure] = {}

    def _mesh_shape(self) -> dict[str, int]:
        """Number of ranks along each dimension, the outermost first."""
        return {"data": self.runtime.world.size // self.options.ranks, "pipeline": self.options.ranks}

    @property
    @override
    def layout(self) -> dict[str, Any]:
        return {**super().layout, "boundaries": self._split.boundaries}

    @override
    def is_arranged_as(self, layout: Mapping[str, Any]) -> bool:
        # Old checkpoints don't say where the model was split.
        return super().is_arranged_as({"boundaries": self._split.boundaries, **layout})

    @override
    @classmethod
    def check(cls, config: Config, world_size: int) -> None:
        cls.options_of(config).check_world_size(world_size)
        if config.trainer.compile:
            problem = f"is not possible under strategy={config.strategy.name}"
            raise ConfigError("trainer.compile", config.trainer.compile, problem, [False])

    @override
    @classmethod
    def data_parallel_size(cls, config: Config, world_size: int) -> int:
        return world_size // cls.options_of(config).ranks

    @override
    @classmethod
    def forward_sizes(cls, config: Config, world_size: int, count: int, *, training: bool) -> list[list[int]]:
        shares = part_sizes(count, cls.data_parallel_size(config, world_size))
        return [part_sizes(share, max(cls._microbatch_count(config, share), 1)) for share in shares]

    @override
    @classmethod
    def full_model_ranks(cls, config: Config, world_size: int) -> int:
        """None, since the whole model may not fit on a rank."""
        return 0

    @override
    @classmethod
    def check_model(cls, config: Config, model: nn.Module) -> None:
        options = cls.options_of(config)
        split.check(model, options.stages, options.boundaries)

    @override
    @classmethod
    def check_passes(cls, config: Config, model: nn.Module, images: Tensor, precision: Precision) -> None:
        """Refuses what can't be traced, blocks that fail alone, and boundaries where what crosses can't be sent."""
        options = cls.options_of(config)
        auxiliary = auxiliary_weight(config.model) > 0
        still = ever_still(freeze_schedule(config, model), model)
        sequence = split.as_sequence(model, images, precision, options, still, auxiliary=auxiliary)
        split.possible_cuts(sequence, trace_blocks(sequence, images, precision), options)

    # --- set-up ------------------------------------------------------------------------------------------------------

    @override
    def setup(self, model: nn.Module, task: Task, make_optimizer: MakeOptimizer, example: Tensor) -> None:
        everyone, runtime = self.runtime.communicator(), self.runtime
        self.sync_initial_state(model, everyone)
        self.task = task
        self._still: list[nn.Module] = []
        self._all_names = list(module_state.read(model).tensors)
        self._blocks = {name.partition(".")[0] for name in self._all_names}
        sequence, traced = agreed(everyone, runtime, lambda: self._trace(model, example))
        self._split = split.choose_split(
            sequence,
            example,
            traced,
            self.options,
            self._rank_of_stage,
            runtime,
            self.pipeline_group,
            self.precision.autocast,
            self.saved_layout.get("boundaries"),
        )
        starts = self._split.starts
        self._bounds = [*starts, len(traced)]
        self._outputs = hand_overs.between_stages(traced, starts)
        parts = self.freezing, model, sequence, example, self.precision, starts
        self._epochs = agreed(everyone, runtime, lambda: hand_overs.in_epochs(*parts))
        self._bucket_sizing = self._make_bucket_sizing(gradient_bytes_of(model))
        self.stages: dict[int, Stage] = {}
        for index, rank in enumerate(self._rank_of_stage):
            if rank == self.pipeline_group.rank:
                self._add_stage(index, sequence, traced)
        self.gradients = self._gradients_of_stages()
        updated = self._updated_parameters()
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in updated}
        self.optimizer = agreed(everyone, runtime, lambda: make_optimizer(updated))
        self._set_training_mode()
        self._snapshot = BufferSnapshot(self._modules) if self.config.trainer.on_nonfinite != "stop" else None
        rho = self.config.optimizer.sam_rho
        self._sharpness = None if rho is None else Sharpness(rho, self._modules)
        self._executor = ScheduleExecutor(
            self.options,
            self.pipeline_group.rank,
            self.stages,
            self.gradients,
            task,
            self.precision,
            self._make_transfers,
            self._recorder,
            self.runtime.device,
        )
        log.info("%s\n%s", report.described(self.options, self.replicas.size, self._split.rows), self._split.table())

    def _trace(self, model: nn.Module, example: Tensor) -> tuple[nn.Sequential, list[TracedBlock]]:
        """The model as a sequence of blocks, and what each of them hands over."""
        auxiliary, still = auxiliary_weight(self.config.model) > 0, ever_still(self.freezing, model)
        sequence = split.as_sequence(model, example, self.precision, self.options, still, auxiliary=auxiliary)
        self._recompute(model, example)
        return sequence, trace_blocks(sequence, example, self.precision)

    def _recompute(self, model: nn.Module, example: Tensor) -> None:
        """Sets up ``model.checkpoint_activations``, before blocks are timed: their backward passes take longer."""
        set_up.apply(self.config, model, example, self.precision.autocast)

    @override
    def set_trained(self, names: frozenset[str]) -> None:
        assert self.freezing is not None
        self.compressor.buckets_change()
        self._outputs, still = self._epochs[names]
        named = [pair for module in self._modules for pair in module.named_modules()]
        self._still = [module for name, module in named if name in still]
        for index, stage in self.stages.items():
            train_only(stage.module, names, self.freezing.ever_trained)
            stage.expect(self._outputs[index - 1] if index else None)
        self._rebuild_buckets()
        self._set_training_mode()

    def _set_training_mode(self) -> None:
        for stage_module in self._modules:
            stage_module.train()
        for module in self._still:
            module.training = False

    def _make_bucket_sizing(self, model_bytes: int) -> BucketSizing:
        return BucketSizing(
            self.options.bucket_sizes,
            self.replicas,
            self.runtime.communicator(),
            self.runtime.device,
            model_bytes,
            deterministic=self.config.trainer.deterministic,
        )

    def _add_stage(self, index: int, model: nn.Sequential, traced: list[TracedBlock]) -> None:
        module = self._part(index, model)
        if self.options.batchnorm == "deferred":
            batchnorm.defer_running_statistics(module, self.replicas)
        self.stages[index] = Stage(
            index,
            module,
            index == len(self._rank_of_stage) - 1,
            self.task,
            self.precision,
            self._outputs[index - 1] if index else None,
            changes_input=traced[self._bounds[index]].changes_input,
            splits_backward=self._schedule.splits_backward,
            auxiliary_weight=auxiliary_weight(self.config.model),
        )

    def _part(self, index: int, model: nn.Sequential) -> nn.Module:
        """What a stage of this rank holds."""
        return part_of(model, self._bounds[index], self._bounds[index + 1])

    def _gradients_of_stages(self) -> dict[int, ReducedGradients]:
        found = {
            index: self._make_gradients(stage.module, self._sizes_of(stage)) for index, stage in self.stages.items()
        }
        self._bucket_sizing.log_choice([bucket.bytes for gradients in found.values() for bucket in gradients.buckets])
        return {**found}

    def _sizes_of(self, stage: Stage) -> BucketSizes:
        return self._bucket_sizes(gradient_bytes_of(stage.module))

    def _bucket_sizes(self, gradient_bytes: int) -> BucketSizes:
        """Sizes of a stage's buckets; all ranks of the stage call it together."""
        return self._bucket_sizing.sizes(gradient_bytes)

    def _make_gradients(self, module: nn.Module, sizes: BucketSizes) -> Gradients:
        return Gradients(module.named_parameters(), self.replicas, self.compressor, self.stopwatch, *sizes)

    def _rebuild_buckets(self) -> None:
        """Lays out the gradients' buckets for the parameters that are trained now."""
        for index, gradients in self.gradients.items():
            assert isinstance(gradients, Gradients)
            gradients.rebuild_buckets(*self._sizes_of(self.stages[index]))

    def _updated_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """What this rank's optimizer updates, by the model's names; called after :meth:`_gradients_of_stages`."""
        return [pair for module in self._modules for pair in module.named_parameters()]

    def _make_transfers(self, sizes: list[int]) -> StageTransfers:
        return StageTransfers(
            self._rank_of_stage,
            self._outputs,
            sizes,
            self._forward_group,
            self.pipeline_group,
            self.runtime.device,
            self._recorder,
            self.stopwatch,
        )

    # --- the step ----------------------------------------------------------------------------------------------------

    @override
    def own_modules(self) -> list[nn.Module]:
        return self._modules

    @override
    def train_step(self, batch: Batch) -> StepResult:
        with self.stopwatch.step():
            modes.for_training(self.optimizer)
            self.compressor.begin_step()
            if self._snapshot is not None:
                self._snapshot.take()
            # Visits all layers, so it is done after an evaluation only.
            if not all(module.training for module in self._modules):
                self._set_training_mode()
            pieces = self._microbatches(batch)
            self._recorder.begin_step()
            loss_sum, metric_sums = self._run_passes(pieces, batch)
            if self._sharpness is not None:
                with self._sharpness.moved(self.norm()):
                    self._run_passes(pieces, batch)
            skipped = self._update()
        if len(pieces) == self.options.microbatches:
            self._recorder.end_step()
        for stage in self.stages.values():
            # Measuring hooks every tensor that autograd saves, so it is done in the first step only.
            stage.measures_memory = False
        return StepResult(loss_sum, metric_sums, len(batch) if self._has_last_stage else 0, skipped=skipped)

    def _run_passes(self, pieces: list[tuple[Tensor, Targets]], batch: Batch) -> tuple[Tensor, Tensor]:
        """Computes the batch's gradient and reduces it; returns the sums of losses and metrics."""
        for gradients in self.gradients.values():
            gradients.zero()
        executor = self._executor
        sums = executor.train(pieces, batch.global_count) if pieces else executor.no_sums()
        for index in self.stages:
            if not pieces or len(self.stages) > 1:
                self.gradients[index].begin_last_backward()
            self.gradients[index].finish()
        batchnorm.update_running_statistics(self._modules)
        return sums

    @property
    def _modules(self) -> list[nn.Module]:
        return [stage.module for stage in self.stages.values()]

    def _microbatches(self, batch: Batch) -> list[tuple[Tensor, Targets]]:
        """The share in microbatches of near-equal size, none of them empty; the same on all ranks of the pipeline."""
        count = self._microbatch_count(self.config, len(batch))
        return batch.split(count) if count else []

    @classmethod
    def _microbatch_count(cls, config: Config, share: int) -> int:
        count, largest = cls.options_of(config).microbatches, config.trainer.largest_pass
        if largest is not None:
            count = max(count, math.ceil(share / largest))
        return min(count, share)

    def _update(self) -> bool:
        """Applies the gradient; returns whether that was skipped because it is not finite.

        Each rank of the pipeline has the gradients of its own stages only. The decision depends on the norm of the
        whole gradient, so that it is the same on all of them.
        """
        self._norm, skipped = clip_and_step(
            self, self.optimizer, self.precision, self.config.trainer.grad_clip_norm, self._snapshot
        )
        return skipped

    def norm(self) -> Tensor:
        """Norm of the whole model's gradient; all ranks of the pipeline call it together."""
        # A stage without trained parameters doesn't know their type and device.
        norms = [each.norm().to(self.runtime.device, self.precision.dtype) for each in self.gradients.values()]
        squares = torch.stack([norm.square() for norm in norms]).sum()
        return self.pipeline_group.all_reduce(squares).sqrt()

    def scale(self, factor: Tensor) -> None:
        """Multiplies this rank's gradients by a scalar."""
        for gradients in self.gradients.values():
            gradients.scale(factor)

    @override
    def gradient_norm(self) -> Tensor:
        return self._norm if self._norm is not None else self.norm()

    @override
    @torch.no_grad()
    def eval_step(self, batch: Batch) -> StepResult:
        """The rank with the last stage has the result; others return zeros."""
        modes.for_evaluation(self.optimizer)
        count = len(self._microbatches(batch))
        if not count:
            return StepResult(*self._executor.no_sums(), 0)
        outputs = self.task.evaluate(lambda inputs: self._executor.evaluate(inputs.tensor_split(count)), batch.inputs)
        if not self._has_last_stage:
            return StepResult(*self._executor.no_sums(), 0)
        with self.precision.autocast():
            loss_sum, samples = self.task.loss(outputs, batch.targets)
        return StepResult(loss_sum, self.task.measure(outputs, batch.targets), samples, outputs)

    # --- report ------------------------------------------------------------------------------------------------------

    @override
    def report(self) -> dict[str, Any]:
        """Bubble, memory and the split; also writes the split and the timeline of one step to ``run_dir/pipeline``."""
        peaks = {str(index): stage.peak_activation_bytes for index, stage in self.stages.items()}
        ranks = report.of_all_ranks(self._recorder, peaks, self.pipeline_group, self.runtime)
        aligned_steps = timeline.align_clocks(ranks)
        summary = report.summary(self.options, self._split.rows, ranks, aligned_steps)
        if self.runtime.is_main:
            folder = self.runtime.run_dir / "pipeline"
            with losing_on_disk_errors("The report of the pipeline"):
                self._figures = report.write_files(folder, self.options, summary, aligned_steps)
        return {"pipeline": summary, **super().report()}

    @override
    def figures(self) -> dict[str, Figure]:
        return self._figures

    @override
    def uncompressed_bytes_per_step(self) -> int:
        passes = 1 if self._sharpness is None else 2
        return passes * sum(gradients.bytes_per_step for gradients in self.gradients.values())

    # --- state -------------------------------------------------------------------------------------------------------

    @override
    def model_state(self) -> dict[str, Tensor]:
        """The unsplit model's parameters and buffers; all ranks call it together."""
        modes.for_evaluation(self.optimizer)
        tensors = self.pipeline_group.merge_tensors(self._own_model_state(), self.runtime.device)
        return {name: tensors[name] for name in self._all_names}

    def _own_model_state(self) -> dict[str, Tensor]:
        return {name: tensor for module in self._modules for name, tensor in module_state.read(module).tensors.items()}

    @override
    def state_dict(self) -> dict[str, Any]:
        """The state of this rank's stages."""
        modes.for_evaluation(self.optimizer)
        states = [module_state.read(module) for module in self._modules]
        local: dict[str, Tensor] = {}
        for module, state in zip(self._modules, states, strict=True):
            local |= module_state.own_state(module, state, self.replicas, self.runtime.device)
        saved = self._saved_tensors(states)
        plain = {**saved["scalars"], "modules": [state.to_plain() for state in states]}
        ranks = self.pipeline_group.all_gather_json(plain, self.runtime.device)
        saved["scalars"] = {
            "optimizer_name": self.config.optimizer.name,
            "optimizer": {name: value for rank in ranks for name, value in rank["optimizer"].items()},
            "precision": self.precision.state_dict(),
            "buckets": self._bucket_sizing.state_dict(),
            "module": module_state.merged_plain(plain for rank in ranks for plain in rank["modules"]),
        }
        return {**saved, "compressor": self.compressor.state_dict(), "local": local}

    def _saved_tensors(self, states: Sequence[ModuleState]) -> dict[str, Any]:
        """What ranks of the first replica save of model and optimizer, with the optimizer's other values."""
        saves = self.replicas.rank == 0
        tensors, scalars = named_state.optimizer_state(self.optimizer, self._names)
        return {
            "model": {name: each for state in states for name, each in state.tensors.items()} if saves else {},
            "optimizer": tensors if saves else {},
            "scalars": {"optimizer": scalars},
        }

    @override
    def load_state_dict(self, saved: Mapping[str, Any]) -> list[RestoredPart]:
        if self.is_arranged_as(saved["layout"]):
            self._bucket_sizing.load_state_dict(saved["scalars"].get("buckets"))
            self._rebuild_buckets()
        named_state.check_optimizer(self.config.optimizer.name, saved["scalars"])
        self._load_model(*self.module_state_of(saved))
        self._load_optimizer(saved["optimizer"], saved["scalars"]["optimizer"])
        names = [name for module in self._modules for name, _ in module.named_parameters()]
        return [
            *named_state.restored_parts(saved, self.precision.dtype),
            self.precision.load_state_dict(saved["scalars"]["precision"]),
            *self.restore_compressor(saved, names, self.replicas.size),
        ]

    def _load_optimizer(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Loads what belongs to this rank's stages of an optimizer's saved state."""
        named_state.load_optimizer(self.optimizer, self._names, tensors, scalars)

    def _load_model(self, tensors: Mapping[str, Tensor], plain: dict[str, Any] | None) -> None:
        """Loads the model's state into this rank's stages.

        Raises:
            ValueError: On all ranks of the pipeline: it doesn't fit a stage of one of them.
        """
        problem = ""
        try:
            module_state.check_blocks(self._blocks, tensors)
            for module in self._modules:
                module_state.load(module, *self._state_for(module, tensors, plain))
        except ValueError as error:
            problem = str(error)
        for rank in self.pipeline_group.all_gather_json({"problem": problem}, self.runtime.device):
            if rank["problem"]:
                raise ValueError(rank["problem"])

    def _state_for(
        self, module: nn.Module, tensors: Mapping[str, Tensor], plain: Mapping[str, Any] | None
    ) -> tuple[Mapping[str, Tensor], dict[str, Any] | None]:
        """What a stage's module is given of the model's state."""
        return module_state.part_of(state_names(module), tensors, plain)
