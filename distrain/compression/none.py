"""No compression."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from typing_extensions import override

from distrain.communication.collectives import Communicator
from distrain.communication.types import Pending
from distrain.compression.base import MessageCompressor
from distrain.compression.bucket import Bucket
from distrain.config.groups import CompressionConfig
from distrain.config.registry import register


@register("compression", "none", CompressionConfig)
class NoCompression(MessageCompressor):
    """Sums gradients uncompressed, by one all-reduce per bucket.

    Every bucket consists of its uncompressed part alone, so messages are empty.
    """

    @override
    def aggregate(self, bucket: Bucket, communicator: Communicator) -> Iterator[Pending]:
        yield communicator.start_all_reduce(bucket.flat)

    @override
    def state_dict(self) -> dict[str, Tensor]:
        """Empty: no step depends on an earlier one."""
        return {}

    @override
    def compress(self, bucket: Bucket) -> list[Tensor]:
        return []

    @override
    def message_layout(self, bucket: Bucket) -> list[tuple[torch.dtype, int]]:
        return []

    @override
    def add_decompressed(self, message: list[Tensor], bucket: Bucket) -> None:
        pass
