"""Which server holds which parameters, and how a shard's parameters are laid out for sending."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

_ALIGNMENT = 8


def assign_tensors(sizes: Sequence[int], servers: int) -> list[list[int]]:
    """Assigns each tensor as a whole to one server and balances bytes: the largest first, to the server with the least.

    Graham 1969, "Bounds on multiprocessing timing anomalies": the largest shard is at most 4/3 of the largest shard of
    the best assignment. The result depends on the arguments alone, so all ranks compute the same.

    Args:
        sizes: Bytes of each tensor.
        servers: Number of servers.

    Returns:
        For each server the indices of its tensors, ascending.
    """
    assigned: list[list[int]] = [[] for _ in range(servers)]
    assigned_bytes = [0] * servers
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        server = assigned_bytes.index(min(assigned_bytes))
        assigned[server].append(index)
        assigned_bytes[server] += sizes[index]
    return [sorted(indices) for indices in assigned]


def trained_among(parameters: Mapping[str, nn.Parameter]) -> list[nn.Parameter]:
    """Those of a shard's parameters that are trained now, in order; workers and servers get the same."""
    return [parameter for parameter in parameters.values() if parameter.requires_grad]


class ParameterBuffer:
    """One contiguous buffer that holds a copy of some parameters, to be sent or received as a whole.

    A worker and a server build the same model and so compute the same layout.

    Args:
        parameters: In the model's order.

    Attributes:
        parameters: As given.
        data: The copy, uint8 ``[bytes]``, on the CPU.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        offsets, end = [], 0
        for parameter in self.parameters:
            offsets.append(end)
            end += -(-parameter.numel() * parameter.element_size() // _ALIGNMENT) * _ALIGNMENT
        self.data = torch.zeros(end, dtype=torch.uint8)
        self._views: list[Tensor] = []
        for parameter, start in zip(self.parameters, offsets, strict=True):
            part = self.data[start : start + parameter.numel() * parameter.element_size()].view(parameter.dtype)
            # With the parameter's own strides (channels-last weights) the copy is a plain one, and both peers agree.
            self._views.append(part.as_strided(parameter.size(), torch.empty_like(parameter, device="meta").stride()))

    @torch.no_grad()
    def pack(self) -> Tensor:
        """Copies the parameters into the buffer and returns :attr:`data`."""
        for view, parameter in zip(self._views, self.parameters, strict=True):
            view.copy_(parameter)
        return self.data

    @torch.no_grad()
    def unpack(self) -> None:
        """Copies the buffer into the parameters."""
        for view, parameter in zip(self._views, self.parameters, strict=True):
            parameter.copy_(view)
