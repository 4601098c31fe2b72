"""``distrain serve run=DIR port=8000``: a run's model over HTTP."""

from __future__ import annotations

from collections.abc import Sequence
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
    hydra_entry.main(_task, CONF, "serve", _schema)


def _schema() -> type[Any]:
    """The command's keys."""
    from distrain.cli import serve

    return serve.ServeSettings


def _task(composed: DictConfig) -> None:
    with hydra_entry.gc_disabled():
        # Imported here because it imports torch, which --help and most errors need not wait for.
        from distrain.cli import serve

    # A thread may still work on an answer that has been given up.
    hydra_entry.exit_now(serve.run(load_settings(_schema(), composed)))
