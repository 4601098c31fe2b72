"""Model parallelism: stages of the model on different ranks, microbatches on their way through them."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distrain.checkpoint import named_state
from distrain.checkpoint.restore_report import RestoredPart
from distrain.communication.collectives import Communicator
from distrain.config.registry import register
from distrain.config.schema import Config, StrategyConfig, setting
from distrain.errors import ConfigError
from distrain.files.writing import write_json
from distrain.gradients.bucket_sizes import BucketSizing, gradient_bytes_of
from distrain.gradients.buckets import Gradients
from distrain.gradients.linear_partition import linear_partition
from distrain.strategies import batchnorm
from distrain.strategies.base import MakeOptimizer, StepResult, Strategy
from distrain.strategies.buffer_snapshot import BufferSnapshot
from distrain.strategies.pipeline import schedule as schedules
from distrain.strategies.pipeline import split, timeline
from distrain.strategies.pipeline.schedule import SCHEDULES, Work
from distrain.strategies.pipeline.stage import Stage
from distrain.strategies.pipeline.transfers import Handed, Mail
from distrain.strategies.precision import Precision
from distrain.strategies.update import clip_and_step
from distrain.tasks.base import Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from distrain.data.batch import Batch, Targets
    from distrain.runtime.runtime import Runtime

log = logging.getLogger(__name__)

#: Receives are started for so many pieces of work ahead, so that they arrive while the rank computes.
_LOOK_AHEAD = 3


@dataclass
class PipelineConfig(StrategyConfig):
    """Keys of ``strategy=pipeline``."""

    stages: int = setting("Parts that the model is cut into.", at_least=2)
    schedule: str = setting("In which order ranks work.", choices=SCHEDULES)
    microbatches: int = setting("Pieces that a replica's share of a batch goes through in.", at_least=1)
    virtual_stages: int | None = setting("Stages a rank; null: the schedule's.", at_least=1)
    boundaries: list[str] = setting("Blocks that the stages after the first begin with; none: cut by measured times.")
    batchnorm: str = setting("Running statistics of BatchNorm layers.", choices=("deferred", "local"))
    first_bucket_mb: float | None = setting("Size of the first gradient bucket in MiB; null: by measurement.", above=0)
    bucket_mb: float | None = setting("Size of the other gradient buckets in MiB; null: by measurement.", above=0)

    @property
    def virtual(self) -> int:
        """Stages a rank."""
        return self.virtual_stages or SCHEDULES[self.schedule].virtual or 2

    @property
    def ranks(self) -> int:
        """Ranks of one pipeline."""
        return self.stages // self.virtual


@register("strategy", "pipeline", PipelineConfig)
class Pipeline(Strategy[PipelineConfig]):
    """Each rank holds one or more stages; replicas of the pipeline share each batch as ddp's ranks do.

    Ranks of one pipeline lie next to each other, so that on several nodes activations stay inside a node where they can
    and only gradients, once a step, travel between nodes.
    """

    def __init__(self, config: Config, runtime: Runtime) -> None:
        super().__init__(config, runtime)
        ranks = self.options.ranks
        self.mesh = runtime.mesh({"data": runtime.world.size // ranks, "pipeline": ranks})
        assert self.mesh is not None, "a pipeline of one rank was refused"
        self.replicas = Communicator(self.mesh.get_group("data"), self.ledger)
        # Activations and gradients travel in opposite directions. On a backend that keeps one queue for a pair of ranks
        # (NCCL) they would block each other, so each direction has a group of its own.
        self.line = Communicator(self.mesh.get_group("pipeline"), self.ledger)
        self._forward_line = Communicator(runtime.duplicate_group(self.mesh, "pipeline"), self.ledger)
        self.data_shard = (self.replicas.rank, self.replicas.size)
        self.precision = Precision(
            config.trainer.precision, runtime.device, check_gradients=config.trainer.on_nonfinite != "stop"
        )
        self._schedule = SCHEDULES[self.options.schedule]
        self._where = schedules.placement(self._schedule, ranks, self.options.virtual)
        self._orders: dict[int, list[Work]] = {}
        self._norm: Tensor | None = None
        self._recorder = timeline.SpanRecorder(runtime.device)
        self._figures: dict[str, Figure] = {}

    @classmethod
    def check(cls, config: Config, world_size: int) -> None:
        """Refuses numbers of stages and ranks that don't fit together."""
        options = cls.options_of(config)
        wanted = SCHEDULES[options.schedule].virtual
        if wanted is not None and options.virtual != wanted:
            raise ConfigError(
                "strategy.virtual_stages",
                options.virtual_stages,
                f"{options.schedule} has this many stages a rank",
                [wanted],
            )
        if wanted is None and options.virtual < 2:
            raise ConfigError("strategy.virtual_stages", options.virtual, f"{options.schedule} needs at least 2")
        if options.stages % options.virtual:
            raise ConfigError(
                "strategy.stages", options.stages, f"must be a multiple of the {options.virtual} stages a rank holds"
            )
        if options.ranks < 2:
            raise ConfigError("strategy.stages", options.stages, f"{options.virtual} stages a rank leave a single rank")
        if world_size % options.ranks:
            raise ConfigError(
                "strategy.stages",
                options.stages,
                f"{options.ranks} ranks hold a pipeline, and the {world_size} started are no multiple of that",
                [ranks * options.virtual for ranks in range(2, world_size + 1) if world_size % ranks == 0],
            )
        if config.trainer.compile:
            problem = "is not possible under strategy=pipeline"
            raise ConfigError("trainer.compile", config.trainer.compile, problem, [False])

    @classmethod
    def full_model_ranks(cls, config: Config, world_size: int) -> int:
        """None: the whole model may not fit; see the base class."""
        return 0

    @classmethod
    def check_model(cls, config: Config, model: nn.Module) -> None:
        """Refuses a model that can't be split, with the reason."""
        options = cls.options_of(config)
        split.check(model, options.stages, options.boundaries)

    # --- set-up ------------------------------------------------------------------------------------------------------

    def setup(self, model: nn.Module, task: Task, make_optimizer: MakeOptimizer, example: Tensor) -> None:
        """Cuts the model and keeps this rank's stages; see the base class."""
        assert isinstance(model, nn.Sequential)
        self.sync_initial_state(model, self.runtime.communicator())
        self.task = task
        self._names_of_all = list(model.state_dict())
        starts = self._split(model, example)
        blocks = list(model.named_children())
        self._shapes = self._boundary_shapes(model, example, starts)
        self.stages: dict[int, Stage] = {}
        self.gradients: dict[int, Gradients] = {}
        asked = (self.options.first_bucket_mb, self.options.bucket_mb, None if self.options.bucket_mb is None else 0)
        everyone, device = self.runtime.communicator(), self.runtime.device
        self._bucketing = BucketSizing(
            asked,
            self.replicas,
            everyone,
            device,
            gradient_bytes_of(model),
            deterministic=self.config.trainer.deterministic,
        )
        named: list[tuple[str, nn.Parameter]] = []
        for index, owner in enumerate(self._where):
            if owner != self.line.rank:
                continue
            stop = starts[index + 1] if index + 1 < len(starts) else len(blocks)
            module = nn.Sequential()
            for name, block in blocks[starts[index] : stop]:
                module.add_module(name, block)
            if self.options.batchnorm == "deferred":
                batchnorm.defer(module, self.replicas)
            last = index == len(self._where) - 1
            self.stages[index] = Stage(
                index, module, last, task, self.precision, splits_backward=self._schedule.splits_backward
            )
            self.stages[index].counts_memory = True
            sizes = self._bucketing.sizes(gradient_bytes_of(module))
            self.gradients[index] = Gradients(
                module.named_parameters(), self.replicas, self.compressor, self.stopwatch, *sizes
            )
            named += list(module.named_parameters())
        buckets = [bucket for gradients in self.gradients.values() for bucket in gradients.buckets]
        self._bucketing.log_choice([bucket.bytes for bucket in buckets])
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in named}
        self.optimizer = make_optimizer(named)
        self._snapshot = BufferSnapshot(self._modules) if self.config.trainer.on_nonfinite != "stop" else None
        self._warn(model)
        options = self.options
        log.info(
            "%s: %d stages on %d ranks, %d replicas, %d microbatches, predicted bubble %.0f %%\n%s",
            options.schedule,
            options.stages,
            options.ranks,
            self.replicas.size,
            options.microbatches,
            100 * self._predicted,
            split.described(self.split_table),
        )

    def _played(self, forward: list[float], backward: list[float]) -> float:
        """The bubble that the schedule has with these times for each stage."""
        options = self.options
        order = schedules.orders(self._schedule, options.ranks, options.virtual, options.microbatches)
        return schedules.bubble(schedules.play(order, forward, backward))

    @property
    def _predicted(self) -> float:
        rows = self.split_table
        return self._played([row["forward_ms"] for row in rows], [row["backward_ms"] for row in rows])

    def _split(self, model: nn.Sequential, example: Tensor) -> list[int]:
        """The first block of each stage: as asked for, or by rank 0's measurement, which all ranks take."""
        names = [name for name, _ in model.named_children()]
        costs: list[split.BlockCost] = []
        if self.runtime.is_main:
            # Pieces as the schedule will make them, and no smaller than two samples, which BatchNorm needs.
            size = max(2, len(example) // self.options.microbatches)
            costs = split.measure(model, example[:size], self.precision.autocast)
        link = split.measure_point_to_point(self.line, self.runtime.device)
        mine = {"costs": split.to_rows(costs), "link": link}
        measured = self.runtime.communicator().all_gather_json(mine, self.runtime.device)[0]
        costs = [split.BlockCost(**row) for row in measured["costs"]]
        latency, a_byte = measured["link"]
        if self.options.boundaries:
            starts = [0, *(names.index(name) for name in self.options.boundaries)]
        else:
            weights = [cost.forward_ms + cost.backward_ms for cost in costs]
            # An activation there and its gradient back.
            hand_over = [2 * (latency + a_byte * cost.output_bytes) for cost in costs]
            starts = linear_partition(weights, hand_over, self.options.stages, split.allowed_cuts(model))
        self.split_table = split.table(costs, starts, self._where)
        return starts

    def _boundary_shapes(self, model: nn.Sequential, example: Tensor, starts: list[int]) -> list[Handed]:
        """What each stage but the last hands over."""
        training = model.training
        model.eval()
        found = []
        with torch.no_grad(), self.precision.autocast():
            x = example[:2]
            for position, block in enumerate(model.children()):
                x = block(x)
                if position + 1 in starts:
                    last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
                    found.append(Handed(x.shape[1:], x.dtype, last))
        model.train(training)
        return found

    def _warn(self, model: nn.Module) -> None:
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
            log.warning(
                "BatchNorm layers normalise each microbatch by its own statistics, which one process, seeing the whole "
                "batch, does not; model.norm=group is equal"
            )
        if any(isinstance(module, nn.modules.dropout._DropoutNd) for module in model.modules()):
            log.warning("dropout draws differently on each stage; the run is not the one that one process would do")

    # --- the step ----------------------------------------------------------------------------------------------------

    def train_step(self, batch: Batch) -> StepResult:
        """One update: the schedule's work in order, then the replicas' reduction; see the base class."""
        with self.stopwatch.step():
            self.compressor.begin_step()
            if self._snapshot is not None:
                self._snapshot.take()
            for index, stage in self.stages.items():
                stage.module.train()
                self.gradients[index].zero()
            pieces = self._pieces(batch)
            count = len(pieces)
            self._recorder.begin()
            loss_sum, metric_sums = self._run(pieces, batch.global_count) if count else self._no_sums()
            for index in self.stages:
                if not count or len(self.stages) > 1:
                    self.gradients[index].begin_last_backward()
                self.gradients[index].finish()
            batchnorm.settle(self._modules)
            left_out = self._update()
        if count == self.options.microbatches:
            self._recorder.end()
        for stage in self.stages.values():
            # Counting hooks every tensor that autograd keeps, so only the first step pays for it.
            stage.counts_memory = False
        return StepResult(loss_sum, metric_sums, len(batch) if self._is_end else 0, left_out=left_out)

    def _no_sums(self) -> tuple[Tensor, Tensor]:
        """Loss and metrics of no samples; all that ranks without the last stage know."""
        zeros = torch.zeros(1 + len(self.task.metrics), dtype=torch.float64, device=self.runtime.device)
        return zeros[0], zeros[1:]

    @property
    def _modules(self) -> list[nn.Module]:
        return [stage.module for stage in self.stages.values()]

    @property
    def _is_end(self) -> bool:
        return self._where[-1] == self.line.rank

    def _pieces(self, batch: Batch) -> list[tuple[Tensor, Targets]]:
        """The share in microbatches of near-equal size, none of them empty; the same on all ranks of the pipeline."""
        share = len(batch)
        count = self.options.microbatches
        if self.config.trainer.micro_batch_size is not None:
            count = max(count, math.ceil(share / self.config.trainer.micro_batch_size))
        count = min(count, share)
        return batch.split(count) if count else []

    def _mail(self, sizes: list[int]) -> Mail:
        return Mail(
            self._where,
            self._shapes,
            sizes,
            self._forward_line,
            self.line,
            self.runtime.device,
            self._recorder,
            self.stopwatch,
        )

    def _order(self, microbatches: int) -> list[Work]:
        if microbatches not in self._orders:
            options = self.options
            order = schedules.orders(self._schedule, options.ranks, options.virtual, microbatches)
            self._orders[microbatches] = order[self.line.rank]
        return self._orders[microbatches]

    def _run(self, pieces: list[tuple[Tensor, Targets]], global_count: int) -> tuple[Tensor, Tensor]:
        """Does this rank's work; receives what it needs ahead of time and sends what others need at once.

        Returns:
            Sums of the loss and of the task's metrics; zeros on ranks without the last stage.
        """
        order = self._order(len(pieces))
        last = len(self._where) - 1
        mail = self._mail([len(inputs) for inputs, _ in pieces])
        loss, metric_sums = self._no_sums()
        left = {
            index: sum(work.stage == index and work.kind in ("backward", "weight") for work in order)
            for index in self.stages
        }
        for position, work in enumerate(order):
            mail.expect(order[position : position + _LOOK_AHEAD])
            stage, m = self.stages[work.stage], work.microbatch
            if work.kind == "forward":
                inputs, targets = pieces[m]
                x = inputs if stage.is_first else mail.take(work)
                with self._recorder.span(*work):
                    output, loss_sum = stage.forward(m, x, targets, global_count)
                if stage.is_last:
                    loss += loss_sum
                    metric_sums += self.task.measure(output, targets)
                else:
                    mail.post(Work("forward", work.stage + 1, m), output)
                continue
            if work.kind in ("backward", "weight"):
                left[work.stage] -= 1
                # With several stages a rank, replicas with fewer microbatches might finish them in another order, and
                # their collectives would not match; then all wait for the end.
                if not left[work.stage] and len(self.stages) == 1:
                    self.gradients[work.stage].begin_last_backward()
            if work.kind == "weight":
                with self._recorder.span(*work):
                    stage.backward_weight(m)
                continue
            gradient = None if work.stage == last else mail.take(work)
            with self._recorder.span(*work):
                found = stage.backward(m, gradient) if work.kind == "backward" else stage.backward_input(m, gradient)
            if not stage.is_first:
                assert found is not None
                mail.post(Work(work.kind, work.stage - 1, m), found)
        mail.wait()
        return loss, metric_sums

    def _update(self) -> bool:
        """Applies the gradient; returns whether that was skipped because it is not finite.

        Each rank of the pipeline sees its own stages' gradients only; by the norm of the whole all decide alike.
        """
        self._norm, skipped = clip_and_step(
            self, self.optimizer, self.precision, self.config.trainer.grad_clip_norm, self._snapshot
        )
        return skipped

    def norm(self) -> Tensor:
        """Norm of the whole model's gradient; all ranks of the pipeline call it together."""
        squares = torch.stack([gradients.norm().square() for gradients in self.gradients.values()]).sum()
        return self.line.all_reduce(squares).sqrt()

    def scale(self, factor: Tensor) -> None:
        """Multiplies this rank's gradients by a scalar."""
        for gradients in self.gradients.values():
            gradients.scale(factor)

    def gradient_norm(self) -> Tensor:
        """Norm of the last step's gradient before clipping; see the base class."""
        return self._norm if self._norm is not None else self.norm()

    @torch.no_grad()
    def eval_step(self, batch: Batch) -> StepResult:
        """Forward only, microbatch after microbatch; the last stage's rank has the result."""
        count = len(self._pieces(batch))
        if not count:
            return StepResult(*self._no_sums(), 0)
        outputs = self.task.evaluate(lambda inputs: self._evaluated(inputs.tensor_split(count)), batch.inputs)
        if not self._is_end:
            return StepResult(*self._no_sums(), 0)
        with self.precision.autocast():
            loss_sum, samples = self.task.loss(outputs, batch.targets)
        return StepResult(loss_sum, self.task.measure(outputs, batch.targets), samples, outputs)

    def _evaluated(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Takes microbatches through the stages; all outputs on the last stage's rank, elsewhere an empty tensor."""
        mail = self._mail([len(piece) for piece in inputs])
        order = [Work("forward", stage, m) for m in range(len(inputs)) for stage in self.stages]
        outputs = []
        for position, work in enumerate(order):
            mail.expect(order[position : position + _LOOK_AHEAD])
            stage = self.stages[work.stage]
            stage.module.eval()
            x = inputs[work.microbatch] if stage.is_first else mail.take(work)
            with self.precision.autocast():
                output = stage.module(x)
            if stage.is_last:
                outputs.append(output)
            else:
                mail.post(Work("forward", work.stage + 1, work.microbatch), output)
        mail.wait()
        return torch.cat(outputs) if outputs else torch.zeros((), device=self.runtime.device)

    # --- what came of it ------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """Bubble, memory and the split; also writes the timeline of one step below ``run_dir/pipeline``."""
        steps = [[asdict(span) for span in step] for step in self._recorder.steps()]
        peaks = {str(index): stage.peak_activation_bytes for index, stage in self.stages.items()}
        self.runtime.communicator().barrier()
        mine = {"clock": time.perf_counter(), "host": self.runtime.world.host, "steps": steps, "peaks": peaks}
        everyone = self.line.all_gather_json(mine, self.runtime.device)
        options = self.options
        recorded = timeline.aligned(everyone)
        bubbles = sorted(timeline.measured_bubble(lanes) for lanes in recorded)
        peak = {int(index): size for each in everyone for index, size in each["peaks"].items()}
        found = {
            "schedule": options.schedule,
            "microbatches": options.microbatches,
            "bubble_measured": bubbles[len(bubbles) // 2] if bubbles else None,
            "bubble_predicted": self._predicted,
            "bubble_equal_stages": self._played([1.0] * options.stages, [2.0] * options.stages),
            "peak_activation_mb": [round(peak[index] / 2**20, 3) for index in sorted(peak)],
            "stages": self.split_table,
        }
        if self.runtime.is_main:
            folder = self.runtime.run_dir / "pipeline"
            folder.mkdir(exist_ok=True)
            write_json(folder / "split.json", {"stages": self.split_table})
            if recorded:
                title = (
                    f"{options.schedule}, {options.stages} stages on {options.ranks} ranks, {options.microbatches} "
                    f"microbatches: bubble {found['bubble_measured']:.0%} measured, "
                    f"{found['bubble_predicted']:.0%} predicted"
                )
                self._figures["pipeline/timeline"] = timeline.write(recorded[-1], title, folder)
        return {"pipeline": found, **super().report()}

    def figures(self) -> dict[str, Figure]:
        """The timeline of one step."""
        return self._figures

    # --- state -------------------------------------------------------------------------------------------------------

    def uncompressed_bytes_per_step(self) -> int:
        """Bytes this rank would send to reduce its gradients without compression."""
        return sum(gradients.bytes_per_step for gradients in self.gradients.values())

    def model_state(self) -> dict[str, Tensor]:
        """The unsplit model's parameters and buffers; all ranks call it together."""
        shared = self.line.merge_tensors(self._held(), self.runtime.device)
        return {name: shared[name] for name in self._names_of_all}

    def _held(self) -> dict[str, Tensor]:
        return {name: tensor for module in self._modules for name, tensor in module.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        """This rank's stages, which the first replica saves; see the base class."""
        tensors, scalars = named_state.optimizer_state(self.optimizer, self._names)
        everyone = self.line.all_gather_json(scalars, self.runtime.device)
        saves = self.replicas.rank == 0
        return {
            "model": self._held() if saves else {},
            "optimizer": tensors if saves else {},
            "compressor": self.compressor.state_dict(),
            "scalars": {
                "optimizer_name": self.config.optimizer.name,
                "optimizer": {name: value for each in everyone for name, value in each.items()},
                "precision": self.precision.state_dict(),
                "buckets": self._bucketing.state_dict(),
            },
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> list[RestoredPart]:
        """Takes this rank's part of what any strategy saved; see the base class."""
        if saved["layout"] == self.layout:
            self._bucketing.load_state_dict(saved["scalars"].get("buckets"))
            for gradients in self.gradients.values():
                gradients.rebuild_buckets(*self._bucketing.sizes(gradients.bytes))
        named_state.check_optimizer(self.config.optimizer.name, saved["scalars"])
        named_state.check_names(self._names_of_all, saved["model"])
        for module in self._modules:
            named_state.load_model(module, {name: saved["model"][name] for name in module.state_dict()})
        named_state.load_optimizer(self.optimizer, self._names, saved["optimizer"], saved["scalars"]["optimizer"])
        return [
            *named_state.restored_parts(saved, self.precision.dtype),
            self.precision.load_state_dict(saved["scalars"]["precision"]),
            *self.restore_compressor(saved, self._names.values(), self.replicas.size),
        ]
