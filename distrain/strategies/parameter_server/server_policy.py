"""How a server treats its workers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerPolicy:
    """How a server treats its workers.

    Attributes:
        mode: ``sync``, ``async`` or ``ssp``.
        staleness: Steps that a worker may be ahead of the slowest one when it starts a step; ssp only.
        in_flight: Steps of its own that a worker has in flight while it computes the next one.
        max_gradient_norm: Maximum norm of the whole model's gradient; sync only.
        on_nonfinite: What happens with a gradient that is not finite. ``stop`` refuses a worker's gradient in async and
            ssp; ``skip`` and ``rewind`` skip the update in sync.
        timeout_seconds: How long other workers wait for a worker.
        heartbeat_timeout_seconds: The longest time without a heartbeat from a worker.
        max_collective_bytes: Maximum size of a worker's contribution to a collective, in bytes.
    """

    mode: str
    staleness: int | None
    in_flight: int
    max_gradient_norm: float | None
    on_nonfinite: str
    timeout_seconds: float
    heartbeat_timeout_seconds: float
    max_collective_bytes: int

    @property
    def needs_global_norm(self) -> bool:
        """Whether an update has to wait for the norm of the whole model's gradient."""
        return self.mode == "sync" and (self.max_gradient_norm is not None or self.on_nonfinite != "stop")
