"""The keys of strategy=pipeline."""

from __future__ import annotations

from dataclasses import dataclass

from distrain.config.groups import StrategyConfig
from distrain.config.setting import setting
from distrain.errors import ConfigError
from distrain.strategies.pipeline.schedule import SCHEDULES


@dataclass
class PipelineConfig(StrategyConfig):
    """Keys of ``strategy=pipeline``."""

    stages: int = setting("Number of parts that the model is split into.", at_least=2)
    schedule: str = setting("Order in which ranks work on the microbatches.", choices=SCHEDULES)
    microbatches: int = setting("Number of microbatches that a replica's share of a batch is split into.", at_least=1)
    virtual_stages: int | None = setting("Stages per rank; null: the schedule's default.", at_least=1)
    boundaries: list[str] = setting("First block of each stage but the first; empty: chosen by measured times.")
    batchnorm: str = setting("Running statistics of BatchNorm layers.", choices=("deferred", "local"))
    first_bucket_mb: float | None = setting("Size of the first gradient bucket in MiB; null: by measurement.", above=0)
    bucket_mb: float | None = setting("Size of the other gradient buckets in MiB; null: by measurement.", above=0)

    @property
    def stages_per_rank(self) -> int:
        """Stages per rank."""
        return self.virtual_stages or SCHEDULES[self.schedule].stages_per_rank or 2

    @property
    def ranks(self) -> int:
        """Ranks of one pipeline."""
        return self.stages // self.stages_per_rank

    @property
    def bucket_sizes(self) -> tuple[float | None, float | None, float | None]:
        """Configured sizes in MiB of the first bucket, the others and the last; ``None``: by measurement."""
        return self.first_bucket_mb, self.bucket_mb, None if self.bucket_mb is None else 0

    def check_world_size(self, world_size: int) -> None:
        """Refuses numbers of stages and ranks that don't fit together.

        Raises:
            ConfigError: The message names the key.
        """
        per_rank = self.stages_per_rank
        required = SCHEDULES[self.schedule].stages_per_rank
        if required is not None and per_rank != required:
            problem = f"is not the number of stages per rank of {self.schedule}"
            raise ConfigError("strategy.virtual_stages", self.virtual_stages, problem, [required])
        if required is None and per_rank < 2:
            raise ConfigError("strategy.virtual_stages", per_rank, f"{self.schedule} needs at least 2")
        if self.stages % per_rank:
            problem = f"must be a multiple of the {per_rank} stages per rank"
            raise ConfigError("strategy.stages", self.stages, problem)
        if self.ranks < 2:
            problem = f"{per_rank} stages per rank make a pipeline of a single rank"
            raise ConfigError("strategy.stages", self.stages, problem)
        if world_size % self.ranks:
            given = "one rank" if world_size == 1 else f"{world_size} ranks"
            problem = f"{given} can't be divided into pipelines of {self.ranks} ranks"
            choices = [ranks * per_rank for ranks in range(2, world_size + 1) if world_size % ranks == 0]
            raise ConfigError("strategy.stages", self.stages, problem, choices)
