"""The blocks of parameters that ranks of ``fsdp`` divide among themselves, and the memory that their passes need."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from distrain.strategies.fsdp.module_blocks import block_limit
from distrain.tools.planning.workload import Workload, at


@dataclass(frozen=True)
class ShardedBlock:
    """Parameters that are gathered, or whose gradients are sent, together.

    Attributes:
        passes: Indices of the model's blocks in whose passes they are used, in order, and the share of these passes.
        held_bytes: Size of the parameters.
        gradients: Indices of their gradients, in the model's order.
        gradient_bytes_of: Size of their gradients in each of the model's blocks, by its index.
    """

    passes: tuple[tuple[int, float], ...]
    held_bytes: float
    gradients: tuple[int, ...]
    gradient_bytes_of: Mapping[int, float]

    @property
    def gradient_bytes(self) -> float:
        """Size of all their gradients."""
        return sum(self.gradient_bytes_of.values())


@dataclass(frozen=True)
class _Parameter:
    """A parameter, or all that is frozen of one of the model's blocks.

    Attributes:
        block: Index of the model's block.
        gradient: Index of its gradient; ``None`` if it is frozen.
        held_bytes: Its size.
        gradient_bytes: Size of its gradient.
    """

    block: int
    gradient: int | None
    held_bytes: float
    gradient_bytes: float


def gathered_blocks(workload: Workload) -> list[ShardedBlock]:
    """The blocks of ``shard=full`` in the order in which a forward pass uses them.

    A run divides a model that is too large by its modules; what is known here are blocks and parameters.

    Args:
        workload: The training.
    """
    parameters = _parameters(workload)
    groups = _grouped(parameters, block_limit(workload.block_mb, workload.held_bytes)) or [[]]
    with_parameters = {index for index, own in enumerate(parameters) if own}
    counts = [max(len(own), 1) for own in parameters]
    found = []
    for number, group in enumerate(groups):
        shares: dict[int, float] = {}
        for one in group:
            shares[one.block] = shares.get(one.block, 0.0) + 1 / counts[one.block]
        # What has no parameters belongs to those before it, or else to the first ones.
        following = itertools.takewhile(
            lambda index: index not in with_parameters, range(max(shares, default=-1) + 1, len(parameters))
        )
        # Another group may have the last parameters of the block before.
        is_end = number == len(groups) - 1 or groups[number + 1][0].block != max(shares)
        shares |= dict.fromkeys(following, 1.0) if is_end else {}
        if not number:
            shares |= dict.fromkeys(range(min(shares, default=0)), 1.0)
        found.append(_block(group, shares))
    return found


def blocks_of_buckets(workload: Workload, layout: Sequence[Sequence[int]]) -> list[ShardedBlock]:
    """The blocks of ``shard=optimizer`` and ``shard=gradients``, which are the buckets of gradients.

    Args:
        workload: The training.
        layout: Indices of the gradients in each bucket.
    """
    trained = {one.gradient: one for own in _parameters(workload) for one in own if one.gradient is not None}
    groups = [[trained[gradient] for gradient in sorted(bucket)] for bucket in layout]
    return [_block(group, dict.fromkeys((one.block for one in group), 1.0)) for group in groups]


def peak_bytes(
    workload: Workload,
    blocks: Sequence[ShardedBlock],
    samples: int,
    batchnorm: str,
    gathered: Sequence[tuple[float, float]],
    copies: int,
) -> float:
    """Most bytes that are held in passes after which each block's gradients are sent and freed.

    Args:
        workload: The training.
        blocks: In the order in which a forward pass uses them.
        samples: Of the passes.
        batchnorm: Kind of the BatchNorm layers.
        gathered: Bytes of gathered parameters, for each block: during its passes, and when its gradients are sent.
        copies: How often a block's gradients are held while they are sent.
    """
    saved = [samples * block.memory_of(batchnorm).saved for block in workload.blocks]
    until = [0.0, *itertools.accumulate(saved)]
    peak = workload.activation_bytes(samples, batchnorm)
    for block, (passing, sending) in zip(blocks, gathered, strict=True):
        waiting = 0.0
        for index, _ in reversed(block.passes):
            extra = at(workload.blocks[index].memory_of(batchnorm).extra, samples)
            peak = max(peak, until[index + 1] + extra + waiting + passing)
            # Gradients stay until all of the block are there.
            waiting += block.gradient_bytes_of.get(index, 0.0)
        first = block.passes[0][0] if block.passes else 0
        peak = max(peak, until[first] + copies * block.gradient_bytes + sending)
    return peak


def gathered_bytes(blocks: Sequence[ShardedBlock], *, reshards: bool) -> list[tuple[float, float]]:
    """Bytes of gathered parameters, as :func:`peak_bytes` takes them.

    Args:
        blocks: In the order in which a forward pass uses them.
        reshards: A block is freed after each of its passes; else all stay.
    """
    sizes = [block.held_bytes for block in blocks]
    if not reshards:
        return [(sum(sizes), sum(sizes))] * len(sizes)
    # The next one of the forward or of the backward pass is gathered meanwhile.
    neighbours = zip([0.0, *sizes[:-1]], [*sizes[1:], 0.0], strict=True)
    return [(own + max(before, after), before) for own, (before, after) in zip(sizes, neighbours, strict=True)]


def _parameters(workload: Workload) -> list[list[_Parameter]]:
    """The parameters of each of the model's blocks."""
    found, number = [], itertools.count()
    for index, block in enumerate(workload.blocks):
        own = [_Parameter(index, next(number), float(size), float(size)) for size in block.gradients]
        frozen = float(block.held_bytes - block.gradient_bytes)
        # Buffers are counted with frozen parameters, and are few.
        found.append([*own, *([_Parameter(index, None, frozen, 0.0)] if frozen > 0 else [])])
    return found


def _grouped(parts: Iterable[Sequence[_Parameter]], limit: float) -> list[list[_Parameter]]:
    """As :func:`~distrain.strategies.fsdp.module_blocks.choose_blocks` groups modules."""
    found: list[list[_Parameter]] = []
    together: list[_Parameter] = []
    for part in parts:
        if together and _held(together) + _held(part) > limit:
            found.append(together)
            together = []
        if len(part) > 1 and _held(part) > limit:
            found += _grouped([[one] for one in part], limit)
        else:
            together = [*together, *part]
    return [*found, together] if together else found


def _held(parameters: Iterable[_Parameter]) -> float:
    return sum(one.held_bytes for one in parameters)


def _block(group: Sequence[_Parameter], shares: Mapping[int, float]) -> ShardedBlock:
    sizes: dict[int, float] = {}
    for one in group:
        sizes[one.block] = sizes.get(one.block, 0.0) + one.gradient_bytes
    gradients = tuple(one.gradient for one in group if one.gradient is not None)
    return ShardedBlock(tuple(sorted(shares.items())), _held(group), gradients, sizes)
