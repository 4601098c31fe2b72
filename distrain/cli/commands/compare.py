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

#: Hydra's options whose value is the next argument.
_OPTIONS_WITH_VALUE = frozenset({"--cfg", "-c", "--info", "-i", "--package", "-p", "--config-dir", "-cd"})


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        arguments: The command line behind the command's name; ``None``: that of this process.
    """
    hydra_entry.set_arguments(arguments)
    settings, folders = _divided(sys.argv[1:])
    # Hydra takes no arguments but settings and options.
    sys.argv[1:] = settings
    hydra_entry.main(functools.partial(_task, folders), CONF, "compare", _schema)


def _divided(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Settings and options, and the folders; ``key=value`` may be a folder too, as those of a sweep's jobs."""
    settings: list[str] = []
    folders: list[str] = []
    # Words beside --help are keys to be explained.
    explains = bool({"-h", "--help"} & set(arguments))
    for before, argument in zip(["", *arguments], arguments, strict=False):
        key, equals, _ = argument.partition("=")
        if argument.startswith("-") or before in _OPTIONS_WITH_VALUE:
            is_folder = False
        elif equals:
            is_folder = not key.isidentifier() and Path(argument).expanduser().is_dir()
        else:
            is_folder = not explains
        (folders if is_folder else settings).append(argument)
    return settings, folders


def _schema() -> type[Any]:
    """The command's keys."""
    from distrain.cli import compare

    return compare.CompareSettings


def _task(folders: Sequence[str], composed: DictConfig) -> None:
    from distrain.cli import compare

    compare.run(load_settings(_schema(), composed), [str(Path(folder).expanduser()) for folder in folders])
