"""Exports a run's model: ``python launch/export.py run=DIR format=safetensors output=FILE``."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from distrain.cli import hydra_entry


def task(composed: DictConfig) -> None:
    """Exports once."""
    with hydra_entry.importing():
        # Imports torch, which --help and most mistakes need not wait for.
        from distrain.cli import export, settings

    export.run(settings.load(export.ExportSettings, composed))


if __name__ == "__main__":
    hydra_entry.main(task, Path(__file__).parent.parent / "conf", "export")
