"""Muon: momentum whose update matrices are orthogonalised."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distrain.config.groups import OptimizerConfig
from distrain.config.registry import register
from distrain.config.setting import setting
from distrain.errors import ConfigError
from distrain.optim.optimizers.groups import parameter_group
from distrain.optim.uncompiled import without_compiler_hooks

#: Coefficients of the Newton-Schulz polynomial a*s + b*s^3 + c*s^5, from the author's implementation.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


@dataclass
class MuonConfig(OptimizerConfig):
    """Keys of ``optimizer=muon``: Muon for weight matrices, SGD with momentum for all other parameters."""

    momentum: float = setting("Decay factor of the momentum buffer; 0: no momentum.", at_least=0, below=1)
    nesterov: bool = setting("Nesterov's variant of momentum.")
    iterations: int = setting("Newton-Schulz iterations that orthogonalise an update.", at_least=1)
    sgd_match: list[str] = setting(
        "Shell patterns of names of weights that are updated by SGD, like all parameters that are not matrices."
    )
    sgd_lr_factor: float = setting("Factor of the learning rate of parameters that are updated by SGD.", above=0)

    def __post_init__(self) -> None:
        """Refuses Nesterov without momentum.

        Raises:
            ConfigError: ``nesterov`` is set and ``momentum`` is 0.
        """
        if self.nesterov and not self.momentum:
            raise ConfigError("optimizer.nesterov", self.nesterov, "needs optimizer.momentum above 0")


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by a Newton-Schulz iteration in groups with ``orthogonal``.

    Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks",
    https://kellerjordan.github.io/posts/muon. A weight of two or more dimensions is treated as a matrix: the first
    dimension by the product of the others. Its update has singular values of about 1, times
    ``sqrt(max(1, rows / columns))``, and decoupled weight decay. Groups without ``orthogonal`` get the update of
    ``torch.optim.SGD``.

    Args:
        params: Parameter groups; ``orthogonal`` (default: true) selects the update.
        lr: Learning rate.
        momentum: Decay factor of the momentum buffer.
        nesterov: Whether to use Nesterov's variant of momentum.
        weight_decay: Weight decay; decoupled in groups with ``orthogonal``, else added to the gradient.
        iterations: Newton-Schulz iterations.
    """

    def __init__(
        self, params: Any, lr: float, momentum: float, nesterov: bool, weight_decay: float, iterations: int
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "iterations": iterations, "orthogonal": True})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient.

        Raises:
            ValueError: A ``closure`` is given; it is not supported.
        """
        if closure is not None:
            raise ValueError("Muon takes no closure")
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
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffer = state["momentum_buffer"].mul_(momentum).add_(gradient)
            gradient = gradient.add(buffer, alpha=momentum) if group["nesterov"] else buffer
        if orthogonal:
            matrix = gradient.flatten(1)
            rate *= max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
            gradient = orthogonalise(matrix, group["iterations"]).reshape(gradient.shape)
        parameter.add_(gradient, alpha=-rate)


def orthogonalise(matrix: Tensor, iterations: int) -> Tensor:
    """Approximates ``U V^T`` of a matrix ``U S V^T``, using matrix products only.

    The iteration ``X <- a X + (b X X^T + c (X X^T)^2) X`` maps each singular value ``s`` to ``a s + b s^3 + c s^5``.
    Five iterations bring singular values between 0 and 1, unless they are tiny, to between 0.7 and 1.2. On CUDA it
    computes in bfloat16, which is precise enough, elsewhere in the matrix's own type.

    Args:
        matrix: Floating-point ``[rows, columns]``.
        iterations: Number of iterations.

    Returns:
        A matrix of the same shape and type.
    """
    a, b, c = _COEFFICIENTS
    x = matrix.bfloat16() if matrix.is_cuda else matrix
    tall = x.shape[0] > x.shape[1]
    # Transpose so that X X^T is the smaller of the two possible products.
    x = x.T if tall else x
    # The Frobenius norm is at least the largest singular value. The constant keeps an update of zeros zero.
    x = x / (torch.linalg.vector_norm(x) + 1e-7)
    for _ in range(iterations):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)


@register("optimizer", "muon", MuonConfig)
def muon(config: MuonConfig, groups: list[dict[str, Any]], fused: bool | None) -> torch.optim.Optimizer:
    """Muon; ``fused`` is ignored, since there is one implementation."""
    split: list[dict[str, Any]] = []
    for group in groups:
        by_sgd = [item for item in group["params"] if _uses_sgd(config, item)]
        matrices = [item for item in group["params"] if not _uses_sgd(config, item)]
        named = any(isinstance(item, tuple) for item in group["params"]) or "param_names" in group
        # The first group is kept even if it is empty: the learning rate is read from it.
        if matrices or not split:
            split.append({**group, **parameter_group(matrices, named=named)})
        if by_sgd:
            factor = config.sgd_lr_factor * group.get("lr_factor", 1.0)
            split.append({**group, "params": by_sgd, "orthogonal": False, "lr_factor": factor})
    return without_compiler_hooks(Muon)(
        split, config.lr, config.momentum, config.nesterov, config.weight_decay, config.iterations
    )


def _uses_sgd(config: MuonConfig, item: Any) -> bool:
    name, parameter = item if isinstance(item, tuple) else ("", item)
    return parameter.dim() < 2 or any(fnmatch.fnmatchcase(name, pattern) for pattern in config.sgd_match)
