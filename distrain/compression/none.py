"""No compression: gradients travel as they are."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from distrain.communication.collectives import Communicator, Pending
from distrain.compression.base import Compressor
from distrain.compression.bucket import Bucket
from distrain.config.registry import register
from distrain.config.schema import CompressionConfig


@register("compression", "none", CompressionConfig)
class NoCompression(Compressor):
    """One all-reduce a bucket."""

    def compresses(self, parameter: nn.Parameter) -> bool:
        """Nothing is."""
        return False

    def aggregate(self, bucket: Bucket, communicator: Communicator) -> Iterator[Pending]:
        """All-reduces the whole bucket."""
        yield communicator.start_all_reduce(bucket.flat)

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing: no step depends on an earlier one."""
        return {}

    def compress(self, owed: Bucket) -> list[Tensor]:
        """Nothing: all is in the plain part."""
        return []

    def message_layout(self, bucket: Bucket) -> list[tuple[torch.dtype, int]]:
        """See :meth:`compress`."""
        return []

    def add_decompressed(self, message: list[Tensor], bucket: Bucket) -> None:
        """See :meth:`compress`."""
