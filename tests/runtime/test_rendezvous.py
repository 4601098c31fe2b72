"""Ranks find those of their own start, whatever earlier starts have left in the store."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from distrain.runtime import rendezvous
from tests.harness import HANG_SECONDS


@pytest.fixture
def server() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def gather(server: TCPStore, rank: int, size: int, timeout: float = HANG_SECONDS) -> Any:
    # Each rank has a connection of its own, as in separate processes.
    store = TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
    prefix = rendezvous.gather_ranks(store, rank, size, timeout, lambda own: own.set(f"name/{rank}", f"rank {rank}"))
    return PrefixStore(prefix, store)


def gather_all(server: TCPStore, size: int, timeout: float = HANG_SECONDS, first: tuple[int, ...] = ()) -> list[Any]:
    """Gathers all ranks; those in ``first`` start a little before the others."""
    with ThreadPoolExecutor(size) as pool:
        pending: dict[int, Future[Any]] = {}
        for rank in (*first, *(rank for rank in range(size) if rank not in first)):
            pending[rank] = pool.submit(gather, server, rank, size, timeout)
            if rank in first:
                time.sleep(0.1)
        return [pending[rank].result() for rank in range(size)]


@pytest.mark.parametrize("first", [(), (0,), (2, 1)])
def test_all_ranks_get_the_same_part_of_the_store_and_are_registered_there(
    server: TCPStore, first: tuple[int, ...]
) -> None:
    stores = gather_all(server, 3, first=first)
    stores[1].set("key", "from 1")
    assert [store.get("key") for store in stores] == [b"from 1"] * 3
    assert [stores[0].get(f"name/{rank}") for rank in range(3)] == [b"rank 0", b"rank 1", b"rank 2"]


def test_starts_do_not_see_each_other_even_with_another_number_of_ranks(server: TCPStore) -> None:
    starts = [gather_all(server, size)[0] for size in (3, 2, 3)]
    starts[0].set("failure", "of the first")
    assert not starts[1].check(["failure"])
    assert not starts[2].check(["failure"])


@pytest.mark.parametrize("died", [0, 1])
def test_a_rank_that_died_while_waiting_is_not_mistaken_for_its_successor(server: TCPStore, died: int) -> None:
    with pytest.raises(RuntimeError):
        gather(server, died, 2, timeout=0.2)
    stores = gather_all(server, 2)
    stores[0].set("ready", "yes")
    assert stores[1].get("ready") == b"yes"


def test_missing_ranks_are_named_on_those_that_joined(server: TCPStore) -> None:
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(gather, server, rank, 4, 2) for rank in (0, 2)]
        for future in futures:
            with pytest.raises(RuntimeError, match=r"^ranks \[1, 3\] did not join within .*seconds=2$"):
                future.result()
    with pytest.raises(RuntimeError, match=r"^ranks \[0\] did not join"):
        gather(server, 1, 2, timeout=0.1)
