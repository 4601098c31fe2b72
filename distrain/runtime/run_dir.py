"""Choosing the run folder: rank 0 makes it, and all ranks use the same one."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
from pathlib import Path

from torch.distributed import Store  # type: ignore[attr-defined]

from distrain.errors import ConfigError, config_error_from_line
from distrain.files.contained_folder import ContainedFolder, UnsafePath
from distrain.health.failure_report import archive_previous_report
from distrain.runtime import launcher

#: Numbers the runs of this process whose folder is not configured; the same in every attempt of a restarted job.
_RUN_NUMBERS = itertools.count()
_MAX_ATTEMPTS = 1000
#: More than the configuration, the logs' first lines and the claim take.
_PROBE_BYTES = 1 << 16
#: What runs write into their folder. Links to elsewhere under other names do no harm.
_WRITTEN = (
    *("config.yaml", "data.json", "metrics.jsonl", "summary.json", "stopped.json", "status.json"),
    *("failure.json", "previous_failure.json", "plan.json", ".trials"),
    *("checkpoints", "logs", "pipeline", "tensorboard"),
)


def agree_on_run_dir(configured: str | None, rank: int, store: Store | None, launcher_store: Store | None) -> Path:
    """Returns the run folder that rank 0 makes.

    Args:
        configured: The configuration's ``run_dir``; ``None`` for a new folder.
        rank: This rank.
        store: The run's store; ``None`` for a single rank.
        launcher_store: The store that the launcher gave an address for, if there is one.

    Raises:
        ConfigError: The folder can't be made; raised on all ranks.
    """
    if store is None:
        path = _choose_run_dir(configured, launcher_store)
    else:
        if rank == 0:
            # An error is published as well; without an answer the other ranks would wait until a time limit.
            try:
                answer = {"path": str(_choose_run_dir(configured, launcher_store))}
            except ConfigError as error:
                answer = {"refused": str(error)}
            store.set("run_dir", json.dumps(answer))
        answer = json.loads(store.get("run_dir"))
        if "refused" in answer:
            raise config_error_from_line(answer["refused"])
        path = Path(answer["path"])
    if rank:
        # The rank may be on a host that doesn't see rank 0's folder.
        folder = ContainedFolder(path)
        folder.check(_WRITTEN)
        folder.make_folder("logs")
    return path


def _choose_run_dir(configured: str | None, launcher_store: Store | None) -> Path:
    """The configured folder, else the one of the job's earlier attempt (from the launcher's store), else a new one."""
    if configured is not None or launcher_store is None or not launcher.serves_store():
        return make_run_dir(configured)
    # A process may run several times (Hydra's --multirun), each time in a folder of its own.
    key = f"distrain/run_dir/{next(_RUN_NUMBERS)}"
    if launcher_store.check([key]):
        return make_run_dir(launcher_store.get(key).decode())
    path = make_run_dir(None)
    launcher_store.set(key, str(path))
    return path


def make_run_dir(configured: str | None) -> Path:
    """Makes a run folder with ``logs`` in it.

    Args:
        configured: The folder, which may exist; ``None`` for a new ``outputs/<date>/<time>``, with a number appended if
            another run has that name.

    Raises:
        ConfigError: The folder can't be made or written.
    """
    now = datetime.datetime.now()
    base = Path(configured) if configured else Path("outputs", f"{now:%Y-%m-%d}", f"{now:%H-%M-%S}")
    try:
        if configured:
            base.mkdir(parents=True, exist_ok=True)
            # Resolved once: the user's own links above the folder are fine.
            base = base.resolve()
            _refuse_links(base)
            ContainedFolder(base).make_folder("logs")
            _check_writable(base)
            return base
        base.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(_MAX_ATTEMPTS):
            path = base if attempt == 0 else base.with_name(f"{base.name}_{attempt}")
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                path = path.resolve()
                ContainedFolder(path).make_folder("logs")
                _check_writable(path)
                return path
    except OSError as error:
        raise ConfigError("run_dir", base, f"can't be made: {error.strerror}") from error
    raise ConfigError("run_dir", base, f"{_MAX_ATTEMPTS} runs have this name already")


def _check_writable(folder: Path) -> None:
    """Writes a file and removes it, so that a full disk is known before the set-up; archives an old failure report.

    Raises:
        ConfigError: The folder can't be written.
    """
    contained, probe = ContainedFolder(folder), f".probe.{os.getpid()}"
    try:
        try:
            with contained.create(probe) as file:
                file.write(bytes(_PROBE_BYTES))
        finally:
            contained.unlink(probe, missing_ok=True)
        archive_previous_report(folder)
    except OSError as error:
        raise ConfigError(
            "run_dir", folder, f"{error.filename or folder / probe} can't be written: {error.strerror}"
        ) from error


def _refuse_links(folder: Path) -> None:
    """Refuses a run folder in which something that runs write is a link, a device, a pipe or a socket.

    Raises:
        ConfigError: Names it, and what to type instead.
    """
    try:
        ContainedFolder(folder).check(_WRITTEN)
    except UnsafePath as error:
        problem = (
            f"{error.filename} {error.strerror}; in a run folder distrain writes to its own files and folders only. "
            "Remove it, or choose the folder where everything is to lie (run_dir=/where/there/is/room)"
        )
        raise ConfigError("run_dir", folder, problem) from error
