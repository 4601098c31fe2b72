"""Muon: momentum whose matrices are orthogonalised before they are applied."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distrain.config.registry import register
from distrain.config.schema import OptimizerConfig, setting
from distrain.errors import ConfigError
from distrain.optim.optimizers.groups import parameter_group
from distrain.optim.uncompiled import without_compiler_hooks

#: Of the quintic that is steep at zero and keeps singular values between 0.7 and 1.2, as its author found them.
_QUINTIC = (3.4445, -4.7750, 2.0315)


@dataclass
class MuonConfig(OptimizerConfig):
    """Muon for the inner weights, stochastic gradient descent with momentum for all else."""

    momentum: float = setting("Share of the last update direction that is kept.", at_least=0, below=1)
    nesterov: bool = setting("Nesterov's variant of momentum.")
    iterations: int = setting("Newton-Schulz iterations that orthogonalise an update.", at_least=1)
    sgd_match: list[str] = setting(
        "Shell patterns of names of weights that take plain descent, as all that are no matrix."
    )
    sgd_lr_factor: float = setting("The rate of plain descent is this times the others'.", above=0)

    def __post_init__(self) -> None:
        """Refuses Nesterov without momentum.

        Raises:
            ConfigError: ``nesterov`` is set and ``momentum`` is 0.
        """
        if self.nesterov and not self.momentum:
            raise ConfigError("optimizer.nesterov", self.nesterov, "needs optimizer.momentum above 0")


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by a Newton-Schulz iteration where a group says so.

    Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks",
    https://kellerjordan.github.io/posts/muon. A weight of two or more dimensions is a matrix of its first dimension by
    all others. Its update has singular values about 1, whatever the gradient's are, times
    ``sqrt(max(1, rows / columns))``, and its decay is apart from the gradient. What is no matrix gets the update of
    ``torch.optim.SGD``.

    Args:
        params: Groups; ``orthogonal`` says which of the two updates is made.
        lr: Learning rate.
        momentum: Share of the last direction that is kept.
        nesterov: Whether the gradient is added once more to the momentum that it is part of.
        weight_decay: Weight decay, times the learning rate.
        iterations: Newton-Schulz iterations.
    """

    def __init__(
        self, params: Any, lr: float, momentum: float, nesterov: bool, weight_decay: float, iterations: int
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "iterations": iterations, "orthogonal": True})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; there is no ``closure``."""
        assert closure is None, "nothing here evaluates a model again"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        rate, decay, momentum = group["lr"], group["weight_decay"], group["momentum"]
        orthogonal = group["orthogonal"]
        if decay and orthogonal:
            parameter.mul_(1 - rate * decay)
        elif decay:
            gradient = gradient.add(parameter, alpha=decay)
        if momentum:
            kept = self.state[parameter]
            if "momentum_buffer" not in kept:
                kept["momentum_buffer"] = torch.zeros_like(parameter)
            buffer = kept["momentum_buffer"].mul_(momentum).add_(gradient)
            gradient = gradient.add(buffer, alpha=momentum) if group["nesterov"] else buffer
        if orthogonal:
            matrix = gradient.flatten(1)
            rate *= max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
            gradient = orthogonalise(matrix, group["iterations"]).reshape(gradient.shape)
        parameter.add_(gradient, alpha=-rate)


def orthogonalise(matrix: Tensor, iterations: int) -> Tensor:
    """About ``U V^T`` of a matrix ``U S V^T``, by products of matrices alone.

    The iteration ``X <- a X + (b X X^T + c (X X^T)^2) X`` maps each singular value by ``a s + b s^3 + c s^5``; from
    any between 0 and 1 that is not tiny it comes to 0.7 to 1.2 within five. On CUDA it computes in bfloat16, which
    it is robust to; elsewhere in the matrix's own type.

    Args:
        matrix: [rows, columns].
        iterations: How many.
    """
    a, b, c = _QUINTIC
    x = matrix.bfloat16() if matrix.is_cuda else matrix
    tall = x.shape[0] > x.shape[1]
    # The products are of the smaller side.
    x = x.T if tall else x
    # The norm is at least the largest singular value; an update of zeros stays one.
    x = x / (torch.linalg.vector_norm(x) + 1e-7)
    for _ in range(iterations):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)


@register("optimizer", "muon", MuonConfig)
def muon(config: MuonConfig, groups: list[dict[str, Any]], fused: bool | None) -> torch.optim.Optimizer:
    """Muon; ``optimizer.fused`` has nothing to choose, since there is one implementation."""
    split: list[dict[str, Any]] = []
    for group in groups:
        plain = [item for item in group["params"] if _plain(config, item)]
        # The first group says what the rate is, whatever it holds.
        named = any(isinstance(item, tuple) for item in group["params"]) or "param_names" in group
        rest = [item for item in group["params"] if not _plain(config, item)]
        matrices = {**group, **parameter_group(rest, named=named)}
        split += [matrices] if matrices["params"] or not split else []
        factor = config.sgd_lr_factor * group.get("lr_factor", 1.0)
        split += [{**group, "params": plain, "orthogonal": False, "lr_factor": factor}] if plain else []
    return without_compiler_hooks(Muon)(
        split, config.lr, config.momentum, config.nesterov, config.weight_decay, config.iterations
    )


def _plain(config: MuonConfig, item: Any) -> bool:
    name, parameter = item if isinstance(item, tuple) else ("", item)
    return parameter.dim() < 2 or any(fnmatch.fnmatchcase(name, pattern) for pattern in config.sgd_match)
