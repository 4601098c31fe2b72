"""The keys of strategy=tensor_parallel."""

from __future__ import annotations

from dataclasses import dataclass

from distrain.config.groups import StrategyConfig
from distrain.config.schema import Config
from distrain.config.setting import setting
from distrain.errors import ConfigError

#: What a layer may be in ``strategy.plan``: whole on every rank, or one of the roles of ``Division`` (``layers.py``).
REPLICATED = "replicated"
ROLES = ("column", "row", "channels", "attention", REPLICATED)


@dataclass
class TensorParallelConfig(StrategyConfig):
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

    def check(self, config: Config, world_size: int) -> None:
        """Refuses what the strategy can't run.

        Raises:
            ConfigError: Names the key.
        """
        for pattern, role in self.plan.items():
            if role not in ROLES:
                raise ConfigError(f"strategy.plan.{pattern}", role, "is no way to divide a layer", ROLES)
        if config.compression.name != "none":
            problem = "compresses gradients that ranks exchange, and strategy=tensor_parallel exchanges activations"
            raise ConfigError("compression", config.compression.name, problem, ["none"])
        if config.trainer.compile:
            problem = "is not possible under strategy=tensor_parallel, whose layers communicate"
            raise ConfigError("trainer.compile", config.trainer.compile, problem, [False])
        if config.prune.amount is not None:
            problem = "compares weights of the whole model, of which strategy=tensor_parallel holds parts"
            raise ConfigError("prune.amount", config.prune.amount, problem, ["null"])
