"""A run's position: counts of steps, epochs and samples, and its best results; read back from a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from distrain.checkpoint.state_schema import shorten

#: Field names in checkpoints of release 0.1, whose only metric was accuracy, and today's names.
_RENAMED = {"val_accuracy": "val_score", "best_accuracy": "best_score"}


@dataclass
class Progress:
    """The run's position: all state of the trainer itself that a resumed run needs.

    Attributes:
        step: Number of updates done.
        epoch: Number of epochs finished.
        epoch_samples: Samples of the current epoch that all ranks together have consumed.
        samples: Samples consumed since the start.
        epoch_sums: Sums over this epoch's samples so far: loss, the task's metrics, count; empty before any sample.
        train_loss: Mean loss of the last complete epoch.
        val_score: The task's own score on the validation split after that epoch.
        best_score: The best monitored number of the epochs that were saved.
        best_step: The step at which it was reached.
        best_epoch: The epoch at whose end it was reached, counted from 1.
        skipped_updates: Updates skipped because a gradient was not finite. Where each rank decides alone, the sum of
            all ranks' skips.
        rewinds: How often the run went back to a checkpoint because gradients were not finite.
        val_metrics: All metrics of the validation of ``val_score``, and its ``loss``; what is not finite is saved as
            null.
        monitor: How the validation's best model is chosen, such as ``max val/accuracy``; see
            :class:`distrain.training.monitor.Monitor`.
        patience_score: The best monitored number of all epochs, which ``trainer.patience`` goes by.
        epochs_without_improvement: Epochs since then.
        stopped_of_epochs: ``trainer.epochs`` of the run that stopped early at this position.
        lr_factor: What ``scheduler=plateau`` multiplies the learning rate by, from here on.
        lr_score: The best monitored number, by which ``scheduler=plateau`` goes.
        lr_bad_epochs: Epochs since then, or since it lowered the rate.
        lr_cooldown: Epochs that it lets pass before it counts again.
    """

    step: int = 0
    epoch: int = 0
    epoch_samples: int = 0
    samples: int = 0
    epoch_sums: list[float] = field(default_factory=list)
    train_loss: float | None = None
    val_score: float | None = None
    best_score: float | None = None
    best_step: int | None = None
    best_epoch: int | None = None
    skipped_updates: int = 0
    rewinds: int = 0
    val_metrics: dict[str, float | None] = field(default_factory=dict)
    monitor: str | None = None
    patience_score: float | None = None
    epochs_without_improvement: int = 0
    stopped_of_epochs: int | None = None
    lr_factor: float = 1.0
    lr_score: float | None = None
    lr_bad_epochs: int = 0
    lr_cooldown: int = 0

    def advance(self, samples: int) -> None:
        """One more update, on a global batch of so many samples."""
        self.step += 1
        self.epoch_samples += samples
        self.samples += samples

    @classmethod
    def read(cls, saved: Mapping[str, Any], metrics: int) -> Progress:
        """Makes a :class:`Progress` of saved fields, which are not trusted.

        Args:
            saved: The fields by name. Older releases saved fewer; a missing field has its default.
            metrics: Number of metrics of the run's task.

        Raises:
            ValueError: A name is not a field, or a value is not of the field's type; the message names it.
        """
        saved = {_RENAMED.get(name, name): value for name, value in saved.items()}
        fields = {spec.name: spec for spec in dataclasses.fields(cls)}
        for name, value in saved.items():
            if name not in fields:
                raise ValueError(f"progress.{name} is unknown")
            if not _fits(str(fields[name].type), value):
                raise ValueError(f"progress.{name}={shorten(value)} is not of type {fields[name].type}")
        sums = saved.get("epoch_sums", [])
        if sums and len(sums) != 2 + metrics:
            raise ValueError(f"progress.epoch_sums={shorten(sums)} must hold loss, {metrics} metrics and count")
        return cls(**saved)


def _fits(kind: str, value: object) -> bool:
    """Whether a value read from JSON fits a field's annotation."""
    if value is None:
        return kind.endswith("| None")
    if isinstance(value, bool):
        return False
    if kind.startswith("int"):
        return isinstance(value, int) and value >= 0
    if kind.startswith("float"):
        return isinstance(value, int | float)
    if kind.startswith("str"):
        return isinstance(value, str)
    if kind.startswith("dict"):
        return isinstance(value, dict) and all(_fits("float | None", item) for item in value.values())
    return isinstance(value, list) and all(_fits("float", item) for item in value)
