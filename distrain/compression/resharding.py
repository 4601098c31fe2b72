"""A compressor's state on other ranks than those that saved it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from distrain.checkpoint.restore_report import RestoredPart
from distrain.compression.base import Compressor

log = logging.getLogger(__name__)

#: What the ranks hold as shares of a sum; everything else is the same on all ranks that hold the parameter.
_SHARES = ("residual", "velocity")
#: What was measured on the ranks that saved, and holds for those alone.
_MEASURED = ("choice",)
RESIDUALS, FACTORS = "residuals", "compressor's factors"


def restore(
    compressor: Compressor,
    saved: Sequence[Mapping[str, Tensor]],
    *,
    same_layout: bool,
    rank: int,
    names: Iterable[str],
    replicas: int,
) -> list[RestoredPart]:
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

    Returns:
        What became of residuals and of all else.
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
    return [
        _residuals(compressor, found, None if same_layout else (len(saved), replicas)),
        _factors(compressor, found, same_layout=same_layout),
    ]


def _residuals(compressor: Compressor, found: Mapping[str, Tensor], moved: tuple[int, int] | None) -> RestoredPart:
    if not any(key.startswith(_SHARES) for key in found):
        return RestoredPart(RESIDUALS, "absent", "nothing was kept back")
    if compressor.residuals is None:
        name = compressor.config.name
        log.warning("compression=%s has no place for what the saved run's ranks had not sent yet; it is lost", name)
        return RestoredPart(RESIDUALS, "reset", f"compression={name} has no place for what was not sent yet")
    if moved is None:
        return RestoredPart(RESIDUALS, "exact", "each rank's own")
    ranks, replicas = moved
    return RestoredPart(
        RESIDUALS, "redistributed", f"the sum over {ranks} ranks, in equal shares among {replicas} replicas"
    )


def _factors(compressor: Compressor, found: Mapping[str, Tensor], *, same_layout: bool) -> RestoredPart:
    saved = {key for key in found if key != "step" and not key.startswith(_SHARES)}
    if not saved:
        return RestoredPart(FACTORS, "absent", "none were saved")
    if not saved <= compressor.state_dict().keys():
        return RestoredPart(FACTORS, "reset", f"compression={compressor.config.name} has no use for them")
    if same_layout:
        return RestoredPart(FACTORS, "exact", "each rank's own")
    if any(key.startswith(_MEASURED) for key in saved):
        return RestoredPart(FACTORS, "reset", "measured anew on these ranks")
    return RestoredPart(FACTORS, "exact", "the same on all replicas")
