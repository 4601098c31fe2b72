"""Settings of the commands that read a run, checked like a run's own configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from omegaconf import DictConfig

from distrain.config.load import load_settings
from distrain.config.schema import setting
from distrain.errors import ConfigError
from distrain.runtime.world import World

T = TypeVar("T")


@dataclass
class RunSettings:
    """Which run, and which of its states."""

    run: str = setting("The run's folder.")
    checkpoint: str = setting("newest; best, by validation accuracy; or a checkpoint's folder.")


def load(schema: type[T], composed: DictConfig) -> T:
    """What Hydra composed, as the dataclass.

    Raises:
        ConfigError: An unknown key, a wrong type, a value outside its limits.
    """
    return load_settings(schema, composed)


def one_process(command: str, world: World) -> None:
    """Refuses more than one rank, for commands whose ranks would all do and write the same.

    Raises:
        ConfigError: More than one rank was started.
    """
    if world.size > 1:
        raise ConfigError("WORLD_SIZE", world.size, f"{command} runs on one process; start it without torchrun")
