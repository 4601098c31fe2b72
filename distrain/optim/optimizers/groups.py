"""Parameter groups with their own learning-rate factor, weight decay, or number of epochs in which they are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from distrain.config.groups import GroupConfig, OptimizerConfig
from distrain.files.escaping import Lines
from distrain.models.layers import layer_depths, matches, unmatched
from distrain.optim.optimizers import updates

Parameters = list[nn.Parameter] | list[tuple[str, nn.Parameter]]
#: What parameters of an optimizer's group have in common: 0 or 1 + the index of the configured group, the factor of the
#: rate by the layer, and whether ``no_decay`` leaves them their weight decay.
_Key = tuple[int, float, bool]


class ParameterGroups:
    """Sorts parameters into an optimizer's groups; the first group holds those that no pattern matches.

    All groups have the same ``lr`` except while the optimizer steps. So whoever sets the learning rate needs to know
    nothing of groups, and neither does a parameter server, which holds a part of the parameters and knows no epochs.
    Epochs are counted in updates. A server that makes one update for each worker's push therefore reaches a given
    epoch earlier, by a factor of the number of workers.

    Args:
        config: Of the optimizer. A parameter belongs to the first of its groups whose pattern matches its name; with
            ``layer_decay`` each layer's part of a group is a group, and so is what ``no_decay`` names of it.
        parameters: Pairs of name and parameter; without names if there are no groups, ``layer_decay`` or ``no_decay``.
        steps_per_epoch: Updates per epoch.
        depths: The layer of each parameter of the whole model; see :func:`distrain.models.layers.layer_depths`.
        dimensions: How many dimensions each parameter of the whole model has, by name; ``no_decay`` asks for it, and a
            slice has one. A parameter that is not in it is not sliced.

    Attributes:
        groups: Parameter groups as ``torch.optim.Optimizer`` takes them.

    Raises:
        TypeError: The parameters need names and have none.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        parameters: Parameters,
        steps_per_epoch: int,
        depths: Mapping[str, int],
        dimensions: Mapping[str, int],
    ) -> None:
        self._freeze_after = [
            None if group.epochs is None else round(group.epochs * steps_per_epoch) for group in config.groups
        ]
        self.groups: list[dict[str, Any]] = [{"params": parameters}]
        if not config.groups and config.layer_decay is None and not config.no_decay:
            return
        # The first group is there even if it is empty: the learning rate is read from it.
        members: dict[_Key, list[tuple[str, nn.Parameter]]] = {(0, 1.0, True): []}
        for item in parameters:
            if not isinstance(item, tuple):
                raise TypeError("optimizer groups need named parameters")
            name, parameter = item
            index, factor = _group_index(config.groups, name, depths), depth_factor(config, name, depths)
            decays = _decays(config, name, dimensions.get(name, parameter.dim()))
            members.setdefault((index, factor, decays), []).append(item)
        self.groups = [self._options(config, *key, members[key]) for key in sorted(members, key=_order)]

    def _options(
        self, config: OptimizerConfig, index: int, factor: float, decays: bool, members: list[tuple[str, nn.Parameter]]
    ) -> dict[str, Any]:
        """The parameter group of some members of a configured group, 1 + its index, or of none of them, 0."""
        group = config.groups[index - 1] if index else None
        decay = {} if decays else {"weight_decay": 0.0}
        if group is None:
            return {**parameter_group(members), "lr_factor": factor, **decay}
        decay = decay if group.weight_decay is None else {"weight_decay": group.weight_decay}
        last = self._freeze_after[index - 1]
        options = {"params": members, "lr_factor": group.lr_factor * factor, "last_update": last}
        return {**group.kwargs, **options, **decay}

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


def check_groups(config: OptimizerConfig, model: nn.Module) -> None:
    """Refuses groups without parameters, since their pattern must be mistyped.

    Raises:
        ConfigError: A group's pattern matches no trainable parameter that is not already in an earlier group.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    depths = layer_depths(model) if config.groups else {}
    indices = {name: _group_index(config.groups, name, depths) for name in names}
    for index, group in enumerate(config.groups, 1):
        if index not in indices.values():
            problem = "matches no parameter of the model that is not already in an earlier group"
            left = [name for name in names if not 0 < indices[name] < index]
            raise unmatched(f"optimizer.groups[{index - 1}].match", group.match, problem, left)


def depth_factor(config: OptimizerConfig, name: str, depths: Mapping[str, int]) -> float:
    """The factor of a parameter's learning rate by its layer: 1 for the last layer, and less for each before it."""
    if config.layer_decay is None or name not in depths:
        return 1.0
    return float(config.layer_decay ** (max(depths.values()) - depths[name]))


def describe_rates(config: OptimizerConfig, model: nn.Module) -> Lines:
    """A table with a row for each learning rate of a model's parameters, from the first layer to the last.

    Args:
        config: Of the optimizer.
        model: The unsplit model.
    """
    depths = layer_depths(model)
    rows: dict[tuple[int, int, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        key = (depths[name], _group_index(config.groups, name, depths), _decays(config, name, parameter.dim()))
        rows.setdefault(key, []).append((name, parameter))
    lines = [f"{'layer':>5}  {'learning rate':>13}  {'weight decay':>12}  {'values':>11}  parameters"]
    for (depth, index, decays), members in sorted(rows.items()):
        group = config.groups[index - 1] if index else None
        factor = depth_factor(config, members[0][0], depths) * (group.lr_factor if group else 1.0)
        decay = config.weight_decay if decays else 0.0
        decay = decay if group is None or group.weight_decay is None else group.weight_decay
        values = sum(parameter.numel() for _, parameter in members)
        names = members[0][0] if len(members) == 1 else f"{members[0][0]} … {members[-1][0]}"
        lines.append(f"{depth:5}  {factor:8.3g} × lr  {decay:12.3g}  {values:11,}  {names}")
    return Lines.of(lines)


def _order(key: _Key) -> tuple[int, float, bool]:
    """Sorts the group of all that is neither in a group, nor of another layer, nor without decay to the front."""
    index, factor, decays = key
    return index, -factor, not decays


def _decays(config: OptimizerConfig, name: str, dimensions: int) -> bool:
    """Whether ``no_decay`` leaves a parameter its weight decay."""
    is_bias = name.rpartition(".")[2] == "bias"
    return ("bias" if is_bias else "norm") not in config.no_decay or (not is_bias and dimensions > 1)


def _group_index(config: Sequence[GroupConfig], name: str, depths: Mapping[str, int]) -> int:
    """0 if no pattern matches the name, else 1 + the index of the first group whose pattern does."""
    matching = (index for index, group in enumerate(config, 1) if matches(group.match, name, depths))
    return next(matching, 0)
