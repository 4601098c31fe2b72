"""Through shared memory every collective gives the defined result, bit for bit, on every rank."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distrain.communication.collectives import Communicator
from distrain.communication.shared_memory.control_block import ENTRIES
from distrain.communication.types import DTYPES, Reduction
from distrain.errors import PeerLost
from distrain.health.failure_report import is_broken_connection
from tests.communication.shared_memory.ranks import form_group, shares_memory, store_of_test
from tests.garbage import cyclic_garbage
from tests.harness import RankFailed, run_ranks, run_ranks_to_the_end, soaked

OPEN = Path("/proc/self/fd")
#: No element, less than a word, an odd number, and several parts of which the last is shorter.
COUNTS = (0, 1, 3, 1000, 1_000_003)
ADD: dict[Reduction, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
}


def drawn(rank: int, dtype: torch.dtype, count: int) -> Tensor:
    """A rank's tensor; every rank can compute it."""
    generator = torch.Generator().manual_seed(1000 * rank + count)
    numbers = torch.randn(count, generator=generator) * 50
    return numbers > 0 if dtype == torch.bool else numbers.to(dtype)


def same_bits(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first.view(torch.uint8), second.view(torch.uint8))


def every_operation(everyone: Communicator) -> list[str]:
    """The results that differ from the definition."""
    wrong: list[str] = []

    def check(found: Tensor, expected: Tensor, *what: object) -> None:
        if not same_bits(found, expected):
            wrong.append(" ".join(map(str, what)))

    ranks, rank = everyone.size, everyone.rank
    for dtype in DTYPES.values():
        for count in COUNTS if dtype in (torch.float32, torch.bfloat16) else COUNTS[:-1]:
            all_of_them = [drawn(each, dtype, count) for each in range(ranks)]
            mine = all_of_them[rank]
            for reduction, add in ADD.items():
                expected = reduce(add, all_of_them)
                check(everyone.all_reduce(mine.clone(), reduction), expected, reduction, dtype, count)
                started = mine.clone()
                everyone.start_all_reduce(started, reduction).wait()
                check(started, expected, "started", reduction, dtype, count)
                rows = torch.stack([drawn(rank + 10 * part, dtype, count) for part in range(ranks)])
                own = reduce(add, [drawn(each + 10 * rank, dtype, count) for each in range(ranks)])
                check(everyone.reduce_scatter(rows, reduction)[0], own, "scattered", reduction, dtype, count)
            for source in range(ranks):
                check(everyone.broadcast(mine.clone(), source), all_of_them[source], "broadcast", dtype, count)
            gathered = [everyone.all_gather(mine)]
            begun, pending = everyone.start_all_gather(mine)
            pending.wait()
            for found in [*gathered, begun]:
                for each, expected in zip(found, all_of_them, strict=True):
                    check(each, expected, "gather", dtype, count)
    return wrong


def any_layout(everyone: Communicator) -> bool:
    """Elements are matched by index, not by their place in memory."""
    images = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    mine = images.contiguous(memory_format=torch.channels_last) if everyone.rank else images.clone()
    whole = everyone.all_reduce(mine.clone())
    started = torch.stack([mine] * 2, -1)[..., 1]
    everyone.start_all_reduce(started).wait()
    sent = everyone.broadcast(mine + everyone.rank, 1)
    expected = images * everyone.size
    return bool(
        torch.equal(whole, expected)
        and torch.equal(started, expected)
        and torch.equal(sent, images + 1)
        and all(torch.equal(each, images) for each in everyone.all_gather(mine))
        and float(everyone.all_reduce(torch.tensor(2.0))) == 2 * everyone.size
        and everyone.all_reduce(torch.nn.Parameter(torch.ones(2, 2))).tolist() == [[everyone.size] * 2] * 2
    )


def in_inference_mode(everyone: Communicator) -> bool:
    """Evaluation runs collectives in inference mode, and training uses the same memory outside of it."""
    with torch.inference_mode():
        first = everyone.all_reduce(torch.ones(77)).tolist()
    return first == everyone.all_reduce(torch.ones(77)).tolist() == [everyone.size] * 77


