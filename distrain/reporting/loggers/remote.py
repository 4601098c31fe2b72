"""Loggers of services that can't take back what they were told: MLflow, and Weights & Biases.

``metrics.jsonl`` has each row once, whatever interrupts a run, so a service's record is completed from it: when a run
is resumed, the record gets the rows that it lacks, and what it has already is not sent again. Rows that were logged
after the checkpoint stay in the record. The resumed run logs the same numbers for the same steps, and these are left
out.

A thread talks to the service, so that training doesn't wait for it.
"""

from __future__ import annotations

import io
import logging
import math
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from distrain.config.groups import LoggerConfig
from distrain.config.setting import setting
from distrain.errors import first_line
from distrain.files.contained_folder import ContainedFolder
from distrain.files.untrusted import UnreadableFile, read_json
from distrain.files.writing import to_json
from distrain.reporting.loggers.base import Logger, Scalars
from distrain.reporting.loggers.metrics_file import MetricsFile, read_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

#: Seconds until a call that failed is tried again: at first, and at most.
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0
#: Longest time in seconds that the end of a run that failed waits.
_FAILED_SECONDS = 2.0
_MAX_NOTE_BYTES = 1 << 20


@dataclass
class RemoteConfig(LoggerConfig):
    """Keys of loggers that talk to a service."""

    wait_seconds: float = setting(
        "Longest time in seconds that the end of the run waits until everything is sent. The rest is sent when the run "
        "is resumed.",
        at_least=0,
    )


@dataclass(frozen=True)
class Row:
    """Numbers that were logged together.

    Attributes:
        step: Number of updates so far.
        time: Seconds since 1970.
        values: Finite numbers by name.
    """

    step: int
    time: float
    values: Scalars


class Service(ABC):
    """A service, as the thread calls it. Any method may raise any error, and is then called again.

    Args:
        note: A small file in the run's folder that says which record is this run's.
    """

    def __init__(self, note: Note) -> None:
        self.note = note

    @abstractmethod
    def open(self, *, new: bool) -> Mapping[str, int]:
        """Opens the run's record, or makes one.

        Args:
            new: The training begins: the run gets a new record.

        Returns:
            The last step that the record holds of each number, and of pictures as far as that is known.
        """

    @abstractmethod
    def send(self, rows: Sequence[Row]) -> None:
        """Adds rows to the record."""

    @abstractmethod
    def parameters(self, values: Mapping[str, Any]) -> None:
        """Stores the run's configuration."""

    @abstractmethod
    def figure(self, step: int, name: str, png: bytes) -> None:
        """Stores a picture."""

    def histogram(self, step: int, name: str, counts: Sequence[int], edges: Sequence[float]) -> None:
        """Stores a histogram, where the service has such."""

    @abstractmethod
    def final(self, step: int, metrics: Scalars) -> None:
        """Stores the final metrics of a run that is at its end, at the last step."""

    @abstractmethod
    def end(self, *, finished: bool) -> None:
        """Closes the record; it may be opened again.

        Args:
            finished: The run came to its end.
        """

    def is_refusal(self, error: Exception) -> bool:
        """Whether the service refuses what it was told, and would again."""
        return False


class Note:
    """A small file in the run's folder with what is known of a record.

    Args:
        run_dir: The run's folder.
        name: Name of the file.
        may_write: Whether the folder is still this run's.
    """

    def __init__(self, run_dir: Path, name: str, may_write: Callable[[], bool]) -> None:
        self._run_dir, self._name, self._may_write = run_dir, name, may_write

    def read(self) -> dict[str, Any]:
        """The content; empty if there is none, or none that can be read."""
        try:
            return read_json(self._run_dir / self._name, _MAX_NOTE_BYTES)
        except (FileNotFoundError, UnreadableFile):
            return {}

    def write(self, content: Mapping[str, Any]) -> None:
        """Replaces the content."""
        if self._may_write():
            ContainedFolder(self._run_dir).replace_text(self._name, to_json(content))


