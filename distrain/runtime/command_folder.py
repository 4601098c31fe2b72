"""The folder of a command that trains for a few steps, such as ``plan``: its results, and meanwhile its short runs."""

from __future__ import annotations

import contextlib
import datetime
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

from distrain.config.schema import Config
from distrain.errors import ConfigError
from distrain.runtime.first_rank import of_rank_0
from distrain.runtime.world import World

#: Folder of the short runs, within the command's.
RUNS = "runs"


def agreed_folder(config: Config, world: World, command: str, configured: Path | str | None) -> Path:
    """The folder that rank 0 names, which it makes; all ranks call it together.

    Args:
        config: A configuration that is the same on all ranks.
        world: This rank's place.
        command: The command's name.
        configured: The folder; ``None``: a new ``outputs/<command>/<date>_<time>``, by the clock of rank 0.

    Raises:
        ConfigError: It can't be made, or what it holds would be removed with the short runs.
    """
    folder = Path(configured or f"outputs/{command}/{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}")
    if world.rank == 0:
        if (folder / RUNS).exists():
            remove = shlex.join(["rm", "-r", str(folder / RUNS)])
            problem = f"holds {RUNS}, where short runs would be; name another folder, or remove what an earlier"
            raise ConfigError("folder", folder, f"{problem} {command} has left: {remove}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError("folder", folder, f"can't be made ({error.strerror or error})") from error
    return Path(of_rank_0(config, world, {"folder": str(folder.resolve())})["folder"])


@contextlib.contextmanager
def short_runs(folder: Path, world: World) -> Iterator[Path]:
    """The folder for short runs, which is removed after this block.

    Args:
        folder: The command's.
        world: This rank's place.
    """
    try:
        yield folder / RUNS
    finally:
        # Each host may have its own.
        if world.local_rank == 0:
            shutil.rmtree(folder / RUNS, ignore_errors=True)
