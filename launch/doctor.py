"""Examines this machine, or under torchrun all nodes of a job: ``python launch/doctor.py``."""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import DictConfig

from distrain.cli import hydra_entry
from distrain.config.load import load_settings


def task(composed: DictConfig) -> None:
    """Examines this machine or the job, or runs the command behind ``--``."""
    # Imported here because it imports torch, which --help and most errors need not wait for.
    from distrain.cli import doctor

    if command:
        hydra_entry.restore_hydra_full_error()
    doctor.run(load_settings(doctor.DoctorSettings, composed), command)


if __name__ == "__main__":
    command = hydra_entry.pop_command(sys.argv)
    hydra_entry.main(task, Path(__file__).parent.parent / "conf", "doctor")
