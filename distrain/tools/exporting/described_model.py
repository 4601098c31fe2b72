"""A run's model with all that a folder says of it, in its files for programs and in its card for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import distrain
from distrain.config.schema import Config
from distrain.data.base import DataSpec


@dataclass(frozen=True)
class DescribedModel:
    """What is known of the model.

    Attributes:
        run: The run's folder; the card uses its ``summary.json`` and ``certificate.json`` if there are such.
        config: The run's configuration.
        arguments: Those with which the model's class was called.
        spec: Of the images.
        mean: Channel means with which images are normalised.
        std: Channel standard deviations with which images are normalised.
        step: Number of updates of the checkpoint.
        kind: ``last``, or the average of the model: ``ema`` or ``swa``.
    """

    run: Path
    config: Config
    arguments: Mapping[str, Any]
    spec: DataSpec
    mean: tuple[float, ...]
    std: tuple[float, ...]
    step: int
    kind: str

    def needed_to_use(self) -> dict[str, Any]:
        """What is needed to use the model, whatever loads it, as plain data."""
        return {
            "model": self.config.model.name,
            "task": self.config.task.name,
            "classes": list(self.spec.classes),
            "input_shape": [self.spec.channels, self.spec.height, self.spec.width],
            "mean": list(self.mean),
            "std": list(self.std),
            "step": self.step,
            "weights": self.kind,
            "version": distrain.__version__,
        }
