"""An optimizer's first trial on small parameters: whether its state can be saved and moved by parameter name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from distrain.checkpoint import named_state
from distrain.config.groups import OptimizerConfig
from distrain.errors import ConfigError, described
from distrain.models.layers import layer_depths
from distrain.optim.optimizers.build import build_optimizer
from distrain.optim.optimizers.custom import CustomOptimizerConfig
from distrain.runtime.device import RandomState, seed_everything

#: Longest side of the parameters, and how many of each number of dimensions are tried.
_SIDE, _OF_A_KIND = 3, 2
#: Updates before the state is saved.
_UPDATES = 2
#: Updates of a run that never ends within the trial, for groups and lookahead.
_MANY = 1000
#: What the options of a group may not set, and what does.
_SET_ELSEWHERE = {"lr": "lr_factor", "weight_decay": "weight_decay", "params": "match"}

_Parameters = dict[str, nn.Parameter]


def check(config: OptimizerConfig, model: nn.Module, *, divided: bool, sliced: bool = False) -> None:
    """Refuses an optimizer that isn't distrain's where it would break a promise; tries also options of groups.

    Whether an optimizer can update slices of parameters is tried of distrain's own too.

    Args:
        config: The configured optimizer.
        model: Whose parameters it is for; their values don't matter.
        divided: Whether each rank's optimizer has a part of the parameters alone.
        sliced: Whether each rank's optimizer has slices of parameters, each as a vector.

    Raises:
        ConfigError: It can't be made or fails; keeps what can't be saved by parameter name; doesn't go on from its
            saved state; changes parameters whose group is frozen; or mixes parameters although they are divided.
    """
    is_custom = isinstance(config, CustomOptimizerConfig)
    if not is_custom and not sliced and not any(group.kwargs for group in config.groups):
        return
    random_state = RandomState.now()
    try:
        trial = _Trial(config, _shapes(model), layer_depths(model))
        trial.check_options()
        if is_custom:
            trial.check_state()
            trial.check_resume()
            trial.check_frozen_groups()
            if divided and trial.mixes_parameters():
                trial.refuse("the update of a parameter depends on other parameters, and this strategy divides them")
        if sliced and trial.mixes_elements():
            problem = "updates a parameter as a whole, and this strategy divides it among ranks, element by element"
            trial.refuse(f"{problem}; strategy=ddp keeps it whole")
    finally:
        random_state.restore()


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    """Shapes of small parameters by name, a few of each number of dimensions."""
    chosen: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        alike = sum(len(shape) == parameter.dim() for shape in chosen.values())
        if parameter.requires_grad and alike < _OF_A_KIND:
            chosen[name] = [min(side, _SIDE) for side in parameter.shape]
    return chosen


class _Trial:
    def __init__(self, config: OptimizerConfig, shapes: dict[str, list[int]], depths: dict[str, int]) -> None:
        self._config, self._depths = config, depths
        self._dimensions = {name: len(shape) for name, shape in shapes.items()}
        generator = torch.Generator().manual_seed(0)
        self._values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        self._gradients = [
            {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
            for _ in range(_UPDATES + 1)
        ]

    def refuse(self, problem: str) -> None:
        target = getattr(self._config, "_target_", None)
        raise ConfigError("optimizer._target_" if target else "optimizer.name", target or self._config.name, problem)

    def _make(self, values: dict[str, Tensor]) -> tuple[torch.optim.Optimizer, _Parameters]:
        parameters = {name: nn.Parameter(value.clone()) for name, value in values.items()}
        optimizer = build_optimizer(
            self._config,
            list(parameters.items()),
            steps_per_epoch=_MANY,
            total_steps=_MANY * _MANY,
            depths=self._depths,
            dimensions=self._dimensions,
        )
        return optimizer, parameters

    def _update(self, optimizer: torch.optim.Optimizer, parameters: _Parameters, updates: Iterable[int]) -> None:
        for update in updates:
            for name, parameter in parameters.items():
                parameter.grad = self._gradients[update][name].clone()
            seed_everything(update)
            try:
                optimizer.step()
            except Exception as error:  # a user's optimizer may raise anything
                self.refuse(f"its step fails {described(error)}")

    def check_options(self) -> None:
        """Refuses options of a group that the optimizer doesn't have."""
        for index, group in enumerate(self._config.groups):
            for name, value in group.kwargs.items():
                key = f"optimizer.groups[{index}].kwargs.{name}"
                if name in _SET_ELSEWHERE:
                    raise ConfigError(key, value, f"is set by optimizer.groups[{index}].{_SET_ELSEWHERE[name]}")
        optimizer, _ = self._make(self._values)
        for index, group in enumerate(self._config.groups):
            for name, value in group.kwargs.items():
                if name not in optimizer.defaults:
                    problem = f"optimizer={self._config.name} has no such option"
                    raise ConfigError(f"optimizer.groups[{index}].kwargs.{name}", value, problem, optimizer.defaults)

    def check_state(self) -> None:
        """Refuses what can't be saved: other state than tensors and numbers of each parameter."""
        optimizer, parameters = self._make(self._values)
        before = [_options(group) for group in optimizer.param_groups]
        self._update(optimizer, parameters, range(_UPDATES))
        changed = {
            name
            for old, group in zip(before, optimizer.param_groups, strict=True)
            for name, value in _options(group).items()
            if old.get(name) != value
        }
        if changed:
            self.refuse(f"keeps {', '.join(sorted(changed))} for all parameters together, which no checkpoint holds")
        names = {parameter: name for name, parameter in parameters.items()}
        for parameter, entries in optimizer.state.items():
            if parameter not in names:
                self.refuse(f"keeps {', '.join(map(str, entries)) or 'state'} that belongs to no parameter")
            for name, value in entries.items():
                if not isinstance(value, Tensor | int | float | None):
                    self.refuse(f"keeps {name}, a {type(value).__name__}; a checkpoint holds tensors and numbers alone")
                if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                    shapes = f"{list(value.shape)} for a parameter {list(parameter.shape)}"
                    self.refuse(f"keeps {name}, {shapes}; state must have the parameter's shape, or be a number")

    def check_resume(self) -> None:
        """Refuses an optimizer that doesn't go on from its saved state as if it had not been saved."""
        optimizer, parameters = self._make(self._values)
        self._update(optimizer, parameters, range(_UPDATES))
        saved = named_state.optimizer_state(optimizer, {parameter: name for name, parameter in parameters.items()})
        tensors, scalars = {key: tensor.clone() for key, tensor in saved[0].items()}, dict(saved[1])
        resumed, copies = self._make({name: parameter.detach() for name, parameter in parameters.items()})
        named_state.load_optimizer(resumed, {parameter: name for name, parameter in copies.items()}, tensors, scalars)
        for each, own in ((optimizer, parameters), (resumed, copies)):
            self._update(each, own, [_UPDATES])
        if any(not torch.equal(parameters[name], copies[name]) for name in parameters):
            self.refuse("doesn't go on exactly from its state of the parameters: it keeps more elsewhere")

    def check_frozen_groups(self) -> None:
        """Refuses ``epochs`` of a group, after which its rate is 0, if parameters change at a rate of 0 too."""
        index = next((index for index, group in enumerate(self._config.groups) if group.epochs is not None), None)
        if index is None:
            return
        optimizer, parameters = self._make(self._values)
        self._update(optimizer, parameters, range(_UPDATES))
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        self._update(optimizer, parameters, [_UPDATES])
        if any(not torch.equal(before[name], parameters[name]) for name in parameters):
            key, value = f"optimizer.groups[{index}].epochs", self._config.groups[index].epochs
            problem = "changes parameters at a learning rate of 0 too, so they would not be frozen; use freeze"
            raise ConfigError(key, value, f"{getattr(self._config, '_target_', '')} {problem}", ["null"])

    def mixes_parameters(self) -> bool:
        """Whether the updates of a parameter depend on other parameters."""
        optimizer, parameters = self._make(self._values)
        self._update(optimizer, parameters, range(_UPDATES))
        for name, value in self._values.items():
            alone, own = self._make({name: value})
            self._update(alone, own, range(_UPDATES))
            if not torch.allclose(own[name], parameters[name], rtol=1e-4, atol=1e-7):
                return True
        return False

    def mixes_elements(self) -> bool:
        """Whether the update of an element depends on others of its parameter, or on the parameter's shape."""
        optimizer, parameters = self._make(self._values)
        self._update(optimizer, parameters, range(_UPDATES))
        for name, value in self._values.items():
            for elements in (slice(0, 1), slice(1, None)):
                part = value.flatten()[elements]
                if not part.numel():
                    continue
                alone, own = self._make({name: part})
                for update in range(_UPDATES):
                    own[name].grad = self._gradients[update][name].flatten()[elements].clone()
                    seed_everything(update)
                    try:
                        alone.step()
                    except Exception:  # a user's optimizer may need the shape
                        return True
                if not torch.allclose(own[name], parameters[name].flatten()[elements], rtol=1e-4, atol=1e-7):
                    return True
        return False


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """What a group holds besides its parameters and the learning rate, copied."""
    options = {name: value for name, value in group.items() if name not in ("params", "param_names", "lr")}
    return {name: value.item() if isinstance(value, Tensor) else value for name, value in options.items()}
