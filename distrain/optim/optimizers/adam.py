"""torch's Adam and AdamW."""

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
class AdamConfig(OptimizerConfig):
    """Adam (Kingma & Ba 2014, arXiv:1412.6980)."""

    betas: list[float] = setting("Decay rates of the gradient's first and second moment.", at_least=0, below=1)
    eps: float = setting("Added to the square root of the second moment.", above=0)

    def __post_init__(self) -> None:
        """Refuses a number of decay rates other than two.

        Raises:
            ConfigError: ``betas`` doesn't have two elements.
        """
        if len(self.betas) != 2:
            raise ConfigError("optimizer.betas", self.betas, "must be two numbers")


@register("optimizer", "adam", AdamConfig)
def adam(config: AdamConfig, groups: list[dict[str, Any]], fused: bool | None) -> torch.optim.Optimizer:
    """Adam; ``weight_decay`` is added to the gradient."""
    return without_compiler_hooks(torch.optim.Adam)(groups, **_adam_arguments(config), fused=fused)


@register("optimizer", "adamw", AdamConfig)
def adamw(config: AdamConfig, groups: list[dict[str, Any]], fused: bool | None) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2017, arXiv:1711.05101)."""
    return without_compiler_hooks(torch.optim.AdamW)(groups, **_adam_arguments(config), fused=fused)


def _adam_arguments(config: AdamConfig) -> dict[str, Any]:
    first, second = config.betas
    return {"lr": config.lr, "betas": (first, second), "eps": config.eps, "weight_decay": config.weight_decay}
