"""``distrain find lr nproc=2 -- model=… data=…``: suggests a learning rate."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from distrain.cli import hydra_entry
from distrain.config.folder import CONF
from distrain.config.load import load_settings
from distrain.tools.launching.launch_keys import LaunchSettings


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        arguments: The command line behind the command's name; ``None``: that of this process.
    """
    hydra_entry.set_arguments(arguments)
    # Hydra would parse the training's keys as this command's.
    keys = hydra_entry.pop_command(sys.argv)
    if sys.argv[1:2] == ["lr"]:
        sys.argv[1] = "what=lr"
    hydra_entry.main(functools.partial(_task, keys), CONF, "find", _schema, functools.partial(_check, keys))


def _schema() -> type[Any]:
    """The command's keys."""
    with hydra_entry.gc_disabled():
        # Imports torch, which takes long.
        from distrain.cli import find

    return find.FindSettings


def _task(keys: Sequence[str], composed: DictConfig) -> None:
    settings = load_settings(_schema(), composed)
    from distrain.cli import find

    find.run(settings, keys)


def _check(keys: Sequence[str], composed: DictConfig, launch: LaunchSettings) -> None:
    settings = load_settings(_schema(), composed)
    from distrain.cli import find

    find.check(settings, keys, launch)
