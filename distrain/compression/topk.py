"""The largest elements of each tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distrain.compression.bucket import Bucket
from distrain.compression.encoding.positions import PositionCode
from distrain.compression.sparse import SparseCompressor, SparseConfig, joined, stratified
from distrain.config.registry import register
from distrain.config.schema import setting


@dataclass
class TopKConfig(SparseConfig):
    """Keys of ``compression=topk``."""

    values: str = setting(
        "Values in 16 bits, with what that rounds off kept for the next step, or as they are.", choices=("bf16", "full")
    )
    sample_above: int = setting(
        "In tensors with more elements a sample tells where to look for the largest; the choice is the same.",
        at_least=1,
    )


@register("compression", "topk", TopKConfig)
class TopK(SparseCompressor):
    """Sends the elements of largest magnitude of each tensor, with their positions.

    Aji & Heafield 2017, "Sparse Communication for Distributed Gradient Descent" (arXiv 1704.05021), §3, by tensor; Lin
    et al. 2018, "Deep Gradient Compression" (arXiv 1712.01887), for the sampled threshold. Every rank chooses its own
    elements, so the messages can't be summed on the way: what a rank sends grows with the number of ranks.
    """

    config: TopKConfig

    def compress(self, owed: Bucket) -> list[Tensor]:
        """Values, then positions in the lossy part as :class:`PositionCode` writes them."""
        counts = self.counts(owed, self.step)
        chosen = {
            name: largest(tensor, counts[name], self.config.sample_above, self.key(self.step, name))
            for name, tensor in owed.compressed_tensors.items()
        }
        positions = joined(owed, chosen)
        values = self.take_at(owed, positions, self._dtype(owed))
        return [values, *self._code(owed).write(positions)]

    def message_layout(self, bucket: Bucket) -> list[tuple[torch.dtype, int]]:
        """Values, low bits of positions, high parts of positions."""
        code = self._code(bucket)
        return [(self._dtype(bucket), code.count), *((torch.uint8, size) for size in code.bytes)]

    def add_decompressed(self, message: list[Tensor], bucket: Bucket) -> None:
        """Adds each value where it belongs."""
        values, *written = message
        positions = self._code(bucket).read(*written)
        bucket.compressed_part.index_add_(0, positions, values.to(bucket.flat.dtype))

    def _code(self, bucket: Bucket) -> PositionCode:
        # One for the whole bucket: a set of positions in tensor after tensor is one ascending set.
        return PositionCode.shortest(sum(self.counts(bucket, self.step).values()), bucket.compressed_part.numel())

    def _dtype(self, bucket: Bucket) -> torch.dtype:
        return torch.bfloat16 if self.config.values == "bf16" else bucket.flat.dtype


def largest(tensor: Tensor, count: int, sample_above: int, key: str) -> Tensor:
    """Positions of the elements of largest magnitude.

    In a large tensor only those are compared that exceed a threshold, which a random sample tells (Lin et al. 2018,
    §3, "hierarchical top-k"). Unlike there the result is exact: the threshold is set low enough that nearly always
    more than ``count`` elements exceed it, and where they are fewer all are compared.

    Args:
        tensor: ``[n]``.
        count: How many, at most n.
        sample_above: From how many elements on a sample is drawn.
        key: Fixes the sample.

    Returns:
        int64 ``[count]``, ascending. Which of several equal elements are among them is not specified.
    """
    size = tensor.numel()
    if count == size:
        return torch.arange(size, device=tensor.device)
    magnitudes = tensor.abs()
    # A GPU compares all elements fast, and would have to be waited for to know how many exceed a threshold.
    if size > sample_above and tensor.device.type == "cpu":
        candidates = _exceeding(magnitudes, count, key)
        if len(candidates) >= count:
            best = magnitudes.index_select(0, candidates).topk(count, sorted=False).indices
            # Marked and read off in order, which is faster than sorting.
            is_best = torch.zeros(len(candidates), dtype=torch.bool).index_fill_(0, best, True)
            return candidates.masked_select(is_best)
    return magnitudes.topk(count, sorted=False).indices.sort().values


def _exceeding(magnitudes: Tensor, count: int, key: str) -> Tensor:
    """Positions of elements, ascending, that reach a threshold which nearly always at least ``count`` reach."""
    size = len(magnitudes)
    drawn = min(size, max(size // 128, 1024))
    # Of the sample so many are expected among the largest; the threshold is four standard deviations below.
    expected = drawn * count / size
    rank = min(drawn, math.ceil(expected + 4 * math.sqrt(expected) + 2))
    sample = magnitudes.index_select(0, stratified(size, drawn, key))
    threshold = sample.topk(rank, sorted=False).values.min()
    return (magnitudes >= threshold).nonzero().view(-1)
