"""task=regression: one or more numbers for each image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from distrain.config.groups import TaskConfig
from distrain.config.registry import register
from distrain.optim.losses import at_least_32_bits
from distrain.tasks.base import MetricState
from distrain.tasks.supervised import Supervised


@register("task", "regression", TaskConfig)
class Regression(Supervised):
    """The model gives numbers; targets are numbers of the same names, float32 ``[n, numbers]``.

    ``mse`` is the mean of squared differences and ``mae`` that of absolute ones, over samples and numbers. The best
    checkpoint is the one with the lowest ``mse``. Evaluation adds ``r2``, the coefficient of determination, averaged
    over the numbers.
    """

    target = "numbers"
    metrics = ("mse", "mae")
    further_results = ("r2",)
    higher_is_better = False
    output_name = "numbers"

    @override
    def measure(self, outputs: Tensor, targets: Tensor) -> Tensor:
        differences = at_least_32_bits(outputs) - targets
        return torch.stack((differences.square().sum(), differences.abs().sum())) / differences.shape[1]

    @override
    def metric_state(self, device: torch.device) -> MetricState:
        """``sums``: float64 ``[5, numbers]``: squared and absolute differences, targets, their squares, samples."""
        return {"sums": torch.zeros(5, self.output_size, dtype=torch.float64, device=device)}

    @override
    def update_state(self, state: MetricState, outputs: Tensor, targets: Tensor) -> None:
        true = targets.double()
        differences = outputs.double() - true
        terms = (differences.square(), differences.abs(), true, true.square(), torch.ones_like(true))
        state["sums"] += torch.stack([term.sum(0) for term in terms])

    @override
    def results(self, state: MetricState, count: int) -> dict[str, float]:
        """``r2`` is missing where a number is the same in all samples: it is not defined then."""
        rows = [_of_number(*sums) for sums in state["sums"].T.tolist()]
        r2 = [row["r2"] for row in rows]
        means = {name: sum(row[name] for row in rows) / len(rows) for name in self.metrics}
        return {**means, **({"r2": sum(r2) / len(r2)} if None not in r2 else {})}

    @override
    def compared(self, form: str, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers in any form, float64 ``[n, numbers]``; ``[n]`` where there is one number."""
        if outputs.shape[1] == 1:
            outputs, targets = outputs.squeeze(1), targets.squeeze(1)
        return outputs.double(), targets.double()

    @override
    def details(self, state: MetricState) -> dict[str, Any]:
        rows = [_of_number(*sums) for sums in state["sums"].T.tolist()]
        return {"numbers": [{"number": name, **row} for name, row in zip(self.spec.classes, rows, strict=True)]}

    @override
    def predict(self, outputs: Tensor, top: int) -> list[dict[str, Any]]:
        """``numbers``: the numbers by name."""
        return [{"numbers": dict(zip(self.spec.classes, values, strict=True))} for values in outputs.tolist()]


def _of_number(squared: float, absolute: float, total: float, squares: float, count: float) -> dict[str, Any]:
    """The metrics of one number from its sums."""
    variation = squares - total**2 / count
    # What is left of equal targets is rounding.
    is_constant = variation <= squares * count * torch.finfo(torch.float64).eps
    r2 = None if is_constant else 1 - squared / variation
    return {"mse": squared / count, "mae": absolute / count, "r2": r2}
