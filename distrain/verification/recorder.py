"""Writes down what each step of a short run computes, on every rank, through the interface of strategies alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from distrain import rng
from distrain.data.batch import Batch, Targets, map_targets, pick_targets
from distrain.data.sampler import accumulated_pieces, part_sizes
from distrain.health.mesh_place import sizes_of
from distrain.strategies.base import StepResult
from distrain.tasks.base import Evaluation
from distrain.training.callbacks import Callback, RunView
from distrain.training.trainer import Trainer
from distrain.verification import by_design
from distrain.verification.reference import Distance, Reference, distance, norm, row_hashes, tensor_hash

#: Identifies the reordering of a batch among the uses of random numbers.
_REORDER = 91
#: Kinds of tensors that are compared.
GRADIENTS, STATE = "gradients", "state"


@dataclass
class StepRecord:
    """What a rank knows of one step; all of it is plain data.

    Attributes:
        shard: Which share of the batch this rank had: index and count.
        indices: Positions of its samples in the data.
        samples: A hash of the bits of each of its samples.
        targets: Likewise of their targets.
        loss_sum: Sum of its samples' losses.
        count: Samples that this sum is over.
        metric_sums: Sums of the task's metrics.
        bytes: What it sent, by kind of collective.
        distances: From the serial run, by kind and name of the tensor: norms of the difference and of the serial one.
        hashes: Of the bits of the model's tensors after the step.
        copies: Largest distance of this rank's parameters from the strategy's model, relative to their norm; ``None``
            where a rank has no whole parameters of its own.
    """

    shard: tuple[int, int] = (0, 0)
    indices: list[int] = field(default_factory=list)
    samples: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    loss_sum: float = 0.0
    count: int = 0
    metric_sums: list[float] = field(default_factory=list)
    bytes: dict[str, int] = field(default_factory=dict)
    distances: dict[str, dict[str, Distance]] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    copies: float | None = None


@dataclass
class RankRecord:
    """What a rank knows of a run.

    Attributes:
        rank: Its number.
        host: Its host.
        steps: By number of the step, from 1.
        evaluations: What all ranks agreed on: ``step``, ``split``, ``loss``, ``count`` and the metrics by name.
        parameters: Names of the model's parameters, as far as this rank runs them.
        tied: Names that stand for one parameter, for each such parameter.
        uncompressed_bytes: Bytes that it would send in a step without compression.
        hides_gradients: It has updated parameters by gradients that are not those of one process, by design.
        mesh: Numbers of ranks along the dimensions in which they are arranged, from the outermost one on.
    """

    rank: int
    host: str
    steps: dict[int, StepRecord] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    tied: list[list[str]] = field(default_factory=list)
    uncompressed_bytes: int = 0
    hides_gradients: bool = False
    mesh: dict[str, int] = field(default_factory=dict)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> RankRecord:
        """What :func:`dataclasses.asdict` gave, after a way through JSON."""
        steps = {int(step): StepRecord(**content) for step, content in plain["steps"].items()}
        return cls(**{**plain, "steps": steps})


class Recorder(Callback):
    """Records a run of a trainer; made before its first step.

    Args:
        trainer: Of this rank.
        reference: The serial run's tensors.
        writes: This is the serial run, whose tensors are kept.
        reorders: In the serial run, the order of the samples of each forward pass: 0 as it is, 1 reversed, from 2 on
            at random. What is added up is the same, in another order.
        skipped: Steps whose update is left out, as the serial run has skipped it because its fp16 gradient overflowed.
        first_step: Steps before the run's start.

    Attributes:
        record: What was recorded.
    """

    def __init__(
        self,
        trainer: Trainer,
        reference: Reference,
        *,
        writes: bool = False,
        reorders: int = 0,
        skipped: Collection[int] = (),
        first_step: int = 0,
    ) -> None:
        strategy = trainer.strategy
        self._trainer, self._strategy, self._reference = trainer, strategy, reference
        self._writes, self._reorders, self._skipped = writes, reorders, skipped
        world = trainer.runtime.world
        self.record = RankRecord(world.rank, world.host, mesh=sizes_of(strategy.mesh))
        self._first_step, self._in_step = first_step, False
        roots = strategy.own_modules()
        self.record.parameters = [name for root in roots for name, _ in root.named_parameters(remove_duplicate=False)]
        self.record.tied = [group for root in roots for group in tied_names(root)]
        self._names = names_of(strategy.optimizer, roots)
        strategy.optimizer.register_step_pre_hook(self._before_update)
        self._train_step = strategy.train_step
        self._evaluate = trainer.evaluate
        # Around the methods, not in them: training itself knows nothing of this.
        replace_method(strategy, "train_step", self._recorded_step)
        replace_method(trainer, "evaluate", self._recorded_evaluation)
        if skipped:
            self._update = strategy.optimizer.step
            replace_method(strategy.optimizer, "step", self._update_unless_skipped)
        trainer.callbacks.append(self)

    def _step(self, number: int) -> StepRecord:
        return self.record.steps.setdefault(number, StepRecord())

    def _recorded_step(self, batch: Batch) -> StepResult:
        number = self._trainer.progress.step + 1
        record, before = self._step(number), self._strategy.ledger.sent.copy()
        record.shard, record.indices = self._strategy.data_shard, batch.indices.tolist()
        record.samples, record.targets = row_hashes(batch.inputs), _target_hashes(batch.targets)
        self._in_step = True
        result = self._train_step(self._reordered(batch, number))
        self._in_step = False
        record.loss_sum, record.count = float(result.loss_sum), result.count
        record.metric_sums = [float(value) for value in result.metric_sums]
        record.bytes = dict(self._strategy.ledger.sent - before)
        return result

    def _reordered(self, batch: Batch, step: int) -> Batch:
        """The batch with its samples in another order within each forward pass, if this run reorders them."""
        if not self._reorders:
            return batch
        pieces = accumulated_pieces(self._trainer.config.trainer.largest_pass, batch.global_count, 1)
        order, start = [], 0
        for size in part_sizes(len(batch), pieces):
            within = torch.arange(size).flip(0)
            if self._reorders > 1:
                within = rng.permutation(rng.key(_REORDER, self._reorders, step), size)
            order.append(start + within)
            start += size
        positions = torch.cat(order)
        there = positions.to(batch.inputs.device)
        layout = torch.channels_last if _is_channels_last(batch.inputs) else torch.contiguous_format
        inputs = batch.inputs.index_select(0, there).contiguous(memory_format=layout)
        return Batch(inputs, pick_targets(batch.targets, there), batch.indices[positions], batch.global_count)

    def _before_update(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """The gradients that the optimizer sees, whichever rank it runs on."""
        if self._strategy.skips_locally or self._strategy.slices_parameters:
            # Each rank's gradient is that of its own samples, or of its own time, or of slices of parameters.
            self.record.hides_gradients = True
            return
        if self._in_step:
            step = self._trainer.progress.step + 1
        elif not by_design.loss_of(self._trainer.config.compression):
            # A server. A push names its step: counted from the start of the run if the compressor saves that number,
            # otherwise from the start of this process.
            compressor = self._strategy.compressor
            step = compressor.step + (0 if "step" in compressor.state_dict() else self._first_step)
        else:
            self.record.hides_gradients = True
            return
        gradients = {name: parameter.grad for name, parameter in self._optimized() if parameter.grad is not None}
        self._keep(step, GRADIENTS, gradients)

    def _update_unless_skipped(self, *args: Any, **kwargs: Any) -> Any:
        # A server updates outside of its steps.
        if self._in_step and self._trainer.progress.step + 1 in self._skipped:
            return None
        return self._update(*args, **kwargs)

    def _optimized(self) -> Iterable[tuple[str, Tensor]]:
        for group in self._strategy.optimizer.param_groups:
            for parameter in group["params"]:
                if (name := self._names.get(parameter)) is not None:
                    yield name, parameter

    @override
    def on_step_end(self, run: RunView) -> None:
        number = run.progress.step
        record = self._step(number)
        # Before the strategy's model: to show it, a strategy may put the mean of all copies into this rank's.
        own = {}
        if not self._strategy.slices_parameters:
            own = {name: parameter.detach().clone() for name, parameter in self._optimized()}
        state = self._strategy.model_state()
        distances = [distance(own[name], state[name]) for name in own if name in state]
        record.copies = max((far / (near or 1.0) for far, near in distances), default=None)
        if run.runtime.is_main:
            record.hashes = {name: tensor_hash(tensor) for name, tensor in state.items()}
            self._keep(number, STATE, state)

    def _keep(self, step: int, kind: str, tensors: Mapping[str, Tensor]) -> None:
        if self._writes:
            self._reference.save(step, kind, tensors)
            found = {name: (0.0, norm(tensor)) for name, tensor in tensors.items()}
        else:
            found = self._reference.distances(step, kind, tensors)
        self._step(step).distances[kind] = found

    def _recorded_evaluation(self, split: str, *args: Any) -> Evaluation:
        evaluation = self._evaluate(split, *args)
        self.record.evaluations.append(
            {
                "step": self._trainer.progress.step,
                "split": split,
                "loss": evaluation.loss,
                "count": evaluation.count,
                # Means; what else there is are counts, such as that of correct answers, which say the same.
                "metrics": {name: float(evaluation.metrics[name]) for name in self._trainer.task.validated},
            }
        )
        return evaluation

    @override
    def on_fit_end(self, run: RunView) -> None:
        self.record.uncompressed_bytes = self._strategy.uncompressed_bytes_per_step()


def replace_method(target: object, name: str, method: Callable[..., Any]) -> None:
    """Lets one object do something else under a method's name."""
    setattr(target, name, method)


def names_of(optimizer: torch.optim.Optimizer, roots: Iterable[nn.Module]) -> dict[Tensor, str]:
    """The name of each parameter of an optimizer, by the optimizer itself or by the modules that hold them."""
    names: dict[Tensor, str] = {parameter: name for root in roots for name, parameter in root.named_parameters()}
    for group in optimizer.param_groups:
        names |= dict(zip(group["params"], group.get("param_names", ()), strict=False))
    return names


def tied_names(root: nn.Module) -> list[list[str]]:
    """The names of parameters that are one tensor, for each that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _target_hashes(targets: Targets) -> list[str]:
    if isinstance(targets, Tensor):
        return row_hashes(targets)
    hashes: dict[str, list[str]] = map_targets(row_hashes, targets)  # type: ignore[arg-type]
    return ["".join(parts) for parts in zip(*hashes.values(), strict=True)]


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
