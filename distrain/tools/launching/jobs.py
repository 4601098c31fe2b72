"""The jobs of a sweep: each is a command in its own process, and one that fails or hangs does not stop the others."""

from __future__ import annotations

import os
import re
import shlex
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distrain.files.contained_folder import ContainedFolder, UnsafePath
from distrain.files.file_version import file_version
from distrain.files.untrusted import read_json
from distrain.tools.launching.processes import Child, TerminationRequested, termination_signals_raise

#: Values of :attr:`JobResult.status`.
DONE, FAILED, STOPPED, TIMED_OUT, NOT_RUN = "done", "failed", "stopped", "over its time limit", "not run"
_POLL_SECONDS = 0.2
_OUTPUT = "output.log"
_MAX_JSON_BYTES = 1 << 26
#: What a run reports of its end, and the job's status then.
_REPORTS = {"failure.json": FAILED, "stopped.json": STOPPED}
#: Longer folder names are hard to read, and file systems allow at most 255 bytes.
_MAX_NAME_LENGTH = 100


@dataclass(frozen=True)
class Job:
    """One training of a sweep.

    Attributes:
        name: Name of its folder: a number and the values that distinguish it.
        swept: Values of the keys that differ between jobs, by key.
        overrides: All of its settings, in Hydra's syntax.
        folder: Its run folder.
        options: What stands in front of the settings, such as ``--config-dir DIR``.
    """

    name: str
    swept: dict[str, str]
    overrides: tuple[str, ...]
    folder: Path
    options: tuple[str, ...] = ()

    @property
    def arguments(self) -> list[str]:
        """Command-line arguments of the training."""
        return [*self.options, *self.overrides, f"run_dir={hydra_quote(str(self.folder))}"]

    def claim_folder(self) -> bool:
        """Takes the folder for this job, unless it holds a training with other settings.

        Another sweep may have made a folder with the same name, because the name omits settings that all jobs share.

        Returns:
            Whether the folder was empty or already this job's.

        Raises:
            UnsafePath: The folder or a file in it is a link, or is special.
        """
        folder, name = ContainedFolder(self.folder.parent), self.folder.name
        own_content = job_array_lines([self])
        folder.make_folder(name)
        if folder.exists(f"{name}/overrides.txt") or folder.exists(f"{name}/summary.json"):
            if not folder.exists(f"{name}/overrides.txt"):
                return False
            with folder.open_file(f"{name}/overrides.txt", "rb") as file:
                return file.read(_MAX_JSON_BYTES) == own_content.encode()
        folder.replace_text(f"{name}/overrides.txt", own_content)
        return True


@dataclass
class JobResult:
    """How a job ended.

    Attributes:
        job: The job.
        status: ``done``, ``failed``, ``stopped`` (it ended early by itself, for example at ``trainer.max_minutes``, and
            saved its state), ``over its time limit`` or ``not run``.
        reason: One line that says why the job is not done.
        seconds: How long it ran.
        summary: Content of its ``summary.json``; empty if it is not done.
    """

    job: Job
    status: str
    reason: str = ""
    seconds: float = 0.0
    summary: dict[str, Any] = field(default_factory=dict)


def hydra_quote(text: str) -> str:
    """Quotes text as a value in Hydra's override grammar."""
    return "'" + text.replace("'", "\\'") + "'"


def make_jobs(
    overrides: Sequence[Sequence[str]], first: int, fixed: Sequence[str], folder: Path, options: Sequence[str] = ()
) -> list[Job]:
    """Turns the combinations that Hydra's sweeper composed into jobs.

    Args:
        overrides: The settings of each job, ``key=value``.
        first: Number of the first job.
        fixed: Keys that are the same for all jobs of the sweep.
        folder: The sweep's folder.
        options: What stands in front of the settings of each job.
    """
    jobs = []
    for number, settings in enumerate(overrides, start=first):
        pairs = (setting.partition("=") for setting in settings)
        swept = {key.lstrip("+"): value for key, _, value in pairs if key not in fixed}
        values = ",".join(f"{key}={value}" for key, value in swept.items())
        name = re.sub(r"[^\w.,=+-]", "_", f"{number:03d}_{values}" if values else f"{number:03d}")[:_MAX_NAME_LENGTH]
        jobs.append(Job(name, swept, tuple(settings), folder / name, tuple(options)))
    return jobs


def job_array_lines(jobs: Sequence[Job]) -> str:
    """Returns one line per job for a scheduler's job array: its arguments, quoted for a shell."""
    return "".join(f"{shlex.join(job.arguments)}\n" for job in jobs)


