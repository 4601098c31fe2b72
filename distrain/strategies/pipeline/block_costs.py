"""Measures what a model's blocks and the messages between pipeline ranks cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distrain.communication.collectives import Communicator
from distrain.runtime.device import synchronize
from distrain.strategies.pipeline.blocks import named_blocks
from distrain.strategies.trial_copy import trial_copy

#: Sizes in bytes of the two messages from which latency and bandwidth are computed.
_MESSAGE_BYTES = (4096, 4 * 2**20)


@dataclass(frozen=True)
class BlockCost:
    """Cost of one block for one microbatch.

    Attributes:
        name: The block's name in the model.
        parameters: Number of parameters.
        forward_ms: Time of the forward pass, in milliseconds.
        backward_ms: Time of the backward pass, in milliseconds.
        output_tensors: Number of tensors in the output.
        output_bytes: Size of the output.
        activation_bytes: Size of what autograd saves for the backward pass.
    """

    name: str
    parameters: int
    forward_ms: float
    backward_ms: float
    output_tensors: int
    output_bytes: int
    activation_bytes: int


def measure_blocks(
    model: nn.Sequential,
    inputs: Tensor,
    autocast: Callable[[], AbstractContextManager[Any]],
    repeats: int = 5,
    *,
    warm_up: bool = True,
) -> list[BlockCost]:
    """Times each block's forward and backward pass on a microbatch.

    Parameters, gradients and buffers don't change.

    Args:
        model: The whole model on its device.
        inputs: The model's inputs, ``[N, …]``.
        autocast: Context of the forward passes.
        repeats: Number of timed runs, whose median is taken.
        warm_up: One more run comes before them.
    """
    costs = []
    value: Any = inputs
    for name, block in named_blocks(model):
        forwards, backwards = [], []
        saved_bytes = 0

        def count_saved(tensor: Tensor) -> Tensor:
            nonlocal saved_bytes
            saved_bytes += tensor.numel() * tensor.element_size()
            return tensor

        with trial_copy(block) as trial:
            for repeat in range(not warm_up, repeats + 1):
                given = _copied(value)
                start = _synchronised_time(inputs.device)
                saved_bytes = 0
                with autocast(), torch.autograd.graph.saved_tensors_hooks(count_saved, lambda tensor: tensor):
                    output = trial(given)
                middle = _synchronised_time(inputs.device)
                roots = [tensor for tensor in _tensors(output) if tensor.requires_grad]
                if roots:
                    torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])
                end = _synchronised_time(inputs.device)
                if repeat:
                    forwards.append(1000 * (middle - start))
                    backwards.append(1000 * (end - middle))
        costs.append(
            BlockCost(
                name,
                sum(p.numel() for p in block.parameters()),
                sorted(forwards)[repeats // 2],
                sorted(backwards)[repeats // 2],
                len(_tensors(output)),
                sum(tensor.numel() * tensor.element_size() for tensor in _tensors(output)),
                saved_bytes,
            )
        )
        value = output
    return costs


def _copied(value: Any) -> Any:
    """A copy of a block's input without a graph, into which the block may write."""
    if isinstance(value, Tensor):
        # Not the leaf itself, into which autograd forbids to write.
        return value.detach().requires_grad_(value.requires_grad).clone()
    return type(value)(_copied(item) for item in value) if type(value) in (tuple, list) else value


def _tensors(value: Any) -> list[Tensor]:
    items = value if isinstance(value, tuple | list) else [value]
    return [item for item in items if isinstance(item, Tensor)]


def measure_point_to_point(group: Communicator, device: torch.device, repeats: int = 3) -> tuple[float, float]:
    """Times messages between the first two ranks of a pipeline; all its ranks call it together.

    Args:
        group: The pipeline's ranks.
        device: Where messages are sent from and received.
        repeats: The fastest of this many round trips is taken.

    Returns:
        Latency of a message, and additional time per byte, both in milliseconds; 0 on all but the first two ranks.
    """
    times = []
    for size in _MESSAGE_BYTES:
        buffer = torch.zeros(size, dtype=torch.uint8, device=device)
        best = math.inf
        group.barrier()
        for _ in range(repeats if group.rank < 2 else 0):
            start = _synchronised_time(device)
            # A round trip.
            for sender in (0, 1):
                if group.rank == sender:
                    group.start_send(buffer, 1 - sender, tag=0).wait()
                else:
                    group.start_receive(buffer, sender, tag=0).wait()
            best = min(best, 1000 * (_synchronised_time(device) - start) / 2)
        times.append(best if group.rank < 2 else 0.0)
    ms_per_byte = max(times[1] - times[0], 0.0) / (_MESSAGE_BYTES[1] - _MESSAGE_BYTES[0])
    return max(times[0] - ms_per_byte * _MESSAGE_BYTES[0], 0.0), ms_per_byte


def _synchronised_time(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()
