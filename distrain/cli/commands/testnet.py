"""``distrain testnet hosts=4 rate=100mbit -- torchrun -m distrain train …``: virtual hosts on one machine."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from distrain.cli import hydra_entry
from distrain.config.load import load_settings


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        arguments: The command line behind the command's name; ``None``: that of this process.
    """
    hydra_entry.set_arguments(arguments)
    hydra_entry.require_linux("testnet", "gives each virtual host a network namespace")
    # Its modules name what other systems lack.
    from distrain.cli import testnet

    command = hydra_entry.pop_command(sys.argv)
    if sys.argv[1:2] and sys.argv[1] in ("up", "on", "down"):
        sys.argv[1] = f"action={sys.argv[1]}"
    hydra_entry.main(functools.partial(_task, command), testnet.CONF, "testnet", _schema)


def _schema() -> type[Any]:
    """The command's keys."""
    from distrain.cli import testnet

    return testnet.NetworkSettings


def _task(command: Sequence[str], composed: DictConfig) -> None:
    """Makes, uses or ends a test network."""
    from distrain.cli import testnet

    hydra_entry.restore_hydra_full_error()
    sys.exit(testnet.run(load_settings(_schema(), composed), command))
