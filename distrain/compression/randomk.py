"""Random elements of each tensor, the same ones on all ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from distrain.communication.collectives import Communicator, Pending
from distrain.compression.bucket import Bucket
from distrain.compression.sparse import SparseCompressor, SparseConfig, joined, stratified
from distrain.config.registry import register


@register("compression", "randomk", SparseConfig)
class RandomK(SparseCompressor):
    """Sends elements that (seed, step, parameter name) tell, so that no positions travel and the values can be summed.

    Stich et al. 2018, "Sparsified SGD with Memory" (arXiv 1809.07599), definition 2.1, by tensor, drawn as
    :func:`stratified` does. Without error feedback the values are divided by the probability with which they are drawn,
    so that the expected sum is the uncompressed one (Wangni et al. 2018, arXiv 1710.09854, §2).
    """

    def aggregate(self, bucket: Bucket, communicator: Communicator) -> Iterator[Pending]:
        """One all-reduce of the plain part and the chosen values; all ranks choose the same."""
        owed = self.residuals.add(bucket) if self.residuals is not None else bucket
        positions = self._positions(bucket, self.step)
        travelling = torch.cat([bucket.uncompressed_part, self._take(owed, positions)])
        yield communicator.start_all_reduce(travelling)
        plain, values = travelling.split([bucket.uncompressed_numel, len(positions)])
        bucket.uncompressed_part.copy_(plain)
        bucket.compressed_part.zero_().index_copy_(0, positions, values)

    def compress(self, owed: Bucket) -> list[Tensor]:
        """The step, by which a receiver that is at another one knows the positions; then the values."""
        step = torch.tensor([self.step], device=owed.flat.device)
        return [step, self._take(owed, self._positions(owed, self.step))]

    def message_layout(self, bucket: Bucket) -> list[tuple[torch.dtype, int]]:
        """Step and values."""
        return [(torch.int64, 1), (bucket.flat.dtype, sum(self.counts(bucket, self.step).values()))]

    def add_decompressed(self, message: list[Tensor], bucket: Bucket) -> None:
        """Adds each value where it belongs."""
        step, values = message
        bucket.compressed_part.index_add_(0, self._positions(bucket, int(step)), values)

    def _positions(self, bucket: Bucket, step: int) -> Tensor:
        counts = self.counts(bucket, step)
        chosen = {
            name: stratified(tensor.numel(), counts[name], self.key(step, name))
            for name, tensor in bucket.compressed_tensors.items()
        }
        return joined(bucket, chosen)

    def _take(self, owed: Bucket, positions: Tensor) -> Tensor:
        values = self.take_at(owed, positions, owed.flat.dtype)
        if self.residuals is None:
            parts = values.split(list(self.counts(owed, self.step).values()))
            for tensor, part in zip(owed.compressed_tensors.values(), parts, strict=True):
                part.mul_(tensor.numel() / len(part))
        return values
