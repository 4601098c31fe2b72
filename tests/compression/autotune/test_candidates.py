"""Which candidates are tried, in which order, and which one is chosen."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from distrain.compression.autotune import candidates
from distrain.compression.autotune.candidates import CandidateTable, choose, trial_order
from distrain.compression.autotune.link_model import LinkModel, LinkSample

LINK = LinkModel({"all_reduce": [LinkSample(1000, 0.0002, 0.0), LinkSample(10_000_000, 0.8, 0.0)]})


def table(predicted: Mapping[str, float], **measured: float) -> CandidateTable:
    """A table with these seconds per step, from the least to the most lossy candidate."""
    zeros = dict.fromkeys(predicted, 0)
    return CandidateTable(LINK, 0.0, zeros, dict.fromkeys(predicted, 0.0), dict(predicted), measured)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"none": 1.0, "bf16": 0.5, "topk": 0.3}, "topk"),
        ({"none": 1.0, "bf16": 0.305, "topk": 0.3}, "bf16"),
        ({"none": 1.0, "bf16": 0.307, "topk": 0.3}, "topk"),
        ({"none": 1.0, "bf16": 1.2, "topk": 1.1}, "none"),
        ({"none": 1.01, "bf16": 1.0}, "none"),
    ],
    ids=["the fastest", "about as fast", "slower", "nothing pays", "hardly pays"],
)
def test_the_least_lossy_of_about_equally_fast_candidates_is_chosen(seconds: dict[str, float], expected: str) -> None:
    assert choose(seconds, {}) == expected


def test_a_more_lossy_candidate_is_not_chosen_within_the_uncertainty() -> None:
    seconds = {"none": 1.0, "bf16": 0.9, "topk": 0.5}
    assert choose(seconds, {"none": 0.3, "bf16": 0.1, "topk": 0.1}) == "topk"
    assert choose(seconds, {"none": 0.3, "bf16": 0.4, "topk": 0.1}) == "bf16"
    assert choose(seconds, {"none": 0.4, "bf16": 0.4, "topk": 0.3}) == "none"


@pytest.mark.parametrize(
    ("predicted", "measured", "expected"),
    [
        ({"none": 9, "a": 1.0, "b": 1.2, "c": 1.3}, {}, ["a", "b"]),
        ({"none": 1.4, "a": 1.0, "b": 1.2, "c": 1.3}, {}, ["none", "a", "b"]),
        ({"none": 9, "a": 1.0, "b": 1.2}, {"none": 1.4}, ["none", "a", "b"]),
        ({"none": 1, "a": 2.0, "b": 3.0}, {}, ["none"]),
        ({"none": 9, "a": 1.0}, {}, ["a"]),
        ({"none": 9, "a": 1.2, "b": 1.1, "c": 1.05, "d": 1.0, "e": 1.15}, {}, ["b", "c", "d", "e"]),
    ],
    ids=["the likeliest", "none if it may be", "none by experience", "none alone", "one alone", "not too many"],
)
def test_candidates_that_may_be_the_fastest_are_tried(
    predicted: dict[str, float], measured: dict[str, float], expected: list[str]
) -> None:
    assert table(predicted, **measured).shortlist() == expected


def test_candidates_take_turns_in_a_rotating_order() -> None:
    order = trial_order(["a", "b", "c"], round_seconds=1.0, trial_seconds=6.9)
    assert "".join(order) == "abcbcacab" * 2 + "abc"
    assert len(trial_order(["a", "b"], round_seconds=1.0, trial_seconds=0.001)) == 2 * (candidates.MIN_ROUNDS + 1)
    assert len(trial_order(["a", "b"], round_seconds=0.001, trial_seconds=100.0)) == 2 * (candidates.MAX_ROUNDS + 1)


def test_the_first_round_of_a_trial_does_not_count() -> None:
    candidate_table = table({"none": 1.0, "a": 1.0})
    candidate_table.after_exchange = 0.5
    candidate_table.add_trial(list("abbaab"), [9, 9, 2, 1, 3, 4])
    assert candidate_table.measured == {"a": 2.5, "b": 3.5}
    assert candidate_table.errors["a"] > 0
    assert (candidate_table.expected("a"), candidate_table.expected("none")) == (2.5, 1.0)


def test_the_table_is_plain_data_and_readable() -> None:
    candidate_table = table({"none": 3.65, "topk": 0.0411}, topk=0.0423)
    candidate_table.sent, candidate_table.work = {"none": 42_600_000, "topk": 1_065_000}, {"none": 0.0, "topk": 0.0211}
    assert candidate_table.to_text().splitlines() == [
        "candidate         MB sent  compress ms  predicted ms  measured ms",
        "none               42.600          0.0        3650.0            -",
        "topk                1.065         21.1          41.1         42.3",
    ]
    plain = candidate_table.to_plain()
    assert plain["link"] == {"latency_ms": 0.2, "bytes_per_second": 12_503_126}
    columns = ("candidate", "bytes_sent", "compress_ms", "predicted_ms", "measured_ms")
    assert [tuple(row[column] for column in columns) for row in plain["candidates"]] == [
        ("none", 42_600_000, 0.0, 3650.0, None),
        ("topk", 1_065_000, 21.1, 41.1, 42.3),
    ]
