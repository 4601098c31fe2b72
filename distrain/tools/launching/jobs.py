"""The jobs of a sweep: each is a command in a process of its own, and one that fails or hangs doesn't stop the rest."""

from __future__ import annotations

import json
import re
import shlex
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distrain.tools.launching.processes import Asked, Child, asked_to_end

DONE, FAILED, STOPPED, OVER, NOT_RUN = "done", "failed", "stopped", "over its time limit", "not run"
_POLL_SECONDS = 0.2
#: Longer folder names are hard to read, and no file system takes more than 255 bytes.
_LONGEST_NAME = 100


@dataclass(frozen=True)
class Job:
    """One training of a sweep.

    Attributes:
        name: The name of its folder: a number, and what is its own.
        chosen: The values that this job has by the sweep, by key.
        overrides: All of its settings, as Hydra takes them.
        folder: Its run folder.
    """

    name: str
    chosen: dict[str, str]
    overrides: tuple[str, ...]
    folder: Path

    @property
    def arguments(self) -> list[str]:
        """What the script is started with."""
        return [*self.overrides, f"run_dir={quoted(str(self.folder))}"]

    def claim(self) -> bool:
        """Makes the folder this job's, and says whether it was nobody's or its own before.

        A folder that is named like this job's may be of a sweep whose common settings were others.
        """
        file = self.folder / "overrides.txt"
        mine = lines([self])
        if file.exists() or (self.folder / "summary.json").exists():
            return file.exists() and file.read_text() == mine
        self.folder.mkdir(parents=True, exist_ok=True)
        file.write_text(mine)
        return True


@dataclass
class Result:
    """How a job ended.

    Attributes:
        job: Which.
        status: One of ``done``, ``failed``, ``stopped`` (by its own ``trainer.max_minutes``, say; it saved its state),
            ``over its time limit`` and ``not run``.
        reason: Why it is not done, in one line.
        seconds: How long it ran.
        summary: What its ``summary.json`` holds; empty where it is not done.
    """

    job: Job
    status: str
    reason: str = ""
    seconds: float = 0.0
    summary: dict[str, Any] = field(default_factory=dict)


def quoted(text: str) -> str:
    """Text as a quoted value of Hydra's grammar."""
    return "'" + text.replace("'", "\\'") + "'"


def make_jobs(overrides: Sequence[Sequence[str]], first: int, fixed: Sequence[str], folder: Path) -> list[Job]:
    """Names the jobs that Hydra's sweeper composed.

    Args:
        overrides: Each job's settings, ``key=value``.
        first: The first job's number.
        fixed: Keys that are the same for all jobs of the sweep.
        folder: The sweep's folder.
    """
    jobs = []
    for number, settings in enumerate(overrides, start=first):
        pairs = (setting.partition("=") for setting in settings)
        chosen = {key.lstrip("+"): value for key, _, value in pairs if key not in fixed}
        told = ",".join(f"{key}={value}" for key, value in chosen.items())
        name = re.sub(r"[^\w.,=+-]", "_", f"{number:03d}_{told}" if told else f"{number:03d}")[:_LONGEST_NAME]
        jobs.append(Job(name, chosen, tuple(settings), folder / name))
    return jobs


def lines(jobs: Sequence[Job]) -> str:
    """One line a job: its settings as a shell takes them, for a scheduler's job array."""
    return "".join(f"{shlex.join(job.arguments)}\n" for job in jobs)


