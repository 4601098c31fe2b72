"""The keys of strategy=tensor_parallel."""

from __future__ import annotations

from dataclasses import dataclass

from distrain.config.schema import Config
from distrain.config.setting import setting
from distrain.errors import ConfigError
from distrain.strategies.data_parallel import DataParallelConfig

#: What a layer may be in ``strategy.plan``: whole on every rank, or one of the roles of ``Division`` (``layers.py``).
REPLICATED = "replicated"
ROLES = ("column", "row", "channels", "attention", REPLICATED)


@dataclass
class TensorParallelConfig(DataParallelConfig):
    """Keys of ``strategy=tensor_parallel``."""

    plan: dict[str, str] = setting(
        "How layers are divided, by shell patterns of their names, the first that fits: column, row, channels, "
        "attention or replicated; empty, or with replicated alone: found by running the model.",
        default_factory=dict,
    )

    @property
    def is_automatic(self) -> bool:
        """Whether layers are divided that the plan doesn't name."""
        return all(role == REPLICATED for role in self.plan.values())

    def ranks_of_replica(self, world_size: int) -> int:
        """Ranks that hold one copy of the model; groups of so many are replicas of each other."""
        return world_size

    def check(self, config: Config, world_size: int) -> None:
        """Refuses what the strategy can't run.

        Raises:
            ConfigError: Names the key.
        """
        for pattern, role in self.plan.items():
            if role not in ROLES:
                raise ConfigError(f"strategy.plan.{pattern}", role, "is no way to divide a layer", ROLES)
        strategy = f"strategy={config.strategy.name}"
        if config.compression.name != "none" and world_size == self.ranks_of_replica(world_size):
            problem = f"compresses gradients that replicas exchange, and {strategy} has one replica here"
            raise ConfigError("compression", config.compression.name, problem, ["none"])
        if config.compression.name == "auto":
            problem = "each rank chooses by what it measures, and ranks that hold the same whole layer may differ"
            raise ConfigError("compression", "auto", problem)
        if config.trainer.compile:
            problem = f"is not possible under {strategy}, whose layers communicate"
            raise ConfigError("trainer.compile", config.trainer.compile, problem, [False])
        if config.prune.amount is not None:
            problem = f"compares weights of the whole model, of which ranks hold parts under {strategy}"
            raise ConfigError("prune.amount", config.prune.amount, problem, ["null"])
