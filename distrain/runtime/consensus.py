"""How all ranks agree, between steps, to stop, to save, or to go back to a checkpoint.

A rank may request one of these at any moment (it received a signal, the time is up, a gradient was not finite), but all
ranks must act on it after the same step. Asking all ranks in every step would cost more than many steps take. So they
exchange their requests a few times a second, over a process group used for nothing else, and read the result later
without waiting.
"""

from __future__ import annotations

import enum
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from distrain.communication.collectives import Communicator
from distrain.communication.types import Pending
from distrain.files.contained_folder import ContainedFolder
from distrain.files.writing import losing_on_disk_errors, to_json

if TYPE_CHECKING:
    from distrain.config.schema import Config
    from distrain.runtime.runtime import Runtime

#: Seconds between two exchanges.
_PERIOD = 0.35
#: If steps take longer than this, in seconds, ranks wait for the result at once, which takes a few milliseconds.
_INFREQUENT = 0.5
#: The number of steps between exchanges grows at most by this factor at once, since a few steps may be fast by chance.
_GROWTH = 4

STOPPED_FILE = "stopped.json"
_TIME_LIMIT = "trainer.max_minutes"


class Request(enum.IntFlag):
    """What a rank asks all ranks to do after a step."""

    NOTHING = 0
    SAVE = 1
    REWIND = 2
    TIME_LIMIT = 4
    SIGUSR1 = 8
    SIGQUIT = 16
    SIGHUP = 32
    LAUNCHER_ENDED = 64
    SIGINT = 128
    SIGTERM = 256

    @property
    def reason(self) -> str | None:
        """The most urgent reason to stop the run, for messages; ``None`` if it continues.

        A signal's name, a configuration key, or ``the end of its launcher``.
        """
        return next((reason for request, reason in _REASONS.items() if request in self), None)


#: The most urgent reason first.
_REASONS = {
    Request.SIGTERM: "SIGTERM",
    Request.SIGINT: "SIGINT",
    Request.LAUNCHER_ENDED: "the end of its launcher",
    Request.SIGHUP: "SIGHUP",
    Request.SIGQUIT: "SIGQUIT",
    Request.SIGUSR1: "SIGUSR1",
    Request.TIME_LIMIT: _TIME_LIMIT,
}
_REQUESTS = (Request.SAVE, Request.REWIND, *_REASONS)


class Consensus(Protocol):
    """Combines the requests of all ranks."""

    def agree(self, request: Request) -> Request:
        """Called by every rank after every step.

        Args:
            request: This rank's request, repeated until it is part of a result.

        Returns:
            What to do now. All ranks get the same result after the same step.
        """

    def close(self) -> None:
        """Ends the exchange; all ranks call it after the same step."""


class SingleRankConsensus(Consensus):
    """The consensus of a single rank: every request is granted at once."""

    @override
    def agree(self, request: Request) -> Request:
        return request

    @override
    def close(self) -> None:
        pass


class AllReduceConsensus(Consensus):
    """Combines requests in all-reduces, each started after one step and read after a later one.

    The number of steps in between follows from the slowest rank's time per step, which the all-reduce also carries, so
    all ranks start and read an all-reduce after the same steps.

    Args:
        communicator: The ranks, for tensors on the CPU, used for nothing else. All ranks take the same number of steps.
        synchronised: Returns whether the ranks synchronised in the last step. Only then an all-reduce is started or
            read, so that ranks that train independently are not forced into lockstep.
        wait_if_infrequent: Whether to wait for the result at once if synchronised steps are long.
    """

    def __init__(
        self, communicator: Communicator, synchronised: Callable[[], bool], *, wait_if_infrequent: bool = True
    ) -> None:
        self._communicator = communicator
        self._synchronised = synchronised
        self._wait_if_infrequent = wait_if_infrequent
        self._pending: tuple[Tensor, Pending] | None = None
        self._slowest_step = 0.0
        self._interval = self._steps_left = 1
        self._step_seconds: list[float] = []
        self._last_step = time.perf_counter()

    @override
    def agree(self, request: Request) -> Request:
        if not self._synchronised():
            return Request.NOTHING
        now = time.perf_counter()
        self._step_seconds.append(now - self._last_step)
        self._last_step = now
        self._steps_left -= 1
        if self._steps_left:
            return Request.NOTHING
        agreed = self._read()
        self._start(request & ~agreed)
        if self._wait_if_infrequent and self._slowest_step > _INFREQUENT:
            agreed |= self._read()
        affordable = int(_PERIOD / self._slowest_step) if self._slowest_step else 1
        self._interval = self._steps_left = max(1, min(affordable, _GROWTH * self._interval))
        return agreed

    @override
    def close(self) -> None:
        # Completes the all-reduce that is under way, so that no message is left in the group.
        self._read()

    def _start(self, request: Request) -> None:
        # The median: evaluation, a checkpoint or an epoch's short last batch say nothing about the usual step.
        values = [float(each in request) for each in _REQUESTS] + [statistics.median(self._step_seconds)]
        self._step_seconds.clear()
        tensor = torch.tensor(values, dtype=torch.float64)
        self._pending = tensor, self._communicator.start_all_reduce(tensor, "max")

    def _read(self) -> Request:
        if self._pending is None:
            return Request.NOTHING
        (tensor, pending), self._pending = self._pending, None
        pending.wait()
        agreed, self._slowest_step = _decoded(tensor)
        return agreed


class WaitingConsensus(Consensus):
    """Combines requests in all-reduces that every rank waits for, a few times a second: between batches of evaluation.

    Evaluation begins and ends with all ranks together, so waiting for the slowest one costs nothing.

    Args:
        communicator: The ranks. All of them call :meth:`agree` equally often, and no collective is under way then.
        device: Device of the tensors that they exchange.
    """

    def __init__(self, communicator: Communicator, device: torch.device) -> None:
        self._communicator, self._device = communicator, device
        self._interval = self._batches_left = 1
        self._last_exchange = time.perf_counter()

    @override
    def agree(self, request: Request) -> Request:
        if self._communicator.size == 1:
            return request
        self._batches_left -= 1
        if self._batches_left:
            return Request.NOTHING
        now = time.perf_counter()
        batch_seconds, self._last_exchange = (now - self._last_exchange) / self._interval, now
        values = [float(each in request) for each in _REQUESTS] + [batch_seconds]
        tensor = torch.tensor(values, dtype=torch.float64, device=self._device)
        agreed, slowest_batch = _decoded(self._communicator.all_reduce(tensor, "max"))
        # The training since the last evaluation makes its first batch look slow, never fast.
        affordable = int(_PERIOD / slowest_batch) if slowest_batch else 1
        self._interval = self._batches_left = max(1, min(affordable, _GROWTH * self._interval))
        return agreed

    @override
    def close(self) -> None:
        # No message is pending.
        pass


def _decoded(values: Tensor) -> tuple[Request, float]:
    """The requests of all ranks and the slowest one's seconds, from the sums that they exchanged."""
    *flags, seconds = values.tolist()
    agreed = Request.NOTHING
    for request, flag in zip(_REQUESTS, flags, strict=True):
        agreed |= request if flag else Request.NOTHING
    return agreed, float(seconds)


def request_from_signal(signal_name: str | None) -> Request:
    """What a signal, or :data:`~distrain.errors.LAUNCHER_ENDED`, requests; nothing for ``None``."""
    return Request.NOTHING if signal_name is None else Request[signal_name]


class RunControl:
    """Collects this rank's requests, and returns what all ranks agreed on.

    Args:
        config: The run's configuration. Only rank 0 checks its time limits.
        runtime: Knows of signals, and when the run began.
        consensus: Combines the requests of all ranks after steps.
        training_group: The ranks that evaluate together; by default this rank alone.
    """

    def __init__(
        self, config: Config, runtime: Runtime, consensus: Consensus, training_group: Communicator | None = None
    ) -> None:
        self._runtime = runtime
        self._consensus = consensus
        self._in_evaluation = WaitingConsensus(training_group or Communicator(), runtime.device)
        self._end_time = self._save_seconds = float("inf")
        if runtime.is_main:
            self._end_time = runtime.start_time + 60 * (config.trainer.max_minutes or float("inf"))
            self._save_seconds = 60 * (config.checkpoint.every_minutes or float("inf"))
        self._last_save = time.monotonic()

    def agree(self, request: Request = Request.NOTHING) -> Request:
        """Returns what all ranks do now; called by all of them after every step.

        Args:
            request: This rank's request, besides signals and time limits.

        Raises:
            Terminated: A signal came because another rank failed.
        """
        request |= self._requested_by_signal()
        if time.monotonic() >= self._end_time:
            request |= Request.TIME_LIMIT
        if time.monotonic() - self._last_save >= self._save_seconds:
            request |= Request.SAVE
        return self._consensus.agree(request)

    def why_stop_evaluation(self) -> str | None:
        """Why all ranks stop an evaluation now; all of them call it after every batch.

        Only signals stop it. When ``trainer.max_minutes`` are over an evaluation is finished, since it would be
        repeated from its beginning, and a run whose evaluation takes longer would never get past it.

        Raises:
            Terminated: A signal came because another rank failed.
        """
        return self._in_evaluation.agree(self._requested_by_signal()).reason

    def _requested_by_signal(self) -> Request:
        signal_name = self._runtime.stop_requested
        if signal_name is not None:
            self._runtime.raise_if_another_rank_failed()
        return request_from_signal(signal_name)

    def note_save(self) -> None:
        """Records that a checkpoint was saved just now."""
        self._last_save = time.monotonic()

    def close(self) -> None:
        """Ends the exchange of requests; all ranks call it after the same step."""
        self._consensus.close()


def write_stop_file(run_dir: Path, reason: str, step: int, exit_code: int) -> None:
    """Writes ``stopped.json``, for launchers whose own exit code does not tell that the run stopped on request."""
    with losing_on_disk_errors(STOPPED_FILE):
        content = to_json({"reason": reason, "step": step, "exit_code": exit_code})
        ContainedFolder(run_dir).replace_text(STOPPED_FILE, content)


def remove_stop_file(run_dir: Path) -> None:
    """Removes ``stopped.json``, because the run continues."""
    with losing_on_disk_errors(f"The removal of {STOPPED_FILE}"):
        ContainedFolder(run_dir).unlink(STOPPED_FILE, missing_ok=True)
