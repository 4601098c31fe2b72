"""The ranks of a run and what they leave in its store for each other."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from torch.distributed import Store  # type: ignore[attr-defined]

from distrain.health.failure_report import CLAIM, NO_CLAIM
from distrain.health.judge import Heartbeat
from distrain.health.process import Process


@dataclass(frozen=True)
class Member:
    """A rank.

    Attributes:
        host: Where it is.
        process: Its number there.
        is_near: The rank that knows this is on the same host and sees its process.
    """

    host: str
    process: Process
    is_near: bool

    @property
    def is_gone(self) -> bool:
        """Whether its process is known to have ended."""
        return self.is_near and not self.process.is_alive


def join(store: Store, rank: int, host: str) -> None:
    """Tells the store who this rank is; it is counted in from then on."""
    if rank == 0:
        store.set(CLAIM, NO_CLAIM)
    store.set(beat_key(rank), Heartbeat().packed())
    store.set(member_key(rank), json.dumps({"host": host, **asdict(Process.current())}))


def find_members(store: Store, size: int, host: str) -> list[Member]:
    """All ranks, which must have joined, as a rank on ``host`` sees them."""
    found = []
    for text in store.multi_get([member_key(rank) for rank in range(size)]):
        told = json.loads(text)
        process = Process(told["pid"], told["started"])
        # Containers may share a name and not see each other's processes.
        found.append(Member(told["host"], process, told["host"] == host and process.is_alive))
    return found


def read_beats(store: Store, ranks: Iterable[int]) -> dict[int, Heartbeat]:
    """The last beat of each rank."""
    ranks = list(ranks)
    found = store.multi_get([beat_key(rank) for rank in ranks])
    return {rank: Heartbeat.unpacked(text) for rank, text in zip(ranks, found, strict=True)}


def member_key(rank: int) -> str:
    """Where the store has what :func:`join` told; a rank is there when this is."""
    return f"member/{rank}"


def beat_key(rank: int) -> str:
    """Where it has a rank's last beat."""
    return f"beat/{rank}"


def told_key(rank: int) -> str:
    """Where it has what only matters after a failure: the batch in work, and the main thread's calls."""
    return f"told/{rank}"
