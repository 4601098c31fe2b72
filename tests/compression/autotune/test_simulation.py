"""Simulated steps agree with timelines worked out by hand."""

from __future__ import annotations

import pytest

from distrain.compression.autotune.compressor_cost import BucketCost, CompressorCost
from distrain.compression.autotune.link_model import LinkModel, LinkSample
from distrain.compression.autotune.simulation import ComputeTimes, predict_step, simulate_step
from distrain.compression.autotune.step_trace import SegmentTrace, StepTrace


def link(latency: float = 0.0, a_byte: float = 0.0, stolen: float = 0.0) -> LinkModel:
    """Both kinds of collective take ``latency`` and ``a_byte`` a byte; ``stolen`` is the share that computing loses."""
    line = [LinkSample(sent, latency + a_byte * sent, stolen * (latency + a_byte * sent)) for sent in (0, 1000)]
    return LinkModel({"all_reduce": line, "all_gather": line})


def cost(*buckets: tuple[list[float], list[int]]) -> CompressorCost:
    """Buckets by seconds of each section and bytes of the one collective that each section but the last starts."""
    return CompressorCost(
        [BucketCost(sections, [[("all_reduce", size)] for size in sent]) for sections, sent in buckets]
    )


def test_an_exchange_without_overlap_adds_its_whole_time() -> None:
    # 1 before, 2 backward, 0.5 compressing, 4 on the link, 0.25 decompressing, 3 the rest.
    found = simulate_step([ComputeTimes([[1, 2, 0]], 3)], [cost(([0.5, 0.25], [4]))], link(a_byte=1))
    assert found == pytest.approx(1 + 2 + 0.5 + 4 + 0.25 + 3)


def test_the_backward_pass_hides_exchanges_under_way() -> None:
    two = cost(([0, 0], [4]), ([0, 0], [1]))
    assert simulate_step([ComputeTimes([[0, 1, 10, 0]], 0)], [two], link(a_byte=1)) == pytest.approx(11 + 1)


def test_the_link_carries_one_message_after_the_other() -> None:
    # The second bucket is ready at 2, but the link is free only at 1 + 4.
    two = cost(([0, 0], [4]), ([0, 0], [3]))
    assert simulate_step([ComputeTimes([[0, 1, 1, 0]], 0)], [two], link(a_byte=1)) == pytest.approx(1 + 4 + 3)
    assert simulate_step([ComputeTimes([[0, 1, 1, 0]], 0)], [two], link(latency=0.5, a_byte=1)) == pytest.approx(9)


def test_compressing_delays_the_backward_pass_and_what_follows() -> None:
    two = cost(([2, 1], [1]), ([2, 1], [1]))
    # Ready at 1, sent at 3 until 4; ready at 4, sent at 6 until 7; meanwhile the first is decompressed.
    assert simulate_step([ComputeTimes([[0, 1, 1, 0]], 0)], [two], link(a_byte=1)) == pytest.approx(7 + 1)


def test_a_second_phase_begins_with_the_next_bucket() -> None:
    both = cost(([0, 1, 0], [4, 4]), ([0, 1, 0], [4, 4]))
    # Bucket 1 leaves at 1 and is waited for until 5, when bucket 2 is ready; a second to 6 for its second phase, which
    # is on the link until 10, behind it bucket 2 until 14; a second to 15; its second phase until 19.
    assert simulate_step([ComputeTimes([[0, 1, 1, 0]], 0)], [both], link(a_byte=1)) == pytest.approx(19)


def test_collectives_start_with_the_last_rank() -> None:
    compute = [ComputeTimes([[0, 1, 1, 0]], 2), ComputeTimes([[0, 5, 1, 0]], 1)]
    one = cost(([0, 0], [3]), ([0, 0], [1]))
    assert simulate_step(compute, [one, one], link(a_byte=1)) == pytest.approx(5 + 3 + 1 + 2)
    # The rank that compresses longest decides as well.
    slow = cost(([4, 0], [3]), ([0, 0], [1]))
    assert simulate_step(compute, [slow, one], link(a_byte=1)) == pytest.approx(5 + 3 + 1 + 2)
    assert simulate_step(compute, [one, slow], link(a_byte=1)) == pytest.approx(9 + 3 + 1 + 2)


def test_processor_time_of_a_transfer_delays_concurrent_computation() -> None:
    two = cost(([0, 0], [4]), ([0, 0], [2]))
    spare = ComputeTimes([[0, 1, 10, 0]], 0)
    assert simulate_step([spare], [two], link(a_byte=1, stolen=0.5)) == pytest.approx(1 + 2 + 10 + 2)
    # Nothing runs meanwhile, so nothing is lost.
    assert simulate_step([ComputeTimes([[0, 1, 0, 0]], 0)], [two], link(a_byte=1, stolen=0.5)) == pytest.approx(
        1 + 4 + 2
    )


def test_sets_of_buckets_follow_each_other() -> None:
    compute = [ComputeTimes([[1, 1, 0], [1, 0, 0]], 1)]
    assert simulate_step(compute, [cost(([0, 0], [5]), ([0, 0], [5]))], link(a_byte=1)) == pytest.approx(2 + 5 + 6 + 1)


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
    assert predict_step([first, second], [one, one], link(a_byte=1)) == pytest.approx(5 + 2 + 1)
