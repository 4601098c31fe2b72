"""Which server holds which parameters, and how a shard's parameters travel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_ALIGNMENT = 8


def balanced(sizes: Sequence[int], shards: int) -> list[list[int]]:
    """Divides tensors among shards, whole ones, by size: the largest first, each to the shard that has least.

    Graham 1969, "Bounds on multiprocessing timing anomalies": the largest shard is at most 4/3 of what the best
    division gives. The result depends on the arguments alone, so all ranks find the same.

    Args:
        sizes: Bytes of each tensor.
        shards: How many.

    Returns:
        For each shard the positions of its tensors, ascending.
    """
    found: list[list[int]] = [[] for _ in range(shards)]
    filled = [0] * shards
    for position in sorted(range(len(sizes)), key=lambda position: -sizes[position]):
        least = filled.index(min(filled))
        found[least].append(position)
        filled[least] += sizes[position]
    return [sorted(positions) for positions in found]


class Packed:
    """Room for a copy of some parameters in one run of bytes, which is what travels.

    Both ends build the same model and so find the same layout.

    Args:
        parameters: In the model's order.

    Attributes:
        bytes: uint8, on the CPU.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        places, end = [], 0
        for parameter in self._parameters:
            places.append(end)
            end += -(-parameter.numel() * parameter.element_size() // _ALIGNMENT) * _ALIGNMENT
        self.bytes = torch.zeros(end, dtype=torch.uint8)
        self._views: list[Tensor] = []
        for parameter, start in zip(self._parameters, places, strict=True):
            run = self.bytes[start : start + parameter.numel() * parameter.element_size()].view(parameter.dtype)
            # The parameter's own strides (channels-last weights): a plain copy, and the same on both ends.
            self._views.append(run.as_strided(parameter.size(), torch.empty_like(parameter, device="meta").stride()))

    @torch.no_grad()
    def pack(self) -> Tensor:
        """Copies the parameters into the bytes, which are returned."""
        for view, parameter in zip(self._views, self._parameters, strict=True):
            view.copy_(parameter)
        return self.bytes

    @torch.no_grad()
    def unpack(self) -> None:
        """Copies the bytes into the parameters."""
        for view, parameter in zip(self._views, self._parameters, strict=True):
            parameter.copy_(view)
