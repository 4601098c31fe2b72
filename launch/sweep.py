"""Trains with each combination of values: ``python launch/sweep.py strategy=ddp nproc=2 compression=none,fp16``."""

from __future__ import annotations

import sys
from pathlib import Path

# This checkout's package is found even where nothing is installed, or another folder called distrain lies on the path.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from distrain.cli.commands import sweep

if __name__ == "__main__":
    sweep.main()
