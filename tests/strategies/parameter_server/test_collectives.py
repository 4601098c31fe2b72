"""Collectives among living workers give the right results and don't wait for dead workers."""

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
from distrain.strategies.parameter_server.collectives import CollectiveServer, WorkerCommunicator
from distrain.strategies.parameter_server.protocol import Frame, FrameKind, ProtocolError
from tests.harness import HANG_SECONDS

CPU = torch.device("cpu")


@dataclass
class Workers:
    """Workers of one process whose requests reach the server without sockets."""

    server: CollectiveServer
    changed: threading.Condition
    communicators: list[WorkerCommunicator]
    pool: ThreadPoolExecutor

    def start(self, rank: int, task: Callable[[WorkerCommunicator], Any]) -> Future[Any]:
        """Runs a function with one worker's communicator, in a thread of its own."""
        return self.pool.submit(task, self.communicators[rank])

    def run_on_all(self, task: Callable[[WorkerCommunicator, int], Any]) -> list[Any]:
        """Runs a function with every worker's communicator at the same time and returns the results by rank."""
        futures = [self.pool.submit(task, communicator, rank) for rank, communicator in enumerate(self.communicators)]
        return [future.result(HANG_SECONDS) for future in futures]

    def wait_until_a_collective_is_pending(self) -> None:
        """Waits until a worker waits in a collective for others."""
        deadline = time.monotonic() + HANG_SECONDS
        while not self.server._collectives:
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def lose(self, rank: int) -> None:
        """Removes a worker, as if it had died."""
        with self.changed:
            self.server.remove_worker(rank)


@contextlib.contextmanager
def workers(count: int) -> Iterator[Workers]:
    changed = threading.Condition(threading.RLock())
    server = CollectiveServer(list(range(count)), changed, 1 << 20)

    def wait(done: Callable[[], bool], _: Callable[[], set[int]]) -> None:
        assert changed.wait_for(done, HANG_SECONDS)

    def send_request_of(rank: int) -> Any:
        def send_request(
            kind: FrameKind,
            meta: Mapping[str, Any],
            body: Tensor | None,
            _: FrameKind,
            expected_size: Callable[[Frame], int],
        ) -> tuple[Frame, Tensor]:
            contribution = torch.empty(0, dtype=torch.uint8) if body is None else body.clone()
            frame = Frame(kind, dict(meta), contribution.numel(), f"rank {rank}")
            answer: dict[str, Any] = {}
            result = contribution[:0]
            if kind is FrameKind.COLLECTIVE:
                collective = server.join(rank, frame, contribution, wait)
                answer, result = collective.meta, collective.body
            elif kind is FrameKind.SEND:
                server.store_message(rank, frame, contribution)
            else:
                result = server.take_message(rank, frame, wait)
            answer_frame = Frame(FrameKind.RESULT, answer, result.numel(), "the server")
            if result.numel() != expected_size(answer_frame):
                raise answer_frame.protocol_error("unexpected size")
            return answer_frame, result

        return send_request

    with ThreadPoolExecutor(count) as pool:
        yield Workers(
            server,
            changed,
            [WorkerCommunicator(send_request_of(rank), rank, list(range(count))) for rank in range(count)],
            pool,
        )


