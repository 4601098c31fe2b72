"""``distrain compare DIR…``: runs side by side, as a table in the terminal and as one HTML page."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from distrain.cli import hydra_entry
from distrain.config.folder import CONF
from distrain.config.load import load_settings


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        arguments: The command line behind the command's name; ``None``: that of this process.
    """
    hydra_entry.set_arguments(arguments)
    folders = [argument for argument in sys.argv[1:] if _is_folder(argument)]
    # Hydra takes no arguments but settings and options.
    sys.argv[1:] = [argument for argument in sys.argv[1:] if not _is_folder(argument)]
    hydra_entry.main(functools.partial(_task, folders), CONF, "compare", _schema)


def _is_folder(argument: str) -> bool:
    """Whether an argument names a folder: ``key=value`` may be one too, as a sweep's jobs are named so."""
    if argument.startswith("-"):
        return False
    key, equals, _ = argument.partition("=")
    if not equals:
        # The key that --help should explain is no folder.
        return not ({"-h", "--help"} & set(sys.argv[1:]))
    return not key.isidentifier() and Path(argument).expanduser().is_dir()


def _schema() -> type[Any]:
    """The command's keys."""
    from distrain.cli import compare

    return compare.CompareSettings


def _task(folders: Sequence[str], composed: DictConfig) -> None:
    from distrain.cli import compare

    compare.run(load_settings(_schema(), composed), [str(Path(folder).expanduser()) for folder in folders])