def many_at_once(everyone: Communicator) -> bool:
    """Many collectives of small and large tensors, waited for in another order than started."""
    generator = torch.Generator().manual_seed(5)
    sizes = [*torch.randint(1, 60_000, (100,), generator=generator).tolist(), 400_000, 400_000]
    tensors = [torch.full((size,), float(everyone.rank + index)) for index, size in enumerate(sizes)]
    pending = [everyone.start_all_reduce(tensor) for tensor in tensors]
    for each in [*pending[::-2], *pending]:
        each.wait()
    ranks = everyone.size
    return all(bool((tensor == ranks * index + ranks * (ranks - 1) / 2).all()) for index, tensor in enumerate(tensors))


def reuse_entries(everyone: Communicator) -> tuple[bool, int, int]:
    """More collectives than a control block has entries; returns the number of open descriptors before and after."""
    before = len(list(OPEN.iterdir()))
    right = True
    for step in range(2 * ENTRIES):
        found = everyone.all_reduce(torch.full((1 + step % 3000,), float(step + everyone.rank)))
        right &= float(found[-1]) == everyone.size * step + sum(range(everyone.size))
    # More than there are entries: the oldest are finished to free theirs.
    pending = [everyone.start_all_reduce(torch.ones(1)) for _ in range(ENTRIES + 10)]
    for each in pending:
        each.wait()
    return right, before, len(list(OPEN.iterdir()))


def on_each_rank() -> dict[str, Any]:
    everyone = form_group()
    assert shares_memory(everyone)
    return {
        "wrong": every_operation(everyone),
        "layout": any_layout(everyone),
        "inference": in_inference_mode(everyone),
        "many": many_at_once(everyone),
        "round": reuse_entries(everyone),
    }


