"""What is left of a failure: who failed first, told once by every rank, and ``failure.json``."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from distrain.files.writing import replace_json

log = logging.getLogger(__name__)

FILE = "failure.json"
#: Key in the run's store under which the first failure is told, and what it holds until then.
CLAIM, NO_CLAIM = "failure", "-"
#: How long a rank waits for another thread of it that is telling already.
_PATIENCE_SECONDS = 3.0


@dataclass
class Failure:
    """What ``failure.json`` holds.

    Attributes:
        rank: The rank that failed first.
        host: Its host.
        step: Updates it had done.
        samples: Positions in the training split of its share of the batch in work; ``None`` outside of training.
        error: Kind and message in one line.
        traceback: Where, as Python prints it; for a rank that can't say so itself the last that was known.
        time: When it was told, by the clock of the rank that tells.
        others: Where every other rank was: ``rank``, ``host``, ``step``, ``doing``, ``waiting`` (for other ranks) and
            the innermost calls of its ``stack``.
    """

    rank: int
    host: str
    step: int
    error: str
    samples: list[int] | None = None
    traceback: str = ""
    time: str = ""
    others: list[dict[str, Any]] = field(default_factory=list)

    def line(self) -> str:
        """The last line that a user reads."""
        return f"rank {self.rank} on {self.host} failed at step {self.step}: {self.error}"


def archive_previous_report(folder: Path) -> None:
    """Renames the report of an earlier run in this folder: there is one only if the last run failed."""
    with contextlib.suppress(FileNotFoundError):
        folder.joinpath(FILE).replace(folder / f"previous_{FILE}")


@dataclass(frozen=True)
class FirstFailure:
    """What the first rank to know of a failure tells all others.

    Attributes:
        failure: Its first four values.
        by: Who tells.
    """

    failure: Failure
    by: int

    def packed(self) -> str:
        """As text."""
        failure = self.failure
        return json.dumps([failure.rank, failure.host, failure.step, failure.error, self.by])

    @classmethod
    def unpacked(cls, text: bytes | str) -> FirstFailure | None:
        """The other way round; ``None`` if there is none yet."""
        if text in (NO_CLAIM, NO_CLAIM.encode()):
            return None
        *of_failure, by = json.loads(text)
        return cls(Failure(*of_failure), by)


#: Adds samples, and where the other ranks are as far as the store says, to a failure that is written.
Complete = Callable[[Failure, Store | None], None]


class FailureReporter:
    """Tells of a failure, once, whichever thread of this process hears of it first.

    The first rank to claim it in the store writes ``failure.json``; the others read the claim.

    Args:
        rank: This one.

    Attributes:
        folder: Where ``failure.json`` goes; ``None``: nowhere.
        told: What was told.
    """

    def __init__(self, rank: int) -> None:
        self.folder: Path | None = None
        self.told: FirstFailure | None = None
        self._rank = rank
        self._lock = threading.Lock()

    def tell(self, failure: Failure, here: str, store: Store | None, complete: Complete) -> None:
        """Tells, unless that was done.

        Args:
            failure: What this rank knows.
            here: Where this rank was, for its log, if another one failed.
            store: Where failures are claimed; ``None`` where there is none or it can't be reached.
            complete: Called before it is written.
        """
        if not self._lock.acquire(timeout=_PATIENCE_SECONDS):
            return
        try:
            if self.told is None:
                self._tell(failure, here, store, complete)
        finally:
            self._lock.release()

    def _tell(self, failure: Failure, here: str, store: Store | None, complete: Complete) -> None:
        mine = FirstFailure(failure, self._rank)
        first = mine
        if store is not None:
            try:
                first = FirstFailure.unpacked(store.compare_set(CLAIM, NO_CLAIM, mine.packed())) or mine
            except RuntimeError as error:
                # It went with its host; what this rank knows is all there is.
                log.warning("nobody hears of this failure: %s", first_line(error))
        if first.packed() == mine.packed():
            first = mine
            complete(failure, store)
            failure.time = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            self._write(failure)
        self.told = first
        line = first.failure.line()
        if first.failure.rank == self._rank:
            log.error("%s\n%s", first.failure.error, here)
            say(f"distrain: {line}")
        else:
            log.error("stopped because %s\n%s", line, here)
            say(f"distrain: rank {self._rank} stopped because {line}")

    def _write(self, failure: Failure) -> None:
        if self.folder is None:
            return
        try:
            replace_json(self.folder / FILE, asdict(failure))
        except OSError as error:
            log.error("%s can't be written: %s", FILE, error)


def is_broken_connection(error: BaseException) -> bool:
    """Whether an error may be the echo of another rank's."""
    text = str(error).lower()
    words = ("gloo", "nccl", "connection", "socket")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in text for word in words)
    )


def first_line(error: BaseException) -> str:
    """An error's message without what follows its first line."""
    return (str(error).strip().splitlines() or [""])[0]


def say(line: str) -> None:
    """Prints a line for the user."""
    print(line, file=sys.stderr, flush=True)
