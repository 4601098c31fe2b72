"""What is computed in which format, and the loss scaling of fp16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distrain.communication.collectives import Communicator
from distrain.compression.none import NoCompression
from distrain.config.groups import CompressionConfig
from distrain.gradients.buckets import Gradients
from distrain.reporting.metrics import Stopwatch
from distrain.strategies.precision import Precision
from tests.strategies.helpers import drawn, parameters, single

CPU = torch.device("cpu")


def scaled(value: float, scale: float) -> tuple[nn.Linear, Gradients]:
    """A layer whose gradients are all ``value``, times the loss scale."""
    layer = nn.Linear(2, 1)
    compressor = NoCompression(CompressionConfig(name="none"))
    gradients = Gradients(layer.named_parameters(), Communicator(), compressor, Stopwatch(CPU))
    gradients.buckets[0].flat.fill_(value * scale)
    return layer, gradients


def step(precision: Precision, value: float = 1.0) -> tuple[Tensor, Tensor]:
    """One update of learning rate 1; the parameters before and after."""
    layer, gradients = scaled(value, precision.scale(torch.tensor(1.0)).item())
    before = parameters(layer)
    precision.unscale(gradients)
    precision.step(torch.optim.SGD(layer.parameters(), lr=1.0), gradients.norm())
    return before, parameters(layer)


def scale_of(precision: Precision) -> float:
    return precision.scale(torch.tensor(1.0)).item()


# --- loss scaling ----------------------------------------------------------------------------------------------------


def test_the_scale_leaves_the_gradient_as_it_came() -> None:
    precision = Precision("fp16", CPU)
    assert scale_of(precision) == 65536
    before, after = step(precision, 0.25)
    assert torch.equal(after, before - 0.25)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_an_overflow_leaves_parameters_as_they_are_and_halves_the_scale(bad: float) -> None:
    precision = Precision("fp16", CPU)
    before, after = step(precision, bad)
    assert torch.equal(after, before)
    assert scale_of(precision) == 32768
    before, after = step(precision, 1.0)
    assert torch.equal(after, before - 1)
    assert scale_of(precision) == 32768


def test_the_scale_never_falls_below_one() -> None:
    precision = Precision("fp16", CPU)
    for _ in range(20):
        step(precision, float("inf"))
    assert scale_of(precision) == 1


def test_the_scale_doubles_after_an_interval_without_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Precision, "growth_interval", 3)
    precision = Precision("fp16", CPU)
    scales = []
    for value in (1.0, 1.0, float("inf"), 1.0, 1.0, 1.0, 1.0, 1.0, 1.0):
        step(precision, value)
        scales.append(scale_of(precision) / 65536)
    assert scales == [1, 1, 0.5, 0.5, 0.5, 1, 1, 1, 2]


def test_the_scale_goes_on_from_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Precision, "growth_interval", 3)
    precision, other = Precision("fp16", CPU), Precision("fp16", CPU)
    for value in (float("inf"), 1.0, 1.0):
        step(precision, value)
    other.load_state_dict(precision.state_dict())
    assert other.state_dict() == precision.state_dict()
    step(other)
    assert scale_of(other) == 65536


def test_a_scale_of_one_is_kept_too() -> None:
    precision, other = Precision("fp16", CPU), Precision("fp16", CPU)
    for _ in range(16):
        step(precision, float("inf"))
    other.load_state_dict(precision.state_dict())
    assert scale_of(other) == 1


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp64"])
def test_only_fp16_scales_and_looks_for_overflow(name: str) -> None:
    precision = Precision(name, CPU)
    assert scale_of(precision) == 1
    assert not precision.checks_gradients
    before, after = step(precision, 1.0)
    assert torch.equal(after, before - 1)
    # Without looking the host need not wait for the device.
    _, after = step(precision, float("inf"))
    assert not after.isfinite().any()
    # A run that goes on in another precision starts its scale anew.
    half = Precision("fp16", CPU)
    half.load_state_dict(precision.state_dict())
    assert scale_of(half) == 65536
    precision.load_state_dict(half.state_dict())
    assert scale_of(precision) == 1


# --- formats ---------------------------------------------------------------------------------------------------------


class Watched(nn.Module):
    """Notes the type of what its layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.given: set[torch.dtype] = set()

    def forward(self, input: Tensor) -> Tensor:
        logits: Tensor = self.linear(input)
        self.given.add(logits.dtype)
        return logits


@pytest.mark.parametrize(
    ("name", "kept", "computed"),
    [
        ("fp32", torch.float32, torch.float32),
        ("bf16", torch.float32, torch.bfloat16),
        ("fp16", torch.float32, torch.float16),
        ("fp64", torch.float64, torch.float64),
    ],
)
def test_what_is_kept_and_computed_in_which_format(name: str, kept: torch.dtype, computed: torch.dtype) -> None:
    torch.manual_seed(0)
    precise, model = nn.Linear(6, 4).double(), Watched()
    model.linear.load_state_dict(precise.state_dict())
    assert Precision(name, CPU).dtype == kept
    strategy = single(model.to(kept), f"trainer.precision={name}")
    results = [strategy.train_step(drawn(8, 6, dtype=kept)), strategy.eval_step(drawn(8, 6, dtype=kept))]
    assert model.given == {computed}
    assert {parameter.dtype for parameter in model.parameters()} == {kept}
    assert {bucket.flat.dtype for bucket in strategy.gradients.buckets} == {kept}
    # Losses are summed in 32 bits at least.
    assert {result.loss_sum.dtype for result in results} == {kept}
    single(precise, "trainer.precision=fp64").train_step(drawn(8, 6, dtype=torch.float64))
    tolerance: dict[str, Any] = {"fp32": 1e-6, "bf16": 3e-3, "fp16": 3e-4, "fp64": 0}
    torch.testing.assert_close(parameters(model).double(), parameters(precise), rtol=0, atol=tolerance[name])


def test_gradients_too_small_for_16_bits_survive() -> None:
    def gradient(name: str) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
        strategy = single(model, f"trainer.precision={name}")
        each = drawn(4, 6)
        # A small share of a large batch: what flows back into the first layer is below fp16's least number.
        each.global_count = 2**26
        strategy.train_step(each)
        return strategy.gradients.buckets[0].tensors["0.weight"].clone()

    expected = gradient("fp32")
    assert expected.abs().max() < 2**-24
    torch.testing.assert_close(gradient("fp16"), expected, rtol=1e-2, atol=float(expected.abs().max()) / 100)
