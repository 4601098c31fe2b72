"""How the ranks of one start find each other in a store that may remember earlier starts.

A launcher's store outlives restarts, and no number that a launcher gives tells one start from the other: torchrun's
agents count restarts each for itself (a node that comes back begins at 0, and a change of the members isn't counted at
all). So every rank draws a name of its own. The others knock with theirs, rank 0 answers each with the name of the
round, and all meet below that name. What dead ranks left is neither waited for nor believed.
"""

from __future__ import annotations

import datetime
import json
import os
import time
import uuid

import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

_POLL_SECONDS = 0.005


def meet(store: Store, rank: int, size: int, host: str, timeout: float) -> Store:
    """Waits for all ranks of this start.

    Args:
        store: What all ranks reach.
        rank: This one.
        size: How many there are.
        host: Where this one is.
        timeout: Longest wait in seconds.

    Returns:
        The part of the store that is this start's alone; ``here/<rank>`` says each rank's ``host`` and ``pid`` as JSON.

    Raises:
        RuntimeError: Not all came in time; those that didn't are named.
    """
    name, deadline = uuid.uuid4().hex, time.monotonic() + timeout
    if rank == 0:
        mine = _round(store, name)
        _arrive(mine, rank, host)
        missing = _answer(store, mine, name, size, deadline)
        mine.set("met", json.dumps(missing))
    else:
        store.set(f"distrain/knock/{rank}", json.dumps({"name": name, "size": size}))
        if not _wait(store, f"distrain/answer/{name}", deadline):
            raise _not_met([0], timeout)
        mine = _round(store, store.get(f"distrain/answer/{name}").decode())
        _arrive(mine, rank, host)
        missing = [each for each in range(size) if not mine.check([f"here/{each}"])]
        if _wait(mine, "met", deadline):
            missing = json.loads(mine.get("met"))
    if missing:
        raise _not_met(missing, timeout)
    return mine


def _answer(store: Store, mine: Store, name: str, size: int, deadline: float) -> list[int]:
    """Answers whoever knocks until all are here; returns those that did not come."""
    missing = list(range(1, size))
    answered: set[str] = set()
    while missing and time.monotonic() < deadline:
        for rank in missing:
            # A knock may be a dead rank's, which the living one's will replace.
            if store.check([f"distrain/knock/{rank}"]):
                knock = json.loads(store.get(f"distrain/knock/{rank}"))
                if knock["name"] not in answered and knock["size"] == size:
                    store.set(f"distrain/answer/{knock['name']}", name)
                    answered.add(knock["name"])
        missing = [rank for rank in missing if not mine.check([f"here/{rank}"])]
        time.sleep(_POLL_SECONDS)
    return missing


def _round(store: Store, name: str) -> Store:
    return PrefixStore(f"distrain/round/{name}", store)


def _arrive(mine: Store, rank: int, host: str) -> None:
    mine.set(f"here/{rank}", json.dumps({"host": host, "pid": os.getpid()}))


def _wait(store: Store, key: str, deadline: float) -> bool:
    try:
        store.wait([key], datetime.timedelta(seconds=max(deadline - time.monotonic(), 0.1)))
    except dist.DistStoreError:
        return False
    return True


def _not_met(ranks: list[int], timeout: float) -> RuntimeError:
    return RuntimeError(f"ranks {ranks} did not come within runtime.setup_timeout_seconds={timeout:g}")
