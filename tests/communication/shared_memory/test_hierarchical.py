"""Among hosts of several ranks every collective gives the defined result, and every strategy trains the same."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distrain.cli.run_folder import RunFolder
from distrain.communication.collectives import Communicator, digest
from distrain.communication.shared_memory import connect
from distrain.communication.shared_memory.hierarchical import HierarchicalChannel
from distrain.communication.types import Reduction
from distrain.errors import PeerLost
from distrain.health.failure_report import is_broken_connection
from tests.communication.shared_memory.ranks import form_group, shares_memory
from tests.garbage import cyclic_garbage
from tests.harness import HANG_SECONDS, RankFailed, run_ranks, run_ranks_to_the_end, soaked
from tests.runs import relative_difference, small
from tests.trained import train

COUNTS = (0, 1, 3, 1000, 600_001)
#: The host of each rank: even, uneven, with a rank alone on the first or last host, and alternating.
LAYOUTS = ("aabb", "abb", "aab", "abab", "aaba")


def pretend_host(layout: str) -> None:
    """Makes this rank believe that it is on a host of the layout."""
    mine = layout[int(os.environ["RANK"])]
    connect.host_identity = lambda: [mine]


def form_group_on_hosts(layout: str) -> Communicator:
    pretend_host(layout)
    everyone = form_group()
    assert shares_memory(everyone)
    assert isinstance(everyone._channel, HierarchicalChannel)
    return everyone


def numbers(rank: int, dtype: torch.dtype, count: int) -> Tensor:
    """Whole numbers, whose sums are exact in every dtype used here."""
    return ((torch.arange(count) * 7 + 3 * rank) % 11).to(dtype)


def every_operation(layout: str) -> list[str]:
    """The results that differ from the definition."""
    everyone = form_group_on_hosts(layout)
    wrong: list[str] = []

    def check(found: Tensor, expected: Tensor, *what: object) -> None:
        if found.dtype != expected.dtype or not torch.equal(found, expected):
            wrong.append(" ".join(map(str, what)))

    ranks, rank = everyone.size, everyone.rank
    reductions: tuple[Reduction, ...] = ("sum", "max", "min")
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.uint8):
        for count in COUNTS if dtype == torch.float32 else COUNTS[:-1]:
            everybody = torch.stack([numbers(each, dtype, count) for each in range(ranks)])
            mine = everybody[rank]
            for reduction in reductions:
                expected = getattr(everybody, {"sum": "sum", "max": "amax", "min": "amin"}[reduction])(0).to(dtype)
                check(everyone.all_reduce(mine.clone(), reduction), expected, reduction, dtype, count)
                rows = everyone.reduce_scatter(torch.stack([mine + each for each in range(ranks)]), reduction)
                shift = rank * (ranks if reduction == "sum" else 1)
                check(rows, (expected + shift)[None], "reduce_scatter", reduction, dtype, count)
            for source in range(ranks):
                check(everyone.broadcast(mine.clone(), source), everybody[source], "broadcast", source, dtype, count)
            check(torch.stack(everyone.all_gather(mine)), everybody, "all_gather", dtype, count)
    started = [everyone.start_all_reduce(torch.full((100 + each,), each + rank)) for each in range(50)]
    gathered = [everyone.start_all_gather(torch.full((3,), 100 * each + rank)) for each in range(50)]
    everyone.barrier()
    for job in reversed(started):
        job.wait()
    for index, (found, pending) in enumerate(gathered):
        pending.wait()
        check(torch.stack(found)[:, 0], 100 * index + torch.arange(ranks), "started gather", index)
    strided = torch.ones(4, 6)[:, ::2]
    check(everyone.all_reduce(strided), torch.full((4, 3), float(ranks)), "layout")
    with torch.inference_mode():
        check(everyone.all_reduce(torch.ones(5)), torch.full((5,), float(ranks)), "inference")
    return wrong


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_operation_gives_the_defined_result(layout: str) -> None:
    assert run_ranks(every_operation, len(layout), layout) == [[]] * len(layout)


def garbage_of_collectives(layout: str) -> dict[str, int]:
    everyone = form_group_on_hosts(layout)

    with cyclic_garbage() as garbage:
        for count in (0, 3, 600_001):
            tensor = torch.ones(count)
            everyone.all_reduce(tensor)
            everyone.broadcast(tensor, 1)
            everyone.all_gather(tensor)
            everyone.reduce_scatter(torch.ones(everyone.size, count))
            everyone.barrier()
            strided = torch.ones(count, 2)[:, 0]
            started = [everyone.start_all_reduce(each) for each in (tensor, strided)]
            _, gather = everyone.start_all_gather(tensor)
            for pending in (gather, *reversed(started)):
                pending.wait()
        # The leader's thread has then let go of the last collective before this one.
        everyone.barrier()
    return garbage


def test_collectives_leave_nothing_to_the_garbage_collector() -> None:
    assert run_ranks(garbage_of_collectives, 3, "aab") == [{}] * 3


def same_bits(layout: str) -> int:
    everyone = form_group_on_hosts(layout)
    generator = torch.Generator().manual_seed(everyone.rank)
    return int(digest([everyone.all_reduce(torch.randn(10_007, generator=generator))]))


def test_all_ranks_get_the_same_bits() -> None:
    assert len(set(run_ranks(same_bits, 4, "aaab"))) == 1


def start_then_talk_elsewhere() -> float:
    """A started collective continues while the leader waits for its neighbour in another group."""
    everyone = form_group_on_hosts("aab")
    other = Communicator(dist.new_group())
    tensor = torch.ones(1000)
    pending = everyone.start_all_reduce(tensor)
    if everyone.rank:
        pending.wait()
    other.barrier()
    pending.wait()
    return float(tensor.sum())


def test_started_exchange_continues_while_no_rank_waits() -> None:
    assert run_ranks(start_then_talk_elsewhere, 3) == [3000.0] * 3


def groups_of_two_shapes() -> list[float]:
    """Three hosts of two ranks; each half holds both ranks of one host and one rank of another."""
    everyone = form_group_on_hosts("aabbcc")
    halves = [dist.new_group([0, 1, 2]), dist.new_group([3, 4, 5])]
    half = Communicator(halves[everyone.rank // 3])
    found = [float(each.all_reduce(torch.ones(()))) for each in (half, everyone, half)]
    assert isinstance(half._channel, HierarchicalChannel)
    return found


def test_groups_with_different_placements_on_hosts_connect() -> None:
    assert run_ranks(groups_of_two_shapes, 6) == [[3.0, 6.0, 3.0]] * 6


def reduced(dtype: torch.dtype) -> str:
    everyone = form_group_on_hosts("aab")
    try:
        everyone.all_reduce(torch.ones(3, dtype=dtype))
    except RuntimeError as error:
        return f"{error}; {float(everyone.all_reduce(torch.ones(())))}"
    return "nothing noticed"


@pytest.mark.parametrize("name", ["int16", "bool"])
def test_dtype_that_gloo_cannot_reduce_is_refused_by_all_ranks(name: str) -> None:
    message = f"gloo, which connects the hosts, can't reduce {name}; 3.0"
    assert run_ranks(reduced, 3, getattr(torch, name)) == [message] * 3


def channel_class(layout: str) -> str:
    pretend_host(layout)
    everyone = form_group()
    everyone.barrier()
    return type(everyone._channel).__name__


def test_hosts_of_one_rank_each_use_gloo() -> None:
    assert run_ranks(channel_class, 3, "abc") == ["NoneType"] * 3


def one_cannot_share(layout: str) -> str:
    if os.environ["RANK"] == "2":
        del os.memfd_create
    return channel_class(layout)


def torch_tells_no_store(layout: str) -> str:
    del dist.distributed_c10d._get_process_group_store
    return channel_class(layout)


def test_all_ranks_use_gloo_if_torch_tells_no_store_of_a_group() -> None:
    """Only the first rank of each host needs the store; the others must not go on without it."""
    assert run_ranks(torch_tells_no_store, 3, "aab") == ["NoneType"] * 3


@pytest.mark.parametrize(("layout", "found"), [("aabb", "NoneType"), ("aab", "HierarchicalChannel")])
def test_all_ranks_use_gloo_if_a_rank_with_neighbours_cannot_share(layout: str, found: str) -> None:
    assert run_ranks(one_cannot_share, len(layout), layout) == [found] * len(layout)


# --- training --------------------------------------------------------------------------------------------------------


def train_on_hosts(layout: str, config: Any) -> int:
    pretend_host(layout)
    train(config)
    # Threads may end shortly after the run.
    patience = time.monotonic() + HANG_SECONDS
    while (left := sum(thread.name == "distrain-host-leader" for thread in threading.enumerate())) and (
        time.monotonic() < patience
    ):
        time.sleep(0.01)
    return left


STRATEGIES = [
    ("strategy=ddp",),
    ("strategy=ddp", "compression=topk"),
    ("strategy=ddp", "compression=powersgd"),
    ("strategy=local_sgd", "strategy.sync_every=3"),
    ("strategy=pipeline", "strategy.stages=2", "strategy.microbatches=2"),
]


@pytest.mark.parametrize("strategy", soaked(STRATEGIES, STRATEGIES[1:2]), ids=" ".join)
def test_strategies_train_the_same_parameters_with_and_without_shared_memory(
    strategy: tuple[str, ...], tmp_path: Path
) -> None:
    exact = ("trainer.precision=fp64", "trainer.memory_format=contiguous")
    keys = ("optimizer=sgd", "trainer.max_steps=6", *exact, *strategy)
    left = run_ranks(train_on_hosts, 4, "aabb", small(*keys, f"run_dir={tmp_path / 'hosts'}"))
    assert left == [0] * 4
    run_ranks(train, 4, small(*keys, "runtime.shared_memory=off", f"run_dir={tmp_path / 'network'}"))
    found, expected = (RunFolder.open(str(tmp_path / run)).weights("newest").tensors for run in ("hosts", "network"))
    assert relative_difference(found, expected) < 1e-9


# --- what goes wrong -------------------------------------------------------------------------------------------------


def one_is_killed(layout: str, victim: int) -> list[str]:
    everyone = form_group_on_hosts(layout)
    if everyone.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    errors = []
    # Collectives after an error fail too, and don't hang.
    for _ in range(2):
        try:
            everyone.all_reduce(torch.ones(3))
        except PeerLost as lost:
            errors.append(f"rank {lost.rank} is lost")
        except RuntimeError as error:
            errors.append("another failed" if is_broken_connection(error) else f"new: {error}")
        if everyone.rank in (0, 2):
            # The leader's main thread waits for nothing for a while; its neighbours learn of the error all the same.
            time.sleep(1)
    return errors


@pytest.mark.parametrize("victim", soaked([1, 3], [3]))
def test_killed_neighbour_is_named_on_its_host_before_the_timeout(victim: int) -> None:
    outcomes = run_ranks_to_the_end(one_is_killed, 4, "aabb", victim)
    assert isinstance(outcomes[victim], RankFailed)
    assert outcomes[victim - 1] == [f"rank {victim} is lost"] * 2
    for rank in {0, 1, 2, 3} - {victim, victim - 1}:
        assert outcomes[rank] == ["another failed"] * 2
