"""Predicts the classes of images: ``python launch/predict.py run=DIR input=PATH output=FILE``."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from distrain.cli import hydra_entry
from distrain.config.load import load_settings


def task(composed: DictConfig) -> None:
    """Predicts the classes of images."""
    with hydra_entry.gc_disabled():
        # Imported here because it imports torch, which --help and most errors need not wait for.
        from distrain.cli import predict

    predict.run(load_settings(predict.PredictSettings, composed))


if __name__ == "__main__":
    hydra_entry.main(task, Path(__file__).parent.parent / "conf", "predict")
