"""Times the own work of compressors on buckets of the model's gradients."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from distrain.communication.collectives import Communicator
from distrain.compression import base as compression
from distrain.compression.autotune.compressor_cost import CompressorCost, measure_cost
from distrain.config.groups import CompressionConfig
from distrain.gradients.bucket_sizes import MIB, AllReduceCost, choose_sizes, gradient_bytes_of
from distrain.gradients.buckets import make_bucket, split_into_buckets
from distrain.gradients.trainable_parameters import trainable_parameters

#: Most bytes of gradients on which compressors are timed.
_MOST_COMPRESSED = 24 * MIB


@dataclass(frozen=True)
class Compressors:
    """What compressors cost.

    Attributes:
        costs: Of each of them, on buckets of ``bucket_bytes``.
        bucket_bytes: Bytes of the buckets.
        keeping_residuals: Those that keep a residual of the size of the gradients.
    """

    costs: Mapping[str, CompressorCost]
    bucket_bytes: tuple[int, ...]
    keeping_residuals: frozenset[str]

    def faster(self, factor: float) -> Compressors:
        """The same where their work takes less time by a factor."""
        costs = {name: _divided(cost, factor) for name, cost in self.costs.items()}
        return dataclasses.replace(self, costs=costs)


def measure_compressors(
    configs: Mapping[str, CompressionConfig],
    model: nn.Module,
    cost: AllReduceCost | None,
    everyone: Communicator,
    seed: int,
) -> Compressors:
    """Times compressors; all ranks call it together.

    Args:
        configs: Configurations of the compressors.
        model: Whose gradients they would compress.
        cost: Of an all-reduce, by which a run chooses its buckets.
        everyone: All ranks.
        seed: Of the compressors' random draws.
    """
    parts = _bucket_parts(model, cost)
    several = everyone.size > 1
    return Compressors(
        {name: _cost_of(config, parts, everyone, seed) for name, config in configs.items()} if several else {},
        tuple(4 * _numel(part) for part in parts),
        frozenset(name for name, config in configs.items() if compression.build(config).residuals is not None),
    )


def _cost_of(
    config: CompressionConfig,
    parts: Sequence[Sequence[tuple[str, nn.Parameter]]],
    everyone: Communicator,
    seed: int,
) -> CompressorCost:
    """A compressor's work on buckets of some parameters each."""
    compressor = compression.build(config, seed)
    buckets = [make_bucket(list(part), compressor) for part in parts]
    torch.manual_seed(0)
    for bucket in buckets:
        bucket.flat.normal_(std=1e-3)
    for _ in range(compressor.warmup_steps):
        compressor.begin_step()
    return measure_cost(compressor, buckets, everyone)


def _bucket_parts(model: nn.Module, cost: AllReduceCost | None) -> list[list[tuple[str, nn.Parameter]]]:
    """The parameters of buckets on which compressors are timed.

    All of them, and two of the buckets that a run has; of a large model instead some of its parameters, and a bucket
    that is much smaller.
    """
    parameters = list(trainable_parameters(model).items())
    sizes = [size * MIB for size in choose_sizes(cost, gradient_bytes_of(model))] if cost is not None else []
    parts = sorted(split_into_buckets(parameters[::-1], *sizes), key=_numel) if sizes else [parameters]
    sample = sample_of(parameters)
    if len(sample) < len(parameters):
        return [sample, parts[0]] if 2 * _numel(parts[0]) <= _numel(sample) else [sample]
    return [parameters] if len(parts) == 1 else [parameters, parts[-1], parts[0]]


def sample_of(parameters: Sequence[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
    """Some of a large model's parameters, with as many of each kind of layer as chance has it; all of a smaller one's.

    Args:
        parameters: All of them, by name.

    Returns:
        In the same order; at least one, and else no more than compressors are timed on.
    """
    left = _MOST_COMPRESSED // 4
    if _numel(parameters) <= left:
        return list(parameters)
    chosen: set[str] = set()
    # The same on all ranks and in all plans.
    for name, parameter in random.Random(0).sample(parameters, len(parameters)):
        if parameter.numel() <= left:
            chosen.add(name)
            left -= parameter.numel()
    smallest = min(parameters, key=lambda pair: pair[1].numel())
    return [pair for pair in parameters if pair[0] in chosen] or [smallest]


def _numel(parameters: Sequence[tuple[str, nn.Parameter]]) -> int:
    return sum(parameter.numel() for _, parameter in parameters)


def _divided(cost: CompressorCost, crowd: float) -> CompressorCost:
    buckets = [dataclasses.replace(bucket, work=[work / crowd for work in bucket.work]) for bucket in cost.buckets]
    return CompressorCost(buckets)
