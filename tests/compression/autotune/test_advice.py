"""Predictions agree with timelines worked out by hand, and a compressor that costs more than it saves is named."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from distrain.communication.collectives import Communicator, ring_all_reduce_bytes
from distrain.communication.types import Pending
from distrain.compression.autotune.advice import Advisor, uncompressed, verdict, wanted
from distrain.compression.autotune.link_model import Link, Point, measure_link
from distrain.compression.autotune.simulation import (
    Backdrop,
    BucketCost,
    Cost,
    Loopback,
    measure_cost,
    predicted,
    step_seconds,
)
from distrain.compression.autotune.step_trace import Observer, Segment, Step
from distrain.compression.base import Compressor
from distrain.compression.bucket import Bucket
from distrain.compression.none import NoCompression
from distrain.config.schema import CompressionConfig
from distrain.gradients.buckets import Gradients
from distrain.reporting.metrics import Stopwatch
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from tests.harness import run_ranks
from tests.runs import small

CPU = torch.device("cpu")


def link(latency: float = 0.0, a_byte: float = 0.0, stolen: float = 0.0) -> Link:
    """Both kinds of collective take ``latency`` and ``a_byte`` a byte; ``stolen`` is the share that computing loses."""
    line = [Point(sent, latency + a_byte * sent, stolen * (latency + a_byte * sent)) for sent in (0, 1000)]
    return Link({"all_reduce": line, "all_gather": line})


def cost(*buckets: tuple[list[float], list[int]]) -> Cost:
    """Buckets by seconds of each section and bytes of the one collective that each section but the last starts."""
    return Cost([BucketCost(sections, [[("all_reduce", size)] for size in sent]) for sections, sent in buckets])


# --- the link --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "expected"), [(0, 1.0), (100, 1.0), (200, 2.0), (300, 3.0), (400, 5.0), (500, 7.0), (1300, 23.0)]
)
def test_a_message_takes_what_those_around_its_size_took(sent: int, expected: float) -> None:
    points = [Point(100, 1.0, 0.1), Point(300, 3.0, 0.3), Point(500, 7.0, 0.7)]
    measured = Link({"all_reduce": points, "all_gather": [Point(100, 4.0, 0.0)]})
    assert measured.seconds("all_reduce", sent) == pytest.approx(expected)
    assert measured.stolen("all_reduce", sent) == pytest.approx(expected / 10)
    assert measured.seconds("all_gather", sent) == 4.0


def test_more_bytes_are_never_predicted_to_be_faster() -> None:
    noisy = Link({"all_reduce": [Point(100, 3.0, 0.0), Point(200, 2.0, 0.0)]})
    assert noisy.seconds("all_reduce", 1000) == 3.0


@pytest.mark.parametrize(
    ("seconds", "told"), [(2.0002, "0.2 ms, 100 Mbit/s"), (0.0202, "0.2 ms, 10.0 Gbit/s")], ids=["slow", "fast"]
)
def test_a_link_is_told_by_latency_and_bandwidth(seconds: float, told: str) -> None:
    assert str(Link({"all_reduce": [Point(1000, 0.0002, 0.0), Point(25_000_000, seconds, 0.0)]})) == told


def _measure_link_on_rank() -> dict[str, Any]:
    with Runtime(small("strategy=ddp"), World.from_environment(), keep_logs=False) as runtime:
        everyone = runtime.communicator()
        measured = measure_link(everyone, CPU, 300_000)
        return {
            "large": measured.seconds("all_reduce", 300_000),
            "gather": measured.seconds("all_gather", 100_000),
            "told": str(measured),
            "sent": everyone.ledger.total(),
        }


def test_all_ranks_see_the_same_link() -> None:
    everyone = run_ranks(_measure_link_on_rank, 3)
    assert everyone[0] == everyone[1] == everyone[2]
    assert 0 < everyone[0]["large"] < 5
    # Measuring costs a few of the largest messages at most.
    assert 0 < everyone[0]["sent"] < 30 * 300_000


# --- the timeline ----------------------------------------------------------------------------------------------------


def test_one_bucket_is_waited_for() -> None:
    # 1 before, 2 backward, 0.5 compressing, 4 on the link, 0.25 decompressing, 3 the rest.
    found = step_seconds([Backdrop([[1, 2, 0]], 3)], [cost(([0.5, 0.25], [4]))], link(a_byte=1))
    assert found == pytest.approx(1 + 2 + 0.5 + 4 + 0.25 + 3)


def test_the_backward_pass_hides_what_is_under_way() -> None:
    two = cost(([0, 0], [4]), ([0, 0], [1]))
    assert step_seconds([Backdrop([[0, 1, 10, 0]], 0)], [two], link(a_byte=1)) == pytest.approx(11 + 1)


def test_the_link_carries_one_message_after_the_other() -> None:
    # The second bucket is ready at 2, but the link is free only at 1 + 4.
    two = cost(([0, 0], [4]), ([0, 0], [3]))
    assert step_seconds([Backdrop([[0, 1, 1, 0]], 0)], [two], link(a_byte=1)) == pytest.approx(1 + 4 + 3)
    assert step_seconds([Backdrop([[0, 1, 1, 0]], 0)], [two], link(latency=0.5, a_byte=1)) == pytest.approx(9)


def test_compressing_delays_the_backward_pass_and_what_follows() -> None:
    two = cost(([2, 1], [1]), ([2, 1], [1]))
    # Ready at 1, sent at 3 until 4; ready at 4, sent at 6 until 7; meanwhile the first is decompressed.
    assert step_seconds([Backdrop([[0, 1, 1, 0]], 0)], [two], link(a_byte=1)) == pytest.approx(7 + 1)


def test_a_second_phase_begins_with_the_next_bucket() -> None:
    both = cost(([0, 1, 0], [4, 4]), ([0, 1, 0], [4, 4]))
    # Bucket 1 leaves at 1 and is waited for until 5, when bucket 2 is ready; a second to 6 for its second phase, which
    # is on the link until 10, behind it bucket 2 until 14; a second to 15; its second phase until 19.
    assert step_seconds([Backdrop([[0, 1, 1, 0]], 0)], [both], link(a_byte=1)) == pytest.approx(19)


def test_collectives_start_with_the_last_rank() -> None:
    backdrops = [Backdrop([[0, 1, 1, 0]], 2), Backdrop([[0, 5, 1, 0]], 1)]
    one = cost(([0, 0], [3]), ([0, 0], [1]))
    assert step_seconds(backdrops, [one, one], link(a_byte=1)) == pytest.approx(5 + 3 + 1 + 2)
    # The rank that compresses longest decides as well.
    slow = cost(([4, 0], [3]), ([0, 0], [1]))
    assert step_seconds(backdrops, [slow, one], link(a_byte=1)) == pytest.approx(5 + 3 + 1 + 2)
    assert step_seconds(backdrops, [one, slow], link(a_byte=1)) == pytest.approx(9 + 3 + 1 + 2)


def test_what_the_transfer_takes_from_the_processors_delays_what_runs_meanwhile() -> None:
    two = cost(([0, 0], [4]), ([0, 0], [2]))
    spare = Backdrop([[0, 1, 10, 0]], 0)
    assert step_seconds([spare], [two], link(a_byte=1, stolen=0.5)) == pytest.approx(1 + 2 + 10 + 2)
    # Nothing runs meanwhile, so nothing is lost.
    assert step_seconds([Backdrop([[0, 1, 0, 0]], 0)], [two], link(a_byte=1, stolen=0.5)) == pytest.approx(1 + 4 + 2)


def test_sets_of_buckets_come_one_after_the_other() -> None:
    backdrops = [Backdrop([[1, 1, 0], [1, 0, 0]], 1)]
    assert step_seconds(backdrops, [cost(([0, 0], [5]), ([0, 0], [5]))], link(a_byte=1)) == pytest.approx(2 + 5 + 6 + 1)


def test_a_backdrop_is_a_step_less_its_exchanges() -> None:
    step = Step(0, [Segment(armed=2, ready=[3, 7], closed=8, done=20)], left=22)
    assert Backdrop.of(step) == Backdrop([[2, 1, 4, 1]], 2)


def test_the_prediction_is_the_median_of_steps_in_each_of_which_another_rank_may_be_slow() -> None:
    first = [Backdrop([[0, wait, 0]], 1) for wait in (1, 5, 1)]
    second = [Backdrop([[0, wait, 0]], 1) for wait in (4, 1, 9)]
    one = cost(([0, 0], [2]))
    assert predicted([first, second], [one, one], link(a_byte=1)) == pytest.approx(5 + 2 + 1)


def test_without_compression_each_bucket_is_reduced_once() -> None:
    found = uncompressed([1000, 400], ranks=4)
    assert found.sent == ring_all_reduce_bytes(1000, 4) + ring_all_reduce_bytes(400, 4)
    assert found.seconds == 0
    assert step_seconds([Backdrop([[0, 0, 0, 0]], 0)], [found], link(a_byte=1)) == pytest.approx(found.sent)


# --- a compressor's own work -----------------------------------------------------------------------------------------


class Slow(Compressor):
    """Reduces every bucket twice and sleeps before, between and after."""

    sleeps = (0.009, 0.006, 0.003)
    phases = 2

    def compresses(self, parameter: nn.Parameter) -> bool:
        return True

    def aggregate(self, bucket: Bucket, communicator: Communicator) -> Iterator[Pending]:
        time.sleep(self.sleeps[0])
        mean = bucket.flat / 2
        yield communicator.start_all_reduce(mean)
        time.sleep(self.sleeps[1])
        again = bucket.flat / 2
        yield communicator.start_all_reduce(again)
        time.sleep(self.sleeps[2])
        bucket.flat.copy_(mean).add_(again)


class Quick(Slow):
    """The same without sleeping."""

    sleeps = (0.0, 0.0, 0.0)


def slow() -> Slow:
    return Slow(CompressionConfig(name="slow"))


def test_each_section_of_a_compressor_s_work_is_timed_and_its_bytes_are_counted() -> None:
    like = Communicator()
    like.size, like.rank = 4, 3
    flat = torch.arange(6.0)
    measured = measure_cost(slow(), [Bucket(flat, {"a": flat[:2], "b": flat[2:]})] * 2, like)
    assert len(measured.buckets) == 2
    for bucket in measured.buckets:
        assert all(0.8 * b <= a < b + 0.05 for a, b in zip(bucket.sections, Slow.sleeps, strict=True))
        assert bucket.sent == [[("all_reduce", ring_all_reduce_bytes(24, 4))]] * 2
    assert measured.sent == 4 * ring_all_reduce_bytes(24, 4)
    assert 0.03 < measured.seconds < 0.3
    assert flat.tolist() == [0, 1, 2, 3, 4, 5]
    assert like.ledger.total() == 0
    assert Cost.from_plain(measured.to_plain()) == measured


def test_a_group_of_one_answers_as_a_group_of_many_would() -> None:
    like = Communicator()
    like.size, like.rank = 3, 1
    loopback = Loopback(like)
    gathered = loopback.all_gather(torch.tensor([7, 8], dtype=torch.uint8))
    assert [each.tolist() for each in gathered] == [[7, 8]] * 3
    assert loopback.all_reduce(torch.tensor([1.0])).tolist() == [1.0]
    assert loopback.started == [("all_gather", 4), ("all_reduce", ring_all_reduce_bytes(4, 3))]
    assert (loopback.rank, loopback.size) == (1, 3)


# --- advice ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("takes", "slower"), [(0.0240, False), (0.0247, False), (0.0248, True), (0.031, True)])
def test_more_than_three_per_cent_slower_is_too_slow(takes: float, slower: bool) -> None:
    carrier = Link({"all_reduce": [Point(1000, 0.0002, 0.0), Point(10_000_000, 0.0102, 0.0)]})
    found, line = verdict("topk", takes, 0.024, 0.0, carrier)
    assert found is slower
    assert f"compression=topk makes a step {1000 * takes:.1f} ms; without it would be about 24.0 ms" in line
    assert "(0.2 ms, 8.0 Gbit/s)" in line
    assert ("compression=none or compression=auto is faster" in line) is slower
    # Nor is it said where it may be noise.
    found, line = verdict("topk", takes, 0.024, 0.01, carrier)
    assert not found
    assert line.endswith("; steps vary too much to tell") is slower


def test_advice_is_for_compressors_that_nobody_watches_among_several_ranks() -> None:
    alone, two = Communicator(), Communicator()
    two.size = 2
    assert wanted(slow(), two)
    assert not wanted(slow(), alone)
    assert not wanted(NoCompression(CompressionConfig(name="none")), two)
    watched = slow()
    watched.observer = Observer()
    assert not wanted(watched, two)


def _train_on_rank(make: Callable[[CompressionConfig], Compressor], steps: int) -> dict[str, Any]:
    """Exchanges gradients of ten milliseconds of backward pass; a set that takes long to reduce is none's slowness."""
    lines: list[tuple[str, str]] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append((record.levelname, record.getMessage()))

    logging.getLogger("distrain").addHandler(Keep())
    with Runtime(small("strategy=ddp"), World.from_environment(), keep_logs=False) as runtime:
        everyone = runtime.communicator()
        compressor = make(CompressionConfig(name="picked"))
        parameters = [(name, nn.Parameter(torch.zeros(1000))) for name in "abc"]
        gradients = Gradients(parameters, everyone, compressor, Stopwatch(CPU), 0.001, 0.001)
        watched, sums = [], []
        for step in range(steps):
            compressor.begin_step()
            watched.append(isinstance(compressor.observer, Advisor))
            gradients.zero()
            gradients.begin_last_backward()
            time.sleep(0.01)
            for bucket in gradients.buckets:
                bucket.flat.fill_(step + everyone.rank)
            gradients.finish()
            sums.append([float(bucket.flat.mean()) for bucket in gradients.buckets])
    return {"lines": lines, "watched": watched, "sums": sums}


@pytest.mark.parametrize(("make", "level"), [(Slow, "WARNING"), (Quick, "INFO")], ids=["slow", "quick"])
def test_a_compressor_that_makes_steps_slower_is_named_once(
    make: Callable[[CompressionConfig], Compressor], level: str
) -> None:
    everyone = run_ranks(_train_on_rank, 2, make, 40)
    for found in everyone:
        ((said, line),) = [each for each in found["lines"] if "compression=picked" in each[1]]
        if make is Slow:
            # Three buckets sleep longer than the backward pass lasts; on a busy machine nothing is sure of the other.
            assert said == level
            assert "compression=none or compression=auto is faster" in line
        # It watches for some of the first steps, and gradients are what they are.
        assert (found["watched"][0], found["watched"][-1]) == (True, False)
        assert found["watched"] == sorted(found["watched"], reverse=True)
        assert found["sums"] == [[2 * step + 1] * 3 for step in range(40)]
