"""A small network that gives a class for each pixel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distrain.config.groups import ModelConfig
from distrain.config.registry import register
from distrain.config.setting import setting
from distrain.models.base import BlockSequence


@dataclass
class DilatedCNNConfig(ModelConfig):
    """Keys of ``model=dilated_cnn``."""

    widths: list[int] = setting("Filters of each block; the dilation doubles from block to block.", at_least=1)


class DilatedBlock(nn.Module):
    """3×3 convolution with dilation, ReLU; the image keeps its size.

    Args:
        in_channels: Input channels.
        out_channels: Output channels.
        dilation: Distance in pixels between the filter's weights.
    """

    def __init__(self, in_channels: int, out_channels: int, dilation: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=dilation, dilation=dilation)

    def forward(self, images: Tensor) -> Tensor:
        """Maps ``[N, in_channels, H, W]`` to ``[N, out_channels, H, W]``."""
        return torch.relu(self.conv(images))


@register("model", "dilated_cnn", DilatedCNNConfig)
class DilatedCNN(BlockSequence):
    """Dilated convolutions of full resolution, then a 1×1 convolution to the classes (Yu & Koltun 2015, 1511.07122).

    It needs no particular size of images. Its outputs are logits, ``[N, num_classes, H, W]``. It is meant to try
    ``task=segmentation``; a network that pools and enlarges again, such as a U-Net, is better for large images.

    Args:
        in_channels: Channels of the images.
        num_classes: Number of logits of a pixel.
        widths: Filters of each block; block i, counted from 0, has the dilation ``2 ** i``.
    """

    def __init__(self, in_channels: int, num_classes: int, widths: list[int]) -> None:
        channels = [in_channels, *widths]
        blocks: dict[str, nn.Module] = {
            f"block{index + 1}": DilatedBlock(channels[index], width, 2**index) for index, width in enumerate(widths)
        }
        super().__init__({**blocks, "output": nn.Conv2d(channels[-1], num_classes, 1)})
