"""Pipeline schedules: the order in which each rank works on the microbatches.

Any number of microbatches is possible, also fewer than stages. Schedules with undivided backward passes follow a rule.
Those with split backward passes are found by simulating the pipeline in unit times: a free rank takes the most urgent
action that is ready. Such an order can't deadlock, whatever the real times are.

===========================  ==========================================================================================
``gpipe``                    all forward passes, then all backward passes (Huang et al. 2019, arXiv 1811.06965)
``1f1b``                     a stage holds at most as many microbatches as there are stages from it to the last one
                             (Narayanan et al. 2019, PipeDream; 2021, arXiv 2104.04473, "PipeDream-Flush")
``interleaved_1f1b``         the same with several stages per rank, assigned round-robin (Narayanan et al. 2021, §2.2)
``interleaved_zero_bubble``  backward passes in two halves: the gradient of the input, which another rank waits for, and
                             the gradients of the weights, which fill idle time (Qi et al. 2023, arXiv 2401.10241)
``zbv_zero_bubble``          the same with two stages per rank, assigned forth and back like a V, so that the first rank
                             also has the last stage (Qi et al. 2024, arXiv 2405.15362)
===========================  ==========================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

ActionKind = Literal["forward", "backward", "input", "weight"]


class Action(NamedTuple):
    """One forward or backward pass of one stage on one microbatch.

    ``backward`` is a whole backward pass. ``input`` and ``weight`` are its two halves: the gradient of the input, and
    the gradients of the weights.
    """

    kind: ActionKind
    stage: int
    microbatch: int


class TimedAction(NamedTuple):
    """An action of a simulated schedule with its start and end."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Schedule:
    """Properties of a schedule.

    Attributes:
        name: Its name in the configuration.
        layout: How stages are assigned to ranks: ``loop`` is round-robin, ``v`` forth and back.
        splits_backward: The gradients of input and weights are separate actions.
        forward_first: All forward passes precede all backward passes.
        stages_per_rank: Number of stages per rank; ``None`` for any number from 2.
    """

    name: str
    layout: Literal["loop", "v"] = "loop"
    splits_backward: bool = False
    forward_first: bool = False
    stages_per_rank: int | None = 1


SCHEDULES = {
    schedule.name: schedule
    for schedule in (
        Schedule("gpipe", forward_first=True),
        Schedule("1f1b"),
        Schedule("interleaved_1f1b", stages_per_rank=None),
        Schedule("interleaved_zero_bubble", splits_backward=True, stages_per_rank=None),
        Schedule("zbv_zero_bubble", layout="v", splits_backward=True, stages_per_rank=2),
    )
}


def rank_of_stages(schedule: Schedule, ranks: int, stages_per_rank: int) -> list[int]:
    """The pipeline rank of each of the ``ranks * stages_per_rank`` stages."""
    forth = list(range(ranks))
    if schedule.layout == "v":
        return [rank for turn in range(stages_per_rank) for rank in (forth if turn % 2 == 0 else forth[::-1])]
    return forth * stages_per_rank


def actions_of_ranks(schedule: Schedule, ranks: int, stages_per_rank: int, microbatches: int) -> list[list[Action]]:
    """Each pipeline rank's actions of one step, in order."""
    if schedule.splits_backward:
        timelines = _fill_idle_time(schedule, ranks, stages_per_rank, microbatches)
        return [[timed.action for timed in timeline] for timeline in timelines]
    return [_one_forward_one_backward(schedule, ranks, stages_per_rank, microbatches, rank) for rank in range(ranks)]


