"""Exports a run's model: ``python launch/export.py run=DIR format=safetensors output=FILE``."""

from __future__ import annotations

import sys
from pathlib import Path

# This checkout's package is found even where nothing is installed, or another folder called distrain lies on the path.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from distrain.cli.commands import export

if __name__ == "__main__":
    export.main()
