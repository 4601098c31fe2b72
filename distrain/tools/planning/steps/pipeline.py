"""A step of ``pipeline``: the schedule's passes, messages between stages, and the exchange among replicas."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from distrain.gradients.linear_partition import linear_partition
from distrain.strategies.pipeline.schedule import SCHEDULES, Action, Schedule, actions_of_ranks, rank_of_stages
from distrain.tools.planning.prediction import Memory, Prediction
from distrain.tools.planning.simulation import Compute, Operation, Start, Wait, simulate
from distrain.tools.planning.steps.common import Setting, parts_of
from distrain.tools.planning.workload import BlockProfile, at


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
        self._microbatches = min(microbatches, self._share)
        self._samples = -(-self._share // self._microbatches)
        self._rank_of_stage = rank_of_stages(schedule, ranks, per_rank)
        self._stages = self._split()

    def _split(self) -> list[Sequence[BlockProfile]]:
        """The blocks of each stage, cut as a run cuts them."""
        blocks, network, samples = self._setting.workload.blocks, self._setting.network, self._samples
        compute = [at(block.forward, samples) + at(block.backward, samples) for block in blocks]
        transfer = [2 * network.message(samples * block.output_bytes, 0, 1).seconds for block in blocks]
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
            [cluster.speed_of(rank) for rank in range(self._ranks)],
            others=max(on_machine // self._ranks, 1),
        )
        slowest = max(range(self._ranks), key=lambda rank: simulated.computed[rank])
        parts = parts_of(simulated, self._update(slowest), 0.0)
        parts["stragglers"] = self._setting.stragglers(simulated.computed[slowest], cluster.ranks)
        busy = sum(simulated.computed)
        # Statistics of BatchNorm layers are those of a microbatch.
        same = not workload.batchnorms or self._microbatches == 1 == self._replicas
        return Prediction(
            keys,
            parts,
            max(simulated.sent),
            max((self._memory(rank, order[rank]) for rank in range(self._ranks)), key=lambda memory: memory.total),
            same_as_single=same,
            bubble=1 - busy / (self._ranks * simulated.seconds),
            simulated=simulated,
        )

    # --- programs ----------------------------------------------------------------------------------------------------

    def _program(self, rank: int, actions: Sequence[Action]) -> list[Operation]:
        workload = self._setting.workload
        own = [stage for stage, owner in enumerate(self._rank_of_stage) if owner == rank]
        has_data = 0 in own or len(self._stages) - 1 in own
        outside = workload.outside_seconds(self._share) if has_data else workload.outside_seconds(1)
        program: list[Operation] = [Compute("update", outside)]
        last = {action.stage: number for number, action in enumerate(actions) if action.kind in ("backward", "weight")}
        for number, action in enumerate(actions):
            program += self._pass(rank, action)
            if self._replicas > 1 and last.get(action.stage) == number:
                program.append(self._exchange(action.stage))
        if self._replicas > 1:
            program += [Wait(f"gradients {stage}", stage) for stage in own]
        program.append(Compute("update", self._update(rank)))
        return program

    def _pass(self, rank: int, action: Action) -> list[Operation]:
        """A pass with the messages before and after it."""
        kind, stage, microbatch = action
        count, blocks = len(self._stages), self._stages[stage]
        operations: list[Operation] = []
        forward = kind == "forward"
        before, after = (stage - 1, stage + 1) if forward else (stage + 1, stage - 1)
        direction = "activation" if forward else "gradient"
        if kind != "weight" and 0 <= before < count and self._rank_of_stage[before] != rank:
            operations.append(Wait(f"{direction} {before} {microbatch}", stage, microbatch))
        times = [at(block.forward if forward else block.backward, self._samples) for block in blocks]
        operations.append(Compute(kind, sum(times) * (0.5 if kind in ("input", "weight") else 1.0), stage, microbatch))
        if kind != "weight" and 0 <= after < count and self._rank_of_stage[after] != rank:
            target = self._rank_of_stage[after]
            output = self._stages[stage if forward else after][-1]
            duration = self._setting.network.message(self._samples * output.output_bytes, rank, target)
            name = f"{direction} {stage} {microbatch}"
            operations.append(Start(name, duration, 1, f"{direction} {rank} {target}"))
        return operations

    def _exchange(self, stage: int) -> Start:
        """The sum of a stage's gradients over the replicas."""
        network = self._setting.network
        group = network.group(self._replicas, self._ranks)
        duration = network.all_reduce(sum(block.gradient_bytes for block in self._stages[stage]), group)
        return Start(f"gradients {stage}", duration, 1, f"replicas {self._rank_of_stage[stage]}")

    def _update(self, rank: int) -> float:
        workload = self._setting.workload
        return workload.update_seconds * self._bytes_of(rank) / max(workload.gradient_bytes, 1)

    def _bytes_of(self, rank: int) -> int:
        """Bytes of the gradients of a rank's stages."""
        own = [stage for stage, owner in enumerate(self._rank_of_stage) if owner == rank]
        return sum(block.gradient_bytes for stage in own for block in self._stages[stage])

    # --- memory ------------------------------------------------------------------------------------------------------

    def _memory(self, rank: int, actions: Sequence[Action]) -> Memory:
        """Follows the passes and counts what each stage holds for its backward passes."""
        workload = self._setting.workload
        per_stage = [self._samples * sum(block.activation_bytes for block in blocks) for blocks in self._stages]
        held = peak = 0.0
        for action in actions:
            if action.kind == "forward":
                held += per_stage[action.stage]
            elif action.kind in ("backward", "weight"):
                held -= per_stage[action.stage]
            peak = max(peak, held)
        gradients = float(self._bytes_of(rank))
        state = workload.optimizer_bytes * gradients / max(workload.gradient_bytes, 1)
        return Memory(gradients, gradients, state, peak)