def _one_forward_one_backward(
    schedule: Schedule, ranks: int, stages_per_rank: int, microbatches: int, rank: int
) -> list[Action]:
    """Forward passes that fill the pipeline, then forward and backward passes in turn, then the remaining ones."""
    stages = [turn * ranks + rank for turn in range(stages_per_rank)]
    # As many microbatches as there are ranks go through one stage before they go through the rank's next stage. The
    # rule can deadlock with an incomplete group of microbatches, so the last group is filled up with microbatches that
    # don't exist; all ranks leave their actions out.
    groups = [range(first, first + ranks) for first in range(0, microbatches, ranks)]
    forwards = [Action("forward", stage, m) for group in groups for stage in stages for m in group]
    backwards = [Action("backward", stage, m) for group in groups for stage in stages[::-1] for m in group]
    ahead = ranks - rank - 1
    if stages_per_rank > 1:
        ahead = 2 * ahead + (stages_per_rank - 1) * ranks
    ahead = len(forwards) if schedule.forward_first else min(ahead, len(forwards))
    order = forwards[:ahead]
    for forward, backward in zip(forwards[ahead:], backwards, strict=False):
        order += [forward, backward]
    order += backwards[len(forwards) - ahead :]
    return [action for action in order if action.microbatch < microbatches]


def simulate(
    order: Sequence[Sequence[Action]],
    forward: Sequence[float],
    backward: Sequence[float],
) -> list[list[TimedAction]]:
    """Runs each action as soon as its rank is free and the actions it depends on are done.

    Args:
        order: Each rank's actions.
        forward: Duration of each stage's forward pass, in any unit.
        backward: Duration of each stage's backward pass, half of which is the gradient of the input.

    Returns:
        Each rank's actions with start and end, in the same unit.

    Raises:
        ValueError: The order deadlocks.
    """
    last = max(action.stage for actions in order for action in actions)
    ends: dict[Action, float] = {}
    timelines: list[list[TimedAction]] = [[] for _ in order]
    progress = True
    while progress:
        progress = False
        for timeline, actions in zip(timelines, order, strict=True):
            while len(timeline) < len(actions):
                action = actions[len(timeline)]
                start = _earliest_start(action, timeline, ends, last)
                if start is None:
                    break
                ends[action] = start + _duration(action, forward, backward)
                timeline.append(TimedAction(action, start, ends[action]))
                progress = True
    if any(len(timeline) < len(actions) for timeline, actions in zip(timelines, order, strict=True)):
        raise ValueError("the order deadlocks")
    return timelines


def _earliest_start(
    action: Action, timeline: Sequence[TimedAction], ends: dict[Action, float], last: int
) -> float | None:
    """When a rank can start an action; ``None`` if it depends on an action that is not done.

    Args:
        action: The action.
        timeline: What the rank has done so far.
        ends: When actions of all ranks ended.
        last: The last stage.
    """
    dependencies = _dependencies(action, last)
    if not all(dependency in ends for dependency in dependencies):
        return None
    rank_is_free = timeline[-1].end if timeline else 0.0
    return max([rank_is_free, *(ends[dependency] for dependency in dependencies)])


def _dependencies(action: Action, last: int) -> list[Action]:
    """Actions that must be done before."""
    kind, stage, m = action
    if kind == "forward":
        return [Action("forward", stage - 1, m)] if stage else []
    if kind == "weight":
        return [Action("input", stage, m)]
    return [Action("forward", stage, m), *([Action(kind, stage + 1, m)] if stage < last else [])]


def _duration(action: Action, forward: Sequence[float], backward: Sequence[float]) -> float:
    if action.kind == "forward":
        return forward[action.stage]
    return backward[action.stage] * (1.0 if action.kind == "backward" else 0.5)


def bubble_fraction(timelines: Sequence[Sequence[TimedAction]]) -> float:
    """Idle fraction of all ranks' time from the first start to the last end."""
    first_start = min(start for timeline in timelines for _, start, _ in timeline)
    last_end = max(end for timeline in timelines for _, _, end in timeline)
    busy = sum(end - start for timeline in timelines for _, start, end in timeline)
    return 1.0 - busy / ((last_end - first_start) * len(timelines))


