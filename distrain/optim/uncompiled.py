"""Optimizers that don't import torch's compiler."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch


@functools.cache
def without_compiler_hooks(kind: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """Returns a subclass whose methods lack the decorators that exclude them from ``torch.compile``.

    On their first call those decorators import the compiler, which takes half a second. They are not needed, since
    distrain compiles models but never optimizers.

    Args:
        kind: An optimizer class. The subclass has its name, arguments, hooks and state.
    """
    step = torch.no_grad()(inspect.unwrap(kind.step))
    methods = {"step": step, "add_param_group": inspect.unwrap(kind.add_param_group)}
    return type(kind.__name__, (kind,), methods)
