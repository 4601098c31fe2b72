"""Counts an optimizer's updates in its state of each parameter, so that every strategy saves and restores the count."""

from __future__ import annotations

import torch

_KEY = "updates"


def completed(optimizer: torch.optim.Optimizer) -> int:
    """Number of updates recorded so far; 0 if none was recorded."""
    return max((int(state[_KEY]) for state in optimizer.state.values() if _KEY in state), default=0)


def record(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Stores the number of updates in the state of each parameter that has a gradient."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                optimizer.state[parameter][_KEY] = updates
