"""Model and optimizer state by the unsplit model's parameter names, so that any strategy reads what any other wrote."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def optimizer_state(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What an optimizer keeps.

    Returns:
        Tensors as ``<parameter name>/<what>`` and non-tensors in the same way.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for parameter, kept in optimizer.state.items():
        for what, value in kept.items():
            if isinstance(value, Tensor):
                tensors[f"{names[parameter]}/{what}"] = value
            elif value is not None:
                scalars[f"{names[parameter]}/{what}"] = value
    return tensors, scalars


def check_optimizer(name: str, scalars: Mapping[str, Any]) -> None:
    """Compares the optimizer with the one that was saved.

    Raises:
        ValueError: It is another kind, whose state means something else.
    """
    saved = scalars["optimizer_name"]
    if saved != name:
        raise ValueError(f"it was saved with optimizer={saved}, and this run has optimizer={name}")


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[Tensor, str],
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, Any],
) -> None:
    """Gives an optimizer what :func:`optimizer_state` took; state of parameters held elsewhere is left out.

    Raises:
        ValueError: A tensor's shape differs from its parameter's.
    """
    held = {name: parameter for parameter, name in names.items()}
    for key, value in {**tensors, **scalars}.items():
        name, _, what = key.rpartition("/")
        if name not in held:
            continue
        parameter = held[name]
        # A count of steps is a scalar that stays on the CPU; a scalar parameter's moments go where it is.
        if isinstance(value, Tensor) and (value.dim() > 0 or (parameter.dim() == 0 and what != "step")):
            if value.shape != parameter.shape:
                raise ValueError(
                    f"optimizer state {key} is {tuple(value.shape)}, the parameter {tuple(parameter.shape)}"
                )
            # Same type, device and strides as the parameter, as the fused kernels want it.
            value = torch.empty_like(parameter).copy_(value)
        elif isinstance(value, Tensor):
            value = value.clone()
            if any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups):
                value = value.to(parameter.device)
        optimizer.state[parameter][what] = value


def check_names(held: Iterable[str], tensors: Mapping[str, Tensor]) -> None:
    """Compares the names of two models.

    Raises:
        ValueError: A name is missing or too many; the first few are named.
    """
    names = list(held)
    problems = [f"{name} is missing" for name in names if name not in tensors]
    problems += [f"{name} is not in the model" for name in tensors if name not in names]
    _refuse(problems)


def _refuse(problems: list[str]) -> None:
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError("the saved model is not this model: " + "; ".join(problems[:3]) + more)


@torch.no_grad()
def load_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies parameters and buffers into the model, in place.

    Raises:
        ValueError: A name is missing or too many, or a shape differs; the first few are named.
    """
    held = model.state_dict()
    check_names(held, tensors)
    _refuse(
        [
            f"{name} is {tuple(tensors[name].shape)}, the model's {tuple(held[name].shape)}"
            for name in held
            if tensors[name].shape != held[name].shape
        ]
    )
    for name, tensor in held.items():
        tensor.copy_(tensors[name])
