"""Saves checkpoints while training continues: a step waits only for a copy of the state, which is then written to disk.

The two phases are called snapshot and persist in Mohan et al. 2021, "CheckFreq" (FAST '21). As there, at most one save
is in progress at any time.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent import futures
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from distrain.checkpoint import format as checkpoint_format
from distrain.checkpoint import retention as checkpoint_retention
from distrain.checkpoint import writer as checkpoint_writer
from distrain.communication.collectives import Communicator
from distrain.config.schema import Config
from distrain.runtime.device import float64_device
from distrain.runtime.runtime import Runtime
from distrain.strategies.base import Strategy

log = logging.getLogger(__name__)

T = TypeVar("T")
_CPU = torch.device("cpu")
#: How long a failed run waits for a save in progress.
_CLOSE_TIMEOUT_SECONDS = 5.0


class Saver:
    """Saves a run's state, one save at a time, and removes old checkpoints; all ranks of the group call it together.

    A save that fails because a rank can't write (disk full, folder removed) does not end the run: rank 0 logs the
    error, older checkpoints stay, and :attr:`failed_step` is set. Any other error in the background is raised by the
    next :meth:`poll` or :meth:`wait`.

    Args:
        folder: The run's ``checkpoints`` folder.
        keep: Number of newest checkpoints to keep; the best one is kept too.
        group: The ranks that save; by default this rank only. To save in the background they need a group of their own,
            since a process group can't tell the messages of two threads apart.
        device: Device on which the group communicates.
        background: Write while training continues.
        may_write: Returns whether this start still owns the run's folder; if not, nothing is saved or removed there.
        expected_tensors: Returns tensors with the shapes and types that this rank will save. Called at the first
            :meth:`poll`; memory for their copies is then allocated in the background.

    Attributes:
        failure: Why the last save failed, which names rank, host and file; empty if it did not.
        failed_step: Step of the last save if it failed, else ``None``; up to date and equal on all ranks after
            :meth:`wait`.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        group: Communicator | None = None,
        device: torch.device = _CPU,
        *,
        background: bool,
        may_write: Callable[[], bool] = lambda: True,
        expected_tensors: Callable[[], list[Tensor]] = list,
    ) -> None:
        self.failure = ""
        self.failed_step: int | None = None
        self._folder = folder
        self._keep = keep
        self._group = group if group is not None else Communicator()
        self._device = device
        self._may_write = may_write
        self._staging = _Staging() if background else None
        self._expected_tensors: Callable[[], list[Tensor]] | None = expected_tensors if background else None
        self._pending: Future[int | None] | None = None
        self._saves = 0
        self._stall_seconds: list[float] = []
        self._write_seconds: list[float] = []

    def save(self, state: Mapping[str, Any], progress: Mapping[str, Any], start: float | None = None) -> None:
        """Waits for the last save, then saves or starts a save; the tensors may be changed after it returns.

        Args:
            state: See :func:`distrain.checkpoint.writer.save`.
            progress: Likewise; ``best_step`` names a checkpoint to keep in addition to the newest.
            start: When training stopped for this save, by ``time.perf_counter``; by default now.
        """
        start = time.perf_counter() if start is None else start
        self.wait()
        self._saves += 1
        if self._staging is None:
            self.failed_step = self._write(state, progress)
        else:
            copy = self._staging.copy(state)
            self._pending = _run_in_background(functools.partial(self._write_copy, copy, dict(progress)))
        self._stall_seconds.append(time.perf_counter() - start)

    def poll(self) -> None:
        """Raises an error of a save that has ended in the background; called after every step."""
        if self._expected_tensors is not None and self._staging is not None:
            self._staging.prepare(self._expected_tensors())
            self._expected_tensors = None
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Waits for the save in progress, and raises its error if there was one."""
        if self._pending is not None:
            self.failed_step = self._pending.result()
            self._pending = None

    def close(self) -> None:
        """Gives a save in progress some time to complete; for a run that ends with an error."""
        if self._pending is not None:
            futures.wait([self._pending], _CLOSE_TIMEOUT_SECONDS)

    def report(self) -> dict[str, Any]:
        """The cost of saving; all ranks call it together, after :meth:`wait`.

        Returns:
            ``saves``: number of saves; ``failed``: how many of them failed; ``stall_ms``: ``max`` and ``mean`` time in
            milliseconds for which a save stopped training; ``write_seconds``: mean time until a save was complete. Each
            is the largest value of all ranks.
        """
        stalls, writes = (np.asarray(seconds or [0.0]) for seconds in (self._stall_seconds, self._write_seconds))
        own = torch.tensor(
            [stalls.max(), stalls.mean(), writes.mean()], dtype=torch.float64, device=float64_device(self._device)
        )
        max_stall, mean_stall, mean_write = self._group.all_reduce(own, "max").tolist()
        return {
            "saves": self._saves,
            "failed": self._saves - len(self._write_seconds),
            "stall_ms": {"max": 1000 * max_stall, "mean": 1000 * mean_stall},
            "write_seconds": mean_write,
        }

    def _write_copy(self, state: Mapping[str, Any], progress: Mapping[str, Any]) -> int | None:
        assert self._staging is not None
        self._staging.wait()
        return self._write(state, progress)

    def _write(self, state: Mapping[str, Any], progress: Mapping[str, Any]) -> int | None:
        """Writes a checkpoint and removes old ones; returns the step if it could not be written, else ``None``."""
        start, step = time.perf_counter(), int(progress["step"])
        try:
            checkpoint_writer.save(self._folder, state, progress, self._group, self._device, may_write=self._may_write)
        except checkpoint_writer.SaveFailed as error:
            self.failure = str(error)
            if self._group.rank == 0:
                log.error("CHECKPOINT NOT SAVED at step %d: %s. The run goes on; older checkpoints stay", step, error)
            return step
        self.failure = ""
        self._write_seconds.append(time.perf_counter() - start)
        # The later steps of another start's checkpoints would look like an abandoned branch.
        if self._group.rank == 0 and self._may_write():
            checkpoint_retention.prune(self._folder, self._keep, progress["best_step"], step)
        return None


#: Shape, strides, type and device of a tensor.
_TensorLayout = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]


class _Staging:
    """Copies the tensors of a state to CPU memory that is reused by the next copy.

    Newly allocated memory would cost more time than the copy: the system clears each page when it is first written.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, tuple[Tensor, _TensorLayout]] = {}
        self._copied: torch.cuda.Event | None = None
        self._prepared_buffers: dict[_TensorLayout, list[Tensor]] = defaultdict(list)
        self._preparation: Future[None] | None = None

    def prepare(self, tensors: list[Tensor]) -> None:
        """Starts to allocate buffers for a first copy of tensors like these, in the background."""

        def allocate() -> None:
            for tensor in tensors:
                self._prepared_buffers[_layout_of(tensor)].append(_allocate_buffer(tensor).zero_())

        self._preparation = _run_in_background(allocate)

    def copy(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the state with copies of its tensors; their content is valid after :meth:`wait`."""
        if self._preparation is not None:
            self._preparation.result()
            self._preparation = None
        old_buffers, self._buffers = self._buffers, {}
        copied = dict(state)
        for part in (*checkpoint_format.PARTS, *checkpoint_format.PER_RANK_PARTS):
            copied[part] = {
                name: self._copy(f"{part}/{name}", tensor.detach(), old_buffers)
                for name, tensor in state.get(part, {}).items()
            }
        self._prepared_buffers.clear()
        self._copied = None
        if any(device.type == "cuda" for _, (_, _, _, device) in self._buffers.values()):
            # Later steps are queued in the same stream after the copies, so training need not wait for the copies.
            self._copied = torch.cuda.Event()
            self._copied.record()
        return copied

    def wait(self) -> None:
        """Waits until the device has finished the copies."""
        if self._copied is not None:
            self._copied.synchronize()

    def _copy(self, key: str, tensor: Tensor, old_buffers: Mapping[str, tuple[Tensor, _TensorLayout]]) -> Tensor:
        layout = _layout_of(tensor)
        buffer, buffer_layout = old_buffers.get(key, (None, None))
        if buffer is None or buffer_layout != layout:
            prepared = self._prepared_buffers[layout]
            buffer = prepared.pop() if prepared else _allocate_buffer(tensor)
        self._buffers[key] = buffer, layout
        # Only CUDA promises, by the event, to say when such a copy is complete.
        return buffer.copy_(tensor, non_blocking=tensor.is_cuda)


def _run_in_background(work: Callable[[], T]) -> Future[T]:
    """Runs a function in a daemon thread, so that a failed rank can exit without waiting for ranks that are gone."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:  # raised again by whoever asks for the result
            result.set_exception(error)

    threading.Thread(target=run, name="distrain-saver", daemon=True).start()
    return result


def _layout_of(tensor: Tensor) -> _TensorLayout:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _allocate_buffer(tensor: Tensor) -> Tensor:
    # With the tensor's strides, since a copy to another memory layout is far slower; the writer does that instead.
    return torch.empty_like(tensor.detach(), device=_CPU, pin_memory=tensor.is_cuda)


def build(config: Config, runtime: Runtime, strategy: Strategy) -> Saver:
    """Builds the run's saver, and its own process group if it needs one; all ranks call it together."""
    folder, keep = checkpoint_format.checkpoints_folder(runtime.run_dir), config.checkpoint.keep
    owner = runtime.owner

    def may_write() -> bool:
        return owner is None or owner.may_write

    if runtime.is_main:
        checkpoint_retention.remove_leftovers(folder)
    if not config.checkpoint.background or not strategy.saves_in_background:
        return Saver(folder, keep, strategy.training_group, runtime.device, background=False, may_write=may_write)
    group = runtime.control_group() if runtime.world.size > 1 else None
    expected_tensors = functools.partial(_expected_tensors, strategy)
    return Saver(folder, keep, group, background=True, may_write=may_write, expected_tensors=expected_tensors)


def _expected_tensors(strategy: Strategy) -> list[Tensor]:
    """Most of the tensors that this rank will save; the optimizer's state exists only after the first step."""
    if strategy.data_shard[0] != 0:
        return []
    optimizer = strategy.optimizer
    parameters: list[Tensor] = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return parameters + states
