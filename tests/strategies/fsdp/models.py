"""Models whose modules use parameters in other ways than their own call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.strategies.tensor_parallel.models import Halved

#: Whether this rank's :class:`SometimesSkipped` leaves a layer out.
SKIPS = False


class Transformer(nn.Module):
    """A small ViT: a class token, attention layers that read a child's weight, and an embedding that is used twice."""

    def __init__(self, in_channels: int, num_classes: int, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(4 * in_channels, width, bias=False)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.1 * torch.randn(1, 17, width))
        self.frozen = nn.Linear(width, width)
        self.frozen.requires_grad_(False)
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True) for _ in range(2))
        )
        self.norm = nn.LayerNorm(width)
        self.scale = nn.Linear(width, width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images ``[N, C, 8, 8]`` to logits ``[N, num_classes]``."""
        patches = nn.functional.unfold(images, 2, stride=2).transpose(1, 2)
        tokens = self.frozen(self.embed(patches))
        tokens = torch.cat([self.token.expand(len(tokens), -1, -1), tokens], 1) + self.positions
        features = self.norm(self.blocks(tokens))[:, 0]
        # The embedding's weight again, and a layer that is called twice.
        features = self.scale(self.scale(features)) + (features @ self.embed.weight) @ self.embed.weight.T
        logits: Tensor = self.head(features)
        return logits


class SometimesSkipped(nn.Module):
    """Leaves a layer out on ranks that say so, as random depth does."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.first, self.middle = nn.Linear(in_channels * 64, 16), nn.Linear(16, 16)
        self.more, self.last = nn.Linear(16, 16), nn.Linear(16, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images ``[N, C, 8, 8]`` to logits ``[N, num_classes]``."""
        features = self.first(images.flatten(1)).relu()
        if not SKIPS:
            features = self.more(self.middle(features).relu())
        logits: Tensor = self.last(features)
        return logits


class OwnState(nn.Sequential):
    """A layer that has two names, and one that saves its state in its own way."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        twice = nn.Linear(16, 16)
        first = nn.Linear(in_channels * 64, 16)
        super().__init__(nn.Flatten(), first, twice, nn.ReLU(), twice, nn.ReLU(), Halved(16, num_classes))
