"""A probe runs its phases in order and detaches itself after the last one."""

from __future__ import annotations

import torch
from typing_extensions import override

from distrain.communication.collectives import Communicator
from distrain.compression.autotune.step_probe import HELD, ORDINARY, Phase, StepProbe, slowest
from distrain.compression.autotune.step_trace import StepTrace
from distrain.compression.bucket import Bucket
from distrain.compression.none import NoCompression
from distrain.config.groups import CompressionConfig
from distrain.gradients.exchange import BucketExchanger
from distrain.reporting.metrics import Stopwatch


class AlternatingProbe(StepProbe):
    """Warms up in two steps; after the held steps it alternates two labels, of which one is held."""

    def __init__(self) -> None:
        super().__init__(NoCompression(CompressionConfig(name="none")), ordinary_steps=2, held_steps=1)
        self.evaluated: list[list[str]] = []
        self.prepared: list[str] = []

    @override
    def is_warm(self) -> bool:
        return len(self.traces) >= 2

    @override
    def evaluate(self, ordinary: list[StepTrace], held: list[StepTrace]) -> Phase | None:
        self.evaluated += [[trace.label for trace in traces] for traces in (ordinary, held)]
        return Phase(["a", "b"] * 2, self._end, held_label="b", prepare=self.prepared.append)

    def _end(self, traces: list[StepTrace]) -> None:
        self.evaluated.append([trace.label for trace in traces])


def test_phases_follow_each_other_and_the_probe_detaches_itself() -> None:
    probe = AlternatingProbe()
    compressor = probe.compressor
    compressor.observer = probe
    exchanger = BucketExchanger(compressor, Communicator(), Stopwatch(torch.device("cpu")))
    held = []
    for _ in range(11):
        compressor.begin_step()
        held.append(probe.holds_exchanges)
        exchanger.begin_last_backward()
        exchanger.start(Bucket(torch.zeros(1), {}))
        exchanger.finish()
    assert held == [False, False, False, False, True, False, True, False, True, False, False]
    assert probe.evaluated == [[ORDINARY, ORDINARY], [HELD], ["a", "b", "a", "b"]]
    assert probe.prepared == ["a", "b", "a", "b"]
    assert compressor.observer is None


def test_each_step_counts_on_its_slowest_rank() -> None:
    assert slowest([{"spans": [1, 5]}, {"spans": [2, 3]}], "spans") == [2, 5]
