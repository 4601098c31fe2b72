"""Builds the configured model and tries it on a batch of zeros."""

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

#: Floating-point operations that take a second at most.
_FAST = 1e11


@dataclass
class CustomConfig(ModelConfig):
    """Any importable model."""

    kwargs: dict[str, Any] = setting("Arguments passed on to the target, besides those that the data set fixes.")


# The choice `custom` builds what its `_target_` says: any module.
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
        config: Its keys besides ``name``, ``_target_`` and ``kwargs`` are passed to the model as arguments.
        in_channels: Channels of the images. This and the next two are passed where the model takes them by name.
        num_classes: Number of logits a sample.
        image_size: Height and width of the images in pixels.
        allowed: Prefixes that the ``_target_`` of a ``custom`` model may have, where the configuration comes from a
            run folder; ``None`` trusts it.

    Returns:
        The model, on torch's current default device, its parameters drawn from torch's global generator.

    Raises:
        ConfigError: The target is not allowed, can't be imported, is no ``nn.Module`` nor makes one, doesn't take the
            arguments, fails to build (the images are too small for it, say), or has lazy parameters.
    """
    target = _target(config, allowed)
    offered = {"in_channels": in_channels, "num_classes": num_classes, "image_size": image_size}
    own = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    kwargs = own.pop("kwargs", {})
    own = {name: value for name, value in own.items() if name not in ("name", "_target_")}
    model = _call(config._target_, target, offered, {**own, **kwargs})
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
    also: Callable[[nn.Module], None] | None = None,
) -> list[str]:
    """Builds the model without memory (on the meta device) and runs a batch of images through.

    The batch runs without memory too where the model is large or ``custom``; a small one of ours runs on CPU with zeros
    for its parameters, since torch takes a second to import what it computes shapes with. A ``custom`` model that meta
    tensors can't run (its forward depends on values, say) is tried on CPU with its own initial parameters instead.

    Args:
        config: As for :func:`instantiate_model`, and so are the others.
        in_channels: Channels of the images.
        num_classes: Number of logits a sample.
        image_size: Height and width of the images in pixels.
        allowed: Prefixes that the ``_target_`` of a ``custom`` model may have.
        also: Another check of the model, called before the batch runs.

    Returns:
        Names of the trainable parameters that the logits don't depend on.

    Raises:
        ConfigError: What :func:`instantiate_model` raises, or the model fails on such images, or its output is not
            ``[N, num_classes]``.
    """

    def attempt(device: str) -> list[str]:
        # The generators stay as they were: trying a model must not change the run's initial parameters.
        with torch.random.fork_rng(devices=[]):
            with torch.device(device):
                model = instantiate_model(
                    config, in_channels=in_channels, num_classes=num_classes, image_size=image_size, allowed=allowed
                )
                if also is not None:
                    also(model)
            # What a stranger's model does with a batch (it may even hang) is not for here, where nobody watches.
            if device == "meta" and not isinstance(config, CustomConfig) and _runs_fast(model, image_size):
                device = "cpu"
                _fill_with_zeros(model)
            with torch.device(device):
                logits = _try_out(config, model, torch.zeros(2, in_channels, *image_size), num_classes)
            return _unused(model, logits)

    try:
        return attempt("meta")
    except ConfigError:
        if not isinstance(config, CustomConfig):
            raise
        return attempt("cpu")


def _runs_fast(model: nn.Module, image_size: tuple[int, int]) -> bool:
    """Whether two images take a CPU less than a second, were every parameter used at every pixel."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return 2 * 2 * parameters * image_size[0] * image_size[1] < _FAST


def _fill_with_zeros(model: nn.Module) -> None:
    # Module.to_empty makes each tensor like the one it replaces, for which torch imports as much as for a batch.
    model._apply(lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu"))


def _unused(model: nn.Module, logits: Tensor) -> list[str]:
    """Walks the graph behind the logits; cheaper than a backward pass, and no values are needed."""
    reached: set[int] = set()
    seen: set[Any] = set()
    waiting: list[Any] = [logits.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            reached.add(id(node.variable))
        waiting.extend(next_node for next_node, _ in node.next_functions)
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
        # A name that an allowed module merely imported is as foreign as where it comes from.
        home = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}"
        locate("model._target_", home, allowed=allowed)
    if not callable(target) or (isinstance(target, type) and not issubclass(target, nn.Module)):
        raise ConfigError("model._target_", path, "is neither an nn.Module class nor a function that makes one")
    return target  # type: ignore[no-any-return]


def _call(path: str, target: Callable[..., Any], offered: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    if isinstance(target, type) and getattr(target, "__init__", None) is nn.Module.__init__:
        # A module without a constructor of its own: nn.Module's says **kwargs, but takes none.
        offered = {}
    signature = inspect.signature(target)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    arguments = {name: value for name, value in offered.items() if takes_any or name in signature.parameters}
    arguments.update(given)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ConfigError(
            "model.kwargs", dict(given), f"{path} {error}; its arguments: {', '.join(signature.parameters)}"
        ) from error
    try:
        return target(**arguments)
    except ConfigError:
        raise
    except Exception as error:  # whatever a user's constructor raises
        raise ConfigError("model._target_", path, f"fails to build ({type(error).__name__}: {error})") from error


def _try_out(config: ModelConfig, model: nn.Module, images: Tensor, num_classes: int) -> Tensor:
    shape = list(images.shape)
    try:
        logits: Any = model(images)
    except Exception as error:  # whatever a user's forward raises
        raise ConfigError(
            "model._target_", config._target_, f"fails on images {shape} ({type(error).__name__}: {error})"
        ) from error
    expected = [len(images), num_classes]
    found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if found != expected:
        raise ConfigError(
            "model._target_", config._target_, f"returns {found} for images {shape}; logits {expected} are needed"
        )
    result: Tensor = logits
    return result
