"""Types that all collectives share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

Reduction = Literal["sum", "max", "min"]
#: The backends' names of the reductions.
REDUCE_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
#: The dtypes that collectives carry, by name; a peer's message may name no other.
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip


@dataclass(frozen=True)
class RankName:
    """A rank as messages name it.

    Attributes:
        rank: Its number among all ranks of the job.
        host: Name of its host.
    """

    rank: int
    host: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


class Pending(Protocol):
    """A started collective; wait for it before its tensor is read."""

    def wait(self) -> object:
        """Blocks until done; on a GPU only the current stream waits."""


class Pollable(Pending, Protocol):
    """A started collective that can be asked whether waiting for it would block."""

    def ready(self) -> bool:
        """Whether ``wait`` returns without waiting for other ranks."""


class _Done:
    def wait(self) -> None:
        return

    def ready(self) -> bool:
        return True


#: A collective that is complete already.
DONE: Pollable = _Done()


class Channel(Protocol):
    """The collectives of one group of ranks by other means than the group's backend.

    Tensors are on the CPU, of the types in :data:`DTYPES` and of any layout. All ranks start the same collectives in
    the same order.
    """

    def all_reduce(self, tensor: Tensor, reduction: Reduction) -> None:
        """Reduces ``tensor`` in place."""

    def start_all_reduce(self, tensor: Tensor, reduction: Reduction) -> Pending:
        """Starts to reduce ``tensor`` in place."""

    def start_reduce_scatter(self, into: Tensor, tensor: Tensor, reduction: Reduction) -> Pollable:
        """Starts to reduce ``tensor``, a contiguous part of ``into``'s size per rank, and write this rank's part."""

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Copies the tensor of the group's rank ``source`` into ``tensor``."""

    def all_gather(self, gathered: Sequence[Tensor], tensor: Tensor) -> None:
        """Copies each rank's tensor into ``gathered[rank]`` (contiguous)."""

    def start_all_gather(self, gathered: Sequence[Tensor], tensor: Tensor) -> Pending:
        """Starts to copy each rank's tensor into ``gathered[rank]`` (contiguous)."""

    def barrier(self) -> None:
        """Waits until all ranks have called this."""

    def close(self) -> None:
        """Releases what the channel holds; pending collectives of other ranks may still use it."""
