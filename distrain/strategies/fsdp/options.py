"""The keys of strategy=fsdp."""

from __future__ import annotations

from dataclasses import dataclass

from distrain.config.schema import Config
from distrain.config.setting import setting
from distrain.errors import ConfigError
from distrain.strategies.ddp import DDPConfig

#: Values of ``strategy.shard``; each shards what the one before shards, and more.
OPTIMIZER, GRADIENTS, FULL = SHARDS = ("optimizer", "gradients", "full")


def shares(shard: str, ranks: int) -> dict[str, float]:
    """The share that a rank has of each kind of state that is sharded.

    Args:
        shard: One of :data:`SHARDS`.
        ranks: Of a shard group.
    """
    kinds = ("optimizer", "gradients", "parameters")[: SHARDS.index(shard) + 1]
    return dict.fromkeys(kinds, 1 / ranks)


def check_compression(shard: str, config: Config) -> None:
    """Refuses compression where no all-reduce of gradients is left.

    Raises:
        ConfigError: Names the key.
    """
    if shard != OPTIMIZER and config.compression.name != "none":
        problem = f"compresses all-reduces, and strategy.shard={shard} has none; strategy.shard=optimizer has"
        raise ConfigError("compression", config.compression.name, problem, ["none"])


@dataclass
class ShardedUpdateConfig:
    """What strategies need to know that keep whole parameters on each rank and shard what updates them.

    Attributes:
        shard: One of :data:`SHARDS`.
        shard_size: Ranks of a shard group, which are replicas otherwise.
    """

    shard: str
    shard_size: int

    def check_sharding(self, config: Config) -> None:
        """Refuses what can't be sharded.

        Raises:
            ConfigError: Names the key.
        """
        if self.shard == FULL:
            problem = "is possible beside replicas only: stages and divided layers keep all of their parameters"
            raise ConfigError("strategy.shard", self.shard, problem, [OPTIMIZER, GRADIENTS])
        check_compression(self.shard, config)


@dataclass
class FSDPConfig(DDPConfig):
    """Keys of ``strategy=fsdp``; the sizes of buckets are for ``shard=optimizer|gradients``."""

    shard: str = setting(
        "What each rank keeps only its part of: optimizer state (ZeRO 1), gradients too (ZeRO 2), or parameters too "
        "(ZeRO 3).",
        choices=SHARDS,
    )
    shard_size: int | None = setting(
        "Consecutive ranks that share one copy of what is sharded; groups of ranks are replicas; null: all ranks.",
        at_least=1,
    )
    reshard_after_forward: bool = setting(
        "With shard=full: free gathered parameters after the forward pass and gather them again for the backward pass; "
        "false: keep them until the end of the step."
    )
    block_mb: float | None = setting(
        "With shard=full: most MiB of parameters that are gathered together, where modules allow that; null: a "
        "sixteenth of the model, at least 1.",
        above=0,
    )

    def ranks_of_group(self, world_size: int) -> int:
        """Ranks of a shard group."""
        return world_size if self.shard_size is None else self.shard_size

    def check(self, config: Config, world_size: int) -> None:
        """Refuses what the strategy can't run.

        Raises:
            ConfigError: Names the key.
        """
        if self.shard_size is not None and world_size % self.shard_size:
            fitting = [size for size in range(1, world_size + 1) if world_size % size == 0]
            raise ConfigError("strategy.shard_size", self.shard_size, f"must divide {world_size} ranks", fitting)
        check_compression(self.shard, config)
        if self.shard == FULL and config.trainer.compile:
            problem = "is not possible under strategy.shard=full, whose parameters come and go"
            raise ConfigError("trainer.compile", config.trainer.compile, problem, [False])
