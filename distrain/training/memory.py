"""The memory of a rank by what it is for: measured in a run, and named in the error if there is too little of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distrain.communication.collectives import Communicator
from distrain.config.schema import Config
from distrain.errors import OutOfMemory, first_line
from distrain.files.untrusted import finite_number
from distrain.runtime.device import float64_device
from distrain.runtime.live_memory import LiveMemory
from distrain.runtime.runtime import Runtime
from distrain.strategies import held_memory
from distrain.strategies.base import Strategy

if TYPE_CHECKING:
    from distrain.data.batch import Batch

#: Kinds of memory, in the order in which they are shown.
MEMORY_KINDS = ("parameters", "gradients", "optimizer", "activations", "buckets")
MIB = 2**20
#: What torch says if the C library has no memory left.
_CPU_MESSAGE = "can't allocate memory"
_UNKNOWN = -1.0
#: Where what is offloaded lies, by ``strategy.offload``.
_PLACES = {"file": "in files", "host": "in the host's memory"}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that there is not enough memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _CPU_MESSAGE in str(error)


class MemoryWatch:
    """Watches the steps of a rank.

    On a GPU torch's allocator knows the peak. On a CPU all tensors are followed that one step makes, the first
    one after another that is as large: the optimizer has its state by then. That is not possible where torch compiles
    the model.

    Args:
        config: The run's configuration.
        runtime: This rank's surroundings.
        strategy: Holds the tensors, and takes the steps.
    """

    def __init__(self, config: Config, runtime: Runtime, strategy: Strategy) -> None:
        self._config, self._runtime, self._strategy = config, runtime, strategy
        #: Samples of the largest batch so far, and the bytes that the step which was followed made.
        self._largest_batch = 0
        self._step_bytes = _UNKNOWN
        self._can_follow = self._has_plain_tensors() and runtime.device.type == "cpu" and not config.trainer.compile

    @contextlib.contextmanager
    def step(self, batch: Batch) -> Iterator[None]:
        """A step is taken inside this block.

        Args:
            batch: This rank's share.

        Raises:
            OutOfMemory: In place of an error that says so in many ways.
        """
        repeats = 0 < self._largest_batch <= batch.global_count
        self._largest_batch = max(self._largest_batch, batch.global_count)
        measured = self._can_follow and repeats and self._step_bytes == _UNKNOWN
        try:
            with LiveMemory(self._runtime.device) if measured else contextlib.nullcontext() as live:
                yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(self._advice(error, batch.global_count)) from error
        if live is not None:
            self._step_bytes = float(live.peak)

    def _has_plain_tensors(self) -> bool:
        modules = self._strategy.own_modules()
        return all(type(parameter.data) is Tensor for module in modules for parameter in module.parameters())

    def _advice(self, error: Exception, count: int) -> str:
        config, ranks = self._config, self._runtime.world.size
        sizes = self._strategy.forward_sizes(config, ranks, count, training=True)
        samples = max((size for of_rank in sizes for size in of_rank), default=count)
        held = held_memory.bytes_by_kind(self._strategy.held_tensors())
        listed = ", ".join(f"{kind} {size / MIB:,.0f}" for kind, size in held.items() if size)
        ways = [f"trainer.micro_batch_size={max(samples // 2, 1)}"] if samples > 1 else []
        if config.model.checkpoint_activations in ("none", "auto"):
            ways.append("model.checkpoint_activations=all")
        if keys := config.strategy.keys_for_less_memory(ranks):
            ways.append(keys)
        what = f"out of memory with {samples} samples a pass, beside what the rank holds all the time (MiB: {listed})"
        advice = f"; type {' or '.join(ways)}" if ways else ""
        return f"{what}{advice}. torch says: {first_line(error)}"

    def summary(self, group: Communicator, predicted: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
        """MiB of each kind on the rank that has most of it; all ranks of the group call it together.

        Args:
            group: The ranks that train.
            predicted: What a plan predicts of the run; may be empty.
        """
        device = self._runtime.device
        held = held_memory.bytes_by_kind(self._strategy.held_tensors())
        step = self._step_bytes
        if device.type == "cuda":
            step = max(torch.cuda.max_memory_allocated(device) - sum(held.values()), 0.0)
        sizes = [held.get(kind, step) for kind in MEMORY_KINDS]
        largest = group.all_reduce(torch.tensor(sizes, dtype=torch.float64, device=float64_device(device)), "max")
        measured = {
            kind: round(size / MIB, 1) if size >= 0 else None
            for kind, size in zip(MEMORY_KINDS, largest.tolist(), strict=True)
        }
        of_plan = predicted.get("memory_by_kind_mb")
        return {"measured": measured, **({"predicted": dict(of_plan)} if of_plan else {})}


def memory_line(summary: Mapping[str, Any]) -> str:
    """The memory of a run in one line, measured and predicted; empty if the summary has none.

    Args:
        summary: Content of ``summary.json``; may come from a stranger.
    """
    found = summary.get("memory_by_kind_mb")
    if not isinstance(found, Mapping):
        return ""
    parts = []
    for name, title in (("measured", ""), ("predicted", "predicted ")):
        sizes = found.get(name)
        if isinstance(sizes, Mapping):
            parts.append(title + _listed(sizes))
    offloaded = summary.get("offloaded")
    if isinstance(offloaded, Mapping) and isinstance(offloaded.get("mb"), Mapping):
        where = _PLACES.get(str(offloaded.get("to")), "elsewhere")
        parts.append(f"{where} {_listed(offloaded['mb'])}")
    return "; ".join(parts)


def _listed(sizes: Mapping[str, Any]) -> str:
    numbers = {kind: finite_number(sizes.get(kind)) for kind in MEMORY_KINDS}
    return ", ".join(f"{kind} {size:,.1f}" for kind, size in numbers.items() if size is not None)
