"""How the ranks of one start find each other in a store that may remember earlier starts.

A launcher's store outlives restarts, and no number that a launcher gives tells one start from the other: torchrun's
agents count restarts each for itself (a node that comes back begins at 0, and a change of the members isn't counted at
all). So every rank draws a name of its own. The others knock with theirs, rank 0 answers each with the name of the
round, and all meet below that name. What dead ranks left is neither waited for nor believed.
"""

from __future__ import annotations

import datetime
import json
import time
import uuid
from collections.abc import Callable, Iterable

import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

_POLL_SECONDS = 0.005


def meet(store: Store, rank: int, size: int, timeout: float, introduce: Callable[[Store], None]) -> str:
    """Waits for all ranks of this start.

    Args:
        store: What all ranks reach.
        rank: This one.
        size: How many there are.
        timeout: Longest wait in seconds.
        introduce: Is given the part of the store that is this start's alone, to leave there what this rank has to say
            of itself; all ranks have when this returns.

    Returns:
        The prefix of that part.

    Raises:
        RuntimeError: Not all came in time; those that didn't are named.
    """
    name, deadline = uuid.uuid4().hex, time.monotonic() + timeout
    if rank == 0:
        prefix = f"distrain/round/{name}"
        mine = _arrive(store, prefix, rank, introduce)
        missing = _answer(store, mine, prefix, size, deadline)
        mine.set("met", json.dumps(missing))
    else:
        store.set(f"distrain/knock/{rank}", json.dumps({"name": name, "size": size}))
        if not _wait(store, f"distrain/answer/{name}", deadline):
            raise _not_met([0], timeout)
        prefix = store.get(f"distrain/answer/{name}").decode()
        mine = _arrive(store, prefix, rank, introduce)
        if _wait(mine, "met", deadline):
            missing = json.loads(mine.get("met"))
        else:
            missing = _not_here(mine, range(size))
    if missing:
        raise _not_met(missing, timeout)
    return prefix


def _answer(store: Store, mine: Store, prefix: str, size: int, deadline: float) -> list[int]:
    """Answers whoever knocks until all are here; returns those that did not come."""
    missing = list(range(1, size))
    answered: set[str] = set()
    while missing and time.monotonic() < deadline:
        for rank in missing:
            # A knock may be a dead rank's, which the living one's will replace.
            if store.check([f"distrain/knock/{rank}"]):
                knock = json.loads(store.get(f"distrain/knock/{rank}"))
                if knock["name"] not in answered and knock["size"] == size:
                    store.set(f"distrain/answer/{knock['name']}", prefix)
                    answered.add(knock["name"])
        missing = _not_here(mine, missing)
        time.sleep(_POLL_SECONDS)
    return missing


def _arrive(store: Store, prefix: str, rank: int, introduce: Callable[[Store], None]) -> Store:
    mine = PrefixStore(prefix, store)
    introduce(mine)
    mine.set(f"arrived/{rank}", "")
    return mine


def _not_here(mine: Store, ranks: Iterable[int]) -> list[int]:
    return [rank for rank in ranks if not mine.check([f"arrived/{rank}"])]


def _wait(store: Store, key: str, deadline: float) -> bool:
    try:
        store.wait([key], datetime.timedelta(seconds=max(deadline - time.monotonic(), 0.1)))
    except dist.DistStoreError:
        return False
    return True


def _not_met(ranks: list[int], timeout: float) -> RuntimeError:
    return RuntimeError(f"ranks {ranks} did not come within runtime.setup_timeout_seconds={timeout:g}")
