"""A server with workers in threads: what it applies, whom it waits for, what it refuses, and how it ends."""

from __future__ import annotations

import functools
import json
import threading
import time

import pytest
import torch

from distrain.errors import PeerLost
from distrain.strategies.parameter_server import protocol
from distrain.strategies.parameter_server.client import Expelled
from distrain.strategies.parameter_server.protocol import Kind, ProtocolError
from tests.strategies.parameter_server.helpers import layer, rules, running

HEAD = {"step": 1, "rate": 1.0, "share": 1.0, "count": 1, "version": 0, "wish": 0}


def weight(model: torch.nn.Linear) -> float:
    """The number that all parameters are equal to."""
    values = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert bool((values == values[0]).all())
    return float(values[0])


def test_a_push_is_applied_at_once_and_answered_with_the_newest_parameters() -> None:
    with running(2, rules()) as run:
        run.push(0, 0.25)
        assert weight(run.models[0]) == weight(run.model) == 0.75
        assert weight(run.models[1]) == 1.0
        run.push(1, 0.5, rate=0.5)
        assert weight(run.models[1]) == 0.5
        assert [dict(worker.staleness) for worker in run.server.workers.values()] == [{0: 1}, {1: 1}]
        run.links[0].pull()
        run.links[0].take()
        assert weight(run.models[0]) == 0.5


def test_a_push_is_the_mean_of_its_samples_with_their_part_of_the_rate() -> None:
    # The gradient's part of the batch's mean is a quarter of the mean of its own samples.
    with running(1, rules(), optimizer=functools.partial(torch.optim.SGD, momentum=0.5, weight_decay=1.0)) as run:
        run.push(0, 0.25, rate=0.5, share=0.25)
        buffers, _ = run.links[0].fetch_optimizer()
        # Mean 1, and 1 for the decay of weights of 1.
        assert bool((buffers["weight/momentum_buffer"] == 2.0).all())
        assert weight(run.model) == 1.0 - 0.5 * 0.25 * 2.0


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, float("nan")])
def test_a_share_that_is_no_part_of_a_batch_is_refused(share: float) -> None:
    with running(1, rules()) as run:
        with pytest.raises(PeerLost):
            run.push(0, 0.25, share=share)
        run.join()
    (error,) = run.ended
    assert "no part of a batch" in str(error)


def test_a_push_without_samples_is_a_step_but_no_update() -> None:
    with running(1, rules()) as run:
        run.push(0, 0.25, count=0)
        run.push(0, 0.25, count=0, share=0.0)
        assert (weight(run.model), run.server.version, run.server.workers[0].steps) == (1.0, 0, 2)


