"""Predicts the classes of images: ``python launch/predict.py run=DIR input=PATH output=FILE``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

# This checkout's package is found even where nothing is installed, or another folder called distrain lies on the path.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from distrain.cli import hydra_entry
from distrain.config.load import load_settings


def schema() -> type[Any]:
    """The command's keys."""
    from distrain.cli import predict

    return predict.PredictSettings


def task(composed: DictConfig) -> None:
    """Predicts the classes of images."""
    with hydra_entry.gc_disabled():
        # Imported here because it imports torch, which --help and most errors need not wait for.
        from distrain.cli import predict

    predict.run(load_settings(schema(), composed))


if __name__ == "__main__":
    hydra_entry.main(task, Path(__file__).parent.parent / "conf", "predict", schema)