def _fill_idle_time(schedule: Schedule, ranks: int, stages_per_rank: int, microbatches: int) -> list[list[TimedAction]]:
    """Simulates the pipeline in unit times: a free rank takes the most urgent action that is ready."""
    rank_of_stage = rank_of_stages(schedule, ranks, stages_per_rank)
    last = len(rank_of_stage) - 1
    forward, backward = [1.0] * len(rank_of_stage), [2.0] * len(rank_of_stage)
    ends: dict[Action, float] = {}
    timelines: list[list[TimedAction]] = [[] for _ in range(ranks)]
    waiting = [_Waiting(schedule, rank, rank_of_stage, ranks, microbatches) for rank in range(ranks)]
    #: The next action of each rank, found again where something has changed.
    choices: list[tuple[float, tuple[int, ...], int, Action] | None] = [None] * ranks
    changed = set(range(ranks))
    for _ in range(3 * len(rank_of_stage) * microbatches):
        for rank in changed:
            permitted = [
                (start, _priority(action, ranks), rank, action)
                for action in waiting[rank].permitted()
                if (start := _earliest_start(action, timelines[rank], ends, last)) is not None
            ]
            choices[rank] = min(permitted, default=None)
        # The action that can start first is next, as in real time.
        start, _, rank, action = min(choice for choice in choices if choice is not None)
        ends[action] = start + _duration(action, forward, backward)
        timelines[rank].append(TimedAction(action, start, ends[action]))
        waiting[rank].remove(action)
        changed = {rank}
        for follower in _followers(action, last):
            owner = rank_of_stage[follower.stage]
            waiting[owner].ready.add(follower)
            changed.add(owner)
    return timelines


class _Waiting:
    """What a rank has not done yet.

    Attributes:
        ready: Actions that depend on nothing that is not done.
    """

    def __init__(
        self, schedule: Schedule, rank: int, rank_of_stage: Sequence[int], ranks: int, microbatches: int
    ) -> None:
        self._is_loop, self._ranks = schedule.layout == "loop", ranks
        self._stages_per_rank = len(rank_of_stage) // ranks
        stages = [stage for stage, owner in enumerate(rank_of_stage) if owner == rank]
        forwards = [Action("forward", stage, m) for stage in stages for m in range(microbatches)]
        self.ready = {action for action in forwards if action.stage == 0}
        self._forwards = sorted(forwards, key=lambda action: _priority(action, ranks), reverse=True)
        #: Microbatches with a forward pass and no complete backward pass.
        self._held = 0

    def permitted(self) -> list[Action]:
        """What is ready, without forward passes for which the rank would have to hold too many activations."""
        return [action for action in self.ready if action.kind != "forward" or self._may_begin(action)]

    def _may_begin(self, action: Action) -> bool:
        if self._is_loop:
            # In one fixed order: a rank that ran ahead on its first stage would fill its memory with activations that
            # only its later stages can free.
            has_room = self._held < self._ranks * self._stages_per_rank + self._ranks - 1
            return has_room and action == self._forwards[-1]
        # In a V the stages on the way back are always permitted, for the same reason.
        return action.stage >= self._ranks or self._held < 2 * self._ranks

    def remove(self, action: Action) -> None:
        self.ready.remove(action)
        if action.kind == "forward":
            self._forwards.remove(action)
            self._held += 1
        elif action.kind == "weight":
            self._held -= 1


def _followers(action: Action, last: int) -> list[Action]:
    """Actions, of split backward passes, that depend on nothing else that is not done once this one is."""
    kind, stage, m = action
    if kind == "forward":
        return [Action("forward", stage + 1, m) if stage < last else Action("input", last, m)]
    if kind == "weight":
        return []
    return [Action("weight", stage, m), *([Action("input", stage - 1, m)] if stage else [])]


def _priority(action: Action, ranks: int) -> tuple[int, ...]:
    """Sort key of actions that are ready at the same time: those that other ranks wait for come first."""
    if action.kind == "weight":
        return (2, action.microbatch, -action.stage)
    if action.kind == "forward":
        return (1, action.microbatch // ranks, action.stage, action.microbatch)
    return (0, action.microbatch // ranks, -action.stage, action.microbatch)
