"""Lookahead: k steps forward, one step back (Zhang, Lucas, Hinton and Ba 2019, arXiv 1907.08610, algorithm 1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distrain import torch_internals
from distrain.config.groups import LookaheadConfig
from distrain.optim.optimizers import updates

_KEY = "slow"


class Lookahead:
    """Keeps a slow copy of the parameters; in regular merges it moves towards them, and they are set back to it.

    The copy is stored in the optimizer's state of each parameter. Ranks that make the same updates make the same
    merges. Buffers (BatchNorm's running statistics) are not merged; they adapt to the parameters during training. After
    the run's last update the parameters are the slow copy, which is then tested.

    Args:
        config: ``keep`` is 1 minus the paper's step size. With ``power`` above 0 it grows from 0 to this value, as in
            Jordan 2024 (arXiv 2404.00498, §3.4), so that early steps are not held back.
        every: Updates between merges.
        total_steps: Updates of the whole run.
    """

    def __init__(self, config: LookaheadConfig, every: int, total_steps: int) -> None:
        self._every, self._keep, self._power, self._total = every, config.keep, config.power, total_steps
        self._new_copies: dict[Tensor, Tensor] = {}

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes an optimizer merge within its steps."""
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # Copied now but stored after the step: optimizers initialise a parameter's state only if it is empty.
        self._new_copies = {
            parameter: parameter.clone()
            for parameter in _with_gradient(optimizer)
            if _KEY not in optimizer.state.get(parameter, ())
        }
        self._update = updates.completed(optimizer) + 1

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, copy in self._new_copies.items():
            optimizer.state[parameter][_KEY] = copy
        self._new_copies = {}
        updates.record(optimizer, self._update)
        is_merge, is_last = self._update % self._every == 0, self._update == self._total
        if not is_merge and not is_last:
            return
        parameters = _with_gradient(optimizer)
        if not parameters:
            # Of a part of the model that is frozen, or of a rank without a slice.
            return
        slow = [optimizer.state[parameter][_KEY] for parameter in parameters]
        if is_merge:
            keep = self._keep * min(1.0, self._update / self._total) ** self._power
            torch_internals.foreach_lerp(slow, parameters, 1 - keep)
        torch_internals.foreach_copy(parameters, slow)


def _with_gradient(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
