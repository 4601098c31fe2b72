"""Schedules that users name by a dotted path, as functions of the step: so a resumed run needs no state for them."""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from distrain.config import user_code
from distrain.config.registry import locate
from distrain.errors import ConfigError, described
from distrain.optim.uncompiled import without_compiler_hooks

_KEY = "scheduler._target_"
#: Steps at the beginning of a torch scheduler that are tried before training; they take less than 0.1 s.
_TRIED = 5_000


def make(
    path: str, kwargs: Mapping[str, Any], interval: str, total_steps: int, steps_per_epoch: int
) -> Callable[[int], float]:
    """The factor of the learning rate as a function of the step, which is below ``total_steps``.

    Args:
        path: A function, or a subclass of torch's ``LRScheduler``.
        kwargs: Keyword arguments for it.
        interval: ``step`` or ``epoch``: when a torch scheduler makes a step.
        total_steps: Steps of the schedule.
        steps_per_epoch: Steps per epoch.

    Raises:
        ConfigError: There is no such schedule; it doesn't take the arguments; fails; gives no number of at least 0; or
            depends on more than the step.
    """
    target = locate(_KEY, path)
    if not callable(target):
        raise ConfigError(_KEY, path, "is neither a function of the step nor a torch LRScheduler")
    known = {"total_steps": total_steps, "steps_per_epoch": steps_per_epoch}
    if isinstance(target, type):
        if interval == "epoch":
            known["total_steps"] = -(-total_steps // steps_per_epoch)
        scheduler = _make_scheduler(path, target, kwargs, known)
        table = _Table(path, scheduler, steps_per_epoch if interval == "epoch" else 1)
        factor: Callable[[int], float] = table.factor
        tried = range(min(total_steps, _TRIED))
    else:
        call = functools.partial(target, **_arguments(path, target, kwargs, known))
        factor = functools.partial(_factor_of, path, call)
        tried = sorted({0, min(1, total_steps - 1), total_steps // 2, total_steps - 1})  # type: ignore[assignment]
    for step in tried:
        factor(step)
    return factor


def _arguments(path: str, target: Any, kwargs: Mapping[str, Any], known: Mapping[str, int]) -> dict[str, Any]:
    """The keyword arguments of a schedule besides the step or the optimizer, which it gets first."""
    parameters = user_code.signature(target).parameters
    first = next(iter(parameters), None)
    arguments = {name: value for name, value in known.items() if name in parameters and name != first}
    arguments.update(kwargs)
    user_code.check_arguments("scheduler.kwargs", kwargs, path, target, arguments, positional=1)
    return arguments


def _make_scheduler(path: str, target: type[Any], kwargs: Mapping[str, Any], known: Mapping[str, int]) -> LRScheduler:
    """A torch scheduler of an optimizer whose learning rate is 1, so that its rate is the factor."""
    if not issubclass(target, LRScheduler):
        raise ConfigError(_KEY, path, "is neither a function of the step nor a torch LRScheduler")
    required = list(inspect.signature(target.step).parameters.values())[1:]
    if issubclass(target, ReduceLROnPlateau) or any(p.default is p.empty for p in required):
        problem = "follows a metric, so the rate at a step depends on more than the step"
        raise ConfigError(_KEY, path, f"{problem}; choose another schedule")
    optimizer = without_compiler_hooks(torch.optim.SGD)([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.5)
    arguments = _arguments(path, target, kwargs, known)
    scheduler: LRScheduler = user_code.build(_KEY, path, lambda: target(optimizer, **arguments))
    if scheduler.optimizer is not optimizer:
        raise ConfigError(_KEY, path, "schedules another optimizer than the one it is given")
    return scheduler


class _Table:
    """The factors that a torch scheduler gives, step by step, as far as they were asked for."""

    def __init__(self, path: str, scheduler: LRScheduler, every: int) -> None:
        self._path, self._scheduler, self._every = path, scheduler, every
        self._group = scheduler.optimizer.param_groups[0]
        self._others = self._options()
        self._factors = [_checked(path, 0, self._group["lr"])]

    def _options(self) -> dict[str, Any]:
        return {name: self._group[name] for name in ("momentum", "weight_decay", "dampening")}

    def factor(self, step: int) -> float:
        place = step // self._every
        while place >= len(self._factors):
            count = len(self._factors)
            try:
                with warnings.catch_warnings():
                    # No optimizer makes steps in between.
                    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
                    self._scheduler.step()
            except Exception as error:  # a scheduler may raise anything
                problem = f"fails at step {count * self._every} {described(error)}"
                raise ConfigError(_KEY, self._path, problem) from error
            if self._options() != self._others:
                problem = "changes the momentum too, which no schedule here does"
                hint = "scheduler.kwargs={cycle_momentum: false}, if it has that argument"
                raise ConfigError(_KEY, self._path, f"{problem}: {hint}")
            self._factors.append(_checked(self._path, count * self._every, self._group["lr"]))
        return self._factors[place]


def _factor_of(path: str, call: Callable[[int], Any], step: int) -> float:
    try:
        value = call(step)
    except Exception as error:  # a user's function may raise anything
        raise ConfigError(_KEY, path, f"fails at step {step} {described(error)}") from error
    return _checked(path, step, value)


def _checked(path: str, step: int, value: Any) -> float:
    """A factor as a plain number."""
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        problem = f"gives {value!r} at step {step}; the factor of the learning rate, a number, is needed"
        raise ConfigError(_KEY, path, problem) from error
    if not math.isfinite(number) or number < 0:
        problem = f"gives {number} at step {step}; the factor of the learning rate must be finite and at least 0"
        raise ConfigError(_KEY, path, problem)
    return number
