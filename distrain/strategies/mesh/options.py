"""The keys of strategy=mesh, and the options that they are for the strategies along its dimensions."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

from typing_extensions import override

from distrain.config.groups import StrategyConfig
from distrain.config.setting import setting, setting_of
from distrain.errors import ConfigError
from distrain.strategies.ddp import DDPConfig
from distrain.strategies.fsdp.options import FULL, GRADIENTS, KEPT, FSDPConfig, ShardedUpdateConfig
from distrain.strategies.pipeline.options import PipelineConfig
from distrain.strategies.tensor_parallel.options import TensorParallelConfig

T = TypeVar("T", bound=StrategyConfig)


@dataclass
class MeshShape:
    """Numbers of ranks along the dimensions, from the outermost one to that whose ranks are neighbours."""

    data: int | None = setting(
        "Replicas, each with a share of the batch; null: what the other dimensions leave of the ranks.", at_least=1
    )
    shard: int = setting("Ranks that share the batch and what strategy.shard says.", at_least=1)
    pipeline: int = setting("Ranks that hold stages of the model one after the other.", at_least=1)
    tensor: int = setting("Ranks that divide layers among themselves.", at_least=1)

    @property
    def ranks_of_replica(self) -> int:
        """Ranks that hold one copy of what is trained."""
        return self.shard * self.pipeline * self.tensor

    def check(self, world_size: int) -> None:
        """Refuses dimensions whose product is not the number of ranks.

        Raises:
            ConfigError: The message names the key.
        """
        others = f"shard {self.shard} × pipeline {self.pipeline} × tensor {self.tensor}"
        started = "one rank was" if world_size == 1 else f"{world_size} ranks were"
        replicas, left = divmod(world_size, self.ranks_of_replica)
        if left:
            problem = f"needs {self.ranks_of_replica} ranks, or a multiple of them, but {started} started"
            raise ConfigError("strategy.mesh", others, problem)
        if self.data not in (None, replicas):
            problem = f"with {others} needs {self.data * self.ranks_of_replica} ranks, but {started} started"
            raise ConfigError("strategy.mesh.data", self.data, problem, [replicas, "null"])


@dataclass
class MeshConfig(StrategyConfig):
    """Keys of ``strategy=mesh``; besides its shape those of other strategies, with the same names and meanings."""

    mesh: MeshShape = setting("Number of ranks along each dimension; their product is the number of ranks.")
    batchnorm: str | None = setting(
        "BatchNorm layers, as for ddp and pipeline; null: sync, in a pipeline deferred.",
        choices=("sync", "local", "deferred", None),
    )
    first_bucket_mb: float | None = setting_of(DDPConfig, "first_bucket_mb")
    bucket_mb: float | None = setting_of(DDPConfig, "bucket_mb")
    last_bucket_mb: float | None = setting_of(DDPConfig, "last_bucket_mb")
    shard: str = setting_of(FSDPConfig, "shard")
    reshard_after_forward: bool = setting_of(FSDPConfig, "reshard_after_forward")
    block_mb: float | None = setting_of(FSDPConfig, "block_mb")
    offload: str = setting_of(FSDPConfig, "offload")
    offload_folder: str | None = setting_of(FSDPConfig, "offload_folder")
    schedule: str = setting_of(PipelineConfig, "schedule")
    microbatches: int = setting_of(PipelineConfig, "microbatches")
    virtual_stages: int | None = setting_of(PipelineConfig, "virtual_stages")
    boundaries: list[str] = setting_of(PipelineConfig, "boundaries")
    plan: dict[str, str] = setting_of(TensorParallelConfig, "plan")

    @property
    def normalisation(self) -> str:
        """What BatchNorm layers do: what was typed, or else what is closest to one process."""
        return self.batchnorm or ("deferred" if self.mesh.pipeline > 1 else "sync")

    def check(self, world_size: int) -> None:
        """Refuses a shape that doesn't fit the number of ranks or the other keys.

        Raises:
            ConfigError: The message names the key.
        """
        shape = self.mesh
        shape.check(world_size)
        has_stages = shape.pipeline > 1
        if self.batchnorm == ("sync" if has_stages else "deferred"):
            problem = f"is not possible {'in' if has_stages else 'without'} a pipeline"
            raise ConfigError(
                "strategy.batchnorm", self.batchnorm, problem, ["null", "deferred" if has_stages else "sync", "local"]
            )
        if has_stages and self.last_bucket_mb is not None:
            problem = "is not possible in a pipeline, whose stages have buckets of bucket_mb up to the last one"
            raise ConfigError("strategy.last_bucket_mb", self.last_bucket_mb, problem, ["null"])
        if self.offload != KEPT and (has_stages or shape.tensor > 1 or shape.shard == 1):
            problem = "needs strategy.mesh.shard above 1, and neither stages nor divided layers"
            raise ConfigError("strategy.offload", self.offload, problem, [KEPT])
        self._check_unused()

    def _check_unused(self) -> None:
        """Refuses what was typed for a dimension of one rank, since it would change nothing.

        Raises:
            ConfigError: The message names the key.
        """
        for dimension, key, unset in (
            ("pipeline", "virtual_stages", "null"),
            ("pipeline", "boundaries", "[]"),
            ("tensor", "plan", "{}"),
        ):
            value = getattr(self, key)
            if value and getattr(self.mesh, dimension) == 1:
                raise ConfigError(f"strategy.{key}", value, f"needs strategy.mesh.{dimension} above 1", [unset])

    @override
    def keys_for_less_memory(self, world_size: int) -> str:
        shape = self.mesh
        divided = shape.pipeline * shape.tensor
        alike = world_size // divided
        if alike == 1:
            return super().keys_for_less_memory(world_size)
        keys = []
        if alike > shape.shard:
            keys += [] if shape.data is None else ["strategy.mesh.data=null"]
            keys.append(f"strategy.mesh.shard={alike}")
        if shape.pipeline > 1:
            # A step needs all parameters of a stage, and with FULL this rank's part of them besides.
            keys += [f"strategy.shard={GRADIENTS}"] if self.shard == FULL else []
        else:
            keys += [] if self.shard == FULL else [f"strategy.shard={FULL}"]
        return " ".join(keys)

    def options(self, kind: type[T], **more: Any) -> T:
        """The options of a strategy along the dimensions.

        Args:
            kind: Their class.
            **more: What its keys are besides those that have the same name here.
        """
        own = {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(self)}
        own |= {"batchnorm": self.normalisation, **more}
        return kind(**{spec.name: own[spec.name] for spec in dataclasses.fields(kind)})


@dataclass
class MeshTensorConfig(TensorParallelConfig, DDPConfig):
    """Options of replicas that divide layers.

    Attributes:
        tensor: Ranks of a replica.
    """

    tensor: int = setting("Ranks that divide layers among themselves.", at_least=1)

    @override
    def ranks_of_replica(self, world_size: int) -> int:
        return self.tensor


@dataclass
class MeshPipelineConfig(PipelineConfig, TensorParallelConfig):
    """Options of replicas that have stages, of which each may be divided.

    Attributes:
        tensor: Ranks of a stage.
    """

    tensor: int = setting("Ranks that divide the layers of a stage among themselves.", at_least=1)

    @override
    def ranks_of_replica(self, world_size: int) -> int:
        return self.ranks * self.tensor


@dataclass
class MeshShardedTensorConfig(MeshTensorConfig, ShardedUpdateConfig):
    """Options of divided layers, of which several ranks share what updates each part."""


@dataclass
class MeshShardedPipelineConfig(MeshPipelineConfig, ShardedUpdateConfig):
    """Options of stages, of which several ranks share what updates each."""
