"""``distrain train strategy=ddp …``: trains, on one rank or under torchrun on many."""

from __future__ import annotations

import os
from collections.abc import Sequence

from omegaconf import DictConfig

from distrain.cli import hydra_entry
from distrain.config.folder import CONF
from distrain.config.load import load_config
from distrain.files.live_text import CLEAR_LINE, is_live
from distrain.files.terminal import TERMINAL
from distrain.tools.launching import slurm
from distrain.tools.launching.launch_keys import LaunchSettings


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        arguments: The command line behind the command's name; ``None``: that of this process.
    """
    hydra_entry.set_arguments(arguments)
    hydra_entry.main(_task, CONF, "config", check=_check)


def _task(composed: DictConfig) -> None:
    # Ranks have a launcher, which has said so, and would all write on the same line.
    if "RANK" not in os.environ:
        _say_that_it_starts(composed)
    slurm.set_torchrun_variables(os.environ)
    with hydra_entry.gc_disabled():
        config = load_config(composed)
        # Imported here because it imports torch, which --help, completion and most errors need not wait for.
        from distrain.cli import app

    app.train(config)


def _check(composed: DictConfig, launch: LaunchSettings) -> None:
    # With several hosts, rank 0 and its live line may be on another one.
    if launch.nodes == (1, 1):
        _say_that_it_starts(composed)
    with hydra_entry.gc_disabled():
        config = load_config(composed)
        # Imported here because it imports torch, which most errors need not wait for.
        from distrain.cli import app
    app.check(config, launch.first_world())


def _say_that_it_starts(composed: DictConfig) -> None:
    """Writes so on the line on which a live line will follow: torch is imported for some seconds before that."""
    if is_live(TERMINAL) and str(composed.trainer.progress) in ("auto", "bar"):
        TERMINAL.write(f"{CLEAR_LINE}starting")
        TERMINAL.flush()
