"""Collectives among ranks of several hosts, some of which have several of them.

On each host the first rank adds up in memory what its neighbours have, the first ranks exchange the sums over the
network, and each neighbour takes the result from memory. What a host sends is what a single rank there would send; a
ring through all of the ranks sends nearly twice as much for large hosts (Cho et al. 2019, "BlueConnect", section 3).

The first ranks do so in a thread of their own, in the order in which the collectives were started: the exchange goes on
while the host computes, and needs none of its ranks to wait.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from distrain.communication.shared_memory.channel import SharedMemoryChannel, flattened, put_back
from distrain.communication.types import DONE, REDUCE_OPS, Pending, Reduction

#: What gloo reduces.
_REDUCED = frozenset(
    {
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
        torch.int64, torch.int32, torch.int8, torch.uint8,
    }
)  # fmt: skip


class Network(Protocol):
    """What the first ranks talk by: :class:`torch.distributed.ProcessGroupGloo`, as far as it is used."""

    def allreduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> Pending:
        """Reduces in place."""

    def broadcast(self, tensor: Tensor, root: int) -> Pending:
        """Copies from one rank in place."""

    def allgather(self, output_tensors: list[Tensor], input_tensor: Tensor) -> Pending:
        """Copies every rank's tensor to the one at its place."""


class Neighbours(NamedTuple):
    """The ranks of one host that are in a group, as they talk to each other.

    Attributes:
        up: Brings to the host's first rank what the others give.
        down: Brings back what is for all; apart, since the first rank gets there later than the others.
    """

    up: SharedMemoryChannel
    down: SharedMemoryChannel


