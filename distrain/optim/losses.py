"""Losses as sums over samples, so that means over ranks and accumulated passes are exact."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from distrain.config.registry import choice, register
from distrain.config.schema import LossConfig, setting


class Loss(ABC):
    """The sum of the samples' losses; the caller divides it by the global number of samples.

    Args:
        config: The loss's configuration.
    """

    def __init__(self, config: Any) -> None:
        self.config = config

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Computes the sum of the samples' losses.

        Args:
            logits: ``[N, C]``, before softmax or sigmoid; 16-bit logits are converted to float32.
            labels: Class numbers, int64 ``[N]``.

        Returns:
            A float32 or float64 scalar; 0 for an empty batch.
        """
        return self._sum(logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits, labels)

    @abstractmethod
    def _sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The sum of the samples' losses, for logits of at least 32 bits."""

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probability of each class, ``[N, C]``, from the logits of a model trained with this loss."""
        return logits.softmax(1)


@dataclass
class CrossEntropyConfig(LossConfig):
    """Keys of ``loss=cross_entropy``."""

    label_smoothing: float = setting(
        "Share of each target that is spread evenly over all classes (Szegedy et al. 2015, arXiv 1512.00567).",
        at_least=0,
        below=1,
    )


@register("loss", "cross_entropy", CrossEntropyConfig)
class CrossEntropy(Loss):
    """Cross-entropy between the softmax of the logits and the labels."""

    config: CrossEntropyConfig

    @override
    def _sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.config.label_smoothing)


@register("loss", "binary_cross_entropy", LossConfig)
class BinaryCrossEntropy(Loss):
    """Binary cross-entropy between the sigmoid of the logits and the one-hot labels, averaged over the classes."""

    @override
    def _sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        targets = _one_hot(logits, labels)
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / logits.shape[1]

    @override
    def probabilities(self, logits: Tensor) -> Tensor:
        """Probability of each class by itself, ``[N, C]``; the probabilities of a sample need not add up to 1."""
        return logits.sigmoid()


@register("loss", "mean_squared_error", LossConfig)
class MeanSquaredError(Loss):
    """Squared difference between the logits and the one-hot labels, averaged over the classes."""

    @override
    def _sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(logits, _one_hot(logits, labels), reduction="sum") / logits.shape[1]

    @override
    def probabilities(self, logits: Tensor) -> Tensor:
        """Rough probabilities: a least squares fit to one-hot labels estimates them (Bishop 2006, §4.1.3)."""
        return logits.clamp(0, 1)


def build(config: LossConfig) -> Loss:
    """Builds the configured loss."""
    return cast(Loss, choice("loss", config.name).target(config))


def _one_hot(logits: Tensor, labels: Tensor) -> Tensor:
    # Not F.one_hot: it waits for the device to check the range of the labels, and returns int64.
    return torch.zeros_like(logits).scatter_(1, labels.unsqueeze(1), 1.0)
