"""Several ranks in one process: buckets of odd shapes, and collectives completed in lock step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from distrain.communication.collectives import Communicator
from distrain.communication.types import DONE, Pending
from distrain.compression.base import Compressor, LossyConfig, MessageCompressor, build
from distrain.compression.bucket import Bucket
from distrain.config.groups import CompressionConfig
from distrain.gradients.buckets import Gradients
from distrain.reporting.metrics import Stopwatch
from tests.runs import compose


class Odd(nn.Module):
    """Parameters of odd sizes, one of them channels-last, and a bias that most compressors send uncompressed."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.zeros(1, 1))
        self.few = nn.Parameter(torch.zeros(7, 1))
        self.many = nn.Parameter(torch.zeros(1, 65_537))
        self.images = nn.Parameter(torch.zeros(6, 5, 3, 3).to(memory_format=torch.channels_last))
        self.bias = nn.Parameter(torch.zeros(11))


def make_compressor(*overrides: str, seed: int = 0) -> MessageCompressor:
    """The configured compressor, with ``min_elements=1`` unless overridden."""
    # On tensors this small threads cost more than they gain. A fixture restores their number after the test.
    torch.set_num_threads(1)
    made = build(_configuration(overrides), seed)
    assert isinstance(made, MessageCompressor)
    return made


@functools.cache
def _configuration(overrides: tuple[str, ...]) -> CompressionConfig:
    configured = compose(*overrides).compression
    if isinstance(configured, LossyConfig) and not any("min_elements" in override for override in overrides):
        return dataclasses.replace(configured, min_elements=1)
    return configured


def bucket_for(compressor: Compressor, model: nn.Module | None = None) -> Bucket:
    """All gradients of a model in one bucket, as the strategies lay them out."""
    parameters = (model or Odd()).named_parameters()
    (bucket,) = Gradients(parameters, Communicator(), compressor, Stopwatch(torch.device("cpu"))).buckets
    return bucket


class SimulatedRanks:
    """Ranks in one process that exchange one bucket in lock step."""

    def __init__(self, size: int, *overrides: str, model: type[nn.Module] = Odd) -> None:
        self.compressors = [make_compressor(*overrides) for _ in range(size)]
        self.buckets = [bucket_for(compressor, model()) for compressor in self.compressors]
        self._generator = torch.Generator().manual_seed(0)

    def gradients(self) -> list[Tensor]:
        """New random gradients for every rank."""
        return [torch.randn(bucket.flat.shape, generator=self._generator) for bucket in self.buckets]

    def step(self, gradients: Sequence[Tensor]) -> Tensor:
        """One step's exchange.

        Returns:
            The sum that all ranks got. Asserts that it is equal on all ranks bit for bit.
        """
        ranks = [_Rank(len(self.buckets)) for _ in self.buckets]
        under_way: list[Iterator[Pending]] = []
        for compressor, bucket, gradient, rank in zip(self.compressors, self.buckets, gradients, ranks, strict=True):
            compressor.begin_step()
            bucket.flat.copy_(gradient)
            under_way.append(compressor.aggregate(bucket, cast(Communicator, rank)))
        for _ in range(self.compressors[0].phases):
            for exchange in under_way:
                next(exchange)
            _deliver(ranks)
        for exchange in under_way:
            assert next(exchange, None) is None
        for bucket in self.buckets:
            assert torch.equal(bucket.flat.view(torch.uint8), self.buckets[0].flat.view(torch.uint8))
        return self.buckets[0].flat.clone()

    def residuals(self) -> Tensor:
        """The sum of all ranks' residuals, in the layout of the bucket; zero for uncompressed tensors."""
        total = torch.zeros_like(self.buckets[0].flat)
        for compressor, bucket in zip(self.compressors, self.buckets, strict=True):
            state, offset = compressor.state_dict(), 0
            for name, tensor in bucket.tensors.items():
                if f"residual/{name}" in state:
                    there = total.as_strided(tensor.size(), tensor.stride(), offset)
                    there += state[f"residual/{name}"]
                offset += tensor.numel()
        return total


class _Rank:
    """The part of a communicator that compressors use; a collective completes when all ranks have started it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.reduced: Tensor | None = None
        self.gathered: tuple[Tensor, list[Tensor]] | None = None

    def start_all_reduce(self, tensor: Tensor) -> Pending:
        self.reduced = tensor
        return DONE

    def start_all_gather(self, tensor: Tensor) -> tuple[list[Tensor], Pending]:
        self.gathered = (tensor, [torch.empty_like(tensor) for _ in range(self.size)])
        return self.gathered[1], DONE


def _deliver(ranks: list[_Rank]) -> None:
    reduced = [rank.reduced for rank in ranks if rank.reduced is not None]
    if reduced:
        total = sum(reduced[1:], start=reduced[0].clone())
        for each in reduced:
            each.copy_(total)
    sent = [rank.gathered[0] for rank in ranks if rank.gathered is not None]
    for rank in ranks:
        if rank.gathered is not None:
            for into, tensor in zip(rank.gathered[1], sent, strict=True):
                into.copy_(tensor)
        rank.reduced = rank.gathered = None
