"""Losses are the sums of the per-sample losses as textbooks define them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from distrain.config.groups import LossConfig
from distrain.config.registry import choices
from distrain.data.base import IGNORED, DataSpec
from distrain.errors import ConfigError
from distrain.optim.losses import Loss, build

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0], [1.0, 1.0, 1.0], [-4.0, 0.25, 8.0]], dtype=torch.float64)
CLASSES = torch.tensor([0, 2, 1, 2])
ONE_HOT = torch.tensor([[1, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)
LABELS = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]], dtype=torch.uint8)
NUMBERS = torch.tensor([[0.5, -1, 2], [0, 0, 9], [1, 1, 1], [-3.5, 0.25, 7]])
#: Logits and classes of 4 images of 2x3 pixels; of the third image no pixel's class is known.
PIXELS = torch.linspace(-3, 4, 72, dtype=torch.float64).view(4, 3, 2, 3).sin() * 3
MASKS = (torch.arange(24).view(4, 2, 3) % 3).to(torch.uint8)
MASKS[0, 1] = MASKS[2] = MASKS[3, 0, 0] = IGNORED
TARGETS = {"class": CLASSES, "labels": LABELS, "numbers": NUMBERS, "mask": MASKS}
WEIGHTS = torch.tensor([0.5, 3.0, 1.25], dtype=torch.float64)


def config_of(name: str, **keys: object) -> LossConfig:
    defaults: dict[str, dict[str, object]] = {
        "cross_entropy": {"label_smoothing": 0.0},
        "huber": {"delta": 0.75},
        "focal": {"gamma": 2.0, "alpha": None},
        "asymmetric": {"gamma_positive": 1.0, "gamma_negative": 4.0, "margin": 0.05},
    }
    schema = choices("loss")[name].schema
    config: LossConfig = schema(name=name, **{**defaults.get(name, {}), **keys})
    return config


def make(name: str, kind: str, **keys: object) -> Loss:
    return build(config_of(name, **keys), DataSpec(1, 2, 3, ("a", "b", "c"), target=kind))


def per_pixel(term: Callable[[Tensor], Tensor]) -> Tensor:
    """For each image the mean of a loss over the pixels of known class, from the log-probabilities of the classes."""
    means = []
    for logits, mask in zip(PIXELS, MASKS, strict=True):
        logs = (logits.exp() / logits.exp().sum(0)).log()
        known = [term(logs[int(mask[y, x]), y, x]) for y in range(2) for x in range(3) if mask[y, x] != IGNORED]
        means.append(torch.stack(known).mean() if known else torch.zeros((), dtype=torch.float64))
    return torch.stack(means)


def binary(targets: Tensor) -> Tensor:
    probabilities = 1 / (1 + (-LOGITS).exp())
    return -(targets * probabilities.log() + (1 - targets) * (1 - probabilities).log())


def focal(cross_entropy: Tensor) -> Tensor:
    return (1 - (-cross_entropy).exp()) ** 2 * cross_entropy


def asymmetric() -> Tensor:
    p, applies = LOGITS.sigmoid(), LABELS.double()
    shifted = (p - 0.05).clamp(min=0)
    return -(applies * (1 - p) * p.log() + (1 - applies) * shifted**4 * (1 - shifted).log())


def huber(error: Tensor) -> Tensor:
    return torch.where(error.abs() < 0.75, error**2 / 2, 0.75 * (error.abs() - 0.375))


LOGS = (LOGITS.exp() / LOGITS.exp().sum(1, keepdim=True)).log()
NLL = -(ONE_HOT * LOGS).sum(1)
APPLIES = LABELS.double()
POSITIVE_WEIGHTED = binary(APPLIES) * (APPLIES * WEIGHTS + 1 - APPLIES)
#: Each loss with each kind of targets, its keys, and the samples' losses.
CASES: list[tuple[str, str, dict[str, Any], Tensor]] = [
    ("cross_entropy", "class", {}, NLL),
    ("cross_entropy", "class", {"label_smoothing": 0.1}, -((ONE_HOT * 0.9 + 0.1 / 3) * LOGS).sum(1)),
    ("cross_entropy", "class", {"class_weights": WEIGHTS.tolist()}, NLL * WEIGHTS[CLASSES]),
    ("cross_entropy", "mask", {}, per_pixel(torch.neg)),
    ("binary_cross_entropy", "class", {}, binary(ONE_HOT).mean(1)),
    ("binary_cross_entropy", "class", {"class_weights": WEIGHTS.tolist()}, binary(ONE_HOT).mean(1) * WEIGHTS[CLASSES]),
    ("binary_cross_entropy", "labels", {}, binary(APPLIES).mean(1)),
    ("binary_cross_entropy", "labels", {"class_weights": WEIGHTS.tolist()}, (binary(APPLIES) * WEIGHTS).mean(1)),
    ("binary_cross_entropy", "labels", {"positive_weights": WEIGHTS.tolist()}, POSITIVE_WEIGHTED.mean(1)),
    ("mean_squared_error", "class", {}, ((LOGITS - ONE_HOT) ** 2).mean(1)),
    ("mean_squared_error", "class", {"class_weights": [2.0] * 3}, 2 * ((LOGITS - ONE_HOT) ** 2).mean(1)),
    ("mean_squared_error", "numbers", {}, ((LOGITS - NUMBERS) ** 2).mean(1)),
    ("mean_absolute_error", "numbers", {}, (LOGITS - NUMBERS).abs().mean(1)),
    ("huber", "numbers", {}, huber(LOGITS - NUMBERS).mean(1)),
    ("focal", "class", {}, focal(NLL)),
    ("focal", "class", {"class_weights": WEIGHTS.tolist()}, focal(NLL) * WEIGHTS[CLASSES]),
    ("focal", "class", {"gamma": 0.0}, NLL),
    ("focal", "labels", {}, focal(binary(APPLIES)).mean(1)),
    ("focal", "labels", {"alpha": 0.25}, (focal(binary(APPLIES)) * (0.75 - 0.5 * APPLIES)).mean(1)),
    ("focal", "mask", {}, per_pixel(lambda log: focal(-log))),
    ("asymmetric", "labels", {}, asymmetric().mean(1)),
    ("asymmetric", "labels", {"class_weights": WEIGHTS.tolist()}, (asymmetric() * WEIGHTS).mean(1)),
]
each_case = pytest.mark.parametrize(("name", "kind", "keys", "expected"), CASES)


def outputs_of(kind: str) -> Tensor:
    return PIXELS if kind == "mask" else LOGITS


def test_every_registered_loss_is_tested_here_with_each_kind_of_targets() -> None:
    promised = {(name, kind) for name, each in choices("loss").items() for kind in each.target.kinds}  # type: ignore[attr-defined]
    assert {(name, kind) for name, kind, _, _ in CASES} == {pair for pair in promised if pair[0] != "custom"}


@each_case
def test_the_loss_is_the_sum_of_the_samples_losses(
    name: str, kind: str, keys: dict[str, Any], expected: Tensor
) -> None:
    loss = make(name, kind, **keys)
    torch.testing.assert_close(loss(outputs_of(kind), TARGETS[kind]), expected.sum(), rtol=1e-12, atol=0)
    for index, value in enumerate(expected):
        one = loss(outputs_of(kind)[index : index + 1], TARGETS[kind][index : index + 1])
        torch.testing.assert_close(one, value, rtol=1e-12, atol=0)


@each_case
def test_an_empty_batch_gives_zero_and_a_gradient(name: str, kind: str, keys: dict[str, Any], expected: Tensor) -> None:
    logits = outputs_of(kind)[:0].clone().requires_grad_()
    loss = make(name, kind, **keys)(logits, TARGETS[kind][:0])
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert logits.grad.shape == logits.shape


@each_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_16_bit_logits_are_converted_to_float32(
    name: str, kind: str, keys: dict[str, Any], expected: Tensor, dtype: torch.dtype
) -> None:
    loss, logits = make(name, kind, **keys), outputs_of(kind).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    result = loss(logits, TARGETS[kind])
    assert result.dtype == wide
    assert torch.equal(result, loss(logits.to(wide), TARGETS[kind]))


@each_case
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_loss_and_gradient_of_large_logits_are_finite(
    name: str, kind: str, keys: dict[str, Any], expected: Tensor, gamma: float
) -> None:
    if name == "focal":
        keys = {**keys, "gamma": gamma}
    elif name == "asymmetric":
        keys = {**keys, "gamma_positive": gamma, "gamma_negative": gamma, "margin": 0.0}
    for factor in (1e4, 1e2, 0.0):
        logits = (outputs_of(kind).float() * factor).requires_grad_()
        loss = make(name, kind, **keys)(logits, TARGETS[kind])
        loss.backward()
        assert logits.grad is not None
        assert torch.isfinite(loss)
        assert bool(torch.isfinite(logits.grad).all())


def test_weighted_cross_entropy_is_torchs_with_the_samples_as_the_divisor() -> None:
    loss = make("cross_entropy", "class", label_smoothing=0.2, class_weights=WEIGHTS.tolist())(LOGITS, CLASSES)
    torchs = F.cross_entropy(LOGITS, CLASSES, WEIGHTS, label_smoothing=0.2)
    torch.testing.assert_close(loss, torchs * WEIGHTS[CLASSES].sum())


def test_a_class_with_the_number_of_unknown_pixels_has_a_loss() -> None:
    spec = DataSpec(1, 2, 3, tuple(map(str, range(IGNORED + 2))))
    logits, labels = torch.zeros(1, IGNORED + 2), torch.tensor([IGNORED])
    for name, each in choices("loss").items():
        if name != "custom" and "class" in each.target.kinds:  # type: ignore[attr-defined]
            loss = build(config_of(name), spec)
            assert loss(logits, labels) == loss(logits, labels - 1) > 0, name


@pytest.mark.parametrize(
    ("name", "kind", "keys", "message"),
    [
        (
            "cross_entropy",
            "labels",
            {},
            "loss.name=cross_entropy: can't compare outputs with several labels a sample",
        ),
        ("huber", "class", {}, "loss.name=huber: can't compare outputs with one class a sample; choices: "),
        ("asymmetric", "mask", {}, "can't compare outputs with a class for each pixel"),
        ("focal", "class", {"alpha": 0.25}, "loss.alpha=0.25: is for several labels a sample; for one class a sample"),
        ("focal", "class", {"class_weights": [1.0]}, "has 1 weights for 3 classes (a, b, c)"),
        ("focal", "class", {"class_weights": [0.0] * 3}, "leaves no loss"),
        ("binary_cross_entropy", "labels", {"positive_weights": [1.0] * 4}, "loss.positive_weights=[1.0, 1.0, 1.0, 1"),
        ("mean_squared_error", "numbers", {"class_weights": [1.0] * 3}, "takes no class weights"),
    ],
)
def test_a_loss_that_does_not_fit_the_data_is_refused(
    name: str, kind: str, keys: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        make(name, kind, **keys)
    assert message in str(error.value)
