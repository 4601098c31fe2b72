"""Collectives among workers that are alive: right results, and nobody waits for the dead."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from distrain.communication.types import Reduction
from distrain.strategies.parameter_server.collectives import Everyone, Meeting
from distrain.strategies.parameter_server.protocol import Frame, Kind, ProtocolError

CPU = torch.device("cpu")


@dataclass
class Workers:
    """Workers of one process that meet without sockets: what one asks, the meeting answers."""

    meeting: Meeting
    changed: threading.Condition
    everyone: list[Everyone]
    pool: ThreadPoolExecutor

    def do(self, rank: int, task: Callable[[Everyone], Any]) -> Future[Any]:
        """Lets a worker do something in a thread of its own."""
        return self.pool.submit(task, self.everyone[rank])

    def all(self, task: Callable[[Everyone, int], Any]) -> list[Any]:
        """Lets all workers do something at the same time."""
        futures = [self.do(rank, lambda one, rank=rank: task(one, rank)) for rank in range(len(self.everyone))]  # type: ignore[misc]
        return [future.result(10) for future in futures]

    def wait_until_somebody_came(self) -> None:
        """Until a collective waits for others."""
        deadline = time.monotonic() + 10
        while not self.meeting._rounds:
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def lose(self, rank: int) -> None:
        """A worker dies."""
        with self.changed:
            self.meeting.lose(rank)


@contextlib.contextmanager
def workers(count: int) -> Iterator[Workers]:
    changed = threading.Condition(threading.RLock())
    meeting = Meeting(list(range(count)), changed, 1 << 20)

    def wait(done: Callable[[], bool], _: Callable[[], set[int]]) -> None:
        assert changed.wait_for(done, 10)

    def asks(rank: int) -> Any:
        def ask(
            kind: Kind, meta: Mapping[str, Any], body: Tensor | None, _: Kind, expected: Callable[[Frame], int]
        ) -> tuple[Frame, Tensor]:
            brought = torch.empty(0, dtype=torch.uint8) if body is None else body.clone()
            frame = Frame(kind, dict(meta), brought.numel(), f"rank {rank}")
            answer: dict[str, Any] = {}
            found = brought[:0]
            if kind is Kind.COLLECTIVE:
                whole = meeting.enter(rank, frame, brought, wait)
                answer, found = whole.meta, whole.body
            elif kind is Kind.SEND:
                meeting.post(rank, frame, brought)
            else:
                found = meeting.fetch(rank, frame, wait)
            told = Frame(Kind.RESULT, answer, found.numel(), "the server")
            if found.numel() != expected(told):
                raise told.refuse("of another size")
            return told, found

        return ask

    with ThreadPoolExecutor(count) as pool:
        yield Workers(meeting, changed, [Everyone(asks(rank), rank, list(range(count))) for rank in range(count)], pool)


@pytest.mark.parametrize(("reduction", "expected"), [("sum", 6), ("max", 3), ("min", 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.float32])
def test_all_reduce(reduction: Reduction, expected: int, dtype: torch.dtype) -> None:
    with workers(3) as them:
        found = them.all(lambda one, rank: one.all_reduce(torch.full((2, 2), rank + 1, dtype=dtype), reduction))
    assert all(torch.equal(each, torch.full((2, 2), expected, dtype=dtype)) for each in found)


def test_a_scalar_is_reduced_too() -> None:
    with workers(2) as them:
        assert them.all(lambda one, _: float(one.all_reduce(torch.tensor(1.5)))) == [3.0, 3.0]


def test_broadcast_gather_and_shared_data() -> None:
    with workers(3) as them:
        assert them.all(lambda one, rank: int(one.broadcast(torch.tensor(rank), source=1))) == [1, 1, 1]
        gathered = them.all(lambda one, rank: [int(each) for each in one.all_gather(torch.tensor(rank))])
        shared = them.all(lambda one, rank: one.all_gather_json({"host": f"h{rank}"}, CPU))
    assert gathered == [[0, 1, 2]] * 3
    assert shared == [[{"host": "h0"}, {"host": "h1"}, {"host": "h2"}]] * 3


def test_a_message_goes_from_one_to_another() -> None:
    with workers(2) as them:
        room = torch.zeros(3)
        received = them.do(0, lambda one: one.start_receive(room, 1, tag=7).wait())
        them.do(1, lambda one: one.start_send(torch.arange(3.0), 0, tag=7).wait()).result(10)
        received.result(10)
    assert room.tolist() == [0.0, 1.0, 2.0]


def test_who_dies_is_not_waited_for() -> None:
    with workers(3) as them:
        first = them.do(0, lambda one: float(one.all_reduce(torch.tensor(1.0))))
        third = them.do(2, lambda one: float(one.all_reduce(torch.tensor(4.0))))
        assert not first.done()
        them.lose(1)
        assert [first.result(10), third.result(10)] == [5.0, 5.0]
        assert [(one.rank, one.size, one.members) for one in (them.everyone[0], them.everyone[2])] == [
            (0, 2, [0, 2]),
            (1, 2, [0, 2]),
        ]
        # From now on the third is the second.
        gathered = [them.do(rank, lambda one: one.all_gather_json({"rank": one.rank}, CPU)) for rank in (0, 2)]
        assert [each.result(10) for each in gathered] == [[{"rank": 0}, {"rank": 1}]] * 2


def test_what_the_dead_had_counted_counts() -> None:
    with workers(2) as them:
        dying = them.do(1, lambda one: one.all_reduce(torch.tensor(2.0)))
        them.wait_until_somebody_came()
        them.lose(1)
        assert them.do(0, lambda one: float(one.all_reduce(torch.tensor(1.0)))).result(10) == 3.0
        with pytest.raises(ConnectionError, match="worker rank 1 is gone"):
            dying.result(10)
        with pytest.raises(ConnectionError, match="worker rank 1 is gone"):
            them.do(1, lambda one: one.barrier()).result(10)


def test_a_message_that_will_not_come_is_an_error() -> None:
    with workers(2) as them:
        waiting = them.do(0, lambda one: one.start_receive(torch.zeros(1), 1, tag=0))
        them.lose(1)
        with pytest.raises(ProtocolError, match="rank 1 is gone and has sent nothing"):
            waiting.result(10)


def test_a_tally_gives_each_what_all_counted_since_it_asked() -> None:
    def tally(counted: float, *, wait: bool = False) -> Callable[[Everyone], float]:
        return lambda one: float(one.tally("loss", torch.tensor([counted]), wait=wait))

    with workers(2) as them:
        assert them.do(0, tally(1)).result(10) == 1
        assert them.do(0, tally(2)).result(10) == 2
        assert them.do(1, tally(4)).result(10) == 7
        waiting = them.do(0, tally(8, wait=True))
        # 4 and 8 for the first, 8 and 16 for the second.
        assert them.do(1, tally(16, wait=True)).result(10) == 24
        assert waiting.result(10) == 28
        assert them.do(1, tally(32)).result(10) == 32


def test_a_number_that_is_none_spoils_one_tally_only() -> None:
    with workers(1) as them:
        assert torch.isnan(them.do(0, lambda one: one.tally("x", torch.tensor([float("nan")]), wait=False)).result(10))
        assert them.do(0, lambda one: float(one.tally("x", torch.tensor([1.0]), wait=False))).result(10) == 1.0


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (lambda one: one.all_reduce(torch.zeros(3)), "12 bytes, another worker's are 8"),
        (lambda one: one.all_reduce(torch.zeros(1, dtype=torch.float64)), "dtype is 'float64', another worker's"),
        (lambda one: one.all_reduce(torch.zeros(2), "max"), "operation is 'max', another worker's 'sum'"),
    ],
)
def test_collectives_that_dont_match_are_refused(other: Callable[[Everyone], Any], problem: str) -> None:
    with workers(2) as them:
        first = them.do(0, lambda one: one.all_reduce(torch.zeros(2)))
        them.wait_until_somebody_came()
        with pytest.raises(ProtocolError, match=problem):
            them.do(1, other).result(10)
        them.lose(1)
        first.result(10)


def test_what_is_no_collective_is_refused() -> None:
    with workers(1) as them:
        for meta in (
            {"operation": "evaluate", "dtype": "float32"},
            {"operation": "sum", "dtype": "object"},
            {"operation": "sum", "dtype": "float64"},
        ):
            body = torch.zeros(4, dtype=torch.uint8)
            with pytest.raises(ProtocolError):
                them.meeting.enter(0, Frame(Kind.COLLECTIVE, meta, 4, "rank 0"), body, lambda *_: None)
