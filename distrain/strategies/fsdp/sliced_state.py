"""Optimizer state of slices of parameters: saved as whole tensors, and restored from whole tensors.

So a checkpoint is the same whichever strategy has written it. Each rank of a shard group saves some of the model's
tensors. A block's tensors are gathered together, so no rank holds more than a block beyond what it saves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distrain.checkpoint import named_state
from distrain.communication.collectives import Communicator
from distrain.communication.types import DTYPES
from distrain.strategies.fsdp.flat_block import FlatBlock


def owners(blocks: Sequence[FlatBlock], ranks: int) -> dict[str, int]:
    """Which rank of a shard group saves each parameter and its state, so that all save about as much."""
    sizes = [(shape.numel(), name) for block in blocks for name, shape in zip(block.names, block.shapes, strict=True)]
    load, found = [0] * ranks, {}
    for size, name in sorted(sizes, reverse=True):
        found[name] = load.index(min(load))
        load[found[name]] += size
    return found


def optimizer_state(
    optimizer: torch.optim.Optimizer,
    blocks: Sequence[FlatBlock],
    slices: Mapping[str, nn.Parameter],
    group: Communicator,
    device: torch.device,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The whole tensors of an optimizer's state that this rank saves, by name; all ranks of the group call it together.

    Args:
        optimizer: Of this rank's slices.
        blocks: All blocks.
        slices: This rank's slice of each parameter that it has one of.
        group: The ranks that share the blocks.
        device: On which they communicate.

    Returns:
        Tensors and other values, as :func:`distrain.checkpoint.named_state.optimizer_state` returns them; the other
        values are those of all ranks.
    """
    owner = owners(blocks, group.size)
    tensors, scalars = named_state.optimizer_state(optimizer, {parameter: name for name, parameter in slices.items()})
    dtypes = {key: str(tensor.dtype).removeprefix("torch.") for key, tensor in tensors.items() if tensor.dim()}
    numbers = {key: tensor.item() for key, tensor in tensors.items() if not tensor.dim()}
    number_dtypes = {key: str(tensors[key].dtype).removeprefix("torch.") for key in numbers}
    offered = group.all_gather_json(
        {"dtypes": dtypes, "numbers": numbers, "number_dtypes": number_dtypes, "scalars": scalars}, device
    )
    merged: dict[str, dict[str, Any]] = {
        part: {key: value for each in reversed(offered) for key, value in each[part].items()} for part in offered[0]
    }
    saved: dict[str, Tensor] = {}
    for key, number in merged["numbers"].items():
        if owner[key.rpartition("/")[0]] == group.rank:
            saved[key] = torch.tensor(number, dtype=DTYPES[merged["number_dtypes"][key]])
    for block in blocks:
        names = set(block.names)
        keys = [key for key in merged["dtypes"] if key.rpartition("/")[0] in names]
        for state_name, dtype in sorted({(key.rpartition("/")[2], merged["dtypes"][key]) for key in keys}):
            part = torch.zeros(block.part_size, dtype=DTYPES[dtype], device=device)
            for each in block.slices:
                tensor = tensors.get(f"{block.names[each.parameter]}/{state_name}")
                if tensor is not None:
                    part[each.offset : each.offset + each.size] = tensor
            for name, whole in zip(block.names, block.gathered(part), strict=True):
                key = f"{name}/{state_name}"
                if owner[name] == group.rank and key in merged["dtypes"]:
                    saved[key] = whole.clone()
    return saved, merged["scalars"]


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    blocks: Sequence[FlatBlock],
    slices: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, Any],
) -> None:
    """Loads this rank's part of an optimizer's saved state.

    Args:
        optimizer: As for :func:`optimizer_state`.
        blocks: Likewise.
        slices: Likewise.
        tensors: Whole tensors of all parameters.
        scalars: Other values.

    Raises:
        ValueError: A tensor's shape differs from its parameter's.
    """
    places = {block.names[each.parameter]: (block, each) for block in blocks for each in block.slices}
    shapes = {name: block.shapes[each.parameter] for name, (block, each) in places.items()}
    wholes = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    named_state.check_shapes(wholes, {key: tensor.shape for key, tensor in tensors.items()})
    sliced: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name, _, state_name = key.rpartition("/")
        if name not in places:
            continue
        if not named_state.has_shape_of_parameter(state_name, tensor.shape, wholes[name]):
            sliced[key] = tensor
            continue
        block, each = places[name]
        sliced[key] = block.in_memory_order(each.parameter, tensor)[each.start : each.start + each.size]
    names: dict[Tensor, str] = {parameter: name for name, parameter in slices.items()}
    named_state.load_optimizer(optimizer, names, sliced, scalars)
