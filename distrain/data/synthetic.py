"""Generated images of any shape: a smooth prototype per class, plus noise. They can be learned and need no files."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distrain.config.registry import register
from distrain.config.schema import DataConfig, setting
from distrain.data.base import DataSource, DataSpec, Images, Splits, assemble, check_shared_keys
from distrain.errors import ConfigError

#: Pixel values that are generated at a time.
_CHUNK_VALUES = 1 << 22
#: Factor by which prototypes are enlarged.
_COARSE = 4


@dataclass
class SyntheticConfig(DataConfig):
    """Keys of ``data=synthetic``."""

    channels: int = setting("Channels of each image.", at_least=1)
    height: int = setting("Height of each image in pixels.", at_least=1)
    width: int = setting("Width of each image in pixels.", at_least=1)
    classes: int = setting("Number of classes.", at_least=2)
    train_size: int = setting("Number of images for training and validation.", at_least=2)
    test_size: int = setting("Number of images for testing.", at_least=1)
    noise: float = setting("Standard deviation of the noise; 1 is the whole range of pixel values.", at_least=0)
    generator_seed: int = setting("Determines the images; independent of the run's seed.", at_least=0)


@register("data", "synthetic", SyntheticConfig)
class Synthetic(DataSource):
    """Image i is the prototype of class (i modulo the number of classes) plus Gaussian noise.

    Prototypes are enlarged random patterns, which are coarse enough to survive convolution and pooling.
    """

    def __init__(self, config: SyntheticConfig) -> None:
        self._config = config

    def describe(self) -> DataSpec:
        """Returns the configured shape and number of classes.

        Raises:
            ConfigError: The images need more memory than ``data.memory_limit_mb``.
        """
        c = self._config
        megabytes = (c.train_size + c.test_size) * c.channels * c.height * c.width / 2**20
        if megabytes > c.memory_limit_mb:
            problem = f"synthetic images are kept in memory, and these take {megabytes:.0f} MiB"
            raise ConfigError("data.memory_limit_mb", c.memory_limit_mb, problem)
        return check_shared_keys(c, DataSpec(c.channels, c.height, c.width, tuple(str(i) for i in range(c.classes))))

    def load(self) -> Splits:
        """Generates the images."""
        c, spec = self._config, self.describe()
        generator = torch.Generator().manual_seed(c.generator_seed)
        shape = (c.classes, c.channels, -(-c.height // _COARSE), -(-c.width // _COARSE))
        coarse = torch.rand(shape, generator=generator)
        prototypes = F.interpolate(coarse, (c.height, c.width), mode="bilinear", align_corners=False)
        train, test = (self._draw(prototypes, size, generator) for size in (c.train_size, c.test_size))
        return assemble(c, spec, train, test)

    def _draw(self, prototypes: Tensor, size: int, generator: torch.Generator) -> Images:
        labels = torch.arange(size) % len(prototypes)
        images = torch.empty((size, *prototypes.shape[1:]), dtype=torch.uint8)
        chunk = max(1, _CHUNK_VALUES // prototypes[0].numel())
        for start in range(0, size, chunk):
            values = prototypes[labels[start : start + chunk]]
            values += self._config.noise * torch.randn(values.shape, generator=generator)
            images[start : start + chunk] = values.mul_(255).round_().clamp_(0, 255).to(torch.uint8)
        return Images(images, labels)
