"""Calls of classes and functions that a configuration names by a dotted path, with arguments that it gives."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from inspect import Parameter
from typing import Any, TypeVar

from distrain.errors import ConfigError, described

T = TypeVar("T")


def signature(target: Callable[..., Any], *, eval_str: bool = False) -> inspect.Signature:
    """The arguments that a target takes; any, for a builtin that doesn't tell.

    Args:
        target: A class or function.
        eval_str: As for ``inspect.signature``.
    """
    try:
        return inspect.signature(target, eval_str=eval_str)
    except ValueError:
        return inspect.Signature(
            [Parameter("args", Parameter.VAR_POSITIONAL), Parameter("kwargs", Parameter.VAR_KEYWORD)]
        )


def check_arguments(
    key: str,
    kwargs: Mapping[str, Any],
    path: str,
    target: Callable[..., Any],
    arguments: Mapping[str, Any],
    *,
    positional: int = 0,
) -> None:
    """Refuses arguments that a target doesn't take, as far as its signature tells.

    Args:
        key: The key of its arguments, such as ``loss.kwargs``.
        kwargs: The value of this key.
        path: The target's dotted path.
        target: A class or function.
        arguments: All arguments that it is to get by name.
        positional: How many it is to get before them.

    Raises:
        ConfigError: It doesn't take them.
    """
    known = signature(target)
    try:
        known.bind(*[None] * positional, **arguments)
    except TypeError as error:
        problem = f"{path} {error}; its arguments: {', '.join(known.parameters)}"
        raise ConfigError(key, dict(kwargs), problem) from error


def build(key: str, path: str, make: Callable[[], T]) -> T:
    """What a call gives.

    Args:
        key: The key of the target's path, such as ``loss._target_``.
        path: The path.
        make: Calls the target.

    Raises:
        ConfigError: The call raises an error.
    """
    try:
        return make()
    except ConfigError:
        raise
    except Exception as error:  # a user's code may raise anything
        raise ConfigError(key, path, f"fails to build {described(error)}") from error
