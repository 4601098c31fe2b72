"""Residual networks (He et al. 2015, arXiv:1512.03385); bottlenecks stride in the 3×3 convolution ("v1.5")."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distrain.config.groups import ModelConfig
from distrain.config.registry import register
from distrain.config.setting import setting
from distrain.models.base import BlockSequence


@dataclass
class ResNetConfig(ModelConfig):
    """Keys of ``model=resnet18``, ``resnet34`` and ``resnet50``."""

    stem: str = setting(
        "cifar: one 3×3 convolution; imagenet: 7×7 convolution and pooling to a quarter of the size, from 64 pixels.",
        choices=("cifar", "imagenet"),
    )
    norm: str = setting(
        "Normalisation: batch uses other samples of the rank's batch; group (Wu & He 2018) and none don't.",
        choices=("batch", "group", "none"),
    )


def _convolution(in_channels: int, out_channels: int, kernel: int, stride: int, norm: str) -> nn.Conv2d:
    """A padded convolution; it has a bias only if no normalisation layer, which would cancel it, follows."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=norm == "none")


def _normalisation(channels: int, norm: str) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(math.gcd(32, channels), channels) if norm == "group" else nn.Identity()


class Stem(nn.Module):
    """Convolution, normalisation, max pooling (``imagenet`` only), ReLU.

    As everywhere in this package, ReLU follows the pooling, which gives the same values with less work.
    """

    def __init__(self, in_channels: int, out_channels: int, stem: str, norm: str) -> None:
        super().__init__()
        imagenet = stem == "imagenet"
        self.conv = _convolution(in_channels, out_channels, 7 if imagenet else 3, 2 if imagenet else 1, norm)
        self.norm = _normalisation(out_channels, norm)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if imagenet else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Maps ``[N, in_channels, H, W]`` to ``[N, out_channels, H, W]``; ``imagenet``: height and width / 4."""
        return torch.relu(self.pool(self.norm(self.conv(images))))


class Shortcut(nn.Module):
    """1×1 convolution and normalisation, for blocks that change the image size or the number of channels."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv = _convolution(in_channels, out_channels, 1, stride, norm)
        self.norm = _normalisation(out_channels, norm)

    def forward(self, images: Tensor) -> Tensor:
        """Maps ``[N, in_channels, H, W]`` to ``[N, out_channels, H/stride, W/stride]``."""
        out: Tensor = self.norm(self.conv(images))
        return out


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = _convolution(in_channels, width, 3, stride, norm)
        self.norm1 = _normalisation(width, norm)
        self.conv2 = _convolution(width, width, 3, 1, norm)
        self.norm2 = _normalisation(width, norm)
        same = stride == 1 and in_channels == width
        self.shortcut = nn.Identity() if same else Shortcut(in_channels, width, stride, norm)

    def forward(self, images: Tensor) -> Tensor:
        """Maps ``[N, in_channels, H, W]`` to ``[N, width, H/stride, W/stride]``."""
        out = torch.relu(self.norm1(self.conv1(images)))
        out = self.norm2(self.conv2(out))
        return torch.relu(out + self.shortcut(images))


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions beside a shortcut; the output has four times ``width`` channels."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, norm: str) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = _convolution(in_channels, width, 1, 1, norm)
        self.norm1 = _normalisation(width, norm)
        self.conv2 = _convolution(width, width, 3, stride, norm)
        self.norm2 = _normalisation(width, norm)
        self.conv3 = _convolution(width, out_channels, 1, 1, norm)
        self.norm3 = _normalisation(out_channels, norm)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else Shortcut(in_channels, out_channels, stride, norm)

    def forward(self, images: Tensor) -> Tensor:
        """Maps ``[N, in_channels, H, W]`` to ``[N, 4 * width, H/stride, W/stride]``."""
        out = torch.relu(self.norm1(self.conv1(images)))
        out = torch.relu(self.norm2(self.conv2(out)))
        out = self.norm3(self.conv3(out))
        return torch.relu(out + self.shortcut(images))


class Head(nn.Module):
    """Global average pooling, then a fully connected layer to the logits."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Maps ``[N, in_channels, H, W]`` to ``[N, num_classes]``."""
        out: Tensor = self.linear(images.mean((2, 3)))
        return out


class ResNet(BlockSequence):
    """Stem, four layers of residual blocks, head; a pipeline may split the model at each residual block.

    Convolution weights are initialised by He et al.'s normal distribution (fan out), biases with zeros. Without
    normalisation, the last convolution of every residual branch starts at zero instead, so that every block starts as
    its shortcut and activations keep their scale.

    Args:
        block: The type of residual block.
        depths: Number of blocks in each layer; each layer except the first halves the image.
        in_channels: Channels of the images.
        num_classes: Number of logits.
        stem: ``cifar`` or ``imagenet``.
        norm: ``batch``, ``group`` or ``none``.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        *,
        in_channels: int,
        num_classes: int,
        stem: str,
        norm: str,
    ) -> None:
        channels = 64
        blocks: dict[str, nn.Module] = {"stem": Stem(in_channels, channels, stem, norm)}
        for layer, depth in enumerate(depths, start=1):
            width = 64 * 2 ** (layer - 1)
            for index in range(depth):
                stride = 2 if layer > 1 and index == 0 else 1
                blocks[f"layer{layer}_{index}"] = block(channels, width, stride, norm)
                channels = width * block.expansion
        blocks["head"] = Head(channels, num_classes)
        super().__init__(blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if norm == "none":
            for module in self.children():
                if isinstance(module, BasicBlock | Bottleneck):
                    nn.init.zeros_((module.conv2 if isinstance(module, BasicBlock) else module.conv3).weight)


@register("model", "resnet18", ResNetConfig)
class ResNet18(ResNet):
    """ResNet-18: 11,689,512 parameters with the ImageNet stem, batch normalisation, 3 channels and 1000 classes."""

    def __init__(self, in_channels: int, num_classes: int, stem: str, norm: str) -> None:
        super().__init__(
            BasicBlock, (2, 2, 2, 2), in_channels=in_channels, num_classes=num_classes, stem=stem, norm=norm
        )


@register("model", "resnet34", ResNetConfig)
class ResNet34(ResNet):
    """ResNet-34: 21,797,672 parameters with the ImageNet stem, batch normalisation, 3 channels and 1000 classes."""

    def __init__(self, in_channels: int, num_classes: int, stem: str, norm: str) -> None:
        super().__init__(
            BasicBlock, (3, 4, 6, 3), in_channels=in_channels, num_classes=num_classes, stem=stem, norm=norm
        )


@register("model", "resnet50", ResNetConfig)
class ResNet50(ResNet):
    """ResNet-50: 25,557,032 parameters with the ImageNet stem, batch normalisation, 3 channels and 1000 classes."""

    def __init__(self, in_channels: int, num_classes: int, stem: str, norm: str) -> None:
        super().__init__(
            Bottleneck, (3, 4, 6, 3), in_channels=in_channels, num_classes=num_classes, stem=stem, norm=norm
        )
