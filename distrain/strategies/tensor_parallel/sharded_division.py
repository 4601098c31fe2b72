"""What strategies have in common that divide layers, and of whose parts several ranks share what updates them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from distrain.checkpoint import module_state
from distrain.communication.collectives import Communicator
from distrain.reporting.metrics import Stopwatch
from distrain.strategies.base import OptionsT_co
from distrain.strategies.fsdp.flat_block import FlatBlock
from distrain.strategies.fsdp.scattered_gradients import ScatteredGradients
from distrain.strategies.fsdp.sharded_strategy import ShardedStrategy
from distrain.strategies.fsdp.sharded_update import ShardGroups
from distrain.strategies.tensor_parallel import divided_state
from distrain.strategies.tensor_parallel.divided_strategy import DividedStrategy


class ScatteredDividedGradients(ScatteredGradients):
    """As :class:`~distrain.strategies.fsdp.scattered_gradients.ScatteredGradients` of a model with divided parameters.

    Args:
        blocks: Each with parts of parameters alone, or with whole parameters alone.
        divided: Names of the parameters that are divided.
        tensor_group: The ranks that have the parts.
        groups: The ranks that share each block.
        stopwatch: Records exposed communication.
        pass_over: As for the base class.
    """

    def __init__(
        self,
        blocks: Sequence[FlatBlock],
        divided: Collection[str],
        tensor_group: Communicator,
        groups: ShardGroups,
        stopwatch: Stopwatch,
        pass_over: Callable[[FlatBlock], None] = lambda _: None,
    ) -> None:
        self._divided, self._tensor_group = frozenset(divided), tensor_group
        super().__init__(blocks, groups, stopwatch, pass_over)

    @override
    def norm(self) -> Tensor:
        """Euclidean norm over the gradients of the unsplit model, a scalar; all ranks of a replica call it together."""
        if not self._blocks:
            return torch.zeros(())
        first = self._blocks[0].gradient
        assert first is not None
        whole, divided = first.new_zeros(()), first.new_zeros(())
        for block in self._blocks:
            assert block.gradient is not None
            squares = torch.linalg.vector_norm(block.gradient).square()
            (divided if block.names[0] in self._divided else whole).add_(squares)
        sums = self._group.all_reduce(torch.stack([whole, divided]))
        return (sums[0] + self._tensor_group.all_reduce(sums[1].clone())).sqrt()


class ShardedDivision(ShardedStrategy[OptionsT_co], DividedStrategy[OptionsT_co]):
    """The first base class of a strategy that does both.

    A checkpoint has whole tensors. They are put together one by one, so that no rank has more than it saves and one
    tensor.
    """

    @override
    def kept_parameters(self) -> dict[str, Tensor]:
        if not self._shards_parameters:
            return super().kept_parameters()
        # On each rank of all of them, since ranks put them together one after the other.
        return {name: self._sharded.kept_slice(name) for name in self._sharded.first_names}

    @override
    def saved_part(self, name: str, kept: Tensor) -> Tensor:
        if self._shards_parameters and name in self._sharded.first_names:
            kept = self._sharded.whole_of(name, kept, self.runtime.device)
        return DividedStrategy.saved_part(self, name, kept)

    @override
    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()  # type: ignore[safe-super]
        if self._groups.replicas.rank == 0:
            state["optimizer"] = dict(self._saved_optimizer())
            if self._shards_parameters:
                state["model"] |= dict(self._saved_parameters())
        return state

    def _without_parameters(self, saved: dict[str, Any]) -> dict[str, Any]:
        """What a strategy saves, without parameters that are empty, and without the optimizer's tensors.

        :meth:`state_dict` adds both.
        """
        empty = {*self._names_put_together()} if self._shards_parameters else ()
        return {
            **saved,
            "model": {name: saved["model"][name] for name in saved["model"] if name not in empty},
            "optimizer": {},
        }

    def _names_put_together(self) -> Iterator[str]:
        """Names of the parameters of which ranks save what they put together of slices; modules save the others."""
        for module in self.own_modules():
            yield from module_state.saved_as_they_are(module)

    def _saved_parameters(self) -> Iterator[tuple[str, Tensor]]:
        owner = divided_state.owners(self._cuts, self.tensor_group.size)
        for name in self._names_put_together():
            whole = self.saved_part(name, self._sharded.kept_slice(name))
            if owner.get(name, 0) == self.tensor_group.rank and self._has_first_slice(name):
                yield name, whole

    def _saved_optimizer(self) -> Iterator[tuple[str, Tensor]]:
        parts = self._sharded.whole_optimizer_state(self.optimizer, self.runtime.device)
        for key, tensor in divided_state.gathered_optimizer(parts, self._cuts, self.tensor_group):
            if self._has_first_slice(key.rpartition("/")[0]):
                yield key, tensor

    def _has_first_slice(self, name: str) -> bool:
        """Whether this is the rank that saves a parameter, of those that have put it together."""
        place = self._sharded.place_of(name)
        return place is not None and place.slice.start == 0
