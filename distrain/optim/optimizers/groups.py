"""Parameter groups with their own learning-rate factor, weight decay, or number of epochs in which they are trained."""

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
    """Sorts parameters into an optimizer's groups; the first group holds those that no pattern matches.

    All groups have the same ``lr`` except while the optimizer steps. So whoever sets the learning rate needs to know
    nothing of groups, and neither does a parameter server, which holds a part of the parameters and knows no epochs.
    Epochs are counted in updates. A server that makes one update for each worker's push therefore reaches a given
    epoch earlier, by a factor of the number of workers.

    Args:
        config: The configured groups; a parameter belongs to the first one whose pattern matches its name.
        parameters: Pairs of name and parameter; without names if ``config`` is empty.
        steps_per_epoch: Updates per epoch.

    Attributes:
        groups: Parameter groups as ``torch.optim.Optimizer`` takes them.

    Raises:
        TypeError: Groups are configured and the parameters have no names.
    """

    def __init__(self, config: Sequence[GroupConfig], parameters: Parameters, steps_per_epoch: int) -> None:
        self._freeze_after = [
            None if group.epochs is None else round(group.epochs * steps_per_epoch) for group in config
        ]
        self.groups: list[dict[str, Any]] = [{"params": parameters}]
        if not config:
            return
        members: list[list[tuple[str, nn.Parameter]]] = [[] for _ in range(len(config) + 1)]
        for item in parameters:
            if not isinstance(item, tuple):
                raise TypeError("optimizer groups need named parameters")
            members[_group_index(config, item[0])].append(item)
        self.groups = [{**parameter_group(members[0]), "lr_factor": 1.0}]
        for group, matched, last in zip(config, members[1:], self._freeze_after, strict=True):
            options: dict[str, Any] = {"params": matched, "lr_factor": group.lr_factor, "last_update": last}
            if group.weight_decay is not None:
                options["weight_decay"] = group.weight_decay
            self.groups.append(options)
        self.groups = [group for index, group in enumerate(self.groups) if group["params"] or index == 0]

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes an optimizer apply each group's own factor and freeze groups after their last epoch."""
        if any(group.get("lr_factor", 1.0) != 1.0 for group in optimizer.param_groups) or self._freezes:
            optimizer.register_step_pre_hook(self._before_step)
            optimizer.register_step_post_hook(self._after_step)

    @property
    def _freezes(self) -> bool:
        return any(last is not None for last in self._freeze_after)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._completed = updates.completed(optimizer) if self._freezes else 0
        self._rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            last = group.get("last_update")
            # With a rate of 0, neither gradient nor momentum nor weight decay changes a parameter.
            frozen = last is not None and self._completed >= last
            group["lr"] = 0.0 if frozen else group["lr"] * group.get("lr_factor", 1.0)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate
        if self._freezes:
            updates.record(optimizer, self._completed + 1)


def parameter_group(parameters: Sequence[Any], *, named: bool = True) -> dict[str, Any]:
    """An optimizer's parameter group; torch requires ``param_names`` in an empty group too if other groups have names.

    Args:
        parameters: Parameters, or pairs of name and parameter.
        named: Whether the optimizer's parameters have names.
    """
    return {"params": list(parameters), **({"param_names": []} if named and not parameters else {})}


def check_groups(config: Sequence[GroupConfig], model: nn.Module) -> None:
    """Refuses groups without parameters, since their pattern must be mistyped.

    Raises:
        ConfigError: A group's pattern matches no trainable parameter that is not already in an earlier group.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    used = {_group_index(config, name) for name in names}
    for index, group in enumerate(config):
        if index + 1 not in used:
            problem = "matches no parameter of the model that is not already in an earlier group"
            raise ConfigError(f"optimizer.groups[{index}].match", group.match, problem, names)


def _group_index(config: Sequence[GroupConfig], name: str) -> int:
    """0 if no pattern matches the name, else 1 + the index of the first group whose pattern does."""
    matching = (index for index, group in enumerate(config, 1) if fnmatch.fnmatchcase(name, group.match))
    return next(matching, 0)
