"""Adding up what several ranks have, shared among them where that pays, without anybody waiting for anybody.

All ranks need the whole sum, and each could compute it alone, as two do. Among more, each begins with a share of its
own, which it also leaves in its memory for the others, and then takes the others' shares as they get ready. What nobody
has ready it computes itself: it never depends on how far a peer is that has started the collective. Whoever computes an
element adds in order of rank, so the bits are the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

#: Bytes of a piece: what is added up at a time stays in the processor's cache.
_PIECE = 1 << 18

#: ``reduce(first, second, out=into)``, by element.
Reduce = Callable[..., Tensor]


class _Piece(NamedTuple):
    """Some elements of a rank's share: those that it computes as its ``turn``-th piece."""

    owner: int
    turn: int
    start: int
    stop: int


class Offer(NamedTuple):
    """A rank's share as it gets ready.

    Attributes:
        words: The rank's memory by words of 8 bytes.
        ready: Index of the word that counts its pieces that are ready.
        share: Where they are, ``[elements of a share]``.
    """

    words: memoryview
    ready: int
    share: Tensor


def share_size(count: int, ranks: int) -> int:
    """Elements of a share; the last ranks' may be shorter."""
    return -(-count // ranks)


def add_up_alone(sources: Sequence[Tensor], into: Tensor, reduce: Reduce) -> None:
    """Reduces tensors ``[count]`` in their order; one of the first two may be ``into`` itself."""
    if len(sources) == 2:
        reduce(sources[0], sources[1], out=into)
        return
    step = _PIECE // into.itemsize
    for start in range(0, into.numel(), step):
        _add(sources, into, reduce, start, start + step)


def add_up_together(
    sources: Sequence[Tensor], into: Tensor, reduce: Reduce, rank: int, offers: Sequence[Offer]
) -> None:
    """The same, with the help of the other ranks, which do the same.

    Args:
        sources: What each rank has.
        into: For the sum; may be the first or the second of the sources.
        reduce: By element.
        rank: This one.
        offers: Every rank's, in order.
    """
    mine, size = offers[rank], share_size(into.numel(), len(sources))
    for piece in _pieces(rank, into, size):
        _add(sources, into, reduce, piece.start, piece.stop)
        mine.share[piece.start - rank * size : piece.stop - rank * size].copy_(into[piece.start : piece.stop])
        mine.words[mine.ready] = piece.turn + 1
    others = [(rank + distance) % len(sources) for distance in range(1, len(sources))]
    left = [piece for owner in others for piece in _pieces(owner, into, size)]
    patient = True
    while left:
        missing = []
        for piece in left:
            offer, first = offers[piece.owner], piece.owner * size
            if offer.words[offer.ready] > piece.turn:
                into[piece.start : piece.stop].copy_(offer.share[piece.start - first : piece.stop - first])
            else:
                missing.append(piece)
        if len(missing) < len(left):
            patient = True
        elif patient:
            # Its owner may want this very processor.
            os.sched_yield()
            patient = False
        else:
            piece = missing.pop(0)
            _add(sources, into, reduce, piece.start, piece.stop)
            patient = True
        left = missing


def _pieces(owner: int, into: Tensor, size: int) -> list[_Piece]:
    begin, end, step = owner * size, min((owner + 1) * size, into.numel()), _PIECE // into.itemsize
    starts = range(begin, end, step)
    return [_Piece(owner, index, start, min(start + step, end)) for index, start in enumerate(starts)]


def _add(sources: Sequence[Tensor], into: Tensor, reduce: Reduce, start: int, stop: int) -> None:
    first, second, *others = [each[start:stop] for each in sources]
    part = into[start:stop]
    reduce(first, second, out=part)
    for other in others:
        reduce(part, other, out=part)
