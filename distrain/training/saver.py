"""Saving while training goes on: a step waits for a copy of the state only, and files are written from that copy.

Mohan et al. 2021, "CheckFreq" (FAST '21), call the two parts snapshot and persist, and never let more than one save be
under way.
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
from distrain.runtime.runtime import Runtime
from distrain.strategies.base import Strategy

log = logging.getLogger(__name__)

T = TypeVar("T")
_CPU = torch.device("cpu")
#: How long a run that failed waits for a save that is under way.
_PATIENCE_SECONDS = 5.0


class Saver:
    """Saves a run's state, one save at a time, and keeps the newest checkpoints and the best; ranks use it together.

    A save that fails because a rank can't write (a full disk, a folder that is gone) does not end the run: rank 0 says
    so in its log, the checkpoints that were there stay, and :attr:`lost` tells. Whatever else goes wrong in the
    background is raised by the next :meth:`poll` or :meth:`wait`.

    Args:
        folder: The run's ``checkpoints`` folder.
        keep: How many of the newest checkpoints stay.
        everyone: The ranks that save; in the background a group that nobody else uses, since the messages of a group
            don't say which thread they are for.
        device: Where ``everyone`` communicates.
        background: Write while training goes on.
        expected: Called at the first :meth:`poll`: tensors like those that this rank will save, for which memory is
            made ready in the background.

    Attributes:
        lost: Step of the last save, if it failed; known when :meth:`wait` returns, and then the same on all ranks.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        everyone: Communicator | None = None,
        device: torch.device = _CPU,
        *,
        background: bool,
        expected: Callable[[], list[Tensor]] = list,
    ) -> None:
        self.lost: int | None = None
        self._folder = folder
        self._keep = keep
        self._everyone = everyone if everyone is not None else Communicator()
        self._device = device
        self._staging = _Staging() if background else None
        self._expected: Callable[[], list[Tensor]] | None = expected if background else None
        self._under_way: Future[int | None] | None = None
        self._saves = 0
        self._stalls: list[float] = []
        self._seconds: list[float] = []

    def save(self, state: Mapping[str, Any], progress: Mapping[str, Any], began: float | None = None) -> None:
        """Saves, or begins to, once the last save is done; the tensors may be changed when it returns.

        Args:
            state: See :func:`distrain.checkpoint.format.save`.
            progress: Likewise; ``best_step`` is the checkpoint that is kept besides the newest.
            began: When training stopped for this save, by ``time.perf_counter``; by default now.
        """
        began = time.perf_counter() if began is None else began
        self.wait()
        self._saves += 1
        if self._staging is None:
            self.lost = self._write(state, progress)
        else:
            staged = self._staging.copy(state)
            self._under_way = _in_background(functools.partial(self._write_staged, staged, dict(progress)))
        self._stalls.append(time.perf_counter() - began)

    def poll(self) -> None:
        """Raises what went wrong in the background, if something has by now; called after every step."""
        if self._expected is not None and self._staging is not None:
            self._staging.prepare(self._expected())
            self._expected = None
        if self._under_way is not None and self._under_way.done():
            self.wait()

    def wait(self) -> None:
        """Waits for the save that is under way, and raises what went wrong in it."""
        if self._under_way is not None:
            self.lost = self._under_way.result()
            self._under_way = None

    def close(self) -> None:
        """For a run that ends in an error: gives a save that is under way some time to become complete."""
        if self._under_way is not None:
            futures.wait([self._under_way], _PATIENCE_SECONDS)

    def report(self) -> dict[str, Any]:
        """What saving cost; all ranks call it together, after :meth:`wait`.

        Returns:
            ``saves``; ``failed`` among them; ``stall_ms``, how long training stood still for one, ``max`` and ``mean``;
            ``write_seconds``, from there until it was complete, the mean. Of each the largest of all ranks.
        """
        stalls, seconds = (np.asarray(each or [0.0]) for each in (self._stalls, self._seconds))
        mine = torch.tensor([stalls.max(), stalls.mean(), seconds.mean()], dtype=torch.float64, device=self._device)
        longest, mean, writing = self._everyone.all_reduce(mine, "max").tolist()
        return {
            "saves": self._saves,
            "failed": self._saves - len(self._seconds),
            "stall_ms": {"max": 1000 * longest, "mean": 1000 * mean},
            "write_seconds": writing,
        }

    def _write_staged(self, state: Mapping[str, Any], progress: Mapping[str, Any]) -> int | None:
        assert self._staging is not None
        self._staging.wait()
        return self._write(state, progress)

    def _write(self, state: Mapping[str, Any], progress: Mapping[str, Any]) -> int | None:
        """Writes a checkpoint and removes old ones; returns the step if it could not be written."""
        start, step = time.perf_counter(), int(progress["step"])
        try:
            checkpoint_writer.save(self._folder, state, progress, self._everyone, self._device)
        except checkpoint_writer.SaveFailed as error:
            if self._everyone.rank == 0:
                log.error("CHECKPOINT NOT SAVED at step %d: %s. The run goes on; older checkpoints stay", step, error)
            return step
        self._seconds.append(time.perf_counter() - start)
        if self._everyone.rank == 0:
            checkpoint_retention.prune(self._folder, self._keep, progress["best_step"], step)
        return None


