"""Collectives among ranks of several hosts, of which some have several ranks.

On each host the first rank, the leader, reduces the tensors of its neighbours through shared memory. The leaders
exchange the results over the network, and the other ranks read the final result from shared memory. So a host sends as
much as a single rank there would send; a ring through all ranks sends nearly twice as much for large hosts (Cho et al.
2019, "BlueConnect", section 3).

Leaders do this in a thread of their own, in the order in which the collectives were started. The exchange continues
while the host computes, and no rank has to wait for it.
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

from distrain.communication.shared_memory.channel import SharedMemoryChannel, copy_back, flattened
from distrain.communication.types import DONE, REDUCE_OPS, Pending, Pollable, Reduction

#: The dtypes that gloo can reduce.
_REDUCIBLE = frozenset(
    {
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
        torch.int64, torch.int32, torch.int8, torch.uint8,
    }
)  # fmt: skip


class LeaderGroup(Protocol):
    """The hosts' leaders as a group: the methods of :class:`torch.distributed.ProcessGroupGloo` that are used here."""

    def allreduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> Pending:
        """Reduces in place."""

    def broadcast(self, tensor: Tensor, root: int) -> Pending:
        """Copies the tensor of the group's rank ``root`` into ``tensor``."""

    def allgather(self, output_tensors: list[Tensor], input_tensor: Tensor) -> Pending:
        """Copies each rank's tensor into ``output_tensors[rank]``."""


class HostChannels(NamedTuple):
    """The channels among the ranks of one host that are in a group; rank 0 of each is the leader.

    There are two because the leader's thread sends the results later than the other ranks contribute.

    Attributes:
        to_leader: Carries the contributions of the other ranks to the leader.
        from_leader: Carries results from the leader to the other ranks.
    """

    to_leader: SharedMemoryChannel
    from_leader: SharedMemoryChannel


