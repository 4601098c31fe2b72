"""Ranks agree on which of them failed first, and report that failure on stderr and in ``failure.json``."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from distrain.errors import first_line
from distrain.files.contained_folder import ContainedFolder
from distrain.files.escaping import Lines
from distrain.files.terminal import FILE_ONLY, print_to_stderr
from distrain.files.writing import to_json
from distrain.health.last_line import print_last_line
from distrain.health.mesh_place import place_in_words

log = logging.getLogger(__name__)

REPORT_NAME = "failure.json"
#: Key in the run's store that holds the first failure, and its value as long as no rank has failed.
FIRST_FAILURE_KEY, NO_FAILURE = "failure", "-"
#: How long a thread waits while another thread of this process reports a failure.
_LOCK_SECONDS = 3.0


@dataclass
class Failure:
    """The content of ``failure.json``.

    Attributes:
        rank: The rank that failed first.
        host: Name of its host.
        step: Optimizer updates it had done.
        error: Type and message of the error in one line.
        place: The rank's number along each dimension of the mesh; empty where the ranks have one dimension.
        samples: Positions in the training split of its part of the current batch; ``None`` outside training.
        traceback: Where it failed, as Python prints it; the last known stack of a rank that could not report itself.
        time: When the failure was reported, by the clock of the rank that wrote the report.
        others: The state of every other rank: ``rank``, ``place``, ``host``, ``step``, ``doing`` (its phase),
            ``waiting`` (for other ranks) and ``stack`` (its innermost calls).
    """

    rank: int
    host: str
    step: int
    error: str
    place: Mapping[str, int] = field(default_factory=dict)
    samples: list[int] | None = None
    traceback: str = ""
    time: str = ""
    others: list[dict[str, Any]] = field(default_factory=list)

    def summary(self) -> str:
        """The failure in one line, for users."""
        place = f" ({place_in_words(self.place)})" if self.place else ""
        return f"rank {self.rank}{place} on {self.host} failed at step {self.step}: {self.error}"


def archive_previous_report(run_dir: Path) -> None:
    """Renames an earlier run's report in this folder, so that ``failure.json`` exists only if the last run failed."""
    with contextlib.suppress(FileNotFoundError):
        ContainedFolder(run_dir).rename(REPORT_NAME, f"previous_{REPORT_NAME}")


@dataclass(frozen=True)
class FirstFailure:
    """What the first rank that detects a failure publishes to all others.

    Attributes:
        failure: Rank, host, step and error; the other fields are empty.
        detected_by: The rank that published it.
    """

    failure: Failure
    detected_by: int

    def to_json(self) -> str:
        """Encodes it for the store."""
        failure = self.failure
        return json.dumps([failure.rank, failure.host, failure.step, failure.error, self.detected_by])

    @classmethod
    def from_json(cls, text: bytes | str) -> FirstFailure | None:
        """Decodes the store's value; ``None`` if no rank has failed."""
        if text in (NO_FAILURE, NO_FAILURE.encode()):
            return None
        *failure_fields, detected_by = json.loads(text)
        return cls(Failure(*failure_fields), detected_by)


#: Adds the samples and the other ranks' states, as far as the store has them, to a failure before it is written.
AddDetails = Callable[[Failure, Store | None], None]


