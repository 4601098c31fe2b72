"""Virtual hosts on one machine: ``python launch/testnet.py hosts=4 rate=100mbit -- torchrun launch/train.py …``."""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import DictConfig

from distrain.cli import hydra_entry, testnet
from distrain.config.load import load_settings


def task(composed: DictConfig) -> None:
    """Makes, uses or ends a test network."""
    hydra_entry.restore_hydra_full_error()
    sys.exit(testnet.run(load_settings(testnet.NetworkSettings, composed), typed))


if __name__ == "__main__":
    typed = hydra_entry.pop_command(sys.argv)
    if sys.argv[1:2] and sys.argv[1] in ("up", "on", "down"):
        sys.argv[1] = f"action={sys.argv[1]}"
    hydra_entry.main(task, Path(__file__).parent, "testnet")
