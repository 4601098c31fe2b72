"""task=segmentation: a class for each pixel of an image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from distrain.config.groups import TaskConfig
from distrain.config.registry import register
from distrain.config.schema import Config
from distrain.data.base import IGNORED, DataSpec, Split
from distrain.errors import ConfigError, config_error
from distrain.tasks.base import Evaluation, MetricState
from distrain.tasks.confusion import CountsConfusions
from distrain.tasks.known_metrics import DECISIONS
from distrain.tasks.supervised import Supervised

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@register("task", "segmentation", TaskConfig)
class Segmentation(CountsConfusions):
    """The model gives a logit for each class at each pixel, ``[n, classes, H, W]``; targets are masks.

    Masks are uint8 ``[n, H, W]``; pixels of value :data:`~distrain.data.base.IGNORED` count nowhere. The loss of a
    sample is the mean over its known pixels, so the count of a batch stays its samples, and each image weighs the same
    however much of it is known. So does the training's ``pixel_accuracy``; evaluation counts all pixels of the split
    alike. The best checkpoint is the one with the highest ``mean_iou``.

    Raises:
        ConfigError: There are more classes than a mask can tell apart, or the test views move the pixels.
    """

    target = "mask"
    metrics = ("pixel_accuracy",)

    def __init__(self, config: Config, spec: DataSpec) -> None:
        super().__init__(config, spec)
        if len(spec.classes) > IGNORED:
            problem = f"{config.task.name} can tell {IGNORED} classes apart, and the data have {len(spec.classes)}"
            raise config_error("task.name", problem)
        if config.trainer.test_views == "flip_translate":
            problem = "moves the pixels, so outputs for each pixel can't be averaged"
            raise ConfigError("trainer.test_views", "flip_translate", problem, ["plain", "flip"])

    @property
    @override
    def output_shape(self) -> tuple[int, ...]:
        return (self.output_size, self.spec.height, self.spec.width)

    @property
    @override
    def score(self) -> str:
        return "mean_iou"

    @override
    def measure(self, outputs: Tensor, targets: Tensor) -> Tensor:
        right = (outputs.argmax(1) == targets).flatten(1).sum(1)
        known = (targets != IGNORED).flatten(1).sum(1).clamp_min(1)
        return (right / known).sum().unsqueeze(0)

    @override
    def update_state(self, state: MetricState, outputs: Tensor, targets: Tensor) -> None:
        known = targets != IGNORED
        self._count(state, targets[known].long(), outputs.argmax(1)[known])

    @override
    def compared(self, form: str, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The known pixels of all samples: decisions and targets ``[pixels]``, probabilities ``[pixels, classes]``."""
        known = targets != IGNORED
        values, true = super().compared(form, outputs, targets)
        return (values if form == DECISIONS else values.movedim(1, -1))[known], true[known]

    @override
    def results(self, state: MetricState, count: int) -> dict[str, float]:
        """``mean_iou`` is the mean over the classes that occur in a mask or a prediction."""
        confusion = state["confusion"]
        ratios = [ratio for ratio in _intersections_over_unions(confusion) if ratio is not None]
        return {
            "pixel_accuracy": int(confusion.diagonal().sum()) / max(int(confusion.sum()), 1),
            "mean_iou": sum(ratios) / max(len(ratios), 1),
        }

    @override
    def details(self, state: MetricState) -> dict[str, Any]:
        confusion = state["confusion"]
        pixels, right = confusion.sum(1).tolist(), confusion.diagonal().tolist()
        rows = zip(self.spec.classes, _intersections_over_unions(confusion), pixels, right, strict=True)
        return {
            "classes": [
                {"class": name, "iou": ratio, "accuracy": hits / known if known else None, "pixels": known}
                for name, ratio, known, hits in rows
            ]
        }

    @override
    def figures(self, evaluation: Evaluation, split: Split) -> dict[str, Figure]:
        return {**super().figures(evaluation, split), **Supervised.figures(self, evaluation, split)}

    @override
    def predict(self, outputs: Tensor, top: int) -> list[dict[str, Any]]:
        """``pixels``: how many pixels each class has, by name."""
        masks, size = outputs.argmax(1).flatten(1), self.output_size
        counts = [torch.bincount(mask, minlength=size).tolist() for mask in masks]
        return [{"pixels": dict(zip(self.spec.classes, each, strict=True))} for each in counts]

    @override
    def masks(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(1).to(torch.uint8)


def _intersections_over_unions(confusion: Tensor) -> list[float | None]:
    """Of each class, the pixels that are true and predicted, as a share of those that are either; ``None`` for none."""
    both = confusion.diagonal()
    either = confusion.sum(0) + confusion.sum(1) - both
    return [hits / pixels if pixels else None for hits, pixels in zip(both.tolist(), either.tolist(), strict=True)]
