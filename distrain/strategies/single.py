"""strategy=single: one process, the training that every other strategy must equal."""

from __future__ import annotations

from typing_extensions import override

from distrain.config.groups import StrategyConfig
from distrain.config.registry import choices, register
from distrain.config.schema import Config
from distrain.errors import ConfigError
from distrain.strategies.replicated import Replicated


@register("strategy", "single", StrategyConfig)
class Single(Replicated[StrategyConfig]):
    """One replica on one rank."""

    steps_alike = True

    @override
    @classmethod
    def check(cls, config: Config, world_size: int) -> None:
        if world_size > 1:
            others = [name for name in choices("strategy") if name != "single"]
            raise ConfigError("strategy", "single", f"runs on 1 rank, but {world_size} were started", others)