class Runner:
    """Runs jobs, so many at a time.

    Args:
        start: The command that a job's arguments are added to.
        parallel: How many jobs run at a time.
        minutes: A job that takes longer is ended; ``None`` for no limit.
        grace_seconds: Time that a job has to save its state before it is killed.
        environment: Variables for the jobs besides this process's own.
        log: Prints a line.
    """

    def __init__(
        self,
        start: Sequence[str],
        *,
        parallel: int,
        minutes: float | None,
        grace_seconds: float,
        environment: Mapping[str, str] | None = None,
        log: Callable[[str], None] = print,
    ) -> None:
        self._start = tuple(start)
        self._parallel = parallel
        self._minutes = minutes
        self._grace_seconds = grace_seconds
        self._environment = environment
        self._log = log
        self._stop = threading.Event()

    def run(self, jobs: Sequence[Job]) -> tuple[list[Result], int]:
        """Runs all jobs, whatever becomes of each.

        Returns:
            Their results in order, and 0, or 128 + signal where this process was asked to end: jobs that ran were
            ended and the rest was not begun.
        """
        code = 0
        with asked_to_end(), ThreadPoolExecutor(self._parallel) as pool:
            futures = [pool.submit(self._one, job) for job in jobs]
            try:
                wait(futures)
            except Asked as asked:
                self._log(f"sweep: {asked}; what runs is ended, the rest is not begun")
                code = asked.code
                self._stop.set()
            return [future.result() for future in futures], code

    def _one(self, job: Job) -> Result:
        if not job.claim():
            reason = f"{job.folder} holds a training with other settings; name another sweep.folder"
            self._log(f"sweep: {job.name}: {NOT_RUN}: {reason}")
            return Result(job, NOT_RUN, reason)
        before = _summary(job)
        if before:
            self._log(f"sweep: {job.name}: was done before")
            return Result(job, DONE, seconds=float(before.get("wall_seconds", 0)), summary=before)
        if self._stop.is_set():
            return Result(job, NOT_RUN, "the sweep was ended before")
        self._log(f"sweep: {job.name}: starts")
        log, started = job.folder / "output.log", time.time()
        with log.open("ab") as output:
            begins = output.tell()
            child = Child([*self._start, *job.arguments], output=output, environment=self._environment)
            result = self._watch(job, child)
        result.seconds = time.time() - started
        if result.status == DONE:
            result.summary = _summary(job)
            if not result.summary:
                result.status, result.reason = FAILED, "ended well without a summary.json"
        elif not result.reason:
            result.status, result.reason = _why(job, started) or (FAILED, _last_words(log, begins))
        self._log(f"sweep: {job.name}: {result.status}{': ' if result.reason else ''}{result.reason}")
        return result

    def _watch(self, job: Job, child: Child) -> Result:
        limit = self._minutes
        deadline = time.monotonic() + (60 * limit if limit is not None else float("inf"))
        try:
            while (code := child.wait(_POLL_SECONDS)) is None:
                if self._stop.is_set():
                    child.end(self._grace_seconds)
                    return Result(job, FAILED, "ended with the sweep")
                if time.monotonic() > deadline:
                    child.end(self._grace_seconds)
                    return Result(job, OVER, f"ended after {limit:g} minutes; what it saved is there to go on from")
        finally:
            child.clear()
        return Result(job, FAILED if code else DONE)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _summary(job: Job) -> dict[str, Any]:
    return _read_json(job.folder / "summary.json")


def _why(job: Job, started: float) -> tuple[str, str] | None:
    """Status and reason from the run's own reports, where it left one in this attempt."""
    for name, status in (("failure.json", FAILED), ("stopped.json", STOPPED)):
        file = job.folder / name
        if file.exists() and file.stat().st_mtime >= started - 1:
            told = _read_json(file)
            if status == STOPPED:
                return status, f"{told.get('reason')} at step {told.get('step')}; it saved its state"
            return (
                status,
                f"rank {told.get('rank')} on {told.get('host')} at step {told.get('step')}: {told.get('error')}",
            )
    return None


def _last_words(log: Path, begins: int) -> str:
    """The line in which distrain says what is wrong, or else the last one before torchrun's report."""
    text = log.read_bytes()[begins:].decode(errors="replace")
    said = [line.strip() for line in text.splitlines() if line.strip()]
    ours = [line for line in said if line.startswith("distrain: ")]
    report = next((place for place, line in enumerate(said) if "torch/distributed/elastic" in line), len(said))
    return (ours or said[:report] or said or ["ended without a word"])[-1].removeprefix("distrain: ")
