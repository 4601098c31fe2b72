"""What classification and segmentation have in common: a count of which class is predicted for which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from distrain.data.base import Split
from distrain.tasks.base import Evaluation, MetricState
from distrain.tasks.supervised import Supervised

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class CountsConfusions(Supervised):
    """Its metrics follow from a confusion matrix; a subclass says what is counted in it."""

    @override
    def metric_state(self, device: torch.device) -> MetricState:
        """``confusion``: int64 ``[classes, classes]``, true class by row, predicted class by column."""
        size = self.output_size
        return {"confusion": torch.zeros(size, size, dtype=torch.int64, device=device)}

    def _count(self, state: MetricState, true: Tensor, predicted: Tensor) -> None:
        """Adds pairs of classes, int64 ``[n]`` each, to the confusion matrix, in place."""
        confusion = state["confusion"]
        cells = true * self.output_size + predicted
        confusion += torch.bincount(cells, minlength=confusion.numel()).view_as(confusion)

    @override
    def named_results(self, outputs: Tensor) -> dict[str, Tensor]:
        """``probabilities`` with the shape of the outputs; ``class``, the number of the predicted one, int64."""
        return {"probabilities": self._loss.probabilities(outputs), "class": outputs.argmax(1)}

    @override
    def outputs_of(self, results: Mapping[str, Tensor]) -> Tensor:
        if self.output_name in results:
            return results[self.output_name]
        # Of the class and not of the probabilities, of which two may round to the same number.
        return functional.one_hot(results["class"], self.output_size).movedim(-1, 1)

    @override
    def figures(self, evaluation: Evaluation, split: Split) -> dict[str, Figure]:
        from distrain.reporting import figures

        return {"confusion_matrix": figures.confusion_matrix(evaluation.state["confusion"], self.spec.classes)}
