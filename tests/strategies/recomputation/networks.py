"""Networks whose blocks show what a second computation may get wrong."""

from __future__ import annotations

from torch import Tensor, nn

from distrain.models.base import BlockSequence


def _block(channels_in: int, channels_out: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1)
    return nn.Sequential(convolution, nn.ReLU(inplace=True), nn.Dropout(0.2), nn.BatchNorm2d(channels_out))


class DropoutNet(BlockSequence):
    """A small CNN with BatchNorm and dropout in each block, and one that writes to its input."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
        blocks = {"first": _block(in_channels, 8), "second": _block(8, 8), "third": _block(8, 8)}
        super().__init__({**blocks, "in place": nn.Sequential(nn.ReLU(inplace=True), _block(8, 8)), "head": head})


class Residual(nn.Module):
    """A layer beside a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = _block(channels, channels)

    def forward(self, inputs: Tensor) -> Tensor:
        """Maps ``[N, channels, H, W]`` to the same."""
        result: Tensor = inputs + self.block(inputs)
        return result


class LayersNet(nn.Module):
    """No sequence: its blocks are those in its list, and its head."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 8, 3, padding=1)
        self.layers = nn.ModuleList([Residual(8), Residual(8), Residual(8)])
        self.head = nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images ``[N, C, H, W]`` to logits ``[N, num_classes]``."""
        features = self.stem(images)
        for layer in self.layers:
            features = layer(features)
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits
