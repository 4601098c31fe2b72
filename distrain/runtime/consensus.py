"""What all ranks agree on between steps: to stop, to save, to go back to a checkpoint.

Any rank may wish for one of these at any moment (a signal came, the time is up, a gradient was not finite), but only
what all do at the same step is safe. A question to all ranks in every step would cost more than many steps do, so they
ask each other a few times a second, over a process group of its own, and read the answers later: nobody waits.
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

from distrain.communication.collectives import Communicator
from distrain.communication.types import Pending
from distrain.files.writing import write_json

if TYPE_CHECKING:
    from distrain.config.schema import Config
    from distrain.runtime.runtime import Runtime

#: Seconds between two questions.
_PERIOD = 0.35
#: Where ranks meet less often than this, in seconds, they can wait for an answer at once: it takes a few milliseconds.
_SELDOM = 0.5
#: The number of steps between questions grows by no more than this factor at once; a step may be fast by accident.
_GROWTH = 4

STOPPED_FILE = "stopped.json"


class Request(enum.IntFlag):
    """What a rank wants all to do after a step."""

    NOTHING = 0
    SAVE = 1
    REWIND = 2
    TIME_LIMIT = 4
    SIGUSR1 = 8
    SIGTERM = 16

    @property
    def reason(self) -> str | None:
        """Why the run stops, if it does; the most urgent reason."""
        for wish, reason in (
            (Request.SIGTERM, "SIGTERM"),
            (Request.SIGUSR1, "SIGUSR1"),
            (Request.TIME_LIMIT, _TIME_LIMIT),
        ):
            if wish in self:
                return reason
        return None


_TIME_LIMIT = "trainer.max_minutes"
_WISHES = (Request.SAVE, Request.REWIND, Request.TIME_LIMIT, Request.SIGUSR1, Request.SIGTERM)


class Consensus(Protocol):
    """Carries wishes to all ranks."""

    def agree(self, wish: Request) -> Request:
        """Called by every rank after every step.

        Args:
            wish: This rank's, again and again until it is heard.

        Returns:
            What is to be done now: after the same step, the same on all ranks.
        """

    def close(self) -> None:
        """Ends it; all ranks call it after the same step."""


class SingleRankConsensus:
    """One rank's."""

    def agree(self, wish: Request) -> Request:
        """At once."""
        return wish

    def close(self) -> None:
        """Nothing is under way."""


class AllReduceConsensus:
    """One all-reduce after the other, each begun after a step and read after a later one.

    How many steps lie between follows from how long the slowest rank's steps take, which the all-reduce carries too, so
    all ranks begin and read after the same steps.

    Args:
        communicator: The ranks, on the CPU, for this alone; they take the same number of steps.
        met: Whether the ranks waited for each other in the last step; only then a round begins or is read, so ranks
            that train apart are not made to keep step.
        wait_if_infrequent: Wait for the answer at once where ranks meet seldom.
    """

    def __init__(self, communicator: Communicator, met: Callable[[], bool], *, wait_if_infrequent: bool = True) -> None:
        self._communicator = communicator
        self._met = met
        self._prompt = wait_if_infrequent
        self._round: tuple[Tensor, Pending] | None = None
        self._slowest = 0.0
        self._every = self._left = 1
        self._seconds: list[float] = []
        self._last = time.perf_counter()

    def agree(self, wish: Request) -> Request:
        """Reads the last round's answer and begins the next, when it is time; see the protocol."""
        if not self._met():
            return Request.NOTHING
        now = time.perf_counter()
        self._seconds.append(now - self._last)
        self._last = now
        self._left -= 1
        if self._left:
            return Request.NOTHING
        heard = self._read()
        self._begin(wish & ~heard)
        if self._prompt and self._slowest > _SELDOM:
            heard |= self._read()
        affordable = int(_PERIOD / self._slowest) if self._slowest else 1
        self._every = self._left = max(1, min(affordable, _GROWTH * self._every))
        return heard

    def close(self) -> None:
        """Reads what is under way, so that no message is left behind."""
        self._read()

    def _begin(self, wish: Request) -> None:
        # The middle one: evaluation, a save or a short last batch of an epoch say nothing about steps.
        mine = [float(each in wish) for each in _WISHES] + [statistics.median(self._seconds)]
        self._seconds.clear()
        tensor = torch.tensor(mine, dtype=torch.float64)
        self._round = tensor, self._communicator.start_all_reduce(tensor, "max")

    def _read(self) -> Request:
        if self._round is None:
            return Request.NOTHING
        (tensor, pending), self._round = self._round, None
        pending.wait()
        *wishes, self._slowest = tensor.tolist()
        heard = Request.NOTHING
        for each, wished in zip(_WISHES, wishes, strict=True):
            heard |= each if wished else Request.NOTHING
        return heard


def request_from_signal(signal_name: str | None) -> Request:
    """What a signal asks for."""
    return Request.NOTHING if signal_name is None else Request[signal_name]


class RunControl:
    """Gathers this rank's wishes, and tells what all agreed on.

    Args:
        config: The run's configuration; the times are rank 0's business.
        runtime: Knows of signals, and when the run began.
        consensus: Carries wishes.
    """

    def __init__(self, config: Config, runtime: Runtime, consensus: Consensus) -> None:
        self._runtime = runtime
        self._consensus = consensus
        self._limit = self._every = float("inf")
        if runtime.is_main:
            self._limit = runtime.start_time + 60 * (config.trainer.max_minutes or float("inf"))
            self._every = 60 * (config.checkpoint.every_minutes or float("inf"))
        self._saved = time.monotonic()

    def agree(self, wish: Request = Request.NOTHING) -> Request:
        """What all ranks do now; called by all of them after every step.

        Args:
            wish: This rank's besides signals and times.

        Raises:
            Terminated: The signal came because another rank failed.
        """
        asked = self._runtime.stop_requested
        if asked is not None:
            self._runtime.raise_if_another_rank_failed()
            wish |= request_from_signal(asked)
        if time.time() >= self._limit:
            wish |= Request.TIME_LIMIT
        if time.monotonic() - self._saved >= self._every:
            wish |= Request.SAVE
        return self._consensus.agree(wish)

    def note_save(self) -> None:
        """A checkpoint was saved just now."""
        self._saved = time.monotonic()

    def close(self) -> None:
        """Ends it; all ranks call it after the same step."""
        self._consensus.close()


def write_stop_file(run_dir: Path, reason: str, step: int, exit_code: int) -> None:
    """Leaves word of a stop for launchers, whose own exit code may say less; see :func:`remove_stop_file`."""
    write_json(run_dir / STOPPED_FILE, {"reason": reason, "step": step, "exit_code": exit_code})


def remove_stop_file(run_dir: Path) -> None:
    """Removes the word: the run goes on."""
    (run_dir / STOPPED_FILE).unlink(missing_ok=True)
