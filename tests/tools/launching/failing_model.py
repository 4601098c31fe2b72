"""A model that trains, fails or hangs, as its configuration says."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn


class FailingModel(nn.Module):
    """One linear layer that raises with ``behaviour=fail``, hangs with ``hang`` and trains with any other value."""

    def __init__(self, in_channels: int, num_classes: int, image_size: tuple[int, int], behaviour: str) -> None:
        super().__init__()
        self.behaviour = behaviour
        self.output = nn.Linear(in_channels * image_size[0] * image_size[1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        # Before training the model is tried on one or two images.
        if len(images) > 2:
            if self.behaviour == "fail":
                raise RuntimeError("as configured")
            if self.behaviour == "hang":
                time.sleep(600)
        logits: Tensor = self.output(torch.flatten(images, 1))
        return logits
