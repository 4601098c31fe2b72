"""The network of "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (Jordan 2024, arXiv 2404.00498)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distrain.config.groups import ModelConfig
from distrain.config.registry import register
from distrain.config.setting import setting
from distrain.data.base import Split
from distrain.errors import ConfigError
from distrain.models.base import BlockSequence

#: Number of training images that the whitening filters are computed from.
_WHITENING_IMAGES = 5000
#: Pixel values that are processed at a time.
_CHUNK_VALUES = 1 << 20
#: Side of the whitening convolution's kernel in pixels.
_KERNEL = 2
#: Added to the eigenvalues before their square roots divide the filters.
_EPS = 5e-4


@dataclass
class AirbenchConfig(ModelConfig):
    """Keys of ``model=airbench_cnn``."""

    widths: list[int] = setting("Channels of each block.", at_least=1)
    batchnorm_momentum: float = setting(
        "Weight of the current batch in BatchNorm's running statistics.", above=0, at_most=1
    )
    scale: float = setting("Factor that multiplies the logits.", above=0)


class Whitening(nn.Module):
    """2×2 convolution that whitens image patches (outputs are uncorrelated and have equal variance), then GELU.

    The filters are the eigenvectors of the patches' covariance matrix, each divided by the square root of its
    eigenvalue, and their negatives (§3.2). They are not trained; the bias is.

    Args:
        in_channels: Channels of the images.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 2 * in_channels * _KERNEL**2, _KERNEL)
        self.conv.weight.requires_grad_(False)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Maps ``[N, C, H, W]`` to ``[N, 8 * C, H - 1, W - 1]``."""
        return F.gelu(self.conv(images))

    @torch.no_grad()
    def fit(self, images: Split, mean: Sequence[float], std: Sequence[float]) -> None:
        """Computes the filters from the first 5,000 training images.

        Every rank computes the same filters. Sums of products of bytes are integers that float64 represents exactly, so
        the order of addition doesn't matter; the effect of normalisation is applied to the sums. An eigenvector's sign,
        which libraries choose differently, is fixed: its largest component is positive.

        Args:
            images: The training images.
            mean: Channel means that normalise pixel values in [0, 1], or floating-point images as they are.
            std: Channel standard deviations, likewise.
        """
        channels, height, width = images.shape
        size = channels * _KERNEL**2
        products, sums, count = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64), 0
        chunk_size = max(1, _CHUNK_VALUES // (channels * height * width))
        for chunk in images.chunks(chunk_size, limit=_WHITENING_IMAGES):
            patches = F.unfold(chunk.images.double(), _KERNEL).transpose(1, 2).flatten(0, 1)
            products += patches.T @ patches
            sums += patches.sum(0)
            count += len(patches)
        shift, scale = (
            images.one * torch.tensor(values, dtype=torch.float64).repeat_interleave(_KERNEL**2)
            for values in (mean, std)
        )
        sums, products = sums / count, products / count
        moments = products - torch.outer(shift, sums) - torch.outer(sums, shift) + torch.outer(shift, shift)
        variances, vectors = torch.linalg.eigh(moments / torch.outer(scale, scale))
        filters = (vectors / (variances + _EPS).sqrt()).T.flip(0)
        largest = filters.gather(1, filters.abs().argmax(1, keepdim=True))
        filters = filters * largest.sign()
        self.conv.weight.copy_(torch.cat((filters, -filters)).view_as(self.conv.weight))


class Block(nn.Module):
    """conv 3×3 - max pooling 2×2 - BatchNorm - GELU - conv 3×3 - BatchNorm - GELU.

    Convolutions have no bias, and the first filters are initialised as the identity (Dirac initialisation, §3.3).
    BatchNorm has a trained bias; its scale stays 1.

    Args:
        in_channels: Input channels.
        out_channels: Output channels.
        momentum: Weight of the current batch in BatchNorm's running statistics.
    """

    def __init__(self, in_channels: int, out_channels: int, momentum: float) -> None:
        super().__init__()
        self.conv1 = _convolution(in_channels, out_channels)
        self.norm1 = _norm(out_channels, momentum)
        self.conv2 = _convolution(out_channels, out_channels)
        self.norm2 = _norm(out_channels, momentum)

    def forward(self, images: Tensor) -> Tensor:
        """Maps ``[N, in_channels, H, W]`` to ``[N, out_channels, H // 2, W // 2]``."""
        images = F.gelu(self.norm1(F.max_pool2d(self.conv1(images), 2)))
        return F.gelu(self.norm2(self.conv2(images)))


class Head(nn.Module):
    """Global max pooling, fully connected layer without bias, scaled logits.

    Args:
        in_channels: Input channels.
        num_classes: Number of logits.
        scale: Factor that multiplies the logits.
    """

    def __init__(self, in_channels: int, num_classes: int, scale: float) -> None:
        super().__init__()
        self.linear, self._scale = nn.Linear(in_channels, num_classes, bias=False), scale

    def forward(self, features: Tensor) -> Tensor:
        """Maps ``[N, in_channels, H, W]`` to ``[N, num_classes]``."""
        logits: Tensor = self.linear(features.amax((2, 3))) * self._scale
        return logits


@register("model", "airbench_cnn", AirbenchConfig)
class AirbenchCNN(BlockSequence):
    """Whitening, blocks of conv - pool - BatchNorm - conv - BatchNorm, global max pooling, linear layer.

    With widths 64, 256 and 256 and 3×32×32 images it is the network that reaches 94 % in the paper, with 1.97 million
    parameters.

    Args:
        in_channels: Channels of the images.
        num_classes: Number of logits.
        image_size: Height and width of the images in pixels.
        widths: Channels of each block; each halves height and width.
        batchnorm_momentum: Weight of the current batch in BatchNorm's running statistics.
        scale: Factor that multiplies the logits.

    Raises:
        ConfigError: ``widths`` is empty, or the images are too small for this number of blocks.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        image_size: tuple[int, int],
        widths: Sequence[int],
        batchnorm_momentum: float,
        scale: float,
    ) -> None:
        height, width = image_size
        min_side = 2 ** len(widths) + 1
        if not widths:
            raise ConfigError("model.widths", list(widths), "needs at least one block")
        if min(image_size) < min_side:
            problem = f"needs images of at least {min_side}x{min_side} pixels; the data set's are {height}x{width}"
            raise ConfigError("model.widths", list(widths), problem)
        blocks: dict[str, nn.Module] = {"whitening": Whitening(in_channels)}
        channels = 2 * in_channels * _KERNEL**2
        for number, block_width in enumerate(widths, 1):
            blocks[f"block{number}"] = Block(channels, block_width, batchnorm_momentum)
            channels = block_width
        super().__init__({**blocks, "head": Head(channels, num_classes, scale)})

    def initialise_from(self, images: Split, mean: Sequence[float], std: Sequence[float]) -> None:
        """Computes the whitening filters; see :class:`distrain.models.base.DataDependentInit`."""
        cast(Whitening, self.get_submodule("whitening")).fit(images, mean, std)


def _convolution(in_channels: int, out_channels: int) -> nn.Conv2d:
    layer = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    nn.init.dirac_(layer.weight[: layer.in_channels])
    return layer


def _norm(channels: int, momentum: float) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(channels, eps=1e-12, momentum=momentum)
    layer.weight.requires_grad_(False)
    return layer
