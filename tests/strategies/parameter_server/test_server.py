"""A server applies pushes as its mode says, refuses invalid frames, and ends with the right error."""

from __future__ import annotations

import functools
import threading
import time

import pytest
import torch

from distrain.errors import PeerLost
from distrain.strategies.parameter_server.protocol import FrameKind
from tests.harness import HANG_SECONDS
from tests.strategies.parameter_server.helpers import PUSH_HEADER, common_value, running_server, server_policy


def test_a_push_is_applied_at_once_and_answered_with_the_newest_parameters() -> None:
    with running_server(2, server_policy()) as run:
        run.push(0, 0.25)
        assert common_value(run.models[0]) == common_value(run.model) == 0.75
        assert common_value(run.models[1]) == 1.0
        run.push(1, 0.5, learning_rate=0.5)
        assert common_value(run.models[1]) == 0.5
        assert [dict(worker.staleness) for worker in run.server.workers.values()] == [{0: 1}, {1: 1}]
        run.clients[0].pull()
        run.clients[0].take_parameters()
        assert common_value(run.models[0]) == 0.5


def test_a_push_is_applied_as_its_samples_mean_with_their_part_of_the_rate() -> None:
    # The mean of the worker's own samples is 1; they are a quarter of the batch.
    with running_server(
        1, server_policy(), optimizer=functools.partial(torch.optim.SGD, momentum=0.5, weight_decay=1.0)
    ) as run:
        run.push(0, 0.25, learning_rate=0.5, share=0.25)
        buffers, _ = run.clients[0].fetch_optimizer_state()
        # A mean gradient of 1, and a weight decay of 1 for weights of 1.
        assert bool((buffers["weight/momentum_buffer"] == 2.0).all())
        assert common_value(run.model) == 1.0 - 0.5 * 0.25 * 2.0


def test_a_push_without_samples_is_a_step_but_not_an_update() -> None:
    with running_server(1, server_policy()) as run:
        run.push(0, 0.25, samples=0)
        run.push(0, 0.25, samples=0, share=0.0)
        assert (common_value(run.model), run.server.version, run.server.workers[0].steps) == (1.0, 0, 2)


def test_in_sync_mode_the_sum_of_all_shares_is_applied_once() -> None:
    with running_server(3, server_policy(mode="sync")) as run:
        workers = [threading.Thread(target=run.push, args=(rank, 0.25)) for rank in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(HANG_SECONDS)
        assert [common_value(model) for model in run.models] == [0.25] * 3
        assert run.server.version == 1


def test_a_worker_is_never_further_ahead_than_the_bound() -> None:
    bound = 2
    started: list[list[int]] = []
    steps = [0, 0]

    def work(rank: int, pause: float) -> None:
        for _ in range(12):
            started.append([steps[rank], steps[1 - rank]])
            time.sleep(pause)
            run.push(rank, 0.0)
            steps[rank] += 1

    with running_server(2, server_policy(mode="ssp", staleness=bound)) as run:
        threads = [threading.Thread(target=work, args=(0, 0.0)), threading.Thread(target=work, args=(1, 0.02))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANG_SECONDS)
        assert run.server.workers[0].max_lead == bound
        # The other worker increments its count only after its push, so the count may be one too low.
        assert max(own - other for own, other in started) <= bound + 1


def test_a_dead_worker_does_not_block_others() -> None:
    with running_server(2, server_policy(mode="ssp", staleness=0)) as run:
        fast = threading.Thread(target=run.push, args=(0, 0.0))
        fast.start()
        fast.join(0.3)
        assert fast.is_alive()
        run.clients[1].abandon(ValueError("broken"))
        fast.join(HANG_SECONDS)
        assert not fast.is_alive()
        assert [(worker.peer.rank, worker.steps, worker.loss_reason) for worker in run.lost] == [
            (1, 0, "ValueError: broken")
        ]
        assert [record["rank"] for record in run.clients[0].lost_workers.values()] == [1]


def test_an_incomplete_push_changes_nothing() -> None:
    with running_server(2, server_policy()) as run:
        run.clients[1]._send(FrameKind.PUSH, PUSH_HEADER, None)
        run.clients[1]._thread.submit(lambda: None).result(HANG_SECONDS)
        run.clients[1].abandon(RuntimeError("killed"))
        run.push(0, 0.25)
        assert (common_value(run.model), run.server.version) == (0.75, 1)


def test_in_sync_mode_a_dead_worker_ends_the_run_for_all_with_its_name() -> None:
    with running_server(2, server_policy(mode="sync")) as run:
        run.clients[1].abandon(ValueError("broken"))
        with pytest.raises(PeerLost, match="rank 1 on here is gone: ValueError: broken"):
            run.push(0, 0.0)
        run.join()
    (error,) = run.errors
    assert isinstance(error, PeerLost)
    assert (error.rank, error.host, error.reason) == (1, "here", "ValueError: broken")


def test_the_run_ends_when_rank_0_is_lost() -> None:
    with running_server(2, server_policy()) as run:
        run.clients[0].abandon(ValueError("broken"))
        run.join()
        with pytest.raises(PeerLost, match="rank 0"):
            run.push(1, 0.0)


def test_a_worker_that_exceeds_the_timeout_is_named() -> None:
    with running_server(2, server_policy(mode="sync", timeout_seconds=0.3)) as run:
        with pytest.raises(PeerLost):
            run.push(0, 0.0)
        run.join()
    assert [str(error) for error in run.errors] == ["waited longer than 0.3 s for rank 1 on here"]


def test_a_server_ends_when_all_workers_have_left() -> None:
    with running_server(2, server_policy()) as run:
        for client in run.clients:
            client.leave()
        run.join()
        assert run.errors == []


def test_a_fatal_failure_of_a_worker_ends_the_run() -> None:
    with running_server(2, server_policy()) as run:
        run.clients[1].abandon(ValueError("broken"), fatal=True)
        run.join()
    (error,) = run.errors
    assert isinstance(error, PeerLost)
    assert (error.rank, error.reason) == (1, "ValueError: broken")


def test_a_nonfinite_gradient_is_refused_with_the_workers_name() -> None:
    with running_server(2, server_policy()) as run:
        with pytest.raises(PeerLost):
            run.push(1, float("nan"))
        run.join()
        assert common_value(run.model) == 1.0
    (error,) = run.errors
    assert isinstance(error, PeerLost)
    assert (error.rank, error.reason) == (1, "NonFinite: its gradient in step 1 is not finite")
