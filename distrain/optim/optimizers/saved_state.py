"""Whether an optimizer can go on from a saved state, found out without reading the state or training anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distrain.checkpoint import named_state
from distrain.config.groups import OptimizerConfig
from distrain.errors import described
from distrain.optim.optimizers.build import build_optimizer

#: Longest side of the small parameters on which an update is tried.
_SIDE = 2


def check_saved_state(
    config: OptimizerConfig, model: nn.Module, shapes: Mapping[str, torch.Size], scalars: Mapping[str, Any]
) -> None:
    """Refuses an optimizer's saved state that this run's optimizer can't continue from.

    The shapes are compared. Which values the optimizer needs is not known, since a user may have written it: a new
    optimizer makes one update of small parameters, with small state of the saved names.

    Args:
        config: This run's optimizer.
        model: This run's model, on any device; its values don't matter.
        shapes: Those of the saved tensors, by ``<parameter name>/<state name>``.
        scalars: The saved values that are not tensors, likewise.

    Raises:
        ValueError: A tensor has another shape than its parameter, or the update fails with the saved state.
    """
    named_state.check_shapes(dict(model.named_parameters()), shapes)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if _update(config, parameters, {}, {}) is not None:
        # Such an optimizer needs more than small parameters, so nothing is known.
        return
    problem = _update(config, parameters, shapes, scalars)
    if problem is not None:
        raise ValueError(f"optimizer={config.name} can't continue from the saved state of its parameters: {problem}")


def _update(
    config: OptimizerConfig,
    parameters: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    scalars: Mapping[str, Any],
) -> str | None:
    """Makes one update of small parameters; says why it failed, ``None`` if it did not."""
    small = {name: nn.Parameter(torch.ones(_small(parameter.shape))) for name, parameter in parameters.items()}
    state = {key: torch.ones(_small(shape)) for key, shape in shapes.items()}
    try:
        optimizer = build_optimizer(config, small.items())
        named_state.load_optimizer(optimizer, {parameter: name for name, parameter in small.items()}, state, scalars)
        for parameter in small.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    except Exception as error:  # a user's optimizer may raise anything
        return described(error)
    return None


def _small(shape: torch.Size) -> list[int]:
    return [min(side, _SIDE) for side in shape]
