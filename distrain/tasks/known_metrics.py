"""The metrics that ``metrics=[NAME, …]`` knows by name: which class of torchmetrics computes each, and from what."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from distrain.data.base import DataSpec

#: What a metric is given for a sample; see :meth:`distrain.tasks.base.Task.compared`.
DECISIONS, PROBABILITIES, OUTPUTS = FORMS = ("decisions", "probabilities", "outputs")

_TOP = re.compile(r"top([1-9][0-9]{0,3})")


@dataclass(frozen=True)
class KnownMetric:
    """A metric of torchmetrics.

    Attributes:
        target: Name of its class below ``torchmetrics``.
        form: What it is given.
        arguments: Those of its class.
        per_class: Name of the same number for each class, if it is one: the class is made once more, with
            ``average="none"``.
        is_ranking: It ranks the samples by the probability of each class, so that a class of which the split has no
            sample, or no other, has no value. The metric is the mean over the others.
    """

    target: str
    form: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    per_class: str | None = None
    is_ranking: bool = False


def known_metrics(spec: DataSpec, target: str | None) -> dict[str, KnownMetric]:
    """The metrics for a task's kind of targets, by name.

    Args:
        spec: What is known of the data.
        target: The kind; ``None`` for a task of the user's, whose outputs only its user knows.
    """
    size = len(spec.classes)
    if target == "class":
        return {
            **_averaged("Multiclass", {"num_classes": size}),
            "cohen_kappa": KnownMetric(
                "classification.MulticlassCohenKappa", DECISIONS, {"num_classes": size, "validate_args": False}
            ),
            "matthews": KnownMetric(
                "classification.MulticlassMatthewsCorrCoef", DECISIONS, {"num_classes": size, "validate_args": False}
            ),
            **{f"top{count}": _top(count, size) for count in (3, 5, 10) if count <= size},
        }
    if target == "labels":
        return _averaged("Multilabel", {"num_labels": size})
    if target == "mask":
        arguments = {"num_classes": size, "average": "macro", "validate_args": False}
        return {"dice": KnownMetric("classification.MulticlassF1Score", DECISIONS, arguments, "dice")}
    if target == "numbers":
        return {
            "rmse": KnownMetric("regression.MeanSquaredError", OUTPUTS, {"squared": False}),
            "mape": KnownMetric("regression.MeanAbsolutePercentageError", OUTPUTS),
            "explained_variance": KnownMetric("regression.ExplainedVariance", OUTPUTS),
        }
    return {}


def find(name: str, spec: DataSpec, target: str | None) -> KnownMetric | None:
    """The metric of a name; ``None`` if there is no such for this kind of targets."""
    top = _TOP.fullmatch(name)
    if top and target == "class" and int(top[1]) <= len(spec.classes):
        return _top(int(top[1]), len(spec.classes))
    return known_metrics(spec, target).get(name)


def _top(count: int, classes: int) -> KnownMetric:
    arguments = {"num_classes": classes, "top_k": count, "average": "micro", "validate_args": False}
    return KnownMetric("classification.MulticlassAccuracy", PROBABILITIES, arguments)


def _averaged(prefix: str, size: Mapping[str, int]) -> dict[str, KnownMetric]:
    """Metrics of each class, as a mean over the classes."""
    found = {}
    for name, target in (("f1", "F1Score"), ("precision", "Precision"), ("recall", "Recall")):
        for average in ("macro", "weighted"):
            arguments = {**size, "average": average, "validate_args": False}
            per_class = name if average == "macro" else None
            found[f"{name}_{average}"] = KnownMetric(
                f"classification.{prefix}{target}", DECISIONS, arguments, per_class
            )
    for name, target in (("auroc", "AUROC"), ("average_precision", "AveragePrecision")):
        arguments = {**size, "average": "none", "validate_args": False}
        found[name] = KnownMetric(
            f"classification.{prefix}{target}", PROBABILITIES, arguments, per_class=name, is_ranking=True
        )
    return found
