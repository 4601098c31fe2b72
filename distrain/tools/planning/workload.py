"""What a training costs on one rank: measured times and sizes of its blocks, by number of samples."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distrain.compression.autotune.compressor_cost import BucketCost, CompressorCost
from distrain.gradients.bucket_sizes import MIB, BucketSizes
from distrain.gradients.buckets import split_into_buckets
from distrain.tools.planning.cluster import Accelerator


@dataclass(frozen=True)
class BlockMemory:
    """What a block holds in its passes.

    Attributes:
        saved: What autograd saves for each sample.
        extra: Most bytes that are held during its passes, beyond what it and the blocks before it save, by number of
            samples.
        extra_at_end: As ``extra``, of a block whose output and its gradient are held during its whole backward pass, as
            by the last block of a pipeline's stage; empty: not known.
    """

    saved: float
    extra: Mapping[int, float] = dataclasses.field(default_factory=dict)
    extra_at_end: Mapping[int, float] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class BlockProfile:
    """One block of the model.

    Attributes:
        name: Its name in the model.
        gradients: Bytes of the gradient of each trained parameter, in the model's order.
        forward: Seconds of a forward pass by number of samples.
        backward: Seconds of a backward pass by number of samples.
        activation_bytes: What autograd saves for each sample.
        output_bytes: Size of the output of each sample.
        output_tensors: Tensors of the output.
        flops: Floating-point operations of a forward pass of one sample; 0: not counted.
        batchnorms: BatchNorm layers, which under several ranks may communicate.
        begins_stage: Whether a pipeline's stage may begin with it.
        state_bytes: Bytes of its parameters and buffers; ``None``: as many as its gradients have.
        kernels: Kernels of a forward pass.
        saves_output: Whether its output is among what it saves, and not among what the next block does.
        saves_input: Whether its input is among what it saves, and not among what blocks before do.
        memory: What it holds in its passes, by the kind of its BatchNorm layers: ``plain``, ``synchronised`` or
            ``deferred``. Without an entry: what autograd saves.
        batchnorm_gradients: For each trained BatchNorm layer, which of ``gradients`` is its first one.
        forward_sums: Of layers that are divided among ranks, bytes for each sample of each tensor that these ranks add
            up in a forward pass.
        backward_sums: The same of a backward pass.
    """

    name: str
    gradients: tuple[int, ...]
    forward: Mapping[int, float]
    backward: Mapping[int, float]
    activation_bytes: float = 0.0
    output_bytes: float = 0.0
    output_tensors: int = 1
    flops: float = 0.0
    batchnorms: int = 0
    begins_stage: bool = True
    state_bytes: int | None = None
    kernels: int = 1
    saves_output: bool = False
    saves_input: bool = False
    memory: Mapping[str, BlockMemory] = dataclasses.field(default_factory=dict)
    batchnorm_gradients: tuple[int, ...] = ()
    forward_sums: tuple[float, ...] = ()
    backward_sums: tuple[float, ...] = ()

    @property
    def held_bytes(self) -> int:
        """Bytes of its parameters and buffers."""
        return self.gradient_bytes if self.state_bytes is None else self.state_bytes

    @property
    def gradient_bytes(self) -> int:
        """Bytes of all its gradients."""
        return sum(self.gradients)

    def memory_of(self, batchnorm: str) -> BlockMemory:
        """What it holds in its passes, with a kind of BatchNorm layers."""
        return self.memory.get(batchnorm) or self.memory.get("plain") or BlockMemory(self.activation_bytes)

    def times(self, factor: float) -> BlockProfile:
        """The same block with longer or shorter passes."""
        forward = {size: factor * seconds for size, seconds in self.forward.items()}
        backward = {size: factor * seconds for size, seconds in self.backward.items()}
        return dataclasses.replace(self, forward=forward, backward=backward)

    def on(self, accelerator: Accelerator, sizes: Sequence[int]) -> BlockProfile:
        """The same block on a device that isn't here: a backward pass takes twice the operations of a forward pass."""
        # What is saved is written by one kernel and read by another one.
        moved = 2 * self.activation_bytes + self.output_bytes
        forward = {
            size: accelerator.seconds(size * self.flops, size * moved + self.gradient_bytes, self.kernels)
            for size in sizes
        }
        backward = {
            size: accelerator.seconds(2 * size * self.flops, 2 * (size * moved + self.gradient_bytes), 2 * self.kernels)
            for size in sizes
        }
        return dataclasses.replace(self, forward=forward, backward=backward)


