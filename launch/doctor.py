"""Examines this machine, or under torchrun all nodes of a job: ``python launch/doctor.py``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

# This checkout's package is found even where nothing is installed, or another folder called distrain lies on the path.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from distrain.cli import hydra_entry
from distrain.config.load import load_settings


def schema() -> type[Any]:
    """The command's keys."""
    from distrain.cli import doctor

    return doctor.DoctorSettings


def task(composed: DictConfig) -> None:
    """Examines this machine or the job, or runs the command behind ``--``."""
    # Imported here because it imports torch, which --help and most errors need not wait for.
    from distrain.cli import doctor

    if command:
        hydra_entry.restore_hydra_full_error()
    doctor.run(load_settings(schema(), composed), command)


if __name__ == "__main__":
    command = hydra_entry.pop_command(sys.argv)
    if not command:
        # The report says what torch's own warnings about sockets would say, in words. torch reads this when imported.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    hydra_entry.main(task, Path(__file__).parent.parent / "conf", "doctor", schema)
