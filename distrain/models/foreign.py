"""Keys of models that are not distrain's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distrain.config.groups import ModelConfig
from distrain.config.setting import setting


@dataclass(frozen=True)
class ChannelStatistics:
    """What images are normalised by, for pixel values in [0, 1].

    Attributes:
        mean: Of each channel.
        std: Standard deviation of each channel.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass
class ForeignModelConfig(ModelConfig):
    """A model of the user's, or of another library."""

    kwargs: dict[str, Any] = setting("Arguments for the target, besides those that the data set determines.")
    auxiliary_weight: float = setting(
        "Weight in the training loss of the loss of each auxiliary head: a further output of the logits' shape. "
        "0: such outputs are ignored.",
        at_least=0,
        default=0.0,
    )

    def identity(self) -> tuple[str, str]:
        """The key that says which model this is, and its value."""
        return "model._target_", self._target_

    def target_arguments(self) -> dict[str, Any]:
        """Arguments for the target that this configuration gives."""
        return dict(self.kwargs)

    def channel_statistics(self) -> ChannelStatistics | None:
        """What the model wants images to be normalised by; ``None`` if that is the data set's business."""
        return None


@dataclass
class UserModelConfig(ForeignModelConfig):
    """A model whose arguments may have any names."""

    arguments: dict[str, str] | None = setting(
        "What the target's arguments mean that the data set determines: classes, channels, image_size, height or width "
        "by name, such as {num_classes: classes}. null: found out by their names; {}: nothing is passed.",
        default=None,
    )


def auxiliary_weight(config: ModelConfig) -> float:
    """Weight of the loss of auxiliary heads."""
    return config.auxiliary_weight if isinstance(config, ForeignModelConfig) else 0.0


def identity(config: ModelConfig) -> tuple[str, str]:
    """The key that says which model a configuration means, and its value."""
    return config.identity() if isinstance(config, ForeignModelConfig) else ("model._target_", config._target_)
