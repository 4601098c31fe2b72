"""Losses as sums over samples, so that means over ranks and accumulated passes are exact."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from distrain.config.groups import LossConfig
from distrain.config.registry import choice, choices, register
from distrain.config.setting import setting
from distrain.data.base import IGNORED, TARGETS, DataSpec
from distrain.errors import ConfigError
from distrain.optim import custom_loss


class Loss(ABC):
    """The sum of the samples' losses; the caller divides it by the global number of samples.

    Args:
        config: The loss's configuration.

    Attributes:
        kinds: Kinds of targets that the loss compares outputs with; see :attr:`distrain.data.base.DataSpec.target`.
        weighted_kinds: Those of them for which it can multiply the loss of each class by a weight.
        mixed_kinds: Those of them for which it takes the targets of mixed images: instead of a class the share of each
            class, float32 ``[N, C]``; labels and numbers between those of the two images.
        kind: The kind of the run's targets; :func:`build` sets it.
    """

    kinds: ClassVar[tuple[str, ...]] = TARGETS
    weighted_kinds: ClassVar[tuple[str, ...]] = ()
    mixed_kinds: ClassVar[tuple[str, ...]] = ()
    kind: str = "class"
    _weights: Tensor | None = None

    def __init__(self, config: Any) -> None:
        self.config = config

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Computes the sum of the samples' losses.

        Args:
            logits: The model's outputs, before softmax or sigmoid: ``[N, C]``; ``[N, C, H, W]`` for masks. 16-bit
                numbers are converted to float32.
            labels: Targets of the run's kind, such as class numbers, int64 ``[N]``.

        Returns:
            A float32 or float64 scalar; 0 for an empty batch.
        """
        return self._sum(at_least_32_bits(logits), labels)

    @abstractmethod
    def _sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The sum of the samples' losses, for logits of at least 32 bits."""

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probability of each class, with the shape of the logits, from a model trained with this loss."""
        return logits.sigmoid() if self.kind == "labels" else logits.softmax(1)

    @property
    def takes_class_weights(self) -> bool:
        """Whether :meth:`set_class_weights` is possible."""
        return self.kind in self.weighted_kinds

    def set_class_weights(self, weights: Sequence[float]) -> None:
        """Multiplies the loss of each class by its weight from now on; the divisor stays the number of samples.

        With targets of the kind ``labels``, the term of each label is weighted.

        Args:
            weights: A weight for each class.

        Raises:
            ConfigError: The loss takes no weights for such targets.
        """
        if not self.takes_class_weights:
            raise ConfigError("loss.name", self.config.name, "takes no class weights")
        self._weights = torch.tensor(weights, dtype=torch.float64)

    def _weights_like(self, logits: Tensor) -> Tensor | None:
        """The class weights ``[C]``, of the logits' type and on their device; ``None`` if there are none."""
        if self._weights is not None:
            # Kept, so that a GPU gets them once and not in every step.
            self._weights = self._weights.to(logits)
        return self._weights

    def _weights_of(self, logits: Tensor, labels: Tensor) -> Tensor | None:
        """Weights of the terms ``[N, C]`` of a loss over indicators: of the sample's class, or of each label.

        Of a mixed sample the mean weight of its classes.
        """
        weights = self._weights_like(logits)
        if weights is None or self.kind == "labels":
            return weights
        return (weights[labels] if labels.dim() == 1 else labels.to(weights.dtype) @ weights).unsqueeze(1)


@dataclass
class WeightedLossConfig(LossConfig):
    """Keys of losses that can weigh classes."""

    class_weights: list[float] | None = setting(
        "Factor of the loss of each class, in the order of the classes; null: 1.", at_least=0, default=None
    )


@dataclass
class CrossEntropyConfig(WeightedLossConfig):
    """Keys of ``loss=cross_entropy``."""

    label_smoothing: float = setting(
        "Share of each target that is spread evenly over all classes (Szegedy et al. 2015, arXiv 1512.00567).",
        at_least=0,
        below=1,
    )


@register("loss", "cross_entropy", CrossEntropyConfig)
class CrossEntropy(Loss):
    """Cross-entropy between the softmax of the logits and the labels; for masks the mean over the known pixels."""

    kinds = ("class", "mask")
    weighted_kinds = kinds
    mixed_kinds = ("class",)
    config: CrossEntropyConfig

    @override
    def _sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        smoothing, weights = self.config.label_smoothing, self._weights_like(logits)
        if self.kind == "class":
            shares = labels.to(logits.dtype) if labels.is_floating_point() else labels
            return F.cross_entropy(logits, shares, weights, reduction="sum", label_smoothing=smoothing)
        terms = F.cross_entropy(
            logits, labels.long(), weights, ignore_index=IGNORED, reduction="none", label_smoothing=smoothing
        )
        return sum_of_pixel_means(terms, labels)


