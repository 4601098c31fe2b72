"""How far a run has come, and how that is read back from a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: Names of fields in checkpoints of 0.1, which knew no metric but accuracy, and what they are called now.
_RENAMED = {"val_accuracy": "val_score", "best_accuracy": "best_score"}


@dataclass
class Progress:
    """How far the run has come; all that the trainer itself needs to go on.

    Attributes:
        step: Updates done.
        epoch: Epochs finished.
        epoch_samples: Samples of the current epoch that all ranks together have consumed.
        samples: Samples consumed since the start.
        epoch_sums: Loss, the task's metrics and count of this epoch's samples so far, summed; empty for no samples.
        train_loss: Mean loss of the last whole epoch.
        val_score: The task's first metric on the validation split after it.
        best_score: The best of these so far.
        best_step: The step it was reached at.
        skipped_updates: Updates left out because a gradient was not finite; of ranks that decide alone each one's.
        rewinds: How often the run went back to a checkpoint for the same reason.
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
    skipped_updates: int = 0
    rewinds: int = 0

    @classmethod
    def read(cls, saved: Mapping[str, Any], metrics: int) -> Progress:
        """Takes back what was saved, which may be a stranger's.

        Args:
            saved: The fields by name; one that is missing came with a later release and has its default.
            metrics: How many metrics the run's task has.

        Raises:
            ValueError: A name that is no field, or a value that can't be one; the message names it.
        """
        saved = {_RENAMED.get(name, name): value for name, value in saved.items()}
        fields = {spec.name: spec for spec in dataclasses.fields(cls)}
        for name, value in saved.items():
            if name not in fields:
                raise ValueError(f"progress.{name} is unknown")
            if not _fits(str(fields[name].type), value):
                raise ValueError(f"progress.{name}={value!r} is no {fields[name].type}")
        sums = saved.get("epoch_sums", [])
        if sums and len(sums) != 2 + metrics:
            raise ValueError(f"progress.epoch_sums={sums!r} must hold loss, {metrics} metrics and count")
        return cls(**saved)


def _fits(kind: str, value: object) -> bool:
    if value is None:
        return kind.endswith("| None")
    if isinstance(value, bool):
        return False
    if kind.startswith("int"):
        return isinstance(value, int) and value >= 0
    if kind.startswith("float"):
        return isinstance(value, int | float)
    return isinstance(value, list) and all(_fits("float", each) for each in value)
