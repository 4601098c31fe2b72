"""A lean optimizer is torch's, bit for bit."""

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
def test_updates_and_state_are_those_of_the_optimizer_itself(kind: type[Optimizer], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(5, 3), torch.randn(4, 5, 3)
    found = []
    # mypy takes a class for unhashable, since its instances may be.
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
        found.append((optimizer, [weight, bias]))
    (plain, expected), (stripped, parameters) = found
    for parameter, wanted in zip(parameters, expected, strict=True):
        assert torch.equal(parameter, wanted)
        for what, value in plain.state[wanted].items():
            kept = stripped.state[parameter][what]
            assert torch.equal(kept, value) if isinstance(value, torch.Tensor) else kept == value
    assert type(stripped).__name__ == kind.__name__


def test_a_step_leaves_gradients_switched_on_and_is_not_recorded() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = without_compiler_hooks(torch.optim.SGD)([parameter], lr=0.1)
    parameter.grad = torch.ones(2)
    optimizer.step()
    assert torch.is_grad_enabled()
    assert parameter.grad_fn is None
