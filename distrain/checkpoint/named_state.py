"""Optimizer state by the unsplit model's parameter names, so that any strategy can load any other's state."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from distrain.checkpoint.module_state import is_extra_state
from distrain.checkpoint.restore_report import RestoredPart
from distrain.checkpoint.saved_tensors import described


def optimizer_state(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state by parameter name.

    Returns:
        The tensors as ``<parameter name>/<state name>``, and the other values with the same kind of keys.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{names[parameter]}/{key}"] = value
            elif value is not None:
                scalars[f"{names[parameter]}/{key}"] = value
    return tensors, scalars


def check_optimizer(name: str, scalars: Mapping[str, Any]) -> None:
    """Compares this run's optimizer with the one of the saved run.

    Args:
        name: This run's ``optimizer.name``.
        scalars: The saved scalars.

    Raises:
        ValueError: They differ; one optimizer's state has no meaning for another.
    """
    saved = scalars["optimizer_name"]
    if saved != name:
        raise ValueError(f"it was saved with optimizer={saved}, and this run has optimizer={name}")


def has_shape_of_parameter(state_name: str, shape: torch.Size, parameter: Tensor) -> bool:
    """Whether a tensor of an optimizer's state belongs to the elements of its parameter, as a moment does.

    The others are single numbers, such as a step count; they stay on the CPU, a scalar parameter's moments don't.
    """
    return len(shape) > 0 or (parameter.dim() == 0 and state_name != "step")


def check_shapes(parameters: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Compares the shapes of an optimizer's saved tensors with those of the parameters they belong to.

    Args:
        parameters: This run's parameters by name; the state of others is ignored.
        shapes: Those of the saved tensors, by ``<parameter name>/<state name>``.

    Raises:
        ValueError: One differs.
    """
    for key, shape in shapes.items():
        name, _, state_name = key.rpartition("/")
        parameter = parameters.get(name)
        if parameter is None or not has_shape_of_parameter(state_name, shape, parameter):
            continue
        if shape != parameter.shape:
            raise ValueError(f"optimizer state {key} is {tuple(shape)}, the parameter {tuple(parameter.shape)}")


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[Tensor, str],
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, Any],
) -> None:
    """Loads what :func:`optimizer_state` returned; the state of parameters that this optimizer doesn't hold is ignored.

    Raises:
        ValueError: A tensor's shape differs from its parameter's.
    """
    parameters = {name: parameter for parameter, name in names.items()}
    check_shapes(parameters, {key: tensor.shape for key, tensor in described(tensors).items()})
    load_entries(optimizer, parameters, itertools.chain(tensors.items(), scalars.items()))


def load_entries(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], entries: Iterable[tuple[str, Any]]
) -> None:
    """Loads what :func:`optimizer_state` returned, one entry after the other; shapes are not compared.

    Args:
        optimizer: Gets the state.
        parameters: Those that it holds by name; the state of others is ignored.
        entries: Tensors and other values with their keys.
    """
    for key, value in entries:
        name, _, state_name = key.rpartition("/")
        if name not in parameters:
            continue
        parameter = parameters[name]
        if isinstance(value, Tensor) and has_shape_of_parameter(state_name, value.shape, parameter):
            # Fused kernels need the parameter's dtype, device and strides.
            value = torch.empty_like(parameter).copy_(value)
        elif isinstance(value, Tensor):
            value = value.clone()
            if any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups):
                value = value.to(parameter.device)
        optimizer.state[parameter][state_name] = value


#: Name of the part that holds the state of each rank only, such as its copy of the model in local SGD.
LOCAL_STATE = "local state"


def restored_parts(saved: Mapping[str, Any], dtype: torch.dtype) -> list[RestoredPart]:
    """What becomes of a saved model, optimizer and local state when a strategy loads them by name.

    Args:
        saved: A strategy's saved state. ``copies`` among its scalars is the number of ranks whose copies of the model
            were averaged into the saved one.
        dtype: Floating-point type of this run's parameters.
    """
    tensors = [tensor for name, tensor in described(saved["model"]).items() if not is_extra_state(name)]
    formats = {tensor.dtype for tensor in tensors if tensor.dtype.is_floating_point} - {dtype}
    copies = int(saved["scalars"].get("copies", 1))
    merged = RestoredPart("model", "redistributed", f"the mean of {copies} ranks' copies")
    moments = RestoredPart("optimizer", "redistributed", f"moments are the mean of {copies} ranks'")
    if copies == 1:
        merged = RestoredPart("model", "exact", f"{len(saved['model'])} tensors, by name")
        moments = RestoredPart("optimizer", "exact", f"{len(saved['optimizer'])} tensors, by name")
    if formats:
        merged = RestoredPart("model", "changed", f"{', '.join(sorted(map(_short, formats)))} to {_short(dtype)}")
    if not saved["optimizer"] and not saved["scalars"]["optimizer"]:
        moments = RestoredPart("optimizer", "absent", "it had no state")
    elif formats:
        moments = RestoredPart("optimizer", "changed", merged.why)
    local = RestoredPart(LOCAL_STATE, "absent", "all ranks had the same model")
    if copies > 1:
        local = RestoredPart(
            LOCAL_STATE, "reset", "all ranks continue from the mean; the differences between their copies are lost"
        )
    return [merged, moments, local]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
