"""``distrain compare DIR…``: runs side by side, as a table in the terminal and as one HTML page."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from distrain.cli import hydra_entry
from distrain.cli.arguments import settings_and_folders
from distrain.config.folder import CONF
from distrain.config.load import load_settings


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        arguments: The command line behind the command's name; ``None``: that of this process.
    """
    hydra_entry.set_arguments(arguments)
    sys.argv[1:], folders = settings_and_folders(sys.argv[1:])
    hydra_entry.main(functools.partial(_task, folders), CONF, "compare", _schema)


def _schema() -> type[Any]:
    """The command's keys."""
    from distrain.cli import compare

    return compare.CompareSettings


def _task(folders: Sequence[str], composed: DictConfig) -> None:
    from distrain.cli import compare

    compare.run(load_settings(_schema(), composed), [str(Path(folder).expanduser()) for folder in folders])
