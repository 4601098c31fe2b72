"""The loss by the learning rate, what it suggests, and its picture."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Weight of what came before in the smoothed loss; with this one an outlier counts for 1/20.
_SMOOTHING = 0.95
#: The sweep ends where the smoothed loss is so many times the smallest one.
_DIVERGED = 4.0
#: Points at the start whose slope says nothing, since few losses are averaged there.
_SKIPPED = 5


@dataclass
class Curve:
    """The losses of a sweep of the learning rate.

    Attributes:
        rates: The rate of each step.
        losses: The mean loss over the global batch of each step, before its update.
        smoothed: Running mean of the losses.
        diverged: Whether the sweep ended because the loss was too large or not finite.
    """

    rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    smoothed: list[float] = field(default_factory=list)
    diverged: bool = False
    _mean: float = 0.0

    def add(self, rate: float, loss: float) -> None:
        """Adds a step; :attr:`diverged` says whether it was one too many, which is left out if it is not finite."""
        if not math.isfinite(loss):
            self.diverged = True
            return
        self.rates.append(rate)
        self.losses.append(loss)
        self._mean = _SMOOTHING * self._mean + (1 - _SMOOTHING) * loss
        # Without the share of the zero that it began with.
        self.smoothed.append(self._mean / (1 - _SMOOTHING ** len(self.losses)))
        self.diverged = self.smoothed[-1] > _DIVERGED * max(min(self.smoothed), 0.0) and len(self.losses) > 1

    def suggestion(self) -> float | None:
        """The rate at which the smoothed loss falls fastest by the rate's logarithm; ``None`` if it never falls.

        As fastai's ``steep`` and Lightning's ``suggestion``. The steps have equal distances on that axis.
        """
        lowest = min(range(len(self.smoothed)), key=self.smoothed.__getitem__, default=0)
        falls = {
            index: self.smoothed[index - 1] - self.smoothed[index + 1]
            for index in range(min(_SKIPPED, lowest - 1), lowest)
            if index >= 1
        }
        steepest = max(falls, key=falls.__getitem__, default=0)
        return self.rates[steepest] if falls and falls[steepest] > 0 else None

    def to_plain(self) -> dict[str, Any]:
        """What ``find_lr.json`` holds."""
        return {
            "suggestion": self.suggestion(),
            "diverged": self.diverged,
            "rates": self.rates,
            "losses": self.losses,
            "smoothed": self.smoothed,
        }

    def draw(self) -> Figure:
        """The losses over the rate, with the suggestion."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot(xscale="log", xlabel="learning rate", ylabel="training loss")
        axes.plot(self.rates, self.losses, color="0.8", label="of each batch")
        axes.plot(self.rates, self.smoothed, color="C0", label="smoothed")
        suggestion = self.suggestion()
        if suggestion is not None:
            at = self.smoothed[self.rates.index(suggestion)]
            axes.plot([suggestion], [at], "o", color="C3", label=f"falls fastest: {suggestion:.3g}")
        low, high = _range(self.smoothed)
        axes.set_ylim(low, high)
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
        return figure


def _range(values: Iterable[float]) -> tuple[float, float]:
    """Limits of an axis that show where the loss falls, whatever it rises to afterwards."""
    found = list(values) or [0.0, 1.0]
    low, high = min(found), max(found[0], min(found) + 1e-3)
    margin = 0.25 * (high - low) + 1e-3
    return low - margin, high + 2 * margin
