"""Losses as sums over samples, from which a strategy makes exact means over ranks and accumulated steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from distrain.config.registry import choice, register
from distrain.config.schema import LossConfig, setting


class Loss(ABC):
    """The sum over samples of each sample's loss; whoever calls divides by the global number of samples.

    Args:
        config: The loss's configuration.
    """

    def __init__(self, config: Any) -> None:
        self.config = config

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The summed loss.

        Args:
            logits: ``[N, C]``, not yet through a softmax or sigmoid; 16-bit ones are computed with as float32.
            labels: Classes as int64 ``[N]``.

        Returns:
            A float32 or float64 scalar; 0 for an empty batch.
        """
        return self._sum(logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits, labels)

    @abstractmethod
    def _sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The same, for logits of at least 32 bits."""

    def probabilities(self, logits: Tensor) -> Tensor:
        """What the outputs of a model trained by this loss mean: each class's probability, ``[N, C]``."""
        return logits.softmax(1)


@dataclass
class CrossEntropyConfig(LossConfig):
    """Cross-entropy."""

    label_smoothing: float = setting(
        "Share of each target that is spread evenly over all classes (Szegedy et al. 2015, arXiv:1512.00567).",
        at_least=0,
        below=1,
    )


@register("loss", "cross_entropy", CrossEntropyConfig)
class CrossEntropy(Loss):
    """Softmax and cross-entropy with the labels, in one."""

    config: CrossEntropyConfig

    def _sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.config.label_smoothing)


@register("loss", "binary_cross_entropy", LossConfig)
class BinaryCrossEntropy(Loss):
    """Sigmoid and binary cross-entropy with the one-hot labels, in one; a sample's loss is the mean over classes."""

    def _sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        targets = _one_hot(logits, labels)
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / logits.shape[1]

    def probabilities(self, logits: Tensor) -> Tensor:
        """Each class's own probability; they need not add up to 1."""
        return logits.sigmoid()


@register("loss", "mean_squared_error", LossConfig)
class MeanSquaredError(Loss):
    """Squared distance of the logits from the one-hot labels; a sample's loss is the mean over classes."""

    def _sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(logits, _one_hot(logits, labels), reduction="sum") / logits.shape[1]

    def probabilities(self, logits: Tensor) -> Tensor:
        """The least squares fit to one-hot labels is the class's probability (Bishop 2006, §4.1.3), if a rough one."""
        return logits.clamp(0, 1)


def build(config: LossConfig) -> Loss:
    """The configured loss."""
    return cast(Loss, choice("loss", config.name).target(config))


def _one_hot(logits: Tensor, labels: Tensor) -> Tensor:
    # F.one_hot would wait for the device to check the labels' range, and yield int64.
    return torch.zeros_like(logits).scatter_(1, labels.unsqueeze(1), 1.0)
