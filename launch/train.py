"""Trains: ``torchrun --nproc-per-node 2 launch/train.py strategy=ddp``, or ``python launch/train.py`` on one rank."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C while modules are imported ends the process, without a traceback of imports.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from omegaconf import DictConfig

# This checkout's package is found even where nothing is installed, or another folder called distrain lies on the path.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from distrain.cli import hydra_entry
from distrain.config.load import load_config
from distrain.tools.launching import slurm


def task(composed: DictConfig) -> None:
    """Trains once."""
    slurm.set_torchrun_variables(os.environ)
    with hydra_entry.gc_disabled():
        config = load_config(composed)
        # Imported here because it imports torch, which --help, completion and most errors need not wait for.
        from distrain.cli import app

    app.train(config)


if __name__ == "__main__":
    hydra_entry.main(task, Path(__file__).parent.parent / "conf", "config")
