"""What stages hand over to each other, also in epochs in which some parameters are frozen."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from distrain.models.freezing import FreezeSchedule, still_modules, train_only
from distrain.strategies.pipeline.blocks import HandOver, TracedBlock, trace_blocks
from distrain.strategies.precision import Precision


def between_stages(traced: Sequence[TracedBlock], starts: Sequence[int]) -> list[HandOver]:
    """What each stage but the last hands over to the next one.

    Args:
        traced: All blocks.
        starts: The first block of each stage.
    """
    return [output for start in starts[1:] if (output := traced[start - 1].output) is not None]


def in_epochs(
    freezing: FreezeSchedule | None,
    model: nn.Module,
    sequence: nn.Sequential,
    example: Tensor,
    precision: Precision,
    starts: Sequence[int],
) -> dict[frozenset[str], tuple[list[HandOver], list[str]]]:
    """What stages hand over while some parameters are frozen, and the names of the modules that keep still then.

    No gradient is sent back to a stage before which nothing is trained. The keys are the names of the parameters that
    are trained.

    Args:
        freezing: ``None``: nothing is ever frozen.
        model: The model.
        sequence: Its blocks.
        example: Its inputs.
        precision: Of forward passes.
        starts: The first block of each stage.
    """
    found: dict[frozenset[str], tuple[list[HandOver], list[str]]] = {}
    if freezing is None:
        return found
    for epoch in freezing.epochs:
        trained = freezing.trained(epoch)
        train_only(model, trained, freezing.ever_trained)
        outputs = between_stages(trace_blocks(sequence, example, precision), starts)
        found[trained] = outputs, still_modules(model, freezing.parameters - trained)
    train_only(model, freezing.ever_trained, freezing.ever_trained)
    return found