#: Shape, strides, type and device of a tensor.
_Like = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]


class _Staging:
    """Copies of a state's tensors on the CPU, in memory that the next copy uses again.

    Fresh memory costs more than the copy: the system clears each page when it is first written.
    """

    def __init__(self) -> None:
        self._places: dict[str, tuple[Tensor, _Like]] = {}
        self._copied: torch.cuda.Event | None = None
        self._spare: dict[_Like, list[Tensor]] = defaultdict(list)
        self._prepared: Future[None] | None = None

    def prepare(self, tensors: list[Tensor]) -> None:
        """Begins to make memory ready for a first copy of tensors like these."""

        def make_ready() -> None:
            for tensor in tensors:
                self._spare[_like(tensor)].append(_place(tensor).zero_())

        self._prepared = _in_background(make_ready)

    def copy(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The state with copies of its tensors; they count once :meth:`wait` has returned."""
        if self._prepared is not None:
            self._prepared.result()
            self._prepared = None
        before, self._places = self._places, {}
        copied = dict(state)
        for part in (*checkpoint_format.PARTS, *checkpoint_format.PER_RANK_PARTS):
            copied[part] = {
                name: self._copy(f"{part}/{name}", tensor.detach(), before)
                for name, tensor in state.get(part, {}).items()
            }
        self._spare.clear()
        self._copied = None
        if any(device.type == "cuda" for _, (_, _, _, device) in self._places.values()):
            # Later steps are behind the copies in the device's queue, so nobody needs to wait here.
            self._copied = torch.cuda.Event()
            self._copied.record()
        return copied

    def wait(self) -> None:
        """Waits until the device has copied what it was told to."""
        if self._copied is not None:
            self._copied.synchronize()

    def _copy(self, key: str, tensor: Tensor, before: Mapping[str, tuple[Tensor, _Like]]) -> Tensor:
        like = _like(tensor)
        place, of = before.get(key, (None, None))
        if place is None or of != like:
            place = self._spare[like].pop() if self._spare[like] else _place(tensor)
        self._places[key] = place, like
        return place.copy_(tensor, non_blocking=True)


def _in_background(work: Callable[[], T]) -> Future[T]:
    """Does something in a thread that ends with the process: a rank that failed waits for no peers that are gone."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # whoever asks for the result gets it
            done.set_exception(error)

    threading.Thread(target=run, name="distrain-saver", daemon=True).start()
    return done


def _like(tensor: Tensor) -> _Like:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _place(tensor: Tensor) -> Tensor:
    # With its strides: a copy into another layout takes far longer, and is made when the file is written.
    return torch.empty_like(tensor.detach(), device=_CPU, pin_memory=tensor.is_cuda)


def build(config: Config, runtime: Runtime, strategy: Strategy) -> Saver:
    """The run's saver, with the group of ranks that it needs for itself; all ranks call it together."""
    folder, keep = checkpoint_format.checkpoints_folder(runtime.run_dir), config.checkpoint.keep
    if runtime.is_main:
        checkpoint_retention.remove_leftovers(folder)
    if not config.checkpoint.background or not strategy.saves_in_background:
        return Saver(folder, keep, strategy.training_group, runtime.device, background=False)
    if runtime.world.size == 1:
        return Saver(folder, keep, background=True, expected=functools.partial(_to_be_saved, strategy))
    return Saver(
        folder, keep, runtime.control_group(), background=True, expected=functools.partial(_to_be_saved, strategy)
    )


def _to_be_saved(strategy: Strategy) -> list[Tensor]:
    """Most of what this rank will save, known after a first step: optimizers begin to keep things then."""
    if strategy.data_shard[0] != 0:
        return []
    optimizer = strategy.optimizer
    kept = [value for each in optimizer.state.values() for value in each.values() if isinstance(value, Tensor)]
    return [parameter for group in optimizer.param_groups for parameter in group["params"]] + kept
