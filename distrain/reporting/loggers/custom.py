"""``logger=custom``: a logger of the user's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import override

from distrain.config import user_code
from distrain.config.groups import LoggerConfig
from distrain.config.registry import locate, register
from distrain.config.setting import setting
from distrain.errors import ConfigError
from distrain.reporting.loggers.base import Logger

_KEY = "logger._target_"


@dataclass
class CustomLoggerConfig(LoggerConfig):
    """Keys of ``logger=custom``."""

    _target_: str = setting("Dotted path of a class of distrain.reporting.loggers.base.Logger.")
    kwargs: dict[str, Any] = setting(
        "Keyword arguments for the class; run_dir is added where it takes one.", default_factory=dict
    )

    @override
    def check(self) -> None:
        _target(self, Path())


@register("logger", "custom", CustomLoggerConfig)
def make(config: CustomLoggerConfig, run_dir: Path) -> Logger:
    """A class of yours, which gets every metric, on rank 0."""
    target, arguments = _target(config, run_dir)
    return user_code.build(_KEY, config._target_, lambda: target(**arguments))


def _target(config: CustomLoggerConfig, run_dir: Path) -> tuple[Callable[..., Logger], dict[str, Any]]:
    """The class, and what it is called with.

    Raises:
        ConfigError: There is no such class, or it doesn't take the arguments.
    """
    target = locate(_KEY, config._target_)
    if not isinstance(target, type) or not issubclass(target, Logger):
        raise ConfigError(_KEY, config._target_, f"is not a class of {Logger.__module__}.{Logger.__name__}")
    takes_folder = "run_dir" in user_code.signature(target).parameters
    arguments = {**({"run_dir": run_dir} if takes_folder else {}), **config.kwargs}
    user_code.check_arguments("logger.kwargs", config.kwargs, config._target_, target, arguments)
    return target, arguments
