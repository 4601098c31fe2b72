"""Which candidates are worth a trial, in which order they are tried, and which one is chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distrain.compression.autotune.link_model import LinkModel
from distrain.compression.autotune.step_trace import median_with_error
from distrain.files.escaping import Lines

#: Candidates predicted to be slower than the fastest by more than this factor are not tried, and at most so many are.
SHORTLIST_FACTOR, MAX_SHORTLIST = 1.25, 4
#: The factor for no compression, which loses nothing and therefore must not be missed.
SHORTLIST_FACTOR_NONE = 1.5
#: Rounds of a trial that count; one more before them, which allocates memory, does not.
MIN_ROUNDS, MAX_ROUNDS = 5, 100
#: A more lossy candidate is chosen only if it is faster by more than this fraction.
WORTHWHILE = 0.02


@dataclass
class CandidateTable:
    """What is known about each candidate, by name, from the least to the most lossy; ``none`` is one of them.

    Attributes:
        link: Times of collectives.
        after_exchange: Seconds of a step after its last exchange.
        sent: Bytes that a rank sends per step.
        work: Seconds of a candidate's own work per step.
        predicted: Predicted seconds of a step.
        measured: Measured seconds of a step, for candidates that were tried.
        errors: Uncertainty of ``measured``.
    """

    link: LinkModel
    after_exchange: float
    sent: dict[str, int] = field(default_factory=dict)
    work: dict[str, float] = field(default_factory=dict)
    predicted: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def uncompressed(self) -> float:
        """Seconds of a step without compression: the smaller one of prediction and measurement."""
        return min(self.predicted["none"], self.measured.get("none", self.predicted["none"]))

    def expected(self, name: str) -> float:
        """Seconds of a candidate's step: measured, else predicted."""
        return self.measured.get(name, self.predicted[name])

    def shortlist(self) -> list[str]:
        """The candidates to try; a single one needs no trial."""
        lossy = {name: seconds for name, seconds in self.predicted.items() if name != "none"}
        fastest = min(self.uncompressed, *lossy.values()) if lossy else self.uncompressed
        near = sorted(
            (name for name in lossy if lossy[name] <= SHORTLIST_FACTOR * fastest), key=lambda name: lossy[name]
        )
        names = {"none"} if self.uncompressed <= SHORTLIST_FACTOR_NONE * fastest else set()
        return [name for name in self.predicted if name in names | set(near[:MAX_SHORTLIST])]

    def add_trial(self, order: Sequence[str], spans: Sequence[float]) -> None:
        """Records a trial.

        Args:
            order: Which candidate ran each step; the first step of each is ignored.
            spans: Seconds of each step until its last exchange had ended.
        """
        for name in dict.fromkeys(order):
            own = [span for turn, span in zip(order, spans, strict=True) if turn == name]
            self.add_measured(name, own[1:])

    def add_measured(self, name: str, spans: Sequence[float]) -> None:
        """Records steps of one candidate: seconds until the last exchange had ended."""
        middle, self.errors[name] = median_with_error(spans)
        self.measured[name] = middle + self.after_exchange

    def to_plain(self) -> dict[str, Any]:
        """The table as plain data, in milliseconds."""
        rows = [
            {
                "candidate": name,
                "bytes_sent": self.sent[name],
                "compress_ms": _ms(self.work[name]),
                "predicted_ms": _ms(self.predicted[name]),
                "measured_ms": _ms(self.measured[name]) if name in self.measured else None,
            }
            for name in self.predicted
        ]
        link = {"latency_ms": _ms(self.link.latency), "bytes_per_second": round(self.link.bytes_per_second)}
        return {"link": link, "candidates": rows}

    def to_text(self) -> Lines:
        """A line for each candidate."""
        lines = ["candidate         MB sent  compress ms  predicted ms  measured ms"]
        for name, predicted in self.predicted.items():
            measured = f"{1000 * self.measured[name]:11.1f}" if name in self.measured else f"{'-':>11}"
            lines.append(
                f"{name:14}  {self.sent[name] / 1e6:9.3f}  {1000 * self.work[name]:11.1f}  "
                f"{1000 * predicted:12.1f}  {measured}"
            )
        return Lines.of(lines)


def trial_order(names: Sequence[str], round_seconds: float, trial_seconds: float) -> list[str]:
    """Which candidate runs each step of a trial.

    Each round begins with another candidate, so that something that recurs every few steps (a smaller last batch)
    affects all of them.

    Args:
        names: The candidates.
        round_seconds: Duration of one step of each.
        trial_seconds: Intended duration of the trial, within the limits on the number of rounds.
    """
    counted = min(max(int(trial_seconds / round_seconds), MIN_ROUNDS), MAX_ROUNDS)
    size = len(names)
    return [names[(start + place) % size] for start in range(counted + 1) for place in range(size)]


def choose(seconds: Mapping[str, float], errors: Mapping[str, float]) -> str:
    """The least lossy of the candidates that are about as fast as the fastest one.

    A candidate counts as equally fast if the difference is below :data:`WORTHWHILE` or within the measurement's
    uncertainty.

    Args:
        seconds: Duration of a step by candidate, from the least to the most lossy.
        errors: Uncertainty of the durations that were measured.
    """
    fastest = min(seconds, key=lambda name: seconds[name])

    def margin(name: str) -> float:
        return max(WORTHWHILE * seconds[fastest], math.hypot(errors.get(name, 0.0), errors.get(fastest, 0.0)))

    return next(name for name in seconds if seconds[name] - seconds[fastest] <= margin(name))


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)
