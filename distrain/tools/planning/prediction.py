"""What is predicted of a configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from distrain.tools.planning.simulation import Simulated


@dataclass(frozen=True)
class Memory:
    """Peak memory of the rank that needs most, in bytes.

    Attributes:
        parameters: The parameters.
        gradients: Their gradients.
        optimizer: The optimizer's state.
        activations: Most that passes need: what forward passes leave for backward passes, and what is on its way.
        other: Copies of parameters, residuals of compressors, messages.
    """

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    other: float = 0.0

    @property
    def total(self) -> float:
        """The sum."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.other

    def to_plain(self) -> dict[str, int]:
        """As plain data."""
        parts = {name: round(getattr(self, name)) for name in self.__dataclass_fields__}
        return {**parts, "total": round(self.total)}


@dataclass(frozen=True)
class Prediction:
    """A configuration and what it would cost.

    Attributes:
        keys: Keys and values of the command line.
        seconds: Of a step; the sum of the parts.
        parts: Seconds of a step by what they are spent on, on the slowest rank: ``compute`` (passes),
            ``compression``, ``update`` (data and optimizer), ``waiting`` for other ranks, ``stragglers``.
        bytes_sent: That a rank sends a step.
        memory: Of the rank that needs most.
        same_as_single: Whether it trains what one process trains, up to rounding.
        bubble: Fraction of a pipeline's time in which its ranks have nothing to do; ``None``: no pipeline.
        simulated: The step, to draw; ``None`` if there is nothing to see.
    """

    keys: dict[str, str]
    parts: dict[str, float]
    bytes_sent: float
    memory: Memory
    same_as_single: bool
    bubble: float | None = None
    simulated: Simulated | None = field(default=None, compare=False, repr=False)

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(self.parts.values())

    @property
    def bound(self) -> str:
        """What takes most of the step."""
        if self.bubble is not None and self.bubble > 0.5:
            return "bubble"
        return max(self.parts, key=lambda part: self.parts[part])

    def to_plain(self, batch_size: int) -> dict[str, Any]:
        """As plain data: times in milliseconds.

        Args:
            batch_size: Samples of a step.
        """
        return {
            "keys": self.keys,
            "step_ms": round(1000 * self.seconds, 4),
            "parts_ms": {part: round(1000 * seconds, 4) for part, seconds in self.parts.items()},
            "images_per_second": round(batch_size / self.seconds, 2),
            "bytes_sent_per_rank": round(self.bytes_sent),
            "memory_bytes": self.memory.to_plain(),
            "same_as_single": self.same_as_single,
            "bubble": None if self.bubble is None else round(self.bubble, 4),
            "bound": self.bound,
        }
