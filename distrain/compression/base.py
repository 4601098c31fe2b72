"""The contract between whoever reduces gradients and whoever decides how they travel.

A compressor is one file in this folder and one YAML in ``conf/compression``. What most of them write is two methods:
:meth:`Compressor.compress` takes out of a bucket what it sends and :meth:`Compressor.add_decompressed` adds a message
to a bucket. The base class does the rest: error feedback, small tensors that travel as they are, the exchange, and the
state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from distrain.communication.collectives import Communicator, Pending
from distrain.compression.autotune.step_trace import Observer
from distrain.compression.bucket import Bucket
from distrain.compression.encoding.packing import pack, unpack
from distrain.compression.error_feedback import Residuals
from distrain.config.registry import choice
from distrain.config.schema import CompressionConfig, Config, setting
from distrain.errors import ConfigError


@dataclass
class LossyConfig(CompressionConfig):
    """Keys of every compressor that loses something."""

    min_elements: int = setting(
        "Tensors with fewer elements, and vectors (biases, norms), travel as they are.", at_least=1
    )
    error_feedback: bool = setting("Add what was not sent to the next step's gradient.")


class Compressor(ABC):
    """Turns each rank's share of the mean gradient into the mean gradient.

    A rank's share is its samples' gradient sum divided by the *global* count, so the mean is the sum of the shares and
    uneven shards need no care.

    Args:
        config: The compressor's keys.
        seed: The run's seed; what a compressor draws depends on it, the step and the parameter's name.

    Attributes:
        collectives: How many collectives a bucket needs one after the other.
        step: Steps begun since the start of the run.
        residuals: What this rank has not sent yet; ``None`` without error feedback.
        observer: Who is told what happens in a step, if anybody.
        warmup_steps: So many steps at the start of a run it works otherwise than later, so they tell nothing about it.
    """

    phases: int = 1
    warmup_steps: int = 0

    def __init__(self, config: CompressionConfig, seed: int = 0) -> None:
        self.config = config
        self.seed = seed
        self.step = 0
        self.residuals: Residuals | None = None
        self.observer: Observer | None = None
        if isinstance(config, LossyConfig) and config.error_feedback:
            self.residuals = Residuals()

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuses what this compressor can't serve, before any process group forms.

        Raises:
            ConfigError: One line naming the key, the value and the choices.
        """
        chosen = config.compression
        if not isinstance(chosen, LossyConfig) or not chosen.error_feedback:
            return
        if config.trainer.precision == "fp16":
            raise ConfigError(
                "trainer.precision",
                "fp16",
                f"overflows now and then, which would ruin what compression={chosen.name} has not sent yet",
                ["fp32", "bf16", "fp64"],
            )
        strategy = choice("strategy", config.strategy.name).target
        quantity: str = getattr(strategy, "compressed_quantity")  # noqa: B009 - any callable
        if config.trainer.on_nonfinite == "skip" and quantity == "gradients":
            raise ConfigError(
                "trainer.on_nonfinite",
                "skip",
                f"would leave NaN in what compression={chosen.name} has not sent yet",
                ["stop", "rewind"],
            )

    # --- what a compressor decides -----------------------------------------------------------------------------------

    def compresses(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter's gradient is worth compressing; the others are the bucket's plain part."""
        assert isinstance(self.config, LossyConfig)
        return parameter.dim() > 1 and parameter.numel() >= self.config.min_elements

    def bucket_order(self, parameter: nn.Parameter) -> int:
        """Parameters lie in a bucket in this order; those of a place keep the order in which gradients are ready."""
        return 0 if self.compresses(parameter) else 1

    @abstractmethod
    def compress(self, owed: Bucket) -> list[Tensor]:
        """Takes what it sends out of a bucket's lossy part, in place.

        Args:
            owed: What should be sent; afterwards what this message leaves out. The plain part is not looked at.

        Returns:
            The message: contiguous tensors whose dtypes and sizes are those of :meth:`message_layout`.
        """

    @abstractmethod
    def message_layout(self, bucket: Bucket) -> list[tuple[torch.dtype, int]]:
        """Dtype and number of elements of each part of a message about this bucket in this step.

        They depend on the bucket's names and sizes and on the step alone, so that all ranks know each other's.
        """

    @abstractmethod
    def add_decompressed(self, message: list[Tensor], bucket: Bucket) -> None:
        """Adds a message, which may be another rank's, to a bucket's lossy part, in place."""

    # --- the exchange ------------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Called once a step, before its first bucket."""
        self.step += 1
        if self.observer is not None:
            self.observer.begin_step()

    def aggregate(self, bucket: Bucket, communicator: Communicator) -> Iterator[Pending]:
        """Replaces the bucket's content, in place, by its sum over the group.

        A generator: it yields each collective that it has started and goes on when that is done. Buckets are handed
        over in the same order on every rank, while the backward pass still runs, so everything before the first
        ``yield`` delays the backward pass and the last part, after it, delays the update.

        By default every rank's message goes to all others, and each adds them up in order of rank, so that all get the
        same bits. A compressor whose messages can be summed on the way overrides this.
        """
        payload = self.encode(bucket)
        gathered, pending = communicator.start_all_gather(payload)
        yield pending
        bucket.flat.zero_()
        for each in gathered:
            self.decode(each, bucket)

    def encode(self, bucket: Bucket) -> Tensor:
        """This rank's message about a bucket as uint8 ``[bytes]``; what it leaves out is kept for the next step."""
        owed = self.residuals.add(bucket) if self.residuals is not None else bucket
        return pack([bucket.uncompressed_part, *self.compress(owed)])

    def decode(self, payload: Tensor, bucket: Bucket) -> None:
        """Adds what a rank encoded in this step to a bucket of the same names and sizes."""
        plain, *message = unpack(
            payload, [(bucket.flat.dtype, bucket.uncompressed_numel), *self.message_layout(bucket)]
        )
        bucket.uncompressed_part.add_(plain)
        self.add_decompressed(message, bucket)

    def report(self) -> dict[str, Any]:
        """What came of it, as plain data for ``summary.json``."""
        return {}

    # --- what is kept between steps ----------------------------------------------------------------------------------

    def residual_norm(self) -> Tensor | None:
        """Euclidean norm of all that this rank has not sent yet, a scalar; ``None`` without error feedback."""
        return self.residuals.norm() if self.residuals is not None else None

    def state_dict(self) -> dict[str, Tensor]:
        """What this rank keeps between steps, by ``<what>/<parameter name>``; ``step`` is the number of steps begun.

        ``residual/…`` and ``velocity/…`` are shares of a sum over the ranks; everything else is the same on all ranks
        that hold the parameter.
        """
        state = {"step": torch.tensor(self.step)}
        if self.residuals is not None:
            state |= self.residuals.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what :meth:`state_dict` gave, of the parameters that this rank holds."""
        self.step = int(state.get("step", torch.tensor(0)))
        if self.residuals is not None:
            self.residuals.load_state_dict(state)


def chosen(config: Config) -> type[Compressor]:
    """The class of the compressor that the configuration names."""
    return cast(type[Compressor], choice("compression", config.compression.name).target)


def build(config: CompressionConfig, seed: int = 0) -> Compressor:
    """The compressor that the configuration names."""
    made: Compressor = choice("compression", config.name).target(config, seed)
    return made
