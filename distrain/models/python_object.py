"""model=python_object: a model that a Python program gives to ``distrain.fit`` and the like, as an object."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn

from distrain.config.registry import register
from distrain.errors import ConfigError
from distrain.models.foreign import UserModelConfig

#: A module, or a class or function that makes one.
ModelObject: TypeAlias = nn.Module | Callable[..., nn.Module]

_offered: ContextVar[ModelObject | None] = ContextVar("offered_model", default=None)


@dataclass
class PythonObjectModelConfig(UserModelConfig):
    """Keys of ``model=python_object``; ``_target_`` says what the object is, and nothing is imported by it."""


# The target is only a placeholder: what is offered is built.
register("model", "python_object", PythonObjectModelConfig)(nn.Module)


@contextlib.contextmanager
def offered_model(model: ModelObject | None) -> Iterator[None]:
    """Inside this block ``model=python_object`` stands for this model."""
    token = _offered.set(model)
    try:
        yield
    finally:
        _offered.reset(token)


def maker_of_offered_model() -> Callable[..., nn.Module]:
    """What builds the offered model: the class or function itself, or a function that copies the module.

    Raises:
        ConfigError: No model is offered.
    """
    model = _offered.get()
    if model is None:
        problem = (
            "this run's model was an object in a Python program, and a run folder holds no code; pass the model again, "
            "in Python: distrain.evaluate(run, model=…), and likewise predict, export and load_model"
        )
        raise ConfigError("model.name", "python_object", problem)
    return (lambda: _copy(model)) if isinstance(model, nn.Module) else model


def _copy(model: nn.Module) -> nn.Module:
    """A copy on torch's current default device; training must not change the parameters that the next copy has."""
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.grad = None
    return copied.to(torch.get_default_device())
