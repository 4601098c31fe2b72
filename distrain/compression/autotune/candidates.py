"""Which candidates are worth a trial, in which order they take turns, and which one is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distrain.compression.autotune.link_model import Link
from distrain.compression.autotune.step_trace import typical

#: Candidates predicted to be slower than the best by this factor are not tried, and of the others so many at most.
HOPEFUL, TRIED = 1.25, 4
#: The factor for none, which loses nothing and must not be missed.
HOPEFUL_NONE = 1.5
#: Rounds of a trial that count; the one before them, with new memory, does not.
FEWEST_ROUNDS, MOST_ROUNDS = 5, 100
#: A less lossy candidate is taken unless a more lossy one is faster by more than this.
WORTH_IT = 0.02


@dataclass
class Table:
    """What is known of each candidate, by name, from the least to the most lossy.

    Attributes:
        link: What carries the messages.
        rest: Seconds of a step after its last exchange.
        sent: Bytes that a rank sends in a step.
        compressing: Seconds of a candidate's own work in a step.
        predicted: Seconds of a step by prediction.
        measured: Seconds of real steps, of those that had any.
        errors: How far those may be off.
    """

    link: Link
    rest: float
    sent: dict[str, int] = field(default_factory=dict)
    compressing: dict[str, float] = field(default_factory=dict)
    predicted: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def without(self) -> float:
        """Seconds of a step without compression: measured, or predicted where that is less."""
        return min(self.predicted["none"], self.measured.get("none", self.predicted["none"]))

    def expected(self, name: str) -> float:
        """Seconds of a candidate's step: measured, else predicted."""
        return self.measured.get(name, self.predicted[name])

    def hopeful(self) -> list[str]:
        """The candidates to try; one alone needs no trial."""
        lossy = {name: seconds for name, seconds in self.predicted.items() if name != "none"}
        best = min(self.without, *lossy.values()) if lossy else self.without
        fastest = sorted((name for name in lossy if lossy[name] <= HOPEFUL * best), key=lambda name: lossy[name])
        names = {"none"} if self.without <= HOPEFUL_NONE * best else set()
        return [name for name in self.predicted if name in names | set(fastest[:TRIED])]

    def add_trial(self, turns: Sequence[str], spans: Sequence[float]) -> None:
        """Takes note of a trial: who had each step, and its seconds until its last exchange was done."""
        for name in dict.fromkeys(turns):
            own = [span for turn, span in zip(turns, spans, strict=True) if turn == name]
            self.add_measured(name, own[1:])

    def add_measured(self, name: str, spans: Sequence[float]) -> None:
        """Takes note of real steps: seconds until the last exchange was done."""
        middle, self.errors[name] = typical(spans)
        self.measured[name] = middle + self.rest

    def to_plain(self) -> dict[str, Any]:
        """As plain data, in milliseconds."""
        rows = [
            {
                "candidate": name,
                "bytes_sent": self.sent[name],
                "compress_ms": _ms(self.compressing[name]),
                "predicted_ms": _ms(self.predicted[name]),
                "measured_ms": _ms(self.measured[name]) if name in self.measured else None,
            }
            for name in self.predicted
        ]
        link = {"latency_ms": _ms(self.link.latency), "bytes_per_second": round(self.link.bytes_per_second)}
        return {"link": link, "candidates": rows}

    def __str__(self) -> str:
        lines = ["candidate         MB sent  compress ms  predicted ms  measured ms"]
        for name, predicted in self.predicted.items():
            measured = f"{1000 * self.measured[name]:11.1f}" if name in self.measured else f"{'-':>11}"
            lines.append(
                f"{name:14}  {self.sent[name] / 1e6:9.3f}  {1000 * self.compressing[name]:11.1f}  "
                f"{1000 * predicted:12.1f}  {measured}"
            )
        return "\n".join(lines)


def turns(names: Sequence[str], a_round: float, budget: float) -> list[str]:
    """Who has which step of a trial.

    Each round begins with another candidate, so that what comes every few steps (a smaller last batch) meets all.

    Args:
        names: Who takes part.
        a_round: Seconds that one step of each takes.
        budget: Seconds of the whole trial, as far as the least and the greatest number of rounds allow.
    """
    counted = min(max(int(budget / a_round), FEWEST_ROUNDS), MOST_ROUNDS)
    size = len(names)
    return [names[(start + place) % size] for start in range(counted + 1) for place in range(size)]


def choose(seconds: Mapping[str, float], errors: Mapping[str, float]) -> str:
    """The least lossy candidate of those that are about as fast as the fastest, as far as that is known.

    Args:
        seconds: Of a step, by candidate.
        errors: How far they may be off, where they were measured.
    """
    best = min(seconds, key=lambda name: seconds[name])

    def margin(name: str) -> float:
        return max(WORTH_IT * seconds[best], math.hypot(errors.get(name, 0.0), errors.get(best, 0.0)))

    return next(name for name in seconds if seconds[name] - seconds[best] <= margin(name))


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)
