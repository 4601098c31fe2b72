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
from distrain.tools.planning.steps.common import BATCHNORM_BYTES, Setting, parts_of
from distrain.tools.planning.steps.pipeline_memory import PipelineMemory
from distrain.tools.planning.workload import BlockProfile, at

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
) -> Prediction:
    """Predicts a step of a pipeline, with replicas of it on all other ranks.

    Args:
        setting: Where.
        keys: Keys and values of the command line that mean this.
        ranks: Ranks of one pipeline.
        schedule: Name of the schedule.
        microbatches: Of a replica's share of a batch.
        stages_per_rank: Stages on each rank.

    Raises:
        ValueError: The model can't be split into so many stages.
    """
    return _Step(setting, ranks, SCHEDULES[schedule], microbatches, stages_per_rank).predict(keys)


@functools.cache
def _order(schedule: Schedule, ranks: int, stages_per_rank: int, microbatches: int) -> list[list[Action]]:
    """Each rank's actions, found once for all clusters."""
    return actions_of_ranks(schedule, ranks, stages_per_rank, microbatches)


class _Step:
    """A step of one pipeline, whose replicas do the same at the same time."""

    def __init__(self, setting: Setting, ranks: int, schedule: Schedule, microbatches: int, per_rank: int) -> None:
        workload, cluster = setting.workload, setting.cluster
        self._setting, self._ranks, self._schedule, self._per_rank = setting, ranks, schedule, per_rank
        self._replicas = cluster.ranks // ranks
        self._share = -(-workload.batch_size // self._replicas)
        # As many as a run makes of them.
        if workload.micro_batch_size is not None:
            microbatches = max(microbatches, -(-self._share // workload.micro_batch_size))
        self._microbatches = min(microbatches, self._share)
        self._samples = -(-self._share // self._microbatches)
        self._rank_of_stage = rank_of_stages(schedule, ranks, per_rank)
        self._stages = self._split()

    def _split(self) -> list[Sequence[BlockProfile]]:
        """The blocks of each stage, cut as a run cuts them."""
        blocks, network, samples = self._setting.workload.blocks, self._setting.network, self._samples
        # A run times its blocks before it defers running statistics.
        compute = [at(block.forward, samples) + at(block.backward, samples) for block in blocks]
        transfer = [
            2 * network.message(samples * block.output_bytes, 0, 1, block.output_tensors).seconds for block in blocks
        ]
        cuts = [index for index, block in enumerate(blocks) if index and block.begins_stage]
        starts = linear_partition(compute, transfer, len(self._rank_of_stage), cuts)
        return [blocks[start:stop] for start, stop in zip(starts, [*starts[1:], len(blocks)], strict=True)]

    def predict(self, keys: dict[str, str]) -> Prediction:
        workload, cluster = self._setting.workload, self._setting.cluster
        order = _order(self._schedule, self._ranks, self._per_rank, self._microbatches)
        programs = [self._program(rank, actions) for rank, actions in enumerate(order)]
        on_machine = min(cluster.ranks_per_machine, cluster.ranks)
        simulated = simulate(
            programs,
            [rank // max(min(on_machine, self._ranks), 1) for rank in range(self._ranks)],
            cluster.slowdown_of,
            self._slowest_speeds(),
            alike=[max(on_machine // self._ranks, 1)] * self._ranks,
            bucket=cluster.token_bucket,
        )
        computed = max(sum(kinds.values()) for kinds in simulated.computed)
        # What ranks of one pipeline wait for each other is part of the simulation.
        parts = parts_of(simulated, self._setting.stragglers(computed, self._replicas))
        # Statistics of BatchNorm layers are those of a microbatch.
        same = not workload.batchnorms or self._microbatches == 1 == self._replicas
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
        """Speeds of the ranks of the slowest replica, for which all others wait."""
        if not self._setting.cluster.relative_speeds:
            return [1.0] * self._ranks
        replicas = {
            tuple(self._setting.cluster.speed_of(first + rank) for rank in range(self._ranks))
            for first in range(0, self._setting.cluster.ranks, self._ranks)
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
            if self._replicas > 1:
                for stage in own:
                    program += [*self._exchange(stage, round_), *self._statistics(stage, round_)]
        program.append(Compute("update", self._update(rank)))
        return program

    def _move(self, rank: int) -> list[Operation]:
        """What sharpness-aware minimization does between two rounds, once all ranks know the gradient's norm."""
        network = self._setting.network
        norm = network.all_reduce(_NORM_BYTES, network.group(self._ranks))
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
        times = [at(block.forward if forward else block.backward, self._samples) for block in blocks]
        seconds = self._setting.workload.deferred_factor * sum(times)
        operations.append(Compute(kind, seconds * (0.5 if kind in ("input", "weight") else 1.0), stage, microbatch))
        if kind != "weight" and 0 <= after < count and self._rank_of_stage[after] != rank:
            target = self._rank_of_stage[after]
            output = self._stages[stage if forward else after][-1]
            size = self._samples * output.output_bytes
            duration = self._setting.network.message(size, rank, target, output.output_tensors)
            name = f"{direction} {stage} {microbatch} {round_}"
            operations.append(Start(name, duration, 1, f"{direction} {rank} {target}"))
        return operations

    def _exchange(self, stage: int, round_: int) -> list[Operation]:
        """The sum of a stage's gradients over the replicas, after all passes."""
        size = sum(block.gradient_bytes for block in self._stages[stage])
        duration = self._setting.network.all_reduce(size, self._group)
        return self._among_replicas(f"gradients {stage} {round_}", stage, duration)

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
        return self._setting.network.group(self._replicas, self._ranks)

    def _update(self, rank: int) -> float:
        return self._setting.workload.update_seconds * self._part_of(rank)

    def _part_of(self, rank: int) -> float:
        """The part of all gradients that a rank's stages have."""
        return self._bytes_of(rank) / max(self._setting.workload.gradient_bytes, 1)

    def _bytes_of(self, rank: int) -> int:
        """Bytes of the gradients of a rank's stages."""
        own = [stage for stage, owner in enumerate(self._rank_of_stage) if owner == rank]
        return sum(block.gradient_bytes for stage in own for block in self._stages[stage])

    # --- memory ------------------------------------------------------------------------------------------------------

    def _memory(self, rank: int, actions: Sequence[Action]) -> Memory:
        """What a rank holds at the peak of its actions, and all the time."""
        workload = self._setting.workload
        followed = PipelineMemory(self._stages, self._rank_of_stage, self._samples, rank, workload.input_bytes)
        peak = followed.peak_bytes(actions)
        gradients = float(self._bytes_of(rank))
        state = workload.optimizer_bytes * self._part_of(rank)
        own = [stage for stage, owner in enumerate(self._rank_of_stage) if owner == rank]
        held = float(sum(block.held_bytes for stage in own for block in self._stages[stage]))
        # Each rank loads the whole share, and holds it until the step ends. Sharpness-aware minimization keeps the
        # parameters from before the second round.
        other = self._share * workload.input_bytes + (workload.rounds - 1) * gradients
        return Memory(held, gradients, state, max(peak, workload.update_bytes), other)
