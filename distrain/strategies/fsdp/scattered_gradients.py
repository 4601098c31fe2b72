"""Gradients of which each rank keeps the sum over all ranks for its own part of each block alone (ZeRO stages 2, 3).

A block is complete when the gradients of all its parameters are. It is then copied into a flat buffer, reduced and
scattered while the backward pass still runs, and the parameters' own gradients are freed (Rajbhandari et al. 2020,
arXiv 1910.02054, section 5.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from distrain import torch_internals
from distrain.communication.collectives import ring_all_reduce_bytes
from distrain.communication.types import Pending, Pollable
from distrain.compression.bucket import Bucket
from distrain.reporting.metrics import Stopwatch
from distrain.strategies.fsdp.flat_block import FlatBlock
from distrain.strategies.fsdp.sharded_update import ShardGroups


class ScatteredGradients:
    """The gradients of blocks: accumulated by the parameters, reduced into each rank's part, measured and clipped.

    All ranks make it together.

    Args:
        blocks: In the order in which their gradients are sent.
        groups: The ranks that share each block.
        stopwatch: Records exposed communication.
        pass_over: Called with a block that is sent after the backward pass, which this rank may not have run.
    """

    def __init__(
        self,
        blocks: Sequence[FlatBlock],
        groups: ShardGroups,
        stopwatch: Stopwatch,
        pass_over: Callable[[FlatBlock], None] = lambda _: None,
    ) -> None:
        self._all_blocks = blocks
        self._group, self._replicas, self._stopwatch = groups.gradients, groups.replicas, stopwatch
        self._pass_over = pass_over
        self._hooks: list[RemovableHandle] = []
        #: Blocks being sent, with what must be waited for first.
        self._under_way: list[tuple[FlatBlock, Pollable]] = []
        self._sums: list[Pending] = []
        self._sending = False
        # A group's first collective connects its ranks. In a backward pass, where ranks come to it at different moments
        # and may wait for each other in another group meanwhile, they would wait for ever.
        for each in (self._group, self._replicas):
            each.barrier()
        self.rebuild()

    def rebuild(self) -> None:
        """Makes room for the gradients of the blocks that are trained now; call it between steps only."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for block in self._all_blocks:
            block.gradient = None
        self._blocks = [block for block in self._all_blocks if block.is_trained]
        self._missing = [0] * len(self._blocks)
        self._next = 0
        for index, block in enumerate(self._blocks):
            assert block.part is not None
            block.gradient = torch.zeros_like(block.part)
            for parameter in block.parameters:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._ready_hook(index)))

    @property
    def buckets(self) -> Sequence[Bucket]:
        """None: the gradients are not compressed."""
        return ()

    @property
    def bytes_per_step(self) -> int:
        """Bytes that this rank sends to reduce all gradients once."""
        scattered = sum((self._group.size - 1) * block.part_bytes for block in self._blocks)
        return scattered + sum(ring_all_reduce_bytes(block.part_bytes, self._replicas.size) for block in self._blocks)

    def zero(self) -> None:
        """Starts a new sum; call before the first backward pass of a step."""
        for block in self._blocks:
            for parameter in block.parameters:
                parameter.grad = None

    def begin_last_backward(self) -> None:
        """Enables sending before the last backward pass of a step: each block is sent as soon as it is complete."""
        self._sending = True
        self._next = 0
        for index, block in enumerate(self._blocks):
            self._missing[index] = len(block.parameters)

    def finish(self) -> None:
        """Sends the rest (blocks with unused parameters, or of a rank without samples) and waits for all blocks."""
        with self._stopwatch.communication():
            while self._next < len(self._blocks):
                self._pass_over(self._blocks[self._next])
                self._send_next()
            while self._under_way:
                self._finish_oldest()
            for each in self._sums:
                each.wait()
            self._sums = []
        self._sending = False

    def norm(self) -> Tensor:
        """Euclidean norm over all gradients of all ranks, a scalar; all ranks of the shard group call it together."""
        gradients = [block.gradient for block in self._blocks if block.gradient is not None]
        if not gradients:
            return torch.zeros(())
        norms: list[Tensor] = [torch.linalg.vector_norm(gradient) for gradient in gradients]
        total: Tensor = torch.linalg.vector_norm(torch.stack(norms)).square()
        return self._group.all_reduce(total).sqrt()

    def scale(self, factor: Tensor) -> None:
        """Multiplies all gradients, in place, by a scalar."""
        for block in self._blocks:
            assert block.gradient is not None
            block.gradient.mul_(factor)

    def _ready_hook(self, index: int) -> Callable[[Tensor], None]:
        def hook(_: Tensor) -> None:
            if self._sending:
                self._missing[index] -= 1
                # In order, so that all ranks issue the same collectives whichever block is complete first.
                while self._next < len(self._blocks) and self._missing[self._next] == 0:
                    self._send_next()

        return hook

    @torch.no_grad()
    def _send_next(self) -> None:
        # Only those for which no rank has to be waited for: another rank may be waiting for this one meanwhile.
        while self._under_way and self._under_way[0][1].ready():
            self._finish_oldest()
        block = self._blocks[self._next]
        flat = block.new_flat()
        found: list[tuple[Tensor, Tensor]] = []
        for view, parameter in zip(block.views(flat), block.parameters, strict=True):
            if parameter.grad is None:
                view.zero_()
            else:
                found.append((view, parameter.grad))
                parameter.grad = None
        if found:
            torch_internals.foreach_copy([view for view, _ in found], [gradient for _, gradient in found])
        assert block.gradient is not None
        self._under_way.append((block, self._group.start_reduce_scatter(block.gradient, flat)))
        self._next += 1

    def _finish_oldest(self) -> None:
        block, pending = self._under_way.pop(0)
        pending.wait()
        if self._replicas.size > 1:
            assert block.gradient is not None
            self._sums.append(self._replicas.start_all_reduce(block.gradient))
