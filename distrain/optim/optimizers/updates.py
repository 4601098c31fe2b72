"""How many updates an optimizer has made, counted in its state by parameter: so any strategy saves and resumes it."""

from __future__ import annotations

import torch

_KEY = "updates"


def completed(optimizer: torch.optim.Optimizer) -> int:
    """Updates made so far; 0 where none was counted."""
    return max((int(kept[_KEY]) for kept in optimizer.state.values() if _KEY in kept), default=0)


def record(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Notes that so many have been made, with each parameter that has a gradient."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                optimizer.state[parameter][_KEY] = updates
