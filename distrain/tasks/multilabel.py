"""task=multilabel: any number of labels for each image."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from distrain.config.groups import TaskConfig
from distrain.config.registry import register
from distrain.config.schema import Config
from distrain.config.setting import setting
from distrain.data.base import DataSpec
from distrain.optim.losses import at_least_32_bits
from distrain.tasks.base import MetricState
from distrain.tasks.supervised import Supervised


@dataclass
class MultilabelConfig(TaskConfig):
    """Keys of ``task=multilabel``."""

    threshold: float = setting("A label is predicted if its probability is at least this.", above=0, below=1)


@register("task", "multilabel", MultilabelConfig)
class Multilabel(Supervised):
    """The model gives a logit for each label; targets say which labels apply, uint8 ``[n, labels]``, 0 or 1.

    ``exact_match`` is the share of samples all of whose labels are right, ``label_accuracy`` that of all single
    decisions. The best checkpoint is the one with the highest ``macro_f1``.
    """

    target = "labels"
    metrics = ("label_accuracy", "exact_match")
    further_results = ("micro_f1",)

    def __init__(self, config: Config, spec: DataSpec) -> None:
        super().__init__(config, spec)
        assert isinstance(config.task, MultilabelConfig)
        self._threshold = config.task.threshold

    @property
    @override
    def score(self) -> str:
        return "macro_f1"

    def _decided(self, outputs: Tensor) -> Tensor:
        """Which labels are predicted: bool ``[n, labels]``."""
        return self._loss.probabilities(at_least_32_bits(outputs)) >= self._threshold

    @override
    def _decisions(self, outputs: Tensor) -> Tensor:
        return self._decided(outputs).long()

    @override
    def measure(self, outputs: Tensor, targets: Tensor) -> Tensor:
        # A label applies to a mixed image if it applies to at least half of it.
        right = self._decided(outputs) == (targets >= 0.5)
        return torch.stack((right.sum() / right.shape[1], right.all(1).sum()))

    @override
    def metric_state(self, device: torch.device) -> MetricState:
        """Counts as int64.

        ``labels``: ``[4, labels]``, samples in which the label applies, in which it is predicted, in which both are so,
        and in which the decision is right. ``exact_match``: samples all of whose labels are right.
        """
        labels = torch.zeros(4, self.output_size, dtype=torch.int64, device=device)
        return {"labels": labels, "exact_match": torch.zeros(1, dtype=torch.int64, device=device)}

    @override
    def update_state(self, state: MetricState, outputs: Tensor, targets: Tensor) -> None:
        applies, decided = targets.bool(), self._decided(outputs)
        right = applies == decided
        state["labels"] += torch.stack((applies.sum(0), decided.sum(0), (applies & decided).sum(0), right.sum(0)))
        state["exact_match"] += right.all(1).sum()

    @override
    def results(self, state: MetricState, count: int) -> dict[str, float]:
        applies, predicted, both, right = state["labels"].tolist()
        size = self.output_size
        f1 = [_f1(*counts) for counts in zip(applies, predicted, both, strict=True)]
        return {
            "label_accuracy": sum(right) / (count * size),
            "exact_match": int(state["exact_match"]) / count,
            "macro_f1": math.fsum(f1) / size,
            "micro_f1": _f1(sum(applies), sum(predicted), sum(both)),
        }

    @override
    def details(self, state: MetricState) -> dict[str, Any]:
        rows = []
        for name, applies, predicted, both, _ in zip(self.spec.classes, *state["labels"].tolist(), strict=True):
            rows.append(
                {
                    "label": name,
                    "precision": both / predicted if predicted else None,
                    "recall": both / applies if applies else None,
                    "f1": _f1(applies, predicted, both),
                    "predicted": predicted,
                    "count": applies,
                }
            )
        return {"labels": rows}

    @override
    def named_results(self, outputs: Tensor) -> dict[str, Tensor]:
        """``probabilities`` ``[n, labels]``; ``labels``, which of them are predicted, bool ``[n, labels]``."""
        return {"probabilities": self._loss.probabilities(outputs), "labels": self._decided(outputs)}

    @override
    def outputs_of(self, results: Mapping[str, Tensor]) -> Tensor:
        if self.output_name in results:
            return results[self.output_name]
        return torch.where(results["labels"], torch.inf, -torch.inf)

    @override
    def predict(self, outputs: Tensor, top: int) -> list[dict[str, Any]]:
        """``labels``: names of the labels that are predicted. ``probabilities``: of every label, by name."""
        names, probabilities = self.spec.classes, self._loss.probabilities(outputs)
        decided = (probabilities >= self._threshold).tolist()
        return [
            {
                "labels": [name for name, is_predicted in zip(names, flags, strict=True) if is_predicted],
                "probabilities": dict(zip(names, values, strict=True)),
            }
            for flags, values in zip(decided, probabilities.tolist(), strict=True)
        ]


def _f1(applies: int, predicted: int, both: int) -> float:
    """The harmonic mean of precision and recall; 0 where neither is defined."""
    return 2 * both / (applies + predicted) if applies + predicted else 0.0
