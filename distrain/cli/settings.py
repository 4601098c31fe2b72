"""Settings that several commands which read a run share."""

from __future__ import annotations

from dataclasses import dataclass

from distrain.checkpoint.format import AVERAGES
from distrain.config.setting import setting
from distrain.errors import ConfigError
from distrain.runtime.world import World


@dataclass
class RunSettings:
    """Selects a run and one of its checkpoints."""

    run: str = setting("Folder of the run.", path=True)
    checkpoint: str = setting("newest, best (by validation score), or the folder of a checkpoint.", path=True)
    weights: str = setting(
        "last: those of the checkpoint's step; ema or swa: an average of the model, if the run keeps it.",
        choices=("last", *AVERAGES),
        default="last",
    )


def require_one_process(command: str, world: World) -> None:
    """Refuses more than one rank, for commands whose ranks would all write the same output.

    Raises:
        ConfigError: More than one rank was started.
    """
    if world.size > 1:
        raise ConfigError("WORLD_SIZE", world.size, f"{command} runs on one process; start it without torchrun")
