"""Gathers each block's parameters just before they are used, in the forward and in the backward pass.

In the forward pass the modules of a block say when it is used and when it no longer is. In the backward pass autograd
says so: what it saves of a parameter is replaced by a note, and asking for it gathers the block. So a block is gathered
exactly where its values are needed, whatever the modules do, and values that were freed are never read.

All ranks gather the same blocks in the same order, whatever their samples make of the model: the forward pass of each
rank takes all blocks in the order of an observed pass, and the backward pass takes them in the reverse order. The block
after the one in use is gathered ahead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from distrain.reporting.metrics import Stopwatch
from distrain.strategies.fsdp.flat_block import FlatBlock
from distrain.strategies.recomputation.block import recomputed_blocks


class _SavedParameter:
    """What autograd keeps of a parameter, or of a view of one, for the backward pass."""

    __slots__ = ("block", "offset", "size", "stride")

    def __init__(self, block: int, tensor: Tensor) -> None:
        self.block = block
        self.size, self.stride, self.offset = tensor.size(), tensor.stride(), tensor.storage_offset()


class Gatherer:
    """Attaches and detaches a model's blocks during its passes.

    Args:
        model: The model, whose modules get hooks.
        blocks: All blocks, in the order in which the forward pass uses them. They are detached.
        uses: Modules, in the order in which they are called, and the first and last of the blocks that they use.
        reshard_after_forward: Detach a block after its forward pass too, and gather it again for the backward pass;
            else blocks stay attached until :meth:`end_step`.
        stopwatch: Records the time spent waiting for other ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[FlatBlock],
        uses: Sequence[tuple[Sequence[nn.Module], int, int]],
        stopwatch: Stopwatch,
        *,
        reshard_after_forward: bool,
    ) -> None:
        self._blocks = blocks
        self._index = {id(block): index for index, block in enumerate(blocks)}
        self._reshards = reshard_after_forward
        self._stopwatch = stopwatch
        #: The next block of this forward pass, and the blocks that the backward pass has still to gather.
        self._next = len(blocks)
        self._backward: deque[int] = deque()
        self._in_forward = False
        #: Blocks whose values are needed in the backward pass by modules that are computed again.
        self._recomputed: set[int] = set()
        #: What autograd has saved of each block and not yet asked for, and how many gradients are still missing.
        self._saved = [0] * len(blocks)
        self._missing = [0] * len(blocks)
        self._attached_storages: dict[int, int] = {}
        self._saving: Any = None
        self._hooks: list[RemovableHandle] = []
        for modules, first, last in uses:
            for module in modules:
                module.register_forward_pre_hook(self._use_hook(first, last), prepend=True)
            modules[-1].register_forward_hook(self._leave_hook(first, last))
        model.register_forward_pre_hook(lambda *_: self.begin_forward(), prepend=True)
        model.register_forward_hook(lambda *_: self.end_forward())
        model.register_forward_hook(lambda *_: self._stop_saving(), always_call=True)
        self.rebuild()

    def rebuild(self) -> None:
        """Takes note of which blocks are trained now; call it between steps only."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        trained = [index for index, block in enumerate(self._blocks) if block.is_trained]
        # Autograd doesn't come to what is before the first trained block.
        self._first_trained = min(trained, default=len(self._blocks))
        for index in trained:
            for parameter in self._blocks[index].parameters:
                self._hooks.append(parameter.register_hook(self._before_gradient(index)))
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._after_gradient(index)))

    @property
    def bytes_per_pass(self) -> tuple[int, int]:
        """Bytes that are gathered in a forward pass, and in the backward pass after it."""
        forward = sum(block.bytes for block in self._blocks)
        again = self._blocks[self._first_trained : -1] if self._reshards else ()
        return forward, sum(block.bytes for block in again)

    # --- the forward pass --------------------------------------------------------------------------------------------

    def begin_forward(self) -> None:
        """A forward pass begins; the backward pass before it, if there was one, is over."""
        self.end_backward()
        self._next = 0
        self._in_forward = True
        if torch.is_grad_enabled():
            self._saved = [0] * len(self._blocks)
            self._missing = [len(block.parameters) if block.is_trained else 0 for block in self._blocks]
            self._saving = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
            self._saving.__enter__()

    def end_forward(self) -> None:
        """The forward pass is over; a rank that did not use all blocks gathers the rest, as the others did."""
        grad, last = torch.is_grad_enabled(), len(self._blocks) - 1
        for index, block in enumerate(self._blocks):
            if index >= self._next or (block.is_started and not block.is_attached):
                self._use(index, index)
                self._leave(index, index)
        for index in range(len(self._blocks)):
            # Modules of a block may have been left out, so that it is still attached.
            if not grad or (self._reshards and index != last):
                self._detach(index)
        self._in_forward = False
        self._backward.clear()
        if grad:
            again = (index for index in range(last, self._first_trained - 1, -1))
            self._backward.extend(index for index in again if not self._blocks[index].is_attached)

    def pass_without_samples(self) -> None:
        """Takes part in the gathering of a forward pass in training for which this rank has no samples."""
        self.begin_forward()
        self._stop_saving()
        self.end_forward()

    def _use(self, first: int, last: int) -> None:
        if not self._in_forward:
            # A module that is computed again, whose parameters are there already.
            return
        with self._stopwatch.communication():
            for index in range(first, last + 1):
                while self._next <= index:
                    self._blocks[self._next].start_gathering()
                    self._next += 1
                self._attach(index)
        if self._next == last + 1 < len(self._blocks):
            self._blocks[self._next].start_gathering()
            self._next += 1

    def _leave(self, first: int, last: int) -> None:
        if not self._in_forward:
            return
        for index in range(first, last + 1):
            if torch.is_grad_enabled() and (not self._reshards or index == len(self._blocks) - 1):
                # The backward pass needs the last one first.
                continue
            self._detach(index)

    # --- the backward pass -------------------------------------------------------------------------------------------

    def pass_over(self, block: FlatBlock) -> None:
        """Takes part in the gathering of a block for a backward pass that this rank doesn't run."""
        index = self._index[id(block)]
        if index in self._backward:
            self._need(index)
            self._detach(index)

    def end_backward(self) -> None:
        """The backward pass is over; this rank gathers what the others may have needed in it and it did not."""
        while self._backward:
            index = self._backward[0]
            self._need(index)
            self._detach(index)
        for index, block in enumerate(self._blocks):
            # Some were gathered and not used.
            if self._reshards or not block.is_attached:
                self._detach(index)

    def end_step(self) -> None:
        """The last backward pass of a step is over: detaches all blocks."""
        self.end_backward()
        self._detach_all()

    def gather_for_recomputed(self, model: nn.Module) -> None:
        """Gathers what the model's blocks need that are computed again in the backward pass."""
        index_of = {id(parameter): index for index, block in enumerate(self._blocks) for parameter in block.parameters}

        def gather(module: nn.Module) -> None:
            # In the order of the backward pass.
            for index in sorted({index_of[id(parameter)] for parameter in module.parameters()}, reverse=True):
                self._need(index)

        for module in recomputed_blocks(model):
            module.recomputation.before = gather
            self._recomputed |= {index_of[id(parameter)] for parameter in module.parameters()}

    def _need(self, index: int) -> None:
        """Attaches a block for the backward pass, and starts to gather the one before it."""
        if self._blocks[index].is_attached:
            return
        with self._stopwatch.communication():
            while index in self._backward:
                self._blocks[self._backward.popleft()].start_gathering()
            self._attach(index)
        if self._backward:
            self._blocks[self._backward[0]].start_gathering()

    def _release(self, index: int) -> None:
        """Detaches a block that the backward pass no longer needs."""
        if index in self._recomputed and not self._blocks[index].is_trained:
            # Nothing says when the last module that uses it was computed again.
            return
        if self._reshards and not self._saved[index] and not self._missing[index]:
            self._detach(index)

    def _pack(self, tensor: Tensor) -> Tensor | _SavedParameter:
        # Sparse tensors have no storage.
        strided = tensor.layout == torch.strided
        index = self._attached_storages.get(tensor.untyped_storage().data_ptr()) if strided else None
        # Another type (the real parts of complex parameters, say) is kept as it is, and keeps its memory alive.
        if index is None or tensor.dtype != self._blocks[index].parameters[0].dtype:
            return tensor.detach()
        self._saved[index] += 1
        return _SavedParameter(index, tensor)

    def _unpack(self, saved: Tensor | _SavedParameter) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        index = saved.block
        self._need(index)
        flat = self._blocks[index].storage
        assert flat is not None
        self._saved[index] -= 1
        tensor = flat.as_strided(saved.size, saved.stride, saved.offset)
        self._release(index)
        return tensor

    # --- hooks, and the blocks' states -------------------------------------------------------------------------------

    def _use_hook(self, first: int, last: int) -> Callable[..., None]:
        return lambda *_: self._use(first, last)

    def _leave_hook(self, first: int, last: int) -> Callable[..., None]:
        return lambda *_: self._leave(first, last)

    def _before_gradient(self, index: int) -> Callable[[Tensor], None]:
        # A gradient gets the memory layout of its parameter, which must not be empty.
        return lambda _: self._need(index)

    def _after_gradient(self, index: int) -> Callable[[Tensor], None]:
        def hook(_: Tensor) -> None:
            self._missing[index] -= 1
            self._release(index)

        return hook

    def _stop_saving(self) -> None:
        if self._saving is not None:
            self._saving.__exit__()
            self._saving = None

    def _attach(self, index: int) -> None:
        block = self._blocks[index]
        if not block.is_attached:
            block.attach()
            assert block.storage is not None
            self._attached_storages[block.storage.untyped_storage().data_ptr()] = index

    def _detach(self, index: int) -> None:
        block = self._blocks[index]
        if block.storage is not None:
            self._attached_storages.pop(block.storage.untyped_storage().data_ptr(), None)
        block.detach()

    def _detach_all(self) -> None:
        for index in range(len(self._blocks)):
            self._detach(index)
