"""Sums and times of a run, measured by a clock that only the test advances."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from distrain.reporting import metrics
from distrain.reporting.metrics import (
    MetricSums,
    StepClock,
    StepDurations,
    Stopwatch,
    TimedSteps,
    TimeShares,
    peak_memory_mb,
)

CPU = torch.device("cpu")


class Clock:
    """A clock that only the test advances."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=made.perf_counter))
    return made


# --- sums ------------------------------------------------------------------------------------------------------------


def test_sums_are_exact_and_reset_when_read() -> None:
    sums = MetricSums(CPU, 1)
    sums.add(torch.tensor(0.5), torch.tensor(3), 4)
    # 2**53 - 1 is odd: a float32 sum would lose it.
    sums.add(torch.tensor(2.0**30), torch.tensor(2**53 - 4), 2**53 - 5)
    sums.add(torch.tensor(2.0**-20, dtype=torch.float64), torch.tensor(0), 0)
    read = sums.read_and_reset()
    assert read.dtype == torch.float64
    assert read.tolist() == [2.0**30 + 0.5 + 2.0**-20, 2**53 - 1, 2**53 - 1]
    assert sums.read_and_reset().tolist() == [0, 0, 0]


def test_peak_memory_is_plausible() -> None:
    assert 50 < peak_memory_mb(CPU) < 100_000


# --- shares ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wall", "step", "communication", "host_data", "host_other", "expected"),
    [
        (10.0, 6.0, 2.0, 3.0, 1.0, (4.0, 2.0, 3.0, 1.0)),
        # A GPU works on while the host fetches data: only what the device had to wait for counts.
        (10.0, 9.0, 0.0, 3.0, 1.0, (9.0, 0.0, 0.75, 0.25)),
        (10.0, 10.0, 1.0, 0.0, 0.0, (9.0, 1.0, 0.0, 0.0)),
        (10.0, 6.0, 0.0, 0.0, 0.0, (6.0, 0.0, 0.0, 4.0)),
    ],
)
def test_the_parts_add_up_to_the_whole(
    wall: float, step: float, communication: float, host_data: float, host_other: float, expected: tuple[float, ...]
) -> None:
    shares = TimeShares.from_measurement(wall, step, communication, host_data, host_other)
    assert (shares.compute, shares.communication, shares.data, shares.other) == expected
    assert shares.total == wall
    assert sum(shares.shares().values()) == pytest.approx(1)
    assert shares.shares()["compute"] == pytest.approx(expected[0] / wall)


def test_without_time_all_shares_are_zero() -> None:
    assert set(TimeShares().shares().values()) == {0}
    assert (TimedSteps().samples_per_second, TimedSteps().step_ms) == (0, 0)


def test_timed_steps_add_up() -> None:
    steps = TimedSteps(2, 20, TimeShares(1, 2, 3, 4))
    steps.add(TimedSteps(3, 40, TimeShares(1, 1, 1, 7)))
    assert steps == TimedSteps(5, 60, TimeShares(2, 3, 4, 11))
    assert steps.samples_per_second == 3
    assert steps.step_ms == 4000


# --- how long steps took ---------------------------------------------------------------------------------------------


def test_durations_of_few_steps_are_all_stored() -> None:
    durations = StepDurations()
    for seconds in range(1, 101):
        durations.add(seconds)
    assert durations.milliseconds() == {"mean": 50500, "p50": 50500, "p95": pytest.approx(95050)}


def test_durations_of_many_steps_are_an_even_sample_with_the_mean_of_all() -> None:
    durations = StepDurations(max_samples=8)
    for seconds in range(100):
        durations.add(seconds)
        assert len(durations._sample) <= 8
    assert durations._sample.tolist() == [0, 16, 32, 48, 64, 80, 96]
    assert durations.milliseconds()["mean"] == 49500


# --- the loop --------------------------------------------------------------------------------------------------------


@dataclass
class Ten:
    """A batch."""

    global_count: int = 10


@dataclass
class Loop:
    """A training loop in which each part takes a known time."""

    clock: Clock
    warmup: int = 0

    def __post_init__(self) -> None:
        self.stopwatch = Stopwatch(CPU)
        self.steps = StepClock(self.stopwatch, self.warmup)

    def batches(self, count: int, seconds: float) -> Iterator[Ten]:
        for _ in range(count):
            self.clock.passes(seconds)
            yield Ten()

    def step(self, compute: float, communication: float = 0.0) -> None:
        with self.stopwatch.step():
            self.clock.passes(compute)
            with self.stopwatch.communication():
                self.clock.passes(communication)


