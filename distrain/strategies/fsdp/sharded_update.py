"""Parameters of which each rank updates its part: how they are laid out, and their state in a checkpoint.

A strategy has one for all parameters that a rank updates, whatever else it does with them: all of a model (fsdp), those
of its stages (a pipeline) or its parts of divided layers (tensor parallelism).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from distrain.checkpoint import module_state
from distrain.communication.collectives import Communicator, Ledger
from distrain.gradients.buckets import ReducedGradients
from distrain.models.freezing import FreezeSchedule
from distrain.strategies.fsdp import sliced_state
from distrain.strategies.fsdp.flat_block import FlatBlock
from distrain.strategies.fsdp.offload import Offload

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from distrain.runtime.runtime import Runtime

#: Named parameters that follow each other in a block.
Part = Sequence[tuple[str, nn.Parameter]]


def divide_replicas(mesh: DeviceMesh | None, ranks: int, runtime: Runtime) -> DeviceMesh | None:
    """The mesh in which so many neighbours along its dimension ``data`` are a shard group; all ranks call it together.

    Args:
        mesh: Has the dimension ``data``; ``None`` for a single rank.
        ranks: Of a shard group.
        runtime: Makes the mesh.
    """
    if mesh is None:
        return None
    shape = dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True))
    data = shape.pop("data")
    return runtime.mesh({"data": data // ranks, "shard": ranks, **shape})


class ShardGroups(NamedTuple):
    """The ranks with which a rank shares parameters, by what they do together.

    Attributes:
        shards: Those that share one copy, each with its part, to gather parameters.
        gradients: The same ranks, to scatter gradients. These travel while parameters are gathered, in an order that
            may differ between ranks, so they have a group of their own.
        replicas: Those that have the same part, one of each shard group.
    """

    shards: Communicator
    gradients: Communicator
    replicas: Communicator

    @classmethod
    def of_mesh(cls, mesh: DeviceMesh | None, runtime: Runtime, ledger: Ledger) -> ShardGroups:
        """The groups along the dimensions ``shard`` and ``data``; all ranks call it together.

        Args:
            mesh: ``None`` for a single rank.
            runtime: Makes groups.
            ledger: Counts the bytes.
        """
        shards, again, replicas = None, None, None
        if mesh is not None:
            shards, replicas = mesh.get_group("shard"), mesh.get_group("data")
            again = runtime.duplicate_group(mesh, "shard")
        return cls(*(Communicator(group, ledger) for group in (shards, again, replicas)))


class ShardedUpdate:
    """Parameters in flat blocks that are cut into equal parts, one for each rank of a shard group.

    An optimizer of this rank updates its slices of parameters, so its update of an element must not depend on others.

    Args:
        modules: Have the parameters, with the unsplit model's names.
        parts: Each makes a block, or several where its parameters differ in type, device or the epochs in which they
            are trained, or are divided in part.
        shards: The ranks that share the blocks.
        freezing: Says in which epochs parameters are trained; ``None``: in all.
        value_of: Gives the value of a parameter, of which a rank keeps its slice alone. ``None``: every rank keeps
            whole parameters.
        offload: Says where slices and the optimizer's state of them lie; by default on the device.
        divided: Names of the parameters that are a part of one of the unsplit model.

    Attributes:
        blocks: In the order of ``parts``.
        blocks_of_parts: The same, for each part that isn't empty.
        places: Where this rank's slice of each parameter is, for those that it has one of.
        slices: These slices as parameters of their own, which share the memory of the blocks' parts, unless ``offload``
            says otherwise.
        first_names: For each name of a parameter the one under which a block has it; tied parameters have several.
        saved_whole: Those of these names that a checkpoint has whole, because modules save them in their own way.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        parts: Iterable[Part],
        shards: Communicator,
        freezing: FreezeSchedule | None,
        value_of: Callable[[Tensor], Tensor] | None = None,
        offload: Offload | None = None,
        divided: Collection[str] = (),
    ) -> None:
        self._shards, self._offload = shards, offload or Offload()
        self.blocks_of_parts = [
            [FlatBlock(kind, shards) for kind in _split_by_kind(part, freezing, divided)] for part in parts if part
        ]
        self.blocks = [block for blocks in self.blocks_of_parts for block in blocks]
        for block in self.blocks:
            if value_of is None:
                block.keep_whole()
            else:
                block.keep_part(value_of, self._offload.new_part)
        self.places = sliced_state.places(self.blocks)
        modules = list(modules)
        names = [pair for module in modules for pair in module.named_parameters(remove_duplicate=False)]
        first = {id(parameter): name for name, parameter in reversed(names)}
        self.first_names = {name: first[id(parameter)] for name, parameter in names}
        sliced = {name for module in modules for name in module_state.saved_as_they_are(module)}
        self.saved_whole = frozenset(self.first_names) - sliced
        self.slices = {
            name: self._offload.new_slice(self.places[name].part, is_trained=parameter.requires_grad)
            for name, parameter in names
            if name in self.places
        }

    def assign_gradients(self, gradients: Iterable[ReducedGradients]) -> None:
        """Makes each slice's gradient a view of what the ranks have reduced.

        Args:
            gradients: Of all parameters.
        """
        buckets = [bucket for each in gradients for bucket in each.buckets]
        reduced = {name: tensor for bucket in buckets for name, tensor in bucket.tensors.items()}
        for name, (block, place) in self.places.items():
            gradient = None
            if block.gradient is not None:
                gradient = block.gradient[place.offset : place.offset + place.size]
            elif name in reduced:
                whole = reduced[name]
                gradient = whole.as_strided((place.size,), (1,), whole.storage_offset() + place.start)
            self._offload.assign_gradient(self.slices[name], gradient)

    @property
    def slices_of_blocks(self) -> list[dict[str, nn.Parameter]]:
        """This rank's slices of each block of which it has some."""
        found = [[block.names[each.parameter] for each in block.slices] for block in self.blocks]
        return [{name: self.slices[name] for name in names} for names in found if names]

    def gather_updated(self) -> None:
        """Gathers what the ranks have updated, where every rank keeps whole parameters; all ranks call it together."""
        for pending in [block.refresh() for block in self.blocks if block.is_trained]:
            pending.wait()

    def add_held(self, held: dict[str, list[Tensor]]) -> None:
        """Adds what a rank holds of the blocks to :meth:`distrain.strategies.base.Strategy.held_tensors`."""
        held["parameters"] += [block.part for block in self.blocks if block.part is not None]
        held["gradients"] += [block.gradient for block in self.blocks if block.gradient is not None]

    @property
    def trained_bytes(self) -> int:
        """Size of the blocks that are trained now."""
        return sum(block.bytes for block in self.blocks if block.is_trained)

    def bytes_to_gather(self, size: int) -> int:
        """Bytes that this rank sends while blocks of this size are gathered."""
        return size // self._shards.size * (self._shards.size - 1)

    # --- state -------------------------------------------------------------------------------------------------------

    def place_of(self, name: str) -> sliced_state.Place | None:
        """Where this rank's slice of a parameter is; ``None`` if it has none, or that is no parameter's name."""
        return self.places.get(self.first_names.get(name, ""))

    def slice_of(self, name: str, whole: Tensor) -> Tensor:
        """This rank's slice of a tensor of a parameter's shape, empty if it has none; of another tensor all of it.

        Raises:
            ValueError: It has another shape.
        """
        place = self.place_of(name)
        if place is None:
            return whole.new_empty(0) if name in self.first_names else whole
        if whole.shape != place.shape:
            raise ValueError(f"{name} is {tuple(whole.shape)}, the model's {tuple(place.shape)}")
        return place.of_whole(whole)

    def kept_slices(self) -> dict[str, Tensor]:
        """This rank's slices by name; of a parameter that is saved whole each rank has one, which may be empty."""
        names = [name for name in self.first_names if name in self.saved_whole or self.place_of(name) is not None]
        return {name: self.kept_slice(name) for name in names}

    def saved_part(self, name: str, kept: Tensor, device: torch.device, *, sliced: bool) -> Tensor:
        """What this rank saves of a tensor that it keeps for a parameter; all ranks call it together.

        Args:
            name: The parameter's; of other tensors it saves all.
            kept: A tensor of the parameter's shape, or a slice of one.
            device: On which ranks communicate.
            sliced: Whether it is a slice.
        """
        if name in self.saved_whole:
            return self.whole_of(name, kept, device) if sliced else kept
        place = self.place_of(name)
        return kept if sliced or place is None else place.of_whole(kept)

    def add_to(
        self,
        state: dict[str, Any],
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        *,
        saves: bool,
    ) -> None:
        """Puts this rank's slices in place of whole tensors into what a strategy saves.

        Args:
            state: As :meth:`distrain.strategies.base.Strategy.state_dict` returns it.
            optimizer: Of this rank's slices.
            device: On which ranks communicate.
            saves: Whether this shard group saves; all its ranks call it together then.
        """
        own = [name for name in self.first_names if name not in self.saved_whole]
        # Whole parameters may be taken away again before they are written.
        state["model"] = {
            name: tensor.clone() if name in self.saved_whole else tensor
            for name, tensor in state["model"].items()
            if name in self.saved_whole or name not in self.first_names
        }
        state["slices"] = {}
        if saves:
            parts = {name: place.part for name in own if (place := self.place_of(name)) is not None}
            state["model"] |= parts
            state["slices"]["model"] = {name: self.places[self.first_names[name]].saved_as() for name in parts}
            tensors, slices, scalars = sliced_state.optimizer_state(
                optimizer, self.places, self.slices, self._shards, device
            )
            state["optimizer"], state["slices"]["optimizer"], state["scalars"]["optimizer"] = tensors, slices, scalars

    def kept_slice(self, name: str) -> Tensor:
        """This rank's slice of a parameter; empty if it has none."""
        place, (block, _) = self.place_of(name), self._entry(name)
        assert block.part is not None
        return block.part[:0] if place is None else place.part

    def _entry(self, name: str) -> tuple[FlatBlock, int]:
        """The block that has a parameter, and the parameter's index in it."""
        first = self.first_names[name]
        return next((block, block.names.index(first)) for block in self.blocks if first in block.names)

    def whole_of(self, name: str, kept: Tensor, device: torch.device) -> Tensor:
        """The tensor of a parameter's shape of which each rank has a slice; all ranks call it together.

        Args:
            name: The parameter's.
            kept: This rank's slice; empty if it has none.
            device: On which ranks communicate.
        """
        block, index = self._entry(name)
        slices = [rank[name] for rank in self._shards.all_gather_tensors({name: kept}, device)]
        return block.in_shape(index, torch.cat(slices))

    def whole_optimizer_state(
        self, optimizer: torch.optim.Optimizer, device: torch.device
    ) -> Iterator[tuple[str, Tensor]]:
        """As :func:`distrain.strategies.fsdp.sliced_state.whole_optimizer_state`."""
        names = dict.fromkeys(self.first_names.values())
        return sliced_state.whole_optimizer_state(optimizer, names, self.blocks, self.slices, self._shards, device)

    def of_all_ranks(self, scalars: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """What an optimizer's state has besides tensors, of all ranks, which call it together."""
        ranks = self._shards.all_gather_json(scalars, device)
        return {key: value for each in reversed(ranks) for key, value in each.items()}

    def load_optimizer(
        self, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]
    ) -> None:
        """As :func:`distrain.strategies.fsdp.sliced_state.load_optimizer`."""
        for slices in self.slices_of_blocks if self._offload.goes_by_blocks else [self.slices]:
            places = {name: self.places[name] for name in slices}
            sliced_state.load_optimizer(optimizer, places, slices, tensors, scalars)
            self._offload.settle(optimizer, slices)


def _split_by_kind(named: Part, freezing: FreezeSchedule | None, divided: Collection[str]) -> list[Part]:
    """Parameters of one type and device that are trained in the same epochs, and are all divided or all whole."""
    kinds: dict[Any, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in named:
        epochs = [] if freezing is None else [name in freezing.trained(epoch) for epoch in freezing.epochs]
        kind = (parameter.dtype, parameter.device, parameter.requires_grad, tuple(epochs), name in divided)
        kinds.setdefault(kind, []).append((name, parameter))
    return [*kinds.values()]
