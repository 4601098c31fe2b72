"""optimizer=custom: an optimizer of torch, of another library or of the user's, by its dotted path."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from distrain.config import user_code
from distrain.config.groups import OptimizerConfig
from distrain.config.registry import locate, register
from distrain.config.setting import setting
from distrain.errors import ConfigError
from distrain.optim.uncompiled import without_compiler_hooks

_KEY = "optimizer._target_"
#: Arguments that other keys set.
_SET_ELSEWHERE = {
    "lr": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "fused": "optimizer.fused",
    "params": "optimizer.groups",
}


@dataclass
class CustomOptimizerConfig(OptimizerConfig):
    """Keys of ``optimizer=custom``."""

    _target_: str = setting("Dotted path of a torch.optim.Optimizer, or of a function that makes one.")
    kwargs: dict[str, Any] = setting("Arguments for the target, besides lr, weight_decay and the parameters.")

    def __post_init__(self) -> None:
        """Refuses arguments that have a key of their own.

        Raises:
            ConfigError: ``kwargs`` has one of them.
        """
        for name in self.kwargs:
            if name in _SET_ELSEWHERE:
                raise ConfigError(f"optimizer.kwargs.{name}", self.kwargs[name], f"is set by {_SET_ELSEWHERE[name]}")


@register("optimizer", "custom", CustomOptimizerConfig)
def custom(config: CustomOptimizerConfig, groups: list[dict[str, Any]], fused: bool | None) -> torch.optim.Optimizer:
    """The optimizer that ``_target_`` names; ``weight_decay`` and ``fused`` are given to it if it takes them.

    Raises:
        ConfigError: There is no such optimizer, it doesn't take the arguments, or its step needs a closure.
    """
    path = config._target_
    target = locate(_KEY, path)
    if not callable(target) or (isinstance(target, type) and not issubclass(target, torch.optim.Optimizer)):
        raise ConfigError(_KEY, path, "is neither a torch.optim.Optimizer nor a function that makes one")
    if isinstance(target, type) and _needs_closure(target):
        problem = "its step calls a closure that computes the loss again, and strategies own forward and backward"
        raise ConfigError(_KEY, path, f"{problem}; choose an optimizer whose step() needs none")
    arguments = _arguments(config, target, fused)
    if isinstance(target, type) and target.__module__.startswith("torch.optim."):
        target = without_compiler_hooks(target)
    optimizer = user_code.build(_KEY, path, lambda: target(groups, **arguments))
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(_KEY, path, f"makes a {type(optimizer).__name__}, not a torch.optim.Optimizer")
    if any("lr" not in group for group in optimizer.param_groups):
        raise ConfigError(_KEY, path, "has no learning rate `lr` in its parameter groups, which schedules set")
    return optimizer


def _needs_closure(kind: type[torch.optim.Optimizer]) -> bool:
    closure = inspect.signature(inspect.unwrap(kind.step)).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def _arguments(config: CustomOptimizerConfig, target: Any, fused: bool | None) -> dict[str, Any]:
    """The target's arguments besides the parameters."""
    path, arguments = config._target_, {"lr": config.lr, **config.kwargs}
    parameters = user_code.signature(target).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if "weight_decay" in parameters or (takes_any and config.weight_decay):
        arguments["weight_decay"] = config.weight_decay
    elif config.weight_decay:
        raise ConfigError("optimizer.weight_decay", config.weight_decay, f"{path} takes none", ["0"])
    # Only one of these implementations can be chosen.
    if fused and "fused" in parameters and not {"foreach", "capturable", "differentiable"} & set(config.kwargs):
        arguments["fused"] = True
    user_code.check_arguments("optimizer.kwargs", config.kwargs, path, target, arguments, positional=1)
    return arguments
