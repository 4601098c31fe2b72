"""Predicts the classes of images: ``python launch/predict.py run=DIR input=PATH output=FILE``."""

from __future__ import annotations

import sys
from pathlib import Path

# This checkout's package is found even where nothing is installed, or another folder called distrain lies on the path.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from distrain.cli.commands import predict

if __name__ == "__main__":
    predict.main()