@dataclass
class BinaryCrossEntropyConfig(WeightedLossConfig):
    """Keys of ``loss=binary_cross_entropy``."""

    positive_weights: list[float] | None = setting(
        "Factor of the loss where a class applies, for each class; where it doesn't apply, the loss stays. null: 1.",
        at_least=0,
        default=None,
    )


@register("loss", "binary_cross_entropy", BinaryCrossEntropyConfig)
class BinaryCrossEntropy(Loss):
    """Binary cross-entropy between the sigmoid of the logits and the labels, averaged over the classes.

    A class number counts as its one-hot vector.
    """

    kinds = ("class", "labels")
    weighted_kinds = kinds
    mixed_kinds = kinds

    def __init__(self, config: BinaryCrossEntropyConfig) -> None:
        super().__init__(config)
        given = config.positive_weights
        self._positive = None if given is None else torch.tensor(given, dtype=torch.float64)

    @override
    def _sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        targets = _indicators(logits, labels)
        weights = self._weights_of(logits, labels)
        positive = self._positive_weights(logits)
        return (
            F.binary_cross_entropy_with_logits(logits, targets, weights, reduction="sum", pos_weight=positive)
            / logits.shape[1]
        )

    def _positive_weights(self, logits: Tensor) -> Tensor | None:
        if self._positive is not None:
            self._positive = self._positive.to(logits)
        return self._positive

    @override
    def probabilities(self, logits: Tensor) -> Tensor:
        """Probability of each class by itself; the probabilities of a sample need not add up to 1."""
        return logits.sigmoid()


@register("loss", "mean_squared_error", WeightedLossConfig)
class MeanSquaredError(Loss):
    """Squared difference between outputs and targets, averaged over the numbers of a sample.

    A class number counts as its one-hot vector.
    """

    kinds = ("class", "numbers")
    weighted_kinds = ("class",)
    mixed_kinds = kinds

    @override
    def _sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        targets = _indicators(logits, labels)
        weights = self._weights_of(logits, labels)
        if weights is None:
            return F.mse_loss(logits, targets, reduction="sum") / logits.shape[1]
        return (F.mse_loss(logits, targets, reduction="none") * weights).sum() / logits.shape[1]

    @override
    def probabilities(self, logits: Tensor) -> Tensor:
        """Rough probabilities: a least squares fit to one-hot labels estimates them (Bishop 2006, §4.1.3)."""
        return logits.clamp(0, 1)


@register("loss", "mean_absolute_error", LossConfig)
class MeanAbsoluteError(Loss):
    """Absolute difference between outputs and targets, averaged over the numbers of a sample."""

    kinds = ("numbers",)
    mixed_kinds = kinds

    @override
    def _sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.l1_loss(logits, labels.to(logits.dtype), reduction="sum") / logits.shape[1]


@dataclass
class HuberConfig(LossConfig):
    """Keys of ``loss=huber``."""

    delta: float = setting("Difference at which the loss turns from a square into a straight line.", above=0)


@register("loss", "huber", HuberConfig)
class Huber(Loss):
    """Huber's loss (1964): half the square of a small difference, ``delta * (difference - delta / 2)`` of a large one.

    Averaged over the numbers of a sample.
    """

    kinds = ("numbers",)
    mixed_kinds = kinds
    config: HuberConfig

    @override
    def _sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        targets = labels.to(logits.dtype)
        return F.huber_loss(logits, targets, reduction="sum", delta=self.config.delta) / logits.shape[1]


@dataclass
class FocalConfig(WeightedLossConfig):
    """Keys of ``loss=focal``."""

    gamma: float = setting("How much less a well predicted target counts; 0: cross-entropy.", at_least=0)
    alpha: float | None = setting(
        "With several labels a sample: weight of a label that applies; 1 - alpha where it doesn't. null: none.",
        above=0,
        below=1,
    )


