"""The state of a divided model and of its optimizer: saved as whole tensors, and restored from whole tensors.

So a checkpoint is the same whichever strategy has written it. Tensors are gathered one by one, and each rank saves some
of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distrain.checkpoint import named_state
from distrain.checkpoint.saved_tensors import JoinedTensors, described
from distrain.communication.collectives import Communicator, digest
from distrain.compression import resharding
from distrain.strategies.tensor_parallel.cut import Cut

#: Beginning of the name of what a compressor keeps of a part of a parameter, and what means nothing for other parts.
_OF_PART = "of_part_"


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


def gathered(state: Mapping[str, Any], cuts: Mapping[str, Cut], group: Communicator) -> dict[str, Any]:
    """A strategy's saved state with whole tensors in place of parts; all ranks call it together.

    Args:
        state: This rank's; ``model`` and ``optimizer`` have the same names on all ranks.
        cuts: How tensors were cut.
        group: The ranks.
    """
    return {
        **state,
        "model": gathered_model(state["model"], cuts, group, everywhere=False),
        "optimizer": dict(gathered_optimizer(state["optimizer"].items(), cuts, group)),
        "compressor": gathered_compressor(state["compressor"], cuts, group),
    }


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


def parts_of_model(tensors: Mapping[str, Tensor], cuts: Mapping[str, Cut], rank: int) -> Mapping[str, Tensor]:
    """This rank's part of the unsplit model's tensors.

    Args:
        tensors: By name; one that a rank saved for itself is its part already.
        cuts: How those that are divided were cut.
        rank: This rank's number.

    Raises:
        ValueError: A tensor hasn't the shape of the model's.
    """
    parts: dict[str, Tensor] = {}
    for name, entry in described(tensors).items():
        if name not in cuts or entry.shape == cuts[name].part_shape(rank):
            continue
        check_shape(name, entry.shape, cuts[name])
        parts[name] = cuts[name].part(tensors[name], rank)
    return JoinedTensors({**dict.fromkeys(tensors, tensors), **dict.fromkeys(parts, parts)})


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


def gathered_compressor(state: Mapping[str, Tensor], cuts: Mapping[str, Cut], group: Communicator) -> dict[str, Tensor]:
    """What this rank saves of a compressor's state; all ranks call it together.

    The first rank saves residuals, whole. What else there is about a part means nothing for other parts, so each rank
    saves its own under another name.

    Args:
        state: This rank's, by ``<kind>/<parameter name>``.
        cuts: How parameters were cut.
        group: The ranks.
    """
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        kind, _, name = key.partition("/")
        if name in cuts and kind not in resharding.SUMMED:
            found[f"{_OF_PART}{key}"] = tensor
            continue
        whole = cuts[name].gather(tensor, group) if name in cuts else tensor
        if group.rank == 0 or not name:
            found[key] = whole
    return found


def parts_of_compressors(
    saved: Sequence[Mapping[str, Tensor]], cuts: Mapping[str, Cut], group: Communicator, own: int | None
) -> list[Mapping[str, Tensor]]:
    """What concerns this rank of the states that :func:`gathered_compressor`, or ranks with whole parameters, returned.

    Args:
        saved: Of each rank that saved.
        cuts: How parameters are cut.
        group: The ranks.
        own: This rank's number among those that saved, if they were arranged as these; else ``None``.
    """

    def cut(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for key in state:
            kind, _, name = key.partition("/")
            if name not in cuts:
                found[key] = state[key]
            elif kind in resharding.SUMMED:
                found[key] = cuts[name].part(state[key], group.rank)
        return found

    if own is None:
        return [cut(state) for state in saved]
    found: list[Mapping[str, Tensor]] = [{} for _ in saved]
    mine = {key.removeprefix(_OF_PART): saved[own][key] for key in saved[own] if key.startswith(_OF_PART)}
    found[own] = cut(saved[own - group.rank]) | mine
    return found


@torch.no_grad()
def share_wholes(
    tensors: Mapping[str, Tensor], cuts: Mapping[str, Cut], group: Communicator, device: torch.device
) -> bool:
    """Gives all ranks the first one's values of what is whole, if they have come apart; returns whether they had.

    They compute the same numbers, but processors of different kinds may round in different ways.

    Args:
        tensors: This rank's, of the same shapes on all ranks where they are whole; changed in place.
        cuts: How those that are divided were cut.
        group: The ranks, which call it together.
        device: Device of the tensors.
    """
    wholes = {name: tensor for name, tensor in tensors.items() if name not in cuts}
    hashes = group.all_gather(digest(wholes.values()).to(device))
    if all(bool(other == hashes[0]) for other in hashes):
        return False
    for tensor in wholes.values():
        if tensor.numel():
            tensor.copy_(group.broadcast(tensor.contiguous()))
    return True
