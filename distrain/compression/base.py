"""The contract between whoever reduces gradients and whoever decides how they travel."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from distrain.collectives import Communicator, Pending
from distrain.config import CompressionConfig, choices


@dataclass(frozen=True)
class Bucket:
    """Gradients that travel together.

    Attributes:
        flat: All gradients of the bucket in one 1-D tensor.
        tensors: The same memory as one view a parameter, by the parameter's name in the unsplit model, shaped as the
            parameter. What a compressor keeps between steps it keeps by these names.
    """

    flat: Tensor
    tensors: Mapping[str, Tensor]

    @property
    def bytes(self) -> int:
        """Size of the bucket, uncompressed."""
        return self.flat.numel() * self.flat.element_size()


class Compressor(ABC):
    """Turns each rank's share of the mean gradient into the mean gradient.

    A rank's share is its samples' gradient sum divided by the *global* count, so the mean is the sum of the shares and
    uneven shards need no care.
    """

    def __init__(self, config: CompressionConfig) -> None:
        self.config = config

    @abstractmethod
    def aggregate(self, bucket: Bucket, communicator: Communicator) -> Pending:
        """Starts replacing the bucket's content, in place, by its sum over the group.

        Buckets are handed over in the same order on every rank, while the backward pass still runs.

        Returns:
            What to wait for before the bucket is read.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """What the compressor keeps between steps, by ``<what>/<parameter name>``."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what :meth:`state_dict` gave.

        Raises:
            ValueError: The state is another compressor's.
        """
        if state:
            raise ValueError(f"compression={self.config.name} keeps no state, but was given {sorted(state)}")


def build(config: CompressionConfig) -> Compressor:
    """The compressor that the configuration names."""
    made: Compressor = choices("compression")[config.name].target(config)
    return made
