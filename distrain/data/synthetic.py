"""Generated images of any shape, with targets of any kind. They can be learned and need no files."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distrain.config.groups import DataConfig
from distrain.config.registry import register
from distrain.config.setting import setting
from distrain.data.base import (
    IGNORED,
    TARGETS,
    DataSource,
    DataSpec,
    Images,
    Splits,
    assemble,
    check_shared_keys,
)
from distrain.errors import ConfigError

#: Pixel values that are generated at a time.
_CHUNK_VALUES = 1 << 22
#: Factor by which prototypes are enlarged.
_COARSE = 4
#: One of so many pixels of a mask has no known class.
_KNOWN_PIXELS = 50


@dataclass
class SyntheticConfig(DataConfig):
    """Keys of ``data=synthetic``."""

    channels: int = setting("Channels of each image.", at_least=1)
    height: int = setting("Height of each image in pixels.", at_least=1)
    width: int = setting("Width of each image in pixels.", at_least=1)
    classes: int = setting("Number of classes, of labels or of numbers, by target.", at_least=1)
    target: str = setting(
        "Kind of targets: class: one class an image; labels: several; numbers: some numbers; mask: a class a pixel.",
        choices=TARGETS,
        default="class",
    )
    train_size: int = setting("Number of images for training and validation.", at_least=2)
    test_size: int = setting("Number of images for testing.", at_least=1)
    noise: float = setting("Standard deviation of the noise; 1 is the whole range of pixel values.", at_least=0)
    generator_seed: int = setting("Determines the images; independent of the run's seed.", at_least=0)


@register("data", "synthetic", SyntheticConfig)
class Synthetic(DataSource):
    """Images are made of prototypes, one of each class, and Gaussian noise.

    Prototypes are enlarged random patterns, which are coarse enough to survive convolution and pooling. By the kind of
    targets, an image is the prototype of class (i modulo the number of classes) for image i; the mean of the prototypes
    of its labels; the sum of the prototypes, each times its number, so that a linear model can find the numbers; or at
    each pixel the colour of the pixel's class.
    """

    def __init__(self, config: SyntheticConfig) -> None:
        self._config = config

    def describe(self) -> DataSpec:
        """Returns the configured shape and number of classes.

        Raises:
            ConfigError: There is one class alone, or the images need more memory than ``data.memory_limit_mb``.
        """
        c = self._config
        if c.classes == 1 and c.target in ("class", "mask"):
            raise ConfigError("data.classes", 1, f"leaves nothing to tell apart with data.target={c.target}; type more")
        megabytes = (c.train_size + c.test_size) * c.channels * c.height * c.width / 2**20
        if megabytes > c.memory_limit_mb:
            problem = f"synthetic images are kept in memory, and these take {megabytes:.0f} MiB"
            raise ConfigError("data.memory_limit_mb", c.memory_limit_mb, problem)
        names = tuple(str(i) for i in range(c.classes))
        return check_shared_keys(c, DataSpec(c.channels, c.height, c.width, names, target=c.target))

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
        targets = self._targets(len(prototypes), size, generator)
        images = torch.empty((size, *prototypes.shape[1:]), dtype=torch.uint8)
        chunk = max(1, _CHUNK_VALUES // prototypes[0].numel())
        for start in range(0, size, chunk):
            values = self._without_noise(prototypes, targets[start : start + chunk])
            values += self._config.noise * torch.randn(values.shape, generator=generator)
            images[start : start + chunk] = values.mul_(255).round_().clamp_(0, 255).to(torch.uint8)
        if self._config.target == "mask":
            targets[torch.randint(_KNOWN_PIXELS, targets.shape, generator=generator) == 0] = IGNORED
        return Images(images, targets)

    def _targets(self, classes: int, size: int, generator: torch.Generator) -> Tensor:
        c = self._config
        if c.target == "labels":
            return torch.randint(2, (size, classes), dtype=torch.uint8, generator=generator)
        if c.target == "numbers":
            return torch.rand((size, classes), generator=generator)
        if c.target == "mask":
            shape = (size, 1, -(-c.height // _COARSE), -(-c.width // _COARSE))
            coarse = torch.randint(classes, shape, generator=generator).float()
            return F.interpolate(coarse, (c.height, c.width), mode="nearest").squeeze(1).to(torch.uint8)
        return torch.arange(size) % classes

    def _without_noise(self, prototypes: Tensor, targets: Tensor) -> Tensor:
        if self._config.target == "class":
            return prototypes[targets]
        if self._config.target == "mask":
            classes = torch.arange(len(prototypes))
            shares = (targets.unsqueeze(1) == classes.view(1, -1, 1, 1)).float()
            return torch.einsum("nkhw,kc->nchw", shares, prototypes[:, :, 0, 0])
        shares = targets.float()
        if self._config.target == "labels":
            return torch.einsum("nk,kchw->nchw", shares / shares.sum(1, keepdim=True).clamp_min(1), prototypes)
        return torch.einsum("nk,kchw->nchw", shares / len(prototypes), prototypes)
