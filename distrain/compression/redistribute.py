"""A compressor's state on other ranks than those that saved it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from distrain.compression.base import Compressor

log = logging.getLogger(__name__)

#: What the ranks hold as shares of a sum; everything else is the same on all ranks that hold the parameter.
_SHARES = ("residual", "velocity")


def restore(
    compressor: Compressor,
    saved: Sequence[Mapping[str, Tensor]],
    *,
    same_layout: bool,
    rank: int,
    names: Iterable[str],
    replicas: int,
) -> None:
    """Gives a rank's compressor its part of what all ranks of an earlier run kept.

    In the same layout each rank takes back its own, bit for bit. In another one what the ranks had not sent yet is
    summed by parameter and each replica takes an equal share, so that the sum, which is all that training sees of it,
    is kept; a factor that all replicas share is taken as it is.

    Args:
        compressor: This rank's, new.
        saved: What each rank's compressor kept, by ``<what>/<parameter name>``.
        same_layout: Whether the ranks are arranged as they were.
        rank: This rank in the world.
        names: Parameters that this rank holds.
        replicas: How many ranks hold each of them.
    """
    found: dict[str, Tensor] = {}
    if same_layout:
        found = dict(saved[rank])
    else:
        held = set(names)
        for key, tensor in ((key, tensor) for state in saved for key, tensor in state.items()):
            what, _, name = key.partition("/")
            if what == "step":
                found[key] = torch.maximum(found[key], tensor) if key in found else tensor
            elif name in held and what in _SHARES:
                found[key] = found[key].add_(tensor / replicas) if key in found else tensor / replicas
            elif name in held and key not in found:
                found[key] = tensor
    compressor.load_state_dict(found)
    if not any(key.startswith(_SHARES) for key in found):
        return
    if compressor.residuals is None:
        log.warning(
            "compression=%s has no place for what the saved run's ranks had not sent yet; it is lost",
            compressor.config.name,
        )
    elif not same_layout:
        log.info("what %d ranks had not sent yet is shared among %d replicas; its sum is kept", len(saved), replicas)