@register("loss", "focal", FocalConfig)
class Focal(Loss):
    """Cross-entropy times ``(1 - p) ** gamma``, p being the probability of the target (Lin et al. 2017, 1708.02002).

    For classes and masks by softmax, for labels by sigmoid and averaged over the labels.

    Raises:
        ConfigError: ``alpha`` is set for a task with one class a sample.
    """

    kinds = ("class", "labels", "mask")
    weighted_kinds = kinds
    config: FocalConfig

    @override
    def _sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        weights = self._weights_like(logits)
        if self.kind == "labels":
            targets = labels.to(logits.dtype)
            terms = self._focused(F.binary_cross_entropy_with_logits(logits, targets, reduction="none"))
            if self.config.alpha is not None:
                terms = terms * (self.config.alpha * targets + (1 - self.config.alpha) * (1 - targets))
            return (terms if weights is None else terms * weights).sum() / logits.shape[1]
        if self.kind == "class":
            terms = self._focused(F.cross_entropy(logits, labels, reduction="none"))
            return (terms if weights is None else terms * weights[labels]).sum()
        numbers = labels.long()
        terms = self._focused(F.cross_entropy(logits, numbers, ignore_index=IGNORED, reduction="none"))
        if weights is not None:
            # The terms of unknown pixels are 0, whatever the weight.
            terms = terms * weights[numbers.clamp(max=len(weights) - 1)]
        return sum_of_pixel_means(terms, labels)

    def _focused(self, cross_entropy: Tensor) -> Tensor:
        """``(1 - p) ** gamma * -log(p)``, from ``-log(p)``."""
        # Not 0, whose power below 1 has an infinite slope.
        missing = (-torch.expm1(-cross_entropy)).clamp_min(torch.finfo(cross_entropy.dtype).tiny)
        return missing**self.config.gamma * cross_entropy


@dataclass
class AsymmetricConfig(WeightedLossConfig):
    """Keys of ``loss=asymmetric``."""

    gamma_positive: float = setting("Focus on hard labels among those that apply, as in loss=focal.", at_least=0)
    gamma_negative: float = setting("Focus on hard labels among those that don't apply.", at_least=0)
    margin: float = setting(
        "Labels that don't apply and have a smaller probability than this don't count.", at_least=0, below=1
    )


@register("loss", "asymmetric", AsymmetricConfig)
class Asymmetric(Loss):
    """Focal loss with another focus for the many labels that don't apply (Ridnik et al. 2021, arXiv 2009.14119).

    Averaged over the labels.
    """

    kinds = ("labels",)
    weighted_kinds = kinds
    config: AsymmetricConfig

    @override
    def _sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        c, targets, tiny = self.config, labels.to(logits.dtype), torch.finfo(logits.dtype).tiny
        positive = logits.sigmoid()
        # 1 - p, and the same shifted by the margin.
        negative = (-logits).sigmoid()
        shifted = (positive - c.margin).clamp_min(tiny)
        log_negative = (negative + c.margin).clamp(tiny, 1).log() if c.margin else F.logsigmoid(-logits)
        where_applies = targets * negative.clamp_min(tiny) ** c.gamma_positive * F.logsigmoid(logits)
        elsewhere = (1 - targets) * shifted**c.gamma_negative * log_negative
        terms = where_applies + elsewhere
        weights = self._weights_like(logits)
        return -(terms if weights is None else terms * weights).sum() / logits.shape[1]


@dataclass
class CustomLossConfig(LossConfig):
    """Keys of ``loss=custom``: any loss in torch's convention."""

    _target_: str = setting(
        "Dotted path of a function of (outputs, targets), or of a class whose objects are such functions."
    )
    kwargs: dict[str, Any] = setting("Keyword arguments for the class, or for each call of the function.")


