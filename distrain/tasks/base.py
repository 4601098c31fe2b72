"""What strategies, trainer and commands know of the work: a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor

from distrain.config.registry import choice
from distrain.config.schema import Config
from distrain.data.base import DataSpec
from distrain.data.batch import Targets
from distrain.errors import ConfigError, config_error
from distrain.optim.losses import describe_targets

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from distrain.data.base import Split

#: Sums of a task's metrics by name; those of several batches or ranks are added.
MetricState = dict[str, Tensor]

#: The task for each kind of targets.
_TASKS = {"class": "classification", "labels": "multilabel", "numbers": "regression", "mask": "segmentation"}

#: Values of ``data.balance`` that need no class weights.
UNWEIGHTED = ("none", "sampler")


@dataclass(frozen=True)
class Evaluation:
    """What a model does on a split; equal on all ranks.

    Attributes:
        loss: Mean loss over the samples.
        count: Samples.
        metrics: The task's metrics by name; see :meth:`Task.results`.
        state: What they were computed from, summed over all ranks, on the CPU.
        watched: :meth:`Task.decide` of each watched sample, on the CPU; ``None`` where the task decides nothing.
        per_class: Metrics that ``metrics`` chooses for each class, by name; ``None`` where one is not defined.
    """

    loss: float
    count: int
    metrics: Mapping[str, float]
    state: MetricState
    watched: Tensor | None
    per_class: Mapping[str, Sequence[float | None]] = field(default_factory=dict)


def class_rows(classes: Sequence[str], evaluation: Evaluation) -> list[dict[str, Any]]:
    """The chosen metrics of each class as a table: a row for each class, a column for each metric."""
    columns = evaluation.per_class
    return [
        {"class": name, **{metric: column[row] for metric, column in columns.items()}}
        for row, name in enumerate(classes)
    ]


class Task(ABC):
    """What a model is trained to do; subclasses are the choices of the group ``task``.

    A batch holds ``inputs`` for the model and ``targets`` for the task: a tensor, or several by name. Everything a task
    says of a batch is a sum, never a mean, so that sums over pieces, steps and ranks are exact.

    Args:
        config: The run's configuration.
        spec: What is known of the data before they are loaded.

    Attributes:
        target: Kind of the targets; see :attr:`distrain.data.base.DataSpec.target`. ``None``: any kind.
        metrics: Names of the means that are logged, for training and evaluation.
        further_results: Names of further metrics that :meth:`results` may give; they are logged if ``metrics`` asks.
        higher_is_better: Whether a larger :attr:`score` is better.
        output_name: What the model's outputs are called in an exported file.
    """

    target: ClassVar[str | None] = None
    output_name: ClassVar[str] = "outputs"
    metrics: ClassVar[tuple[str, ...]]
    further_results: ClassVar[tuple[str, ...]] = ()
    higher_is_better: ClassVar[bool] = True

    def __init__(self, config: Config, spec: DataSpec) -> None:
        self.config = config
        self.spec = spec

    @property
    @abstractmethod
    def output_size(self) -> int:
        """Numbers that the model's last layer gives for a sample."""

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the outputs for one sample."""
        return (self.output_size,)

    @property
    def score(self) -> str:
        """Name of the metric by which the best checkpoint is chosen, unless ``trainer.monitor`` names another."""
        return self.metrics[0]

    @property
    def validated_by_task(self) -> tuple[str, ...]:
        """Names of the metrics that are logged of every evaluation: :attr:`metrics` and :attr:`score`."""
        return tuple(dict.fromkeys((*self.metrics, self.score)))

    @property
    def validated(self) -> tuple[str, ...]:
        """Names of the metrics that are logged of an evaluation: the task's own, and those that ``metrics`` chooses."""
        return tuple(dict.fromkeys((*self.validated_by_task, *(metric.name for metric in self.config.metrics))))

    def set_class_weights(self, weights: Sequence[float]) -> None:
        """Multiplies the loss of each class by its weight from now on; the divisor stays the number of samples.

        All ranks call it with the same weights before they train or evaluate.

        Raises:
            ConfigError: See :meth:`check_class_weights`.
        """
        self.check_class_weights()

    def check_class_weights(self) -> None:
        """Refuses ``data.balance=loss`` where the loss takes no weights, or ``loss.class_weights`` gives them already.

        Raises:
            ConfigError: One line that says why.
        """
        raise ConfigError("data.balance", "loss", f"task={self.config.task.name} weights no classes", UNWEIGHTED)

    def check_mixing(self) -> None:
        """Refuses ``data.augment.mixing`` where the task or its loss doesn't take the targets of mixed images.

        Raises:
            ConfigError: One line that says why.
        """
        raise config_error("data.augment.mixing", f"task={self.config.task.name} takes no targets of mixed images")

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Targets) -> tuple[Tensor, int]:
        """The sum of the samples' losses, a float32 or float64 scalar, and the number of samples.

        Args:
            outputs: The model's, ``[n, …]``; possibly 16-bit numbers. n may be 0, and the sum is then 0.
            targets: Those of the same samples.
        """

    @abstractmethod
    def measure(self, outputs: Tensor, targets: Targets) -> Tensor:
        """Sums of :attr:`metrics` over the samples, ``[len(metrics)]``; cheap, since each training step does it."""

    def evaluate(self, forward: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        """Outputs in evaluation; a task may average over several views of each input."""
        return forward(inputs)

    @abstractmethod
    def metric_state(self, device: torch.device) -> MetricState:
        """Zeros to which :meth:`update_state` adds."""

    @abstractmethod
    def update_state(self, state: MetricState, outputs: Tensor, targets: Targets) -> None:
        """Adds what evaluation needs of a batch of at least one sample to ``state``, in place."""

    @abstractmethod
    def results(self, state: MetricState, count: int) -> dict[str, float]:
        """Metrics of a split: all of :attr:`metrics`, and more where they are worth a line in ``summary.json``.

        Args:
            state: Summed over all batches and ranks.
            count: Samples of the split.
        """

    def compared(self, form: str, outputs: Tensor, targets: Targets) -> tuple[Any, Any]:
        """What a metric that ``metrics`` chooses is given of a batch: by default the outputs and the targets.

        Args:
            form: One of :data:`distrain.tasks.known_metrics.FORMS`: the predicted classes, their probabilities, or the
                outputs themselves.
            outputs: The model's, ``[n, …]``.
            targets: Those of the same samples.
        """
        return outputs, targets

    def details(self, state: MetricState) -> dict[str, Any]:
        """More for the result file of ``evaluate``, as plain data; e.g. figures of each class."""
        return {}

    def decide(self, outputs: Tensor) -> Tensor | None:
        """One number a sample that the outputs stand for, ``[n]``, such as its class; ``None`` if there is no such."""
        return None

    def figures(self, evaluation: Evaluation, split: Split) -> dict[str, Figure]:
        """Pictures of an evaluation by name.

        Args:
            evaluation: Its ``watched`` are the first samples of the split.
            split: What was evaluated.
        """
        return {}

    def predict(self, outputs: Tensor, top: int) -> list[dict[str, Any]]:
        """What the outputs mean, as plain data, one dictionary a sample.

        Args:
            outputs: Finite float64 ``[n, …]`` on the CPU.
            top: How many answers a sample gets, the most probable first, where answers are ranked.
        """
        return [{"output": values} for values in outputs.tolist()]

    def masks(self, outputs: Tensor) -> Tensor | None:
        """Pictures of what the outputs mean, uint8 ``[n, H, W]``, one a sample; ``None`` if there are no such."""
        return None

    def named_results(self, outputs: Tensor) -> dict[str, Tensor]:
        """What an exported model returns, by name: what the outputs mean, as tensors ``[n, …]``.

        Args:
            outputs: The model's, float32 ``[n, …]``. They are traced, so nothing may depend on their values or on n.
        """
        return {self.output_name: outputs}

    def outputs_of(self, results: Mapping[str, Tensor]) -> Tensor:
        """Outputs for which :meth:`results` are those of a program that returned these :meth:`named_results`."""
        return results[self.output_name]

    def largest_top(self) -> int:
        """The largest ``top`` that :meth:`predict` can give."""
        return 1


def target_of(config: Config) -> str:
    """Kind of the targets that the configured task needs; ``class`` for a task of the user's that takes any kind."""
    return cast("type[Task]", choice("task", config.task.name).target).target or "class"


def build(config: Config, spec: DataSpec) -> Task:
    """The task that the configuration names.

    Raises:
        ConfigError: The data don't fit the task, or the loss doesn't.
    """
    task = cast("type[Task]", choice("task", config.task.name).target)
    if task.target not in (None, spec.target):
        has, needs = describe_targets(spec.target), describe_targets(str(task.target))
        problem = f"needs {needs}, and data={config.data.name} has {has}; type task={_TASKS[spec.target]}"
        if spec.target == "class" and hasattr(config.data, "target"):
            # Whole numbers may be classes or numbers; nobody but the user knows.
            problem += f", or data.target={task.target} if they are no classes"
        raise ConfigError("task.name", config.task.name, problem)
    return task(config, spec)
