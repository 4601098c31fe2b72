"""The best checkpoint and early stopping: ``trainer.monitor``, ``mode``, ``patience`` and ``min_delta``.

The monitored value is the same on all ranks (see :mod:`distrain.training.evaluation`), and so is what follows from it:
all ranks keep the same best value and stop after the same step, without a message of their own. The counts are part of
:class:`~distrain.checkpoint.progress.Progress`, so that a resumed run goes on counting.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from distrain.checkpoint.progress import Progress
from distrain.checkpoint.state_schema import shorten
from distrain.config.schema import TrainerConfig
from distrain.errors import ConfigError
from distrain.optim.schedulers import PlateauConfig
from distrain.tasks import chosen_metrics
from distrain.tasks.base import Evaluation, Task
from distrain.training import averaging, plateau

log = logging.getLogger(__name__)

_PREFIX, _LOSS = "val/", "loss"
#: Metrics of distrain's own tasks of which less is better.
_ERRORS = frozenset((_LOSS, "mse", "mae"))
_MODES = ("max", "min")


@dataclass(frozen=True)
class Monitor:
    """The number of a validation by which models are compared.

    Attributes:
        name: ``loss``, or the name of a metric.
        higher_is_better: Whether more is better.
        score: Name of the task's own score, by which models are compared unless ``trainer.monitor`` is set.
        config: The keys of the section ``trainer``.
        plateau: Lowers the learning rate by this number; ``None``: nothing does.
    """

    name: str
    higher_is_better: bool
    score: str
    config: TrainerConfig
    plateau: PlateauConfig | None

    @classmethod
    def of(cls, task: Task) -> Monitor:
        """The configured monitor; also tries the metrics that ``metrics`` chooses.

        Raises:
            ConfigError: A metric can't be used, there is no such number, or nobody says whether more of it is better.
        """
        config, scheduler = task.config.trainer, task.config.scheduler
        directions = chosen_metrics.check(task)
        names = [_LOSS, *averaging.validated(task)]
        name = f"ema_{task.score}" if "ema" in averaging.names(config) else task.score
        if config.monitor is not None:
            name = config.monitor.removeprefix(_PREFIX)
            if not config.monitor.startswith(_PREFIX) or name not in names:
                problem = "no such number of the validation; metrics=[…] adds some"
                raise ConfigError("trainer.monitor", config.monitor, problem, [f"{_PREFIX}{each}" for each in names])
        better = config.mode == "max"
        if config.mode is None:
            plain = averaging.without_average(name) if name not in task.validated else name
            known = directions.get(plain, plain not in _ERRORS)
            if plain == task.score:
                known = task.higher_is_better
            if known is None:
                problem = f"its class doesn't say whether more of {_PREFIX}{name} is better"
                raise ConfigError("trainer.mode", None, problem, _MODES)
            better = known
        return cls(name, better, task.score, config, scheduler if isinstance(scheduler, PlateauConfig) else None)

    def check_data(self, validation_samples: int) -> None:
        """Refuses to monitor a validation that never happens.

        Raises:
            ConfigError: There are no validation samples.
        """
        for key, value in (
            ("trainer.monitor", self.config.monitor),
            ("trainer.patience", self.config.patience),
            ("scheduler", self.plateau and self.plateau.name),
        ):
            if value is not None and not validation_samples:
                problem = "needs validation samples, and there are none; data.val_fraction=0.1 holds some out"
                raise ConfigError(key, value, problem)

    def value(self, evaluation: Evaluation) -> float:
        """The monitored number of a validation."""
        return evaluation.loss if self.name == _LOSS else evaluation.metrics[self.name]

    def is_better(self, value: float, best: float | None, min_delta: float = 0.0) -> bool:
        """Whether a value is better than the best so far, by more than ``min_delta``; NaN never is."""
        if not math.isfinite(value):
            return False
        if best is None:
            return True
        return value - best > min_delta if self.higher_is_better else best - value > min_delta

    def note(self, evaluation: Evaluation, progress: Progress) -> None:
        """Counts an epoch, at whose end the validation gave ``evaluation``."""
        value = self.value(evaluation)
        progress.monitor = str(self)
        progress.val_score = evaluation.metrics[self.score]
        progress.val_metrics = {_LOSS: evaluation.loss, **evaluation.metrics}
        if not math.isfinite(value):
            log.warning("%s%s is %s after epoch %d, which is no improvement", _PREFIX, self.name, value, progress.epoch)
        if self.is_better(value, progress.patience_score, self.config.min_delta):
            progress.patience_score, progress.epochs_without_improvement = value, 0
        else:
            progress.epochs_without_improvement += 1
        if self.plateau is not None:
            plateau.note(self.plateau, value, self.is_better, progress)
        progress.stopped_of_epochs = None
        if self.gives_up(progress):
            progress.stopped_of_epochs = self.config.epochs
            log.info(
                "stopped early, after epoch %d of %d: %s%s has not got better in %d epochs",
                progress.epoch,
                self.config.epochs,
                _PREFIX,
                self.name,
                progress.epochs_without_improvement,
            )

    def gives_up(self, progress: Progress) -> bool:
        """Whether the run ends because there was no improvement for too long."""
        patience = self.config.patience
        return patience is not None and progress.epochs_without_improvement >= patience

    def resume(self, progress: Progress) -> None:
        """Adapts the position of a checkpoint to this run's monitor."""
        saved = progress.monitor
        # Releases without monitors chose the best by the task's own score.
        is_same = saved == str(self) or (saved is None and self.name == self.score and self.config.mode is None)
        if not is_same and progress.best_score is not None:
            before = shorten(saved or self.score)
            log.info("the best checkpoint so far was chosen by %s: it is chosen anew, by '%s'", before, self)
            progress.best_score = progress.best_step = progress.best_epoch = None
        if not is_same:
            progress.patience_score, progress.epochs_without_improvement = None, 0
            progress.lr_score, progress.lr_bad_epochs = None, 0
        if self.plateau is None:
            progress.lr_factor = 1.0
        planned = progress.stopped_of_epochs
        if planned is not None and self.config.epochs > planned and self.gives_up(progress):
            log.info("the run had stopped early; with more epochs, trainer.patience counts from here on")
            progress.epochs_without_improvement = 0

    def __str__(self) -> str:
        return f"{'max' if self.higher_is_better else 'min'} {_PREFIX}{self.name}"
