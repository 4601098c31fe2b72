"""The keys of strategy=fsdp."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from typing_extensions import override

from distrain.config.schema import Config
from distrain.config.setting import setting
from distrain.errors import ConfigError
from distrain.files.mapped_memory import MappedFile
from distrain.strategies.ddp import DDPConfig

#: Values of ``strategy.shard``; each shards what the one before shards, and more.
OPTIMIZER, GRADIENTS, FULL = SHARDS = ("optimizer", "gradients", "full")
#: Values of ``strategy.offload``.
KEPT, HOST, FILE = OFFLOADS = ("none", "host", "file")


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
    """What strategies need to know that divide the model in another way, and shard what each part of it needs.

    Attributes:
        shard: One of :data:`SHARDS`.
        shard_size: Ranks of a shard group, which are replicas otherwise.
        reshard_after_forward: As for :class:`FSDPConfig`.
        block_mb: Likewise.
    """

    shard: str
    shard_size: int
    reshard_after_forward: bool
    block_mb: float | None


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
    offload: str = setting(
        "Where this rank's part of the optimizer's state, and with shard=full of parameters, lies between uses: none "
        "(the memory of its device), host (a GPU's host, which also makes the update) or file (a file that is mapped "
        "into the host's memory and updated block by block).",
        choices=OFFLOADS,
        affects=("execution",),
    )
    offload_folder: str | None = setting(
        "With offload=file: folder on a disk of this host; null: the one for temporary files (TMPDIR). The file has no "
        "name, and its space is free when the rank ends, however that ends.",
        affects=("execution",),
        path=True,
    )

    @override
    def keys_for_less_memory(self, world_size: int) -> str:
        keys = [] if self.ranks_of_group(world_size) == world_size else ["strategy.shard_size=null"]
        return " ".join([*keys, *([] if self.shard == FULL else [f"strategy.shard={FULL}"])])

    @property
    def folder_of_file(self) -> Path:
        """Where the file of ``offload=file`` lies."""
        return Path(self.offload_folder or tempfile.gettempdir())

    def offload_line(self) -> str:
        """What a line about the set-up says of where a rank's part lies; empty if that is on its device."""
        if self.offload == KEPT:
            return ""
        what = "optimizer's state and parameters" if self.shard == FULL else "optimizer's state"
        where = "the host's memory" if self.offload == HOST else f"a file in {self.folder_of_file}"
        return f"; a rank's part of the {what} lies in {where}"

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
        if self.offload == HOST and not (torch.cuda.is_available() and config.runtime.device in ("auto", "cuda")):
            problem = "this run computes on CPUs, whose memory is the host's"
            raise ConfigError("strategy.offload", self.offload, problem, [KEPT, FILE])
        if self.offload == FILE:
            try:
                MappedFile(self.folder_of_file)
            except OSError as error:
                problem = f"no file can be made in {error.filename} ({error.strerror})"
                raise ConfigError("strategy.offload_folder", self.offload_folder, problem) from error
