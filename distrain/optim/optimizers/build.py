"""Builds the configured optimizer, with its parameter groups and lookahead."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from distrain.config.registry import choice
from distrain.config.schema import Config, OptimizerConfig
from distrain.errors import ConfigError
from distrain.optim.optimizers.groups import ParameterGroups, Parameters
from distrain.optim.optimizers.lookahead import Lookahead


def check_optimizer(config: Config) -> None:
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


def build_optimizer(
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
    groups = ParameterGroups(config.groups, parameters, steps_per_epoch)
    # fused=False would also rule out torch's foreach kernels; None leaves the choice to torch.
    optimizer: torch.optim.Optimizer = choice("optimizer", config.name).target(config, groups.groups, fused or None)
    groups.attach(optimizer)
    if config.lookahead.every is not None:
        Lookahead(config.lookahead, total_steps).attach(optimizer)
    return optimizer


def _has_fused(parameter: Tensor) -> bool:
    return parameter.device.type in ("cpu", "cuda") and parameter.is_floating_point()