class FailureReporter:
    """Reports a failure once per process, whichever thread detects it first.

    The first rank that publishes its failure in the store writes ``failure.json``. The others repeat what it published.

    Args:
        rank: This rank.
        place_of: Where a rank is in the mesh, as :meth:`distrain.health.activity.RankActivity.place_of` says it.

    Attributes:
        run_dir: Where ``failure.json`` is written; ``None`` if it is not to be written.
        is_taken: Returns whether the folder belongs to another start of the run; this one then writes nothing there.
        reported: The failure that was reported; ``None`` before that.
    """

    def __init__(self, rank: int, place_of: Callable[[int], Mapping[str, int]] = lambda _: {}) -> None:
        self._place_of = place_of
        self.run_dir: Path | None = None
        self.is_taken: Callable[[], bool] = lambda: False
        self.reported: FirstFailure | None = None
        self._rank = rank
        self._lock = threading.Lock()

    def report(
        self,
        failure: Failure,
        local_stack: str,
        store: Store | None,
        add_details: AddDetails,
        *,
        stack_on_terminal: bool = True,
    ) -> None:
        """Reports a failure, unless this process has already reported one.

        Args:
            failure: What this rank has detected.
            local_stack: Where this rank was; logged if another rank failed first.
            store: Where the first failure is published; ``None`` if there is no store or it cannot be reached.
            add_details: Called before ``failure.json`` is written.
            stack_on_terminal: Whether rank 0 shows ``local_stack`` on the terminal too if it failed first; the log file
                always has it.
        """
        if not self._lock.acquire(timeout=_LOCK_SECONDS):
            return
        try:
            if self.reported is None:
                self._report(failure, local_stack, store, add_details, stack_on_terminal)
        finally:
            self._lock.release()

    def _report(
        self,
        failure: Failure,
        local_stack: str,
        store: Store | None,
        add_details: AddDetails,
        stack_on_terminal: bool,
    ) -> None:
        own = FirstFailure(failure, self._rank)
        first = own
        if store is not None:
            try:
                value = store.compare_set(FIRST_FAILURE_KEY, NO_FAILURE, own.to_json())
                first = FirstFailure.from_json(value) or own
            except RuntimeError as error:
                # The store ended with the process that served it. This rank reports what it knows.
                log.warning("this failure could not be published to the other ranks: %s", first_line(error))
        if first.to_json() == own.to_json():
            first = own
        first.failure.place = self._place_of(first.failure.rank)
        if first is own:
            try:
                add_details(failure, store)
            except Exception:
                # The failure itself matters more.
                log.exception("%s lacks details, because they can't be collected", REPORT_NAME)
            failure.time = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            self._write(failure)
        self.reported = first
        summary = first.failure.summary()
        if first.failure.rank == self._rank:
            extra = None if stack_on_terminal else FILE_ONLY
            log.error("%s\n%s", first.failure.error, Lines.of(local_stack.split("\n")), extra=extra)
            print_last_line(f"distrain: {summary}")
        else:
            # Where this rank waited for the failed one says nothing about the failure.
            log.error("stopped because %s\n%s", summary, Lines.of(local_stack.split("\n")), extra=FILE_ONLY)
            line = f"distrain: rank {self._rank} stopped because {summary}"
            print_last_line(line, cause=f"distrain: {summary}")

    def _write(self, failure: Failure) -> None:
        if self.run_dir is None or self.is_taken():
            return
        path = self.run_dir / REPORT_NAME
        try:
            # The run may have failed because its folder was removed.
            self.run_dir.mkdir(parents=True, exist_ok=True)
            ContainedFolder(self.run_dir).replace_text(REPORT_NAME, to_json(asdict(failure)))
        except OSError as error:
            print_to_stderr(f"distrain: {path} can't be written: {error.strerror}")


#: What a RuntimeError of gloo, NCCL or distrain's own collectives says if a peer or the way to it is gone. The name of
#: a library alone says nothing: gloo also refuses wrong shapes and types.
_BROKEN_CONNECTION = re.compile(
    r"connection|socket|broken pipe|reset by peer|timed? ?out|gloo/transport/|remote process exited"
    r"|NCCL (communicator|error)",
    re.IGNORECASE,
)


def is_broken_connection(error: BaseException) -> bool:
    """Whether an error may be the consequence of another rank's failure: a collective or a connection broke off."""
    if isinstance(error, dist.DistError):
        return True
    # Only errors of collectives are plain RuntimeErrors; a subclass is something else, such as a lack of memory.
    return type(error) is RuntimeError and _BROKEN_CONNECTION.search(first_line(error)) is not None
