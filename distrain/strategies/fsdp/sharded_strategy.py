"""What strategies have in common that divide the model in another way, and share what updates its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from typing_extensions import override

from distrain.config.schema import Config
from distrain.strategies.base import OptionsT_co, Strategy
from distrain.strategies.fsdp.options import FULL, ShardedUpdateConfig, check_compression, shares
from distrain.strategies.fsdp.sharded_update import ShardedUpdate, ShardGroups, divide_replicas

if TYPE_CHECKING:
    from distrain.runtime.runtime import Runtime


class ShardedStrategy(Strategy[OptionsT_co]):
    """The first base class of a strategy whose replicas form groups that share what ``strategy.shard`` says.

    All replicas share each batch, whether they are in one shard group or in several. The second base class makes
    gradients and an optimizer of what the first one gives it.

    Rajbhandari et al. 2020, "ZeRO" (arXiv 1910.02054).
    """

    slices_parameters = True
    # Neither SAM nor an optimizer with modes reaches the parameters of other ranks.
    steps_alike = False

    _sharded: ShardedUpdate

    def __init__(self, config: Config, runtime: Runtime) -> None:
        super().__init__(config, runtime)
        self.mesh = divide_replicas(self.mesh, self._sharding.shard_size, runtime)
        self._groups = ShardGroups.of_mesh(self.mesh, runtime, self.ledger)

    @property
    def _sharding(self) -> ShardedUpdateConfig:
        return cast(ShardedUpdateConfig, self.options)

    @property
    def _shards_parameters(self) -> bool:
        """Whether this rank keeps its slices alone: between steps parameters are empty."""
        return self._sharding.shard == FULL

    @property
    @override
    def layout(self) -> dict[str, Any]:
        return {**super().layout, "shard": self._sharding.shard}

    @override
    @classmethod
    def check(cls, config: Config, world_size: int) -> None:
        super().check(config, world_size)
        check_compression(cast(ShardedUpdateConfig, cls.options_of(config)).shard, config)

    @override
    @classmethod
    def state_shares(cls, config: Config, world_size: int) -> dict[str, float]:
        options = cast(ShardedUpdateConfig, cls.options_of(config))
        return shares(options.shard, options.shard_size)

    def _updated_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [*self._sharded.slices.items()]

    @override
    def held_tensors(self) -> dict[str, list[Tensor]]:
        held = super().held_tensors()
        self._sharded.add_held(held)
        return held

    @override
    def kept_parameters(self) -> dict[str, Tensor]:
        if not self._shards_parameters:
            return super().kept_parameters()
        return self._sharded.kept_slices()

    @override
    def part_of(self, name: str, whole: Tensor) -> Tensor:
        own = super().part_of(name, whole)
        return self._sharded.slice_of(name, own) if self._shards_parameters else own
