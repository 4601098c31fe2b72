"""A step of ``pipeline``: the schedule's passes, messages between stages, and the exchange among replicas."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from distrain.gradients.linear_partition import linear_partition
from distrain.strategies.pipeline.schedule import SCHEDULES, Action, Schedule, actions_of_ranks, rank_of_stages
from distrain.strategies.pipeline.timeline import measured_bubble
from distrain.tools.planning.network import Duration, Group
from distrain.tools.planning.prediction import Memory, Prediction
from distrain.tools.planning.simulation import Compute, Operation, Start, Wait, simulate
from distrain.tools.planning.steps.common import BATCHNORM_BYTES, LAYERS, Setting, parts_of
from distrain.tools.planning.steps.pipeline_memory import PipelineMemory
from distrain.tools.planning.steps.shape import Shape
from distrain.tools.planning.workload import at

#: Bytes of a gradient's norm.
_NORM_BYTES = 4


def predict(
    setting: Setting,
    keys: dict[str, str],
    *,
    ranks: int,
    schedule: str,
    microbatches: int,
    stages_per_rank: int = 1,
    shard: int = 1,
    tensor: int = 1,
) -> Prediction:
    """Predicts a step of a pipeline, with replicas of it on all other ranks.

    Args:
        setting: Where.
        keys: Keys and values of the command line that mean this.
        ranks: Stages of one pipeline that work at the same time, each on a rank or on several.
        schedule: Name of the schedule.
        microbatches: Of a replica's share of a batch.
        stages_per_rank: Stages on each rank.
        shard: Neighbouring replicas that share the sums of gradients and the optimizer's state.
        tensor: Ranks that divide the layers of each stage among themselves, which has been measured for one stage a
            rank.

    Raises:
        ValueError: The model can't be split into so many stages.
    """
    replicas = setting.cluster.ranks // (ranks * tensor)
    shape = Shape(replicas // shard, shard, ranks, tensor)
    return _Step(setting, shape, SCHEDULES[schedule], microbatches, stages_per_rank).predict(keys)


def stage_starts(setting: Setting, stages: int, samples: float, tensor: int = 1) -> list[int]:
    """Index of the first block of each stage, as a run chooses them.

    Args:
        setting: Where; a rank has whole layers.
        stages: Number of stages.
        samples: Of a microbatch.
        tensor: Ranks that divide the layers of each stage among themselves.

    Raises:
        ValueError: The model can't be split into so many stages.
    """
    blocks, network = setting.workload.blocks, setting.network
    # A run times its blocks before it defers running statistics.
    compute = [at(block.forward, samples) + at(block.backward, samples) for block in blocks]
    transfer = [
        2 * network.message(samples * block.output_bytes, 0, tensor, block.output_tensors).seconds for block in blocks
    ]
    cuts = [index for index, block in enumerate(blocks) if index and block.begins_stage]
    return linear_partition(compute, transfer, stages, cuts)


@functools.cache
def _order(schedule: Schedule, ranks: int, stages_per_rank: int, microbatches: int) -> list[list[Action]]:
    """Each rank's actions, found once for all clusters."""
    return actions_of_ranks(schedule, ranks, stages_per_rank, microbatches)


