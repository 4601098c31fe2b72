"""A model with hollow tensors gets the values, and leaves the random draws, of one that is built as usual."""

from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch
from torch import Tensor, nn

from distrain.models import deferred
from distrain.models.tensors import convert, named_tensors
from distrain.runtime.device import seed_everything


class Everything(nn.Module):
    """Initialises its parameters in many ways."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.embedding = nn.Linear(40, 60), nn.Embedding(40, 64, padding_idx=3)
        nn.init.orthogonal_(self.first.weight)
        self.convolution = nn.Conv2d(16, 32, 3)
        nn.init.trunc_normal_(self.convolution.weight, std=0.02)
        with torch.no_grad():
            self.convolution.weight[3:5] *= 2
            self.convolution.weight.add_(self.first.weight.mean())
            if self.first.weight.sum() < 1e9:
                self.first.weight.t_().t_()
        self.register_buffer("mask", torch.ones(40, 40).tril())
        self.rates = [rate.item() for rate in torch.linspace(0, 1, 5)]
        self.scale = nn.Parameter(torch.randn(40, 40) / 7)
        self.tied = nn.Linear(64, 40, bias=False)
        self.tied.weight = self.embedding.weight
        own_draws = torch.Generator().manual_seed(4)
        self.apart = nn.Parameter(torch.zeros(40, 40).normal_(0, 2, generator=own_draws))
        self.later = nn.Parameter(torch.randn(40, 40, generator=own_draws))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        self.attention = nn.TransformerEncoderLayer(32, 4, 64)
        self.norm = nn.BatchNorm2d(1100)
        self.last = nn.Linear(3, 3)


def made(dtype: torch.dtype, layout: torch.memory_format) -> nn.Module:
    seed_everything(3)
    return convert(Everything(), dtype, torch.device("cpu")).to(memory_format=layout)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_and_later_draws_are_those_of_a_model_built_as_usual(
    dtype: torch.dtype, layout: torch.memory_format
) -> None:
    expected, next_draw = made(dtype, layout), torch.rand(3)
    model, values = deferred.build(lambda: made(dtype, layout))
    assert values is not None
    assert torch.equal(torch.rand(3), next_draw)
    hollow = [name for name, tensor in named_tensors(model) if values.is_hollow(tensor)]
    assert {"first.weight", "embedding.weight", "mask", "attention.self_attn.in_proj_weight"} <= set(hollow)
    assert "last.weight" not in hollow
    # In any order, and without a trace in the generator.
    before = torch.get_rng_state()
    tensors = dict(reversed(list(named_tensors(model))))
    values.fill(tensors)
    assert torch.equal(torch.get_rng_state(), before)
    for (name, tensor), (expected_name, other) in zip(named_tensors(model), named_tensors(expected), strict=True):
        assert name == expected_name
        assert torch.equal(tensor, other), name
        assert (tensor.stride(), tensor.dtype) == (other.stride(), other.dtype), name
    assert model.get_parameter("tied.weight") is model.get_parameter("embedding.weight")


class ReadsMemory(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(50, 50))
        self.largest = float(self.weight.detach().numpy().max())


class KeepsATensor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(50, 50))
        self.first = self.weight.detach().clone()


@pytest.mark.parametrize(("model", "reason"), [(ReadsMemory, "numpy reads"), (KeepsATensor, "keeps tensors in first")])
def test_what_can_not_be_computed_later_is_built_whole_and_told(
    model: type[nn.Module], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    def make() -> nn.Module:
        torch.manual_seed(3)
        return model()

    with caplog.at_level(logging.INFO, "distrain"):
        built, values = deferred.build(make)
    assert values is None
    (line,) = caplog.messages
    assert line.startswith("each rank builds the whole model")
    assert reason in line
    assert torch.equal(built.get_parameter("weight"), make().get_parameter("weight"))


def test_a_value_is_freed_as_soon_as_nobody_has_it() -> None:
    model, values = deferred.build(lambda: nn.Linear(40, 60))
    assert values is not None
    gc.disable()
    try:
        storage = weakref.ref(values.value(model.get_parameter("weight")).untyped_storage())
        assert storage() is None
    finally:
        gc.enable()


def test_hollow_tensors_take_no_memory() -> None:
    class Undrawn(nn.Linear):
        def reset_parameters(self) -> None:
            nn.init.zeros_(self.weight)

    model, values = deferred.build(lambda: Undrawn(16, 1 << 32, bias=False))
    assert values is not None
    weight: Tensor = model.get_parameter("weight")
    assert weight.nbytes == 1 << 38
