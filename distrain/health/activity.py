"""What a rank is working on: written by the thread that works, read by the thread that watches it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from distrain.health.mesh_place import place_in

F = TypeVar("F", bound=Callable[..., Any])

#: Phases without a deadline: before a phase is set, and while a parameter server waits for requests.
_UNTIMED_PHASES = ("", "serving")


class RankActivity:
    """What a rank is working on. These are plain attributes, so an update in every step costs nothing.

    Attributes:
        phase: ``set-up``, ``training``, ``evaluation``, ``saving``, ``finishing``, ``serving``, or empty.
        progress: Increases with every step, batch and phase. Only a change matters, not the value.
        step: Optimizer updates done.
        epoch: Epochs finished.
        offset: Index of the current batch's first sample, in the order of the epoch.
        count: Samples of the current batch over all data shards; the last batch of an epoch may hold fewer.
        batches: Of the evaluation under way, or the last one: how many this rank has done, and how many there are.
        shard: ``(index, count)``: this rank's share of the batch; ``(0, 0)`` before the first batch.
        mesh: Numbers of ranks along the dimensions in which they are arranged, from the outermost one on; empty until
            that is known.
        independent_steps: The ranks do not run in lockstep, so another rank's step says nothing about this one's.
        expendable: The other ranks continue if this rank fails.
        find_samples: Maps ``epoch``, ``offset``, ``count`` and ``shard`` to the positions in the training split of a
            rank's part of the batch; ``None`` if there is no data set.
    """

    def __init__(self) -> None:
        self.phase = ""
        self.progress = self.step = self.epoch = self.offset = self.count = 0
        self.batches = self.shard = (0, 0)
        self.independent_steps = self.expendable = False
        self.mesh: Mapping[str, int] = {}
        self.find_samples: Callable[[int, int, int, tuple[int, int]], list[int]] | None = None

    def place_of(self, rank: int) -> dict[str, int]:
        """Where a rank is in the mesh; see :func:`distrain.health.mesh_place.place_in`."""
        return place_in(self.mesh, rank)

    @property
    def is_timed(self) -> bool:
        """Whether a rank in this phase must make progress within a time limit."""
        return self.phase not in _UNTIMED_PHASES

    def enter_epoch(self, epoch: int, offset: int, count: int, shard: tuple[int, int]) -> None:
        """Records that training starts or continues at this place of an epoch; see the attributes."""
        self.epoch, self.offset, self.count, self.shard = epoch, offset, count, shard
        self.phase = "training"
        self.progress += 1

    def advance(self, step: int, offset: int) -> None:
        """Records that ``step`` updates are done and that the next batch begins at ``offset``."""
        self.step, self.offset = step, offset
        self.progress += 1

    def reach(self, step: int) -> None:
        """Records that ``step`` updates are done somewhere; a server is as far as its fastest worker."""
        self.step = max(self.step, step)

    def samples(self) -> list[int] | None:
        """Positions in the training split of this rank's part of the current batch; ``None`` outside training."""
        if self.find_samples is None or self.phase != "training":
            return None
        return self.find_samples(self.epoch, self.offset, self.count, self.shard)


def in_phase(phase: str) -> Callable[[F], F]:
    """Decorates a method of an object with a ``runtime``: sets the rank's phase while the method runs.

    If the method raises, the phase is kept, so that the failure report shows it.
    """

    def decorate(method: F) -> F:
        @functools.wraps(method)
        def decorated(self: Any, *args: Any, **kwargs: Any) -> Any:
            activity: RankActivity = self.runtime.activity
            previous, activity.phase = activity.phase, phase
            activity.progress += 1
            result = method(self, *args, **kwargs)
            activity.phase = previous
            activity.progress += 1
            return result

        return cast(F, decorated)

    return decorate
