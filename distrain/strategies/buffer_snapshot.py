"""What a forward pass changes besides the gradients, kept so that a step can be undone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class KeptBuffers:
    """Copies of buffers (BatchNorm's running statistics) as they were before a step.

    Args:
        modules: Whose buffers.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._held: list[Tensor] = [buffer for module in modules for buffer in module.buffers()]
        self._copies = [buffer.clone() for buffer in self._held]

    @torch.no_grad()
    def take(self) -> None:
        """Keeps what they hold now."""
        if self._held:
            torch._foreach_copy_(self._copies, self._held)

    @torch.no_grad()
    def put_back(self) -> None:
        """Makes them what was kept."""
        if self._held:
            torch._foreach_copy_(self._held, self._copies)
