"""In which order each rank of a pipeline works on the microbatches.

Any number of microbatches will do, also fewer than stages. Orders with whole backward passes follow a rule; those with
split ones are found by playing the pipeline through in unit times, where a free rank takes the most urgent piece that
is ready. Such an order can't deadlock, whatever the real times are.

===========================  ==========================================================================================
``gpipe``                    all forward, then all backward passes (Huang et al. 2019, arXiv 1811.06965)
``1f1b``                     a stage keeps at most as many microbatches as there are stages behind it (Narayanan et al.
                             2019, PipeDream; 2021, arXiv 2104.04473, "PipeDream-Flush")
``interleaved_1f1b``         the same with several stages a rank, dealt out in turn (Narayanan et al. 2021, §2.2)
``interleaved_zero_bubble``  backward passes in two halves: the input's gradient, which another rank waits for, and the
                             weights', which fills gaps (Qi et al. 2023, arXiv 2401.10241)
``zbv_zero_bubble``          the same with two stages a rank laid out as a V: the first rank also has the last stage (Qi
                             et al. 2024, arXiv 2405.15362)
===========================  ==========================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["forward", "backward", "input", "weight"]


class Work(NamedTuple):
    """One piece of work of one stage on one microbatch.

    ``backward`` is ``input`` and ``weight`` in one.
    """

    kind: Kind
    stage: int
    microbatch: int


@dataclass(frozen=True)
class Schedule:
    """A named schedule's traits.

    Attributes:
        name: As the configuration names it.
        layout: ``loop`` deals stages out in turn, ``v`` there and back.
        splits_backward: Input and weight gradients are separate pieces.
        flushes: No backward pass before all forward passes.
        virtual: Stages a rank: ``None`` for any number from 2, else exactly this many.
    """

    name: str
    layout: Literal["loop", "v"] = "loop"
    splits_backward: bool = False
    flushes: bool = False
    virtual: int | None = 1


SCHEDULES = {
    schedule.name: schedule
    for schedule in (
        Schedule("gpipe", flushes=True),
        Schedule("1f1b"),
        Schedule("interleaved_1f1b", virtual=None),
        Schedule("interleaved_zero_bubble", splits_backward=True, virtual=None),
        Schedule("zbv_zero_bubble", layout="v", splits_backward=True, virtual=2),
    )
}


def placement(schedule: Schedule, ranks: int, virtual: int) -> list[int]:
    """The pipeline rank of each of the ``ranks * virtual`` stages."""
    there = list(range(ranks))
    if schedule.layout == "v":
        return [rank for turn in range(virtual) for rank in (there if turn % 2 == 0 else there[::-1])]
    return there * virtual


def orders(schedule: Schedule, ranks: int, virtual: int, microbatches: int) -> list[list[Work]]:
    """Each pipeline rank's work, in order."""
    if schedule.splits_backward:
        return [[work for work, _, _ in lane] for lane in _fill_gaps(schedule, ranks, virtual, microbatches)]
    return [_one_forward_one_backward(schedule, ranks, virtual, microbatches, rank) for rank in range(ranks)]


def _one_forward_one_backward(schedule: Schedule, ranks: int, virtual: int, microbatches: int, rank: int) -> list[Work]:
    """Forward passes to fill the pipeline, then one forward and one backward pass in turn, then what is left."""
    mine = [turn * ranks + rank for turn in range(virtual)]
    # Groups of as many microbatches as ranks go through one stage before the rank's next one. The rule can deadlock
    # with a part of a group, so the last group is filled up with microbatches that are then left out everywhere.
    groups = [range(first, first + ranks) for first in range(0, microbatches, ranks)]
    forwards = [Work("forward", stage, m) for group in groups for stage in mine for m in group]
    backwards = [Work("backward", stage, m) for group in groups for stage in mine[::-1] for m in group]
    ahead = ranks - rank - 1
    if virtual > 1:
        ahead = 2 * ahead + (virtual - 1) * ranks
    ahead = len(forwards) if schedule.flushes else min(ahead, len(forwards))
    order = forwards[:ahead]
    for forward, backward in zip(forwards[ahead:], backwards, strict=False):
        order += [forward, backward]
    order += backwards[len(forwards) - ahead :]
    return [work for work in order if work.microbatch < microbatches]


