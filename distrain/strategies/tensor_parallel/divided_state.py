"""The state of a divided model and of its optimizer: saved as whole tensors, and restored from whole tensors.

So a checkpoint is the same whichever strategy has written it. Tensors are gathered one by one, and each rank saves some
of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from distrain.checkpoint import named_state
from distrain.checkpoint.saved_tensors import described
from distrain.communication.collectives import Communicator
from distrain.strategies.tensor_parallel.cut import Cut


def owners(cuts: Mapping[str, Cut], ranks: int) -> dict[str, int]:
    """Which rank saves each divided tensor and its optimizer state, so that all save about as much.

    Args:
        cuts: By the tensors' names.
        ranks: Number of ranks. The first one also saves what is whole on all of them.
    """
    load, found = [0] * ranks, {}
    for size, name in sorted(((cut.shape.numel(), name) for name, cut in cuts.items()), reverse=True):
        found[name] = load.index(min(load))
        load[found[name]] += size
    return found


def gathered_model(
    tensors: Mapping[str, Tensor], cuts: Mapping[str, Cut], group: Communicator, *, everywhere: bool
) -> dict[str, Tensor]:
    """The unsplit model's tensors by name; all ranks call it together.

    Args:
        tensors: This rank's.
        cuts: How those that are divided were cut.
        group: The ranks.
        everywhere: On each rank all of them; else those that it saves.
    """
    owner, found = owners(cuts, group.size), {}
    for name, tensor in tensors.items():
        whole = cuts[name].gather(tensor.detach(), group) if name in cuts else tensor
        if everywhere or owner.get(name, 0) == group.rank:
            found[name] = whole
    return found


def gathered_optimizer(
    tensors: Iterable[tuple[str, Tensor]], cuts: Mapping[str, Cut], group: Communicator
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an optimizer's state that this rank saves, whole; all ranks go through them together.

    Args:
        tensors: This rank's with their keys, as :func:`distrain.checkpoint.named_state.optimizer_state` returns them.
        cuts: How parameters were cut.
        group: The ranks.

    Yields:
        Each tensor with its key.
    """
    owner = owners(cuts, group.size)
    for key, tensor in tensors:
        name = key.rpartition("/")[0]
        # Single numbers, such as a count of steps, are the same on all ranks.
        whole = cuts[name].gather(tensor, group) if name in cuts and tensor.dim() else tensor
        if owner.get(name, 0) == group.rank:
            yield key, whole


def parts_of_model(tensors: Mapping[str, Tensor], cuts: Mapping[str, Cut], rank: int) -> dict[str, Tensor]:
    """This rank's part of the unsplit model's tensors.

    Raises:
        ValueError: A tensor hasn't the shape of the model's.
    """
    for name, entry in described(tensors).items():
        if name in cuts:
            check_shape(name, entry.shape, cuts[name])
    return {name: cuts[name].part(tensor, rank) if name in cuts else tensor for name, tensor in tensors.items()}


def check_shape(name: str, shape: torch.Size, cut: Cut) -> None:
    """Refuses a saved tensor that isn't of the model.

    Raises:
        ValueError: It hasn't the shape of the whole tensor.
    """
    if shape != cut.shape:
        shapes = f"{name} is {tuple(shape)}, the model's {tuple(cut.shape)}"
        raise ValueError(f"the saved model is not this model: {shapes}")


def parts_of_optimizer(tensors: Mapping[str, Tensor], cuts: Mapping[str, Cut], rank: int) -> dict[str, Tensor]:
    """This rank's part of an optimizer's saved state.

    Raises:
        ValueError: A tensor hasn't the shape of its parameter.
    """
    wholes = {name: torch.empty(cut.shape, device="meta") for name, cut in cuts.items()}
    named_state.check_shapes(wholes, {key: entry.shape for key, entry in described(tensors).items()})
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.rpartition("/")[0]
        found[key] = cuts[name].part(tensor, rank) if name in cuts and tensor.dim() else tensor
    return found