class _Step:
    """A step of one pipeline, whose replicas do the same at the same time."""

    def __init__(self, setting: Setting, shape: Shape, schedule: Schedule, microbatches: int, per_rank: int) -> None:
        self._setting = setting.divided(shape)
        self._shape, self._ranks, self._schedule, self._per_rank = shape, shape.pipeline, schedule, per_rank
        workload = self._setting.workload
        self._share = -(-workload.batch_size // shape.replicas)
        # As many as a run makes of them.
        if workload.micro_batch_size is not None:
            microbatches = max(microbatches, -(-self._share // workload.micro_batch_size))
        self._microbatches = min(microbatches, self._share)
        self._samples = -(-self._share // self._microbatches)
        self._rank_of_stage = rank_of_stages(schedule, shape.pipeline, per_rank)
        divided = setting.workload.divided_among(shape.tensor, shape.pipeline)
        # The model is cut by the times of whole layers, and then layers are divided for this cut.
        stages = len(self._rank_of_stage)
        starts = stage_starts(setting, stages, self._samples) if divided is None else divided.starts
        stops = [*starts[1:], len(workload.blocks)]
        self._stages = [workload.blocks[start:stop] for start, stop in zip(starts, stops, strict=True)]
        #: By stage, and whether it is the forward pass: the same for all microbatches.
        self._pass_seconds = {
            (stage, forward): workload.deferred_factor
            * sum(at(block.forward if forward else block.backward, self._samples) for block in blocks)
            for stage, blocks in enumerate(self._stages)
            for forward in (True, False)
        }

    def predict(self, keys: dict[str, str]) -> Prediction:
        workload, cluster = self._setting.workload, self._setting.cluster
        order = _order(self._schedule, self._ranks, self._per_rank, self._microbatches)
        programs = [self._program(rank, actions) for rank, actions in enumerate(order)]
        on_machine = min(cluster.ranks_per_machine, cluster.ranks)
        tensor, of_replica = self._shape.tensor, self._shape.ranks_of_replica
        simulated = simulate(
            programs,
            [rank * tensor // max(min(on_machine, of_replica), 1) for rank in range(self._ranks)],
            cluster.slowdown_of,
            self._slowest_speeds(),
            # Each simulated rank stands for all that divide its stage, and for those of other replicas.
            alike=[max(on_machine // of_replica, 1) * min(tensor, on_machine)] * self._ranks,
            bucket=cluster.token_bucket,
        )
        computed = max(sum(kinds.values()) for kinds in simulated.computed)
        # What ranks of one pipeline wait for each other is part of the simulation.
        stragglers = self._setting.stragglers(computed, self._shape.replicas)
        # A rank has its share of the layers.
        passes = workload.rounds * self._microbatches / self._ranks
        stragglers += self._setting.stragglers_of_layers(computed, passes)
        parts = parts_of(simulated, stragglers)
        # Statistics of BatchNorm layers are those of a microbatch.
        same = not workload.batchnorms or self._microbatches == 1 == self._shape.replicas
        return Prediction(
            keys,
            parts,
            max(simulated.sent),
            max((self._memory(rank, order[rank]) for rank in range(self._ranks)), key=lambda memory: memory.total),
            same_as_single=same,
            bubble=measured_bubble(simulated.lanes),
            simulated=simulated,
        )

    def _slowest_speeds(self) -> Sequence[float]:
        """Speeds of the stages of the slowest replica, for which all others wait."""
        cluster, tensor, of_replica = self._setting.cluster, self._shape.tensor, self._shape.ranks_of_replica
        if not cluster.relative_speeds:
            return [1.0] * self._ranks
        replicas = {
            tuple(
                # Of the ranks that divide a stage, all wait for the slowest one.
                min(cluster.speed_of(rank) for rank in range(first, first + tensor))
                for first in range(replica, replica + of_replica, tensor)
            )
            for replica in range(0, cluster.ranks, of_replica)
        }
        return min(replicas, key=lambda speeds: (min(speeds), sum(speeds)))

    # --- programs ----------------------------------------------------------------------------------------------------

    def _program(self, rank: int, actions: Sequence[Action]) -> list[Operation]:
        workload = self._setting.workload
        own = [stage for stage, owner in enumerate(self._rank_of_stage) if owner == rank]
        # Each rank loads the whole share, though only the first and the last stage need it.
        program: list[Operation] = [Compute("update", workload.outside_seconds(self._share))]
        for round_ in range(workload.rounds):
            if round_:
                program += self._move(rank)
            for action in actions:
                program += self._pass(rank, action, round_)
            if self._shape.replicas > 1:
                for stage in own:
                    program += [*self._exchange(stage, round_), *self._statistics(stage, round_)]
        program.append(Compute("update", self._update(rank)))
        if self._shape.shard > 1:
            for stage in own:
                program += self._gather(stage)
        return program

    def _move(self, rank: int) -> list[Operation]:
        """What sharpness-aware minimization does between two rounds, once all ranks know the gradient's norm."""
        network = self._setting.network
        norm = network.all_reduce(_NORM_BYTES, network.group(self._ranks, self._shape.tensor))
        seconds = self._setting.workload.sharpness_seconds * self._part_of(rank)
        return [Start("norm", norm, self._ranks, "norm"), Wait("norm"), Compute("update", seconds)]

    def _pass(self, rank: int, action: Action, round_: int) -> list[Operation]:
        """A pass with the messages before and after it."""
        kind, stage, microbatch = action
        count, blocks = len(self._stages), self._stages[stage]
        operations: list[Operation] = []
        forward = kind == "forward"
        before, after = (stage - 1, stage + 1) if forward else (stage + 1, stage - 1)
        direction = "activation" if forward else "gradient"
        if kind != "weight" and 0 <= before < count and self._rank_of_stage[before] != rank:
            operations.append(Wait(f"{direction} {before} {microbatch} {round_}", stage, microbatch))
        operations.append(Compute("overhead", self._setting.workload.action_seconds))
        seconds = self._pass_seconds[stage, forward]
        operations.append(Compute(kind, seconds * (0.5 if kind in ("input", "weight") else 1.0), stage, microbatch))
        if kind != "weight":
            sums = [size for block in blocks for size in (block.forward_sums if forward else block.backward_sums)]
            name = f"sums {direction} {stage} {microbatch} {round_}"
            operations += self._setting.sums(name, sums, self._samples, 1, f"{LAYERS} {rank}")
        if kind != "weight" and 0 <= after < count and self._rank_of_stage[after] != rank:
            target = self._rank_of_stage[after]
            output = self._stages[stage if forward else after][-1]
            size = self._samples * output.output_bytes
            # Each rank of a stage sends a copy to the one of the next stage that has its number.
            tensor = self._shape.tensor
            duration = self._setting.network.message(
                size, rank * tensor, target * tensor, output.output_tensors, sharing=self._sending
            )
            name = f"{direction} {stage} {microbatch} {round_}"
            operations.append(Start(name, duration, 1, f"{direction} {rank} {target}"))
        return operations

    @property
    def _sending(self) -> int:
        """Ranks of a host that send activations to another one at the same time."""
        return min(self._shape.tensor, self._setting.cluster.ranks_per_host)

    def _exchange(self, stage: int, round_: int) -> list[Operation]:
        """The sum of a stage's gradients over the replicas, after all passes."""
        size, network, shape = self._gradient_bytes(stage), self._setting.network, self._shape
        if shape.shard == 1:
            duration = network.all_reduce(size, self._group)
        else:
            # Each rank of a group gets its part of the group's sum, and then adds up this part over the groups.
            duration = network.reduce_scatter(size, shape.shard_group(network))
            duration += network.all_reduce(size / shape.shard, shape.data_group(network))
        return self._among_replicas(f"gradients {stage} {round_}", stage, duration)

    def _gather(self, stage: int) -> list[Operation]:
        """What the ranks of a group have updated, each its part, is gathered."""
        network, shape = self._setting.network, self._shape
        duration = network.all_gather(self._gradient_bytes(stage) / shape.shard, shape.shard_group(network))
        return self._among_replicas(f"updated {stage}", stage, duration)

    def _statistics(self, stage: int, round_: int) -> list[Operation]:
        """The sums over the replicas of what BatchNorm layers have counted, one after the other."""
        count = sum(block.batchnorms for block in self._stages[stage])
        one = self._setting.network.all_reduce(BATCHNORM_BYTES, self._group)
        return self._among_replicas(f"statistics {stage} {round_}", stage, one.times(count)) if count else []

    def _among_replicas(self, name: str, stage: int, duration: Duration) -> list[Operation]:
        return [Start(name, duration, 1, f"replicas {self._rank_of_stage[stage]}"), Wait(name, stage)]

    @property
    def _group(self) -> Group:
        """The replicas of a rank."""
        return self._shape.replicas_group(self._setting.network)

    def _update(self, rank: int) -> float:
        return self._setting.workload.update_seconds * self._part_of(rank) / self._shape.shard

    def _part_of(self, rank: int) -> float:
        """The part of all gradients that a rank's stages have."""
        return self._bytes_of(rank) / max(self._setting.workload.gradient_bytes, 1)

    def _bytes_of(self, rank: int) -> int:
        """Bytes of the gradients of a rank's stages."""
        own = [stage for stage, owner in enumerate(self._rank_of_stage) if owner == rank]
        return sum(self._gradient_bytes(stage) for stage in own)

    def _gradient_bytes(self, stage: int) -> int:
        return sum(block.gradient_bytes for block in self._stages[stage])

    # --- memory ------------------------------------------------------------------------------------------------------

    def _memory(self, rank: int, actions: Sequence[Action]) -> Memory:
        """What a rank holds at the peak of its actions, and all the time."""
        workload = self._setting.workload
        followed = PipelineMemory(self._stages, self._rank_of_stage, self._samples, rank, workload.input_bytes)
        peak = followed.peak_bytes(actions)
        gradients = float(self._bytes_of(rank))
        state = workload.optimizer_bytes * self._part_of(rank) / self._shape.shard
        own = [stage for stage, owner in enumerate(self._rank_of_stage) if owner == rank]
        held = float(sum(block.held_bytes for stage in own for block in self._stages[stage]))
        # Each rank loads the whole share, and holds it until the step ends. Sharpness-aware minimization keeps the
        # parameters from before the second round.
        other = self._share * workload.input_bytes + (workload.rounds - 1) * gradients
        if self._shape.shard > 1:
            # Until the last microbatch, each rank sums up all gradients of its stages.
            other, gradients = other + gradients, gradients / self._shape.shard
        return Memory(held, gradients, state, max(peak, workload.update_bytes / self._shape.shard), other)
