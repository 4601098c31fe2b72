"""What is measured, how often, and where it is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import socket
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import nn
from typing_extensions import override

from distrain.communication.collectives import Communicator
from distrain.data.batch import Batch
from distrain.errors import ConfigError
from distrain.gradients.bucket_sizes import MIB
from distrain.runtime.world import World
from distrain.strategies.precision import Precision
from distrain.strategies.single import Single
from distrain.tools.planning import batchnorm_cost, measurement, step_timer, token_bucket
from distrain.tools.planning.batchnorm_cost import extra_seconds, lateness_of_collectives
from distrain.tools.planning.cluster import Link, LinkPoint
from distrain.tools.planning.compressor_measurement import sample_of
from distrain.tools.planning.divided_model import DividedLayers, Divisions, divide_model, measure_each
from distrain.tools.planning.measurement import measure
from distrain.tools.planning.phases import PhaseClock
from distrain.tools.planning.step_timer import StepTimer
from distrain.tools.planning.workload import BlockProfile, DividedModel
from distrain.training.run_plan import RunPlan
from tests.harness import run_ranks
from tests.runs import small

CPU = torch.device("cpu")


def refusals() -> tuple[str, list[str]]:
    """What ranks of two hosts say that have different numbers of them, and what they do if one can't divide layers."""
    world = World.from_environment()
    uneven = dataclasses.replace(world, host="a" if world.rank == 0 else "b")
    plan = RunPlan.resolve(small("data.batch_size=30"), dataclasses.replace(world, rank=0, size=1))
    line, divisions = "", Divisions(small("strategy=tensor_parallel"), ("tensor_parallel",), None)

    def divide(*_: object, **__: object) -> None:
        raise ConfigError("strategy.plan", "{}", "is refused on a rank")

    with contextlib.closing(plan.load()) as splits, pytest.MonkeyPatch.context() as patch:
        try:
            measure(plan, uneven, splits, {}, PhaseClock())
        except ConfigError as error:
            line = str(error)
        patch.setattr(step_timer, "_STEP_SECONDS", 0.0)
        patch.setattr(measurement, "_BLOCK_SECONDS", 0.0)
        if world.rank == 1:
            patch.setattr(measurement, "divide_model", divide)
        measured = measure(plan, world, splits, {}, PhaseClock(), divisions=divisions)
    assert measured.workload.divided == ()
    return line, measured.remarks


def test_what_a_rank_refuses_all_refuse_instead_of_waiting_for_it() -> None:
    uneven = "plan: hosts have different numbers of ranks: {'a': 1, 'b': 2}; a plan needs the same number on each"
    where = f"(rank 1 on {socket.gethostname()})"
    divided = f"no layers are divided among 3 ranks: strategy.plan={{}}: is refused on a rank {where}"
    assert run_ranks(refusals, 3) == [(uneven, [divided])] * 3


class OfWholeLayers(nn.ReLU):
    """Knows how many channels the layer before it has on one process."""

    @override
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.view(-1, 16))


def test_blocks_that_fail_once_they_are_divided_are_measured_as_one_and_make_no_stages() -> None:
    training = cast(Single, SimpleNamespace(precision=Precision("fp32", CPU)))
    block = BlockProfile("whole", (), {}, {})

    def measure(ranks: int, starts: Sequence[int]) -> tuple[DividedLayers, DividedModel]:
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 4))
        blocks = nn.Sequential(model[0], OfWholeLayers(), model[2], model[3])
        config = small("strategy=tensor_parallel")
        layers = divide_model(config, ranks, starts, training, model, blocks, torch.randn(3, 8))
        assert list(layers.sequence) == [model]
        return layers, DividedModel(ranks, (block,), 0.0, 0.0, starts=tuple(starts))

    # The last layer, which is not divided, is a stage of its own.
    found, remarks = measure_each([(2, [0]), (2, [0, 3])], measure)
    assert [one.starts for one in found] == [(0,)]
    (remark,) = remarks
    assert remark.startswith("no layers of 2 stages are divided among 2 ranks: strategy.plan: divided blocks fail by")


