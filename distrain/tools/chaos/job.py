"""One start of a training's command, seen from outside: its processes, how far it is, and what it says."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from distrain.errors import ConfigError
from distrain.tools.chaos import processes
from distrain.tools.testnet.network import VirtualNetwork

#: Longest line of metrics.jsonl that is looked for.
_TAIL = 1 << 16
_NUMBERS = itertools.count()


class Launcher(Protocol):
    """Starts the processes of a training."""

    def start(self, keys: Sequence[str], variables: Mapping[str, str], output: Path) -> list[subprocess.Popen[bytes]]:
        """Starts it; what it prints is added to the file ``output``."""


class OneHost:
    """The user's command, once.

    Args:
        template: The command, in which ``{python}``, ``{launch}``, ``{nproc}`` and ``{keys}`` are filled in.
        launch: The folder with distrain's ``train.py``.
        nproc: Ranks.

    Raises:
        ConfigError: The template can't be filled in.
    """

    def __init__(self, template: str, launch: Path, nproc: int) -> None:
        self._template = template
        self._values = {"python": sys.executable, "launch": str(launch), "nproc": str(nproc)}
        if "{keys}" not in template:
            raise ConfigError("launcher", template, "needs {keys}, which stands for the training's keys")
        self.command([])

    def command(self, keys: Sequence[str]) -> list[str]:
        """The words of the command."""
        words: list[str] = []
        try:
            for word in shlex.split(self._template):
                if word == "{keys}":
                    words += keys
                else:
                    words.append(word.format(**self._values, keys=shlex.join(keys)))
        except (ValueError, KeyError, IndexError) as error:
            allowed = ", ".join(f"{{{name}}}" for name in [*self._values, "keys"])
            raise ConfigError(
                "launcher", self._template, f"can't be filled in ({error}); it may hold {allowed}"
            ) from error
        return words

    def start(self, keys: Sequence[str], variables: Mapping[str, str], output: Path) -> list[subprocess.Popen[bytes]]:
        """Starts the command in a session of its own, so that a terminal's Ctrl-C ends it by our hand only."""
        with output.open("ab") as file:
            process = subprocess.Popen(
                self.command(keys),
                env={**os.environ, **variables},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return [process]


class Hosts:
    """A rank on each host of a test network, without a launcher that ends the others when one has failed.

    Args:
        network: As many hosts as ranks.
        launch: The folder with distrain's ``train.py``.
    """

    def __init__(self, network: VirtualNetwork, launch: Path) -> None:
        self.network = network
        self._launch = launch

    def start(self, keys: Sequence[str], variables: Mapping[str, str], output: Path) -> list[subprocess.Popen[bytes]]:
        """Starts ``train.py`` on every host."""
        command = [sys.executable, str(self._launch / "train.py"), *keys]
        return [self.network.start(host, command, variables, output) for host in range(self.network.hosts)]


class Job:
    """A training that was started once; as a context it is ended when left.

    Args:
        launcher: How to start it.
        keys: The training's keys, without ``run_dir``.
        run_dir: The run's folder.
        output: The file that takes what it prints.
    """

    def __init__(self, launcher: Launcher, keys: Sequence[str], run_dir: Path, output: Path) -> None:
        self.run_dir = run_dir
        self._output = output
        self._read_from = output.stat().st_size if output.exists() else 0
        self._log = run_dir / "logs" / "rank_0.log"
        self._log_from = self._log.stat().st_size if self._log.exists() else 0
        self.mark = f"{os.getpid()}.{next(_NUMBERS)}"
        self.started = time.time()
        with processes.interruptible():
            self._launchers = launcher.start([*keys, f"run_dir={run_dir}"], {processes.VARIABLE: self.mark}, output)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    # --- its processes -----------------------------------------------------------------------------------------------

    def ranks(self) -> dict[int, int]:
        """Process ids of the ranks of this host, which their launcher gave RANK."""
        return processes.ranks(self.mark)

    def everyone(self) -> list[int]:
        """Process ids of all that belongs to it."""
        return list(processes.marked(self.mark))

    def launchers(self) -> list[int]:
        """Process ids of what was started here."""
        return [launcher.pid for launcher in self._launchers]

    def has_ended(self) -> bool:
        """Whether all that was started here has ended."""
        return all(launcher.poll() is not None for launcher in self._launchers)

    def codes(self) -> list[int]:
        """Exit codes, once it has ended."""
        return [launcher.wait() for launcher in self._launchers]

    def left(self, grace: float) -> list[int]:
        """Processes that are still there so many seconds after the end."""
        deadline = time.monotonic() + grace
        while (found := list(processes.marked(self.mark))) and time.monotonic() < deadline:
            time.sleep(0.02)
        return found

    def kill(self) -> None:
        """Kills every process and waits for the end."""
        processes.kill(self.mark)
        for launcher in self._launchers:
            launcher.wait()

    # --- what it tells -----------------------------------------------------------------------------------------------

    def step(self) -> int | None:
        """The newest step that was logged since this start."""
        for line in reversed(_tail(self.run_dir / "metrics.jsonl")):
            # The last line may be half written.
            with contextlib.suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                if row["kind"] == "step":
                    return int(row["step"]) if row["time"] >= self.started else None
        return None

    def log(self) -> str:
        """What rank 0 has logged since this start."""
        return _since(self._log, self._log_from)

    def said(self) -> str:
        """What was printed since this start."""
        return _since(self._output, self._read_from)

    def last_words(self) -> str:
        """The last line that distrain printed, or else the last line."""
        lines = [line for line in self.said().splitlines() if line.strip()] or ["nothing was said"]
        return next((line for line in reversed(lines) if line.startswith("distrain: ")), lines[-1]).strip()

    def report(self, name: str) -> dict[str, object] | None:
        """A JSON file of the run's folder that was written since this start."""
        path = self.run_dir / name
        with contextlib.suppress(OSError, ValueError):
            # File systems keep coarser times than clocks.
            if path.stat().st_mtime >= self.started - 0.05:
                content = json.loads(path.read_text())
                return content if isinstance(content, dict) else None
        return None


def _tail(path: Path) -> list[str]:
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(path.stat().st_size - _TAIL, 0))
        return file.read().decode(errors="replace").splitlines()
    return []


def _since(path: Path, start: int) -> str:
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace")
    return ""
