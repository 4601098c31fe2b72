"""Exports a run's model: ``python launch/export.py run=DIR format=safetensors output=FILE``."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from distrain.cli import hydra_entry
from distrain.config.load import load_settings


def task(composed: DictConfig) -> None:
    """Exports a run's model."""
    with hydra_entry.gc_disabled():
        # Imported here because it imports torch, which --help and most errors need not wait for.
        from distrain.cli import export

    export.run(load_settings(export.ExportSettings, composed))


if __name__ == "__main__":
    hydra_entry.main(task, Path(__file__).parent.parent / "conf", "export")
