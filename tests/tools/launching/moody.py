"""A model that trains, fails or hangs, as its configuration says."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn


class Moody(nn.Module):
    """One layer, and a mood: ``bad`` raises and ``slow`` never ends; any other trains."""

    def __init__(self, in_channels: int, num_classes: int, image_size: tuple[int, int], mood: str) -> None:
        super().__init__()
        self.mood = mood
        self.output = nn.Linear(in_channels * image_size[0] * image_size[1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        # Shapes are tried out before the training, on the meta device.
        if images.device.type != "meta":
            if self.mood == "bad":
                raise RuntimeError("in a bad mood")
            if self.mood == "slow":
                time.sleep(600)
        logits: Tensor = self.output(torch.flatten(images, 1))
        return logits
