"""What a run's folder says about the run now: whether it goes on, and how far it is."""

from __future__ import annotations

import contextlib
import datetime
import json
import socket
import time
from dataclasses import dataclass, field
from typing import Any

from distrain.errors import EXIT_FAILED, EXIT_STOPPED
from distrain.files.untrusted import UnreadableFile, finite_number
from distrain.health.process import may_exist
from distrain.health.run_status import MAX_STATUS_BYTES, STATUS_FILE, RunStatus
from distrain.runtime.run_owner import CLAIM
from distrain.tools.comparison.curves import parse_row
from distrain.tools.comparison.run import describe_failure, show_value
from distrain.tools.comparison.run_files import RunFiles

#: States of a run. Those of :data:`EXIT_CODES` are final: a run in them ends no other way unless it is started again.
STARTING, RUNNING, HANGING, SUSPENDED, SILENT = "starting", "running", "hanging", "suspended", "silent"
ENDED, STOPPED, FAILED, KILLED = "ended", "stopped", "failed", "killed"
#: Exit code of ``distrain watch`` for each final state.
EXIT_CODES = {ENDED: 0, STOPPED: EXIT_STOPPED, FAILED: EXIT_FAILED, KILLED: EXIT_FAILED}

#: A run on a host whose processes can't be seen counts as silent after so many seconds without a new status. It writes
#: one every 10 s at the latest, and a network file system may show it a minute later.
SILENT_SECONDS = 90.0
#: In training a run hangs if it makes no progress for so many times the duration of a step, and so many seconds.
_HANGING_STEPS, _HANGING_SECONDS = 20, 10.0
#: Outside training it hangs after this share of the time limit at which it ends by itself.
_HANGING_SHARE = 0.5
_TAIL_BYTES = 1 << 16
_MAX_CLAIM_BYTES = 1 << 16


@dataclass
class Job:
    """A run as its folder shows it now.

    Attributes:
        name: The folder, as the user named it.
        state: One of the states above.
        reason: More about the state, in one line; may be empty.
        config: ``config.yaml``; empty without one.
        status: ``status.json``; ``None`` without one that can be read.
        age_seconds: Time since the status was written, as far as the reader can tell.
        values: What was logged last of steps, by name, as in ``metrics.jsonl``.
        epoch_values: What was logged at the end of the last epoch, likewise.
        summary: ``summary.json`` of the run's last start; empty unless it ended.
        problems: What can't be read, in one line each.
    """

    name: str
    state: str = STARTING
    reason: str = ""
    config: dict[Any, Any] = field(default_factory=dict)
    status: RunStatus | None = None
    age_seconds: float = 0.0
    values: dict[str, float | None] = field(default_factory=dict)
    epoch_values: dict[str, float | None] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int | None:
        """Exit code of ``distrain watch``; ``None`` as long as the run may go on."""
        return EXIT_CODES.get(self.state)

    @property
    def idle_seconds(self) -> float | None:
        """Time since any rank made progress; ``None`` if it is unknown."""
        idle = [rank.idle_seconds for rank in self.status.ranks if not rank.has_left] if self.status else []
        return min(idle) + self.age_seconds if idle else None

    def setting(self, group: str, key: str) -> Any:
        """A value of the configuration; ``None`` without one."""
        section = self.config.get(group)
        return section.get(key) if isinstance(section, dict) else None


