"""What strategies have in common that divide the model in another way, and share what updates its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from typing_extensions import override

from distrain.config.schema import Config
from distrain.strategies.base import OptionsT_co, Strategy
from distrain.strategies.fsdp.options import ShardedUpdateConfig, shares
from distrain.strategies.fsdp.sharded_update import ShardedUpdate, ShardGroups, divide_replicas

if TYPE_CHECKING:
    from distrain.runtime.runtime import Runtime


class ShardedStrategy(Strategy[OptionsT_co]):
    """The first base class of a strategy whose replicas form groups that share optimizer state, or gradients too.

    All replicas share each batch, whether they are in one shard group or in several. The second base class makes
    gradients and an optimizer of what the first one gives it.

    Rajbhandari et al. 2020, "ZeRO" (arXiv 1910.02054), stages 1 and 2.
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
    @override
    def layout(self) -> dict[str, Any]:
        return {**super().layout, "shard": self._sharding.shard}

    @override
    @classmethod
    def check(cls, config: Config, world_size: int) -> None:
        super().check(config, world_size)
        cast(ShardedUpdateConfig, cls.options_of(config)).check_sharding(config)

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

    def _gather_unless(self, skipped: bool) -> bool:
        """Gathers what the ranks have updated unless they skipped the update; returns whether they did."""
        if not skipped:
            with self.stopwatch.communication():
                self._sharded.gather_updated()
        return skipped