class JobRunner:
    """Runs jobs, a limited number of them at a time.

    Args:
        command: The command to which a job's arguments are added.
        parallel: How many jobs run at a time.
        minutes: A job that takes longer is ended; ``None`` for no limit.
        grace_seconds: Time that a job has to save its state before it is killed.
        environment: Variables for the jobs besides this process's own.
        log: Prints a line.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        parallel: int,
        minutes: float | None,
        grace_seconds: float,
        environment: Mapping[str, str] | None = None,
        log: Callable[[str], None] = print,
    ) -> None:
        self._command = tuple(command)
        self._parallel = parallel
        self._minutes = minutes
        self._grace_seconds = grace_seconds
        self._environment = environment
        self._log = log
        self._stop = threading.Event()

    def run(self, jobs: Sequence[Job]) -> tuple[list[JobResult], int]:
        """Runs all jobs, even if some fail.

        Returns:
            The results in the order of jobs, and an exit code: 0, or 128 + signal if this process was asked to end. In
            that case running jobs are ended and the remaining ones are not started.
        """
        code = 0
        with termination_signals_raise(), ThreadPoolExecutor(self._parallel) as pool:
            futures = [pool.submit(self._run_job, job) for job in jobs]
            try:
                wait(futures)
            except TerminationRequested as request:
                self._log(f"sweep: {request}; ending the running jobs and starting no more")
                code = request.code
                self._stop.set()
            return [future.result() for future in futures], code

    def _run_job(self, job: Job) -> JobResult:
        try:
            claimed = job.claim_folder()
            output_log = ContainedFolder(job.folder.parent)
            output_log.check([f"{job.folder.name}/{name}" for name in (_OUTPUT, "summary.json")])
        except UnsafePath as error:
            reason = f"{error.filename} {error.strerror}; remove it, or name another sweep.folder"
            self._log(f"sweep: {job.name}: {NOT_RUN}: {reason}")
            return JobResult(job, NOT_RUN, reason)
        if not claimed:
            reason = f"{job.folder} holds a training with other settings; name another sweep.folder"
            self._log(f"sweep: {job.name}: {NOT_RUN}: {reason}")
            return JobResult(job, NOT_RUN, reason)
        earlier_summary = _summary(job)
        if earlier_summary:
            self._log(f"sweep: {job.name}: already done")
            seconds = float(earlier_summary.get("wall_seconds", 0))
            return JobResult(job, DONE, seconds=seconds, summary=earlier_summary)
        if self._stop.is_set():
            return JobResult(job, NOT_RUN, "the sweep ended before")
        self._log(f"sweep: {job.name}: starts")
        log_file, started = job.folder / _OUTPUT, time.monotonic()
        earlier_reports = {name: file_version(job.folder / name) for name in _REPORTS}
        descriptor = output_log.open(f"{job.folder.name}/{_OUTPUT}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        with os.fdopen(descriptor, "ab") as output:
            log_start = output.tell()
            child = Child([*self._command, *job.arguments], output=output, environment=self._environment)
            result = self._wait_for(job, child)
        result.seconds = time.monotonic() - started
        if result.status == DONE:
            result.summary = _summary(job)
            if not result.summary:
                result.status, result.reason = FAILED, "exited with code 0 but wrote no summary.json"
        elif not result.reason:
            reported = _reported_reason(job, earlier_reports)
            result.status, result.reason = reported or (FAILED, _error_line(log_file, log_start))
        self._log(f"sweep: {job.name}: {result.status}{': ' if result.reason else ''}{result.reason}")
        return result

    def _wait_for(self, job: Job, child: Child) -> JobResult:
        """Waits until the job ends, runs out of time, or the sweep is stopped."""
        limit = self._minutes
        deadline = time.monotonic() + (60 * limit if limit is not None else float("inf"))
        try:
            while (code := child.wait(_POLL_SECONDS)) is None:
                if self._stop.is_set():
                    child.terminate(self._grace_seconds)
                    return JobResult(job, FAILED, "ended with the sweep")
                if time.monotonic() > deadline:
                    child.terminate(self._grace_seconds)
                    reason = f"ended after {limit:g} minutes; it can be resumed from its newest checkpoint"
                    return JobResult(job, TIMED_OUT, reason)
        finally:
            child.kill_all()
        return JobResult(job, FAILED if code else DONE)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, _MAX_JSON_BYTES)
    except (FileNotFoundError, ValueError):
        return {}


def _summary(job: Job) -> dict[str, Any]:
    return _read_json(job.folder / "summary.json")


def _reported_reason(job: Job, earlier: Mapping[str, object]) -> tuple[str, str] | None:
    """Status and reason from the report that the run wrote in this attempt; ``None`` if it wrote none.

    Args:
        job: The job.
        earlier: The version of each report before this attempt.
    """
    for name, status in _REPORTS.items():
        file = job.folder / name
        if file_version(file) not in (None, earlier[name]):
            report = _read_json(file)
            if status == STOPPED:
                return status, f"{report.get('reason')} at step {report.get('step')}; it saved its state"
            place = f"rank {report.get('rank')} on {report.get('host')} at step {report.get('step')}"
            return status, f"{place}: {report.get('error')}"
    return None


def _error_line(log_file: Path, log_start: int) -> str:
    """Returns the line in which distrain reports an error, or else the last one before torchrun's report."""
    text = log_file.read_bytes()[log_start:].decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    own_lines = [line for line in lines if line.startswith("distrain: ")]
    report = next((index for index, line in enumerate(lines) if "torch/distributed/elastic" in line), len(lines))
    return (own_lines or lines[:report] or lines or ["ended without any output"])[-1].removeprefix("distrain: ")
