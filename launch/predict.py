"""Predicts the classes of images: ``python launch/predict.py run=DIR input=PATH output=FILE``."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from distrain.cli import hydra_entry


def task(composed: DictConfig) -> None:
    """Predicts once."""
    with hydra_entry.importing():
        # Imports torch, which --help and most mistakes need not wait for.
        from distrain.cli import predict, settings

    predict.run(settings.load(predict.PredictSettings, composed))


if __name__ == "__main__":
    hydra_entry.main(task, Path(__file__).parent.parent / "conf", "predict")
