"""Builds the configured optimizer, with its parameter groups and lookahead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor, nn

from distrain.config.groups import OptimizerConfig
from distrain.config.registry import choice
from distrain.config.schema import Config
from distrain.errors import ConfigError
from distrain.optim.optimizers.groups import ParameterGroups, Parameters
from distrain.optim.optimizers.lookahead import Lookahead


def check_lookahead(config: Config) -> None:
    """Refuses lookahead if updates may be skipped.

    Lookahead counts updates. If one was skipped, the count would never reach the run's total, and lookahead would not
    leave its slow copy in the parameters at the end.

    Raises:
        ConfigError: Lookahead together with a setting that may skip updates.
    """
    every, trainer = config.optimizer.lookahead.every, config.trainer
    if every is not None and (trainer.precision == "fp16" or trainer.on_nonfinite != "stop"):
        raise ConfigError(
            "optimizer.lookahead.every",
            every,
            "needs every update, but trainer.precision=fp16 and trainer.on_nonfinite=skip or rewind may skip updates",
            ["null"],
        )


def build_optimizer(
    config: OptimizerConfig,
    params: Iterable[nn.Parameter] | Iterable[tuple[str, nn.Parameter]],
    *,
    steps_per_epoch: int = 1,
    total_steps: int = 1,
    depths: Mapping[str, int] = MappingProxyType({}),
    dimensions: Mapping[str, int] = MappingProxyType({}),
) -> torch.optim.Optimizer:
    """Builds the configured optimizer.

    Args:
        config: Its ``lr`` is the base rate; the scheduler multiplies it by a factor.
        params: Parameters, or pairs of name and parameter, on the device they are trained on. Names are needed if
            ``config.groups`` or ``config.no_decay`` is not empty or ``config.layer_decay`` is set.
        steps_per_epoch: Updates per epoch. Only groups with ``epochs`` need it: they are frozen after those epochs.
        total_steps: Updates of the whole run. Only lookahead needs it: after the last update it sets the parameters to
            its slow copy.
        depths: The layer of each parameter of the whole model, by name. Only ``layer_decay`` and groups of the head
            need it; a parameter that is not in it has the rate of the last layer.
        dimensions: How many dimensions each parameter of the whole model has, by name. Only ``no_decay`` needs it, and
            only where ``params`` are slices, which are vectors.

    Returns:
        The optimizer. An optimizer of torch uses its fused kernel if ``config.fused`` is set and every parameter is a
        floating-point tensor on the CPU or on CUDA; otherwise torch chooses the implementation. Between steps all
        groups have the same ``lr``, so a scheduler sets one value for all of them; each group's ``lr_factor`` applies
        only within ``step()``.
    """
    parameters = cast(Parameters, list(params))
    fused = config.fused and all(_has_fused(item[1] if isinstance(item, tuple) else item) for item in parameters)
    groups = ParameterGroups(config, parameters, steps_per_epoch, depths, dimensions)
    # fused=False would also exclude torch's foreach kernels; None lets torch choose.
    optimizer: torch.optim.Optimizer = choice("optimizer", config.name).target(config, groups.groups, fused or None)
    groups.attach(optimizer)
    if config.lookahead.every is not None:
        Lookahead(config.lookahead, config.lookahead.every, total_steps).attach(optimizer)
    return optimizer


def _has_fused(parameter: Tensor) -> bool:
    return parameter.device.type in ("cpu", "cuda") and parameter.is_floating_point()
