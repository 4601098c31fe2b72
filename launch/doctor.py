"""Examines a machine, or under torchrun all nodes of a job: ``python launch/doctor.py``."""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import DictConfig

from distrain.cli import hydra_entry


def task(composed: DictConfig) -> None:
    """Examines once."""
    # Imports torch, which --help and most mistakes need not wait for.
    from distrain.cli import doctor, settings

    if typed:
        hydra_entry.restore_environment()
    doctor.run(settings.load(doctor.DoctorSettings, composed), typed)


if __name__ == "__main__":
    typed = hydra_entry.take_command(sys.argv)
    hydra_entry.main(task, Path(__file__).parent.parent / "conf", "doctor")
