"""A step of ``fsdp``: ranks gather what they share just before it is used, and each one updates its own part."""

from __future__ import annotations

from collections.abc import Iterator

from distrain.strategies.fsdp.options import FULL, OPTIMIZER
from distrain.tools.planning.prediction import Memory, Prediction
from distrain.tools.planning.simulation import Compute, Operation, Start, Wait
from distrain.tools.planning.steps.common import (
    BATCHNORM_BACKWARD,
    BATCHNORM_FORWARD,
    REPLICAS,
    Setting,
    backward_pass,
    backward_pieces,
    backward_sums_by_gradient,
    backward_with_exchange,
    batchnorm_collectives,
    batchnorm_waits,
    batchnorms_by_gradient,
    bucket_sizes,
    forward_pass,
    parts_of,
)
from distrain.tools.planning.steps.shape import Shape
from distrain.tools.planning.steps.sharded_blocks import (
    ShardedBlock,
    blocks_of_buckets,
    gathered_blocks,
    gathered_bytes,
    peak_bytes,
)
from distrain.tools.planning.workload import at, bucket_layout


def predict(
    setting: Setting,
    keys: dict[str, str],
    *,
    shard: str,
    shard_size: int | None = None,
    reshards: bool = True,
    tensor: int = 1,
) -> Prediction:
    """Predicts a step of sharded data parallelism.

    Args:
        setting: Where.
        keys: Keys and values of the command line that mean this.
        shard: What is divided: ``optimizer``, ``gradients`` or ``full``.
        shard_size: Neighbouring replicas that share one copy; ``None``: all.
        reshards: With ``full``, parameters are gathered again for the backward pass.
        tensor: Ranks of a replica, which divide layers among themselves.
    """
    replicas = setting.cluster.ranks // tensor
    shard_size = shard_size or replicas
    return _Step(setting, shard, Shape(replicas // shard_size, shard_size, tensor=tensor), reshards).predict(keys)


class _Step:
    """A step of all ranks, which do the same at the same time."""

    def __init__(self, setting: Setting, shard: str, shape: Shape, reshards: bool) -> None:
        self._setting = setting.divided(shape)
        self._workload = self._setting.workload
        self._shard, self._parts, self._reshards = shard, shape.shard, reshards
        network = setting.network
        self._everyone = shape.replicas_group(network)
        self._sharing, self._replicas = shape.shard_group(network), shape.data_group(network)
        self._share = -(-self._workload.batch_size // shape.replicas)
        self._pieces = self._workload.pieces(self._share)
        self._together = shape.replicas > 1 and self._workload.batchnorms > 0
        self._factor = self._workload.synchronised_factor if self._together else 1.0
        self._members = setting.members
        self._sizes = bucket_sizes(self._setting, self._everyone)
        self._blocks = self._sharded_blocks()
        self._trained = [index for index, block in enumerate(self._blocks) if block.gradient_bytes]

    def _sharded_blocks(self) -> list[ShardedBlock]:
        """In the order in which a forward pass uses them."""
        if self._shard == FULL:
            return gathered_blocks(self._workload)
        layout = bucket_layout(self._workload.gradient_sizes, self._sizes)
        return blocks_of_buckets(self._workload, layout)[::-1]

    def predict(self, keys: dict[str, str]) -> Prediction:
        program = list(self._program())
        simulated = self._setting.simulate([program] * self._members, self._setting.representatives())
        computed = max(sum(kinds.values()) for kinds in simulated.computed)
        # A block is gathered while the one before it computes, so ranks need not be on time for each. Each layer whose
        # statistics are shared waits for the slowest rank.
        waits = 1 + len(self._pieces) * (batchnorm_waits(self._workload) if self._together else 0)
        stragglers = self._setting.stragglers(computed, self._everyone.size, 1 / waits)
        stragglers += self._setting.stragglers_of_layers(computed, len(self._pieces))
        return Prediction(
            keys,
            parts_of(simulated, stragglers),
            max(simulated.sent),
            self._memory(),
            same_as_single=True,
            simulated=simulated,
        )

    # --- the program -------------------------------------------------------------------------------------------------

    def _program(self) -> Iterator[Operation]:
        workload = self._workload
        yield Compute("update", workload.outside_seconds(self._share))
        for number, samples in enumerate(self._pieces):
            is_last = number == len(self._pieces) - 1
            yield from self._forward(number, samples)
            yield from self._backward(number, samples, sends=is_last)
        if self._shard != OPTIMIZER:
            yield from self._end_of_scattering()
        yield Compute("update", workload.update_seconds / self._parts)
        if self._shard != FULL:
            # Updated parameters, which nothing hides.
            for index, block in enumerate(self._blocks):
                yield self._gather(f"updated {index}", block)
            for index in range(len(self._blocks)):
                yield Wait(f"updated {index}")

    def _statistics(self, name: str, collectives: float) -> list[Operation]:
        """Collectives of BatchNorm layers, which take place after those that were started before."""
        if not self._together or not collectives:
            return []
        return batchnorm_collectives(self._setting, name, collectives, self._members, self._everyone)

    def _passes_of(self, block: ShardedBlock, samples: int, kind: str, name: str) -> Iterator[Operation]:
        """What is computed with a block of ``shard=full``, and the collectives of its BatchNorm layers."""
        profiles, forward = self._workload.blocks, kind == "forward"
        shares = [(share, profiles[own]) for own, share in block.passes]
        seconds = sum(share * at(one.forward if forward else one.backward, samples) for share, one in shares)
        yield Compute(kind, self._factor * seconds)
        sums = [share * size for share, one in shares for size in (one.forward_sums if forward else one.backward_sums)]
        yield from self._setting.sums(f"sums {name}", sums, samples)
        layers = sum(share * one.batchnorms for share, one in shares)
        yield from self._statistics(
            f"statistics {name}", (BATCHNORM_FORWARD if forward else BATCHNORM_BACKWARD) * layers
        )

    def _forward(self, piece: int, samples: int) -> Iterator[Operation]:
        if self._shard != FULL or (piece and not self._reshards):
            yield from forward_pass(self._setting, samples, self._factor, str(piece))
            yield from self._statistics(f"statistics {piece}", BATCHNORM_FORWARD * self._workload.batchnorms)
            return
        for index, block in enumerate(self._blocks):
            if not index:
                yield self._gather(f"forward {piece} {index}", block)
            yield Wait(f"forward {piece} {index}")
            if index + 1 < len(self._blocks):
                yield self._gather(f"forward {piece} {index + 1}", self._blocks[index + 1])
            yield from self._passes_of(block, samples, "forward", f"forward {piece} {index}")

    def _backward(self, piece: int, samples: int, *, sends: bool) -> Iterator[Operation]:
        if self._shard != FULL and not sends:
            yield from backward_pass(self._setting, samples, self._factor, str(piece))
            yield from self._statistics(f"gradients {piece}", BATCHNORM_BACKWARD * self._workload.batchnorms)
        elif self._shard == OPTIMIZER:
            yield from backward_with_exchange(
                self._setting,
                samples,
                self._everyone,
                self._sizes,
                self._members,
                "none",
                self._factor,
                synchronised=self._together,
            )
        elif self._shard == FULL:
            yield from self._backward_of_full(piece, samples, sends=sends)
        else:
            pieces, layers = backward_pieces(self._workload, samples), batchnorms_by_gradient(self._workload)
            sums = backward_sums_by_gradient(self._workload)
            for index, block in reversed(list(enumerate(self._blocks))):
                yield Compute("backward", self._factor * sum(pieces[gradient] for gradient in block.gradients))
                collectives = BATCHNORM_BACKWARD * sum(layers.get(gradient, 0) for gradient in block.gradients)
                yield from self._statistics(f"gradients {piece} {index}", collectives)
                sizes = [size for gradient in block.gradients for size in sums.get(gradient, ())]
                yield from self._setting.sums(f"sums backward {piece} {index}", sizes, samples)
                yield from self._scatter(index, block)

    def _backward_of_full(self, piece: int, samples: int, *, sends: bool) -> Iterator[Operation]:
        first = self._trained[0] if self._trained else 0
        # The last block stays after the forward pass, and nothing is gathered ahead meanwhile.
        again = range(len(self._blocks) - 2, first - 1, -1) if self._reshards else range(0)
        for index in range(len(self._blocks) - 1, -1, -1):
            block = self._blocks[index]
            if index in again:
                if index == again[0]:
                    yield self._gather(f"backward {piece} {index}", block)
                yield Wait(f"backward {piece} {index}")
                if index - 1 in again:
                    yield self._gather(f"backward {piece} {index - 1}", self._blocks[index - 1])
            yield from self._passes_of(block, samples, "backward", f"backward {piece} {index}")
            if sends and block.gradient_bytes:
                yield from self._scatter(index, block)

    def _gather(self, name: str, block: ShardedBlock) -> Start:
        """All ranks that share a block begin to gather it."""
        duration = self._setting.network.all_gather(block.held_bytes / self._parts, self._sharing)
        return Start(name, duration, self._members, REPLICAS)

    def _scatter(self, index: int, block: ShardedBlock) -> Iterator[Operation]:
        """The gradients of a block are copied into one tensor, whose sum begins to be scattered."""
        workload = self._workload
        if self._replicas.size > 1 and index != self._trained[-1]:
            # Within a host, what was begun before has ended by now.
            yield from self._sum(self._trained[self._trained.index(index) + 1])
        yield Compute("update", workload.copy_seconds * block.gradient_bytes / max(workload.gradient_bytes, 1))
        duration = self._setting.network.reduce_scatter(block.gradient_bytes, self._sharing)
        yield Start(f"scatter {index}", duration, self._members, REPLICAS)

    def _sum(self, index: int) -> Iterator[Operation]:
        """Waits for a block's part, and begins to add up those of all replicas."""
        yield Wait(f"scatter {index}")
        if self._replicas.size > 1:
            size = self._blocks[index].gradient_bytes / self._parts
            duration = self._setting.network.all_reduce(size, self._replicas)
            yield Start(f"sum {index}", duration, self._members, REPLICAS)

    def _end_of_scattering(self) -> Iterator[Operation]:
        """Waits until each rank has the sums for its part, over all replicas."""
        trained = self._trained[::-1]
        for index in trained[-1:] if self._replicas.size > 1 else trained:
            yield from self._sum(index)
        if self._replicas.size > 1:
            for index in trained:
                yield Wait(f"sum {index}")

    # --- memory ------------------------------------------------------------------------------------------------------

    def _memory(self) -> Memory:
        workload, parts, samples = self._workload, self._parts, max(self._pieces)
        kind = "synchronised" if self._together else "plain"
        activations = workload.activation_bytes(samples, kind)
        held, gradients = float(workload.held_bytes), float(workload.gradient_bytes)
        passing = activations
        if self._shard != OPTIMIZER:
            gathered = [(0.0, 0.0)] * len(self._blocks)
            if self._shard == FULL:
                gathered = gathered_bytes(self._blocks, reshards=self._reshards)
            # Each parameter's own, and in one tensor; gloo has one more for what it receives.
            copies = 2 if self._sharing.hosts == 1 else 3
            passing = peak_bytes(workload, self._blocks, samples, kind, gathered, copies)
            # Until the last pass of a step, a rank sums up all gradients.
            passing += gradients if len(self._pieces) > 1 else 0.0
            gradients /= parts
        return Memory(
            held / parts if self._shard == FULL else held,
            gradients,
            workload.optimizer_bytes / parts,
            activations,
            max(passing, workload.update_bytes / parts) - activations,
        )
