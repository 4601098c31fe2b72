"""Normalisation of images as the model wants it, instead of by the statistics of the data set."""

from __future__ import annotations

from distrain.config.schema import Config
from distrain.data.base import DataSpec
from distrain.errors import ConfigError
from distrain.models.foreign import ChannelStatistics, ForeignModelConfig


def of_model(config: Config, spec: DataSpec) -> ChannelStatistics | None:
    """The mean and standard deviation that the model brings; ``None`` if ``data.mean`` and ``data.std`` say them.

    Args:
        config: The run's configuration.
        spec: What is known of the data.

    Raises:
        ConfigError: The data set's keys say them too, or the images are such that the model's don't fit.
    """
    statistics = config.model.channel_statistics() if isinstance(config.model, ForeignModelConfig) else None
    if statistics is None:
        return None
    for name, value in (("mean", config.data.mean), ("std", config.data.std)):
        if value is not None:
            raise ConfigError(f"data.{name}", value, "the model brings its own; model.normalisation=data uses this one")
    problem = ""
    if spec.dtype == "float":
        problem = "is for pixel values from 0 to 255, and the images are floating-point numbers of any range"
    elif spec.channels != len(statistics.mean):
        problem = f"is for images of {len(statistics.mean)} channels, and the data set's have {spec.channels}"
    if problem:
        raise ConfigError("model.normalisation", "model", f"{problem}; model.normalisation=data measures the images")
    return statistics