class SlowSteps:
    """Takes steps, and updates, of some seconds by a clock of its own."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.now, self.taken = seconds, 0.0, 0

    def train_step(self, batch: object) -> None:
        self.now += self.seconds
        self.taken += 1


@pytest.mark.parametrize(("seconds", "taken"), [(0.01, 151), (0.4, 5), (1.0, 2), (20.0, 2)])
def test_long_steps_are_few(seconds: float, taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowSteps(seconds)
    monkeypatch.setattr(step_timer, "synchronised_time", lambda device: slow.now)
    monkeypatch.setattr("time.perf_counter", lambda: slow.now)
    timer = StepTimer(cast(Single, slow), lambda size: itertools.repeat(cast(Batch, None)), Communicator(), CPU)
    times = timer.steps(4, update=0.0)
    assert times.passes == pytest.approx(seconds)
    assert times.is_long == (seconds >= 0.5)
    assert slow.taken == pytest.approx(taken, abs=1)


def test_a_first_step_that_is_slow_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowSteps(1.0)
    # Modules of torch are imported in the very first step, and memory is allocated in the first one of some samples.
    pace = iter([3.0, 1.0, 1.0, 1.4, 1.0])

    def train_step(batch: object) -> None:
        slow.now += next(pace)

    monkeypatch.setattr(slow, "train_step", train_step)
    monkeypatch.setattr(step_timer, "synchronised_time", lambda device: slow.now)
    timer = StepTimer(cast(Single, slow), lambda size: itertools.repeat(cast(Batch, None)), Communicator(), CPU)
    assert timer.first_steps(2) == 1.0
    # The second step of two samples is one of those that count.
    assert [timer.steps(2, 0.0).passes, timer.steps(4, 0.0).passes] == [1.0, 1.0]
    assert next(pace, None) is None


def test_steps_of_ranks_that_take_turns_all_count(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, pace = SlowSteps(1.0), itertools.cycle([0.6, 1.4])

    def train_step(batch: object) -> None:
        slow.now += next(pace)

    monkeypatch.setattr(slow, "train_step", train_step)
    monkeypatch.setattr(step_timer, "synchronised_time", lambda device: slow.now)
    monkeypatch.setattr("time.perf_counter", lambda: slow.now)
    batches = cast("Callable[[int], Iterator[Batch]]", lambda size: itertools.repeat(None))
    timer = StepTimer(cast(Single, slow), batches, Communicator(), CPU, takes_turns=True)
    assert timer.steps(4, 0.0).passes == pytest.approx(1.0, abs=0.15)
    alone = StepTimer(cast(Single, slow), batches, Communicator(), CPU)
    assert alone.steps(4, 0.0).passes == pytest.approx(0.6)


class TwoAlike(Communicator):
    """A group of two ranks, of which the other one does what this one does at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 2

    @override
    def barrier(self) -> None:
        """Nobody is late."""

    @override
    def all_reduce(self, tensor: torch.Tensor, reduction: str = "sum") -> torch.Tensor:
        return 2 * tensor if reduction == "sum" else tensor


def test_a_machine_that_becomes_slower_is_not_taken_for_ranks_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowSteps(0.01)

    def train_step(batch: object) -> None:
        slow.now += 0.01 * (1 + 0.3 * slow.now)

    monkeypatch.setattr(slow, "train_step", train_step)
    monkeypatch.setattr(step_timer, "synchronised_time", lambda device: slow.now)
    timer = StepTimer(cast(Single, slow), lambda size: itertools.repeat(cast(Batch, None)), TwoAlike(), CPU)
    # After three seconds a step takes twice as long as at the beginning.
    assert timer.spread(4, about=0.01) < 0.02


def test_a_rank_is_busy_while_its_link_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    def sleep(seconds: float) -> None:
        raise AssertionError("a rank that slept needs milliseconds to wake up")

    monkeypatch.setattr("time.sleep", sleep)
    monkeypatch.setattr(token_bucket, "_REST", 1e-3)
    assert token_bucket._after_rest(TwoAlike(), CPU, [1024])[0] < 60


