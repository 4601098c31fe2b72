"""Simulated steps agree with timelines worked out by hand."""

from __future__ import annotations

import pytest

from distrain.compression.autotune.compressor_cost import BucketCost, CompressorCost
from distrain.compression.autotune.link_model import LinkModel, LinkSample
from distrain.compression.autotune.simulation import ComputeTimes, predict_step, simulate_step
from distrain.compression.autotune.step_trace import SegmentTrace, StepTrace


def link(latency: float = 0.0, per_byte: float = 0.0, stolen: float = 0.0) -> LinkModel:
    """Both kinds of collective take ``latency`` plus ``per_byte`` per byte, ``stolen`` of it processor time."""
    line = [LinkSample(sent, latency + per_byte * sent, stolen * (latency + per_byte * sent)) for sent in (0, 1000)]
    return LinkModel({"all_reduce": line, "all_gather": line})


def cost(*buckets: tuple[list[float], list[int]]) -> CompressorCost:
    """Buckets, each with seconds of work and bytes of the one all-reduce after each section of work but the last."""
    return CompressorCost(
        [BucketCost(sections, [[("all_reduce", size)] for size in sent]) for sections, sent in buckets]
    )


def test_an_exchange_without_overlap_adds_its_whole_time() -> None:
    # 1 before, 2 backward, 0.5 compressing, 4 on the link, 0.25 decompressing, 3 the rest.
    seconds = simulate_step([ComputeTimes([[1, 2, 0]], 3)], [cost(([0.5, 0.25], [4]))], link(per_byte=1))
    assert seconds == pytest.approx(1 + 2 + 0.5 + 4 + 0.25 + 3)


def test_the_backward_pass_hides_exchanges_under_way() -> None:
    two = cost(([0, 0], [4]), ([0, 0], [1]))
    assert simulate_step([ComputeTimes([[0, 1, 10, 0]], 0)], [two], link(per_byte=1)) == pytest.approx(11 + 1)


def test_the_link_carries_one_message_after_the_other() -> None:
    # The second bucket is ready at 2, but the link is free only at 1 + 4.
    two = cost(([0, 0], [4]), ([0, 0], [3]))
    assert simulate_step([ComputeTimes([[0, 1, 1, 0]], 0)], [two], link(per_byte=1)) == pytest.approx(1 + 4 + 3)
    assert simulate_step([ComputeTimes([[0, 1, 1, 0]], 0)], [two], link(latency=0.5, per_byte=1)) == pytest.approx(9)


def test_compressing_delays_the_backward_pass_and_what_follows() -> None:
    two = cost(([2, 1], [1]), ([2, 1], [1]))
    # The first bucket is ready at 1 and compressed until 3, its transfer lasts until 4. The second is ready at 4 and
    # compressed until 6, its transfer lasts until 7; the first is decompressed meanwhile.
    assert simulate_step([ComputeTimes([[0, 1, 1, 0]], 0)], [two], link(per_byte=1)) == pytest.approx(7 + 1)


def test_a_second_phase_begins_with_the_next_bucket() -> None:
    both = cost(([0, 1, 0], [4, 4]), ([0, 1, 0], [4, 4]))
    # Bucket 1 is sent from 1 to 5. Then bucket 2 is ready, and the work before the second phase of bucket 1 lasts until
    # 6. The link carries that phase until 10 and the first phase of bucket 2 until 14. The work before the second phase
    # of bucket 2 lasts until 15, its transfer until 19.
    assert simulate_step([ComputeTimes([[0, 1, 1, 0]], 0)], [both], link(per_byte=1)) == pytest.approx(19)


def test_collectives_start_with_the_last_rank() -> None:
    compute = [ComputeTimes([[0, 1, 1, 0]], 2), ComputeTimes([[0, 5, 1, 0]], 1)]
    one = cost(([0, 0], [3]), ([0, 0], [1]))
    assert simulate_step(compute, [one, one], link(per_byte=1)) == pytest.approx(5 + 3 + 1 + 2)
    # The rank that compresses longest delays the collective as well.
    slow = cost(([4, 0], [3]), ([0, 0], [1]))
    assert simulate_step(compute, [slow, one], link(per_byte=1)) == pytest.approx(5 + 3 + 1 + 2)
    assert simulate_step(compute, [one, slow], link(per_byte=1)) == pytest.approx(9 + 3 + 1 + 2)


def test_processor_time_of_a_transfer_delays_concurrent_computation() -> None:
    two = cost(([0, 0], [4]), ([0, 0], [2]))
    spare = ComputeTimes([[0, 1, 10, 0]], 0)
    assert simulate_step([spare], [two], link(per_byte=1, stolen=0.5)) == pytest.approx(1 + 2 + 10 + 2)
    # Nothing is computed meanwhile, so nothing is delayed.
    assert simulate_step([ComputeTimes([[0, 1, 0, 0]], 0)], [two], link(per_byte=1, stolen=0.5)) == pytest.approx(
        1 + 4 + 2
    )


def test_sets_of_buckets_follow_each_other() -> None:
    compute = [ComputeTimes([[1, 1, 0], [1, 0, 0]], 1)]
    assert simulate_step(compute, [cost(([0, 0], [5]), ([0, 0], [5]))], link(per_byte=1)) == pytest.approx(
        2 + 5 + 6 + 1
    )


def test_compute_times_are_a_step_without_its_exchanges() -> None:
    step = StepTrace(
        0,
        segments=[SegmentTrace(last_backward_began=2, buckets_ready=[3, 7], backward_ended=8, exchanges_ended=20)],
        ended=22,
    )
    assert ComputeTimes.of(step) == ComputeTimes([[2, 1, 4, 1]], 2)


def test_a_prediction_is_the_median_over_steps_with_different_slowest_ranks() -> None:
    first = [ComputeTimes([[0, wait, 0]], 1) for wait in (1, 5, 1)]
    second = [ComputeTimes([[0, wait, 0]], 1) for wait in (4, 1, 9)]
    one = cost(([0, 0], [2]))
    assert predict_step([first, second], [one, one], link(per_byte=1)) == pytest.approx(5 + 2 + 1)