@pytest.fixture(scope="module", params=soaked([2, 3, 4], [2, 3]))
def found(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_ranks(on_each_rank, request.param)


def test_every_operation_has_the_bits_of_a_reduction_in_order_of_rank(found: list[dict[str, Any]]) -> None:
    assert [each["wrong"] for each in found] == [[]] * len(found)


def test_tensors_may_have_any_layout(found: list[dict[str, Any]]) -> None:
    assert all(each["layout"] for each in found)


def test_inference_mode_and_training_use_the_same_memory(found: list[dict[str, Any]]) -> None:
    assert all(each["inference"] for each in found)


def test_many_collectives_may_be_pending(found: list[dict[str, Any]]) -> None:
    assert all(each["many"] for each in found)


def test_memory_is_reused_and_no_descriptor_is_left(found: list[dict[str, Any]]) -> None:
    for each in found:
        right, before, after = each["round"]
        assert right
        # Ranks that have finished close their connections.
        assert after <= before


# --- a rank that runs ahead ------------------------------------------------------------------------------------------


def start_then_talk_elsewhere() -> float:
    """Starts many collectives before the other rank, which first waits for a barrier of another group."""
    everyone = form_group()
    other = Communicator(dist.new_group())
    assert shares_memory(everyone)
    tensors = [torch.ones(1_000_000) for _ in range(12)]
    if everyone.rank == 0:
        pending = [everyone.start_all_reduce(tensor) for tensor in tensors]
        other.barrier()
    else:
        other.barrier()
        pending = [everyone.start_all_reduce(tensor) for tensor in tensors]
    for each in pending:
        each.wait()
    return float(sum(tensor.sum() for tensor in tensors))


def test_starting_never_waits_for_a_peer() -> None:
    assert run_ranks(start_then_talk_elsewhere, 2) == [24e6, 24e6]


# --- what goes wrong -------------------------------------------------------------------------------------------------


def make_a_mistake(mistake: str) -> str:
    everyone = form_group()
    assert shares_memory(everyone)
    odd = everyone.rank == 1
    try:
        if mistake == "size":
            everyone.all_reduce(torch.ones(4 if odd else 3))
        elif mistake == "part":
            everyone.reduce_scatter(torch.ones(4 if odd else 2), "max")
        elif mistake == "dtype":
            everyone.all_gather(torch.ones(2, dtype=torch.int32 if odd else torch.float32))
        elif odd:
            everyone.barrier()
        else:
            everyone.broadcast(torch.ones(3), 1)
    except RuntimeError as error:
        # It must not look like the consequence of another rank's failure.
        return f"broken: {error}" if is_broken_connection(error) else str(error)
    return "nothing noticed"


@pytest.mark.parametrize(
    ("mistake", "mine", "other"),
    [
        ("size", "all_reduce (sum) of 3 float32", "all_reduce (sum) of 4 float32"),
        ("part", "reduce_scatter (max) of 2 float32", "reduce_scatter (max) of 4 float32"),
        ("dtype", "all_gather of 2 float32", "all_gather of 2 int32"),
        ("kind", "broadcast from rank 1 of the group of 3 float32", "barrier"),
    ],
)
def test_ranks_in_different_collectives_are_named(mistake: str, mine: str, other: str) -> None:
    host = os.uname().nodename
    message = run_ranks(make_a_mistake, 2, mistake)[0]
    assert message == (
        f"ranks of one group are in different collectives: rank 0 on {host} in {mine}, rank 1 on {host} in {other}"
    )


def named_memory() -> list[str]:
    """Shared mappings of this rank that have a name in the file system, and so would outlive it."""
    mapped = [
        line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines() if " rw-s " in line
    ]
    assert any(path.startswith("/memfd:distrain") for path in mapped)
    # The kernel marks mappings without a name as deleted.
    return [path for path in mapped if not path.rstrip().endswith("(deleted)")]


def one_is_killed(victim: int, started: bool) -> str:
    everyone = form_group()
    assert shares_memory(everyone)
    if everyone.rank == victim:
        if started:
            everyone.start_all_reduce(torch.ones(100_000))
        os.kill(os.getpid(), signal.SIGKILL)
    if started:
        # What it announced before its death is used; the next collective fails.
        assert everyone.all_reduce(torch.ones(100_000))[7] == everyone.size
    try:
        everyone.all_reduce(torch.ones(300_000))
    except PeerLost as lost:
        # Not the error of the group's timeout.
        return f"{lost.rank}, {named_memory()}"
    return "nothing noticed"


@pytest.mark.parametrize(("victim", "started"), [(0, False), (2, True)])
def test_killed_rank_is_named_and_leaves_no_memory(victim: int, started: bool) -> None:
    outcomes = run_ranks_to_the_end(one_is_killed, 3, victim, started)
    assert isinstance(outcomes.pop(victim), RankFailed)
    assert outcomes == [f"{victim}, []"] * 2


def one_never_comes() -> str:
    everyone = form_group(limit=3)
    assert shares_memory(everyone)
    store = store_of_test()
    if everyone.rank == 1:
        store.wait(["given up"])
        return "late"
    try:
        everyone.all_reduce(torch.ones(3))
    except dist.DistError as error:
        return str(error) if is_broken_connection(error) else f"not seen as such: {error}"
    finally:
        store.set("given up", "")
    return "nothing noticed"


def test_missing_rank_is_named_at_the_timeout_of_the_group() -> None:
    message, _ = run_ranks(one_never_comes, 2)
    assert message.endswith("did not join a collective of ranks that share memory within 3 s")
    assert message.startswith("rank 1 on ")


def asked_to_end() -> str:
    everyone = form_group()
    assert shares_memory(everyone)

    def end(*_: object) -> None:
        raise InterruptedError("as Ctrl-C")

    signal.signal(signal.SIGALRM, end)
    store = store_of_test()
    if everyone.rank == 0:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            everyone.barrier()
        except InterruptedError as error:
            store.set("ended", "")
            return str(error)
    store.wait(["ended"])
    return "never in the barrier"


def test_signal_is_handled_while_a_rank_waits() -> None:
    assert run_ranks(asked_to_end, 2) == ["as Ctrl-C", "never in the barrier"]


def garbage_of_collectives() -> dict[str, int]:
    everyone = form_group()
    assert shares_memory(everyone)

    with cyclic_garbage() as garbage:
        # The longest is sent in parts, or reduced together by three ranks.
        for count in (0, 3, 1_000_003):
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
    return garbage


@pytest.mark.parametrize("ranks", soaked([2, 3], [3]))
def test_collectives_leave_nothing_to_the_garbage_collector(ranks: int) -> None:
    # A tensor in a reference cycle would live on, and be freed in whichever thread the collector happens to run.
    assert run_ranks(garbage_of_collectives, ranks) == [{}] * ranks
