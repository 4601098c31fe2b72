"""Serves a run's model over HTTP: ``python launch/serve.py run=DIR port=8000``."""

from __future__ import annotations

import sys
from pathlib import Path

# This checkout's package is found even where nothing is installed, or another folder called distrain lies on the path.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from distrain.cli.commands import serve

if __name__ == "__main__":
    serve.main()
