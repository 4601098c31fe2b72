"""``distrain chaos faults=20 -- strategy=ddp …``: tests whether trainings recover from injected faults."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from distrain.cli import hydra_entry
from distrain.config.folder import CONF
from distrain.config.load import load_settings


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        arguments: The command line behind the command's name; ``None``: that of this process.
    """
    hydra_entry.set_arguments(arguments)
    hydra_entry.require_linux("chaos", "finds processes through /proc")
    # The keys of each training, which follow a ``--`` each. Hydra would parse them as this command's.
    trainings: list[list[str]] = []
    while "--" in sys.argv:
        last = len(sys.argv) - 1 - sys.argv[::-1].index("--")
        trainings.insert(0, sys.argv[last + 1 :])
        del sys.argv[last:]
    hydra_entry.main(functools.partial(_task, trainings), CONF, "chaos", _schema)


def _schema() -> type[Any]:
    """The command's keys."""
    from distrain.cli import chaos

    return chaos.ChaosSettings


def _task(trainings: Sequence[Sequence[str]], composed: DictConfig) -> None:
    """Injects faults into all trainings of the command line."""
    # Imports torch, which takes long and is not needed for --help or to refuse a wrong key.
    from distrain.cli import chaos

    chaos.run(load_settings(_schema(), composed), trainings, CONF)