class _Job:
    """One collective for the leader's thread."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.work = work
        self._done = threading.Event()
        self._error: BaseException | None = None

    def end(self, error: BaseException | None) -> None:
        self._error = error
        self._done.set()

    def ready(self) -> bool:
        """Whether the thread has finished it."""
        return self._done.is_set()

    def wait(self) -> None:
        """Blocks until the tensor holds the result; raises the error that the thread met."""
        self._done.wait()
        if self._error is not None:
            raise self._error


class _WithLastStep:
    """A pending collective that is followed by work of the rank that waits for it."""

    def __init__(self, pending: Pollable, last_step: Callable[[], object]) -> None:
        self._pending = pending
        self._last_step: Callable[[], object] | None = last_step

    def wait(self) -> None:
        """Blocks until the tensor holds the result."""
        self._pending.wait()
        if self._last_step is not None:
            self._last_step()
            # Both may hold large tensors, and the caller may keep this object.
            self._pending, self._last_step = DONE, None

    def ready(self) -> bool:
        """Whether ``wait`` returns without waiting for other ranks."""
        return self._pending.ready()


class HierarchicalChannel:
    """The collectives of a group of ranks on several hosts.

    Args:
        rank: This rank's number in the group.
        layout: For each host, the numbers in the group of its ranks; the first is the host's leader.
        host_channels: The channels of this host; ``None`` if this rank is its only one.
        leaders: The leaders' group, in the order of ``layout``; ``None`` on all other ranks.
    """

    def __init__(
        self,
        rank: int,
        layout: Sequence[Sequence[int]],
        host_channels: HostChannels | None,
        leaders: LeaderGroup | None,
    ) -> None:
        self._rank = rank
        self._layout = layout
        self._host = next(index for index, ranks in enumerate(layout) if rank in ranks)
        self._host_channels = host_channels
        self._leaders = leaders
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        if leaders is not None:
            threading.Thread(target=self._run_jobs, name="distrain-host-leader", daemon=True).start()

    def close(self) -> None:
        """Allows no more collectives. Started ones still finish, if the other hosts finish them too."""
        if self._leaders is None:
            self._close_host_channels()
        else:
            # The thread that uses the channels closes them.
            self._jobs.put(None)

    # --- the collectives ---------------------------------------------------------------------------------------------

    def all_reduce(self, tensor: Tensor, reduction: Reduction) -> None:
        """Reduces ``tensor`` in place, host by host first, so rounding differs from a reduction in order of rank.

        Raises:
            RuntimeError: gloo can't reduce tensors of this dtype.
        """
        self.start_all_reduce(tensor, reduction).wait()

    def start_all_reduce(self, tensor: Tensor, reduction: Reduction) -> Pending:
        """Starts to reduce ``tensor`` in place; raises the same as :meth:`all_reduce`."""
        flat = flattened(tensor)
        pending = self._start_all_reduce(flat, reduction)
        return pending if tensor.is_contiguous() else _WithLastStep(pending, lambda: copy_back(flat, tensor))

    def start_reduce_scatter(self, into: Tensor, tensor: Tensor, reduction: Reduction) -> Pollable:
        """Starts to reduce ``tensor``, a part of ``into``'s size per rank, and write this rank's part to ``into``.

        Both are contiguous. Between hosts it sends as much as an all-reduce of ``tensor`` by the hosts' leaders. That
        is no more than a reduce-scatter among all ranks where hosts have two ranks or more.
        """
        whole, part = flattened(tensor).clone(), flattened(into)
        first = self._rank * part.numel()
        pending = self._start_all_reduce(whole, reduction)
        return _WithLastStep(pending, lambda: part.copy_(whole[first : first + part.numel()]))

    def _start_all_reduce(self, flat: Tensor, reduction: Reduction) -> Pollable:
        if flat.dtype not in _REDUCIBLE:
            # All ranks raise this before any of them starts, so none waits for another.
            dtype = str(flat.dtype).removeprefix("torch.")
            raise RuntimeError(f"gloo, which connects the hosts, can't reduce {dtype}")
        channels = self._host_channels
        if self._leaders is None:
            assert channels is not None, "a rank alone on its host is the leader"
            channels.to_leader.start_reduce(flat, reduction)
            return channels.from_leader.start_broadcast(flat, 0)
        return self._start(functools.partial(self._reduce, flat, reduction))

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Copies the tensor of the group's rank ``source`` into ``tensor``."""
        flat = flattened(tensor)
        work = functools.partial(self._broadcast, flat, source)
        if self._leaders is None:
            work()
        else:
            self._start(work).wait()
        copy_back(flat, tensor)

    def all_gather(self, gathered: Sequence[Tensor], tensor: Tensor) -> None:
        """Copies each rank's tensor into ``gathered[rank]`` (contiguous).

        Every host sends as much as the one with the most ranks.
        """
        self.start_all_gather(gathered, tensor).wait()

    def start_all_gather(self, gathered: Sequence[Tensor], tensor: Tensor) -> Pending:
        """Starts to copy each rank's tensor into ``gathered[rank]`` (contiguous)."""
        flat, channels = flattened(tensor), self._host_channels
        # As bytes, because gloo carries uint8 whatever the tensor's dtype.
        own = flat.view(torch.uint8)
        most_ranks = max(len(ranks) for ranks in self._layout)
        rows_of_hosts = own.new_empty(len(self._layout), most_ranks, own.numel())
        pending: Pollable
        if self._leaders is None:
            assert channels is not None, "a rank alone on its host is the leader"
            channels.to_leader.start_gather((), own)
            pending = channels.from_leader.start_broadcast(rows_of_hosts.view(-1), 0)
        else:
            pending = self._start(functools.partial(self._gather, rows_of_hosts, own))

        def copy_to_ranks() -> None:
            for rows, ranks in zip(rows_of_hosts, self._layout, strict=True):
                for row, rank in zip(rows, ranks, strict=False):
                    flattened(gathered[rank]).view(torch.uint8).copy_(row)

        return _WithLastStep(pending, copy_to_ranks)

    def barrier(self) -> None:
        """Waits until all ranks have called this."""
        self.all_reduce(torch.zeros(1), "sum")

    # --- the work of a leader's thread -------------------------------------------------------------------------------

    def _reduce(self, flat: Tensor, reduction: Reduction) -> None:
        channels = self._host_channels
        if channels is not None:
            channels.to_leader.start_reduce(flat, reduction).wait()
        self._leader_group.allreduce(flat, REDUCE_OPS[reduction]).wait()
        if channels is not None:
            channels.from_leader.start_broadcast(flat, 0).wait()

    def _broadcast(self, flat: Tensor, source: int) -> None:
        """The part of any rank in a broadcast; ranks that are no leaders run it in the calling thread."""
        channels = self._host_channels
        source_host = next(index for index, ranks in enumerate(self._layout) if source in ranks)
        if channels is not None and self._host == source_host:
            channels.from_leader.broadcast(flat, self._layout[source_host].index(source))
        if self._leaders is not None:
            self._leaders.broadcast(flat.view(torch.uint8), source_host).wait()
        if channels is not None and self._host != source_host:
            channels.from_leader.broadcast(flat, 0)

    def _gather(self, rows_of_hosts: Tensor, own: Tensor) -> None:
        channels, rows = self._host_channels, rows_of_hosts[self._host]
        if channels is not None:
            channels.to_leader.start_gather(list(rows[: len(self._layout[self._host])]), own).wait()
        else:
            rows[0].copy_(own)
        # A copy, because what is sent must not be a row of the result.
        self._leader_group.allgather(list(rows_of_hosts), rows.clone()).wait()
        if channels is not None:
            channels.from_leader.start_broadcast(rows_of_hosts.view(-1), 0).wait()

    def _start(self, work: Callable[[], None]) -> _Job:
        job = _Job(work)
        self._jobs.put(job)
        return job

    def _run_jobs(self) -> None:
        error: BaseException | None = None
        while (job := self._jobs.get()) is not None:
            if error is None:
                try:
                    # The caller may be in inference mode, and its tensors can't be written to outside of that mode.
                    with torch.inference_mode():
                        job.work()
                except BaseException as caught:
                    # The hosts may now be in different collectives, so all later ones fail with the same error, on this
                    # rank and on its neighbours.
                    error = caught
                    if self._host_channels is not None:
                        self._host_channels.from_leader.abort()
            job.end(error)
            # While the thread waits for the next job, it must not keep this one's tensors alive.
            del job
        self._close_host_channels()

    def _close_host_channels(self) -> None:
        for channel in self._host_channels or ():
            channel.close()

    @property
    def _leader_group(self) -> LeaderGroup:
        assert self._leaders is not None, "only leaders communicate with other hosts"
        return self._leaders
