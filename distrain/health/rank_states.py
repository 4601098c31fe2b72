"""The state of every rank when the run failed: what ``failure.json`` contains besides the error."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.distributed import Store  # type: ignore[attr-defined]

from distrain.errors import first_line
from distrain.health.activity import RankActivity
from distrain.health.judge import Heartbeat
from distrain.health.members import Member, details_key, read_heartbeats

log = logging.getLogger(__name__)

#: A rank reads of a failure when its next heartbeat is due; it then has this much longer to publish its final state.
_GRACE_SECONDS = 0.7
#: Innermost calls kept of the stack of each rank that did not fail first.
_STACK_LINES = 3


@dataclass(frozen=True)
class RankDetails:
    """What a rank publishes besides its heartbeat; read only after a failure.

    Attributes:
        epoch: Epoch of the current batch, as in :class:`~distrain.health.activity.RankActivity`.
        offset: Index of the batch's first sample, likewise.
        count: Samples of the batch over all shards, likewise.
        stack: The innermost calls of its main thread.
    """

    epoch: int
    offset: int
    count: int
    stack: list[str]

    def to_json(self) -> str:
        """Encodes the details for the store."""
        return json.dumps([self.epoch, self.offset, self.count, self.stack])

    @classmethod
    def from_json(cls, text: bytes) -> RankDetails:
        """Decodes details."""
        return cls(*json.loads(text))


@dataclass(frozen=True)
class RankStates:
    """What one rank knows about all ranks.

    Attributes:
        heartbeats: The latest heartbeat of each rank.
        details: The details of each rank that has published them.
    """

    heartbeats: dict[int, Heartbeat]
    details: dict[int, RankDetails]

    @classmethod
    def read(
        cls,
        store: Store,
        heartbeats: dict[int, Heartbeat],
        members: Sequence[Member],
        unresponsive: Collection[int],
        interval: float,
    ) -> RankStates:
        """Waits until the ranks that are still alive have published their final state, and reads it.

        Args:
            store: Where they publish it.
            heartbeats: The heartbeats known already; returned if the store cannot be reached.
            members: All ranks of the run.
            unresponsive: Ranks that will not publish a final state and are not waited for.
            interval: Seconds between two heartbeats.
        """
        details: dict[int, RankDetails] = {}
        deadline = time.monotonic() + interval + _GRACE_SECONDS
        try:
            heartbeats = read_heartbeats(store, heartbeats)
            while time.monotonic() < deadline and any(
                rank not in unresponsive and not (beat.failing or beat.leaving or members[rank].has_exited)
                for rank, beat in heartbeats.items()
            ):
                time.sleep(0.05)
                heartbeats = read_heartbeats(store, heartbeats)
            # A rank that failed right after it registered has published no details, and get() would wait for them.
            published = [rank for rank in heartbeats if store.check([details_key(rank)])]
            details = {rank: RankDetails.from_json(store.get(details_key(rank))) for rank in published}
        except RuntimeError as error:
            log.warning("the state of the other ranks can't be read: %s", first_line(error))
        return cls(heartbeats, details)

    def stack(self, rank: int) -> str:
        """A rank's last known stack as text; empty if it is unknown."""
        if rank not in self.details or not self.details[rank].stack:
            return ""
        return "\n".join(["last known stack of its main thread:", *self.details[rank].stack])

    def samples(self, rank: int, own_rank: int, own: RankActivity) -> list[int] | None:
        """Positions in the training split of a rank's part of its current batch.

        Args:
            rank: The rank asked about.
            own_rank: The calling rank.
            own: The calling rank's activity.

        Returns:
            The positions, or ``None`` if they are unknown or the rank was not training.
        """
        if rank == own_rank:
            return own.samples()
        # A rank's last heartbeat may be a second old. Ranks in lockstep are all at the step of the furthest one.
        comparable = [rank] if own.independent_steps else self._timed_ranks()
        furthest = max(comparable, default=rank, key=lambda each: self.heartbeats[each].step)
        heartbeat, details = self.heartbeats[furthest], self.details.get(furthest)
        if not own.independent_steps and own.is_timed and own.step >= heartbeat.step:
            batch, phase = (own.epoch, own.offset, own.count), own.phase
        elif details is not None:
            batch, phase = (details.epoch, details.offset, details.count), heartbeat.phase
        else:
            return None
        shard = self.heartbeats[rank].shard
        if own.find_samples is None or phase != "training" or not shard[1]:
            return None
        return own.find_samples(*batch, shard)

    def _timed_ranks(self) -> list[int]:
        return [rank for rank, heartbeat in self.heartbeats.items() if heartbeat.progress is not None]

    def others(
        self, failed: int, members: Sequence[Member], place_of: Callable[[int], Mapping[str, int]]
    ) -> list[dict[str, Any]]:
        """The states of all ranks but the failed one, as plain data for ``failure.json``.

        Args:
            failed: That rank.
            members: All ranks.
            place_of: Where a rank is in the mesh.
        """
        return [
            {
                "rank": rank,
                "place": place_of(rank),
                "host": members[rank].host,
                "step": heartbeat.step,
                "doing": heartbeat.phase,
                "waiting": heartbeat.waiting,
                "stack": self.details[rank].stack[-_STACK_LINES:] if rank in self.details else [],
            }
            for rank, heartbeat in self.heartbeats.items()
            if rank != failed
        ]
