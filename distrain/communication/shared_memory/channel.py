"""Collectives among ranks of one host through memory that they share.

Each rank writes into memory of its own and reads its peers'. To start a collective is to copy the tensor into a slot
and to announce it; that never waits. To wait for it is to wait until the peers have announced theirs, and to add up all
slots, in order of rank, straight into the tensor: every rank gets the same bits, and needs of its peers no more than
that they start the same collectives in the same order. A slot is free again once all ranks have finished what it was
for. RankName only gives, as most ranks in a reduction or a gathering for the first one, never waits at all.

Where a call starts and waits at once, long tensors travel in parts, so that what one rank wrote is still in a cache
when the other reads it.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from distrain.communication.shared_memory.arena import Arena, Memory, Slot
from distrain.communication.shared_memory.control_block import ENTRIES, FINISHED, GIVEN_UP, Board, Entry
from distrain.communication.shared_memory.peer import Peer
from distrain.communication.shared_memory.reduce import Offer, add_up_alone, add_up_together, share_size
from distrain.communication.types import DTYPES, RankName, Reduction

#: Bytes of a part of a long tensor.
_PART = 1 << 20
#: More than two ranks compute what is longer together.
_TOGETHER = 1 << 19
#: Bytes before a message whose sum is computed together: its first word counts what is ready.
_FLAG = 64
#: Parts that a source may be ahead of who reads them.
_AHEAD = 4

_KINDS = ("all_reduce", "broadcast", "all_gather", "barrier", "reduce_scatter", "reduce", "gather")
_REDUCTIONS: dict[str, Callable[..., Tensor]] = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}
_REDUCTION_NAMES = tuple(_REDUCTIONS)
_DTYPES = tuple(DTYPES.values())
_DTYPE_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}


@functools.cache
def _code(kind: str, dtype: torch.dtype = torch.uint8, detail: int = 0) -> int:
    """A number that says what is done: a reduction or a source is the detail."""
    return _KINDS.index(kind) | _DTYPE_CODES[dtype] << 8 | detail << 16


def _in_words(entry: Entry) -> str:
    kind, dtype, detail = _KINDS[entry.code & 0xFF], _DTYPES[entry.code >> 8 & 0xFF], entry.code >> 16
    if kind == "barrier":
        return kind
    which = ""
    if kind == "broadcast":
        which = f" from rank {detail} of the group"
    elif "reduce" in kind:
        which = f" ({_REDUCTION_NAMES[detail % 3]})"
    count = entry.size // dtype.itemsize
    return f"{kind}{which} of {count} {str(dtype).removeprefix('torch.')}"


class Operation:
    """A collective that was started."""

    __slots__ = ("_channel", "_number", "awaited", "entry", "finish")

    def __init__(
        self,
        channel: SharedMemoryChannel,
        number: int,
        entry: Entry,
        awaited: Sequence[Peer],
        finish: Callable[[], None],
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


class SharedMemoryChannel:
    """The collectives of one group whose ranks are all on this host.

    All ranks start the same collectives in the same order by the same calls, each from one thread at a time. Tensors
    are on the CPU, of the types in :data:`~distrain.communication.types.DTYPES` and of any layout.

    Args:
        rank: This one's place in the group; 0 is its first rank's.
        who: The same for messages.
        arena: This rank's.
        peers: All other ranks by their place in the group.
    """

    def __init__(self, rank: int, who: RankName, arena: Arena, peers: dict[int, Peer]) -> None:
        self._rank = rank
        self._who = who
        self._arena = arena
        self._board = Board(arena.words)
        self._peers = peers
        self._all_peers = tuple(peer for _, peer in sorted(peers.items()))
        self._memories: list[Memory] = [peer.memory for peer in self._all_peers]
        self._memories.insert(rank, arena)
        self._started = self._finished = 0
        self._pending: deque[Operation] = deque()
        self._busy: deque[tuple[int, Slot]] = deque()

    def give_up(self) -> None:
        """Peers that wait for this rank learn that it goes on with nothing."""
        self._board.words[GIVEN_UP] = 1

    def close(self) -> None:
        """Peers can map nothing more of this rank's memory; what they have mapped, they keep."""
        self._arena.close()

    # --- the collectives ---------------------------------------------------------------------------------------------

    def all_reduce(self, tensor: Tensor, reduction: Reduction) -> None:
        """Reduces in place."""
        if len(self._memories) > 2:
            # They compute it together, which takes the whole.
            self.start_all_reduce(tensor, reduction).wait()
            return
        flat = flattened(tensor)
        _wait_one_behind(self._start_all_reduce(part, reduction) for part in _parts(flat))
        put_back(flat, tensor)

    def start_all_reduce(self, tensor: Tensor, reduction: Reduction) -> Operation:
        """Starts to reduce in place."""
        flat = flattened(tensor)
        operation = self._start_all_reduce(flat, reduction)
        if not tensor.is_contiguous():
            add_up = operation.finish

            def finish() -> None:
                add_up()
                put_back(flat, tensor)

            operation.finish = finish
        return operation

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Copies from the group's rank ``source`` in place."""
        flat = flattened(tensor)
        for index, part in enumerate(_parts(flat)):
            code, size = _code("broadcast", part.dtype, source), part.numel() * part.itemsize
            if source == self._rank:
                number = self._started
                self._give(code, size, part)
                if index >= _AHEAD:
                    for peer in self._all_peers:
                        peer.await_finish(number - _AHEAD)
            else:
                self._start_receive(code, size, part, source).wait()
        put_back(flat, tensor)

    def start_broadcast(self, tensor: Tensor, source: int) -> Operation:
        """Starts to do the same with a contiguous tensor; the source has it all in memory, and need not wait."""
        flat = flattened(tensor)
        code, size = _code("broadcast", flat.dtype, source), flat.numel() * flat.itemsize
        if source != self._rank:
            return self._start_receive(code, size, flat, source)
        return self._give(code, size, flat)

    def start_reduce(self, tensor: Tensor, reduction: Reduction) -> Operation:
        """Starts to reduce into the (contiguous) tensor of the group's first rank; the others need not wait."""
        flat, number = flattened(tensor), self._started
        dtype, count = flat.dtype, flat.numel()
        code = _code("reduce", dtype, _REDUCTION_NAMES.index(reduction))
        if self._rank:
            return self._give(code, count * dtype.itemsize, flat)

        def finish() -> None:
            if count:
                others = [peer.memory.views.at(peer.offset(number), dtype, count) for peer in self._all_peers]
                add_up_alone([flat, *others], flat, _REDUCTIONS[reduction])

        return self._start(code, count * dtype.itemsize, None, self._all_peers, finish)

    def start_gather(self, rows: Sequence[Tensor], tensor: Tensor) -> Operation:
        """Starts to copy every rank's tensor into the first one's (contiguous) rows; the others need not wait."""
        flat = flattened(tensor)
        if self._rank:
            return self._give(_code("gather", flat.dtype), flat.numel() * flat.itemsize, flat)
        rows[0].copy_(flat)
        return self._start_taking("gather", rows, flat, None)

    def reduce_scatter(self, into: Tensor, tensor: Tensor, reduction: Reduction) -> None:
        """Reduces a tensor of as many parts of ``into``'s size as there are ranks, and keeps of it this rank's part."""
        flat, share, number = flattened(tensor), flattened(into), self._started
        dtype, count = flat.dtype, share.numel()
        code = _code("reduce_scatter", dtype, _REDUCTION_NAMES.index(reduction))
        operation = self._start(code, flat.numel() * dtype.itemsize, flat, self._all_peers, _nothing)
        first = self._rank * count * dtype.itemsize

        def finish() -> None:
            if count:
                places = self._places(number, operation)
                sources = [memory.views.at(at + first, dtype, count) for memory, at in places]
                add_up_alone(sources, share, _REDUCTIONS[reduction])

        operation.finish = finish
        operation.wait()
        put_back(share, into)

    def all_gather(self, gathered: Sequence[Tensor], tensor: Tensor) -> None:
        """Copies every rank's tensor into the (contiguous) one at its place in ``gathered``."""
        rows = zip(*(_parts(flattened(each)) for each in gathered), strict=True)
        parts = zip(_parts(flattened(tensor)), rows, strict=True)
        _wait_one_behind(self._start_all_gather(row, part) for part, row in parts)

    def start_all_gather(self, gathered: Sequence[Tensor], tensor: Tensor) -> Operation:
        """Starts to do the same."""
        return self._start_all_gather([flattened(each) for each in gathered], flattened(tensor))

    def barrier(self) -> None:
        """Waits until all ranks are here."""
        self._start(_code("barrier"), 0, None, self._all_peers, _nothing).wait()

    # --- how they work -----------------------------------------------------------------------------------------------

    def _start_all_reduce(self, flat: Tensor, reduction: str) -> Operation:
        dtype, count = flat.dtype, flat.numel()
        code = _code("all_reduce", dtype, _REDUCTION_NAMES.index(reduction))
        number, rank = self._started, self._rank
        size, ranks = count * dtype.itemsize, len(self._memories)
        together = ranks > 2 and size > _TOGETHER
        room = _padded(share_size(count, ranks) * dtype.itemsize) if together else 0
        operation = self._start(code, size, flat, self._all_peers, _nothing, room)
        if count == 0:
            return operation
        reduce = _REDUCTIONS[reduction]

        def finish() -> None:
            places = self._places(number, operation)
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

    def _start_all_gather(self, gathered: Sequence[Tensor], flat: Tensor) -> Operation:
        gathered[self._rank].copy_(flat)
        return self._start_taking("all_gather", gathered, flat, flat)

    def _start_taking(self, kind: str, rows: Sequence[Tensor], like: Tensor, message: Tensor | None) -> Operation:
        """Starts to copy every peer's message into the row at its place."""
        number, dtype, count = self._started, like.dtype, like.numel()

        def finish() -> None:
            if count:
                for rank, peer in self._peers.items():
                    rows[rank].copy_(peer.memory.views.at(peer.offset(number), dtype, count))

        return self._start(_code(kind, dtype), count * dtype.itemsize, message, self._all_peers, finish)

    def _places(self, number: int, operation: Operation) -> list[tuple[Memory, int]]:
        """Where each rank's message to a collective lies that all have started."""
        offsets = [peer.offset(number) for peer in self._all_peers]
        offsets.insert(self._rank, operation.entry.offset)
        return list(zip(self._memories, offsets, strict=True))

    def _give(self, code: int, size: int, message: Tensor) -> Operation:
        """Leaves a message for others, for whom this rank need not wait."""
        operation = self._start(code, size, message, (), _nothing)
        operation.wait()
        return operation

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
            awaited: RankName must have started before it can be finished.
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


def _wait_one_behind(operations: Iterable[Operation]) -> None:
    """Finishes each when the next was started, so that peers find it when they have finished this one."""
    before: Operation | None = None
    for operation in operations:
        if before is not None:
            before.wait()
        before = operation
    assert before is not None, "there is always one part"
    before.wait()


def _padded(size: int) -> int:
    """Bytes up to the next cache line."""
    return -(-size // 64) * 64


def flattened(tensor: Tensor) -> Tensor:
    """A tensor's elements in a row: itself, or a copy where it has another layout."""
    detached = tensor.detach()
    return detached.view(-1) if detached.is_contiguous() else detached.contiguous().view(-1)


def put_back(flat: Tensor, tensor: Tensor) -> None:
    """Copies what :func:`flattened` gave into the tensor, where that is not itself."""
    if not tensor.is_contiguous():
        tensor.detach().copy_(flat.view(tensor.shape))


def _parts(flat: Tensor) -> Sequence[Tensor]:
    """A row of elements cut where that pays."""
    if flat.numel() * flat.itemsize <= 2 * _PART:
        return (flat,)
    parts: Sequence[Tensor] = flat.split(_PART // flat.itemsize)
    return parts
