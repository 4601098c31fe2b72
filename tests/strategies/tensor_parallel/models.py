"""Models with layers of every kind that can be divided."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """As timm's: one layer for queries, keys and values, norms of queries and keys that all heads share, dropout."""

    def __init__(self, width: int, heads: int, rate: float) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = nn.LayerNorm(width // heads), nn.LayerNorm(width // heads)
        self.attn_drop, self.proj_drop = nn.Dropout(rate), nn.Dropout(rate)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        query, key, value = self.qkv(x).reshape(n, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        rate = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(self.q_norm(query), self.k_norm(key), value, dropout_p=rate)
        y: Tensor = self.proj_drop(self.proj(x.transpose(1, 2).reshape(n, tokens, width)))
        return y


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, rate: float) -> None:
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(width, hidden), nn.GELU(), nn.Dropout(rate)
        self.fc2, self.drop2 = nn.Linear(hidden, width), nn.Dropout(rate)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))
        return y


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, rate: float) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads, rate)
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width, hidden, rate)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class ViT(nn.Module):
    """A vision transformer with numbers of heads and channels that neither 2 nor 3 ranks divide."""

    def __init__(self, in_channels: int, num_classes: int, heads: int = 5, hidden: int = 23, rate: float = 0.2) -> None:
        super().__init__()
        width = 4 * heads
        self.patch_embed = nn.Conv2d(in_channels, width, 4, 4)
        self.token, self.positions = (
            nn.Parameter(torch.zeros(1, 1, width)),
            nn.Parameter(0.1 * torch.randn(1, 5, width)),
        )
        self.blocks = nn.Sequential(*(Block(width, heads, hidden, rate) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images ``[N, C, 8, 8]`` to logits ``[N, num_classes]``."""
        tokens = self.patch_embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(tokens), -1, -1), tokens], 1) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return logits


class Encoder(nn.Module):
    """torch's own attention, with dropout of several kinds; tokens come first in one layer, samples in the other."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.embed = nn.Linear(4 * in_channels, 12)
        self.first = nn.TransformerEncoderLayer(12, 3, 11, dropout=0.2, batch_first=True)
        self.second = nn.TransformerEncoderLayer(12, 4, 10, dropout=0.2, norm_first=True)
        self.head = nn.Linear(12, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images ``[N, C, 8, 8]`` to logits ``[N, num_classes]``."""
        tokens = self.first(self.embed(F.unfold(images, 2, stride=2).transpose(1, 2)))
        logits: Tensor = self.head(self.second(tokens.transpose(0, 1)).mean(0))
        return logits


class GroupedNet(nn.Module):
    """Inverted residuals: depthwise, squeezed and grouped convolutions between pointwise ones, and dropout."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 7, 3, padding=1)
        self.expand, self.expand_norm = nn.Conv2d(7, 10, 1, bias=False), nn.BatchNorm2d(10)
        self.depthwise, self.depthwise_norm = nn.Conv2d(10, 10, 3, padding=1, groups=10), nn.GroupNorm(5, 10)
        self.squeeze, self.excite = nn.Conv2d(10, 3, 1), nn.Conv2d(3, 10, 1)
        self.grouped = nn.Conv2d(10, 15, 3, padding=1, groups=5)
        self.drop, self.project = nn.Dropout2d(0.3), nn.Conv2d(15, 7, 1)
        self.hidden, self.head = nn.Linear(7 * 16, 11), nn.Linear(11, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images ``[N, C, 8, 8]`` to logits ``[N, num_classes]``."""
        x = self.stem(images)
        y = F.silu(self.expand_norm(self.expand(x)))
        y = F.relu(self.depthwise_norm(self.depthwise(y)))
        y = self.drop(F.relu(self.grouped(y)))
        x = F.max_pool2d(x + self.project(y), 2)
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(F.pad(x, (0, 0, 0, 0, 0, 3)))))).mean((1, 2, 3), True)
        logits: Tensor = self.head(torch.relu(self.hidden(x.view(len(x), -1))))
        return logits


class Units(nn.Module):
    """Two layers with an activation function between them, whose one parameter all units share."""

    def __init__(self, in_channels: int, num_classes: int, fails: bool = False) -> None:
        super().__init__()
        self.first, self.act = nn.Linear(64 * in_channels, 8), nn.PReLU()
        self.second, self.fails = nn.Linear(8, num_classes), fails

    def forward(self, images: Tensor) -> Tensor:
        """Maps images ``[N, C, 8, 8]`` to logits ``[N, num_classes]``.

        Raises:
            RuntimeError: The second rank has fewer than all units, if that is wanted.
        """
        if self.fails and self.first.out_features < 8 and os.environ.get("RANK") == "1":
            raise RuntimeError("too few units")
        logits: Tensor = self.second(self.act(self.first(images.flatten(1))))
        return logits


class Halved(nn.Linear):
    """Saves half of its weight."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight.detach() / 2

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict({**state, f"{prefix}weight": state[f"{prefix}weight"] * 2}, prefix, *args)


class SavedInItsOwnWay(nn.Sequential):
    """Two layers that can be divided, and one that can't, whose saved state is not its parameters."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        layers = nn.Conv2d(in_channels, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()
        super().__init__(*layers, nn.Linear(128, 12), nn.ReLU(), Halved(12, num_classes))