@dataclass(frozen=True)
class DividedModel:
    """What the first of some ranks has, and computes, of a model whose layers are divided among them.

    Attributes:
        ranks: Number of ranks.
        blocks: Its part of each of the model's blocks.
        update_seconds: Seconds of the optimizer for its part of the parameters.
        optimizer_bytes: Bytes of the optimizer's state for them.
        update_bytes: Most bytes that the optimizer needs while it works.
        starts: Index of the first block of each pipeline stage for which layers are divided: what is divided together
            lies in one stage.
    """

    ranks: int
    blocks: tuple[BlockProfile, ...]
    update_seconds: float
    optimizer_bytes: float
    update_bytes: float = 0.0
    starts: tuple[int, ...] = (0,)

    def faster(self, passes: float, update: float) -> DividedModel:
        """The same with times that are shorter by these factors."""
        return dataclasses.replace(self.times(1 / passes), update_seconds=self.update_seconds / update)

    def times(self, factor: float) -> DividedModel:
        """The same with longer or shorter passes."""
        return dataclasses.replace(self, blocks=tuple(block.times(factor) for block in self.blocks))

    def on(self, accelerator: Accelerator, sizes: Sequence[int]) -> DividedModel:
        """The same on a device that isn't here."""
        gradient_bytes = sum(block.gradient_bytes for block in self.blocks)
        update = _update_seconds(accelerator, gradient_bytes, self.optimizer_bytes)
        blocks = tuple(block.on(accelerator, sizes) for block in self.blocks)
        return dataclasses.replace(self, blocks=blocks, update_seconds=update)


