"""Collectives among the ranks of one host through shared memory.

Each rank writes only into its own arena and reads the arenas of the others. To start a collective, a rank copies its
tensor into a slot and announces it; this never waits. To finish it, the rank waits until the others have announced
theirs and reduces all slots, in order of rank, straight into the tensor. So every rank gets the same bits, and needs no
more of the others than that they start the same collectives in the same order. A slot is free again when all ranks have
finished its collective. A rank that only contributes, like most ranks in a reduction to the first rank, never waits.

Calls that start and wait at once send long tensors in parts, so that a part is still in a cache when it is read.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from distrain.communication.shared_memory.arena import Arena, MappedArena, Slot
from distrain.communication.shared_memory.control_block import ABORTED, ENTRIES, FINISHED, ControlBlock, Entry
from distrain.communication.shared_memory.peer import Peer
from distrain.communication.shared_memory.reduce import (
    REDUCTIONS,
    PublishedSegment,
    reduce_alone,
    reduce_together,
    segment_size,
)
from distrain.communication.types import DTYPES, RankName, Reduction

#: Bytes of a part of a long tensor.
_PART_BYTES = 1 << 20
#: More than two ranks share the work of reducing a tensor that is longer than this many bytes.
_REDUCE_TOGETHER_BYTES = 1 << 19
#: Bytes before a message that is reduced together; their first word counts the pieces that are ready.
_READY_BYTES = 64
#: Parts that the source of a broadcast may be ahead of its readers.
_MAX_PARTS_AHEAD = 4

_KINDS = ("all_reduce", "broadcast", "all_gather", "barrier", "reduce_scatter", "reduce", "gather")
_REDUCTION_NAMES = tuple(REDUCTIONS)
#: Computes the result of a started collective, given this rank's entry.
_Finish = Callable[[Entry], None]
_DTYPES = tuple(DTYPES.values())
_DTYPE_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}


@functools.cache
def _code(kind: str, dtype: torch.dtype = torch.uint8, detail: int = 0) -> int:
    """Encodes an operation in a number; the detail is the reduction or the source."""
    return _KINDS.index(kind) | _DTYPE_CODES[dtype] << 8 | detail << 16


def _describe(entry: Entry) -> str:
    """The operation that an entry encodes, for messages."""
    kind, dtype, detail = _KINDS[entry.code & 0xFF], _DTYPES[entry.code >> 8 & 0xFF], entry.code >> 16
    if kind == "barrier":
        return kind
    suffix = ""
    if kind == "broadcast":
        suffix = f" from rank {detail} of the group"
    elif "reduce" in kind:
        suffix = f" ({_REDUCTION_NAMES[detail % 3]})"
    count = entry.size // dtype.itemsize
    return f"{kind}{suffix} of {count} {str(dtype).removeprefix('torch.')}"


class Operation:
    """A started collective.

    Attributes:
        entry: What this rank has announced.
        awaited: The peers that must have started it before it can be finished.
        finish: Computes the result when they have, given ``entry``.
    """

    __slots__ = ("_channel", "_number", "awaited", "entry", "finish")

    def __init__(
        self,
        channel: SharedMemoryChannel,
        number: int,
        entry: Entry,
        awaited: Sequence[Peer],
        finish: _Finish,
    ) -> None:
        self._channel = channel
        self._number = number
        self.entry = entry
        self.awaited = awaited
        self.finish = finish

    def wait(self) -> None:
        """Blocks until the tensor holds the result.

        Raises:
            PeerLost: A peer's process has ended.
            torch.distributed.DistError: A peer did not start it within the group's timeout, or has aborted.
            RuntimeError: A peer has started another collective.
        """
        self._channel.finish(self._number)

    def ready(self) -> bool:
        """Whether all peers have started it, and so all earlier collectives too."""
        return all(peer.has_started(self._number) for peer in self.awaited)


class SharedMemoryChannel:
    """The collectives of one group whose ranks are all on this host.

    All ranks start the same collectives in the same order by the same calls, each from one thread at a time. Tensors
    are on the CPU, of the types in :data:`~distrain.communication.types.DTYPES` and of any layout.

    Args:
        rank: This rank's number in the group.
        name: This rank's name for messages.
        arena: This rank's arena.
        peers: All other ranks, by their number in the group.
    """

    def __init__(self, rank: int, name: RankName, arena: Arena, peers: dict[int, Peer]) -> None:
        self._rank = rank
        self._name = name
        self._arena = arena
        self._control_block = ControlBlock(arena.words)
        self._peers = peers
        self._all_peers = tuple(peer for _, peer in sorted(peers.items()))
        self._arenas: list[MappedArena] = [peer.arena for peer in self._all_peers]
        self._arenas.insert(rank, arena)
        self._started = self._finished = 0
        self._pending: deque[Operation] = deque()
        self._used_slots: deque[tuple[int, Slot]] = deque()

    def abort(self) -> None:
        """Tells the peers that this rank takes part in no further collective; those that wait for it raise an error."""
        self._control_block.words[ABORTED] = 1

    def close(self) -> None:
        """Closes this rank's arena. Peers that have mapped it can still read it."""
        self._arena.close()

    # --- the collectives ---------------------------------------------------------------------------------------------

    def all_reduce(self, tensor: Tensor, reduction: Reduction) -> None:
        """Reduces ``tensor`` in place."""
        if len(self._arenas) > 2:
            # More than two ranks share the work, for which the tensor is not sent in parts.
            self.start_all_reduce(tensor, reduction).wait()
            return
        flat = flattened(tensor)
        _wait_one_behind(self._start_all_reduce(part, reduction) for part in _parts(flat))
        copy_back(flat, tensor)

    def start_all_reduce(self, tensor: Tensor, reduction: Reduction) -> Operation:
        """Starts to reduce ``tensor`` in place."""
        flat = flattened(tensor)
        operation = self._start_all_reduce(flat, reduction)
        if not tensor.is_contiguous():
            reduce = operation.finish

            def finish(own: Entry) -> None:
                reduce(own)
                copy_back(flat, tensor)

            operation.finish = finish
        return operation

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Copies the tensor of the group's rank ``source`` into ``tensor``."""
        flat = flattened(tensor)
        for index, part in enumerate(_parts(flat)):
            code, size = _code("broadcast", part.dtype, source), part.numel() * part.itemsize
            if source == self._rank:
                number = self._started
                self._contribute(code, size, part)
                if index >= _MAX_PARTS_AHEAD:
                    for peer in self._all_peers:
                        peer.await_finish(number - _MAX_PARTS_AHEAD)
            else:
                self._start_receive(code, size, part, source).wait()
        copy_back(flat, tensor)

    def start_broadcast(self, tensor: Tensor, source: int) -> Operation:
        """Starts to broadcast a contiguous tensor; the source copies it into its arena and need not wait."""
        flat = flattened(tensor)
        code, size = _code("broadcast", flat.dtype, source), flat.numel() * flat.itemsize
        if source != self._rank:
            return self._start_receive(code, size, flat, source)
        return self._contribute(code, size, flat)

    def start_reduce(self, tensor: Tensor, reduction: Reduction) -> Operation:
        """Starts to reduce into the (contiguous) tensor of the group's rank 0; the others need not wait."""
        flat, number = flattened(tensor), self._started
        dtype, count = flat.dtype, flat.numel()
        code = _code("reduce", dtype, _REDUCTION_NAMES.index(reduction))
        if self._rank:
            return self._contribute(code, count * dtype.itemsize, flat)

        def finish(_: Entry) -> None:
            if count:
                others = [peer.arena.views.at(peer.offset(number), dtype, count) for peer in self._all_peers]
                reduce_alone([flat, *others], flat, REDUCTIONS[reduction])

        return self._start(code, count * dtype.itemsize, None, self._all_peers, finish)

    def start_gather(self, rows: Sequence[Tensor], tensor: Tensor) -> Operation:
        """Starts to copy every rank's tensor into rank 0's ``rows`` (contiguous); the others need not wait."""
        flat = flattened(tensor)
        if self._rank:
            return self._contribute(_code("gather", flat.dtype), flat.numel() * flat.itemsize, flat)
        rows[0].copy_(flat)
        return self._start_copying("gather", rows, flat, None)

    def start_reduce_scatter(self, into: Tensor, tensor: Tensor, reduction: Reduction) -> Operation:
        """Starts to reduce ``tensor``, a part of ``into``'s size per rank, and write this rank's part to ``into``.

        Both are contiguous. ``tensor`` may be changed as soon as this returns.
        """
        flat, part, number = flattened(tensor), flattened(into), self._started
        dtype, count = flat.dtype, part.numel()
        code = _code("reduce_scatter", dtype, _REDUCTION_NAMES.index(reduction))
        first = self._rank * count * dtype.itemsize

        def finish(own: Entry) -> None:
            if count:
                messages = self._messages(number, own)
                sources = [arena.views.at(offset + first, dtype, count) for arena, offset in messages]
                reduce_alone(sources, part, REDUCTIONS[reduction])

        return self._start(code, flat.numel() * dtype.itemsize, flat, self._all_peers, finish)

    def all_gather(self, gathered: Sequence[Tensor], tensor: Tensor) -> None:
        """Copies each rank's tensor into ``gathered[rank]`` (contiguous)."""
        rows = zip(*(_parts(flattened(row)) for row in gathered), strict=True)
        parts = zip(_parts(flattened(tensor)), rows, strict=True)
        _wait_one_behind(self._start_all_gather(row, part) for part, row in parts)

    def start_all_gather(self, gathered: Sequence[Tensor], tensor: Tensor) -> Operation:
        """Starts to copy each rank's tensor into ``gathered[rank]`` (contiguous)."""
        return self._start_all_gather([flattened(row) for row in gathered], flattened(tensor))

    def barrier(self) -> None:
        """Waits until all ranks have called this."""
        self._start(_code("barrier"), 0, None, self._all_peers, _nothing).wait()

    # --- implementation ----------------------------------------------------------------------------------------------

    def _start_all_reduce(self, flat: Tensor, reduction: str) -> Operation:
        dtype, count = flat.dtype, flat.numel()
        code = _code("all_reduce", dtype, _REDUCTION_NAMES.index(reduction))
        number, rank = self._started, self._rank
        size, ranks = count * dtype.itemsize, len(self._arenas)
        together = ranks > 2 and size > _REDUCE_TOGETHER_BYTES
        segment_bytes = _padded(segment_size(count, ranks) * dtype.itemsize) if together else 0
        reduce = REDUCTIONS[reduction]

        def finish(own: Entry) -> None:
            if count == 0:
                return
            messages = self._messages(number, own)
            sources = [arena.views.at(offset, dtype, count) for arena, offset in messages]
            # The first operation overwrites the tensor, so ranks after the first two must read their message instead.
            if rank < 2:
                sources[rank] = flat
            if segment_bytes:
                segment = segment_size(count, len(messages))
                published = [
                    PublishedSegment(
                        arena.words,
                        offset // 8 - _READY_BYTES // 8,
                        arena.views.at(offset + _padded(size), dtype, segment),
                    )
                    for arena, offset in messages
                ]
                reduce_together(sources, flat, reduce, rank, published)
            else:
                reduce_alone(sources, flat, reduce)

        return self._start(code, size, flat, self._all_peers, finish, segment_bytes)

    def _start_receive(self, code: int, size: int, flat: Tensor, source: int) -> Operation:
        number, peer, count = self._started, self._peers[source], flat.numel()

        def finish(_: Entry) -> None:
            if count:
                flat.copy_(peer.arena.views.at(peer.offset(number), flat.dtype, count))

        return self._start(code, size, None, (peer,), finish)

    def _start_all_gather(self, gathered: Sequence[Tensor], flat: Tensor) -> Operation:
        gathered[self._rank].copy_(flat)
        return self._start_copying("all_gather", gathered, flat, flat)

    def _start_copying(self, kind: str, rows: Sequence[Tensor], like: Tensor, message: Tensor | None) -> Operation:
        """Starts to copy every peer's message into the row at its place."""
        number, dtype, count = self._started, like.dtype, like.numel()

        def finish(_: Entry) -> None:
            if count:
                for rank, peer in self._peers.items():
                    rows[rank].copy_(peer.arena.views.at(peer.offset(number), dtype, count))

        return self._start(_code(kind, dtype), count * dtype.itemsize, message, self._all_peers, finish)

    def _messages(self, number: int, own: Entry) -> list[tuple[MappedArena, int]]:
        """Arena and offset of each rank's message to a collective that all ranks have started."""
        offsets = [peer.offset(number) for peer in self._all_peers]
        offsets.insert(self._rank, own.offset)
        return list(zip(self._arenas, offsets, strict=True))

    def _contribute(self, code: int, size: int, message: Tensor) -> Operation:
        """Publishes a message for other ranks without waiting for them."""
        operation = self._start(code, size, message, (), _nothing)
        operation.wait()
        return operation

    def _start(
        self,
        code: int,
        size: int,
        message: Tensor | None,
        awaited: Sequence[Peer],
        finish: _Finish,
        segment_bytes: int = 0,
    ) -> Operation:
        """Announces a collective and publishes this rank's message to it.

        Args:
            code: The operation; see :func:`_code`.
            size: Bytes of each rank's tensor; ranks compare it to detect that their collectives differ.
            message: This rank's message; ``None`` if it contributes nothing.
            awaited: The peers that must have started the collective before it can be finished.
            finish: Computes the result. It must not refer to the operation that this returns: such a cycle would keep
                the tensors alive until the garbage collector runs, and that may be in any thread.
            segment_bytes: Bytes after the message for the segment of the result that this rank publishes. If they are
                not 0, a word before the message counts its pieces that are ready.
        """
        number = self._started
        if number >= ENTRIES:
            self._await_entry(number - ENTRIES)
        self._free_slots()
        entry = Entry(code, size)
        if message is not None and size:
            slot = self._arena.allocate(_READY_BYTES + _padded(size) + segment_bytes if segment_bytes else size)
            offset = slot.offset + _READY_BYTES if segment_bytes else slot.offset
            if segment_bytes:
                self._arena.words[slot.offset // 8] = 0
            self._arena.views.at(offset, message.dtype, message.numel()).copy_(message)
            entry = Entry(code, size, offset)
            self._used_slots.append((number, slot))
        self._control_block.announce(number, entry)
        self._started += 1
        operation = Operation(self, number, entry, awaited, finish)
        self._pending.append(operation)
        return operation

    def _await_entry(self, number: int) -> None:
        """Waits until all ranks have finished collective ``number``, so that its entry can be reused."""
        self.finish(number)
        for peer in self._all_peers:
            peer.await_finish(number)

    def _free_slots(self) -> None:
        """Frees the slots of all collectives that every rank has finished."""
        if self._used_slots:
            finished = min(self._finished, *[peer.finished for peer in self._all_peers])
            while self._used_slots and self._used_slots[0][0] < finished:
                self._arena.free(self._used_slots.popleft()[1])

    def finish(self, number: int) -> None:
        """Finishes all collectives up to ``number``, in the order in which they were started."""
        while self._finished <= number:
            operation, oldest = self._pending[0], self._finished
            for peer in operation.awaited:
                peer.await_start(oldest)
                if not peer.matches(oldest, operation.entry):
                    raise RuntimeError(
                        "ranks of one group are in different collectives: "
                        f"{self._name} in {_describe(operation.entry)}, {peer.name} in {_describe(peer.entry(oldest))}"
                    )
            operation.finish(operation.entry)
            self._pending.popleft()
            self._finished += 1
            self._control_block.words[FINISHED] = self._finished


def _nothing(_: Entry) -> None:
    return


def _wait_one_behind(operations: Iterable[Operation]) -> None:
    """Finishes each operation after starting the next, which peers then find started when they finish this one."""
    previous: Operation | None = None
    for operation in operations:
        if previous is not None:
            previous.wait()
        previous = operation
    assert previous is not None, "there is always one part"
    previous.wait()


def _padded(size: int) -> int:
    """Rounds bytes up to whole cache lines."""
    return -(-size // 64) * 64


def flattened(tensor: Tensor) -> Tensor:
    """A tensor's elements as ``[numel]``: a view, or a copy if the tensor is not contiguous."""
    detached = tensor.detach()
    return detached.view(-1) if detached.is_contiguous() else detached.contiguous().view(-1)


def copy_back(flat: Tensor, tensor: Tensor) -> None:
    """Copies the result of :func:`flattened` into the tensor, if it is a copy."""
    if not tensor.is_contiguous():
        tensor.detach().copy_(flat.view(tensor.shape))


def _parts(flat: Tensor) -> Sequence[Tensor]:
    """A flat tensor cut into parts if it is long."""
    if flat.numel() * flat.itemsize <= 2 * _PART_BYTES:
        return (flat,)
    parts: Sequence[Tensor] = flat.split(_PART_BYTES // flat.itemsize)
    return parts
