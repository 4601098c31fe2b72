"""torch's optimizers without their share in torch's compiler."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch


@functools.cache
def without_compiler_hooks(kind: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """The same optimizer, without what keeps the compiler out of its methods.

    That imports the compiler when the methods are first called, half a second of every start. Models are compiled here,
    and never optimizers, so there is nothing to be kept out.
    """
    step = torch.no_grad()(inspect.unwrap(kind.step))
    methods = {"step": step, "add_param_group": inspect.unwrap(kind.add_param_group)}
    return type(kind.__name__, (kind,), methods)
