"""A compressor that costs more time than it saves is reported in the log, and training is not affected."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from distrain.communication.collectives import Communicator
from distrain.compression.autotune.advice import Advisor, needs_advice, verdict
from distrain.compression.autotune.link_model import LinkModel, LinkSample
from distrain.compression.base import Compressor
from distrain.compression.none import NoCompression
from distrain.compression.observer import ExchangeObserver
from distrain.config.groups import CompressionConfig
from distrain.gradients.buckets import Gradients
from distrain.reporting.metrics import Stopwatch
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from tests.compression.autotune.sleeping import QuickCompressor, SlowCompressor
from tests.harness import run_ranks
from tests.runs import small

CPU = torch.device("cpu")


@pytest.mark.parametrize(("takes", "slower"), [(0.0240, False), (0.0247, False), (0.0248, True), (0.031, True)])
def test_more_than_three_per_cent_slower_is_too_slow(takes: float, slower: bool) -> None:
    link = LinkModel({"all_reduce": [LinkSample(1000, 0.0002, 0.0), LinkSample(10_000_000, 0.0102, 0.0)]})
    is_slower, line = verdict("topk", takes, 0.024, 0.0, link)
    assert is_slower is slower
    assert (
        f"a step with compression=topk takes {1000 * takes:.1f} ms; without compression it would take about 24.0 ms"
        in line
    )
    assert "(0.2 ms, 8.0 Gbit/s)" in line
    assert ("compression=none or compression=auto is faster" in line) is slower
    # A difference within the uncertainty is no reason for the warning.
    is_slower, line = verdict("topk", takes, 0.024, 0.01, link)
    assert not is_slower
    assert line.endswith("; step times vary too much to tell which is faster") is slower


def test_advice_is_for_unobserved_compressors_among_several_ranks() -> None:
    alone, two = Communicator(), Communicator()
    two.size = 2
    assert needs_advice(SlowCompressor(CompressionConfig(name="slow")), two)
    assert not needs_advice(SlowCompressor(CompressionConfig(name="slow")), alone)
    assert not needs_advice(NoCompression(CompressionConfig(name="none")), two)
    observed = SlowCompressor(CompressionConfig(name="slow"))
    observed.observer = ExchangeObserver()
    assert not needs_advice(observed, two)


def _train_on_rank(make: Callable[[CompressionConfig], Compressor], steps: int) -> dict[str, Any]:
    """Exchanges the gradients of backward passes of ten milliseconds."""
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
        observed, sums = [], []
        for step in range(steps):
            compressor.begin_step()
            observed.append(isinstance(compressor.observer, Advisor))
            gradients.zero()
            gradients.begin_last_backward()
            time.sleep(0.01)
            for bucket in gradients.buckets:
                bucket.flat.fill_(step + everyone.rank)
            gradients.finish()
            sums.append([float(bucket.flat.mean()) for bucket in gradients.buckets])
    return {"lines": lines, "observed": observed, "sums": sums}


@pytest.mark.parametrize(
    ("make", "level"), [(SlowCompressor, "WARNING"), (QuickCompressor, "INFO")], ids=["slow", "quick"]
)
def test_a_compressor_that_makes_steps_slower_is_reported_once(
    make: Callable[[CompressionConfig], Compressor], level: str
) -> None:
    everyone = run_ranks(_train_on_rank, 2, make, 40)
    for result in everyone:
        ((logged_level, line),) = [each for each in result["lines"] if "compression=picked" in each[1]]
        if make is SlowCompressor:
            # Three buckets sleep longer than the backward pass lasts; on a busy machine the other level is not certain.
            assert logged_level == level
            assert "compression=none or compression=auto is faster" in line
        # The advisor observes some of the first steps and does not change the gradients.
        assert (result["observed"][0], result["observed"][-1]) == (True, False)
        assert result["observed"] == sorted(result["observed"], reverse=True)
        assert result["sums"] == [[2 * step + 1] * 3 for step in range(40)]
