"""Optimizers, with torch's fused kernels where it has them; ours are one file each beside this one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from distrain.config.registry import choice, register
from distrain.config.schema import Config, OptimizerConfig, setting
from distrain.errors import ConfigError
from distrain.optim.optimizers.groups import Groups, Parameters
from distrain.optim.optimizers.lookahead import Lookahead
from distrain.optim.uncompiled import lean


@dataclass
class SGDConfig(OptimizerConfig):
    """Stochastic gradient descent; plain gradient descent where ``momentum`` is 0."""

    momentum: float = setting("Share of the last update direction that is kept.", at_least=0, below=1)
    nesterov: bool = setting("Nesterov's variant of momentum (Sutskever et al. 2013).")

    def __post_init__(self) -> None:
        """Refuses Nesterov without momentum.

        Raises:
            ConfigError: ``nesterov`` is set and ``momentum`` is 0.
        """
        if self.nesterov and not self.momentum:
            raise ConfigError("optimizer.nesterov", self.nesterov, "needs optimizer.momentum above 0")


@dataclass
class AdamConfig(OptimizerConfig):
    """Adam (Kingma & Ba 2014, arXiv:1412.6980)."""

    betas: list[float] = setting("Decay rates of the gradient's first and second moment.", at_least=0, below=1)
    eps: float = setting("Added to the root of the second moment.", above=0)

    def __post_init__(self) -> None:
        """Refuses anything but two decay rates.

        Raises:
            ConfigError: ``betas`` has not two elements.
        """
        if len(self.betas) != 2:
            raise ConfigError("optimizer.betas", self.betas, "must be two numbers")


@register("optimizer", "sgd", SGDConfig)
def sgd(config: SGDConfig, groups: list[dict[str, Any]], fused: bool | None) -> torch.optim.Optimizer:
    """Stochastic gradient descent; ``weight_decay`` is added to the gradient."""
    return lean(torch.optim.SGD)(
        groups,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=fused,
    )


@register("optimizer", "adam", AdamConfig)
def adam(config: AdamConfig, groups: list[dict[str, Any]], fused: bool | None) -> torch.optim.Optimizer:
    """Adam; ``weight_decay`` is added to the gradient."""
    return lean(torch.optim.Adam)(groups, **_adam_arguments(config), fused=fused)


@register("optimizer", "adamw", AdamConfig)
def adamw(config: AdamConfig, groups: list[dict[str, Any]], fused: bool | None) -> torch.optim.Optimizer:
    """Adam with weight decay apart from the gradient (Loshchilov & Hutter 2017, arXiv:1711.05101)."""
    return lean(torch.optim.AdamW)(groups, **_adam_arguments(config), fused=fused)


def _adam_arguments(config: AdamConfig) -> dict[str, Any]:
    first, second = config.betas
    return {"lr": config.lr, "betas": (first, second), "eps": config.eps, "weight_decay": config.weight_decay}


def check(config: Config) -> None:
    """Refuses what an optimizer can't keep.

    Raises:
        ConfigError: Lookahead, whose last merge is the run's last update, where updates may be left out.
    """
    every, trainer = config.optimizer.lookahead.every, config.trainer
    if every is not None and (trainer.precision == "fp16" or trainer.on_nonfinite != "stop"):
        raise ConfigError(
            "optimizer.lookahead.every",
            every,
            "needs every update, and trainer.precision=fp16 and trainer.on_nonfinite=skip or rewind leave some out",
            ["null"],
        )


def build(
    config: OptimizerConfig,
    params: Iterable[nn.Parameter] | Iterable[tuple[str, nn.Parameter]],
    *,
    steps_per_epoch: int = 1,
    total_steps: int = 1,
) -> torch.optim.Optimizer:
    """The configured optimizer.

    Args:
        config: Its ``lr`` is the base rate, which the scheduler's factor multiplies.
        params: Parameters, or pairs of name and parameter, on the device they will be trained on; with names where the
            configuration names some.
        steps_per_epoch: Updates of an epoch, for groups that are trained in the first epochs only.
        total_steps: Updates of the whole run, at whose end lookahead leaves its slow copy.

    Returns:
        The optimizer; fused where the configuration asks for it and torch can for all of the parameters, otherwise what
        torch would choose. Whoever sets its rate sets that of all its groups to the same, and reads it from the first;
        the groups' factors come in only while it steps.
    """
    parameters = cast(Parameters, list(params))
    fused = config.fused and all(_has_fused(item[1] if isinstance(item, tuple) else item) for item in parameters)
    groups = Groups(config.groups, parameters, steps_per_epoch)
    # fused=False would also rule out torch's foreach kernels; None leaves the choice to torch.
    optimizer: torch.optim.Optimizer = choice("optimizer", config.name).target(config, groups.groups, fused or None)
    groups.attach(optimizer)
    if config.lookahead.every is not None:
        Lookahead(config.lookahead, total_steps).attach(optimizer)
    return optimizer


def _has_fused(parameter: Tensor) -> bool:
    return parameter.device.type in ("cpu", "cuda") and parameter.is_floating_point()
