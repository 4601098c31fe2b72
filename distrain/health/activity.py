"""Where a rank is in its work: written by the thread that works, read by the one that watches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])

#: A rank that does nothing, as far as anybody has said, or answers others, has no progress of its own to be judged by.
_UNMEASURED = ("", "serving")


class RankActivity:
    """What a rank is at; plain attributes, so that keeping it up to date costs a step nothing.

    Attributes:
        phase: ``set-up``, ``training``, ``evaluation``, ``saving``, ``finishing``, ``serving``, or nothing.
        progress: Goes up with every step, batch and phase; only that it does is of interest.
        step: Updates done.
        epoch: Epochs finished.
        offset: First sample of the batch in work, in the order of the epoch.
        count: Samples of the batch in work over all shards, if the epoch has so many left.
        shard: ``(index, count)``: this rank's share of it; ``(0, 0)`` before the first.
        independent_steps: The ranks don't keep step, so another rank's position says nothing of this one's.
        expendable: The others go on if this rank fails.
        find_samples: From ``epoch``, ``offset``, ``count`` and ``shard`` to the positions in the training split of the
            samples that a rank has in work; ``None`` where no data is known.
    """

    def __init__(self) -> None:
        self.phase = ""
        self.progress = self.step = self.epoch = self.offset = self.count = 0
        self.shard = (0, 0)
        self.independent_steps = self.expendable = False
        self.find_samples: Callable[[int, int, int, tuple[int, int]], list[int]] | None = None

    @property
    def is_measured(self) -> bool:
        """Whether a rank that does this must make progress."""
        return self.phase not in _UNMEASURED

    def enter_epoch(self, epoch: int, offset: int, count: int, shard: tuple[int, int]) -> None:
        """Training goes on at this place of an epoch."""
        self.epoch, self.offset, self.count, self.shard = epoch, offset, count, shard
        self.phase = "training"
        self.progress += 1

    def advance(self, step: int, offset: int) -> None:
        """A step is done; the next batch begins at ``offset``."""
        self.step, self.offset = step, offset
        self.progress += 1

    def samples(self) -> list[int] | None:
        """The samples that this rank has in work; ``None`` outside of training."""
        if self.find_samples is None or self.phase != "training":
            return None
        return self.find_samples(self.epoch, self.offset, self.count, self.shard)


def in_phase(what: str) -> Callable[[F], F]:
    """Decorates a method of something with a ``runtime``: what the rank is doing while it runs.

    After an error it stays, for the report.
    """

    def decorate(method: F) -> F:
        @functools.wraps(method)
        def decorated(self: Any, *args: Any, **kwargs: Any) -> Any:
            position: RankActivity = self.runtime.activity
            before, position.phase = position.phase, what
            position.progress += 1
            result = method(self, *args, **kwargs)
            position.phase = before
            position.progress += 1
            return result

        return cast(F, decorated)

    return decorate