class RemoteLogger(Logger, ABC):
    """Tells a service what is logged, from a thread, and completes the record of a resumed run.

    Args:
        config: The logger's keys.
        run_dir: The run's folder.
    """

    accepts_figures = True

    def __init__(self, config: RemoteConfig, run_dir: Path) -> None:
        super().__init__(config)
        self._wait_seconds, self._run_dir = config.wait_seconds, run_dir
        self._service = self.make_service(config, run_dir)
        self._sender = _Sender(type(self).__name__, self._service.is_refusal)
        #: The last step of each number that was sent; only the thread uses it.
        self._sent: dict[str, int] = {}
        self._finished = False

    @abstractmethod
    def make_service(self, config: Any, run_dir: Path) -> Service:
        """The service; nothing is sent to it yet."""

    def note(self, name: str) -> Note:
        """The file that says which record is this run's."""
        return Note(self._run_dir, name, self.may_create)

    @override
    def rewind(self, step: int, *, mid_epoch: bool) -> None:
        # The file has been rewound before, see `build`. It is read now, since the run goes on to write it.
        rows = [_as_row(row) for row in read_rows(self._run_dir / MetricsFile.NAME)]
        new = step == 0 and not rows

        def open_record() -> None:
            self._sent = dict(self._service.open(new=new))
            self._send(rows)

        self._sender.put(open_record)

    @override
    def begin(self, parameters: Mapping[str, Any]) -> None:
        self._sender.put(lambda: self._service.parameters(parameters))

    @override
    def scalars(self, step: int, values: Scalars, *, kind: str = "step") -> None:
        row = Row(step, time.time(), values)
        self._sender.put(lambda: self._send([row]))

    def _send(self, rows: Sequence[Row]) -> None:
        """Sends those numbers that the record doesn't have."""
        missing, sent = [], dict(self._sent)
        for row in rows:
            values = {
                name: value
                for name, value in row.values.items()
                if row.step > sent.get(name, -1) and math.isfinite(value)
            }
            sent |= dict.fromkeys(values, row.step)
            if values:
                missing.append(Row(row.step, row.time, values))
        if missing:
            self._service.send(missing)
        self._sent = sent

    @override
    def figure(self, step: int, name: str, figure: Figure) -> None:
        file = io.BytesIO()
        figure.savefig(file, format="png")
        png = file.getvalue()
        self._sender.put(lambda: self._send_once(step, name, lambda: self._service.figure(step, name, png)))

    @override
    def histogram(self, step: int, name: str, counts: Sequence[int], edges: Sequence[float]) -> None:
        self._sender.put(
            lambda: self._send_once(step, name, lambda: self._service.histogram(step, name, counts, edges))
        )

    def _send_once(self, step: int, name: str, send: Callable[[], None]) -> None:
        if step > self._sent.get(name, -1):
            send()
            self._sent[name] = step

    @override
    def hyperparameters(self, parameters: Mapping[str, Any], metrics: Scalars) -> None:
        self._finished = True
        self._sender.put(lambda: self._service.final(max(self._sent.values(), default=0), metrics))

    @override
    def close(self) -> None:
        self._end(self._wait_seconds)

    @override
    def fail(self) -> None:
        self._end(min(self._wait_seconds, _FAILED_SECONDS))

    def _end(self, seconds: float) -> None:
        finished = self._finished
        self._sender.put(lambda: self._service.end(finished=finished))
        self._sender.close(seconds)


def _as_row(content: Mapping[str, Any]) -> Row:
    """A row of ``metrics.jsonl``, whose values are null where they are not finite."""
    values = {
        name: float(value)
        for name, value in content.items()
        if name not in ("kind", "step", "time") and type(value) in (int, float)
    }
    when = content.get("time")
    return Row(int(content["step"]), when if isinstance(when, float | int) else time.time(), values)


class _Sender:
    """Runs calls in a thread, one after the other; one that fails is tried again, after ever longer waits.

    Args:
        name: Of the logger, for messages.
        is_refusal: Whether an error means that the call would fail again; it is then left out.
    """

    def __init__(self, name: str, is_refusal: Callable[[Exception], bool]) -> None:
        self._name, self._is_refusal = name, is_refusal
        self._calls: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def put(self, call: Callable[[], None]) -> None:
        """Runs a call after those before it."""
        with self._changed:
            if self._closing.is_set():
                return
            self._calls.append(call)
            self._changed.notify_all()
        if self._thread is None:
            # No process waits for it at its end.
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def close(self, seconds: float) -> None:
        """Waits until all calls are done, but no longer than so many seconds."""
        with self._changed:
            already = self._closing.is_set()
            self._closing.set()
            self._changed.notify_all()
        if self._thread is None or already:
            return
        self._thread.join(seconds)
        if self._thread.is_alive():
            problem = "not everything was sent; the rest is sent when the run is resumed"
            log.error("METRICS NOT WRITTEN: %s: %s, and is in %s", self._name, problem, MetricsFile.NAME)

    def _run(self) -> None:
        wait, failing = _FIRST_WAIT, False
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._calls or self._closing.is_set())
                if not self._calls:
                    return
                call = self._calls[0]
            try:
                call()
            except Exception as error:  # a service's package may raise anything
                shown = f"{type(error).__name__}: {first_line(error)}"
                if not self._is_refusal(error):
                    if not failing:
                        problem = "The run goes on, and it is tried again"
                        log.error("METRICS NOT WRITTEN: %s can't send (%s). %s", self._name, shown, problem)
                    failing = True
                    if self._closing.is_set():
                        time.sleep(_FIRST_WAIT)
                    self._closing.wait(wait)
                    wait = min(2 * wait, _LONGEST_WAIT)
                    continue
                log.error("METRICS NOT WRITTEN: %s is refused by the service (%s). The run goes on", self._name, shown)
            else:
                if failing:
                    log.info("%s sends again", self._name)
                wait, failing = _FIRST_WAIT, False
            with self._changed:
                self._calls.popleft()
