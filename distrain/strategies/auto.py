"""strategy=auto: the fastest strategy that trains what one process trains. A training finds it before it begins.

A plan (:mod:`distrain.tools.planning.auto`) replaces it by an ordinary strategy, so no run ever has this one.
"""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from distrain.config.groups import StrategyConfig
from distrain.config.registry import choices, register
from distrain.config.schema import Config
from distrain.config.setting import setting
from distrain.errors import ConfigError
from distrain.strategies.base import Strategy


@dataclass
class AutoConfig(StrategyConfig):
    """Keys of ``strategy=auto``."""

    strategies: list[str] = setting(
        "Strategies to choose from.", choices=("ddp", "fsdp", "pipeline", "mesh", "parameter_server")
    )
    min_gain: float = setting(
        "Plain ddp is chosen unless another configuration shortens its step by at least this share.",
        at_least=0,
        below=1,
    )
    trials: int = setting(
        "Number of the fastest configurations that are run for some steps, beside ddp, before one is chosen; 0: the "
        "prediction alone decides.",
        at_least=0,
    )
    trial_seconds: float = setting("Seconds of steps in each of these runs.", above=0)

    def __post_init__(self) -> None:
        """Refuses an empty choice.

        Raises:
            ConfigError: The message names the key.
        """
        if not self.strategies:
            raise ConfigError("strategy.strategies", [], "names none")


@register("strategy", "auto", AutoConfig)
class Auto(Strategy[AutoConfig]):
    """Stands for the strategy that will be chosen."""

    @override
    @classmethod
    def check(cls, config: Config, world_size: int) -> None:
        others = [name for name in choices("strategy") if name != "auto"]
        raise ConfigError("strategy", "auto", "is chosen at the start of a training; here, name the strategy", others)
