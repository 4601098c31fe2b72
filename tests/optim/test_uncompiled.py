"""An optimizer without compiler hooks computes what torch's own computes, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from distrain.optim.uncompiled import without_compiler_hooks


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        (torch.optim.Adam, {"fused": True, "weight_decay": 0.1}),
        (torch.optim.AdamW, {"foreach": True}),
    ],
)
def test_updates_and_state_equal_the_original_optimizers(kind: type[Optimizer], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(5, 3), torch.randn(4, 5, 3)
    results = []
    # mypy considers a class unhashable if its instances are.
    makers: tuple[Callable[..., Optimizer], ...] = (kind, without_compiler_hooks(kind))  # type: ignore[arg-type]
    for make in makers:
        weight, bias = nn.Parameter(start.clone()), nn.Parameter(torch.zeros(3))
        optimizer = make([weight], lr=0.1, **options)
        optimizer.add_param_group({"params": [bias], "lr": 0.01})
        calls = Mock()
        optimizer.register_step_post_hook(lambda *_, calls=calls: calls())
        for gradient in gradients:
            weight.grad, bias.grad = gradient.clone(), gradient.sum(0)
            optimizer.step()
        assert calls.call_count == len(gradients)
        assert isinstance(optimizer, kind)
        results.append((optimizer, [weight, bias]))
    (original, expected), (stripped, parameters) = results
    for parameter, expected_parameter in zip(parameters, expected, strict=True):
        assert torch.equal(parameter, expected_parameter)
        for name, value in original.state[expected_parameter].items():
            actual = stripped.state[parameter][name]
            assert torch.equal(actual, value) if isinstance(value, torch.Tensor) else actual == value
    assert type(stripped).__name__ == kind.__name__


def test_a_step_is_not_recorded_by_autograd_and_leaves_it_enabled() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = without_compiler_hooks(torch.optim.SGD)([parameter], lr=0.1)
    parameter.grad = torch.ones(2)
    optimizer.step()
    assert torch.is_grad_enabled()
    assert parameter.grad_fn is None
