"""A recorded forward pass computes what the model computes; a model of which that isn't sure stays as it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from distrain.models.recorded import record
from distrain.models.resnet import ResNet18


class Head(nn.Module):
    """A linear layer behind what a subclass does with images."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 3)

    def forward(self, images: Tensor) -> object:
        return self.layer(images.flatten(1))


class Named(Head):
    def forward(self, images: Tensor) -> object:
        return {"logits": super().forward(images)}


class OfValues(Head):
    def forward(self, images: Tensor) -> object:
        return super().forward(images if images.sum() > 0 else -images)


class OfTwo(Head):
    def forward(self, images: Tensor) -> object:
        return self.layer(images.reshape(2, -1)[:, :12]) if len(images) == 2 else super().forward(images)


class Random(Head):
    def forward(self, images: Tensor) -> object:
        return super().forward(images + torch.rand_like(images))


class Failing(Head):
    def forward(self, images: Tensor) -> object:
        return super().forward(torch.from_numpy(images.numpy() + 0.0))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_program_computes_the_same_numbers(layout: torch.memory_format) -> None:
    model = ResNet18(in_channels=3, num_classes=10, stem="cifar", norm="batch").eval()
    program = record(model, torch.zeros(2, 3, 8, 8).contiguous(memory_format=layout))
    assert isinstance(program, torch.jit.ScriptModule)
    images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=layout)
    with torch.inference_mode():
        assert torch.equal(program(images), model(images))


def test_the_logits_of_a_dictionary_are_what_a_program_returns() -> None:
    model = Named().eval()
    program = record(model, torch.zeros(2, 3, 2, 2))
    assert isinstance(program, torch.jit.ScriptModule)
    images = torch.ones(4, 3, 2, 2)
    with torch.no_grad():
        assert torch.equal(program(images), model.layer(images.flatten(1)))


@pytest.mark.parametrize("kind", [OfValues, OfTwo, Random, Failing])
def test_a_model_that_a_program_may_not_equal_stays_as_it_is(kind: type[nn.Module]) -> None:
    model = kind().eval()
    assert record(model, torch.zeros(2, 3, 2, 2)) is model
