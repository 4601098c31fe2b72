"""Base class of compressors that round each element to one of a few levels."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from distrain.compression.base import LossyConfig, MessageCompressor
from distrain.compression.bucket import Bucket
from distrain.compression.encoding.bits import pack_bits, packed_size, unpack_bits
from distrain.config.setting import setting

# About how many elements are rounded and packed at a time: few enough that intermediate results stay in a CPU's cache,
# and enough that the overhead of starting an operation does not matter. It must be the same on all ranks.
_BLOCK = 1 << 18


@dataclass
class QuantisedConfig(LossyConfig):
    """Keys of every compressor that rounds to levels."""

    bucket_size: int = setting("Elements that share one scale.", at_least=1)


class Quantised(MessageCompressor):
    """Sends each element as a level, a small integer, times a step size shared by a group of ``bucket_size`` elements.

    Groups are cut from the whole compressed part of a bucket, across tensor boundaries, because one operation for all
    is faster than one per tensor; the last group may be shorter. Step sizes are sent in float32, whatever the
    gradients' dtype. A non-finite element makes its whole group non-finite, and that group's residual becomes zero.

    Attributes:
        bits: Bits per element: 1, 2, 4 or 8.
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
            The step size of each group, float32 ``[rows, groups, 1]``, and the level of each value, with the shape and
            dtype of ``values``.
        """

    @override
    def message_layout(self, bucket: Bucket) -> list[tuple[torch.dtype, int]]:
        """Step sizes, then packed levels."""
        shapes = self._block_shapes(bucket)
        return [
            (torch.float32, sum(rows * groups for rows, groups, _ in shapes)),
            (torch.uint8, sum(rows * packed_size(groups * size, self.bits) for rows, groups, size in shapes)),
        ]

    @override
    def compress(self, bucket: Bucket) -> list[Tensor]:
        layout = self.message_layout(bucket)
        message = [torch.empty(size, dtype=dtype, device=bucket.flat.device) for dtype, size in layout]
        for values, steps, packed in self._blocks(bucket, message):
            step, levels = self.quantise(values)
            codes = levels.to(torch.int8).sub_(self.lowest).view(torch.uint8) >> self.shift
            steps.copy_(step)
            packed.copy_(pack_bits(codes.flatten(1), self.bits))
            values.addcmul_(levels, step.to(values.dtype), value=-1)
            finite = step.isfinite()
            # On a GPU, asking would wait for the device, which costs more than the operation it may save.
            if values.is_cuda or not finite.all():
                values.masked_fill_(~finite, 0)
        return message

    @override
    def add_decompressed(self, message: list[Tensor], bucket: Bucket) -> None:
        for values, steps, packed in self._blocks(bucket, message):
            codes = unpack_bits(packed, self.bits, values[0].numel())
            levels = (codes << self.shift).view(torch.int8).add_(self.lowest).to(values.dtype)
            values.addcmul_(levels.view_as(values), steps.to(values.dtype))

    def _blocks(self, bucket: Bucket, message: list[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Views of the compressed part and of the message, block by block.

        Yields:
            Elements ``[rows, groups, elements of a group]``, step sizes ``[rows, groups, 1]`` and packed levels
            ``[rows, bytes]``.
        """
        parts = [bucket.compressed_part, *message]
        for rows, groups, size in self._block_shapes(bucket):
            counts = [rows * groups * size, rows * groups, rows * packed_size(groups * size, self.bits)]
            values, steps, packed = (part[:count] for part, count in zip(parts, counts, strict=True))
            yield values.view(rows, groups, size), steps.view(rows, groups, 1), packed.view(rows, -1)
            parts = [part[count:] for part, count in zip(parts, counts, strict=True)]

    def _block_shapes(self, bucket: Bucket) -> list[tuple[int, int, int]]:
        """The blocks in which the compressed part is processed: rows, groups per row, elements per group.

        Each row is packed separately, so the message does not depend on how many rows form a block.
        """
        size = self.config.bucket_size
        groups = max(_BLOCK // size, 1)
        rows, rest = divmod(bucket.compressed_part.numel(), groups * size)
        full_rows = [(1, groups, size)] * rows if self._row_by_row(bucket) else [(rows, groups, size)]
        shapes = [*full_rows, (1, rest // size, size), (1, 1, rest % size)]
        return [shape for shape in shapes if 0 not in shape]

    def _row_by_row(self, bucket: Bucket) -> bool:
        """Whether each block is one row: a CPU profits from its cache, a GPU from fewer and larger operations."""
        return not bucket.flat.is_cuda
