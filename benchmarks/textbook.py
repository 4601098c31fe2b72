"""The CIFAR-10 CNN in a module of its own, so that a script whose startup is timed imports nothing else."""

from __future__ import annotations

from torch import nn


def textbook_cnn() -> nn.Module:
    """The CIFAR-10 CNN as a user would write it by hand: 122,570 parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
