"""Evaluates a run: ``python launch/evaluate.py run=DIR``, or under torchrun with the same result."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from distrain.cli import hydra_entry
from distrain.config.load import load_settings


def task(composed: DictConfig) -> None:
    """Evaluates a run."""
    with hydra_entry.gc_disabled():
        # Imported here because it imports torch, which --help and most errors need not wait for.
        from distrain.cli import evaluate

    evaluate.run(load_settings(evaluate.EvaluateSettings, composed))


if __name__ == "__main__":
    hydra_entry.main(task, Path(__file__).parent.parent / "conf", "evaluate")
