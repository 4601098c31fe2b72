"""Gathers the ranks of one start of a job, in a store that may still hold the keys of earlier starts.

A launcher's store outlives restarts, and no number from a launcher identifies a start: each of torchrun's agents
counts restarts for itself (a node that joins again begins at 0), and a change of membership isn't counted at all. So
every rank draws a random name. The other ranks send rank 0 a request with theirs, rank 0 answers each name with a key
prefix that is new in this start, and all ranks register below that prefix. Thereby the keys of dead ranks are ignored.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

_POLL_SECONDS = 0.005
#: Between two looks at a key that takes long, so that many waiting ranks don't keep the store busy.
_LONGEST_PAUSE = 0.1


def gather_ranks(store: Store, rank: int, world_size: int, timeout: float, register: Callable[[Store], None]) -> str:
    """Waits for all ranks of this start.

    Args:
        store: A store that all ranks can reach.
        rank: This rank.
        world_size: Number of ranks.
        timeout: Longest wait in seconds.
        register: Called with the part of the store that belongs to this start, to publish what the other ranks need to
            know of this one. All ranks have done so when this function returns.

    Returns:
        The key prefix of that part of the store.

    Raises:
        RuntimeError: Not all ranks joined in time; the message names those that are missing.
    """
    name, deadline = uuid.uuid4().hex, time.monotonic() + timeout
    if rank == 0:
        prefix = f"distrain/start/{name}"
        own_store = _arrive(store, prefix, rank, register)
        missing = _answer_requests(store, own_store, prefix, world_size, deadline)
        own_store.set("missing", json.dumps(missing))
    else:
        store.set(f"distrain/request/{rank}", json.dumps({"name": name, "size": world_size}))
        if not _wait(store, f"distrain/answer/{name}", deadline):
            raise _missing_ranks([0], timeout)
        prefix = store.get(f"distrain/answer/{name}").decode()
        own_store = _arrive(store, prefix, rank, register)
        if _wait(own_store, "missing", deadline):
            missing = json.loads(own_store.get("missing"))
        else:
            missing = _not_arrived(own_store, range(world_size))
    if missing:
        raise _missing_ranks(missing, timeout)
    return prefix


def _answer_requests(store: Store, own_store: Store, prefix: str, world_size: int, deadline: float) -> list[int]:
    """Answers requests until all ranks have arrived or the time is up; returns the ranks that did not arrive."""
    missing = list(range(1, world_size))
    answered: set[str] = set()
    while missing and time.monotonic() < deadline:
        for rank in missing:
            # A request may come from an earlier start. The rank of this start overwrites it.
            if store.check([f"distrain/request/{rank}"]):
                request = json.loads(store.get(f"distrain/request/{rank}"))
                if request["name"] not in answered and request["size"] == world_size:
                    store.set(f"distrain/answer/{request['name']}", prefix)
                    answered.add(request["name"])
        missing = _not_arrived(own_store, missing)
        time.sleep(_POLL_SECONDS)
    return missing


def _arrive(store: Store, prefix: str, rank: int, register: Callable[[Store], None]) -> Store:
    """Registers this rank; returns the part of the store that belongs to this start."""
    own_store = PrefixStore(prefix, store)
    register(own_store)
    own_store.set(f"arrived/{rank}", "")
    return own_store


def _not_arrived(own_store: Store, ranks: Iterable[int]) -> list[int]:
    return [rank for rank in ranks if not own_store.check([f"arrived/{rank}"])]


def _wait(store: Store, key: str, deadline: float) -> bool:
    """Waits for a key; returns whether it was set in time."""
    # The store's own wait() would keep signals from being handled, Ctrl-C among them.
    pause = _POLL_SECONDS
    while not store.check([key]):
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
    return True


def _missing_ranks(ranks: list[int], timeout: float) -> RuntimeError:
    return RuntimeError(f"ranks {ranks} did not join within runtime.setup_timeout_seconds={timeout:g}")
