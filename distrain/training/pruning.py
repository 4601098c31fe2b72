"""When weights are pruned during a training, and how all ranks get the same masks."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distrain.config.schema import Config
from distrain.errors import ConfigError
from distrain.models import pruning
from distrain.strategies.base import Strategy

log = logging.getLogger(__name__)


def rounds(config: Config, steps_per_epoch: int, total_steps: int) -> dict[int, float]:
    """Before which step, from 0, how large a share of the weights is pruned; empty without ``prune.amount``.

    The share rises by the cubic of Zhu and Gupta 2017 (arXiv 1710.01878, equation 1): in large parts at first, while
    many weights are of no use, and in smaller and smaller ones.

    Args:
        config: Of the run.
        steps_per_epoch: Updates of an epoch.
        total_steps: Updates of the run.

    Raises:
        ConfigError: ``prune.rise_epochs`` leaves no epoch to train what is left.
    """
    keys = config.prune
    if keys.amount is None:
        return {}
    last = total_steps // 2
    if keys.rise_epochs is not None:
        if keys.rise_epochs >= config.trainer.epochs:
            problem = f"is not less than trainer.epochs={config.trainer.epochs}: no epoch is left to train what remains"
            raise ConfigError("prune.rise_epochs", keys.rise_epochs, problem)
        last = math.ceil(keys.rise_epochs * steps_per_epoch)
    found = {}
    for number in range(1, keys.rounds + 1):
        # A later round before the same step takes the place of an earlier one.
        found[math.ceil(last * number / keys.rounds)] = keys.amount * (1 - (1 - number / keys.rounds) ** 3)
    return found


class Pruning:
    """Prunes a model while it is trained; all ranks that train call its methods together.

    What is pruned follows from the step and the model's parameters, so a resumed run prunes as one that never stopped.

    Args:
        config: Of the run.
        steps_per_epoch: Updates of an epoch.
        total_steps: Updates of the run.
        strategy: Holds the model, after its set-up.
    """

    def __init__(self, config: Config, steps_per_epoch: int, total_steps: int, strategy: Strategy) -> None:
        self._rounds, self._strategy = rounds(config, steps_per_epoch, total_steps), strategy
        last = max(self._rounds, default=0)
        if strategy.runtime.is_main and last >= total_steps:
            log.warning("the run ends after %d steps, and the last round of pruning is after %d", total_steps, last)

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Prunes, if that is due before a step."""
        share = self._rounds.get(step)
        if share is None:
            return
        masks = pruning.choose(self._strategy.model_state(), share)
        for module in self._strategy.own_modules():
            for name, buffer in module.named_buffers():
                if name in masks:
                    buffer.copy_(masks[name])
        if self._strategy.runtime.is_main:
            log.info("pruned: %s of %s weights are zero", *(f"{count:,}" for count in _counts(masks)))
            empty = [name.rpartition(".")[0] for name, mask in masks.items() if not bool(mask.any())]
            if empty:
                log.warning("no weight is left in %s; prune.exclude keeps a layer's weights", ", ".join(empty))

    def report(self) -> dict[str, Any]:
        """What ``summary.json`` says: how many weights there are and how many are zero; nothing if none are pruned."""
        if not self._rounds:
            return {}
        zero, count = _counts(pruning.masks_of(self._strategy.model_state()))
        return {"pruned": {"weights": count, "zero": zero}}


def _counts(masks: Mapping[str, Tensor]) -> tuple[int, int]:
    """How many weights are zero, and how many there are."""
    count = sum(mask.numel() for mask in masks.values())
    return count - sum(int(mask.sum()) for mask in masks.values()), count
