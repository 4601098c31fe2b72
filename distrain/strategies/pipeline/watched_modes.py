"""Tells when code looks at whether a module is in training mode."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import nn


@contextlib.contextmanager
def watched_modes(looked_at: Callable[[nn.Module], None]) -> Iterator[None]:
    """Calls ``looked_at`` with a module whenever its attribute ``training`` is read."""

    def training(module: nn.Module) -> bool:
        looked_at(module)
        try:
            mode: bool = vars(module)["training"]
        except KeyError:  # a ScriptModule, which then looks elsewhere
            raise AttributeError("training") from None
        return mode

    def set_training(module: nn.Module, mode: bool) -> None:
        vars(module)["training"] = mode

    # Instances have it in their dictionary; a property of the class comes before that.
    nn.Module.training = property(training, set_training)  # type: ignore[assignment]
    try:
        yield
    finally:
        del nn.Module.training
