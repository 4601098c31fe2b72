"""Losses are the sums of the per-sample losses as textbooks define them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distrain.config.registry import choices
from distrain.config.schema import LossConfig
from distrain.optim.losses import CrossEntropyConfig, Loss, build

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0], [1.0, 1.0, 1.0], [-4.0, 0.25, 8.0]], dtype=torch.float64)
LABELS = torch.tensor([0, 2, 1, 2])
ONE_HOT = torch.tensor([[1, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)
ALL = ["cross_entropy", "smoothed", "binary_cross_entropy", "mean_squared_error"]


def make(name: str) -> Loss:
    if name == "smoothed":
        return build(CrossEntropyConfig(name="cross_entropy", label_smoothing=0.1))
    return build(
        CrossEntropyConfig(name=name, label_smoothing=0.0) if name == "cross_entropy" else LossConfig(name=name)
    )


def per_sample(name: str) -> Tensor:
    if name in ("cross_entropy", "smoothed"):
        smoothing = 0.1 if name == "smoothed" else 0.0
        probabilities = LOGITS.exp() / LOGITS.exp().sum(1, keepdim=True)
        return -((ONE_HOT * (1 - smoothing) + smoothing / 3) * probabilities.log()).sum(1)
    if name == "binary_cross_entropy":
        probabilities = 1 / (1 + (-LOGITS).exp())
        return -(ONE_HOT * probabilities.log() + (1 - ONE_HOT) * (1 - probabilities).log()).mean(1)
    return ((LOGITS - ONE_HOT) ** 2).mean(1)


def test_every_registered_loss_is_tested_here() -> None:
    assert set(choices("loss")) == set(ALL) - {"smoothed"}


@pytest.mark.parametrize("name", ALL)
def test_the_loss_is_the_sum_of_the_samples_losses(name: str) -> None:
    torch.testing.assert_close(make(name)(LOGITS, LABELS), per_sample(name).sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_the_losses_of_parts_of_a_batch_add_up_to_the_whole(name: str) -> None:
    loss = make(name)
    parts = loss(LOGITS[:1], LABELS[:1]) + loss(LOGITS[1:], LABELS[1:])
    torch.testing.assert_close(parts, loss(LOGITS, LABELS), rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_an_empty_batch_gives_zero_and_a_gradient(name: str) -> None:
    logits = LOGITS[:0].clone().requires_grad_()
    loss = make(name)(logits, LABELS[:0])
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert logits.grad.shape == (0, 3)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_16_bit_logits_are_converted_to_float32(name: str, dtype: torch.dtype) -> None:
    loss, logits = make(name), LOGITS.to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    result = loss(logits, LABELS)
    assert result.dtype == wide
    assert torch.equal(result, loss(logits.to(wide), LABELS))


@pytest.mark.parametrize("name", ALL)
def test_large_logits_stay_finite(name: str) -> None:
    assert torch.isfinite(make(name)(LOGITS.float() * 1e4, LABELS))
