"""Builds the configured model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from distrain.config import user_code
from distrain.config.groups import ModelConfig
from distrain.config.registry import choice, locate, register
from distrain.errors import ConfigError
from distrain.models.arguments import (
    DataShape,
    call,
    check_names,
    data_arguments,
    keywords,
    problem_with,
    with_plain_arguments,
)
from distrain.models.foreign import ForeignModelConfig, UserModelConfig, identity
from distrain.models.python_object import PythonObjectModelConfig, maker_of_offered_model
from distrain.models.tensors import lay_out_densely


@dataclass
class CustomConfig(UserModelConfig):
    """Keys of ``model=custom``: any importable model."""


# The target is only a placeholder: `custom` builds what `_target_` names.
register("model", "custom", CustomConfig)(nn.Module)


def instantiate_model(
    config: ModelConfig,
    *,
    in_channels: int,
    num_classes: int,
    image_size: tuple[int, int],
    allowed: Sequence[str] | None = None,
) -> nn.Module:
    """Builds the configured model.

    Args:
        config: Keys besides ``name``, ``_target_`` and ``kwargs`` are passed to the model as arguments.
        in_channels: Channels of the images. This argument and the next two are passed only if the model accepts them.
        num_classes: Number of logits per sample.
        image_size: Height and width of the images in pixels.
        allowed: Prefixes that the ``_target_`` of a ``custom`` model may have; needed if the configuration comes from
            an untrusted run folder. ``None`` allows everything.

    Returns:
        The model on torch's current default device, with parameters drawn from torch's global generator.

    Raises:
        ConfigError: The target is not allowed, can't be imported, does not make an ``nn.Module``, doesn't accept the
            arguments, fails to build (for example because the images are too small), or has parameters or buffers that
            can't be trained as they lie in memory; see :func:`distrain.models.tensors.lay_out_densely`.
    """
    target = _target(config, allowed)
    arguments = _arguments(config, target, DataShape(in_channels, num_classes, image_size))
    model = _call(config, target, arguments)
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        problem = f"makes a {kind}, not an nn.Module; name a class or a function that returns one module"
        raise ConfigError(*identity(config), problem)
    lay_out_densely(config._target_, model)
    return model


def model_arguments(config: ModelConfig, shape: DataShape, allowed: Sequence[str] | None = None) -> dict[str, Any]:
    """The arguments by name with which :func:`instantiate_model` calls what ``model._target_`` names.

    Raises:
        ConfigError: As :func:`instantiate_model`; the model is not built.
    """
    return _arguments(config, _target(config, allowed), shape)


def _arguments(config: ModelConfig, target: Callable[..., Any], shape: DataShape) -> dict[str, Any]:
    """The arguments of the data set and of the configuration."""
    configured, names = _configured_arguments(config), _named_arguments(config)
    check_names(names, configured.keys())
    return {**data_arguments(config._target_, target, shape, names, configured.keys()), **configured}


def _configured_arguments(config: ModelConfig) -> dict[str, Any]:
    """The model's arguments in its configuration."""
    if isinstance(config, ForeignModelConfig):
        return config.target_arguments()
    others = {"kwargs", *(field.name for field in dataclasses.fields(ModelConfig))}
    own = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name not in others}
    return {**own, **getattr(config, "kwargs", {})}


def _named_arguments(config: ModelConfig) -> Mapping[str, str] | None:
    return config.arguments if isinstance(config, UserModelConfig) else None


def is_untold(config: ModelConfig, quantity: str, allowed: Sequence[str] | None = None) -> bool:
    """Whether the model has arguments, of which none is known to be one of the quantities that the data set determines.

    Args:
        config: As for :func:`instantiate_model`; its model can be built.
        quantity: ``classes`` or ``channels``.
        allowed: As for :func:`instantiate_model`.
    """
    names = _named_arguments(config)
    known = keywords(_target(config, allowed))
    is_told = quantity in (known.found() if names is None else names).values()
    return not is_told and (bool(known.parameters) or known.takes_more)


def _target(config: ModelConfig, allowed: Sequence[str] | None) -> Callable[..., Any]:
    path = config._target_
    if isinstance(config, PythonObjectModelConfig):
        return maker_of_offered_model()  # the user's own program has it already, so no import need be allowed
    if not isinstance(config, CustomConfig):
        registered = choice("model", config.name).target
        expected = f"{registered.__module__}.{registered.__qualname__}"
        if path != expected:
            raise ConfigError(
                "model._target_", path, f"model={config.name} is {expected}; for another class use model=custom"
            )
        return registered
    target = locate("model._target_", path, allowed=allowed)
    if allowed is not None:
        # An allowed module may have imported the object from a module that is not allowed.
        made_by = target
        while isinstance(made_by, functools.partial):
            made_by = made_by.func
        home = f"{getattr(made_by, '__module__', '')}.{getattr(made_by, '__qualname__', '')}"
        locate("model._target_", home, allowed=allowed)
    if not callable(target) or (isinstance(target, type) and not issubclass(target, nn.Module)):
        raise ConfigError("model._target_", path, "is neither an nn.Module class nor a function that makes one")
    return with_plain_arguments(target)


def _call(config: ModelConfig, target: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    if problem := problem_with(target, arguments):
        if "missing" in problem:
            problem += "; +model.kwargs.NAME=… gives one a value, model.arguments='{NAME: classes}' says what it means"
        raise ConfigError("model.kwargs", _configured_arguments(config), f"{config._target_} {problem}")
    return user_code.build(*identity(config), lambda: call(target, arguments))
