"""Lookahead: k steps forward, one step back (Zhang, Lucas, Hinton and Ba 2019, arXiv 1907.08610, algorithm 1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distrain.config.schema import LookaheadConfig
from distrain.optim.optimizers import updates

_KEY = "slow"


class Lookahead:
    """A slow copy of the parameters; every so many updates it moves towards them, and they are set back to it.

    The copies lie in the optimizer's state, by parameter as all of it, and every rank that makes the same updates makes
    the same merges. Buffers (BatchNorm's running statistics) follow the parameters by themselves. The run's last update
    leaves the slow copy, which is what is then tested.

    Args:
        config: ``keep`` is one less the paper's step size; with ``power`` above 0 it grows from 0 to that, as in Jordan
            2024 (arXiv 2404.00498, §3.4), where early steps must not be held back.
        total_steps: Updates of the whole run.
    """

    def __init__(self, config: LookaheadConfig, total_steps: int) -> None:
        assert config.every is not None
        self._every, self._keep, self._power, self._total = config.every, config.keep, config.power, total_steps
        self._first: dict[Tensor, Tensor] = {}

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes an optimizer's steps merge when it is time."""
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # Others take an empty state for one of before the first step, so the copies are handed in after it.
        self._first = {
            parameter: parameter.clone()
            for parameter in _trained(optimizer)
            if _KEY not in optimizer.state.get(parameter, ())
        }
        self._done = updates.completed(optimizer) + 1

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, copy in self._first.items():
            optimizer.state[parameter][_KEY] = copy
        self._first = {}
        updates.record(optimizer, self._done)
        ends = self._done == self._total
        if not ends and self._done % self._every:
            return
        parameters = _trained(optimizer)
        slow = [optimizer.state[parameter][_KEY] for parameter in parameters]
        if self._done % self._every == 0:
            keep = self._keep * min(1.0, self._done / self._total) ** self._power
            torch._foreach_lerp_(slow, parameters, 1 - keep)
        torch._foreach_copy_(parameters, slow)


def _trained(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [each for group in optimizer.param_groups for each in group["params"] if each.grad is not None]
