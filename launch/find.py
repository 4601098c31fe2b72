"""Suggests a learning rate for a training: ``python launch/find.py lr nproc=2 -- strategy=ddp …``."""

from __future__ import annotations

import sys
from pathlib import Path

# This checkout's package is found even where nothing is installed, or another folder called distrain lies on the path.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from distrain.cli.commands import find

if __name__ == "__main__":
    find.main()
