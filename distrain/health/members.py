"""The ranks of a run, and the keys under which each publishes its state in the run's store."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from torch.distributed import Store  # type: ignore[attr-defined]

from distrain.health.failure_report import FIRST_FAILURE_KEY, NO_FAILURE
from distrain.health.judge import Heartbeat
from distrain.health.process import Process


@dataclass(frozen=True)
class Member:
    """A rank as another rank sees it.

    Attributes:
        host: Name of its host.
        process: Its process on that host.
        is_local: The observer runs on the same host and can see the process.
    """

    host: str
    process: Process
    is_local: bool

    @property
    def has_exited(self) -> bool:
        """Whether its process is known to have ended."""
        return self.is_local and not self.process.is_alive


@dataclass(frozen=True)
class WatchIdentity:
    """Who a :class:`~distrain.health.watch.Watch` runs for.

    Attributes:
        rank: This rank.
        world_size: Number of ranks.
        host: Name of this rank's host.
        store_address: Address of the run's store, for messages.
        rank_0_serves_store: The store ends with rank 0's process; otherwise the launcher serves it.
    """

    rank: int
    world_size: int
    host: str
    store_address: str
    rank_0_serves_store: bool


def register(store: Store, rank: int, host: str) -> None:
    """Publishes this rank's host and process; every rank does so before any calls :func:`read_members`."""
    if rank == 0:
        store.set(FIRST_FAILURE_KEY, NO_FAILURE)
    store.set(heartbeat_key(rank), Heartbeat().to_json())
    store.set(member_key(rank), json.dumps({"host": host, **asdict(Process.current())}))


def read_members(store: Store, world_size: int, own_host: str) -> list[Member]:
    """Returns all ranks as seen from ``own_host``; all must have registered."""
    members = []
    for text in store.multi_get([member_key(rank) for rank in range(world_size)]):
        published = json.loads(text)
        process = Process(published["pid"], published["started"])
        # Containers may have the same host name and yet not see each other's processes.
        is_local = published["host"] == own_host and process.is_alive
        members.append(Member(published["host"], process, is_local))
    return members


def read_heartbeats(store: Store, ranks: Iterable[int]) -> dict[int, Heartbeat]:
    """Returns the latest heartbeat of each of these ranks."""
    ranks = list(ranks)
    values = store.multi_get([heartbeat_key(rank) for rank in ranks])
    return {rank: Heartbeat.from_json(text) for rank, text in zip(ranks, values, strict=True)}


def member_key(rank: int) -> str:
    """The key of what :func:`register` publishes last; the rank has registered if it exists."""
    return f"member/{rank}"


def heartbeat_key(rank: int) -> str:
    """The key of a rank's latest heartbeat."""
    return f"heartbeat/{rank}"


def details_key(rank: int) -> str:
    """The key of a rank's :class:`~distrain.health.rank_states.RankDetails`, read only after a failure."""
    return f"details/{rank}"
