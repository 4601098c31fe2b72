"""Examines a machine, or under torchrun all nodes of a job: ``python launch/doctor.py``."""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import DictConfig

from distrain import cli


def task(composed: DictConfig) -> None:
    """Examines once."""
    # Imports torch, which --help and most mistakes need not wait for.
    from distrain.commands import settings
    from distrain.doctor import command

    if typed:
        cli.restore_environment()
    command.run(settings.load(command.DoctorSettings, composed), typed)


if __name__ == "__main__":
    typed = cli.take_command(sys.argv)
    cli.main(task, Path(__file__).parent.parent / "conf", "doctor")
