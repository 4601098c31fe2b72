"""One start of a training's command, observed from outside: its processes, logged steps, output and reports."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from distrain.files.file_version import file_version
from distrain.tools.chaos import processes
from distrain.tools.chaos.launchers import Launcher

#: Bytes at the end of metrics.jsonl that are searched for the newest step.
_TAIL_BYTES = 1 << 16
_NUMBERS = itertools.count()


class Attempt:
    """A training that has been started once. As a context manager it kills all its processes on leaving.

    Args:
        launcher: Starts the processes.
        keys: The training's configuration keys, without ``run_dir``.
        run_dir: The run's folder.
        output: File to which everything printed is appended.

    Attributes:
        started: When it was started, by ``time.monotonic``.
    """

    def __init__(self, launcher: Launcher, keys: Sequence[str], run_dir: Path, output: Path) -> None:
        self.run_dir = run_dir
        self._output = output
        self._output_start = output.stat().st_size if output.exists() else 0
        self._log = run_dir / "logs" / "rank_0.log"
        self._log_start = self._log.stat().st_size if self._log.exists() else 0
        self.mark = f"{os.getpid()}.{next(_NUMBERS)}"
        self.started = time.monotonic()
        # Rows of metrics.jsonl carry the time of day, and a resumed run removes some of the older ones.
        self._started_at = time.time()
        self._earlier_reports = {path.name: file_version(path) for path in run_dir.glob("*.json")}
        with processes.default_sigint():
            self._launchers = launcher.start(
                [*keys, f"run_dir={run_dir}"], {processes.MARK_VARIABLE: self.mark}, output
            )

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    # --- processes ---------------------------------------------------------------------------------------------------

    def rank_pids(self) -> dict[int, int]:
        """Process number of each rank on this host; a rank is recognised by its variable RANK."""
        return processes.rank_pids(self.mark)

    def all_pids(self) -> list[int]:
        """Numbers of all processes of this attempt."""
        return list(processes.marked_processes(self.mark))

    def launcher_pids(self) -> list[int]:
        """Numbers of the processes that were started directly."""
        return [launcher.pid for launcher in self._launchers]

    def has_ended(self) -> bool:
        """Whether all directly started processes have ended."""
        return all(launcher.poll() is not None for launcher in self._launchers)

    def exit_codes(self) -> list[int]:
        """Waits for the directly started processes and returns their exit codes."""
        return [launcher.wait() for launcher in self._launchers]

    def remaining_pids(self, grace_seconds: float) -> list[int]:
        """Waits up to ``grace_seconds`` for all processes to end; returns the numbers of those that have not."""
        deadline = time.monotonic() + grace_seconds
        while (pids := self.all_pids()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return pids

    def kill(self) -> None:
        """Kills every process and waits for its end."""
        processes.kill_all(self.mark)
        for launcher in self._launchers:
            launcher.wait()

    # --- output ------------------------------------------------------------------------------------------------------

    def newest_step(self) -> int | None:
        """The newest step in metrics.jsonl; ``None`` if this attempt has logged no step."""
        for line in reversed(_read_tail(self.run_dir / "metrics.jsonl")):
            # The last line may be incomplete.
            with contextlib.suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                if row["kind"] == "step":
                    return int(row["step"]) if row["time"] >= self._started_at else None
        return None

    def rank0_log(self) -> str:
        """What rank 0 has logged in this attempt."""
        return _read_from(self._log, self._log_start)

    def output(self) -> str:
        """What has been printed in this attempt."""
        return _read_from(self._output, self._output_start)

    def last_message(self) -> str:
        """The last printed line that begins with ``distrain:``, or else the last line."""
        lines = [line for line in self.output().splitlines() if line.strip()] or ["no output"]
        return next((line for line in reversed(lines) if line.startswith("distrain: ")), lines[-1]).strip()

    def read_report(self, name: str) -> dict[str, object] | None:
        """Reads a JSON file of the run's folder; ``None`` unless this attempt has written it."""
        path = self.run_dir / name
        with contextlib.suppress(OSError, ValueError):
            if file_version(path) != self._earlier_reports.get(name):
                content = json.loads(path.read_text())
                return content if isinstance(content, dict) else None
        return None


def _read_tail(path: Path) -> list[str]:
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(path.stat().st_size - _TAIL_BYTES, 0))
        return file.read().decode(errors="replace").splitlines()
    return []


def _read_from(path: Path, start: int) -> str:
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace")
    return ""
