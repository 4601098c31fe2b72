"""Random elements of each tensor, the same ones on all ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from typing_extensions import override

from distrain.communication.collectives import Communicator
from distrain.communication.types import Pending
from distrain.compression.bucket import Bucket
from distrain.compression.sparse import SparseCompressor, SparseConfig, positions_in_bucket, stratified_sample
from distrain.config.registry import register


@register("compression", "randomk", SparseConfig)
class RandomK(SparseCompressor):
    """Sends elements determined by (seed, step, parameter name), so no positions are sent and values can be summed.

    Stich et al. 2018, "Sparsified SGD with Memory" (arXiv 1809.07599), definition 2.1, per tensor, drawn by
    :func:`stratified_sample`. Without error feedback the values are divided by their probability of being drawn, so the
    expected sum is the uncompressed one (Wangni et al. 2018, arXiv 1710.09854, §2).
    """

    @override
    def aggregate(self, bucket: Bucket, communicator: Communicator) -> Iterator[Pending]:
        """All-reduces the uncompressed part and the chosen values together."""
        positions = self._positions(bucket, self.step)
        values = self._extract_scaled(self._add_residuals(bucket), positions)
        message = torch.cat([bucket.uncompressed_part, values])
        yield communicator.start_all_reduce(message)
        uncompressed, values = message.split([bucket.uncompressed_numel, len(positions)])
        bucket.uncompressed_part.copy_(uncompressed)
        bucket.compressed_part.zero_().index_copy_(0, positions, values)

    @override
    def compress(self, bucket: Bucket) -> list[Tensor]:
        step = torch.tensor([self.step], device=bucket.flat.device)
        return [step, self._extract_scaled(bucket, self._positions(bucket, self.step))]

    @override
    def message_layout(self, bucket: Bucket) -> list[tuple[torch.dtype, int]]:
        """The sender's step, from which a receiver at another step derives the positions; then the values."""
        return [(torch.int64, 1), (bucket.flat.dtype, sum(self.counts(bucket, self.step).values()))]

    @override
    def add_decompressed(self, message: list[Tensor], bucket: Bucket) -> None:
        step, values = message
        bucket.compressed_part.index_add_(0, self._positions(bucket, int(step)), values)

    def _positions(self, bucket: Bucket, step: int) -> Tensor:
        counts = self.counts(bucket, step)
        chosen = {
            name: stratified_sample(tensor.numel(), counts[name], self.draw_key(step, name))
            for name, tensor in bucket.compressed_tensors.items()
        }
        return positions_in_bucket(bucket, chosen)

    def _extract_scaled(self, bucket: Bucket, positions: Tensor) -> Tensor:
        """Removes the elements to send; without error feedback they are divided by their probability."""
        values = self.extract(bucket, positions, bucket.flat.dtype)
        if self.residuals is None:
            parts = values.split(list(self.counts(bucket, self.step).values()))
            for tensor, part in zip(bucket.compressed_tensors.values(), parts, strict=True):
                part.mul_(tensor.numel() / len(part))
        return values