class _Job:
    """What the thread of a host's first rank does for one collective."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.work = work
        self._over = threading.Event()
        self._error: BaseException | None = None

    def end(self, error: BaseException | None) -> None:
        self._error = error
        self._over.set()

    def wait(self) -> None:
        """Blocks until the tensor holds the result; raises what went wrong."""
        self._over.wait()
        if self._error is not None:
            raise self._error


class _Then:
    """A collective that ends with work of the rank that waits for it."""

    def __init__(self, pending: Pending, then: Callable[[], None]) -> None:
        self._pending = pending
        self._then: Callable[[], None] | None = then

    def wait(self) -> None:
        """Blocks until the tensor holds the result."""
        self._pending.wait()
        if self._then is not None:
            self._then()
            # What they hold may be large, and whoever waited may keep this.
            self._pending, self._then = DONE, None


class HierarchicalChannel:
    """The collectives of a group of ranks on several hosts.

    Args:
        rank: This one's place in the group.
        layout: The places in the group of each host's ranks; the first is the one that talks to other hosts.
        neighbours: Those of this host; ``None`` where this rank is its only one.
        network: Of the hosts' first ranks, in the order of ``layout``; ``None`` on the other ranks.
    """

    def __init__(
        self,
        rank: int,
        layout: Sequence[Sequence[int]],
        neighbours: Neighbours | None,
        network: Network | None,
    ) -> None:
        self._rank = rank
        self._layout = layout
        self._host = next(index for index, ranks in enumerate(layout) if rank in ranks)
        self._neighbours = neighbours
        self._network = network
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        if network is not None:
            threading.Thread(target=self._serve, name="distrain-hosts", daemon=True).start()

    def close(self) -> None:
        """No more collectives: what was started is finished if the other hosts do so too."""
        if self._network is None:
            self._close_channels()
        else:
            # The thread that uses them closes them.
            self._jobs.put(None)

    # --- the collectives ---------------------------------------------------------------------------------------------

    def all_reduce(self, tensor: Tensor, reduction: Reduction) -> None:
        """Reduces in place; by host first, so that sums are rounded otherwise than in order of rank.

        Raises:
            RuntimeError: The network can't reduce tensors of this type.
        """
        self.start_all_reduce(tensor, reduction).wait()

    def start_all_reduce(self, tensor: Tensor, reduction: Reduction) -> Pending:
        """Starts to do so."""
        if tensor.dtype not in _REDUCED:
            # Said by all ranks before any of them starts, or the others would wait for those that can't go on.
            raise RuntimeError(f"gloo, by which hosts talk, reduces no {str(tensor.dtype).removeprefix('torch.')}")
        flat, near = flattened(tensor), self._neighbours
        pending: Pending
        if self._network is None:
            assert near is not None, "every rank alone on its host is the first"
            near.up.start_reduce(flat, reduction)
            pending = near.down.start_broadcast(flat, 0)
        else:
            pending = self._start(functools.partial(self._reduce, flat, reduction))
        return pending if tensor.is_contiguous() else _Then(pending, lambda: put_back(flat, tensor))

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Copies from the group's rank ``source`` in place."""
        flat = flattened(tensor)
        work = functools.partial(self._spread, flat, source)
        if self._network is None:
            work()
        else:
            self._start(work).wait()
        put_back(flat, tensor)

    def all_gather(self, gathered: Sequence[Tensor], tensor: Tensor) -> None:
        """Copies every rank's tensor into the (contiguous) one at its place in ``gathered``.

        Every host sends as much as the one with the most ranks.
        """
        self.start_all_gather(gathered, tensor).wait()

    def start_all_gather(self, gathered: Sequence[Tensor], tensor: Tensor) -> Pending:
        """Starts to do the same."""
        flat, near = flattened(tensor), self._neighbours
        # Bytes, which the network carries of every type.
        mine = flat.view(torch.uint8)
        most = max(len(ranks) for ranks in self._layout)
        everything = mine.new_empty(len(self._layout), most, mine.numel())
        pending: Pending
        if self._network is None:
            assert near is not None, "every rank alone on its host is the first"
            near.up.start_gather((), mine)
            pending = near.down.start_broadcast(everything.view(-1), 0)
        else:
            pending = self._start(functools.partial(self._collect, everything, mine))

        def sort() -> None:
            for rows, ranks in zip(everything, self._layout, strict=True):
                for row, rank in zip(rows, ranks, strict=False):
                    flattened(gathered[rank]).view(torch.uint8).copy_(row)

        return _Then(pending, sort)

    def barrier(self) -> None:
        """Waits until all ranks are here."""
        self.all_reduce(torch.zeros(1), "sum")

    # --- what a host's first rank does, in its thread ----------------------------------------------------------------

    def _reduce(self, flat: Tensor, reduction: Reduction) -> None:
        near = self._neighbours
        if near is not None:
            near.up.start_reduce(flat, reduction).wait()
        self._far.allreduce(flat, REDUCE_OPS[reduction]).wait()
        if near is not None:
            near.down.start_broadcast(flat, 0).wait()

    def _spread(self, flat: Tensor, source: int) -> None:
        """What every rank does in a broadcast."""
        near, home = self._neighbours, next(index for index, ranks in enumerate(self._layout) if source in ranks)
        if near is not None and self._host == home:
            near.down.broadcast(flat, self._layout[home].index(source))
        if self._network is not None:
            self._network.broadcast(flat.view(torch.uint8), home).wait()
        if near is not None and self._host != home:
            near.down.broadcast(flat, 0)

    def _collect(self, everything: Tensor, mine: Tensor) -> None:
        near, rows = self._neighbours, everything[self._host]
        if near is not None:
            near.up.start_gather(list(rows[: len(self._layout[self._host])]), mine).wait()
        else:
            rows[0].copy_(mine)
        # A row of the result itself may not be what is sent.
        self._far.allgather(list(everything), rows.clone()).wait()
        if near is not None:
            near.down.start_broadcast(everything.view(-1), 0).wait()

    def _start(self, work: Callable[[], None]) -> _Job:
        job = _Job(work)
        self._jobs.put(job)
        return job

    def _serve(self) -> None:
        error: BaseException | None = None
        while (job := self._jobs.get()) is not None:
            if error is None:
                try:
                    # The thread that started it may be in this mode, whose tensors can't be written to from outside.
                    with torch.inference_mode():
                        job.work()
                except BaseException as caught:
                    # The hosts are in different places now: whatever comes later fails as this did, here and there.
                    error = caught
                    if self._neighbours is not None:
                        self._neighbours.down.give_up()
            job.end(error)
            # Nothing that it holds is kept until there is another one.
            del job
        self._close_channels()

    def _close_channels(self) -> None:
        for channel in self._neighbours or ():
            channel.close()

    @property
    def _far(self) -> Network:
        assert self._network is not None, "only a host's first rank talks to the others"
        return self._network
