"""torch's stochastic gradient descent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from distrain.config.groups import OptimizerConfig
from distrain.config.registry import register
from distrain.config.setting import setting
from distrain.errors import ConfigError
from distrain.optim.uncompiled import without_compiler_hooks


@dataclass
class SGDConfig(OptimizerConfig):
    """Stochastic gradient descent; plain gradient descent where ``momentum`` is 0."""

    momentum: float = setting("Decay factor of the momentum buffer; 0: no momentum.", at_least=0, below=1)
    nesterov: bool = setting("Nesterov's variant of momentum (Sutskever et al. 2013).")

    def __post_init__(self) -> None:
        """Refuses Nesterov without momentum.

        Raises:
            ConfigError: ``nesterov`` is set and ``momentum`` is 0.
        """
        if self.nesterov and not self.momentum:
            raise ConfigError("optimizer.nesterov", self.nesterov, "needs optimizer.momentum above 0")


@register("optimizer", "sgd", SGDConfig)
def sgd(config: SGDConfig, groups: list[dict[str, Any]], fused: bool | None) -> torch.optim.Optimizer:
    """Stochastic gradient descent; ``weight_decay`` is added to the gradient."""
    optimizer = without_compiler_hooks(torch.optim.SGD)(
        groups,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=fused,
    )
    if fused and config.momentum:
        optimizer.register_step_pre_hook(_begin_momentum)
    return optimizer


def _begin_momentum(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Gives parameters that get their first gradient later than others a momentum of zero.

    That is what they begin with anyway, but torch's fused kernel fails if some parameters of a group have a momentum
    and others have none.
    """
    for group in optimizer.param_groups:
        trained = [parameter for parameter in group["params"] if parameter.grad is not None]
        new = [parameter for parameter in trained if optimizer.state[parameter].get("momentum_buffer") is None]
        if len(new) < len(trained):
            for parameter in new:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
