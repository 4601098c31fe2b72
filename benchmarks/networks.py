"""Networks in plain torch, as a user may have written them, which ``benchmarks/verify.py`` verifies beside others.

They know nothing of distrain and are no sequences of blocks. ``model=custom model._target_=networks.Separable`` names
one where this folder is on Python's path.
"""

from __future__ import annotations

from torch import Tensor, nn


class Separable(nn.Module):
    """Depthwise and pointwise convolutions with shortcuts, as in MobileNet.

    Args:
        in_channels: Channels of the images.
        num_classes: Number of logits.
        norm: ``batch`` or ``group``.
        dropout: Rate before the last layer.
    """

    def __init__(self, in_channels: int, num_classes: int, norm: str = "batch", dropout: float = 0.0) -> None:
        super().__init__()
        width = 16
        self.stem = nn.Conv2d(in_channels, width, 3, stride=2, padding=1, bias=False)
        self.blocks = nn.ModuleList()
        for _ in range(3):
            layer = nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(4, width)
            depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
            self.blocks.append(nn.Sequential(depthwise, layer, nn.SiLU(), nn.Conv2d(width, width, 1)))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images ``[N, in_channels, H, W]`` to logits ``[N, num_classes]``."""
        features = self.stem(images)
        for block in self.blocks:
            features = features + block(features)
        logits: Tensor = self.head(self.dropout(features.mean((2, 3))))
        return logits


class Patches(nn.Module):
    """A transformer on patches of 4 × 4 pixels.

    Args:
        in_channels: Channels of the images.
        num_classes: Number of logits.
        tied: Whether both layers are the same one, whose parameters then have two names.
    """

    def __init__(self, in_channels: int, num_classes: int, tied: bool = False) -> None:
        super().__init__()
        width = 32
        self.embed = nn.Conv2d(in_channels, width, 4, stride=4)
        self.first = _layer(width)
        self.second = self.first if tied else _layer(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images ``[N, in_channels, H, W]`` to logits ``[N, num_classes]``."""
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        logits: Tensor = self.head(self.second(self.first(tokens)).mean(1))
        return logits


def _layer(width: int) -> nn.Module:
    return nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