@register("loss", "custom", CustomLossConfig)
class CustomLoss(Loss):
    """A user's loss, or one of torch's.

    One with an argument ``reduction`` is asked for a number for each sample. Without it, a single number is taken for
    the sum or the mean of the samples' losses, whichever a trial proves; several numbers of a sample are averaged,
    those of pixels over the pixels of known class.
    Class numbers and masks reach it as int64, labels and numbers as the outputs' type.

    Raises:
        ConfigError: There is no such loss, or the loss of a sample depends on other samples.
    """

    config: CustomLossConfig

    def __init__(self, config: CustomLossConfig) -> None:
        super().__init__(config)
        self._function = custom_loss.make(config._target_, config.kwargs)
        self._is_mean = False
        self._at = (torch.device("cpu"), torch.float32)

    def try_out(self, spec: DataSpec) -> None:
        """Finds out what the loss gives, for some data.

        Raises:
            ConfigError: See :func:`distrain.optim.custom_loss.is_mean`; or the loss changes its buffers.
        """
        before = [buffer.clone() for buffer in self._buffers()]
        self._is_mean = custom_loss.is_mean("loss._target_", self.config._target_, self._call, spec)
        if not all(map(torch.equal, before, self._buffers())):
            problem = "changes its buffers, which no checkpoint holds and ranks don't share; put them into the model"
            raise ConfigError("loss._target_", self.config._target_, problem)

    def _buffers(self) -> list[Tensor]:
        return list(self._function.buffers()) if isinstance(self._function, nn.Module) else []

    def _call(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._function(outputs, custom_loss.for_torch(outputs, targets, self.kind))

    @override
    def _sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        if not len(labels):
            # A mean of nothing is NaN.
            return logits.sum() * 0.0
        at = (logits.device, logits.dtype)
        if at != self._at and isinstance(self._function, nn.Module):
            self._function.to(*at)
        self._at = at
        result = self._call(logits, labels)
        if self.kind == "mask" and result.shape == labels.shape:
            return sum_of_pixel_means(result, labels)
        total = custom_loss.sum_of(result)
        return total * len(labels) if self._is_mean else total


def build(config: LossConfig, spec: DataSpec) -> Loss:
    """Builds the configured loss.

    Args:
        config: The loss's configuration.
        spec: What it is to compare outputs with.

    Raises:
        ConfigError: The loss can't compare outputs with such targets, or its keys don't fit the classes.
    """
    loss = cast(Loss, choice("loss", config.name).target(config))
    loss.kind = spec.target
    if spec.target not in loss.kinds:
        problem = f"can't compare outputs with {describe_targets(spec.target)}"
        raise ConfigError("loss.name", config.name, problem, sorted(_that_fit(spec.target)))
    for key in ("class_weights", "positive_weights"):
        weights = getattr(config, key, None)
        if weights is None:
            continue
        if len(weights) != len(spec.classes):
            problem = f"has {len(weights)} weights for {len(spec.classes)} classes ({', '.join(spec.classes[:10])})"
            raise ConfigError(f"loss.{key}", weights, problem)
        if not any(weights):
            raise ConfigError(f"loss.{key}", weights, "leaves no loss: one of them must be above 0")
        if key == "class_weights":
            loss.set_class_weights(weights)
    if isinstance(loss, Focal) and loss.config.alpha is not None and spec.target != "labels":
        problem = f"is for several labels a sample; for {describe_targets(spec.target)} set loss.class_weights"
        raise ConfigError("loss.alpha", loss.config.alpha, problem)
    if isinstance(loss, CustomLoss):
        loss.try_out(spec)
    elif not type(loss).__module__.startswith("distrain.") and custom_loss.is_mean(
        "loss.name", config.name, loss, spec
    ):
        raise ConfigError("loss.name", config.name, "gives the mean of the samples' losses; let it give their sum")
    return loss


def _that_fit(target: str) -> list[str]:
    """Names of distrain's losses for a kind of targets."""
    return [name for name, each in choices("loss").items() if target in getattr(each.target, "kinds", ())]


def describe_targets(target: str) -> str:
    """A kind of targets in words."""
    words = {
        "class": "one class a sample",
        "labels": "several labels a sample",
        "numbers": "numbers",
        "mask": "a class for each pixel",
    }
    return words[target]


def at_least_32_bits(outputs: Tensor) -> Tensor:
    """Outputs of 16 bits as float32; others as they are."""
    return outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs


def sum_of_pixel_means(terms: Tensor, masks: Tensor) -> Tensor:
    """The sum over samples of the mean over their known pixels; a sample without known pixels has 0.

    So the count of a batch stays its samples, and no rank need know how many pixels the others have.

    Args:
        terms: A number for each pixel, ``[N, H, W]``; 0 where the class is unknown.
        masks: Class of each pixel, ``[N, H, W]``.
    """
    known = (masks != IGNORED).flatten(1).sum(1).clamp_min(1)
    return (terms.flatten(1).sum(1) / known).sum()


def _indicators(logits: Tensor, labels: Tensor) -> Tensor:
    """Targets as numbers ``[N, C]``: class numbers one-hot, others as they are."""
    if labels.dim() > 1:
        return labels.to(logits.dtype)
    # Not F.one_hot: it waits for the device to check the range of the labels, and returns int64.
    return torch.zeros_like(logits).scatter_(1, labels.unsqueeze(1), 1.0)
