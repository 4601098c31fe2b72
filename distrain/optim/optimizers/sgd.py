"""torch's stochastic gradient descent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from distrain.config.registry import register
from distrain.config.schema import OptimizerConfig, setting
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
    return without_compiler_hooks(torch.optim.SGD)(
        groups,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=fused,
    )
