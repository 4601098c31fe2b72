"""Shows a run that goes on: ``python launch/watch.py runs/a``."""

from __future__ import annotations

import sys
from pathlib import Path

# This checkout's package is found even where nothing is installed, or another folder called distrain lies on the path.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from distrain.cli.commands import watch

if __name__ == "__main__":
    watch.main()