def test_a_lap_divides_its_time_among_its_parts(clock: Clock) -> None:
    loop = Loop(clock)
    for _ in loop.steps.steps(loop.batches(4, 1.0)):
        loop.step(5.0, 2.0)
        clock.passes(0.5)
    lap = loop.steps.lap()
    assert lap == TimedSteps(4, 40, TimeShares(20.0, 8.0, 4.0, 2.0))
    assert lap.samples_per_second == pytest.approx(40 / 34)
    assert loop.steps.step_ms() == {"mean": 8500, "p50": 8500, "p95": 8500}
    assert loop.steps.lap() == TimedSteps()


def test_warmup_steps_count_in_laps_but_not_overall(clock: Clock) -> None:
    loop = Loop(clock, warmup=2)
    for number, _ in enumerate(loop.steps.steps(loop.batches(5, 0.0))):
        loop.step(100.0 if number < 2 else 3.0)
        if number == 0:
            assert loop.steps.lap() == TimedSteps(1, 10, TimeShares(compute=100))
    loop.steps.lap()
    assert loop.steps.overall == loop.steps.epoch == TimedSteps(3, 30, TimeShares(compute=9))
    assert loop.steps.step_ms()["mean"] == 3000


def test_a_lap_that_ends_within_the_warmup_does_not_count_overall(clock: Clock) -> None:
    loop = Loop(clock, warmup=3)
    for number, _ in enumerate(loop.steps.steps(loop.batches(4, 0.0))):
        loop.step(2.0)
        # Steps are counted when the loop asks for the next: here the third has not ended.
        if number == 2:
            assert loop.steps.lap().steps == 3
    loop.steps.lap()
    assert loop.steps.overall == TimedSteps(1, 10, TimeShares(compute=2))


def test_pauses_do_not_count_as_training_time(clock: Clock) -> None:
    loop = Loop(clock)
    for number, _ in enumerate(loop.steps.steps(loop.batches(3, 1.0))):
        loop.step(2.0)
        if number == 1:
            with loop.steps.paused():
                clock.passes(1000)
    assert loop.steps.lap() == TimedSteps(3, 30, TimeShares(compute=6, data=3))
    assert loop.steps.step_ms() == {"mean": 3000, "p50": 3000, "p95": 3000}


def test_time_between_epochs_does_not_count_as_training_time(clock: Clock) -> None:
    loop = Loop(clock)
    clock.passes(50)
    for _ in range(3):
        for _ in loop.steps.steps(loop.batches(2, 0.0)):
            loop.step(2.0)
        clock.passes(7)
        assert loop.steps.lap().steps == 2
        clock.passes(1000)
    # The time between an epoch's last step and its lap counts for that epoch.
    assert loop.steps.overall == TimedSteps(6, 60, TimeShares(compute=12, other=21))
    assert loop.steps.step_ms() == {"mean": 2000, "p50": 2000, "p95": 2000}


def test_time_between_epochs_does_not_count_without_a_lap_between_them(clock: Clock) -> None:
    loop = Loop(clock)
    for number in range(2):
        clock.passes(1000 * number)
        for _ in loop.steps.steps(loop.batches(2, 0.0)):
            loop.step(2.0)
    assert loop.steps.lap() == TimedSteps(4, 40, TimeShares(compute=8))


def test_each_epoch_is_timed_separately(clock: Clock) -> None:
    loop = Loop(clock)
    for seconds in (2.0, 3.0):
        for _ in loop.steps.steps(loop.batches(2, 0.0)):
            loop.step(seconds)
        loop.steps.lap()
        assert loop.steps.epoch == TimedSteps(2, 20, TimeShares(compute=2 * seconds))
        loop.steps.epoch = TimedSteps()
    assert loop.steps.overall.time.compute == 10


def test_steps_before_an_early_exit_of_the_loop_count(clock: Clock) -> None:
    loop = Loop(clock)
    for number, _ in enumerate(loop.steps.steps(loop.batches(5, 0.0))):
        loop.step(2.0)
        if number == 2:
            break
    assert loop.steps.lap() == TimedSteps(3, 30, TimeShares(compute=6))


def test_percentiles_cover_the_steps_after_the_warmup(clock: Clock) -> None:
    loop = Loop(clock, warmup=1)
    durations = [100.0, *range(1, 22)]
    for duration, _ in zip(durations, loop.steps.steps(loop.batches(22, 0.0)), strict=True):
        loop.step(duration)
    assert loop.steps.step_ms() == pytest.approx({"mean": 11000, "p50": 11000, "p95": 20000})


def test_no_steps_take_no_time(clock: Clock) -> None:
    loop = Loop(clock)
    assert list(loop.steps.steps(iter(()))) == []
    assert loop.steps.step_ms() == {"mean": 0, "p50": 0, "p95": 0}
    assert loop.steps.lap() == TimedSteps()
