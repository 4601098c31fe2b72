"""strategy=mesh: the ranks along several dimensions, each of which divides the work in another way.

A mesh is trained by the strategy of its dimensions: a pipeline if it has stages, else by one that divides layers, else
by fsdp if ranks share what replicas copy, else by ddp. Each of these has replicas, and the first one also divides the
layers of its stages.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar, cast

from torch import Tensor, nn
from typing_extensions import override

from distrain.config.registry import register
from distrain.config.schema import Config
from distrain.errors import ConfigError, config_error_from_line
from distrain.strategies.base import OptionsT_co, Strategy
from distrain.strategies.ddp import DDP, DDPConfig
from distrain.strategies.fsdp.options import FSDPConfig
from distrain.strategies.fsdp.strategy import FSDP
from distrain.strategies.mesh.divided_pipeline import DividedPipeline
from distrain.strategies.mesh.options import (
    MeshConfig,
    MeshPipelineConfig,
    MeshShardedPipelineConfig,
    MeshShardedTensorConfig,
    MeshTensorConfig,
)
from distrain.strategies.mesh.sharded_divided_pipeline import ShardedDividedPipeline
from distrain.strategies.pipeline.sharded import ShardedPipeline
from distrain.strategies.pipeline.strategy import Pipeline
from distrain.strategies.precision import Precision
from distrain.strategies.tensor_parallel.sharded import ShardedTensorParallel
from distrain.strategies.tensor_parallel.strategy import TensorParallel


@register("strategy", "mesh", MeshConfig)
class Mesh(Strategy[MeshConfig]):
    """Stands for the strategy of its dimensions."""

    @override
    @classmethod
    def chosen(cls, config: Config) -> type[Strategy]:
        shape = cls.options_of(config).mesh
        if shape.pipeline > 1:
            if shape.tensor > 1:
                return MeshDividedPipeline if shape.shard == 1 else MeshShardedDividedPipeline
            return MeshPipeline if shape.shard == 1 else MeshShardedPipeline
        if shape.tensor > 1:
            return MeshTensorParallel if shape.shard == 1 else MeshShardedTensorParallel
        return MeshFSDP if shape.shard > 1 else MeshDDP


class MeshStrategy(Strategy[OptionsT_co]):
    """A strategy whose options are made of those of a mesh."""

    @override
    @classmethod
    def options_of(cls, config: Config) -> OptionsT_co:
        return cls.options_in(cast(MeshConfig, config.strategy))

    @classmethod
    @abstractmethod
    def options_in(cls, keys: MeshConfig) -> OptionsT_co:
        """The strategy's options."""

    @override
    @classmethod
    def check(cls, config: Config, world_size: int) -> None:
        cast(MeshConfig, config.strategy).check(world_size)
        super().check(config, world_size)


class MeshDDP(MeshStrategy[DDPConfig], DDP):
    """A mesh of replicas alone."""

    @override
    @classmethod
    def options_in(cls, keys: MeshConfig) -> DDPConfig:
        return keys.options(DDPConfig)


class MeshFSDP(MeshStrategy[DDPConfig], FSDP):
    """A mesh whose replicas are groups of ranks that share what is sharded."""

    @override
    @classmethod
    def options_in(cls, keys: MeshConfig) -> FSDPConfig:
        return keys.options(FSDPConfig, shard_size=keys.mesh.shard)


class MeshTensorParallel(MeshStrategy[MeshTensorConfig], TensorParallel):
    """A mesh whose replicas are groups of ranks that divide layers."""

    kind: ClassVar[type[MeshTensorConfig]] = MeshTensorConfig

    @override
    @classmethod
    def options_in(cls, keys: MeshConfig) -> MeshTensorConfig:
        return keys.options(cls.kind, tensor=keys.mesh.tensor, shard_size=keys.mesh.shard)


class MeshShardedTensorParallel(MeshTensorParallel, ShardedTensorParallel):
    """The same; of replicas, some neighbours share what updates them."""

    kind = MeshShardedTensorConfig


class MeshPipeline(MeshStrategy[MeshPipelineConfig], Pipeline):
    """A mesh whose replicas are pipelines."""

    kind: ClassVar[type[MeshPipelineConfig]] = MeshPipelineConfig

    @override
    @classmethod
    def options_in(cls, keys: MeshConfig) -> MeshPipelineConfig:
        shape = keys.mesh
        options = keys.options(cls.kind, stages=shape.pipeline, tensor=shape.tensor, shard_size=shape.shard)
        options.stages *= options.stages_per_rank
        return options

    @override
    @classmethod
    def check(cls, config: Config, world_size: int) -> None:
        with _named_by_mesh(config):
            super().check(config, world_size)

    @override
    @classmethod
    def check_model(cls, config: Config, model: nn.Module) -> None:
        with _named_by_mesh(config):
            super().check_model(config, model)

    @override
    @classmethod
    def check_passes(cls, config: Config, model: nn.Module, images: Tensor, precision: Precision) -> None:
        with _named_by_mesh(config):
            super().check_passes(config, model, images, precision)


class MeshShardedPipeline(MeshPipeline, ShardedPipeline):
    """The same; of replicas, some neighbours share what updates them."""

    kind = MeshShardedPipelineConfig


class MeshDividedPipeline(MeshPipeline, DividedPipeline):
    """A mesh whose replicas are pipelines, and whose stages are groups of ranks that divide layers."""


class MeshShardedDividedPipeline(MeshPipeline, ShardedDividedPipeline):
    """The same; of replicas, some neighbours share what updates them."""

    kind = MeshShardedPipelineConfig


@contextlib.contextmanager
def _named_by_mesh(config: Config) -> Iterator[None]:
    """An error in this block that names the number of stages names the key that it comes from."""
    shape = cast(MeshConfig, config.strategy).mesh
    try:
        yield
    except ConfigError as error:
        key, equals, rest = str(error).partition("=")
        if key != "strategy.stages" or not equals:
            raise
        stages, _, problem = rest.partition(": ")
        made = "" if stages == str(shape.pipeline) else f"makes {stages} stages, and "
        raise config_error_from_line(f"strategy.mesh.pipeline={shape.pipeline}: {made}{problem}") from error