def play(
    order: Sequence[Sequence[Work]],
    forward: Sequence[float],
    backward: Sequence[float],
) -> list[list[tuple[Work, float, float]]]:
    """Plays an order through, each piece as soon as its rank is free and what it needs is there.

    Args:
        order: Each rank's work.
        forward: Duration of each stage's forward pass.
        backward: Duration of each stage's backward pass, of which half is the input's gradient.

    Returns:
        For each rank its work with start and end.

    Raises:
        ValueError: The order can't be played to the end.
    """
    last = max(work.stage for lane in order for work in lane)
    done: dict[Work, float] = {}
    lanes: list[list[tuple[Work, float, float]]] = [[] for _ in order]
    moved = True
    while moved:
        moved = False
        for rank, lane in enumerate(order):
            while len(lanes[rank]) < len(lane):
                work = lane[len(lanes[rank])]
                needs = _needs(work, last)
                if not all(need in done for need in needs):
                    break
                free = lanes[rank][-1][2] if lanes[rank] else 0.0
                start = max([free, *(done[need] for need in needs)])
                end = start + _length(work, forward, backward)
                done[work] = end
                lanes[rank].append((work, start, end))
                moved = True
    if any(len(played) < len(lane) for played, lane in zip(lanes, order, strict=True)):
        raise ValueError("the order deadlocks")
    return lanes


def _needs(work: Work, last: int) -> list[Work]:
    """What must be done before; a backward pass in one piece stands for both halves where it is split."""
    kind, stage, m = work
    if kind == "forward":
        return [Work("forward", stage - 1, m)] if stage else []
    if kind == "weight":
        return [Work("input", stage, m)]
    return [Work("forward", stage, m), *([Work(kind, stage + 1, m)] if stage < last else [])]


def _length(work: Work, forward: Sequence[float], backward: Sequence[float]) -> float:
    if work.kind == "forward":
        return forward[work.stage]
    return backward[work.stage] * (1.0 if work.kind == "backward" else 0.5)


def bubble(lanes: Sequence[Sequence[tuple[Work, float, float]]]) -> float:
    """Share of all ranks' time, from the first start to the last end, in which they do nothing."""
    begin = min(start for lane in lanes for _, start, _ in lane)
    finish = max(end for lane in lanes for _, _, end in lane)
    busy = sum(end - start for lane in lanes for _, start, end in lane)
    return 1.0 - busy / ((finish - begin) * len(lanes))


def _fill_gaps(
    schedule: Schedule, ranks: int, virtual: int, microbatches: int
) -> list[list[tuple[Work, float, float]]]:
    """Plays the pipeline through in unit times: a free rank takes the most urgent piece that is ready.

    An order found this way can't deadlock, whatever the real times are.
    """
    where = placement(schedule, ranks, virtual)
    last = len(where) - 1
    forward, backward = [1.0] * len(where), [2.0] * len(where)
    done: dict[Work, float] = {}
    lanes: list[list[tuple[Work, float, float]]] = [[] for _ in range(ranks)]
    kinds: tuple[Kind, ...] = ("forward", "input", "weight")
    waiting = [
        {
            Work(kind, stage, m)
            for kind in kinds
            for stage in range(last + 1)
            if where[stage] == rank
            for m in range(microbatches)
        }
        for rank in range(ranks)
    ]
    while any(waiting):
        # The rank that can start something first goes first, as it would in real time.
        start, _, rank, work = min(
            (max([free, *(done[need] for need in needs)]), _urgency(work, ranks), rank, work)
            for rank in range(ranks)
            for free in [lanes[rank][-1][2] if lanes[rank] else 0.0]
            for work in _open(schedule, waiting[rank], len(where), ranks, microbatches)
            for needs in [_needs(work, last)]
            if all(need in done for need in needs)
        )
        done[work] = start + _length(work, forward, backward)
        waiting[rank].remove(work)
        lanes[rank].append((work, start, done[work]))
    return lanes


def _open(schedule: Schedule, waiting: set[Work], stages: int, ranks: int, microbatches: int) -> list[Work]:
    """What a rank may do next: no more forward passes than its memory allows, in an order that lets it free some."""
    forwards = [work for work in waiting if work.kind == "forward"]
    others = [work for work in waiting if work.kind != "forward"]
    if not forwards:
        return others
    virtual = stages // ranks
    kept = sum(work.kind == "weight" for work in others) - len(forwards)
    if schedule.layout == "loop":
        # One fixed order: a rank that ran ahead on its first stage would fill its memory with what only its later
        # stages can free.
        chosen = [min(forwards, key=lambda work: _urgency(work, ranks))]
        return others + (chosen if kept < ranks * virtual + ranks - 1 else [])
    # On a V the way back is always open, for the same reason.
    return others + [work for work in forwards if work.stage >= ranks or kept < 2 * ranks]


def _urgency(work: Work, ranks: int) -> tuple[int, ...]:
    """Sorts what is ready at the same time: what others wait for goes first, weights' gradients wait for nobody."""
    if work.kind == "weight":
        return (2, work.microbatch, -work.stage)
    if work.kind == "forward":
        return (1, work.microbatch // ranks, work.stage, work.microbatch)
    return (0, work.microbatch // ranks, -work.stage, work.microbatch)
