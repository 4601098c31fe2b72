"""What the tasks have in common whose loss is the configuration's ``loss``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from typing_extensions import override

from distrain.config.registry import choices
from distrain.config.schema import Config
from distrain.data.base import DataSpec, Split
from distrain.data.evaluation_views import averaged_outputs
from distrain.errors import ConfigError, config_error
from distrain.optim import losses
from distrain.tasks.base import UNWEIGHTED, Evaluation, Task
from distrain.tasks.known_metrics import DECISIONS, PROBABILITIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Supervised(Task):
    """Outputs are compared with targets by the configured loss; each class has a name.

    In evaluation outputs are averaged over the views that ``trainer.test_views`` names.

    Raises:
        ConfigError: The data name no classes, or the loss doesn't fit them.
    """

    output_name = "logits"

    def __init__(self, config: Config, spec: DataSpec) -> None:
        super().__init__(config, spec)
        if not spec.classes:
            raise config_error("task.name", f"{config.task.name} needs data that name their classes")
        self._loss = losses.build(config.loss, spec)

    @property
    @override
    def output_size(self) -> int:
        return len(self.spec.classes)

    @override
    def set_class_weights(self, weights: Sequence[float]) -> None:
        self.check_class_weights()
        self._loss.set_class_weights(weights)

    @override
    def check_class_weights(self) -> None:
        if not self._loss.takes_class_weights:
            raise ConfigError(
                "data.balance", "loss", f"loss={self.config.loss.name} takes no class weights", UNWEIGHTED
            )
        if getattr(self.config.loss, "class_weights", None) is not None:
            raise ConfigError("data.balance", "loss", "chooses loss.class_weights, and they are given", UNWEIGHTED)

    @override
    def check_mixing(self) -> None:
        mixing, kind = self.config.data.augment.mixing, self.spec.target
        if kind == "mask" and mixing.mixup_alpha:
            problem = (
                "a pixel has one class, and can't have a share of two; data.augment.mixing.cutmix_alpha cuts masks"
            )
            raise ConfigError("data.augment.mixing.mixup_alpha", mixing.mixup_alpha, problem)
        if kind == "numbers" and mixing.cutmix_alpha:
            problem = "numbers don't follow from the area of a box; data.augment.mixing.mixup_alpha mixes them"
            raise ConfigError("data.augment.mixing.cutmix_alpha", mixing.cutmix_alpha, problem)
        if kind != "mask" and kind not in self._loss.mixed_kinds:
            problem = f"loss={self.config.loss.name} takes no targets of mixed images"
            fitting = sorted(
                name for name, each in choices("loss").items() if kind in getattr(each.target, "mixed_kinds", ())
            )
            raise config_error("data.augment.mixing", problem, [f"loss={name}" for name in fitting])

    @override
    def loss(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        return self._loss(outputs, targets), len(targets)

    @override
    def compared(self, form: str, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Class numbers or indicators are int64, decisions too; probabilities are float64."""
        if form == PROBABILITIES:
            return self._loss.probabilities(outputs.double()), targets.long()
        return (self._decisions(outputs) if form == DECISIONS else outputs), targets.long()

    def _decisions(self, outputs: Tensor) -> Tensor:
        """The predicted classes, int64, as targets."""
        return outputs.argmax(1)

    @override
    def figures(self, evaluation: Evaluation, split: Split) -> dict[str, Figure]:
        """A table for each list of rows in :meth:`details`, such as one row for each label."""
        from distrain.reporting import figures

        return {name: figures.table(rows) for name, rows in self.details(evaluation.state).items()}

    @override
    def evaluate(self, forward: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        return averaged_outputs(forward, inputs, self.config.trainer.test_views)
