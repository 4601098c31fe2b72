"""Hosts on one machine: ``python launch/testnet.py hosts=4 rate=100mbit -- torchrun launch/train.py strategy=ddp``."""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import DictConfig

from distrain import cli, config
from distrain.testnet import command


def task(composed: DictConfig) -> None:
    """Makes, uses or ends a test network."""
    cli.restore_environment()
    sys.exit(command.run(config.checked(command.NetworkSettings, composed), typed))


if __name__ == "__main__":
    typed = cli.take_command(sys.argv)
    if sys.argv[1:2] and sys.argv[1] in ("up", "on", "down"):
        sys.argv[1] = f"action={sys.argv[1]}"
    cli.main(task, Path(__file__).parent, "testnet")
