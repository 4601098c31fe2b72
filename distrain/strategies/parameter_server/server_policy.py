"""How a server treats its workers."""

from __future__ import annotations

from dataclasses import dataclass

from distrain.config.schema import TrainerConfig
from distrain.gradients.bucket_sizes import MIB
from distrain.strategies.parameter_server.options import ParameterServerConfig

#: Bytes that a worker may send in one collective, besides a few copies of the model.
_MAX_COUNT_BYTES = 64 * MIB


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

    @classmethod
    def of(
        cls, options: ParameterServerConfig, trainer: TrainerConfig, timeout_seconds: float, size: int
    ) -> ServerPolicy:
        """What is configured.

        Args:
            options: The strategy's keys.
            trainer: Those of the training.
            timeout_seconds: How long other workers wait for a worker.
            size: Bytes of the model's parameters.
        """
        return cls(
            mode=options.mode,
            staleness=options.staleness_bound,
            in_flight=int(options.may_overlap),
            max_gradient_norm=trainer.grad_clip_norm if options.mode == "sync" else None,
            on_nonfinite=trainer.on_nonfinite,
            timeout_seconds=timeout_seconds,
            heartbeat_timeout_seconds=options.worker_timeout_seconds,
            max_collective_bytes=_MAX_COUNT_BYTES + 4 * size,
        )

    @property
    def needs_global_norm(self) -> bool:
        """Whether an update has to wait for the norm of the whole model's gradient."""
        return self.mode == "sync" and (self.max_gradient_norm is not None or self.on_nonfinite != "stop")
