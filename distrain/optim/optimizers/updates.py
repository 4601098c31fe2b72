"""Counts an optimizer's updates in its state of each parameter, so that every strategy saves and restores the count."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch

_KEY = "updates"
#: Updates that optimizers of other parameters of the same model have recorded.
_OF_OTHERS: weakref.WeakKeyDictionary[torch.optim.Optimizer, int] = weakref.WeakKeyDictionary()


def completed(optimizer: torch.optim.Optimizer) -> int:
    """Number of updates recorded so far; 0 if none was recorded."""
    recorded = (int(state[_KEY]) for state in optimizer.state.values() if _KEY in state)
    return max(recorded, default=0) if optimizer not in _OF_OTHERS else max((_OF_OTHERS[optimizer], *recorded))


def share(optimizers: Iterable[torch.optim.Optimizer], updates: int) -> None:
    """Tells the optimizers of a model's parts how many updates the model has had before the next one.

    One whose parameters were all frozen until now has recorded none itself.

    Args:
        optimizers: They make the next update together.
        updates: The most that any of them has completed.
    """
    _OF_OTHERS.update(dict.fromkeys(optimizers, updates))


def record(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Stores the number of updates in the state of each parameter that has a gradient."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                optimizer.state[parameter][_KEY] = updates
