"""task=classification: one class of several for each image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from distrain.config.groups import TaskConfig
from distrain.config.registry import register
from distrain.data.base import Split
from distrain.tasks.base import Evaluation, MetricState
from distrain.tasks.confusion import CountsConfusions

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@register("task", "classification", TaskConfig)
class Classification(CountsConfusions):
    """The model gives a logit for each class; targets are classes, int64 ``[n]``.

    Those of mixed images are the shares of the classes, float32 ``[n, classes]``.
    """

    target = "class"
    metrics = ("accuracy",)

    @override
    def measure(self, outputs: Tensor, targets: Tensor) -> Tensor:
        # A mixed image counts as of the class that it has the largest share of.
        classes = targets.argmax(1) if targets.dim() > 1 else targets
        return (outputs.argmax(1) == classes).sum().unsqueeze(0)

    @override
    def update_state(self, state: MetricState, outputs: Tensor, targets: Tensor) -> None:
        self._count(state, targets, outputs.argmax(1))

    @override
    def results(self, state: MetricState, count: int) -> dict[str, float]:
        correct = int(state["confusion"].diagonal().sum())
        return {"accuracy": correct / count, "correct": correct}

    @override
    def details(self, state: MetricState) -> dict[str, Any]:
        confusion = state["confusion"]
        counts, correct = confusion.sum(1).tolist(), confusion.diagonal().tolist()
        classes = [
            {"class": name, "accuracy": right / count if count else None, "correct": right, "count": count}
            for name, right, count in zip(self.spec.classes, correct, counts, strict=True)
        ]
        return {"classes": classes}

    @override
    def decide(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(1)

    @override
    def figures(self, evaluation: Evaluation, split: Split) -> dict[str, Figure]:
        from distrain.reporting import figures

        assert evaluation.watched is not None
        count = len(evaluation.watched)
        shown = split.read(torch.arange(count))
        predictions = figures.predictions(shown.images, shown.targets, evaluation.watched.long(), self.spec.classes)
        return {"predictions": predictions, **super().figures(evaluation, split)}

    @override
    def predict(self, outputs: Tensor, top: int) -> list[dict[str, Any]]:
        """``class`` and ``probability`` of the most probable class; with ``top`` > 1 also ``top``, a list of them."""
        # By logits, because probabilities may round to the same; stable, so that the first is evaluation's argmax.
        order = outputs.sort(dim=1, descending=True, stable=True).indices[:, :top]
        probabilities = self._loss.probabilities(outputs).gather(1, order)
        rows = []
        for classes, values in zip(order.tolist(), probabilities.tolist(), strict=True):
            ranked = [
                {"class": self.spec.classes[index], "probability": value}
                for index, value in zip(classes, values, strict=True)
            ]
            rows.append({**ranked[0], **({"top": ranked} if top > 1 else {})})
        return rows

    @override
    def largest_top(self) -> int:
        return len(self.spec.classes)