@pytest.mark.parametrize("burst", [0, 256 * 1024])
@pytest.mark.parametrize("bytes_per_second", [12.5e6, 125e6])
def test_a_token_bucket_is_found_though_some_messages_are_disturbed(
    burst: int, bytes_per_second: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, tokens, sent = [0.0], [float(burst)], [0]

    def wait(seconds: float) -> None:
        now[0] += seconds
        tokens[0] = min(tokens[0] + seconds * bytes_per_second, burst)

    class Shaped(TwoAlike):
        """Sends a ring's bytes over a link with a token bucket; one message of five is late by milliseconds."""

        @override
        def all_reduce(self, tensor: torch.Tensor, reduction: str = "sum") -> torch.Tensor:
            if reduction == "sum":
                passes = min(tokens[0], tensor.nbytes)
                tokens[0] -= passes
                late = 0.003 if sent[0] % 5 == 1 else 0.0
                # Tokens that arrive while the link is busy are used at once.
                now[0] += (tensor.nbytes - passes) / bytes_per_second
                wait(1e-5 + late)
                sent[0] += 1
            return tensor

    def clock() -> float:
        wait(1e-5)
        return now[0]

    monkeypatch.setattr("time.perf_counter", clock)
    monkeypatch.setattr(token_bucket, "_REST", 0.03)
    points = (
        LinkPoint(1024, 5e-4),
        LinkPoint(2**18, 2**18 / bytes_per_second),
        LinkPoint(2**20, 2**20 / bytes_per_second),
    )
    found = token_bucket.measure_token_bucket(Shaped(), CPU, Link(points))
    assert (found is not None) == (burst > 0)
    if found is not None:
        assert found.bytes_per_second == pytest.approx(bytes_per_second)
        assert found.burst_bytes == pytest.approx(burst, rel=0.05)


def test_compressors_are_timed_on_a_sample_of_a_large_model() -> None:
    layers = [nn.Linear(1000, 1000, device="meta") for _ in range(40)]
    parameters = list(nn.Sequential(*layers).named_parameters())
    assert sample_of(parameters[:8]) == parameters[:8]
    sample = sample_of(parameters)
    assert sample == sample_of(parameters)
    assert 20 * MIB < sum(4 * parameter.numel() for _, parameter in sample) <= 24 * MIB
    assert [name for name, _ in parameters if name in dict(sample)] == [name for name, _ in sample]
    huge = [("whole", nn.Parameter(torch.empty(100, MIB, device="meta"))), ("bias", layers[0].bias)]
    assert sample_of(huge) == huge[1:]
    assert sample_of(huge[:1]) == huge[:1]


def test_other_batchnorm_layers_take_longer_by_what_their_passes_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
    model.append(nn.BatchNorm2d(8).eval())
    images = torch.randn(4, 3, 16, 16)
    changed, slow = [], SlowSteps(0.01)
    monkeypatch.setattr(batchnorm_cost, "synchronised_time", lambda device: slow.now)

    def slower(layer: nn.Module, communicator: Communicator) -> int:
        changed.append(layer[0].running_mean.numel())  # type: ignore[index]
        layer.register_forward_hook(lambda *_: slow.train_step(None))
        return 1

    (extra,) = extra_seconds(model, lambda: model(images), [slower])
    # Both layers have the same input shape, so one of them is timed. The last one doesn't train.
    assert changed == [8]
    assert extra == pytest.approx(2 * 0.01)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model)


def test_collectives_of_batchnorm_are_measured_only_where_they_may_matter() -> None:
    asked = []

    def added() -> float:
        asked.append(True)
        return 0.06

    assert lateness_of_collectives(0, 1e-3, 1.0, added) is None
    # 30 collectives, 15 times as late as they are long, are 4 % of the passes.
    assert lateness_of_collectives(10, 1e-4, 1.1, added) == 1.0
    assert not asked
    assert lateness_of_collectives(10, 1e-4, 0.8, added) == pytest.approx(0.06 / 30 / 1e-4)
