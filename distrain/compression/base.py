"""The contract between the exchange of gradients and their compression.

A compressor is one file in this folder and one YAML file in ``conf/compression``. Most compressors subclass
:class:`MessageCompressor` and define how gradients become a message (:meth:`~MessageCompressor.compress`,
:meth:`~MessageCompressor.message_layout`) and how a message becomes gradients again
(:meth:`~MessageCompressor.add_decompressed`). The base classes provide error feedback, uncompressed small tensors, the
exchange and the state. A compressor that does not write messages itself subclasses :class:`Compressor` and defines
:meth:`~Compressor.aggregate`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from distrain.communication.collectives import Communicator
from distrain.communication.types import Pending
from distrain.compression.bucket import Bucket
from distrain.compression.encoding.packing import pack, unpack
from distrain.compression.error_feedback import Residuals
from distrain.compression.observer import ExchangeObserver
from distrain.config.groups import CompressionConfig
from distrain.config.registry import choice
from distrain.config.schema import Config
from distrain.config.setting import setting
from distrain.errors import ConfigError


@dataclass
class LossyConfig(CompressionConfig):
    """Keys of every compressor that can use error feedback."""

    min_elements: int = setting(
        "Tensors with fewer elements, and vectors (biases, norms), are sent uncompressed.", at_least=1
    )
    error_feedback: bool = setting("Add what was not sent to the next step's gradient.")


class Compressor(ABC):
    """Sums gradients over the ranks of a group.

    A rank contributes the gradient sum of its samples divided by the *global* number of samples. The sum of these
    contributions is the mean gradient, also when ranks have different numbers of samples.

    Args:
        config: The compressor's keys.
        seed: The run's seed. Random draws depend on it, the step and the parameter's name.

    Attributes:
        phases: Number of collectives that one bucket needs one after the other.
        warmup_steps: Number of steps at the start of a run in which the compressor works differently than later. Their
            timings say nothing about later steps.
        step: Number of steps begun since the start of the run.
        residuals: What this rank has not sent yet; ``None`` without error feedback.
        observer: Receives the events of each step, if set.
    """

    phases: int = 1
    warmup_steps: int = 0

    def __init__(self, config: CompressionConfig, seed: int = 0) -> None:
        self.config = config
        self.seed = seed
        self.step = 0
        self.residuals: Residuals | None = None
        self.observer: ExchangeObserver | None = None
        if isinstance(config, LossyConfig) and config.error_feedback:
            self.residuals = Residuals()

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuses configurations that this compressor does not support, before any process group forms.

        Raises:
            ConfigError: One line naming the key, the value and the choices.
        """
        compression = config.compression
        if not isinstance(compression, LossyConfig) or not compression.error_feedback:
            return
        if config.trainer.precision == "fp16":
            raise ConfigError(
                "trainer.precision",
                "fp16",
                f"overflows occasionally, which would corrupt the residuals of compression={compression.name}",
                ["fp32", "bf16", "fp64"],
            )
        strategy = choice("strategy", config.strategy.name).target
        quantity: str = getattr(strategy, "compressed_quantity")  # noqa: B009 - any callable
        if config.trainer.on_nonfinite == "skip" and quantity == "gradients":
            raise ConfigError(
                "trainer.on_nonfinite",
                "skip",
                f"would leave NaN in the residuals of compression={compression.name}",
                ["stop", "rewind"],
            )

    def compresses(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter's gradient is compressed; the others form the bucket's uncompressed part.

        By default these are tensors of two or more dimensions with at least ``min_elements`` elements, and none if the
        compressor has no such key.
        """
        config = self.config
        return isinstance(config, LossyConfig) and parameter.dim() > 1 and parameter.numel() >= config.min_elements

    def bucket_order(self, parameter: nn.Parameter) -> int:
        """Sort key of a parameter within its bucket; equal keys keep the order in which gradients become ready.

        Parameters that are compressed must come before those that are not.
        """
        return 0 if self.compresses(parameter) else 1

    def begin_step(self) -> None:
        """Called once per step, before its first bucket."""
        self.step += 1
        if self.observer is not None:
            self.observer.begin_step()

    def buckets_change(self) -> None:
        """Called between two steps before buckets of other parameters are laid out; state stays by parameter name."""
        if self.residuals is not None:
            self.residuals.leave_buckets()
        if self.observer is not None:
            self.observer.buckets_change()

    @abstractmethod
    def aggregate(self, bucket: Bucket, communicator: Communicator) -> Iterator[Pending]:
        """Replaces the bucket's content, in place, by its sum over the group.

        A generator: it yields each collective that it has started and is resumed when that collective is complete. All
        ranks pass their buckets in the same order, while the backward pass is still running. Work before the first
        ``yield`` therefore delays the backward pass, and work after the last one delays the optimizer's update.
        """

    def report(self) -> dict[str, Any]:
        """Results for ``summary.json``, as plain data."""
        return {}

    def residual_norm(self) -> Tensor | None:
        """Euclidean norm of everything that this rank has not sent yet, a scalar; ``None`` without error feedback."""
        return self.residuals.norm() if self.residuals is not None else None

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's state by ``<kind>/<parameter name>``; ``step`` is the number of steps begun.

        ``residual/…`` and ``velocity/…`` are each rank's own and only their sum over the ranks matters. Everything else
        is equal on all ranks that hold the parameter.
        """
        state = {"step": torch.tensor(self.step)}
        if self.residuals is not None:
            state |= self.residuals.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what :meth:`state_dict` returned, for the parameters that this rank holds."""
        self.step = int(state.get("step", torch.tensor(0)))
        if self.residuals is not None:
            self.residuals.load_state_dict(state)


class MessageCompressor(Compressor):
    """A compressor that writes each bucket as a message that other ranks can add to their bucket.

    By default every rank sends its message to all others. A compressor whose messages can be summed by an all-reduce
    overrides :meth:`aggregate`; its messages then serve point-to-point transfers alone, as to a parameter server.
    """

    @abstractmethod
    def compress(self, bucket: Bucket) -> list[Tensor]:
        """Moves what is sent from a bucket's compressed part into a message.

        Args:
            bucket: What is to be sent. In its compressed part, what the message leaves out remains; the uncompressed
                part is ignored.

        Returns:
            The message: contiguous tensors with the dtypes and sizes of :meth:`message_layout`.
        """

    @abstractmethod
    def message_layout(self, bucket: Bucket) -> list[tuple[torch.dtype, int]]:
        """Dtype and number of elements of each tensor of this step's message about a bucket.

        They depend only on the step and on the bucket's names and sizes, so all ranks know each other's layouts.
        """

    @abstractmethod
    def add_decompressed(self, message: list[Tensor], bucket: Bucket) -> None:
        """Adds a message, which may come from another rank, to a bucket's compressed part, in place."""

    @override
    def aggregate(self, bucket: Bucket, communicator: Communicator) -> Iterator[Pending]:
        """All-gathers the messages; every rank adds them in the order of ranks, so all ranks get the same bits."""
        payload = self.encode(bucket)
        payloads, pending = communicator.start_all_gather(payload)
        yield pending
        bucket.flat.zero_()
        for received in payloads:
            self.decode(received, bucket)

    def encode(self, bucket: Bucket) -> Tensor:
        """This rank's message about a bucket, uint8 ``[bytes]``; what it leaves out stays in the residuals."""
        return pack([bucket.uncompressed_part, *self.compress(self._add_residuals(bucket))])

    def decode(self, payload: Tensor, bucket: Bucket) -> None:
        """Adds what a rank encoded in this step to a bucket of the same names and sizes.

        Raises:
            ValueError: The payload's size differs from this step's layout.
        """
        uncompressed, *message = unpack(payload, self.payload_layout(bucket))
        bucket.uncompressed_part.add_(uncompressed)
        self.add_decompressed(message, bucket)

    def payload_layout(self, bucket: Bucket) -> list[tuple[torch.dtype, int]]:
        """Dtype and number of elements of each part that :meth:`encode` packs: uncompressed part, then message."""
        return [(bucket.flat.dtype, bucket.uncompressed_numel), *self.message_layout(bucket)]

    def _add_residuals(self, bucket: Bucket) -> Bucket:
        """The residuals with the bucket's gradients added; the bucket itself without error feedback."""
        return self.residuals.accumulate(bucket) if self.residuals is not None else bucket


def compressor_class(config: Config) -> type[Compressor]:
    """The class of the configured compressor."""
    return cast(type[Compressor], choice("compression", config.compression.name).target)


def build(config: CompressionConfig, seed: int = 0) -> Compressor:
    """The configured compressor."""
    compressor: Compressor = choice("compression", config.name).target(config, seed)
    return compressor
