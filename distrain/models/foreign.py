"""Keys of models that are not distrain's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distrain.config.schema import ModelConfig, setting


@dataclass
class ForeignModelConfig(ModelConfig):
    """A model of the user's, or of another library."""

    kwargs: dict[str, Any] = setting("Arguments for the target, besides those that the data set determines.")
    arguments: dict[str, str] | None = setting(
        "What the target's arguments mean that the data set determines: classes, channels, image_size, height or width "
        "by name, such as {num_classes: classes}. null: found out by their names; {}: nothing is passed.",
        default=None,
    )
    auxiliary_weight: float = setting(
        "Weight in the training loss of the loss of each auxiliary head: a further output of the logits' shape. "
        "0: such outputs are ignored.",
        at_least=0,
        default=0.0,
    )


def auxiliary_weight(config: ModelConfig) -> float:
    """Weight of the loss of auxiliary heads."""
    return config.auxiliary_weight if isinstance(config, ForeignModelConfig) else 0.0