@pytest.mark.parametrize(("reduction", "expected"), [("sum", 6), ("max", 3), ("min", 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.float32])
def test_all_reduce_reduces_over_all_workers(reduction: Reduction, expected: int, dtype: torch.dtype) -> None:
    with workers(3) as group:
        results = group.run_on_all(
            lambda worker, rank: worker.all_reduce(torch.full((2, 2), rank + 1, dtype=dtype), reduction)
        )
    assert all(torch.equal(result, torch.full((2, 2), expected, dtype=dtype)) for result in results)


def test_a_scalar_is_reduced() -> None:
    with workers(2) as group:
        assert group.run_on_all(lambda worker, _: float(worker.all_reduce(torch.tensor(1.5)))) == [3.0, 3.0]


def test_broadcast_and_gather_return_every_workers_part() -> None:
    with workers(3) as group:
        assert group.run_on_all(lambda worker, rank: int(worker.broadcast(torch.tensor(rank), source=1))) == [1, 1, 1]
        gathered = group.run_on_all(lambda worker, rank: [int(each) for each in worker.all_gather(torch.tensor(rank))])
        shared = group.run_on_all(lambda worker, rank: worker.all_gather_json({"host": f"h{rank}"}, CPU))
    assert gathered == [[0, 1, 2]] * 3
    assert shared == [[{"host": "h0"}, {"host": "h1"}, {"host": "h2"}]] * 3


def test_a_message_reaches_the_worker_it_is_sent_to() -> None:
    with workers(2) as group:
        buffer = torch.zeros(3)
        received = group.start(0, lambda worker: worker.start_receive(buffer, 1, tag=7).wait())
        group.start(1, lambda worker: worker.start_send(torch.arange(3.0), 0, tag=7).wait()).result(HANG_SECONDS)
        received.result(HANG_SECONDS)
    assert buffer.tolist() == [0.0, 1.0, 2.0]


def test_a_dead_worker_is_not_waited_for() -> None:
    with workers(3) as group:
        first = group.start(0, lambda worker: float(worker.all_reduce(torch.tensor(1.0))))
        third = group.start(2, lambda worker: float(worker.all_reduce(torch.tensor(4.0))))
        assert not first.done()
        group.lose(1)
        assert [first.result(HANG_SECONDS), third.result(HANG_SECONDS)] == [5.0, 5.0]
        assert [
            (worker.rank, worker.size, worker.members) for worker in (group.communicators[0], group.communicators[2])
        ] == [
            (0, 2, [0, 2]),
            (1, 2, [0, 2]),
        ]
        # From now on world rank 2 is rank 1.
        gathered = [
            group.start(rank, lambda worker: worker.all_gather_json({"rank": worker.rank}, CPU)) for rank in (0, 2)
        ]
        assert [each.result(HANG_SECONDS) for each in gathered] == [[{"rank": 0}, {"rank": 1}]] * 2


def test_contributions_of_a_dead_worker_are_counted() -> None:
    with workers(2) as group:
        dying = group.start(1, lambda worker: worker.all_reduce(torch.tensor(2.0)))
        group.wait_until_a_collective_is_pending()
        group.lose(1)
        assert group.start(0, lambda worker: float(worker.all_reduce(torch.tensor(1.0)))).result(HANG_SECONDS) == 3.0
        with pytest.raises(ConnectionError, match="worker rank 1 is gone"):
            dying.result(HANG_SECONDS)
        with pytest.raises(ConnectionError, match="worker rank 1 is gone"):
            group.start(1, lambda worker: worker.barrier()).result(HANG_SECONDS)


def test_waiting_for_a_message_of_a_dead_worker_is_an_error() -> None:
    with workers(2) as group:
        waiting = group.start(0, lambda worker: worker.start_receive(torch.zeros(1), 1, tag=0))
        group.lose(1)
        with pytest.raises(ProtocolError, match="rank 1 is gone and has sent nothing"):
            waiting.result(HANG_SECONDS)


def test_accumulate_returns_what_all_added_since_the_last_call() -> None:
    def accumulate(amount: float, *, wait: bool = False) -> Callable[[WorkerCommunicator], float]:
        return lambda worker: float(worker.accumulate("loss", torch.tensor([amount]), wait=wait))

    with workers(2) as group:
        assert group.start(0, accumulate(1)).result(HANG_SECONDS) == 1
        assert group.start(0, accumulate(2)).result(HANG_SECONDS) == 2
        assert group.start(1, accumulate(4)).result(HANG_SECONDS) == 7
        waiting = group.start(0, accumulate(8, wait=True))
        # Worker 1 has not read 8 and 16, worker 0 has not read 4, 8 and 16.
        assert group.start(1, accumulate(16, wait=True)).result(HANG_SECONDS) == 24
        assert waiting.result(HANG_SECONDS) == 28
        assert group.start(1, accumulate(32)).result(HANG_SECONDS) == 32


def test_nan_spoils_only_one_result_of_accumulate() -> None:
    with workers(1) as group:
        assert torch.isnan(
            group.start(0, lambda worker: worker.accumulate("x", torch.tensor([float("nan")]), wait=False)).result(
                HANG_SECONDS
            )
        )
        assert (
            group.start(0, lambda worker: float(worker.accumulate("x", torch.tensor([1.0]), wait=False))).result(
                HANG_SECONDS
            )
            == 1.0
        )


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (lambda worker: worker.all_reduce(torch.zeros(3)), "12 bytes, another worker's are 8"),
        (lambda worker: worker.all_reduce(torch.zeros(1, dtype=torch.float64)), "dtype is 'float64', another worker's"),
        (lambda worker: worker.all_reduce(torch.zeros(2), "max"), "operation is 'max', another worker's 'sum'"),
    ],
)
def test_collectives_that_do_not_match_are_refused(other: Callable[[WorkerCommunicator], Any], problem: str) -> None:
    with workers(2) as group:
        first = group.start(0, lambda worker: worker.all_reduce(torch.zeros(2)))
        group.wait_until_a_collective_is_pending()
        with pytest.raises(ProtocolError, match=problem):
            group.start(1, other).result(HANG_SECONDS)
        group.lose(1)
        first.result(HANG_SECONDS)


def test_an_invalid_collective_is_refused() -> None:
    with workers(1) as group:
        for meta in (
            {"operation": "evaluate", "dtype": "float32"},
            {"operation": "sum", "dtype": "object"},
            {"operation": "sum", "dtype": "float64"},
        ):
            body = torch.zeros(4, dtype=torch.uint8)
            with pytest.raises(ProtocolError):
                group.server.join(0, Frame(FrameKind.COLLECTIVE, meta, 4, "rank 0"), body, lambda *_: None)
