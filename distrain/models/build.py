"""Builds the configured model."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from distrain.config.registry import choice, locate, register
from distrain.config.schema import ModelConfig
from distrain.errors import ConfigError, described
from distrain.models.foreign import ForeignModelConfig
from distrain.models.python_object import PythonObjectModelConfig, maker_of_offered_model
from distrain.models.tensors import lay_out_densely


@dataclass
class CustomConfig(ForeignModelConfig):
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
    dataset_arguments = {"in_channels": in_channels, "num_classes": num_classes, "image_size": image_size}
    model = _call(config._target_, target, dataset_arguments, _configured_arguments(config))
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        problem = f"makes a {kind}, not an nn.Module; name a class or a function that returns one module"
        raise ConfigError("model._target_", config._target_, problem)
    lay_out_densely(config._target_, model)
    return model


def _configured_arguments(config: ModelConfig) -> dict[str, Any]:
    """The model's arguments in its configuration."""
    base = ForeignModelConfig if isinstance(config, ForeignModelConfig) else ModelConfig
    others = {"kwargs", *(field.name for field in dataclasses.fields(base))}
    own = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name not in others}
    return {**own, **getattr(config, "kwargs", {})}


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
        home = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}"
        locate("model._target_", home, allowed=allowed)
    if not callable(target) or (isinstance(target, type) and not issubclass(target, nn.Module)):
        raise ConfigError("model._target_", path, "is neither an nn.Module class nor a function that makes one")
    return target  # type: ignore[no-any-return]


def _call(path: str, target: Callable[..., Any], optional: Mapping[str, Any], required: Mapping[str, Any]) -> Any:
    """Calls the target with all ``required`` arguments, and those ``optional`` ones that it accepts."""
    if isinstance(target, type) and getattr(target, "__init__", None) is nn.Module.__init__:
        # A module without its own constructor: nn.Module's declares **kwargs but rejects any argument.
        optional = {}
    signature = inspect.signature(target)
    accepts_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    arguments = {name: value for name, value in optional.items() if accepts_any or name in signature.parameters}
    arguments.update(required)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ConfigError(
            "model.kwargs", dict(required), f"{path} {error}; its arguments: {', '.join(signature.parameters)}"
        ) from error
    try:
        return target(**arguments)
    except ConfigError:
        raise
    except Exception as error:  # a user's constructor may raise anything
        raise ConfigError("model._target_", path, f"fails to build {described(error)}") from error
