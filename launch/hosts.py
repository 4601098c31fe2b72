"""Trains on several hosts over ssh: ``python launch/hosts.py hosts=[a,b] nproc=2 -- strategy=ddp …``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

# This checkout's package is found even where nothing is installed, or another folder called distrain lies on the path.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from distrain.cli import hosts, hydra_entry
from distrain.config.load import load_settings

LAUNCH = Path(__file__).resolve().parent
CONF = LAUNCH.parent / "conf"


def schema() -> type[Any]:
    """The command's keys."""
    return hosts.HostsSettings


def task(composed: DictConfig) -> None:
    """Trains on all hosts and ends with their exit code."""
    settings = load_settings(schema(), composed)
    sys.exit(hosts.run(settings, CONF, LAUNCH / "train.py", training))


if __name__ == "__main__":
    training = hydra_entry.pop_command(sys.argv)
    hydra_entry.main(task, CONF, "hosts", schema)
