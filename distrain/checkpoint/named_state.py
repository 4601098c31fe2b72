"""Model and optimizer state by the unsplit model's parameter names, so that any strategy reads what any other wrote."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distrain.checkpoint.restore_report import Carried


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


#: The part of a saved run that holds what its strategy's ranks had each for themselves.
LOCAL = "local state"


def carried(saved: Mapping[str, Any], dtype: torch.dtype) -> list[Carried]:
    """What becomes of a saved model and optimizer, which are loaded by name, and of what is not.

    Args:
        saved: What a strategy saved; ``copies`` among its scalars says of how many ranks' copies the model is the mean.
        dtype: Floating-point type of this run's parameters.
    """
    formats = {tensor.dtype for tensor in saved["model"].values() if tensor.is_floating_point()} - {dtype}
    copies = int(saved["scalars"].get("copies", 1))
    merged = Carried("model", "redistributed", f"the mean of {copies} ranks' copies")
    moments = Carried("optimizer", "redistributed", f"moments are the mean of {copies} ranks'")
    if copies == 1:
        merged = Carried("model", "exact", f"{len(saved['model'])} tensors, by name")
        moments = Carried("optimizer", "exact", f"{len(saved['optimizer'])} tensors, by name")
    if formats:
        merged = Carried("model", "changed", f"{', '.join(sorted(map(_short, formats)))} to {_short(dtype)}")
    if not saved["optimizer"] and not saved["scalars"]["optimizer"]:
        moments = Carried("optimizer", "absent", "it had kept nothing")
    elif formats:
        moments = Carried("optimizer", "changed", merged.why)
    local = Carried(LOCAL, "absent", "all ranks had the same model")
    if copies > 1:
        local = Carried(LOCAL, "reset", "all ranks go on from the mean; how far their copies had parted is lost")
    return [merged, moments, local]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
