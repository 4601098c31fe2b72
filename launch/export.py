"""Exports a run's model: ``python launch/export.py run=DIR format=safetensors output=FILE``."""

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
    from distrain.cli import export

    return export.ExportSettings


def task(composed: DictConfig) -> None:
    """Exports a run's model."""
    with hydra_entry.gc_disabled():
        # Imported here because it imports torch, which --help and most errors need not wait for.
        from distrain.cli import export

    export.run(load_settings(schema(), composed))


if __name__ == "__main__":
    hydra_entry.main(task, Path(__file__).parent.parent / "conf", "export", schema)
