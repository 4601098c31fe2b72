"""What optimizers have in common that update all parameters of a group by a few kernels instead of several for each.

torch has none of these optimizers. timm has LAMB, LARS and Lion, but needs torchvision; torch-optimizer has not been
maintained for years; and schedulefree keeps counts for all parameters together, which no checkpoint holds by name. So
they are written here, in a few lines each.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from distrain.torch_internals import foreach

_COUNT = "step"


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
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._update(parameters, [parameter.grad for parameter in parameters], group)

    @abstractmethod
    def _update(self, parameters: list[nn.Parameter], gradients: list[Tensor], group: dict[str, Any]) -> None:
        """Updates the parameters of a group that have gradients."""

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


def norms(tensors: list[Tensor]) -> Tensor:
    """The Euclidean norm of each tensor, as a vector."""
    return torch.stack(foreach("norm", tensors))


def or_one(ratios: Tensor, *positive: Tensor) -> list[Tensor]:
    """The ratios as scalars; 1 where a norm that it was made of is 0."""
    usable = torch.stack([each > 0 for each in positive]).all(0)
    return list(torch.where(usable, ratios, 1.0).unbind())
