"""Where every rank was when the run failed: what ``failure.json`` says besides the error."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch.distributed import Store  # type: ignore[attr-defined]

from distrain.health.activity import RankActivity
from distrain.health.failure_report import first_line
from distrain.health.judge import Heartbeat
from distrain.health.members import Member, read_beats, told_key

log = logging.getLogger(__name__)

#: How long after its next beat is due a rank has said where it was when it heard of the failure.
_PATIENCE_SECONDS = 0.7
#: ThreadStack of the other ranks that are kept.
_INNERMOST = 3


@dataclass(frozen=True)
class RankDetails:
    """What a rank tells besides its beat, for the case that it fails.

    Attributes:
        epoch: Of the batch in work, as in :class:`~distrain.health.activity.RankActivity`; so are the next two.
        offset: See there.
        count: See there.
        calls: Where its main thread is.
    """

    epoch: int
    offset: int
    count: int
    calls: list[str]

    def packed(self) -> str:
        """As text."""
        return json.dumps([self.epoch, self.offset, self.count, self.calls])

    @classmethod
    def unpacked(cls, text: bytes) -> RankDetails:
        """The other way round."""
        return cls(*json.loads(text))


@dataclass(frozen=True)
class RankStates:
    """What is known of all ranks.

    Attributes:
        beats: The last of each rank.
        told: What they told besides, of those that did.
    """

    beats: dict[int, Heartbeat]
    told: dict[int, RankDetails]

    @classmethod
    def read(
        cls,
        store: Store,
        beats: dict[int, Heartbeat],
        members: Sequence[Member],
        mute: Collection[int],
        seconds: float,
    ) -> RankStates:
        """Reads where the ranks are, once all that can have heard of the failure have said so.

        Args:
            store: Where they tell it.
            beats: What is known already, for a store that can't be reached.
            members: Of the run.
            mute: Ranks that won't say so.
            seconds: Between two beats.
        """
        told: dict[int, RankDetails] = {}
        deadline = time.monotonic() + seconds + _PATIENCE_SECONDS
        try:
            beats = read_beats(store, beats)
            while time.monotonic() < deadline and any(
                rank not in mute and not (beat.ending or beat.left or members[rank].is_gone)
                for rank, beat in beats.items()
            ):
                time.sleep(0.05)
                beats = read_beats(store, beats)
            # A rank that failed at once has told nothing, and waiting for it would take long.
            there = [rank for rank in beats if store.check([told_key(rank)])]
            told = {rank: RankDetails.unpacked(store.get(told_key(rank))) for rank in there}
        except RuntimeError as error:
            log.warning("where the other ranks were can't be read: %s", first_line(error))
        return cls(beats, told)

    def stack(self, rank: int) -> str:
        """What its main thread was in, as far as is known."""
        if rank not in self.told or not self.told[rank].calls:
            return ""
        return "\n".join(["last known stack of its main thread:", *self.told[rank].calls])

    def samples(self, rank: int, own_rank: int, own: RankActivity) -> list[int] | None:
        """Positions in the training split of what a rank had in work; ``None`` if that is unknown or nothing.

        Args:
            rank: Which.
            own_rank: The rank that asks.
            own: Its position.
        """
        if rank == own_rank:
            return own.samples()
        # Its last word may be a second old; ranks that keep step are where the furthest of them is.
        like = (
            [rank]
            if own.independent_steps
            else [each for each, beat in self.beats.items() if beat.progress is not None]
        )
        furthest = max(like, default=rank, key=lambda each: self.beats[each].step)
        beat, told = self.beats[furthest], self.told.get(furthest)
        if not own.independent_steps and own.is_measured and own.step >= beat.step:
            place, doing = (own.epoch, own.offset, own.count), own.phase
        elif told is not None:
            place, doing = (told.epoch, told.offset, told.count), beat.phase
        else:
            return None
        if own.find_samples is None or doing != "training" or not self.beats[rank].shard[1]:
            return None
        return own.find_samples(*place, self.beats[rank].shard)

    def others(self, failed: int, members: Sequence[Member]) -> list[dict[str, Any]]:
        """Where all ranks but one were, as plain data."""
        return [
            {
                "rank": rank,
                "host": members[rank].host,
                "step": beat.step,
                "doing": beat.phase,
                "waiting": beat.waiting,
                "stack": self.told[rank].calls[-_INNERMOST:] if rank in self.told else [],
            }
            for rank, beat in self.beats.items()
            if rank != failed
        ]
