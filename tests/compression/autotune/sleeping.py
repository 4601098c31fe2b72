"""Compressors that take as long as a test wants."""

from __future__ import annotations

import time
from collections.abc import Iterator

from torch import nn

from distrain.communication.collectives import Communicator
from distrain.communication.types import Pending
from distrain.compression.base import Compressor
from distrain.compression.bucket import Bucket


class SlowCompressor(Compressor):
    """Reduces every bucket twice and sleeps before, between and after."""

    sleeps = (0.009, 0.006, 0.003)
    phases = 2

    def compresses(self, parameter: nn.Parameter) -> bool:
        return True

    def aggregate(self, bucket: Bucket, communicator: Communicator) -> Iterator[Pending]:
        time.sleep(self.sleeps[0])
        mean = bucket.flat / 2
        yield communicator.start_all_reduce(mean)
        time.sleep(self.sleeps[1])
        again = bucket.flat / 2
        yield communicator.start_all_reduce(again)
        time.sleep(self.sleeps[2])
        bucket.flat.copy_(mean).add_(again)


class QuickCompressor(SlowCompressor):
    """The same without sleeping."""

    sleeps = (0.0, 0.0, 0.0)
