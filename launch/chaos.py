"""Tests whether trainings recover from injected faults: ``python launch/chaos.py faults=20 -- strategy=ddp …``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

# This checkout's package is found even where nothing is installed, or another folder called distrain lies on the path.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from distrain.cli import hydra_entry
from distrain.config.load import load_settings

LAUNCH = Path(__file__).resolve().parent
CONF = LAUNCH.parent / "conf"
#: The keys of each training, which follow a ``--``.
TRAININGS: list[list[str]] = []


def schema() -> type[Any]:
    """The command's keys."""
    from distrain.cli import chaos

    return chaos.ChaosSettings


def task(composed: DictConfig) -> None:
    """Injects faults into all trainings of the command line."""
    # Imports torch, which takes long and is not needed for --help or to refuse a wrong key.
    from distrain.cli import chaos

    chaos.run(load_settings(schema(), composed), TRAININGS, CONF, LAUNCH)


if __name__ == "__main__":
    # Without this, Hydra would parse the trainings' keys as this command's.
    while "--" in sys.argv:
        last = len(sys.argv) - 1 - sys.argv[::-1].index("--")
        TRAININGS.insert(0, sys.argv[last + 1 :])
        sys.argv = sys.argv[:last]
    hydra_entry.main(task, CONF, "chaos", schema)
