"""Tells whether a compressor that somebody picked makes a step faster than none would."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from distrain.communication.collectives import Communicator, ring_all_reduce_bytes
from distrain.communication.types import Pending
from distrain.compression.autotune.link_model import Link, measure_link
from distrain.compression.autotune.simulation import Backdrop, BucketCost, Cost, predicted
from distrain.compression.autotune.step_trace import Recorder, Step, typical
from distrain.compression.base import Compressor
from distrain.compression.bucket import Bucket
from distrain.compression.none import NoCompression

log = logging.getLogger(__name__)

#: Steps before anything is timed: memory, caches, compilation.
WARM_STEPS = 4
#: Steps whose median tells what a step takes, and then steps that hold their exchanges back.
USUAL_STEPS, HELD_STEPS = 5, 3
#: Where a step without compression is predicted to be slower than this factor nobody needs to know it better.
CLEAR = 1.5
#: Pairs of a usual step and one with a rehearsal, after one to warm up.
REHEARSALS = 7
#: How much slower than without compression a step may be.
TOO_SLOW = 0.03


def wanted(compressor: Compressor, communicator: Communicator) -> bool:
    """Whether there is anything to compare, and nobody does it yet."""
    alone = communicator.size == 1 or compressor.observer is not None
    return not alone and not isinstance(compressor, NoCompression)


class Advisor(Recorder):
    """Watches the first steps of a run, says what it found, and leaves. Nothing about the training changes.

    What a step would take without compression it predicts: the bare step, as it is with exchanges held back, and the
    link's time for the uncompressed buckets. Where that doesn't settle it there are rehearsals: steps that all-reduce
    something as large as each bucket as soon as it is complete, as they would without compression, and hold the real
    exchanges back until that is over.

    Args:
        compressor: The one that was picked; this becomes its observer.
    """

    def __init__(self, compressor: Compressor) -> None:
        super().__init__()
        self._compressor = compressor
        self._course = self._watch()
        self._sizes: list[int] = []
        self._rehearses = False
        self._under_way: list[Pending] = []
        self._scratch: dict[int, Tensor] = {}
        compressor.observer = self

    def begin_step(self) -> None:
        """See the base class."""
        self.close()
        next(self._course, None)
        self.open()

    def ready(self, bucket: Bucket) -> None:
        """See the base class."""
        super().ready(bucket)
        self._sizes.append(bucket.bytes)
        if self._rehearses and self.communicator is not None:
            scratch = self._scratch.setdefault(len(self._sizes), torch.zeros_like(bucket.flat))
            self._under_way.append(self.communicator.start_all_reduce(scratch))

    def closed(self) -> None:
        """See the base class."""
        for pending in self._under_way:
            pending.wait()
        self._under_way.clear()
        super().closed()

    def _watch(self) -> Iterator[None]:
        """What comes before each step; a ``yield`` is a step."""
        while len(self.steps) < WARM_STEPS or self._compressor.step <= self._compressor.warmup_steps:
            yield
        self.take()
        for _ in range(USUAL_STEPS):
            yield
        usual = self.take()
        self.holds = True
        for _ in range(HELD_STEPS):
            self._sizes.clear()
            yield
        self.holds = False
        takes, without, link = self._predict(usual, self.take())
        error = 0.0
        if without < CLEAR * takes:
            takes, without, error = yield from self._rehearse()
        self._scratch.clear()
        self._compressor.observer = None
        slower, line = verdict(self._compressor.config.name, takes, without, error, link)
        log.log(logging.WARNING if slower else logging.INFO, "%s", line)

    def _predict(self, usual: Sequence[Step], held: Sequence[Step]) -> tuple[float, float, Link]:
        """Seconds of a step as it is and without compression, and the link."""
        assert self.communicator is not None
        link = measure_link(self.communicator, self.device, max(self._sizes))
        mine = {
            "steps": [asdict(Backdrop.of(step)) for step in held],
            "usual": [step.span for step in usual],
            "rest": statistics.median(step.rest for step in [*usual, *held]),
        }
        everyone = self.communicator.all_gather_json(mine, self.device)
        takes = typical(_slowest(everyone, "usual"))[0] + max(each["rest"] for each in everyone)
        steps = [[Backdrop(**step) for step in each["steps"]] for each in everyone]
        costs = [uncompressed(self._sizes, self.communicator.size)] * len(everyone)
        return takes, predicted(steps, costs, link), link

    def _rehearse(self) -> Generator[None, None, tuple[float, float, float]]:
        """Seconds of a step as it is and without compression, and how far the difference may be off.

        Both take turns, so that they meet the same conditions.
        """
        assert self.communicator is not None
        usual: list[Step] = []
        rehearsed: list[Step] = []
        self.take()
        for _ in range(REHEARSALS + 1):
            for kept, self._rehearses in ((usual, False), (rehearsed, True)):
                self.holds = self._rehearses
                self._sizes.clear()
                yield
                kept += self.take()
        self._rehearses = self.holds = False
        mine = {
            "usual": [step.span for step in usual[1:]],
            "without": [step.bare for step in rehearsed[1:]],
            "rest": statistics.median(step.rest for step in usual + rehearsed),
        }
        everyone = self.communicator.all_gather_json(mine, self.device)
        rest = max(each["rest"] for each in everyone)
        takes, error = typical(_slowest(everyone, "usual"))
        without, other_error = typical(_slowest(everyone, "without"))
        return takes + rest, without + rest, math.hypot(error, other_error)


def _slowest(everyone: Sequence[Mapping[str, Any]], what: str) -> list[float]:
    """Each step's span on the rank where it was longest."""
    return [max(spans) for spans in zip(*(each[what] for each in everyone), strict=True)]


def uncompressed(sizes: Sequence[int], ranks: int) -> Cost:
    """What happens without compression: an all-reduce a bucket, and no work of its own.

    Args:
        sizes: Bytes of each bucket, in the order in which they leave.
        ranks: How many reduce them.
    """
    reductions = [[("all_reduce", ring_all_reduce_bytes(size, ranks))] for size in sizes]
    return Cost([BucketCost([0.0, 0.0], [each]) for each in reductions])


def verdict(name: str, takes: float, without: float, error: float, link: Link) -> tuple[bool, str]:
    """Whether compression makes a step too slow, and the line that says what it makes of it.

    Args:
        name: The compressor.
        takes: Seconds of a step with it.
        without: Seconds of a step without.
        error: How far the difference may be off.
        link: What carries the messages.
    """
    slower = takes - without > max(TOO_SLOW * without, error)
    told = (
        f"compression={name} makes a step {1000 * takes:.1f} ms; without it would be about {1000 * without:.1f} ms on "
        f"this link ({link})"
    )
    if slower:
        return True, f"{told}, so compression=none or compression=auto is faster"
    return False, f"{told}; steps vary too much to tell" if takes > (1 + TOO_SLOW) * without else told
