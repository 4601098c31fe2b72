"""``distrain doctor``: examines this machine, or under torchrun all nodes of a job."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from distrain.cli import hydra_entry
from distrain.config.folder import CONF
from distrain.config.load import load_settings
from distrain.errors import ConfigError
from distrain.tools.launching.launch_keys import LaunchSettings


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        arguments: The command line behind the command's name; ``None``: that of this process.
    """
    hydra_entry.set_arguments(arguments)
    command = hydra_entry.pop_command(sys.argv)
    if not command:
        # The report says what torch's own warnings about sockets would say, in words. torch reads this when imported.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    hydra_entry.main(functools.partial(_task, command), CONF, "doctor", _schema, functools.partial(_check, command))


def _schema() -> type[Any]:
    """The command's keys."""
    from distrain.cli import doctor

    return doctor.DoctorSettings


def _task(command: Sequence[str], composed: DictConfig) -> None:
    """Examines this machine or the job, or runs the command behind ``--``."""
    # Imported here because it imports torch, which --help and most errors need not wait for.
    from distrain.cli import doctor

    if command:
        hydra_entry.restore_hydra_full_error()
    doctor.run(load_settings(_schema(), composed), command)


def _check(command: Sequence[str], composed: DictConfig, launch: LaunchSettings) -> None:
    settings = load_settings(_schema(), composed)
    for key in ("ranks", "rank", "address"):
        if getattr(settings, key) is not None:
            raise ConfigError(
                key, getattr(settings, key), "is for ranks that are started by hand; leave it or nproc out"
            )
    if command or settings.export:
        raise ConfigError("nproc", launch.nproc, "nothing is examined then; leave nproc out")
