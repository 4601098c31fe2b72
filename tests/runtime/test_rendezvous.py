"""Ranks meet those of their own start, whatever earlier starts have left in the store."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from distrain.runtime import rendezvous


@pytest.fixture
def server() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def meet(server: TCPStore, rank: int, size: int, timeout: float = 5) -> Any:
    # A connection of its own, as each process has one.
    store = TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
    prefix = rendezvous.meet(store, rank, size, timeout, lambda mine: mine.set(f"name/{rank}", f"rank {rank}"))
    return PrefixStore(prefix, store)


def all_meet(server: TCPStore, size: int, timeout: float = 5, first: tuple[int, ...] = ()) -> list[Any]:
    """All ranks, those named ``first`` a while before the others."""
    with ThreadPoolExecutor(size) as pool:
        coming: dict[int, Future[Any]] = {}
        for rank in (*first, *(rank for rank in range(size) if rank not in first)):
            coming[rank] = pool.submit(meet, server, rank, size, timeout)
            if rank in first:
                time.sleep(0.1)
        return [coming[rank].result() for rank in range(size)]


@pytest.mark.parametrize("first", [(), (0,), (2, 1)])
def test_all_get_one_part_of_the_store_and_know_each_other(server: TCPStore, first: tuple[int, ...]) -> None:
    stores = all_meet(server, 3, first=first)
    stores[1].set("told", "by 1")
    assert [store.get("told") for store in stores] == [b"by 1"] * 3
    assert [stores[0].get(f"name/{rank}") for rank in range(3)] == [b"rank 0", b"rank 1", b"rank 2"]


def test_starts_don_t_see_each_other_even_with_another_number_of_ranks(server: TCPStore) -> None:
    found = [all_meet(server, size)[0] for size in (3, 2, 3)]
    found[0].set("failure", "of the first")
    assert not found[1].check(["failure"])
    assert not found[2].check(["failure"])


@pytest.mark.parametrize("died", [0, 1])
def test_a_rank_that_died_while_it_waited_is_not_taken_for_the_next(server: TCPStore, died: int) -> None:
    with pytest.raises(RuntimeError):
        meet(server, died, 2, timeout=0.2)
    stores = all_meet(server, 2)
    stores[0].set("ready", "yes")
    assert stores[1].get("ready") == b"yes"


def test_who_does_not_come_is_named_to_those_who_did(server: TCPStore) -> None:
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(meet, server, rank, 4, 0.5) for rank in (0, 2)]
        for each in waiting:
            with pytest.raises(RuntimeError, match=r"^ranks \[1, 3\] did not come within .*seconds=0\.5$"):
                each.result()
    with pytest.raises(RuntimeError, match=r"^ranks \[0\] did not come"):
        meet(server, 1, 2, timeout=0.1)
