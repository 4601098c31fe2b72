"""A link's times are interpolated between measured sizes, and all ranks measure the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distrain.compression.autotune.link_model import LinkModel, LinkSample, measure_link
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from tests.harness import run_ranks
from tests.runs import small

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("sent", "expected"), [(0, 1.0), (100, 1.0), (200, 2.0), (300, 3.0), (400, 5.0), (500, 7.0), (1300, 23.0)]
)
def test_times_are_interpolated_between_measured_sizes(sent: int, expected: float) -> None:
    points = [LinkSample(100, 1.0, 0.1), LinkSample(300, 3.0, 0.3), LinkSample(500, 7.0, 0.7)]
    measured = LinkModel({"all_reduce": points, "all_gather": [LinkSample(100, 4.0, 0.0)]})
    assert measured.seconds("all_reduce", sent) == pytest.approx(expected)
    assert measured.processor_seconds("all_reduce", sent) == pytest.approx(expected / 10)
    assert measured.seconds("all_gather", sent) == 4.0


def test_more_bytes_are_never_predicted_to_be_faster() -> None:
    noisy = LinkModel({"all_reduce": [LinkSample(100, 3.0, 0.0), LinkSample(200, 2.0, 0.0)]})
    assert noisy.seconds("all_reduce", 1000) == 3.0


@pytest.mark.parametrize(
    ("seconds", "description"), [(2.0002, "0.2 ms, 100 Mbit/s"), (0.0202, "0.2 ms, 10.0 Gbit/s")], ids=["slow", "fast"]
)
def test_a_link_is_described_by_latency_and_bandwidth(seconds: float, description: str) -> None:
    assert (
        str(LinkModel({"all_reduce": [LinkSample(1000, 0.0002, 0.0), LinkSample(25_000_000, seconds, 0.0)]}))
        == description
    )


def _measure_link_on_rank() -> dict[str, Any]:
    with Runtime(small("strategy=ddp"), World.from_environment(), keep_logs=False) as runtime:
        everyone = runtime.communicator()
        measured = measure_link(everyone, CPU, 300_000)
        return {
            "large": measured.seconds("all_reduce", 300_000),
            "gather": measured.seconds("all_gather", 100_000),
            "description": str(measured),
            "sent": everyone.ledger.total(),
        }


def test_all_ranks_measure_the_same_link() -> None:
    everyone = run_ranks(_measure_link_on_rank, 3)
    assert everyone[0] == everyone[1] == everyone[2]
    assert 0 < everyone[0]["large"] < 5
    # Measuring costs a few of the largest messages at most.
    assert 0 < everyone[0]["sent"] < 30 * 300_000
