"""What a server records about each worker, and about the staleness of all workers' pushes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from distrain.communication.types import RankName


@dataclass
class WorkerRecord:
    """What a server records about a worker.

    Attributes:
        peer: The worker's rank and host.
        steps: Number of its pushes.
        step: The step of the run that its latest push belongs to; 0 before the first.
        samples: Samples from which its pushes were computed.
        staleness: Number of its pushes by their staleness. The staleness of a push is the number of updates that the
            server made between sending the parameters and applying the gradient computed from them.
        max_lead: Most steps that it was ahead of the slowest worker when it got the parameters for its next step.
        pushed_bytes: Size of its gradients.
        pulled_bytes: Size of the parameters that were sent to it.
        loss_reason: Why the worker was lost; ``None`` if it was not.
        finished: Whether it has finished its work and left.
    """

    peer: RankName
    steps: int = 0
    step: int = 0
    samples: int = 0
    staleness: Counter[int] = field(default_factory=Counter)
    max_lead: int = 0
    pushed_bytes: int = 0
    pulled_bytes: int = 0
    loss_reason: str | None = None
    finished: bool = False

    @property
    def is_alive(self) -> bool:
        """Whether others may wait for it."""
        return self.loss_reason is None and not self.finished

    def add_push(self, step: int, samples: int) -> None:
        """Counts a push.

        Args:
            step: The step of the run that it belongs to.
            samples: Samples from which it was computed.
        """
        self.steps += 1
        self.step = step
        self.samples += samples

    def statistics(self) -> dict[str, Any]:
        """Everything as plain data, for the run's report."""
        return {
            **self.loss_record(),
            "samples": self.samples,
            "staleness": {str(updates): count for updates, count in sorted(self.staleness.items())},
            "lead": self.max_lead,
            "pushed": self.pushed_bytes,
            "pulled": self.pulled_bytes,
        }

    def loss_record(self) -> dict[str, Any]:
        """The worker's rank and host, its number of steps, and why it was lost, as plain data."""
        return {"rank": self.peer.rank, "host": self.peer.host, "steps": self.steps, "lost": self.loss_reason}


@dataclass
class RecentStaleness:
    """The staleness of the pushes since the last log entry: their number, the sum and the maximum."""

    pushes: int = 0
    total: int = 0
    maximum: int = 0

    def add(self, staleness: int) -> None:
        """Adds a push."""
        self.pushes += 1
        self.total += staleness
        self.maximum = max(self.maximum, staleness)
