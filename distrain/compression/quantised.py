"""What compressors share that round each element to one of a few levels: groups with a step each, and packed levels."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from distrain.compression.base import Compressor, LossyConfig
from distrain.compression.bucket import Bucket
from distrain.compression.encoding.bits import pack_bits, packed_size, unpack_bits
from distrain.config.schema import setting

# About how many elements are rounded and packed at a time, so that what passes from one operation to the next stays in
# a CPU's cache, and so that the cost of starting an operation doesn't count. All ranks need the same.
_BLOCK = 1 << 18


@dataclass
class QuantisedConfig(LossyConfig):
    """Keys of every compressor that rounds to levels."""

    bucket_size: int = setting("Elements that share one scale.", at_least=1)


class Quantised(Compressor):
    """Sends each element as a level, a small whole number, times a step that ``bucket_size`` elements share.

    These groups run through the whole lossy part of a bucket, across the borders of its tensors, since one operation
    for all is faster than one for each tensor; the last group may be shorter. Steps travel in float32, whatever the
    gradients' dtype. An element that is not finite makes its whole group so, and nothing of that group is kept for the
    next step.

    Attributes:
        bits: Bits an element: 1, 2, 4 or 8.
        lowest: The lowest level.
        shift: Levels are ``2**shift`` apart.
    """

    config: QuantisedConfig
    bits: int
    lowest: int
    shift: ClassVar[int] = 0

    @abstractmethod
    def quantise(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Rounds groups of values.

        Args:
            values: ``[rows, groups, elements of a group]``; not changed.

        Returns:
            The step of each group, float32 ``[rows, groups, 1]``, and the level of each value, of its shape and dtype.
        """

    def message_layout(self, bucket: Bucket) -> list[tuple[torch.dtype, int]]:
        """Steps, and packed levels."""
        shapes = self._shapes(bucket)
        return [
            (torch.float32, sum(rows * groups for rows, groups, _ in shapes)),
            (torch.uint8, sum(rows * packed_size(groups * size, self.bits) for rows, groups, size in shapes)),
        ]

    def compress(self, owed: Bucket) -> list[Tensor]:
        """Takes the rounded elements and leaves what rounding added or cut off."""
        message = [torch.empty(size, dtype=dtype, device=owed.flat.device) for dtype, size in self.message_layout(owed)]
        for values, steps, packed in self._pieces(owed, message):
            step, levels = self.quantise(values)
            codes = levels.to(torch.int8).sub_(self.lowest).view(torch.uint8) >> self.shift
            steps.copy_(step)
            packed.copy_(pack_bits(codes.flatten(1), self.bits))
            values.addcmul_(levels, step.to(values.dtype), value=-1)
            finite = step.isfinite()
            # A GPU would have to be waited for; there it is cheaper not to ask.
            if values.is_cuda or not finite.all():
                values.masked_fill_(~finite, 0)
        return message

    def add_decompressed(self, message: list[Tensor], bucket: Bucket) -> None:
        """Adds each level times its step."""
        for values, steps, packed in self._pieces(bucket, message):
            codes = unpack_bits(packed, self.bits, values[0].numel())
            levels = (codes << self.shift).view(torch.int8).add_(self.lowest).to(values.dtype)
            values.addcmul_(levels.view_as(values), steps.to(values.dtype))

    def _pieces(self, bucket: Bucket, message: list[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Views of what belongs together.

        Yields:
            Elements ``[rows, groups, elements of a group]``, steps ``[rows, groups, 1]``, levels ``[rows, bytes]``.
        """
        parts = [bucket.compressed_part, *message]
        for rows, groups, size in self._shapes(bucket):
            counts = [rows * groups * size, rows * groups, rows * packed_size(groups * size, self.bits)]
            values, steps, packed = (part[:count] for part, count in zip(parts, counts, strict=True))
            yield values.view(rows, groups, size), steps.view(rows, groups, 1), packed.view(rows, -1)
            parts = [part[count:] for part, count in zip(parts, counts, strict=True)]

    def _shapes(self, bucket: Bucket) -> list[tuple[int, int, int]]:
        """The pieces in which the lossy part is worked on: rows, groups a row, elements a group.

        Each row is packed by itself, so that the message is the same whether rows come one by one or together.
        """
        size = self.config.bucket_size
        groups = max(_BLOCK // size, 1)
        rows, rest = divmod(bucket.compressed_part.numel(), groups * size)
        whole = [(1, groups, size)] * rows if self._row_by_row(bucket) else [(rows, groups, size)]
        pieces = [*whole, (1, rest // size, size), (1, 1, rest % size)]
        return [piece for piece in pieces if 0 not in piece]

    def _row_by_row(self, bucket: Bucket) -> bool:
        """For a CPU's cache; on a GPU fewer and larger operations are faster."""
        return not bucket.flat.is_cuda
