"""Trains: ``torchrun --nproc-per-node 2 launch/train.py strategy=ddp``, or ``python launch/train.py`` on one rank."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C while modules are imported ends the process, without a traceback of imports.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# This checkout's package is found even where nothing is installed, or another folder called distrain lies on the path.
sys.path.append(str(Path(__file__).resolve().parent.parent))

# Completion in fish takes only scripts that hold the text @hydra.main.
from distrain.cli.commands import train

if __name__ == "__main__":
    train.main()
