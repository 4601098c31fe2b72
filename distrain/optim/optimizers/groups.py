"""Parameters that are treated in another way than the rest: by their own factor of the rate, decay, or for how long."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from distrain.config.schema import GroupConfig
from distrain.errors import ConfigError
from distrain.optim.optimizers import updates

Parameters = list[nn.Parameter] | list[tuple[str, nn.Parameter]]


class ParameterGroups:
    """Parameters sorted into an optimizer's groups, the rest first.

    All groups keep the same rate, which is the whole model's, but while the optimizer steps: so it doesn't matter who
    sets the rate and who makes the updates (a server, say, which sees a part of the parameters and no epochs). Epochs
    are counted in updates; where a server makes one for each worker's push, they are over so many times earlier.

    Args:
        config: The groups beside the rest; a parameter is in the first whose pattern its name fits.
        parameters: With names, or all without where there are no groups.
        steps_per_epoch: Updates of an epoch.

    Attributes:
        groups: Parameter groups as ``torch.optim.Optimizer`` takes them.
    """

    def __init__(self, config: Sequence[GroupConfig], parameters: Parameters, steps_per_epoch: int) -> None:
        self._frozen_after = [
            None if group.epochs is None else round(group.epochs * steps_per_epoch) for group in config
        ]
        self.groups: list[dict[str, Any]] = [{"params": parameters}]
        if not config:
            return
        sorted_in: list[list[tuple[str, nn.Parameter]]] = [[] for _ in range(len(config) + 1)]
        for item in parameters:
            assert isinstance(item, tuple), "groups go by name"
            sorted_in[_place(config, item[0])].append(item)
        self.groups = [{**parameter_group(sorted_in[0]), "lr_factor": 1.0}]
        for group, held, last in zip(config, sorted_in[1:], self._frozen_after, strict=True):
            made: dict[str, Any] = {"params": held, "lr_factor": group.lr_factor, "last_update": last}
            if group.weight_decay is not None:
                made["weight_decay"] = group.weight_decay
            self.groups.append(made)
        self.groups = [group for position, group in enumerate(self.groups) if group["params"] or not position]

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes an optimizer step by the groups' own rates."""
        if any(group.get("lr_factor", 1.0) != 1.0 for group in optimizer.param_groups) or self._freezes:
            optimizer.register_step_pre_hook(self._before)
            optimizer.register_step_post_hook(self._after)

    @property
    def _freezes(self) -> bool:
        return any(last is not None for last in self._frozen_after)

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._done = updates.completed(optimizer) if self._freezes else 0
        self._rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            last = group.get("last_update")
            # With a rate of 0 neither gradient, momentum nor decay moves anything.
            group["lr"] = 0.0 if last is not None and self._done >= last else group["lr"] * group.get("lr_factor", 1.0)

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate
        if self._freezes:
            updates.record(optimizer, self._done + 1)


def parameter_group(parameters: Sequence[Any], *, named: bool = True) -> dict[str, Any]:
    """An optimizer's group; torch wants to know of an empty one, too, that its parameters would have names."""
    return {"params": list(parameters), **({"param_names": []} if named and not parameters else {})}


def check_groups(config: Sequence[GroupConfig], model: nn.Module) -> None:
    """Refuses groups without parameters, which would be a mistyped name.

    Raises:
        ConfigError: As said.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    found = {_place(config, name) for name in names}
    for position, group in enumerate(config):
        if position + 1 not in found:
            problem = "fits no parameter of the model that an earlier group has not"
            raise ConfigError(f"optimizer.groups[{position}].match", group.match, problem, names)


def _place(config: Sequence[GroupConfig], name: str) -> int:
    """0 for the rest, else one more than the position of the group."""
    fitting = (position for position, group in enumerate(config, 1) if fnmatch.fnmatchcase(name, group.match))
    return next(fitting, 0)
