"""A model's state is read from the module and loaded through it, with its extra state and its load hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distrain.checkpoint import module_state


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def test_parameters_and_buffers_are_copied_in_place() -> None:
    one, other = network(), network().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    one(torch.randn(5, 3, 3, 3))
    weight, strides = other[0].weight, other[0].weight.stride()
    module_state.load(other, {name: tensor.clone() for name, tensor in one.state_dict().items()})
    assert other[0].weight is weight
    assert weight.stride() == strides
    for name, tensor in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    assert other[1].num_batches_tracked == 1


def changed(**changes: Any) -> dict[str, Tensor]:
    tensors: dict[str, Any] = {**network().state_dict(), **{name.replace("__", "."): v for name, v in changes.items()}}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        (changed(**{"0__bias": None}), r"0\.bias is missing"),
        (changed(extra=torch.zeros(1)), "extra is not in the model"),
        (changed(**{"0__bias": torch.zeros(5)}), r"0\.bias is \(5,\), the model's \(4,\)"),
        ({}, r"0\.weight is missing; 0\.bias is missing; 1\.weight is missing and 6 more"),
    ],
    ids=["missing", "too many", "shape", "several"],
)
def test_state_of_another_model_is_refused_and_nothing_is_copied(tensors: dict[str, Tensor], problem: str) -> None:
    target = network()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(ValueError, match=f"the saved model is not this model: {problem}"):
        module_state.load(target, tensors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())
    # Names and shapes are enough to tell.
    with pytest.raises(ValueError, match=f"the saved model is not this model: {problem}"):
        module_state.check_fits(target.to("meta"), {name: tensor.shape for name, tensor in tensors.items()}, None)
