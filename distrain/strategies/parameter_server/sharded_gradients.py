"""A worker's gradients, divided among the servers as the parameters are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distrain.compression.bucket import Bucket
from distrain.gradients.buckets import Gradients, ReducedGradients


class ShardedGradients:
    """The gradients of all shards as those of one model.

    Args:
        shards: The gradients that are pushed to each server.
        before_sending: Called with the gradients of the whole model before anything is sent. All buckets then wait for
            the end of the backward pass. ``None``: each bucket is sent as soon as it is complete.

    """

    def __init__(self, shards: Sequence[Gradients], before_sending: Callable[[ReducedGradients], None] | None) -> None:
        self._shards = shards
        self._before_sending = before_sending

    @property
    def buckets(self) -> list[Bucket]:
        """Those of all shards."""
        return [bucket for shard in self._shards for bucket in shard.buckets]

    def rebuild_buckets(self, bucket_mb: float) -> None:
        """Lays out new buckets of at most so many MiB; see :meth:`distrain.gradients.buckets.Gradients`."""
        for shard in self._shards:
            shard.rebuild_buckets(bucket_mb, bucket_mb)

    @property
    def bytes_per_step(self) -> int:
        """Bytes of all gradients."""
        return sum(bucket.bytes for bucket in self.buckets)

    def zero(self) -> None:
        """Starts a new sum."""
        for shard in self._shards:
            shard.zero()

    def begin_last_backward(self) -> None:
        """Enables sending before the last backward pass of a step."""
        if self._before_sending is None:
            for shard in self._shards:
                shard.begin_last_backward()

    def finish(self) -> None:
        """Sends what has not been sent."""
        if self._before_sending is not None:
            self._before_sending(self)
            for shard in self._shards:
                shard.begin_last_backward()
        for shard in self._shards:
            shard.finish()

    def norm(self) -> Tensor:
        """Euclidean norm of the whole gradient, a scalar."""
        whole: Tensor = torch.linalg.vector_norm(torch.stack([shard.norm() for shard in self._shards]))
        return whole

    def scale(self, factor: Tensor) -> None:
        """Multiplies all gradients by a scalar."""
        for shard in self._shards:
            shard.scale(factor)
