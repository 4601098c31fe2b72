"""Builds the configured model, and checks it on a batch of zeros."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from distrain.config.registry import choice, locate, register
from distrain.config.schema import ModelConfig, setting
from distrain.errors import ConfigError

#: Floating-point operations that any CPU does in less than a second.
_FAST_FLOPS = 1e11


@dataclass
class CustomConfig(ModelConfig):
    """Keys of ``model=custom``: any importable model."""

    kwargs: dict[str, Any] = setting("Arguments for the target, besides those that the data set determines.")


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
            arguments, fails to build (for example because the images are too small), or has lazy parameters.
    """
    target = _target(config, allowed)
    dataset_arguments = {"in_channels": in_channels, "num_classes": num_classes, "image_size": image_size}
    arguments = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    kwargs = arguments.pop("kwargs", {})
    arguments = {name: value for name, value in arguments.items() if name not in ("name", "_target_")}
    model = _call(config._target_, target, dataset_arguments, {**arguments, **kwargs})
    if not isinstance(model, nn.Module):
        raise ConfigError("model._target_", config._target_, f"makes a {type(model).__name__}, not an nn.Module")
    if any(is_lazy(parameter) for parameter in model.parameters()):
        raise ConfigError("model._target_", config._target_, "has lazy parameters; give every layer its input size")
    return model


def check_model(
    config: ModelConfig,
    *,
    in_channels: int,
    num_classes: int,
    image_size: tuple[int, int],
    allowed: Sequence[str] | None = None,
    extra_check: Callable[[nn.Module], None] | None = None,
) -> list[str]:
    """Builds the model on the meta device (shapes without memory) and runs a batch of two images through it.

    A large or ``custom`` model runs on the meta device too. A small built-in one runs on the CPU with zeros as
    parameters, which is faster: torch needs a second to import the code that computes shapes. A ``custom`` model that
    fails on meta tensors (for example because its forward pass depends on values) is tried again on the CPU, with its
    own initial parameters.

    Args:
        config: As for :func:`instantiate_model`, like the next four.
        in_channels: Channels of the images.
        num_classes: Number of logits per sample.
        image_size: Height and width of the images in pixels.
        allowed: Prefixes that the ``_target_`` of a ``custom`` model may have.
        extra_check: Another check of the model, called before the batch runs.

    Returns:
        Names of trainable parameters that the logits don't depend on.

    Raises:
        ConfigError: What :func:`instantiate_model` raises, or the model fails on such images, or its output is not
            ``[N, num_classes]``.
    """

    def attempt(device: str) -> list[str]:
        # Restore the generator's state afterwards, since the check must not change the run's initial parameters.
        with torch.random.fork_rng(devices=[]):
            with torch.device(device):
                model = instantiate_model(
                    config, in_channels=in_channels, num_classes=num_classes, image_size=image_size, allowed=allowed
                )
                if extra_check is not None:
                    extra_check(model)
            # A custom model stays on the meta device: run for real, it may hang, and no watchdog is active yet.
            if device == "meta" and not isinstance(config, CustomConfig) and _runs_fast(model, image_size):
                device = "cpu"
                _fill_with_zeros(model)
            with torch.device(device):
                logits = _forward(config, model, torch.zeros(2, in_channels, *image_size), num_classes)
            return _unused_parameters(model, logits)

    try:
        return attempt("meta")
    except ConfigError:
        if not isinstance(config, CustomConfig):
            raise
        return attempt("cpu")


def _runs_fast(model: nn.Module, image_size: tuple[int, int]) -> bool:
    """Whether a CPU runs two images in less than a second, by an upper bound: every parameter used at every pixel."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return 2 * 2 * parameters * image_size[0] * image_size[1] < _FAST_FLOPS


def _fill_with_zeros(model: nn.Module) -> None:
    # Not Module.to_empty: it calls torch.empty_like on meta tensors, which causes the slow import that this avoids.
    model._apply(lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu"))


def _unused_parameters(model: nn.Module, logits: Tensor) -> list[str]:
    """Names of parameters that are not in the logits' autograd graph; cheaper than a backward pass."""
    reached: set[int] = set()
    visited: set[Any] = set()
    pending: list[Any] = [logits.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if hasattr(node, "variable"):
            reached.add(id(node.variable))
        pending.extend(next_node for next_node, _ in node.next_functions)
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in reached]


def _target(config: ModelConfig, allowed: Sequence[str] | None) -> Callable[..., Any]:
    path = config._target_
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
        raise ConfigError("model._target_", path, f"fails to build ({type(error).__name__}: {error})") from error


def _forward(config: ModelConfig, model: nn.Module, images: Tensor, num_classes: int) -> Tensor:
    shape = list(images.shape)
    try:
        logits: Any = model(images)
    except Exception as error:  # a user's forward may raise anything
        raise ConfigError(
            "model._target_", config._target_, f"fails on images {shape} ({type(error).__name__}: {error})"
        ) from error
    expected = [len(images), num_classes]
    actual = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if actual != expected:
        raise ConfigError(
            "model._target_", config._target_, f"returns {actual} for images {shape}; logits {expected} are needed"
        )
    result: Tensor = logits
    return result
