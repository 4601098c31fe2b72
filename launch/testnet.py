"""Virtual hosts on one machine: ``python launch/testnet.py hosts=4 rate=100mbit -- torchrun launch/train.py …``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

# This checkout's package is found even where nothing is installed, or another folder called distrain lies on the path.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from distrain.cli import hydra_entry, testnet
from distrain.config.load import load_settings


def schema() -> type[Any]:
    """The command's keys."""
    return testnet.NetworkSettings


def task(composed: DictConfig) -> None:
    """Makes, uses or ends a test network."""
    hydra_entry.restore_hydra_full_error()
    sys.exit(testnet.run(load_settings(schema(), composed), typed))


if __name__ == "__main__":
    typed = hydra_entry.pop_command(sys.argv)
    if sys.argv[1:2] and sys.argv[1] in ("up", "on", "down"):
        sys.argv[1] = f"action={sys.argv[1]}"
    hydra_entry.main(task, Path(__file__).parent, "testnet", schema)
