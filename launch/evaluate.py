"""Evaluates a run: ``python launch/evaluate.py run=DIR``, or under torchrun with the same counts."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from distrain.cli import hydra_entry


def task(composed: DictConfig) -> None:
    """Evaluates one run."""
    with hydra_entry.importing():
        # Imports torch, which --help and most mistakes need not wait for.
        from distrain.cli import evaluate, settings

    evaluate.run(settings.load(evaluate.EvaluateSettings, composed))


if __name__ == "__main__":
    hydra_entry.main(task, Path(__file__).parent.parent / "conf", "evaluate")
