"""The collectives that distrain uses, over an explicit group of ranks, with a count of all bytes sent.

A :class:`Communicator` of one rank needs no process group and sends nothing, so code written for many ranks runs
unchanged on one. Only tensors and JSON are exchanged. Nothing is pickled, so no peer's message can run code.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distrain.communication.shared_memory.channel import SharedMemoryChannel
from distrain.communication.shared_memory.connect import channel_registry
from distrain.communication.shared_memory.reduce import REDUCTIONS, reduce_alone
from distrain.communication.types import DONE, DTYPES, REDUCE_OPS, Channel, Pending, Pollable, Reduction

#: The dtypes that a channel carries.
_CHANNEL_DTYPES = frozenset(DTYPES.values())


class _BackendWork:
    """A collective started by the backend.

    Waiting passes through this module on purpose: :mod:`distrain.health.thread_stack` recognises a rank that waits for
    others by the modules on its stack.
    """

    def __init__(self, work: Pending) -> None:
        self._work = work

    def wait(self) -> object:
        return self._work.wait()


class _ScatteredWork:
    """A reduce-scatter started by the backend.

    Args:
        work: As returned by the backend.
        tensors: What must live until the work is done.
        last_step: Computes the result.
    """

    def __init__(self, work: dist.Work, tensors: object, last_step: Callable[[], None] | None = None) -> None:
        self._work: dist.Work | None = work
        self._tensors, self._last_step = tensors, last_step

    def wait(self) -> None:
        if self._work is not None:
            self._work.wait()
            if self._last_step is not None:
                self._last_step()
            # The caller may keep this object.
            self._work = self._tensors = self._last_step = None

    def ready(self) -> bool:
        return self._work is None or bool(self._work.is_completed())


class Ledger:
    """Bytes that this rank has sent, by kind of collective.

    The count follows the algorithms that are used among hosts of one rank each: a ring for all-reduce and all-gather, a
    binomial tree for broadcast, and in a reduce-scatter each rank's part sent to it directly. Headers are not counted.
    Bytes are counted whether or not two ranks share a host's memory, so that the figures of different placements of
    ranks can be compared.

    Attributes:
        sent: Bytes by kind of collective.
    """

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()

    def total(self) -> int:
        """Bytes that this rank has sent so far."""
        return sum(self.sent.values())


def ring_all_reduce_bytes(size: int, ranks: int) -> int:
    """Bytes that each rank sends in a ring all-reduce of ``size`` bytes: a reduce-scatter, then an all-gather."""
    return 2 * (ranks - 1) * size // ranks


def _tree_children(rank: int, source: int, ranks: int) -> int:
    """Number of ranks that ``rank`` sends to in a binomial-tree broadcast from ``source``."""
    virtual, children, step = (rank - source) % ranks, 0, 1
    while step < ranks:
        if virtual < step and virtual + step < ranks:
            children += 1
        step *= 2
    return children


class Communicator:
    """The collectives of one group of ranks.

    CPU tensors travel through shared memory among ranks of one host where that is possible; see
    :mod:`distrain.communication.shared_memory`. All other tensors use the group's backend.

    Args:
        group: The process group; ``None`` for a group of this rank alone.
        ledger: Counts the bytes; the communicators of one strategy share it.

    Attributes:
        group: As given.
        rank: This rank's number in the group.
        size: Number of ranks in the group.
        ledger: As given.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, ledger: Ledger | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1
        self.ledger = ledger if ledger is not None else Ledger()
        self._channel: Channel | None = None
        self._connected = self.size == 1

    def all_reduce(self, tensor: Tensor, reduction: Reduction = "sum") -> Tensor:
        """Reduces ``tensor`` over the group, in place, and returns it."""
        channel = self._channel_for(tensor)
        if channel is None:
            self.start_all_reduce(tensor, reduction).wait()
        else:
            self._count_all_reduce(tensor)
            channel.all_reduce(tensor, reduction)
        return tensor

    def start_all_reduce(self, tensor: Tensor, reduction: Reduction = "sum") -> Pending:
        """Starts an in-place all-reduce; the tensor must not be read or written until ``wait`` has returned."""
        if self.size == 1:
            return DONE
        self._count_all_reduce(tensor)
        channel = self._channel_for(tensor)
        if channel is not None:
            return channel.start_all_reduce(tensor, reduction)
        work: Pending = dist.all_reduce(tensor, op=REDUCE_OPS[reduction], group=self.group, async_op=True)
        return _BackendWork(work)

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Copies the tensor of the group's rank ``source`` into ``tensor`` on all ranks, and returns it."""
        if self.size == 1:
            return tensor
        sends = _tree_children(self.rank, source, self.size)
        self.ledger.sent["broadcast"] += sends * tensor.numel() * tensor.element_size()
        channel = self._channel_for(tensor)
        if channel is None:
            dist.broadcast(tensor, group=self.group, group_src=source)
        else:
            channel.broadcast(tensor, source)
        return tensor

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's ``tensor`` (all of one shape and dtype), in order of rank."""
        channel = self._channel_for(tensor)
        if channel is None:
            gathered, pending = self.start_all_gather(tensor)
            pending.wait()
        else:
            gathered = self._gather_buffers(tensor)
            channel.all_gather(gathered, tensor)
        return gathered

    def start_all_gather(self, tensor: Tensor) -> tuple[list[Tensor], Pending]:
        """Starts to gather every rank's ``tensor`` (all of one shape and dtype), which must not be changed meanwhile.

        Returns:
            Every rank's tensor, in order of rank, and the pending collective to wait for before they are read.
        """
        if self.size == 1:
            return [tensor], DONE
        gathered = self._gather_buffers(tensor)
        return gathered, self._start_all_gather(gathered, tensor)

    def start_all_gather_into(self, whole: Tensor, part: Tensor) -> Pending:
        """Starts to gather every rank's ``part`` into ``whole``, ``[size * len(part)]``, in order of rank.

        Args:
            whole: Contiguous. This rank's part of it may be ``part`` itself.
            part: Contiguous ``[n]``. It must not be changed meanwhile.
        """
        if self.size == 1:
            if whole.data_ptr() != part.data_ptr():
                whole.copy_(part)
            return DONE
        self._count_all_gather(part)
        return self._start_all_gather(list(whole.chunk(self.size)), part)

    def _start_all_gather(self, gathered: list[Tensor], tensor: Tensor) -> Pending:
        channel = self._channel_for(tensor)
        if channel is not None:
            return channel.start_all_gather(gathered, tensor)
        work: Pending = dist.all_gather(gathered, tensor, group=self.group, async_op=True)
        return _BackendWork(work)

    def reduce_scatter(self, tensor: Tensor, reduction: Reduction = "sum") -> Tensor:
        """Reduces ``tensor``, ``[size * n, ...]``, over the group and returns this rank's part of the result.

        Returns:
            Part number ``rank`` of the result, ``[n, ...]``; in a group of one rank ``tensor`` itself.

        Raises:
            ValueError: The first dimension is not divisible by ``size``.
        """
        if tensor.dim() == 0 or len(tensor) % self.size:
            raise ValueError(f"a tensor of shape {list(tensor.shape)} can't be cut in {self.size} equal parts")
        if self.size == 1:
            return tensor
        part = tensor.new_empty(len(tensor) // self.size, *tensor.shape[1:])
        self.start_reduce_scatter(part, tensor.contiguous(), reduction).wait()
        return part

    def start_reduce_scatter(self, into: Tensor, tensor: Tensor, reduction: Reduction = "sum") -> Pollable:
        """Starts to reduce ``tensor``, a part of ``into``'s size per rank, and write this rank's part to ``into``.

        Args:
            into: Contiguous; must not be read or written until ``wait`` has returned.
            tensor: Contiguous; must not be changed until ``wait`` has returned, which need not keep it alive.
            reduction: How the ranks' tensors are combined, element by element and in order of rank.
        """
        if self.size == 1:
            into.copy_(tensor.view_as(into))
            return DONE
        self.ledger.sent["reduce_scatter"] += (self.size - 1) * into.numel() * into.element_size()
        channel = self._channel_for(tensor)
        if channel is not None:
            return channel.start_reduce_scatter(into, tensor, reduction)
        if dist.get_backend(self.group) == "nccl":
            parts = list(tensor.view(-1).chunk(self.size))
            op = REDUCE_OPS[reduction]
            work = dist.reduce_scatter(into.view(-1), parts, op=op, group=self.group, async_op=True)
            return _ScatteredWork(work, tensor)
        # gloo's own reduce_scatter, in releases that have one, sends as much as an all-reduce. As bytes, because gloo
        # doesn't exchange every dtype.
        received = torch.empty_like(tensor)
        work = dist.all_to_all_single(
            received.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8), group=self.group, async_op=True
        )

        def reduce() -> None:
            reduce_alone(list(received.view(-1).chunk(self.size)), into.view(-1), REDUCTIONS[reduction])

        return _ScatteredWork(work, tensor, reduce)

    def start_send(self, tensor: Tensor, to: int, tag: int) -> Pending:
        """Starts sending ``tensor`` (contiguous) to the group's rank ``to``; keep it alive until ``wait`` has returned.

        The receiver must expect the same size and dtype: the backend doesn't check.
        """
        self.ledger.sent["send"] += tensor.numel() * tensor.element_size()
        work = dist.isend(tensor, group=self.group, tag=tag, group_dst=to)
        assert work is not None, "a rank outside the group sends"
        return _BackendWork(work)

    def start_receive(self, tensor: Tensor, source: int, tag: int) -> Pending:
        """Starts receiving into ``tensor`` (contiguous) what the group's rank ``source`` sends with the same tag."""
        work = dist.irecv(tensor, group=self.group, tag=tag, group_src=source)
        assert work is not None, "a rank outside the group receives"
        return _BackendWork(work)

    def all_gather_json(self, data: Mapping[str, Any], device: torch.device) -> list[dict[str, Any]]:
        """Every rank's ``data`` (anything that JSON can hold), in order of rank; exchanged by tensors on ``device``."""
        if self.size == 1:
            return [dict(data)]
        text = torch.frombuffer(bytearray(json.dumps(data).encode()), dtype=torch.uint8).to(device)
        lengths = torch.stack(self.all_gather(torch.tensor(len(text), device=device))).tolist()
        padded = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
        padded[: len(text)] = text
        gathered = self.all_gather(padded)
        return [json.loads(bytes(row[:length].tolist())) for row, length in zip(gathered, lengths, strict=True)]

    def merge_tensors(self, tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """The union of all ranks' named tensors, on all ranks.

        Args:
            tensors: This rank's tensors. If several ranks hold a name, the first rank's tensor is taken.
            device: Device of the result.

        Raises:
            ValueError: A rank offers a tensor of an unknown dtype.
        """
        if self.size == 1:
            return dict(tensors)
        offered = self.all_gather_json(
            {name: [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")] for name, tensor in tensors.items()},
            device,
        )
        merged: dict[str, Tensor] = {}
        for rank, entries in enumerate(offered):
            for name, (shape, dtype) in entries.items():
                if name not in merged:
                    if dtype not in DTYPES:
                        raise ValueError(f"rank {rank} offers {name} with dtype {dtype!r}, which is unknown")
                    tensor = torch.empty(shape, dtype=DTYPES[dtype], device=device)
                    if rank == self.rank:
                        tensor.copy_(tensors[name])
                    merged[name] = self.broadcast(tensor, rank)
        return merged

    def all_gather_tensors(self, tensors: Mapping[str, Tensor], device: torch.device) -> list[dict[str, Tensor]]:
        """Every rank's named tensors, in order of rank; names, shapes and dtypes may differ from rank to rank.

        Args:
            tensors: This rank's tensors.
            device: Device of the exchange and of the result.

        Raises:
            ValueError: A rank offers a tensor of an unknown dtype.
        """
        if self.size == 1:
            return [dict(tensors)]
        layout = {
            name: [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")] for name, tensor in tensors.items()
        }
        layouts = self.all_gather_json(layout, device)
        for rank, entries in enumerate(layouts):
            for name, (_, dtype) in entries.items():
                if dtype not in DTYPES:
                    raise ValueError(f"rank {rank} offers {name} with dtype {dtype!r}, which is unknown")
        sizes = [[math.prod(shape) * DTYPES[dtype].itemsize for shape, dtype in each.values()] for each in layouts]
        padded = torch.zeros(max(1, *map(sum, sizes)), dtype=torch.uint8, device=device)
        start = 0
        for tensor in tensors.values():
            data = tensor.detach().to(device).contiguous().reshape(-1).view(torch.uint8)
            padded[start : start + len(data)] = data
            start += len(data)
        found = []
        for row, entries, lengths in zip(self.all_gather(padded), layouts, sizes, strict=True):
            parts = row[: sum(lengths)].split(lengths)
            # A copy each: a tensor of eight bytes can't begin at any byte.
            found.append(
                {
                    name: part.clone().view(DTYPES[dtype]).view(shape)
                    for (name, (shape, dtype)), part in zip(entries.items(), parts, strict=True)
                }
            )
        return found

    def barrier(self) -> None:
        """Waits until all ranks of the group have called this."""
        channel = self._channel_for(None)
        if channel is not None:
            channel.barrier()
        elif self.size > 1:
            dist.barrier(group=self.group)

    def _count_all_reduce(self, tensor: Tensor) -> None:
        self.ledger.sent["all_reduce"] += ring_all_reduce_bytes(tensor.numel() * tensor.element_size(), self.size)

    def _count_all_gather(self, tensor: Tensor) -> None:
        self.ledger.sent["all_gather"] += (self.size - 1) * tensor.numel() * tensor.element_size()

    def _gather_buffers(self, tensor: Tensor) -> list[Tensor]:
        self._count_all_gather(tensor)
        return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]

    def medium(self, tensor: Tensor) -> str:
        """What carries a tensor of a group of several ranks, in words; a group's first call is a collective."""
        backend = str(dist.get_backend(self.group))
        channel = self._channel_for(tensor)
        if channel is None:
            return backend
        if isinstance(channel, SharedMemoryChannel):
            return "shared memory"
        return f"shared memory within hosts, {backend} between them"

    def _channel_for(self, tensor: Tensor | None) -> Channel | None:
        """The channel that replaces the backend for a tensor, or ``None``; a group's first call is a collective."""
        if tensor is not None and (tensor.device.type != "cpu" or tensor.dtype not in _CHANNEL_DTYPES):
            return None
        if not self._connected:
            self._connected = True
            assert self.group is not None, "a group of one rank needs no channel"
            # To connect, the ranks exchange data by the backend; a communicator of its own leaves that uncounted.
            by_backend = Communicator(self.group)
            by_backend._connected = True
            cpu = torch.device("cpu")
            self._channel = channel_registry.get_or_connect(
                self.group, lambda data: by_backend.all_gather_json(data, cpu)
            )
        return self._channel


def digest(tensors: Iterable[Tensor]) -> Tensor:
    """A 63-bit hash of the tensors' bits as an int64 scalar on the CPU; ranks compare it to compare the tensors."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return torch.tensor(int.from_bytes(total.digest()[:8], "little") >> 1, dtype=torch.int64)
