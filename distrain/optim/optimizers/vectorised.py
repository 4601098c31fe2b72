"""What optimizers have in common that update all parameters of a group by a few kernels instead of several for each.

torch has none of these optimizers. timm has LAMB, LARS and Lion, but needs torchvision; torch-optimizer has not been
maintained for years; and schedulefree keeps counts for all parameters together, which no checkpoint holds by name. So
they are written here, in a few lines each.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from distrain.torch_internals import foreach

_COUNT = "step"
#: An update makes tensors as large as the parameters that it is given, so it is given no more bytes than these at once.
_MOST_BYTES = 1 << 25


class VectorisedOptimizer(torch.optim.Optimizer):
    """An optimizer whose subclass updates a list of parameters. All state is kept for each parameter."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient; the gradients are not changed.

        Raises:
            ValueError: A ``closure`` is given; it is not supported.
        """
        if closure is not None:
            raise ValueError(f"{type(self).__name__} takes no closure")
        for group in self.param_groups:
            for parameters in _parts([each for each in group["params"] if each.grad is not None]):
                gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
                self._update(parameters, gradients, group)

    @abstractmethod
    def _update(self, parameters: list[nn.Parameter], gradients: list[Tensor], group: dict[str, Any]) -> None:
        """Updates some parameters of a group, which have gradients; each as if it were the only one."""

    def _moments(self, parameters: list[nn.Parameter], name: str) -> list[Tensor]:
        """A tensor of the state of each parameter, which begins as zeros."""
        for parameter in parameters:
            if name not in self.state[parameter]:
                self.state[parameter][name] = torch.zeros_like(parameter)
        return [self.state[parameter][name] for parameter in parameters]

    def _count(self, parameters: list[nn.Parameter]) -> list[int]:
        """Counts this update of each parameter, and returns the counts; those of parameters once frozen are smaller."""
        for parameter in parameters:
            self.state[parameter][_COUNT] = self.state[parameter].get(_COUNT, 0) + 1
        return [self.state[parameter][_COUNT] for parameter in parameters]


def _parts(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The parameters, in parts that are small or have a single one."""
    part: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if part and size + parameter.nbytes > _MOST_BYTES:
            yield part
            part, size = [], 0
        part.append(parameter)
        size += parameter.nbytes
    if part:
        yield part


def norms(tensors: list[Tensor]) -> Tensor:
    """The Euclidean norm of each tensor, as a vector."""
    return torch.stack(foreach("norm", tensors))


def or_one(ratios: Tensor, *positive: Tensor) -> list[Tensor]:
    """The ratios as scalars; 1 where a norm that it was made of is 0."""
    usable = torch.stack([each > 0 for each in positive]).all(0)
    return list(torch.where(usable, ratios, 1.0).unbind())
