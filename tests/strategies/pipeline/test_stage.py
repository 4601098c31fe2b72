"""A stage whose backward pass comes in two halves computes what it computes in a whole one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distrain.config.schema import Config
from distrain.data.base import DataSpec
from distrain.strategies.pipeline.blocks import ActivationSpec, HandOver
from distrain.strategies.pipeline.stage import Stage
from distrain.strategies.precision import Precision
from distrain.tasks import base as tasks
from tests.runs import small

CPU = torch.device("cpu")


class Part(nn.Module):
    """A part of a model that uses its parameters, and hands over tensors, in one of several ways."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.kind = kind
        self.first, self.second, self.scale = (
            nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
            for shape in ((4, 4), (4, 4), (4,))
        )

    def forward(self, given: tuple[Tensor, Tensor]) -> Any:
        left, right = given
        if self.kind == "a parameter used twice, another one between":
            return ((left * self.scale) @ self.first).tanh() * self.scale @ self.second * right
        if self.kind == "an output of a parameter alone":
            return (left @ self.first * right).tanh(), self.scale.sigmoid().expand(len(left), -1)
        if self.kind == "an output of a parameter that another output needs":
            gate = self.scale.sigmoid().expand(len(left), -1)
            return gate, (left @ self.first * gate).tanh() @ self.second, right
        if self.kind == "an input, and views of one tensor":
            both = (left @ self.first).tanh() @ self.second * right
            return left, both[:, :2], both[:, 2:], both
        raise ValueError(self.kind)


def gradients(kind: str, splits_backward: bool) -> dict[str, Tensor]:
    """Of inputs and parameters, after two microbatches."""
    config: Config = small()
    spec = ActivationSpec(torch.Size([4]), torch.float64, False, True)
    part = Part(kind)
    stage = Stage(
        1,
        part,
        False,
        tasks.build(config, DataSpec(3, 8, 8, tuple("abcd"))),
        Precision("fp64", CPU),
        HandOver(tuple, (spec, spec)),
        changes_input=False,
        splits_backward=splits_backward,
    )
    found: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    for microbatch in range(2):
        outputs, _ = stage.forward(microbatch, [drawn(3, 4), drawn(3, 4)], torch.zeros(3), 3)
        of_outputs = [drawn(*output.shape) for output in outputs]
        backward = stage.backward_input if splits_backward else stage.backward
        for index, gradient in enumerate(backward(microbatch, of_outputs)):
            found[f"input {index} of {microbatch}"] = gradient
        if splits_backward:
            stage.backward_weight(microbatch)
    # Whoever shares gradients takes a missing one as zeros.
    return found | {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in part.named_parameters()}


@pytest.mark.parametrize(
    "kind",
    [
        "a parameter used twice, another one between",
        "an output of a parameter alone",
        "an output of a parameter that another output needs",
        "an input, and views of one tensor",
    ],
)
def test_gradients_in_two_halves_are_those_of_a_whole_backward_pass(kind: str) -> None:
    whole, halves = gradients(kind, splits_backward=False), gradients(kind, splits_backward=True)
    torch.testing.assert_close(halves, whole)
