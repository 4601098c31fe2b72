"""What each module gives in one step, in a few numbers a sample: so that runs of several ranks can be compared."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distrain.data.batch import Batch
from distrain.data.sampler import shard_bounds
from distrain.runtime.device import RandomState
from distrain.strategies.base import StepResult
from distrain.strategies.pipeline.calls import tensors_of
from distrain.training.trainer import Trainer
from distrain.verification.recorder import replace_method


@dataclass
class Call:
    """The outputs of one call of a module, over all pieces of a rank's share.

    Attributes:
        name: Of the module in the unsplit model.
        kind: Its class.
        rows: For each sample, in the order of the share: the norm of its output, its product with a fixed random
            vector, and the number of its values. Where outputs differ, the product does, but for an unlikely accident.
        draws: Whether the module drew random numbers.
    """

    name: str
    kind: str
    rows: list[list[float]] = field(default_factory=list)
    draws: bool = False


@dataclass
class Trace:
    """The calls of a rank in one step, in the order in which they end; inner modules end before those that hold them.

    Attributes:
        shard: The rank's share of the batch.
        batch: Samples of the whole batch.
        calls: By name of the module and number of the call in a forward pass.
    """

    shard: tuple[int, int] = (0, 0)
    batch: int = 0
    calls: dict[str, Call] = field(default_factory=dict)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Trace:
        """What :func:`dataclasses.asdict` gave, after a way through JSON."""
        calls = {key: Call(**call) for key, call in plain["calls"].items()}
        return cls(tuple(plain["shard"]), plain["batch"], calls)


class Tracer:
    """Hooks of all modules that a rank runs.

    Args:
        trainer: Before its first step.
        step: The step to trace.
    """

    def __init__(self, trainer: Trainer, step: int) -> None:
        self.trace = Trace()
        self._trainer, self._step, self._active = trainer, step, False
        self._samples, self._counts = 0, dict[str, int]()
        strategy = trainer.strategy
        self._train_step = strategy.train_step
        replace_method(strategy, "train_step", self._traced_step)
        for root in strategy.own_modules():
            root.register_forward_pre_hook(self._begin_piece, with_kwargs=True)
            for name, module in root.named_modules():
                self._hook(name, module)

    def _traced_step(self, batch: Batch) -> StepResult:
        self._active = self._trainer.progress.step + 1 == self._step
        if self._active:
            self.trace.shard, self.trace.batch = self._trainer.strategy.data_shard, batch.global_count
        try:
            return self._train_step(batch)
        finally:
            self._active = False

    def _begin_piece(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._samples = samples_of((args, kwargs))
        self._counts = {}

    def _hook(self, name: str, module: nn.Module) -> None:
        states: list[RandomState] = []

        def before(module: nn.Module, args: Any) -> None:
            if self._active:
                states.append(RandomState.now())

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if not self._active:
                return
            drew = bool(states) and not RandomState.now().draws_equal(states.pop())
            number = self._counts.get(name, 0)
            self._counts[name] = number + 1
            call = self.trace.calls.setdefault(f"{name}#{number}", Call(name, type(module).__name__))
            call.draws = call.draws or drew
            # A forward pass that is done again in the backward pass adds nothing.
            call.rows += rows_of(output, self._samples)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)


def samples_of(inputs: Any) -> int:
    """How many samples a forward pass gets: the length of its first tensor."""
    return next((len(tensor) for tensor in tensors_of(inputs) if tensor.dim()), 0)


def rows_of(output: Any, samples: int) -> list[list[float]]:
    """Norm, projection and size of each sample's output; empty where the outputs are not laid out by samples."""
    parts = [
        tensor.detach().reshape(samples, -1).cpu().double()
        for tensor in tensors_of(output)
        if samples and tensor.is_floating_point() and tensor.dim() and len(tensor) % samples == 0
    ]
    if not parts:
        return []
    rows = torch.cat(parts, dim=1)
    sizes = rows.new_full((len(rows),), rows.shape[1])
    return torch.stack((rows.norm(dim=1), rows @ _direction(rows.shape[1]), sizes), dim=1).tolist()


@functools.lru_cache(maxsize=64)
def _direction(size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)


@dataclass(frozen=True)
class ModuleDifference:
    """A module whose outputs differ.

    Attributes:
        key: Of its call in the trace.
        name: Of the module.
        kind: Its class.
        value: Largest difference of a sample's output, relative to the largest output of the module.
    """

    key: str
    name: str
    kind: str
    value: float


def first_difference(serial: Trace, ranks: Sequence[Trace], limit: float) -> ModuleDifference | None:
    """The first module, in the order in which they end, whose outputs for some sample differ from the serial run's."""
    for key, value in differences(serial, ranks):
        if not value <= limit:
            call = serial.calls[key]
            return ModuleDifference(key, call.name, call.kind, value)
    return None


def differences(serial: Trace, ranks: Sequence[Trace]) -> Iterator[tuple[str, float]]:
    """The largest difference of each call that can be compared, in the serial run's order."""
    # Ranks that divide layers, or hold stages of one pipeline, have the same share.
    together: dict[tuple[int, int], list[Trace]] = {}
    for trace in ranks:
        if trace.shard[1]:
            together.setdefault(trace.shard, []).append(trace)
    for key, call in serial.calls.items():
        if len(call.rows) < serial.batch:
            continue
        scale = max((row[0] for row in call.rows), default=0.0) or 1.0
        worst = 0.0
        for shard, traces in together.items():
            low, high = shard_bounds(serial.batch, *shard)
            found = [trace.calls[key].rows[: high - low] for trace in traces if key in trace.calls]
            for gap in _gaps([rows for rows in found if len(rows) == high - low], call.rows[low:high]):
                worst = max(worst, gap / scale if not math.isnan(gap) else math.inf)
        yield key, worst


def _gaps(found: Sequence[list[list[float]]], expected: list[list[float]]) -> Iterator[float]:
    """How far the outputs for some samples are from those of the serial run.

    Args:
        found: The rows of each rank that has some. Ranks that divide a layer have a part of each row; if there are not
            all parts, those are not compared.
        expected: The serial run's rows.
    """
    for rows in zip(expected, *found, strict=True):
        (norm, product, size), *theirs = rows
        yield from (max(abs(row[0] - norm), abs(row[1] - product)) for row in theirs if row[2] == size)
        parts = [row for row in theirs if row[2] != size]
        if parts and sum(row[2] for row in parts) == size:
            yield abs(math.hypot(*(row[0] for row in parts)) - norm)
