"""Two small convolutional networks with Keras' default initialisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distrain.config.groups import ModelConfig
from distrain.config.registry import register
from distrain.errors import ConfigError
from distrain.models.base import BlockSequence


class ConvBlock(nn.Module):
    """3×3 convolution, 2×2 max pooling if ``pool``, ReLU.

    ReLU comes after the pooling. Both orders give the same outputs and gradients, since ReLU is monotonic, and this one
    applies ReLU to a quarter of the values.

    Args:
        in_channels: Input channels.
        out_channels: Output channels.
        padding: Rows and columns of zeros on each side: 1 keeps the image's size, 0 shrinks it by a pixel on each side.
        pool: Whether to halve height and width (rounded down).
    """

    def __init__(self, in_channels: int, out_channels: int, *, padding: int, pool: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=padding)
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Maps ``[N, in_channels, H, W]`` to ``[N, out_channels, H', W']``."""
        return torch.relu(self.pool(self.conv(images)))


class DenseBlock(nn.Module):
    """Flatten, fully connected layer, ReLU.

    Args:
        in_features: Input values per sample.
        out_features: Output values per sample.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)

    def forward(self, features: Tensor) -> Tensor:
        """Maps ``[N, ...]`` to ``[N, out_features]``."""
        return torch.relu(self.linear(features.flatten(1)))


@register("model", "simple_cnn", ModelConfig)
class SimpleCNN(BlockSequence):
    """conv 3×3 - pool - conv 3×3 - pool - dense 128 - classes, with 32 and 64 filters.

    Convolutions keep the image's size, so that images as small as 8×8 work. The outputs are logits; softmax is part of
    the loss. As in Keras, weights are Glorot uniform (Glorot & Bengio 2010) and biases zero.

    Args:
        in_channels: Channels of the images.
        num_classes: Number of logits.
        image_size: Height and width of the images in pixels.

    Raises:
        ConfigError: Height or width is below 4.
    """

    def __init__(self, in_channels: int, num_classes: int, image_size: tuple[int, int]) -> None:
        height, width = (side // 4 for side in _at_least(4, image_size, "simple_cnn"))
        super().__init__(
            {
                "block1": ConvBlock(in_channels, 32, padding=1, pool=True),
                "block2": ConvBlock(32, 64, padding=1, pool=True),
                "dense": DenseBlock(64 * height * width, 128),
                "output": nn.Linear(128, num_classes),
            }
        )
        self.apply(_initialise_as_keras)


@register("model", "cifar_cnn", ModelConfig)
class CifarCNN(BlockSequence):
    """conv 32 - pool - conv 64 - pool - conv 64 - dense 64 - classes, all convolutions 3×3 without padding.

    This is the network of TensorFlow's CNN tutorial; it has 122,570 parameters for 3×32×32 images and 10 classes. The
    outputs are logits. As in Keras, weights are Glorot uniform (Glorot & Bengio 2010) and biases zero.

    Args:
        in_channels: Channels of the images.
        num_classes: Number of logits.
        image_size: Height and width of the images in pixels.

    Raises:
        ConfigError: Height or width is below 18.
    """

    def __init__(self, in_channels: int, num_classes: int, image_size: tuple[int, int]) -> None:
        height, width = (((side - 2) // 2 - 2) // 2 - 2 for side in _at_least(18, image_size, "cifar_cnn"))
        super().__init__(
            {
                "block1": ConvBlock(in_channels, 32, padding=0, pool=True),
                "block2": ConvBlock(32, 64, padding=0, pool=True),
                "block3": ConvBlock(64, 64, padding=0, pool=False),
                "dense": DenseBlock(64 * height * width, 64),
                "output": nn.Linear(64, num_classes),
            }
        )
        self.apply(_initialise_as_keras)


def _at_least(side: int, image_size: tuple[int, int], name: str) -> tuple[int, int]:
    height, width = image_size
    if min(height, width) < side:
        raise ConfigError(
            "model", name, f"needs images of at least {side}x{side} pixels; the data set's are {height}x{width}"
        )
    return height, width


def _initialise_as_keras(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