@dataclass(frozen=True)
class Workload:
    """A training.

    Attributes:
        blocks: The model's blocks in order.
        batch_size: Samples of a global batch.
        outside: Seconds in which a step waits for its samples, by their number.
        update_seconds: Seconds of the optimizer for all parameters.
        optimizer_bytes: Bytes of the optimizer's state for all parameters.
        micro_batch_size: Largest number of samples of a pass; ``None``: no limit.
        synchronised_factor: Factor by which passes take longer with BatchNorm layers that can communicate.
        compressors: Costs of each compressor on ``compressor_ranks`` ranks: first for all gradients in one bucket, then
            for smaller buckets.
        compressor_ranks: Number of ranks for which messages of ``compressors`` are given.
        accelerator: The times are an estimate for this device; ``None``: they were measured.
        copy_seconds: Seconds of copying as many bytes as all gradients have.
        digest_seconds: Seconds of hashing as many.
        deferred_factor: Factor by which passes take longer with BatchNorm layers whose running statistics are updated
            once a step.
        keeping_residuals: Compressors that keep a residual of the size of the gradients.
        compressed_bytes: Bytes of the buckets of ``compressors``.
        server_seconds: Seconds that a worker or a parameter server spends around each message, besides waiting.
        action_seconds: Seconds that a rank of a pipeline spends around each pass, besides waiting: on messages and
            bookkeeping.
        latency_factor: By which collectives in a step have a longer latency than those without anything besides, or a
            shorter one.
        batchnorm_latency: Factor by which a collective of a BatchNorm layer takes longer in passes than without
            anything besides, since ranks come to it at different times; ``None``: not known. 1 where it hardly matters.
        input_bytes: Size of the model's input of a sample.
        update_bytes: Most bytes that the optimizer needs while it works.
        deterministic: Bucket sizes that are not configured are the same everywhere, instead of chosen by measurement.
        rounds: Times that a step computes the gradient of its batch; 2 with sharpness-aware minimization.
        sharpness_seconds: Seconds between two of these rounds, in which the parameters are moved, and moved back later.
        block_mb: As ``strategy.block_mb`` of ``fsdp``.
        divided: The model with its layers divided among ranks, for each number of ranks and of pipeline stages that was
            asked for and is possible.
    """

    blocks: tuple[BlockProfile, ...]
    batch_size: int
    outside: Mapping[int, float]
    update_seconds: float
    optimizer_bytes: float
    micro_batch_size: int | None = None
    synchronised_factor: float = 1.0
    compressors: Mapping[str, CompressorCost] = dataclasses.field(default_factory=dict)
    compressor_ranks: int = 2
    accelerator: Accelerator | None = None
    copy_seconds: float = 0.0
    digest_seconds: float = 0.0
    deferred_factor: float = 1.0
    keeping_residuals: frozenset[str] = frozenset()
    compressed_bytes: tuple[int, ...] = ()
    server_seconds: float = 0.0
    action_seconds: float = 0.0
    latency_factor: float = 1.0
    batchnorm_latency: float | None = None
    input_bytes: float = 0.0
    update_bytes: float = 0.0
    deterministic: bool = False
    rounds: int = 1
    sharpness_seconds: float = 0.0
    block_mb: float | None = None
    divided: tuple[DividedModel, ...] = ()

    @property
    def held_bytes(self) -> int:
        """Bytes of all parameters and buffers."""
        return sum(block.held_bytes for block in self.blocks)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of all gradients."""
        return sum(block.gradient_bytes for block in self.blocks)

    @property
    def gradient_sizes(self) -> tuple[int, ...]:
        """Bytes of the gradient of each trained parameter, in the model's order."""
        return tuple(size for block in self.blocks for size in block.gradients)

    @property
    def batchnorms(self) -> int:
        """BatchNorm layers of the model."""
        return sum(block.batchnorms for block in self.blocks)

    def outside_seconds(self, samples: float) -> float:
        """Seconds in which a step waits for its samples."""
        return at(self.outside, samples)

    def forward_seconds(self, samples: float) -> float:
        """Seconds of a forward pass of the whole model."""
        return sum(at(block.forward, samples) for block in self.blocks)

    def backward_seconds(self, samples: float) -> float:
        """Seconds of a backward pass of the whole model."""
        return sum(at(block.backward, samples) for block in self.blocks)

    def activation_bytes(self, samples: float, batchnorm: str = "plain") -> float:
        """Most bytes that are held during passes of the whole model: what is saved, and what is on its way."""
        return peak_bytes(self.blocks, samples, batchnorm)

    def pieces(self, samples: int) -> list[int]:
        """Samples of each pass of a rank that works on so many."""
        if self.micro_batch_size is None or samples <= self.micro_batch_size:
            return [samples]
        count = -(-samples // self.micro_batch_size)
        return [samples // count + (index < samples % count) for index in range(count)]

    def compressor_cost(self, name: str, size: float) -> BucketCost:
        """Cost of a compressor for a bucket: between those of the measured buckets, or in proportion to the largest.

        Args:
            name: Of the compressor.
            size: Bytes of the bucket.
        """
        buckets = self.compressors[name].buckets
        sizes = self.compressed_bytes or (self.gradient_bytes,)
        known = sorted(zip(sizes, buckets, strict=True), key=lambda pair: pair[0])
        smallest, bucket = known[0]
        if size <= smallest or len(known) == 1:
            # Of a bucket alone nothing is known of what doesn't depend on its size.
            work = size / smallest if len(known) == 1 else 1.0
            return _weighted(bucket, work, size / smallest)
        largest, bucket = known[-1]
        if size >= largest:
            return _weighted(bucket, size / largest, size / largest)
        after = next(index for index, (bytes_, _) in enumerate(known) if bytes_ >= size)
        (low, smaller), (high, larger) = known[after - 1], known[after]
        share = (size - low) / (high - low)
        if _kinds(smaller) != _kinds(larger):
            # A bucket of tensors that are not compressed has other collectives.
            known_size, nearer = (low, smaller) if share < 0.5 else (high, larger)
            return _weighted(nearer, size / known_size, size / known_size)
        return _added(_weighted(smaller, 1 - share, 1 - share), _weighted(larger, share, share))

    def with_step(self, samples: int, seconds: float) -> Workload:
        """The same training with another time of a step.

        What it is longer than its parts is spent around them, at every number of samples. If it is shorter, the passes
        are.

        Args:
            samples: Of the step.
            seconds: That it takes.
        """
        passes = self.rounds * (self.forward_seconds(samples) + self.backward_seconds(samples))
        around = self.outside_seconds(samples) + self.update_seconds + (self.rounds - 1) * self.sharpness_seconds
        more = seconds - passes - around
        if more >= 0:
            return dataclasses.replace(self, outside={size: one + more for size, one in self.outside.items()})
        factor = max(1 + more / passes, 0.0)
        divided = tuple(one.times(factor) for one in self.divided)
        return dataclasses.replace(self, blocks=tuple(block.times(factor) for block in self.blocks), divided=divided)

    def divided_among(self, ranks: int, stages: int = 1) -> DividedModel | None:
        """The model with its layers divided among ranks; ``None`` if that is not known.

        Args:
            ranks: Number of ranks.
            stages: Of the pipeline, each of which so many ranks divide.
        """
        return next((one for one in self.divided if (one.ranks, len(one.starts)) == (ranks, stages)), None)

    def of_rank(self, divided: DividedModel) -> Workload:
        """The training of a rank that has its part of the layers alone."""
        share = sum(block.gradient_bytes for block in divided.blocks) / max(self.gradient_bytes, 1)
        return dataclasses.replace(
            self,
            blocks=divided.blocks,
            update_seconds=divided.update_seconds,
            optimizer_bytes=divided.optimizer_bytes,
            update_bytes=divided.update_bytes,
            copy_seconds=share * self.copy_seconds,
            digest_seconds=share * self.digest_seconds,
            sharpness_seconds=share * self.sharpness_seconds,
            divided=(),
        )

    def on(self, accelerator: Accelerator) -> Workload:
        """The same training on a device that isn't here."""
        sizes = sorted({1, self.batch_size})
        blocks = tuple(block.on(accelerator, sizes) for block in self.blocks)
        return dataclasses.replace(
            self,
            blocks=blocks,
            outside={1: 0.0, self.batch_size: 0.0},
            update_seconds=_update_seconds(accelerator, self.gradient_bytes, self.optimizer_bytes),
            synchronised_factor=1.0,
            deferred_factor=1.0,
            compressors={},
            accelerator=accelerator,
            copy_seconds=accelerator.seconds(0.0, 2 * self.gradient_bytes),
            # Done by the host's processor, of which nothing is known.
            digest_seconds=0.0,
            # Read: gradients and parameters; written: their copy, and twice the parameters.
            sharpness_seconds=accelerator.seconds(0.0, 7 * self.gradient_bytes) if self.rounds > 1 else 0.0,
            divided=tuple(one.on(accelerator, sizes) for one in self.divided),
        )

    def to_plain(self) -> dict[str, Any]:
        """The profile as plain data, for ``plan.json``."""
        plain = dataclasses.asdict(self)
        plain["keeping_residuals"] = sorted(self.keeping_residuals)
        plain["compressors"] = {name: cost.to_plain() for name, cost in self.compressors.items()}
        return plain


def peak_bytes(blocks: Sequence[BlockProfile], samples: float, batchnorm: str = "plain") -> float:
    """Most bytes that are held during a forward and a backward pass of some consecutive blocks.

    Args:
        blocks: The blocks.
        samples: Of the passes.
        batchnorm: Kind of the BatchNorm layers.
    """
    peak = saved = 0.0
    for block in blocks:
        memory = block.memory_of(batchnorm)
        saved += samples * memory.saved
        peak = max(peak, saved + at(memory.extra, samples))
    return peak


def _update_seconds(accelerator: Accelerator, gradient_bytes: float, optimizer_bytes: float) -> float:
    """Of an optimizer: parameter, gradient and state are read, parameter and state are written."""
    return accelerator.seconds(0.0, 3 * gradient_bytes + 2 * optimizer_bytes)


def _weighted(bucket: BucketCost, work: float, sent: float) -> BucketCost:
    """A cost with its work and its messages times a factor each."""
    collectives = [[(kind, round(sent * bytes_)) for kind, bytes_ in started] for started in bucket.collectives]
    return BucketCost([work * seconds for seconds in bucket.work], collectives)


def _kinds(bucket: BucketCost) -> list[list[str]]:
    """The collectives of each phase."""
    return [[kind for kind, _ in started] for started in bucket.collectives]


def _added(one: BucketCost, other: BucketCost) -> BucketCost:
    """The sum of two costs of the same compressor."""
    collectives = [
        [(kind, bytes_ + more) for (kind, bytes_), (_, more) in zip(started, others, strict=True)]
        for started, others in zip(one.collectives, other.collectives, strict=True)
    ]
    return BucketCost([a + b for a, b in zip(one.work, other.work, strict=True)], collectives)


@functools.lru_cache(maxsize=256)
def bucket_layout(gradients: tuple[int, ...], sizes: BucketSizes) -> tuple[tuple[int, ...], ...]:
    """Indices of the gradients in each bucket, in the order in which buckets are complete.

    Args:
        gradients: Bytes of each gradient, in the model's order.
        sizes: Limits of the buckets.
    """
    named = [
        (str(index), nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False))
        for index, size in enumerate(gradients)
    ]
    parts = split_into_buckets(named[::-1], sizes.first * MIB, sizes.other * MIB, sizes.last * MIB)
    return tuple(tuple(int(name) for name, _ in part) for part in parts)


def at(times: Mapping[int, float], samples: float) -> float:
    """Time for some number of samples, from measured numbers.

    Between two numbers, and beyond the last one, time is linear. Below the first one the same line goes on, but no
    pass is shorter than its share of the first one's time.
    """
    if samples <= 0 or not times:
        return 0.0
    known = sorted(times)
    if len(known) == 1:
        return times[known[0]] * samples / known[0]
    after = next((index for index, size in enumerate(known) if size >= samples), len(known) - 1)
    low, high = known[max(after - 1, 0)], known[max(after, 1)]
    slope = (times[high] - times[low]) / (high - low)
    value = times[low] + slope * (samples - low)
    smallest = times[known[0]] * min(samples / known[0], 1.0)
    return max(value, smallest)
