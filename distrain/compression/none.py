"""No compression: gradients travel as they are."""

from __future__ import annotations

from distrain.collectives import Communicator, Pending
from distrain.compression.base import Bucket, Compressor
from distrain.config import CompressionConfig, register


@register("compression", "none", CompressionConfig)
class NoCompression(Compressor):
    """One all-reduce a bucket."""

    def aggregate(self, bucket: Bucket, communicator: Communicator) -> Pending:
        """Starts the all-reduce of the whole bucket."""
        return communicator.start_all_reduce(bucket.flat)
