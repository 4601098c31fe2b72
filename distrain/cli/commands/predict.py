"""``distrain predict run=DIR input=PATH output=FILE``: predicts for images, on one rank or under torchrun on many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from distrain.cli import hydra_entry
from distrain.config.folder import CONF
from distrain.config.load import load_settings
from distrain.tools.launching.launch_keys import LaunchSettings


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        arguments: The command line behind the command's name; ``None``: that of this process.
    """
    hydra_entry.set_arguments(arguments)
    hydra_entry.main(_task, CONF, "predict", _schema, _check)


def _schema() -> type[Any]:
    """The command's keys."""
    from distrain.cli import predict

    return predict.PredictSettings


def _task(composed: DictConfig) -> None:
    with hydra_entry.gc_disabled():
        # Imported here because it imports torch, which --help and most errors need not wait for.
        from distrain.cli import predict

    predict.run(load_settings(_schema(), composed))


def _check(composed: DictConfig, launch: LaunchSettings) -> None:
    with hydra_entry.gc_disabled():
        # Imported here because it imports torch, which --help and most errors need not wait for.
        from distrain.cli import predict

    predict.check(load_settings(_schema(), composed), launch.first_world())
