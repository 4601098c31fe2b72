"""Where the time of a run went, to the tick of a clock that only the test moves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from distrain.reporting import metrics
from distrain.reporting.metrics import Durations, StepClock, Stopwatch, Stretch, TimeShares, Totals, peak_memory_mb

CPU = torch.device("cpu")


class Clock:
    """Seconds that pass only when told to."""

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


def test_totals_are_exact_and_start_anew() -> None:
    totals = Totals(CPU, 1)
    totals.add(torch.tensor(0.5), torch.tensor(3), 4)
    # 2**53 - 1 is odd: a float32 sum would lose it.
    totals.add(torch.tensor(2.0**30), torch.tensor(2**53 - 4), 2**53 - 5)
    totals.add(torch.tensor(2.0**-20, dtype=torch.float64), torch.tensor(0), 0)
    taken = totals.take()
    assert taken.dtype == torch.float64
    assert taken.tolist() == [2.0**30 + 0.5 + 2.0**-20, 2**53 - 1, 2**53 - 1]
    assert totals.take().tolist() == [0, 0, 0]


def test_memory_is_this_process_s() -> None:
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
    shares = TimeShares.of(wall, step, communication, host_data, host_other)
    assert (shares.compute, shares.communication, shares.data, shares.other) == expected
    assert shares.total == wall
    assert sum(shares.shares().values()) == pytest.approx(1)
    assert shares.shares()["compute"] == pytest.approx(expected[0] / wall)


def test_no_time_has_no_shares() -> None:
    assert set(TimeShares().shares().values()) == {0}
    assert (Stretch().samples_per_second, Stretch().step_ms) == (0, 0)


def test_stretches_add_up() -> None:
    stretch = Stretch(2, 20, TimeShares(1, 2, 3, 4))
    stretch.add(Stretch(3, 40, TimeShares(1, 1, 1, 7)))
    assert stretch == Stretch(5, 60, TimeShares(2, 3, 4, 11))
    assert stretch.samples_per_second == 3
    assert stretch.step_ms == 4000


# --- how long steps took ---------------------------------------------------------------------------------------------


def test_few_steps_are_all_kept() -> None:
    durations = Durations()
    for seconds in range(1, 101):
        durations.add(seconds)
    assert durations.milliseconds() == {"mean": 50500, "p50": 50500, "p95": pytest.approx(95050)}


def test_of_many_steps_an_even_sample_is_kept_and_the_mean_is_of_all() -> None:
    durations = Durations(most=8)
    for seconds in range(100):
        durations.add(seconds)
        assert len(durations._kept) <= 8
    assert durations._kept.tolist() == [0, 16, 32, 48, 64, 80, 96]
    assert durations.milliseconds()["mean"] == 49500


# --- the loop --------------------------------------------------------------------------------------------------------


@dataclass
class Ten:
    """A batch."""

    global_count: int = 10


@dataclass
class Loop:
    """A loop over batches in which everything takes a known time."""

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


def test_a_lap_divides_its_time_into_parts(clock: Clock) -> None:
    loop = Loop(clock)
    for _ in loop.steps.steps(loop.batches(4, 1.0)):
        loop.step(5.0, 2.0)
        clock.passes(0.5)
    lap = loop.steps.lap()
    assert lap == Stretch(4, 40, TimeShares(20.0, 8.0, 4.0, 2.0))
    assert lap.samples_per_second == pytest.approx(40 / 34)
    assert loop.steps.step_ms() == {"mean": 8500, "p50": 8500, "p95": 8500}
    assert loop.steps.lap() == Stretch()


def test_warm_up_is_in_laps_but_not_in_the_whole(clock: Clock) -> None:
    loop = Loop(clock, warmup=2)
    for number, _ in enumerate(loop.steps.steps(loop.batches(5, 0.0))):
        loop.step(100.0 if number < 2 else 3.0)
        if number == 0:
            assert loop.steps.lap() == Stretch(1, 10, TimeShares(compute=100))
    loop.steps.lap()
    assert loop.steps.overall == loop.steps.epoch == Stretch(3, 30, TimeShares(compute=9))
    assert loop.steps.step_ms()["mean"] == 3000


def test_a_lap_that_ends_within_warm_up_is_left_out(clock: Clock) -> None:
    loop = Loop(clock, warmup=3)
    for number, _ in enumerate(loop.steps.steps(loop.batches(4, 0.0))):
        loop.step(2.0)
        # Steps are counted when the loop asks for the next: here the third has not ended.
        if number == 2:
            assert loop.steps.lap().steps == 3
    loop.steps.lap()
    assert loop.steps.overall == Stretch(1, 10, TimeShares(compute=2))


def test_pauses_are_no_training_time(clock: Clock) -> None:
    loop = Loop(clock)
    for number, _ in enumerate(loop.steps.steps(loop.batches(3, 1.0))):
        loop.step(2.0)
        if number == 1:
            with loop.steps.paused():
                clock.passes(1000)
    assert loop.steps.lap() == Stretch(3, 30, TimeShares(compute=6, data=3))
    assert loop.steps.step_ms() == {"mean": 3000, "p50": 3000, "p95": 3000}


def test_what_happens_between_epochs_is_no_training_time(clock: Clock) -> None:
    loop = Loop(clock)
    clock.passes(50)
    for _ in range(3):
        for _ in loop.steps.steps(loop.batches(2, 0.0)):
            loop.step(2.0)
        clock.passes(7)
        assert loop.steps.lap().steps == 2
        clock.passes(1000)
    # What lies between the last step and the lap is the first epoch's, and nobody else's.
    assert loop.steps.overall == Stretch(6, 60, TimeShares(compute=12, other=21))
    assert loop.steps.step_ms() == {"mean": 2000, "p50": 2000, "p95": 2000}


def test_epochs_without_a_lap_between_them_leave_the_gap_out_too(clock: Clock) -> None:
    loop = Loop(clock)
    for number in range(2):
        clock.passes(1000 * number)
        for _ in loop.steps.steps(loop.batches(2, 0.0)):
            loop.step(2.0)
    assert loop.steps.lap() == Stretch(4, 40, TimeShares(compute=8))


def test_each_epoch_is_timed_apart(clock: Clock) -> None:
    loop = Loop(clock)
    for seconds in (2.0, 3.0):
        for _ in loop.steps.steps(loop.batches(2, 0.0)):
            loop.step(seconds)
        loop.steps.lap()
        assert loop.steps.epoch == Stretch(2, 20, TimeShares(compute=2 * seconds))
        loop.steps.epoch = Stretch()
    assert loop.steps.overall.time.compute == 10


def test_a_loop_that_is_left_early_ends_its_lap(clock: Clock) -> None:
    loop = Loop(clock)
    for number, _ in enumerate(loop.steps.steps(loop.batches(5, 0.0))):
        loop.step(2.0)
        if number == 2:
            break
    assert loop.steps.lap() == Stretch(3, 30, TimeShares(compute=6))


def test_percentiles_are_of_the_steps_after_warm_up(clock: Clock) -> None:
    loop = Loop(clock, warmup=1)
    durations = [100.0, *range(1, 22)]
    for duration, _ in zip(durations, loop.steps.steps(loop.batches(22, 0.0)), strict=True):
        loop.step(duration)
    found = loop.steps.step_ms()
    assert found == pytest.approx({"mean": 11000, "p50": 11000, "p95": 20000})


def test_no_steps_take_no_time(clock: Clock) -> None:
    loop = Loop(clock)
    assert list(loop.steps.steps(iter(()))) == []
    assert loop.steps.step_ms() == {"mean": 0, "p50": 0, "p95": 0}
    assert loop.steps.lap() == Stretch()
