"""Times BatchNorm layers by themselves: what other kinds of them add to the passes of a model."""

from __future__ import annotations

import copy
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distrain.communication.collectives import Communicator
from distrain.compression.autotune.step_trace import synchronised_time
from distrain.tools.planning.steps.common import BATCHNORM_BACKWARD, BATCHNORM_FORWARD
from distrain.torch_internals import BatchNorm

#: Times that a layer's passes are timed, after one that is not counted, or fewer in so many seconds.
_REPEATS, _SECONDS = 5, 0.1

#: Factor by which collectives take longer in passes, at most; and the share of the passes that this must add so that it
#: is measured.
_MOST_LATENESS, _LITTLE = 15.0, 0.05

#: Changes the BatchNorm layers of a model in place.
Change = Callable[[nn.Module, Communicator], int]


@dataclass(frozen=True)
class _Kind:
    """What the time of a layer depends on."""

    layer: type[nn.Module]
    shape: torch.Size
    dtype: torch.dtype
    channels_last: bool


def extra_seconds(model: nn.Module, run: Callable[[], Any], changes: Sequence[Change]) -> list[float]:
    """Seconds by which the model's forward and backward passes take longer with changed BatchNorm layers.

    Args:
        model: The model; it stays as it is, but for running statistics.
        run: Runs a forward pass of it.
        changes: Of each of them the seconds are returned.
    """
    seen: dict[_Kind, tuple[BatchNorm, Tensor]] = {}
    counts: Counter[_Kind] = Counter()

    def note(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        # A layer whose parameters are frozen is in evaluation mode, and works as before.
        if not (layer.training and inputs and isinstance(inputs[0], Tensor)):
            return
        given = inputs[0].detach()
        is_last = given.dim() == 4 and given.is_contiguous(memory_format=torch.channels_last)
        kind = _Kind(type(layer), given.shape, given.dtype, is_last)
        assert isinstance(layer, BatchNorm)
        # A copy, into which no later layer writes.
        seen.setdefault(kind, (layer, given.clone()))
        counts[kind] += 1

    layers = [layer for layer in model.modules() if isinstance(layer, BatchNorm)]
    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    extra = [0.0] * len(changes)
    for kind, (layer, given) in seen.items():
        plain = _seconds(layer, given, None)
        for index, change in enumerate(changes):
            extra[index] += counts[kind] * max(_seconds(layer, given, change) - plain, 0.0)
    return extra


def lateness_of_collectives(layers: int, small: float, passes: float, added: Callable[[], float]) -> float | None:
    """Factor by which a layer's collective takes longer in passes, to which ranks come at different times.

    Args:
        layers: Number of layers with collectives.
        small: Seconds of such a collective without anything besides.
        passes: Seconds of the passes of a step.
        added: Measures the seconds that the collectives add to passes; called only where they may matter.

    Returns:
        The factor; ``None`` without such layers.
    """
    collectives = (BATCHNORM_FORWARD + BATCHNORM_BACKWARD) * layers
    if not collectives:
        return None
    if collectives * small * _MOST_LATENESS < _LITTLE * passes:
        return 1.0
    return added() / collectives / max(small, 1e-9)


def _seconds(layer: BatchNorm, given: Tensor, change: Change | None) -> float:
    """Seconds of a layer's forward and backward pass."""
    tried = nn.Sequential(copy.deepcopy(layer))
    if change is not None:
        change(tried, Communicator())
    gradient = torch.ones_like(given)
    times: list[float] = []
    while len(times) < 2 or (len(times) <= _REPEATS and sum(times) < _SECONDS):
        inputs = given.clone().requires_grad_()
        begin = synchronised_time(given.device)
        tried(inputs).backward(gradient)
        times.append(synchronised_time(given.device) - begin)
    return statistics.median(times[1:])
