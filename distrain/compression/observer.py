"""Interface for observers that measure the exchange of gradients in a training step."""

from __future__ import annotations

from distrain.communication.collectives import Communicator
from distrain.compression.bucket import Bucket


class ExchangeObserver:
    """Receives the events of a compressor's exchanges; this base class ignores them.

    Attributes:
        holds_exchanges: Whether exchanges are held back until the backward pass has ended, so that it runs without
            communication.
    """

    holds_exchanges: bool = False

    def buckets_change(self) -> None:
        """Between two steps: buckets of other gradients are laid out, so what was measured of the old ones is void."""

    def begin_step(self) -> None:
        """A step begins, and no exchange is under way."""

    def last_backward_began(self, communicator: Communicator) -> None:
        """The last backward pass before an exchange among these ranks begins."""

    def bucket_ready(self, bucket: Bucket) -> None:
        """A bucket's gradients are complete."""

    def backward_ended(self) -> None:
        """The backward pass has ended, and all buckets are complete."""

    def exchanges_ended(self) -> None:
        """All buckets hold their sums over the ranks."""
