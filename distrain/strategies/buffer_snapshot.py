"""A copy of a model's buffers, from which a step that is skipped restores them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from distrain import torch_internals
from distrain.strategies.named_buffers import NamedBuffers


class BufferSnapshot:
    """Copies of buffers as they were before a step; a forward pass changes BatchNorm's running statistics, for example.

    Args:
        modules: Whose buffers.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._buffers = [NamedBuffers(module) for module in modules]
        self._copies = [buffer.clone() for buffer in self._current()]

    def _current(self) -> list[Tensor]:
        return [buffer for buffers in self._buffers for buffer in buffers.values()]

    @torch.no_grad()
    def take(self) -> None:
        """Copies the buffers' current values."""
        if self._copies:
            torch_internals.foreach_copy(self._copies, self._current())

    @torch.no_grad()
    def restore(self) -> None:
        """Gives the buffers the values that were copied last."""
        if self._copies:
            torch_internals.foreach_copy(self._current(), self._copies)