class JobReader:
    """Reads a run's folder again and again.

    Args:
        name: The folder, as the user named it.
        files: Its files.
    """

    def __init__(self, name: str, files: RunFiles) -> None:
        self._name, self._files = name, files
        #: Parsing takes longer than all else, so the configuration is kept while its file has this time and size.
        self._config_version: tuple[int, int] | None = None
        self._config: dict[Any, Any] = {}
        #: The newest status, by its start and number, and when this reader saw it first, by ``time.monotonic``.
        self._newest: tuple[float, int] | None = None
        self._seen = 0.0

    def read(self) -> Job:
        """Reads the folder; what is missing or can't be read is told by the job's state and problems."""
        job = Job(self._name)
        job.status = self._status(job)
        job.config = self._read_config(job)
        if job.status is not None:
            job.age_seconds = self._age(job.status)
            job.values, job.epoch_values = job.status.values, job.status.epoch_values
        if not (job.values or job.epoch_values):
            self._read_last_rows(job)
        job.state, job.reason = self._state(job)
        return job

    def _status(self, job: Job) -> RunStatus | None:
        try:
            content = self._files.json(STATUS_FILE, MAX_STATUS_BYTES)
            return None if content is None else RunStatus.from_json(content)
        except UnreadableFile as error:
            job.problems.append(str(error))
            return None

    def _read_config(self, job: Job) -> dict[Any, Any]:
        try:
            version = self._files.version("config.yaml")
            if version != self._config_version:
                self._config = self._files.yaml("config.yaml") or {}
                self._config_version = version
        except UnreadableFile as error:
            job.problems.append(str(error))
        return self._config

    def _age(self, status: RunStatus) -> float:
        """Seconds since the status was written: by the clocks of both hosts at first, then by this reader's own."""
        now, this = time.monotonic(), (status.started, status.number)
        if self._newest is None:
            self._seen = now - max(time.time() - status.time, 0.0)
        elif this != self._newest:
            self._seen = now
        self._newest = this
        return now - self._seen

    def _read_last_rows(self, job: Job) -> None:
        """Takes the last values from ``metrics.jsonl``, where the status has none."""
        try:
            file = self._files.open("metrics.jsonl")
            if file is None:
                return
            with file:
                size = file.seek(0, 2)
                file.seek(max(size - _TAIL_BYTES, 0))
                lines = file.read(_TAIL_BYTES).splitlines(keepends=True)
        except (UnreadableFile, OSError) as error:
            job.problems.append(str(error))
            return
        for row in filter(None, map(parse_row, lines)):
            numbers = {name: finite_number(value) for name, value in row.items() if name not in ("kind", "time")}
            if row["kind"] == "step":
                job.values = numbers
            else:
                job.epoch_values = numbers

    def _state(self, job: Job) -> tuple[str, str]:
        failure = self._report(job, "failure.json")
        if failure:
            return FAILED, describe_failure(failure)
        status = job.status
        if status is not None and status.running:
            going_on = _going_on(job, status)
            if going_on is not None:
                return going_on
        elif status is None and self._owner_is_alive():
            return RUNNING, ""
        stopped = self._report(job, "stopped.json")
        if stopped:
            return STOPPED, f"by {show_value(stopped.get('reason'))}; the same command resumes it"
        summary = self._report(job, "summary.json")
        if summary and _is_of(summary, status):
            job.summary = summary
            return ENDED, ""
        if status is None:
            return STARTING, f"there is no {STATUS_FILE} yet"
        return KILLED, f"the process of rank 0 on {status.host} is gone, and left no report"

    def _report(self, job: Job, name: str) -> dict[str, Any]:
        try:
            return self._files.json(name) or {}
        except UnreadableFile as error:
            job.problems.append(str(error))
            return {}

    def _owner_is_alive(self) -> bool:
        """Whether the process that claims the folder is on this host and exists: of a run that wrote no status."""
        with contextlib.suppress(UnreadableFile):
            claim = self._files.json(str(CLAIM), _MAX_CLAIM_BYTES) or {}
            pid = claim.get("pid")
            if isinstance(pid, int) and not isinstance(pid, bool) and pid > 0:
                return claim.get("host") == socket.gethostname() and may_exist(pid)
        return False


def _going_on(job: Job, status: RunStatus) -> tuple[str, str] | None:
    """State and reason of a run that has not said that it ends; ``None`` if its process is gone."""
    process, age, idle = status.writer.process, job.age_seconds, job.idle_seconds or 0.0
    if status.writer.is_visible:
        if not process.is_alive:
            return None
        if process.is_stopped:
            return SUSPENDED, f"a signal has stopped process {process.pid} on this host (Ctrl-Z?)"
    elif age > SILENT_SECONDS:
        return SILENT, f"no sign of life from {status.host} for {age:.0f} s"
    limit = _idle_limit(status)
    return (HANGING, f"no rank has made progress for {idle:.0f} s") if idle > limit else (RUNNING, "")


def _idle_limit(status: RunStatus) -> float:
    """Seconds without progress after which a run is said to hang."""
    phase, step_ms = status.phase, status.values.get("speed/step_ms")
    if phase == "training" and step_ms is not None:
        return max(_HANGING_STEPS * step_ms / 1000, _HANGING_SECONDS)
    limit = status.setup_limit if phase in ("setting up", "finishing") else status.step_limit
    return _HANGING_SHARE * limit


def _is_of(summary: dict[str, Any], status: RunStatus | None) -> bool:
    """Whether a summary is of the start that wrote the status; an earlier start may have left it."""
    if status is None or not status.running:
        return True
    try:
        # Written in whole seconds.
        return datetime.datetime.fromisoformat(str(summary.get("end"))).timestamp() + 1 >= status.started
    except (ValueError, OverflowError, OSError):
        return False


def to_json(job: Job) -> str:
    """A job as one line of JSON, for scripts."""
    status = job.status
    content = {
        "run": job.name,
        "state": job.state,
        "reason": job.reason,
        "exit_code": job.exit_code,
        "phase": status.phase if status else None,
        "epoch": status.epoch if status else None,
        "epochs": status.epochs if status else None,
        "step": status.step if status else None,
        "total_steps": status.total_steps if status else None,
        "seconds_left": status.seconds_left if status and job.state == RUNNING else None,
        "idle_seconds": job.idle_seconds,
        "age_seconds": job.age_seconds,
        "values": job.values,
        "epoch_values": job.epoch_values,
        "ranks": [vars(rank) for rank in status.ranks] if status else [],
        "problems": job.problems,
    }
    return json.dumps(content, allow_nan=False)
