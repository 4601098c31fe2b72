"""State of slices of parameters: saved as what each rank holds, and restored from whole tensors.

Each rank of a shard group saves its slices as they are, so nothing is gathered and nothing copied. Whoever reads the
checkpoint, under any strategy, finds whole tensors by the parameters' names (:mod:`distrain.checkpoint.saved_tensors`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distrain.checkpoint import named_state
from distrain.checkpoint.saved_tensors import TensorSlice, described
from distrain.communication.collectives import Communicator
from distrain.strategies.fsdp.flat_block import FlatBlock, Slice


class Place(NamedTuple):
    """Where this rank's slice of a parameter is.

    Attributes:
        block: The block.
        slice: The slice in it.
    """

    block: FlatBlock
    slice: Slice

    @property
    def shape(self) -> torch.Size:
        """Shape of the whole parameter."""
        return self.block.shapes[self.slice.parameter]

    @property
    def part(self) -> Tensor:
        """The slice, ``[size]``, as a view of this rank's part of the block."""
        assert self.block.part is not None
        return self.block.part[self.slice.offset : self.slice.offset + self.slice.size]

    def saved_as(self) -> TensorSlice:
        """What a checkpoint says of the slice."""
        strides = self.block.strides[self.slice.parameter]
        return TensorSlice(tuple(self.shape), tuple(strides), self.slice.start)

    def of_whole(self, whole: Tensor) -> Tensor:
        """The slice of a tensor that has the parameter's shape."""
        ordered = self.block.in_memory_order(self.slice.parameter, whole)
        return ordered[self.slice.start : self.slice.start + self.slice.size]


def shaped(shape: torch.Size) -> Tensor:
    """A tensor that has a shape and nothing else."""
    return torch.empty((), device="meta").expand(shape)


def places(blocks: Sequence[FlatBlock]) -> dict[str, Place]:
    """Where this rank's slice of each parameter is, for those that it has one of."""
    return {block.names[each.parameter]: Place(block, each) for block in blocks for each in block.slices}


def optimizer_state(
    optimizer: torch.optim.Optimizer,
    places: Mapping[str, Place],
    slices: Mapping[str, nn.Parameter],
    group: Communicator,
    device: torch.device,
) -> tuple[dict[str, Tensor], dict[str, TensorSlice], dict[str, Any]]:
    """This rank's part of an optimizer's state; all ranks of the group call it together.

    Args:
        optimizer: Of this rank's slices.
        places: Where they are.
        slices: This rank's slice of each parameter that it has one of.
        group: The ranks that share the blocks.
        device: On which they communicate.

    Returns:
        Tensors by name, as :func:`distrain.checkpoint.named_state.optimizer_state` returns them; which of them are
        slices; and the other values, those of all ranks.
    """
    tensors, scalars = named_state.optimizer_state(optimizer, {parameter: name for name, parameter in slices.items()})
    saved, sliced = {}, {}
    for key, tensor in tensors.items():
        place = places[key.rpartition("/")[0]]
        if tensor.dim():
            sliced[key] = place.saved_as()
        # A single number, such as a step count, is the same for all slices of a parameter.
        if tensor.dim() or place.slice.start == 0:
            saved[key] = tensor
    ranks = group.all_gather_json(scalars, device)
    return saved, sliced, {key: value for each in reversed(ranks) for key, value in each.items()}


def whole_optimizer_state(
    optimizer: torch.optim.Optimizer,
    names: Iterable[str],
    blocks: Sequence[FlatBlock],
    slices: Mapping[str, nn.Parameter],
    group: Communicator,
    device: torch.device,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an optimizer's state, gathered one parameter after the other.

    Args:
        optimizer: Of this rank's slices.
        names: Those of the parameters, in the order in which their state is gathered.
        blocks: Have them.
        slices: This rank's slice of each parameter that it has one of.
        group: The ranks that share the blocks; all go through the tensors together.
        device: On which they communicate.

    Yields:
        Each tensor with its key, as :func:`distrain.checkpoint.named_state.optimizer_state` returns them.
    """
    indices = {name: (block, index) for block in blocks for index, name in enumerate(block.names)}
    for name in names:
        block, index = indices[name]
        state = {} if name not in slices else optimizer.state.get(slices[name], {})
        own = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        ranks = group.all_gather_tensors(own, device)
        for key in dict.fromkeys(key for rank in ranks for key in rank):
            parts = [rank[key] for rank in ranks if key in rank]
            # The slices follow each other in the order of ranks. A single number is the same for all of them.
            yield f"{name}/{key}", block.in_shape(index, torch.cat(parts)) if parts[0].dim() else parts[0]


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    places: Mapping[str, Place],
    slices: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, Any],
) -> None:
    """Loads this rank's part of an optimizer's saved state.

    Args:
        optimizer: As for :func:`optimizer_state`.
        places: Likewise.
        slices: Likewise.
        tensors: Whole tensors of all parameters; those of which this rank has no slice are not looked at.
        scalars: Other values.

    Raises:
        ValueError: A tensor's shape differs from its parameter's.
    """
    wholes = {name: shaped(place.shape) for name, place in places.items()}
    known = {key: entry for key, entry in described(tensors).items() if key.rpartition("/")[0] in places}
    named_state.check_shapes(wholes, {key: entry.shape for key, entry in known.items()})

    def entries() -> Iterator[tuple[str, Any]]:
        for key, entry in known.items():
            name, _, state_name = key.rpartition("/")
            is_sliced = named_state.has_shape_of_parameter(state_name, entry.shape, wholes[name])
            yield key, places[name].of_whole(tensors[key]) if is_sliced else tensors[key]
        yield from scalars.items()

    named_state.load_entries(optimizer, slices, entries())
