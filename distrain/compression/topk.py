"""The largest elements of each tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from distrain.compression.bucket import Bucket
from distrain.compression.encoding.positions import PositionCode
from distrain.compression.sparse import SparseCompressor, SparseConfig, positions_in_bucket, stratified_sample
from distrain.config.registry import register
from distrain.config.setting import setting


@dataclass
class TopKConfig(SparseConfig):
    """Keys of ``compression=topk``."""

    values: str = setting(
        "bf16: values in 16 bits, the rounding error is sent later; full: in the gradient's dtype.",
        choices=("bf16", "full"),
    )
    sample_above: int = setting(
        "In tensors with more elements a sample tells where to look for the largest; the choice is the same.",
        at_least=1,
    )


@register("compression", "topk", TopKConfig)
class TopK(SparseCompressor):
    """Sends the elements of largest magnitude of each tensor, with their positions.

    Aji & Heafield 2017, "Sparse Communication for Distributed Gradient Descent" (arXiv 1704.05021), §3, per tensor; Lin
    et al. 2018, "Deep Gradient Compression" (arXiv 1712.01887), for the sampled threshold. Every rank chooses its own
    elements, so an all-reduce can't sum the messages: what a rank sends grows with the number of ranks.
    """

    config: TopKConfig

    @override
    def compress(self, bucket: Bucket) -> list[Tensor]:
        counts = self.counts(bucket, self.step)
        chosen = {
            name: largest(tensor, counts[name], self.config.sample_above, self.draw_key(self.step, name))
            for name, tensor in bucket.compressed_tensors.items()
        }
        positions = positions_in_bucket(bucket, chosen)
        values = self.extract(bucket, positions, self._dtype(bucket))
        return [values, *self._code(bucket).write(positions)]

    @override
    def message_layout(self, bucket: Bucket) -> list[tuple[torch.dtype, int]]:
        """Values, then the low and the high parts of their positions as :class:`PositionCode` writes them."""
        code = self._code(bucket)
        return [(self._dtype(bucket), code.count), *((torch.uint8, size) for size in code.bytes)]

    @override
    def add_decompressed(self, message: list[Tensor], bucket: Bucket) -> None:
        values, *encoded_positions = message
        positions = self._code(bucket).read(*encoded_positions)
        bucket.compressed_part.index_add_(0, positions, values.to(bucket.flat.dtype))

    def _code(self, bucket: Bucket) -> PositionCode:
        # One code for the whole bucket: positions tensor after tensor form one ascending sequence.
        return PositionCode.shortest(sum(self.counts(bucket, self.step).values()), bucket.compressed_part.numel())

    def _dtype(self, bucket: Bucket) -> torch.dtype:
        return torch.bfloat16 if self.config.values == "bf16" else bucket.flat.dtype


def largest(tensor: Tensor, count: int, sample_above: int, key: str) -> Tensor:
    """Positions of the elements of largest magnitude.

    In a large tensor only elements above a threshold are compared; the threshold is estimated from a random sample
    (Lin et al. 2018, §3, "hierarchical top-k"). Unlike there the result is exact: the threshold is low enough that
    nearly always more than ``count`` elements exceed it, and otherwise all elements are compared.

    Args:
        tensor: ``[n]``.
        count: Number of positions, at most n.
        sample_above: Number of elements above which a sample is drawn.
        key: Determines the sample.

    Returns:
        int64 ``[count]``, ascending. Which of several elements of equal magnitude are chosen is not specified.
    """
    size = tensor.numel()
    if count == size:
        return torch.arange(size, device=tensor.device)
    magnitudes = tensor.abs()
    # A GPU compares all elements quickly, and reading how many exceed a threshold would wait for it.
    if size > sample_above and tensor.device.type == "cpu":
        candidates = _candidates(magnitudes, count, key)
        if len(candidates) >= count:
            best = magnitudes.index_select(0, candidates).topk(count, sorted=False).indices
            # Selecting by a mask keeps the ascending order and is faster than sorting.
            is_best = torch.zeros(len(candidates), dtype=torch.bool).index_fill_(0, best, True)
            return candidates.masked_select(is_best)
    return magnitudes.topk(count, sorted=False).indices.sort().values


def _candidates(magnitudes: Tensor, count: int, key: str) -> Tensor:
    """Ascending positions of the elements above a threshold that nearly always at least ``count`` elements reach."""
    size = len(magnitudes)
    sample_size = min(size, max(size // 128, 1024))
    # So many of the sample are expected among the largest; the threshold is four standard deviations below.
    expected = sample_size * count / size
    rank = min(sample_size, math.ceil(expected + 4 * math.sqrt(expected) + 2))
    sample = magnitudes.index_select(0, stratified_sample(size, sample_size, key))
    threshold = sample.topk(rank, sorted=False).values.min()
    return (magnitudes >= threshold).nonzero().view(-1)
