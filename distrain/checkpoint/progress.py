"""How far a run has come, and how that is read back from a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: Loss, correct and count of no samples.
_NOTHING = (0.0, 0.0, 0.0)


@dataclass
class Progress:
    """How far the run has come; all that the trainer itself needs to go on.

    Attributes:
        step: Updates done.
        epoch: Epochs finished.
        epoch_samples: Samples of the current epoch that all ranks together have consumed.
        samples: Samples consumed since the start.
        epoch_sums: Loss, correct and count of this epoch's samples so far.
        train_loss: Mean loss of the last whole epoch.
        val_accuracy: Validation accuracy after it.
        best_accuracy: Best validation accuracy so far.
        best_step: The step it was reached at.
        skipped_updates: Updates left out because a gradient was not finite; of ranks that decide alone each one's.
        rewinds: How often the run went back to a checkpoint for the same reason.
    """

    step: int = 0
    epoch: int = 0
    epoch_samples: int = 0
    samples: int = 0
    epoch_sums: list[float] = field(default_factory=lambda: [*_NOTHING])
    train_loss: float | None = None
    val_accuracy: float | None = None
    best_accuracy: float | None = None
    best_step: int | None = None
    skipped_updates: int = 0
    rewinds: int = 0

    @classmethod
    def read(cls, saved: Mapping[str, Any]) -> Progress:
        """Takes back what was saved, which may be a stranger's.

        Args:
            saved: The fields by name; one that is missing came with a later release and has its default.

        Raises:
            ValueError: A name that is no field, or a value that can't be one; the message names it.
        """
        fields = {spec.name: spec for spec in dataclasses.fields(cls)}
        for name, value in saved.items():
            if name not in fields:
                raise ValueError(f"progress.{name} is unknown")
            if not _fits(str(fields[name].type), value):
                raise ValueError(f"progress.{name}={value!r} is no {fields[name].type}")
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
    return isinstance(value, list) and len(value) == len(_NOTHING) and all(_fits("float", each) for each in value)