def test_in_sync_mode_the_sum_of_all_shares_is_applied_once() -> None:
    with running(3, rules(mode="sync")) as run:
        workers = [threading.Thread(target=run.push, args=(rank, 0.25)) for rank in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(10)
        assert [weight(model) for model in run.models] == [0.25] * 3
        assert run.server.version == 1


def test_a_worker_never_gets_further_ahead_than_the_bound() -> None:
    bound = 2
    started: list[list[int]] = []
    steps = [0, 0]

    def work(rank: int, pause: float) -> None:
        for _ in range(12):
            started.append([steps[rank], steps[1 - rank]])
            time.sleep(pause)
            run.push(rank, 0.0)
            steps[rank] += 1

    with running(2, rules(mode="ssp", staleness=bound)) as run:
        threads = [threading.Thread(target=work, args=(0, 0.0)), threading.Thread(target=work, args=(1, 0.02))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert run.server.workers[0].lead == bound
        # The other's own count may be one behind, between its push and its noting so.
        assert max(own - other for own, other in started) <= bound + 1


def test_a_dead_worker_holds_up_nobody() -> None:
    with running(2, rules(mode="ssp", staleness=0)) as run:
        fast = threading.Thread(target=run.push, args=(0, 0.0))
        fast.start()
        fast.join(0.3)
        assert fast.is_alive()
        run.links[1].abandon(ValueError("broken"))
        fast.join(10)
        assert not fast.is_alive()
        assert [(worker.peer.rank, worker.steps, worker.lost) for worker in run.lost] == [(1, 0, "ValueError: broken")]
        assert [told["rank"] for told in run.links[0].lost.values()] == [1]


def test_half_a_push_changes_nothing() -> None:
    with running(2, rules()) as run:
        run.links[1]._send(Kind.PUSH, HEAD, None)
        run.links[1]._thread.submit(lambda: None).result(10)
        run.links[1].abandon(RuntimeError("killed"))
        run.push(0, 0.25)
        assert (weight(run.model), run.server.version) == (0.75, 1)


def test_in_sync_mode_a_dead_worker_ends_the_run_for_all_with_its_name() -> None:
    with running(2, rules(mode="sync")) as run:
        run.links[1].abandon(ValueError("broken"))
        with pytest.raises(PeerLost, match="rank 1 on here is gone: ValueError: broken"):
            run.push(0, 0.0)
        run.join()
    (error,) = run.ended
    assert isinstance(error, PeerLost)
    assert (error.rank, error.host, error.reason) == (1, "here", "ValueError: broken")


def test_without_rank_0_nobody_goes_on() -> None:
    with running(2, rules()) as run:
        run.links[0].abandon(ValueError("broken"))
        run.join()
        with pytest.raises(PeerLost, match="rank 0"):
            run.push(1, 0.0)


def test_who_lost_another_server_says_so() -> None:
    with running(2, rules()) as run:
        # That may have been its own connection.
        run.links[1].abandon(PeerLost(7, "elsewhere", "silent"))
        run.push(0, 0.0)
        assert run.lost[0].lost == "it lost rank 7 on elsewhere: silent"
        run.links[0].abandon(PeerLost(7, "elsewhere", "silent"))
        run.join()
    (error,) = run.ended
    assert isinstance(error, PeerLost)
    assert (error.rank, error.host) == (7, "elsewhere")


def test_a_worker_that_was_given_up_is_told() -> None:
    with running(2, rules(silence_seconds=0.5)) as run:
        # Its thread stops, as if the process did.
        run.links[1]._pulse._connection.send = lambda *_: None  # type: ignore[method-assign]
        while not run.lost:
            time.sleep(0.05)
        assert run.lost[0].lost == "no sign of life for 0.5 s"
        with pytest.raises(Expelled, match=r"the server, rank 2 on here, gave this worker up: no sign of life"):
            run.push(1, 0.0)
        run.push(0, 0.25)


def test_a_worker_that_keeps_others_waiting_is_named() -> None:
    with running(2, rules(mode="sync", timeout_seconds=0.3)) as run:
        with pytest.raises(PeerLost):
            run.push(0, 0.0)
        run.join()
    assert [str(error) for error in run.ended] == ["waited longer than 0.3 s for rank 1 on here"]


@pytest.mark.parametrize(
    ("index", "size", "problem"),
    [
        (0, 31, "31 bytes, 32 were expected"),
        (0, 1 << 40, f"{1 << 40} bytes, 32 were expected"),
        (1, 32, "is not number 0 of 1"),
    ],
)
def test_a_push_of_another_size_or_place_is_refused(index: int, size: int, problem: str) -> None:
    with running(1, rules()) as run:
        link = run.links[0]
        link._send(Kind.PUSH, HEAD, None)
        link._thread.submit(lambda: None).result(10)
        meta = json.dumps({"index": index}).encode()
        head = protocol._HEADER.pack(b"dst1", Kind.BUCKET, len(meta), size)
        link._connections["work"].socket.sendall(head + meta)
        run.join()
    (error,) = run.ended
    assert isinstance(error, ProtocolError)
    assert problem in str(error)


def test_the_optimizer_s_state_goes_there_and_comes_back() -> None:
    with running(1, rules(), optimizer=torch.optim.Adam) as run:
        run.push(0, 0.5)
        tensors, scalars = run.links[0].fetch_optimizer()
        assert set(tensors) == {
            f"{name}/{what}" for name in ("weight", "bias") for what in ("step", "exp_avg", "exp_avg_sq")
        }
        assert tensors["weight/exp_avg"].shape == (2, 3)
        doubled = {key: 2 * tensor for key, tensor in tensors.items()}
        run.models[0].load_state_dict({name: 5 * tensor for name, tensor in layer().state_dict().items()})
        run.links[0].load(doubled, scalars)
        again, _ = run.links[0].fetch_optimizer()
        assert all(torch.equal(again[key], doubled[key]) for key in doubled)
        assert weight(run.model) == 5.0


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ([["other/step", "float32", []]], r"other/step \[\] is of none of the parameters here"),
        ([["weight/step", "float32", [10**9]]], "is of none of the parameters here"),
        ([["weight/step", "object", []]], "is no name, dtype and shape"),
        ([["weight/step", "float32"]], "is no name, dtype and shape"),
        ("nothing", "names no tensors"),
        ([[f"weight/{index}", "float64", [2, 3]] for index in range(100)], "far more than an optimizer keeps"),
        ([["weight/exp_avg", "float32", [2, 3]]], "0 bytes, 24 were expected"),
    ],
)
def test_state_that_fits_no_parameter_is_refused(entries: object, problem: str) -> None:
    with running(1, rules()) as run:
        connection = run.links[0]._connections["talk"]
        connection.send(Kind.LOAD, None, run.links[0]._room.pack())
        connection.send(Kind.STATE, {"tensors": entries, "scalars": {}})
        run.join()
    (error,) = run.ended
    assert isinstance(error, ProtocolError)
    with pytest.raises(ProtocolError, match=problem):
        raise error


def test_a_server_ends_when_all_workers_are_done() -> None:
    with running(2, rules()) as run:
        for link in run.links:
            link.leave()
        run.join()
        assert run.ended == []


def test_who_must_not_be_done_without_ends_the_run() -> None:
    with running(2, rules()) as run:
        run.links[1].abandon(ValueError("broken"), fatal=True)
        run.join()
    (error,) = run.ended
    assert isinstance(error, PeerLost)
    assert (error.rank, error.reason) == (1, "ValueError: broken")


def test_a_gradient_that_is_not_finite_is_refused_with_the_worker_s_name() -> None:
    with running(2, rules()) as run:
        with pytest.raises(PeerLost):
            run.push(1, float("nan"))
        run.join()
        assert weight(run.model) == 1.0
    (error,) = run.ended
    assert isinstance(error, PeerLost)
    assert (error.rank, error.reason) == (1, "NonFinite: its gradient in step 1 is not finite")
