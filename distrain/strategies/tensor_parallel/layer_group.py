"""The two operations between whole and divided activations, with their gradients.

They are *f* and *g* of Shoeybi et al. 2019, "Megatron-LM" (arXiv 1909.08053), §3. Where a whole activation enters
divided layers nothing is sent, and its gradient is the sum of the ranks'. Where the results of divided layers leave
them, they are summed, and the gradient is that of the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from distrain.communication.collectives import Communicator, ring_all_reduce_bytes
from distrain.strategies.tensor_parallel.agreement import WatchedRun
from distrain.strategies.tensor_parallel.cut import model_format


class LayerGroup:
    """The ranks among which layers are divided.

    Args:
        communicator: Of these ranks.
        waiting: Makes a context that is entered while this rank communicates in a pass.
        layout: Memory format of images' activations, the same on all ranks.

    Attributes:
        communicator: As given.
        bytes_sent: What this rank has sent in passes so far.
    """

    def __init__(
        self,
        communicator: Communicator,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
        layout: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.communicator, self._waiting, self._layout = communicator, waiting, layout
        self._watched: WatchedRun | None = None
        self.bytes_sent = 0

    @classmethod
    def for_model(
        cls, model: nn.Module, communicator: Communicator, waiting: Callable[[], AbstractContextManager[None]]
    ) -> LayerGroup:
        """The group for a model that all of its ranks have, whose weights are laid out as its activations are."""
        return cls(communicator, waiting, model_format(model))

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerGroup:
        """A copy of a layer communicates with the same ranks."""
        return self

    @property
    def rank(self) -> int:
        """This rank's number among them."""
        return self.communicator.rank

    @property
    def size(self) -> int:
        """How many they are."""
        return self.communicator.size

    def layout_of(self, dims: int) -> torch.memory_format:
        """Memory format of whole activations with so many dimensions."""
        return self._layout if dims == 4 else torch.contiguous_format

    def enter(self, whole: Tensor) -> Tensor:
        """A whole activation as the input of divided layers: its gradient will be summed over the ranks."""
        if self.size == 1 or not (whole.requires_grad and torch.is_grad_enabled()):
            return whole
        return cast(Tensor, _Enter.apply(whole, self))  # type: ignore[no-untyped-call]

    def leave(self, summand: Tensor) -> Tensor:
        """The sum of all ranks' results; ``summand`` must not be used afterwards."""
        if self.size == 1:
            return summand
        return cast(Tensor, _Leave.apply(summand, self))  # type: ignore[no-untyped-call]

    @contextmanager
    def watched(self, run: WatchedRun) -> Iterator[WatchedRun]:
        """In this block ranks compare what they sum before they do it."""
        self._watched = run
        try:
            yield run
        finally:
            self._watched = None

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in place where the tensor is laid out as agreed."""
        if self._watched is not None:
            self._watched.before_sum(tensor)
        layout = self.layout_of(tensor.dim())
        # The ranks' tensors may be laid out in different ways: one with a single channel is both.
        tensor = tensor.contiguous(memory_format=layout)
        # The same memory as a contiguous tensor, which is sent without a copy.
        flat = tensor.permute(0, 2, 3, 1) if layout == torch.channels_last else tensor
        self.bytes_sent += ring_all_reduce_bytes(flat.nbytes, self.size)
        with self._waiting():
            self.communicator.all_reduce(flat)
        return tensor


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: LayerGroup) -> Tensor:
        ctx.group = group
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # A copy: autograd may use the tensor that it gives elsewhere too.
        return ctx.group.sum(gradients[0].clone(memory_format=torch.preserve_format)), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, summand: Tensor, group: LayerGroup) -> Tensor:
        total = group.sum(summand)
        if total is summand:
            ctx.mark_dirty(summand)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
