"""Reducing the tensors of several ranks: each rank computes the whole result, or the ranks divide the work.

Every rank needs the whole result and could compute it alone; two ranks do so. Among more, each rank first reduces one
segment and publishes it in its arena, and then copies the other ranks' segments as they become ready. It computes a
piece itself if no other rank has it ready, so it never waits for a rank that has started the collective. All ranks
reduce every element in order of rank, so all get the same bits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: Bytes of a piece: what is reduced at a time stays in the processor's cache.
_PIECE_BYTES = 1 << 18

#: Element-wise ``operation(first, second, out=into)``.
Operation = Callable[..., Tensor]
#: The operations by the names of the reductions.
REDUCTIONS: dict[str, Operation] = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}


class _Piece(NamedTuple):
    """Elements ``start`` to ``stop`` (exclusive) of the tensor: piece ``number`` of the owner's segment."""

    owner: int
    number: int
    start: int
    stop: int


class PublishedSegment(NamedTuple):
    """A rank's segment of the result, as far as it is ready.

    Attributes:
        words: The rank's arena as 8-byte integers.
        ready: Index of the word that counts the pieces that are ready.
        values: The segment, ``[segment_size]``.
    """

    words: memoryview
    ready: int
    values: Tensor


def segment_size(count: int, ranks: int) -> int:
    """Elements of a rank's segment of ``count`` elements; the segments of the last ranks may be shorter."""
    return -(-count // ranks)


def reduce_alone(sources: Sequence[Tensor], into: Tensor, operation: Operation) -> None:
    """Reduces tensors ``[count]`` in their order; ``into`` may be the first or the second of them."""
    if len(sources) == 2:
        operation(sources[0], sources[1], out=into)
        return
    step = _PIECE_BYTES // into.itemsize
    for start in range(0, into.numel(), step):
        _reduce_range(sources, into, operation, start, start + step)


def reduce_together(
    sources: Sequence[Tensor], into: Tensor, operation: Operation, rank: int, published: Sequence[PublishedSegment]
) -> None:
    """Reduces tensors ``[count]`` in their order, sharing the work with the other ranks, which call this too.

    Args:
        sources: Each rank's tensor.
        into: For the result; may be the first or the second source.
        operation: Element-wise reduction.
        rank: This rank.
        published: Each rank's segment.
    """
    own, size = published[rank], segment_size(into.numel(), len(sources))
    for piece in _pieces(rank, into, size):
        _reduce_range(sources, into, operation, piece.start, piece.stop)
        own.values[piece.start - rank * size : piece.stop - rank * size].copy_(into[piece.start : piece.stop])
        own.words[own.ready] = piece.number + 1
    others = [(rank + distance) % len(sources) for distance in range(1, len(sources))]
    remaining = [piece for owner in others for piece in _pieces(owner, into, size)]
    may_yield = True
    while remaining:
        missing = []
        for piece in remaining:
            segment, first = published[piece.owner], piece.owner * size
            if segment.words[segment.ready] > piece.number:
                into[piece.start : piece.stop].copy_(segment.values[piece.start - first : piece.stop - first])
            else:
                missing.append(piece)
        if len(missing) < len(remaining):
            may_yield = True
        elif may_yield:
            # The piece's owner may be waiting for this core.
            os.sched_yield()
            may_yield = False
        else:
            piece = missing.pop(0)
            _reduce_range(sources, into, operation, piece.start, piece.stop)
            may_yield = True
        remaining = missing


def _pieces(owner: int, into: Tensor, size: int) -> list[_Piece]:
    begin, end, step = owner * size, min((owner + 1) * size, into.numel()), _PIECE_BYTES // into.itemsize
    starts = range(begin, end, step)
    return [_Piece(owner, number, start, min(start + step, end)) for number, start in enumerate(starts)]


def _reduce_range(sources: Sequence[Tensor], into: Tensor, operation: Operation, start: int, stop: int) -> None:
    first, second, *others = [source[start:stop] for source in sources]
    part = into[start:stop]
    operation(first, second, out=part)
    for other in others:
        operation(part, other, out=part)
