"""Collectives among ranks of one host through memory that they share.

Each rank writes into memory of its own and reads its peers'. To start a collective is to copy the tensor into a slot
and to announce it; that never waits. To wait for it is to wait until the peers have announced theirs, and to add up all
slots, in order of rank, straight into the tensor: every rank gets the same bits, and needs of its peers no more than
that they start the same collectives in the same order. A slot is free again once all ranks have finished what it was
for.

Where a call starts and waits at once, long tensors travel in parts, so that what one rank wrote is still in a cache
when the other reads it.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from distrain.shared_memory.arena import Arena, Memory, Slot
from distrain.shared_memory.board import ENTRIES, FINISHED, Board, Entry
from distrain.shared_memory.peers import Peer, Who
from distrain.shared_memory.reducing import Offer, add_up_alone, add_up_together, share_size

#: Bytes of a part of a long tensor.
_PART = 1 << 20
#: More than two ranks compute what is longer together.
_TOGETHER = 1 << 19
#: Bytes before a message whose sum is computed together: its first word counts what is ready.
_FLAG = 64
#: Parts that a source may be ahead of who reads them.
_AHEAD = 4

_KINDS = ("all_reduce", "broadcast", "all_gather", "barrier")
_REDUCTIONS: dict[str, Callable[..., Tensor]] = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}
_REDUCTION_NAMES = tuple(_REDUCTIONS)
_DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
_DTYPE_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}


@functools.cache
def _code(kind: str, dtype: torch.dtype = torch.uint8, detail: int = 0) -> int:
    """A number that says what is done: a reduction or a source is the detail."""
    return _KINDS.index(kind) | _DTYPE_CODES[dtype] << 8 | detail << 16


def _in_words(entry: Entry) -> str:
    kind, dtype, detail = _KINDS[entry.code & 0xFF], _DTYPES[entry.code >> 8 & 0xFF], entry.code >> 16
    if kind == "barrier":
        return kind
    which = {"all_reduce": f" ({_REDUCTION_NAMES[detail % 3]})", "broadcast": f" from rank {detail} of the group"}
    count = entry.size // dtype.itemsize
    return f"{kind}{which.get(kind, '')} of {count} {str(dtype).removeprefix('torch.')}"


class Operation:
    """A collective that was started."""

    __slots__ = ("_channel", "_number", "awaited", "entry", "finish")

    def __init__(
        self, channel: Channel, number: int, entry: Entry, awaited: Sequence[Peer], finish: Callable[[], None]
    ) -> None:
        self._channel = channel
        self._number = number
        self.entry = entry
        self.awaited = awaited
        self.finish = finish

    def wait(self) -> None:
        """Blocks until the tensor holds the result.

        Raises:
            PeerLost: A peer is gone.
            torch.distributed.DistError: A peer did not come within the group's time limit.
            RuntimeError: A peer started something else.
        """
        self._channel.finish(self._number)


class Channel:
    """The collectives of one group whose ranks are all on this host.

    All ranks start the same collectives in the same order by the same calls, each from one thread at a time. Tensors
    are on the CPU, of the types that :attr:`DTYPES` holds and of any layout.

    Args:
        rank: This one's place in the group.
        who: The same for messages.
        arena: This rank's.
        peers: All other ranks by their place in the group.
    """

    DTYPES = frozenset(_DTYPES)

    def __init__(self, rank: int, who: Who, arena: Arena, peers: dict[int, Peer]) -> None:
        self._rank = rank
        self._who = who
        self._arena = arena
        self._board = Board(arena.words)
        self._peers = peers
        self._all_peers = tuple(peers.values())
        self._memories: list[Memory] = [each.memory for _, each in sorted(peers.items())]
        self._memories.insert(rank, arena)
        self._started = self._finished = 0
        self._pending: deque[Operation] = deque()
        self._busy: deque[tuple[int, Slot]] = deque()

    def close(self) -> None:
        """Peers can map nothing more of this rank's memory; what they have mapped, they keep."""
        self._arena.close()

    # --- the collectives ---------------------------------------------------------------------------------------------

    def all_reduce(self, tensor: Tensor, reduction: Literal["sum", "max", "min"]) -> None:
        """Reduces in place."""
        if len(self._memories) > 2:
            # They compute it together, which takes the whole.
            self.start_all_reduce(tensor, reduction).wait()
            return
        flat = _flat(tensor)
        before: Operation | None = None
        for part in _parts(flat):
            operation = self._start_reduce(part, reduction)
            if before is not None:
                before.wait()
            before = operation
        assert before is not None, "there is always one part"
        before.wait()
        _put_back(flat, tensor)

    def start_all_reduce(self, tensor: Tensor, reduction: Literal["sum", "max", "min"]) -> Operation:
        """Starts to reduce in place."""
        flat = _flat(tensor)
        operation = self._start_reduce(flat, reduction)
        if not tensor.is_contiguous():
            add_up = operation.finish

            def finish() -> None:
                add_up()
                _put_back(flat, tensor)

            operation.finish = finish
        return operation

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Copies from the group's rank ``source`` in place."""
        flat = _flat(tensor)
        for index, part in enumerate(_parts(flat)):
            code, size = _code("broadcast", part.dtype, source), part.numel() * part.itemsize
            if source == self._rank:
                number = self._started
                self._start(code, size, part, (), _nothing).wait()
                if index >= _AHEAD:
                    for peer in self._all_peers:
                        peer.await_finish(number - _AHEAD)
            else:
                self._start_receive(code, size, part, source).wait()
        _put_back(flat, tensor)

    def all_gather(self, gathered: Sequence[Tensor], tensor: Tensor) -> None:
        """Copies every rank's tensor into the (contiguous) one at its place in ``gathered``."""
        rows = list(zip(*(_parts(_flat(each)) for each in gathered), strict=True))
        before: Operation | None = None
        for part, row in zip(_parts(_flat(tensor)), rows, strict=True):
            operation = self._start_gather(row, part)
            if before is not None:
                before.wait()
            before = operation
        assert before is not None, "there is always one part"
        before.wait()

    def start_all_gather(self, gathered: Sequence[Tensor], tensor: Tensor) -> Operation:
        """Starts to do the same."""
        return self._start_gather([_flat(each) for each in gathered], _flat(tensor))

    def barrier(self) -> None:
        """Waits until all ranks are here."""
        self._start(_code("barrier"), 0, None, self._all_peers, _nothing).wait()

    # --- how they work -----------------------------------------------------------------------------------------------

    def _start_reduce(self, flat: Tensor, reduction: str) -> Operation:
        dtype, count = flat.dtype, flat.numel()
        code = _code("all_reduce", dtype, _REDUCTION_NAMES.index(reduction))
        number, rank = self._started, self._rank
        size, ranks = count * dtype.itemsize, len(self._memories)
        together = ranks > 2 and size > _TOGETHER
        room = _padded(share_size(count, ranks) * dtype.itemsize) if together else 0
        operation = self._start(code, size, flat, self._all_peers, _nothing, room)
        if count == 0:
            return operation
        reduce, offset = _REDUCTIONS[reduction], operation.entry.offset

        def finish() -> None:
            offsets = [peer.offset(number) for peer in self._all_peers]
            offsets.insert(rank, offset)
            places = list(zip(self._memories, offsets, strict=True))
            sources = [memory.views.at(at, dtype, count) for memory, at in places]
            # The tensor is overwritten by the sum of the first two, so what a later rank adds is its copy.
            if rank < 2:
                sources[rank] = flat
            if room:
                share = share_size(count, len(places))
                offers = [
                    Offer(memory.words, at // 8 - _FLAG // 8, memory.views.at(at + _padded(size), dtype, share))
                    for memory, at in places
                ]
                add_up_together(sources, flat, reduce, rank, offers)
            else:
                add_up_alone(sources, flat, reduce)

        operation.finish = finish
        return operation

    def _start_receive(self, code: int, size: int, flat: Tensor, source: int) -> Operation:
        number, peer, count = self._started, self._peers[source], flat.numel()

        def finish() -> None:
            if count:
                flat.copy_(peer.memory.views.at(peer.offset(number), flat.dtype, count))

        return self._start(code, size, None, (peer,), finish)

    def _start_gather(self, gathered: Sequence[Tensor], flat: Tensor) -> Operation:
        number, dtype, count = self._started, flat.dtype, flat.numel()
        gathered[self._rank].copy_(flat)

        def finish() -> None:
            if count:
                for rank, peer in self._peers.items():
                    gathered[rank].copy_(peer.memory.views.at(peer.offset(number), dtype, count))

        return self._start(_code("all_gather", dtype), count * dtype.itemsize, flat, self._all_peers, finish)

    def _start(
        self,
        code: int,
        size: int,
        message: Tensor | None,
        awaited: Sequence[Peer],
        finish: Callable[[], None],
        room: int = 0,
    ) -> Operation:
        """Announces a collective, with what this rank gives to it.

        Args:
            code: What it is.
            size: Bytes of each rank's tensor, by which ranks see that they mean the same.
            message: This rank's; ``None`` if it gives nothing.
            awaited: Who must have started before it can be finished.
            finish: Finishes it.
            room: Bytes behind the message for what this rank computes, and with them a word before it, which is 0.
        """
        number = self._started
        if number >= ENTRIES:
            self._await_entry(number - ENTRIES)
        self._reclaim()
        entry = Entry(code, size)
        if message is not None and size:
            slot = self._arena.take(_FLAG + _padded(size) + room if room else size)
            offset = slot.offset + _FLAG if room else slot.offset
            if room:
                self._arena.words[slot.offset // 8] = 0
            self._arena.views.at(offset, message.dtype, message.numel()).copy_(message)
            entry = Entry(code, size, offset)
            self._busy.append((number, slot))
        self._board.announce(number, entry)
        self._started += 1
        operation = Operation(self, number, entry, awaited, finish)
        self._pending.append(operation)
        return operation

    def _await_entry(self, number: int) -> None:
        """Waits until all have finished a collective, so that its entry can be written over."""
        self.finish(number)
        for peer in self._all_peers:
            peer.await_finish(number)

    def _reclaim(self) -> None:
        if self._busy:
            finished = min(self._finished, *[peer.finished for peer in self._all_peers])
            while self._busy and self._busy[0][0] < finished:
                self._arena.give_back(self._busy.popleft()[1])

    def finish(self, number: int) -> None:
        """Finishes all collectives up to ``number``, in the order in which they were started."""
        while self._finished <= number:
            operation, mine = self._pending[0], self._finished
            for peer in operation.awaited:
                peer.await_start(mine)
                if not peer.is_in(mine, operation.entry):
                    raise RuntimeError(
                        "ranks of one group are in different collectives: "
                        f"{self._who} in {_in_words(operation.entry)}, {peer.who} in {_in_words(peer.entry(mine))}"
                    )
            operation.finish()
            self._pending.popleft()
            self._finished += 1
            self._board.words[FINISHED] = self._finished


def _nothing() -> None:
    return


def _padded(size: int) -> int:
    """Bytes up to the next cache line."""
    return -(-size // 64) * 64


def _flat(tensor: Tensor) -> Tensor:
    """Its elements in a row: itself, or a copy where it has another layout."""
    detached = tensor.detach()
    return detached.view(-1) if detached.is_contiguous() else detached.contiguous().view(-1)


def _put_back(flat: Tensor, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        tensor.detach().copy_(flat.view(tensor.shape))


def _parts(flat: Tensor) -> Sequence[Tensor]:
    """A row of elements cut where that pays."""
    if flat.numel() * flat.itemsize <= 2 * _PART:
        return (flat,)
    parts: Sequence[Tensor] = flat.split(_PART // flat.itemsize)
    return parts
