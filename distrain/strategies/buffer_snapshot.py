"""A copy of a model's buffers, from which a step that is skipped restores them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class BufferSnapshot:
    """Copies of buffers as they were before a step; a forward pass changes BatchNorm's running statistics, for example.

    Args:
        modules: Whose buffers.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._buffers: list[Tensor] = [buffer for module in modules for buffer in module.buffers()]
        self._copies = [buffer.clone() for buffer in self._buffers]

    @torch.no_grad()
    def take(self) -> None:
        """Copies the buffers' current values."""
        if self._buffers:
            torch._foreach_copy_(self._copies, self._buffers)

    @torch.no_grad()
    def restore(self) -> None:
        """Gives the buffers the values that were copied last."""
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._copies)
