"""Data parallelism: every rank holds the model, sees a share of each batch, and gradients are summed over the ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn
from typing_extensions import override

from distrain.communication.collectives import Communicator
from distrain.config.registry import register
from distrain.config.schema import Config
from distrain.config.setting import setting
from distrain.strategies.base import MakeOptimizer
from distrain.strategies.data_parallel import DataParallel, DataParallelConfig
from distrain.tasks.base import Task

if TYPE_CHECKING:
    from distrain.runtime.runtime import Runtime


@dataclass
class DDPConfig(DataParallelConfig):
    """Keys of ``strategy=ddp``."""

    batchnorm: str = setting("Statistics of BatchNorm layers.", choices=("sync", "local"))
    first_bucket_mb: float | None = setting("Size of the first gradient bucket in MiB; null: by measurement.", above=0)
    bucket_mb: float | None = setting("Size of the other gradient buckets in MiB; null: by measurement.", above=0)
    last_bucket_mb: float | None = setting(
        "Largest size in MiB of a last bucket of its own; 0: none; null: by measurement.", at_least=0
    )

    @property
    @override
    def synchronises_batchnorm(self) -> bool:
        return self.batchnorm == "sync"

    @property
    @override
    def sizes(self) -> tuple[float | None, float | None, float | None]:
        return self.first_bucket_mb, self.bucket_mb, self.last_bucket_mb


@register("strategy", "ddp", DDPConfig)
class DDP(DataParallel[DDPConfig]):
    """Every rank holds the model and trains on its share; gradients are summed during the backward pass.

    Li et al. 2020, "PyTorch Distributed" (arXiv 2006.15704). Unlike torch's DistributedDataParallel the mean is over
    the global batch's samples, not over ranks, and a rank without samples contributes zeros.
    """

    steps_alike = True

    def __init__(self, config: Config, runtime: Runtime) -> None:
        super().__init__(config, runtime)
        self.mesh = runtime.mesh({"data": runtime.world.size})
        self.replicas = Communicator(self.mesh.get_group("data") if self.mesh else None, self.ledger)
        self.data_shard = (self.replicas.rank, self.replicas.size)

    @override
    def setup(self, model: nn.Module, task: Task, make_optimizer: MakeOptimizer, example: Tensor) -> None:
        self.sync_initial_state(model, self.replicas)
        super().setup(model, task, make_optimizer, example)
