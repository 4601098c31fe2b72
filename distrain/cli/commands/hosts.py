"""``distrain hosts hosts=[a,b] nproc=2 -- strategy=ddp …``: trains on several hosts over ssh."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from distrain.cli import hosts, hydra_entry
from distrain.config.folder import CONF
from distrain.config.load import load_settings


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        arguments: The command line behind the command's name; ``None``: that of this process.
    """
    hydra_entry.set_arguments(arguments)
    training = hydra_entry.pop_command(sys.argv)
    hydra_entry.main(functools.partial(_task, training), CONF, "hosts", _schema)


def _schema() -> type[Any]:
    """The command's keys."""
    return hosts.HostsSettings


def _task(training: Sequence[str], composed: DictConfig) -> None:
    """Trains on all hosts and ends with their exit code."""
    sys.exit(hosts.run(load_settings(_schema(), composed), CONF, training))
