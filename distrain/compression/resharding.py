"""Distributes a saved compressor state over the ranks of a new run."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from distrain.checkpoint.restore_report import RestoredPart
from distrain.compression.base import Compressor

log = logging.getLogger(__name__)

#: Kinds of state of which only the sum over the ranks matters; all others are equal on all ranks that hold the
#: parameter.
SUMMED = ("residual", "velocity")
#: Kinds of state that were measured on the saving ranks and do not apply to others.
_MEASURED = ("choice",)
#: The parts that :func:`restore` reports on.
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
    """Loads this rank's part of the compressor state that all ranks of an earlier run saved.

    In the same layout each rank gets its own state back, bit for bit. In another layout residuals are summed over the
    saving ranks by parameter and each replica gets an equal share: training depends on their sum alone, and that is
    preserved. State that is equal on all replicas is copied.

    Args:
        compressor: This rank's new compressor; its state is replaced.
        saved: State of each saving rank's compressor, by ``<kind>/<parameter name>``.
        same_layout: Whether parameters are distributed over the ranks as they were.
        rank: This rank in the world.
        names: Parameters that this rank holds.
        replicas: Number of ranks that hold each of them.

    Returns:
        How the residuals and everything else were restored.
    """
    state = dict(saved[rank]) if same_layout else _redistributed(saved, set(names), replicas)
    compressor.load_state_dict(state)
    return [
        _residuals_report(compressor, state, None if same_layout else (len(saved), replicas)),
        _factors_report(compressor, state, same_layout=same_layout),
    ]


def _redistributed(saved: Sequence[Mapping[str, Tensor]], names: set[str], replicas: int) -> dict[str, Tensor]:
    """The state of a rank that holds the named parameters, where each has so many replicas."""
    state: dict[str, Tensor] = {}
    for key, tensor in ((key, tensor) for saved_state in saved for key, tensor in saved_state.items()):
        kind, _, name = key.partition("/")
        if kind == "step":
            state[key] = torch.maximum(state[key], tensor) if key in state else tensor
        elif name in names and kind in SUMMED:
            state[key] = state[key].add_(tensor / replicas) if key in state else tensor / replicas
        elif name in names and key not in state:
            state[key] = tensor
    return state


def _residuals_report(
    compressor: Compressor, state: Mapping[str, Tensor], redistributed: tuple[int, int] | None
) -> RestoredPart:
    """How residuals were restored.

    Args:
        compressor: After loading.
        state: What was loaded.
        redistributed: Number of saving ranks and of replicas now; ``None`` in the same layout.
    """
    if not any(key.startswith(SUMMED) for key in state):
        return RestoredPart(RESIDUALS, "absent", "none were saved")
    if compressor.residuals is None:
        name = compressor.config.name
        log.warning("compression=%s keeps no residuals; those of the saved run are discarded", name)
        return RestoredPart(RESIDUALS, "reset", f"compression={name} keeps no residuals")
    if redistributed is None:
        return RestoredPart(RESIDUALS, "exact", "each rank's own")
    ranks, replicas = redistributed
    return RestoredPart(
        RESIDUALS, "redistributed", f"the sum over {ranks} ranks, in equal shares among {replicas} replicas"
    )


def _factors_report(compressor: Compressor, state: Mapping[str, Tensor], *, same_layout: bool) -> RestoredPart:
    """How everything but residuals and the step was restored."""
    saved = {key for key in state if key != "step" and not key.startswith(SUMMED)}
    if not saved:
        return RestoredPart(FACTORS, "absent", "none were saved")
    if not saved <= compressor.state_dict().keys():
        return RestoredPart(FACTORS, "reset", f"compression={compressor.config.name} does not use them")
    if same_layout:
        return RestoredPart(FACTORS, "exact", "each rank's own")
    if any(key.startswith(_MEASURED) for key in saved):
        return RestoredPart(FACTORS, "reset", "measured again on these ranks")
    return RestoredPart(FACTORS, "exact", "equal on all replicas")
