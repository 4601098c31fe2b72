"""Losses that users wrote: in torch's convention, ``loss(outputs, targets)``, and tried out before they are trusted."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distrain.config import registry, user_code
from distrain.config.registry import locate
from distrain.data.base import IGNORED, DataSpec
from distrain.errors import ConfigError, described

LossFunction = Callable[[Tensor, Tensor], Tensor]

_KEY = "loss._target_"
#: Longest side in pixels of the masks of a trial.
_SIDE = 8
#: Samples of a trial; they are tried together, and in parts of 1 and 2.
_SAMPLES = 3


def make(path: str, kwargs: Mapping[str, Any]) -> LossFunction:
    """The loss at a dotted path; asked for a number for each sample (``reduction="none"``) if it can be asked.

    Args:
        path: A function, which gets ``kwargs`` in each call; or a class, which gets them when it is made.
        kwargs: Keyword arguments; lists of numbers whose names end with ``weight`` become tensors.

    Raises:
        ConfigError: There is no such loss, it doesn't take the arguments, or it has parameters to train.
    """
    target = locate(_KEY, path)
    if not callable(target):
        raise ConfigError(_KEY, path, "is neither a function of (outputs, targets) nor a class of such functions")
    if kwargs.get("reduction") not in (None, "none", "sum"):
        problem = "a mean over the samples of one rank can't be added up; leave reduction out"
        raise ConfigError("loss.kwargs", dict(kwargs), problem)
    arguments = {name: _as_tensor(name, value) for name, value in kwargs.items()}
    is_class = isinstance(target, type)
    if "reduction" in user_code.signature(target).parameters:
        arguments = {"reduction": "none", **arguments}
    user_code.check_arguments("loss.kwargs", kwargs, path, target, arguments, positional=0 if is_class else 2)
    if not is_class:
        return functools.partial(target, **arguments)
    loss = user_code.build(_KEY, path, lambda: target(**arguments))
    if not callable(loss):
        raise ConfigError(_KEY, path, "makes objects that can't be called with (outputs, targets)")
    if isinstance(loss, nn.Module) and any(parameter.requires_grad for parameter in loss.parameters()):
        raise ConfigError(_KEY, path, "has parameters, which nobody would train; make them part of the model")
    return loss  # type: ignore[no-any-return]


def check_allowed(path: str, allowed: Sequence[str]) -> None:
    """Refuses a loss that a run folder names, unless it is torch's or the user allows it; imports only such.

    Raises:
        ConfigError: The loss, or the module that defines it, is not allowed.
    """
    is_torchs = path.rpartition(".")[0] in ("torch.nn", "torch.nn.functional")
    prefixes = ["torch.nn"] if is_torchs else allowed
    target = locate(_KEY, path, allowed=prefixes)
    # An allowed module may have imported the object from one that is not allowed.
    home = f"{getattr(target, '__module__', type(target).__name__)}.{getattr(target, '__qualname__', '')}"
    registry.check_allowed(_KEY, home, prefixes)


def _as_tensor(name: str, value: Any) -> Any:
    is_numbers = isinstance(value, list) and all(isinstance(item, int | float) for item in value)
    return torch.tensor(value, dtype=torch.float32) if is_numbers and name.endswith("weight") else value


def sum_of(result: Tensor) -> Tensor:
    """The sum of the samples' losses: of each sample, the mean of its numbers; a single number as it is."""
    return result if result.dim() == 0 else result.flatten(1).mean(1).sum() if result.dim() > 1 else result.sum()


def for_torch(outputs: Tensor, targets: Tensor, kind: str) -> Tensor:
    """Targets of the types that torch's losses take: class numbers as int64, all others as the outputs' type."""
    return targets.long() if kind in ("class", "mask") else targets.to(outputs.dtype)


def is_mean(key: str, name: str, loss: LossFunction, spec: DataSpec) -> bool:
    """Finds out whether a loss gives the mean or the sum of its samples' losses, by calling it on random outputs.

    Args:
        key: The configuration key that names the loss, for messages.
        name: Its value.
        loss: A function of outputs and targets that gives a number.
        spec: The data that the loss is for.

    Raises:
        ConfigError: It fails, gives something else, or a sample's loss depends on the other samples.
    """
    sums, means = True, True
    for seed in range(2):
        outputs, targets = _drawn(spec, seed)
        whole, first, rest = (
            _value(key, name, loss, outputs[part], targets[part]) for part in (slice(0, 3), slice(0, 1), slice(1, 3))
        )
        sums = sums and torch.allclose(whole, first + rest, rtol=1e-4, atol=1e-6)
        means = means and torch.allclose(_SAMPLES * whole, first + 2 * rest, rtol=1e-4, atol=1e-6)
    if sums and means:
        raise ConfigError(key, name, "gives 0 for random outputs, so nobody can tell whether it is a sum or a mean")
    if not sums and not means:
        problem = (
            "a sample's loss depends on the other samples (its value for 3 samples is neither the sum nor the mean"
        )
        way_out = "parts of a batch can't be added up then: let it give a number for each sample by itself"
        raise ConfigError(key, name, f"{problem} of theirs), as with a contrastive loss; {way_out}")
    return means


def _drawn(spec: DataSpec, seed: int) -> tuple[Tensor, Tensor]:
    """Random outputs and targets of three samples."""
    generator, classes = torch.Generator().manual_seed(seed), len(spec.classes)
    place = (min(spec.height, _SIDE), min(spec.width, _SIDE)) if spec.target == "mask" else ()
    outputs = torch.randn(_SAMPLES, classes, *place, generator=generator) * (1 + 2 * seed)
    if spec.target == "numbers":
        return outputs, torch.randn(_SAMPLES, classes, generator=generator)
    if spec.target == "labels":
        return outputs, torch.randint(2, (_SAMPLES, classes), generator=generator, dtype=torch.uint8)
    if spec.target == "class":
        return outputs, torch.randint(classes, (_SAMPLES,), generator=generator)
    masks = torch.randint(classes, (_SAMPLES, *place), generator=generator).to(torch.uint8)
    masks[:, 0, 0] = IGNORED
    return outputs, masks


def _value(key: str, name: str, loss: LossFunction, outputs: Tensor, targets: Tensor) -> Tensor:
    outputs = outputs.clone().requires_grad_()
    shapes = f"for outputs {list(outputs.shape)} and targets {list(targets.shape)}"
    try:
        with torch.enable_grad():
            result: Any = loss(outputs, targets.clone())
    except Exception as error:  # a user's loss may raise anything
        hint = ""
        if bool((targets == IGNORED).any()) and targets.dtype == torch.uint8 and outputs.dim() > 2:
            hint = f"; pixels of unknown class have the value {IGNORED}: loss.kwargs={{ignore_index: {IGNORED}}}"
        raise ConfigError(key, name, f"fails {shapes} {described(error)}{hint}") from error
    if not isinstance(result, Tensor) or not result.is_floating_point():
        kind = result.dtype if isinstance(result, Tensor) else f"a {type(result).__name__}"
        raise ConfigError(key, name, f"gives {kind} {shapes}; a tensor of real numbers is needed")
    if result.dim() and len(result) != len(outputs):
        problem = f"gives {list(result.shape)} {shapes}; one number, or one for each sample, is needed"
        raise ConfigError(key, name, problem)
    if not result.requires_grad:
        raise ConfigError(key, name, "doesn't depend on the outputs in a way that can be trained")
    if not bool(result.isfinite().all()):
        raise ConfigError(key, name, f"gives NaN or an infinite number {shapes}, random ones")
    return sum_of(result.detach())
