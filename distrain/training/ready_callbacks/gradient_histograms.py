"""``callbacks=[gradient_histograms]``: how large the gradients of each parameter are, over the steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from distrain.strategies.base import Strategy
from distrain.training.callbacks import Callback, RunView

#: The powers of ten of the first and of the last edge, and bins for each of them.
_SMALLEST, _LARGEST, _PER_DECADE = -12, 6, 4


class GradientHistograms(Callback):
    """Logs a histogram of each parameter's gradient, as the last step used it, whenever metrics are logged.

    It is a histogram of the decimal logarithm of the absolute values: -3 stands for 0.001. So gradients that vanish or
    explode are seen at a glance. A gradient of 0 counts as 1e-12. Where ranks hold different parts of the model, rank 0
    gets the histograms of all.

    Args:
        every_steps: Shortest distance in steps of two logs.
    """

    def __init__(self, every_steps: int = 1) -> None:
        if every_steps < 1:
            raise ValueError(f"every_steps={every_steps} must be at least 1")
        self._every = every_steps
        self._next = 0
        count = (_LARGEST - _SMALLEST) * _PER_DECADE
        self._edges = torch.linspace(_SMALLEST, _LARGEST, count + 1, dtype=torch.float64)

    @override
    def on_log(self, run: RunView, values: Mapping[str, float]) -> None:
        if run.progress.step < self._next:
            return
        self._next = run.progress.step + self._every
        found = self._own_counts(run.strategy)
        # The ranks of a parameter server don't keep step, and each has the whole model.
        if run.strategy.divides_model and type(run.strategy).run is Strategy.run:
            gathered: list[dict[str, Any]] = run.strategy.training_group.all_gather_json(found, run.runtime.device)
            found = {name: counts for rank in reversed(gathered) for name, counts in rank.items()}
        if run.runtime.is_main:
            for name in sorted(found):
                self._log(run, name, found[name])

    def _log(self, run: RunView, name: str, counts: list[int]) -> None:
        """Logs a histogram without the empty bins at both ends, which would make the rest narrow."""
        full = [place for place, count in enumerate(counts) if count]
        if full:
            first, last = full[0], full[-1] + 1
            edges = self._edges[first : last + 1].tolist()
            run.report.logger.histogram(run.progress.step, f"gradients_log10/{name}", counts[first:last], edges)

    def _own_counts(self, strategy: Strategy) -> dict[str, list[int]]:
        """Counts of the parameters that this rank has, by their names in the unsplit model."""
        return {
            name: self._counts(parameter.grad)
            for module in strategy.own_modules()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad and parameter.grad is not None
        }

    def _counts(self, gradient: Tensor) -> list[int]:
        values = gradient.detach().flatten().abs()
        values = values[values.isfinite()].double().cpu().log10().clamp(_SMALLEST, _LARGEST)
        places = torch.bucketize(values, self._edges[1:-1])
        counts: list[int] = torch.bincount(places, minlength=len(self._edges) - 1).tolist()
        return counts
