"""Gradients in flat buckets that are exchanged while the backward pass is still running.

Every strategy that reduces gradients uses this module: ddp over all ranks, a pipeline stage over its replicas, and a
single process over itself alone. Buckets are laid out at set-up in the reverse order of the model's parameters, which
is about the order in which the backward pass finishes them. They are therefore the same on every rank and in every
step, and a compressor may store its state by parameter name (Li et al. 2020, arXiv 2006.15704, §3.2, without rebuilding
buckets). :mod:`distrain.gradients.bucket_sizes` chooses their sizes. A single bucket is exchanged after the backward
pass, without hooks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from distrain.communication.collectives import Communicator, ring_all_reduce_bytes
from distrain.compression.autotune.advice import Advisor, needs_advice
from distrain.compression.base import Compressor
from distrain.compression.bucket import Bucket
from distrain.gradients.bucket_sizes import MIB
from distrain.gradients.clip import ScalableGradients
from distrain.gradients.exchange import BucketExchanger
from distrain.reporting.metrics import Stopwatch


class BucketCarrier(Protocol):
    """Sends complete buckets to where they are reduced, for example to parameter servers."""

    def begin_last_backward(self) -> None:
        """The last backward pass of a step begins."""

    def start(self, bucket: Bucket) -> None:
        """Takes a complete bucket; the order is the same in every step."""

    def finish(self) -> None:
        """Called after the last bucket of a step."""


class ReducedGradients(ScalableGradients, Protocol):
    """Gradients that are zeroed, accumulated and reduced together; see :class:`Gradients`."""

    @property
    def buckets(self) -> Sequence[Bucket]:
        """All buckets, in the order in which they are sent."""

    @property
    def bytes_per_step(self) -> int:
        """Bytes that this rank sends per step without compression."""

    def zero(self) -> None:
        """Starts a new sum."""

    def begin_last_backward(self) -> None:
        """Enables sending before the last backward pass."""

    def finish(self) -> None:
        """Sends the rest and waits."""


class Gradients:
    """The gradients of a set of parameters: zeroed, accumulated, reduced, measured and clipped together.

    Each parameter's ``grad`` is a view into a bucket and remains one.

    Args:
        parameters: ``(name, parameter)`` pairs in the model's order; those that need no gradient are left out.
        communicator: The replicas over which gradients are summed.
        compressor: Compresses the exchange. Where it compresses anything, an advisor observes its first steps.
        stopwatch: Records exposed communication and compression.
        first_bucket_mb: Limit for the size of the first bucket, in MiB; without limits there is one bucket per dtype.
        bucket_mb: Limit for the size of each other bucket, in MiB.
        last_bucket_mb: The last gradients that fit into this size, in MiB, form a bucket of their own, since the
            backward pass hides no part of the last exchange; 0: none do.
        carrier: Sends the buckets, in place of exchanges among the replicas.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        communicator: Communicator,
        compressor: Compressor,
        stopwatch: Stopwatch,
        first_bucket_mb: float = math.inf,
        bucket_mb: float = math.inf,
        last_bucket_mb: float = 0,
        carrier: BucketCarrier | None = None,
    ) -> None:
        self._communicator = communicator
        self._compressor = compressor
        if needs_advice(compressor, communicator):
            compressor.observer = Advisor(compressor)
        self._carrier = carrier
        if carrier is None and communicator.size > 1:
            self._carrier = BucketExchanger(compressor, communicator, stopwatch)
        self._stopwatch = stopwatch
        # Whether buckets are sent as soon as they are complete, the next one to send, and what each one lacks.
        self._sending = False
        self._next = 0
        self._missing: list[int] = []
        self.buckets: list[Bucket] = []
        self._hooks: list[RemovableHandle] = []
        self._parameters = list(parameters)
        self.rebuild_buckets(first_bucket_mb, bucket_mb, last_bucket_mb)

    def rebuild_buckets(
        self, first_bucket_mb: float = math.inf, bucket_mb: float = math.inf, last_bucket_mb: float = 0
    ) -> None:
        """Lays out new buckets, with zeros, for the parameters that need a gradient now; call it between steps only.

        Args:
            first_bucket_mb: As for the class.
            bucket_mb: As for the class.
            last_bucket_mb: As for the class.
        """
        for hook in self._hooks:
            hook.remove()
        for _, parameter in self._parameters:
            # An optimizer leaves a parameter without a gradient as it is, with its state.
            parameter.grad = None
        trained = [(name, parameter) for name, parameter in self._parameters if parameter.requires_grad]
        parts = self._split(trained[::-1], first_bucket_mb * MIB, bucket_mb * MIB, last_bucket_mb * MIB)
        self.buckets = [make_bucket(part, self._compressor) for part in parts]
        self._missing = [0] * len(parts)
        self._hooks = []
        # A single bucket is complete when the backward pass ends, so its gradients need not be counted.
        overlaps = self._carrier is not None and len(parts) > 1
        for index, (part, bucket) in enumerate(zip(parts, self.buckets, strict=True)):
            for name, parameter in part:
                parameter.grad = bucket.tensors[name]
                if overlaps:
                    self._hooks.append(parameter.register_post_accumulate_grad_hook(self._ready_hook(index)))

    def _split(
        self, parameters: list[tuple[str, nn.Parameter]], first_bytes: float, other_bytes: float, last_bytes: float
    ) -> list[list[tuple[str, nn.Parameter]]]:
        """As :func:`split_into_buckets`."""
        return split_into_buckets(parameters, first_bytes, other_bytes, last_bytes)

    @property
    def bytes(self) -> int:
        """Size of all gradients, in bytes."""
        return sum(bucket.bytes for bucket in self.buckets)

    @property
    def bytes_per_step(self) -> int:
        """Bytes that this rank sends to reduce all buckets once, without compression."""
        return sum(ring_all_reduce_bytes(bucket.bytes, self._communicator.size) for bucket in self.buckets)

    def zero(self) -> None:
        """Starts a new sum; call before the first backward pass of a step."""
        for bucket in self.buckets:
            bucket.flat.zero_()

    def begin_last_backward(self) -> None:
        """Enables sending before the last backward pass of a step: each bucket is sent as soon as it is complete."""
        self._sending = True
        if self._carrier is not None:
            self._carrier.begin_last_backward()
        self._next = 0
        for index, bucket in enumerate(self.buckets):
            self._missing[index] = len(bucket.tensors)

    def finish(self) -> None:
        """Sends the rest (buckets with unused parameters, or of a rank without samples) and waits for all buckets."""
        if self._carrier is None:
            self._fold_residuals()
            return
        with self._stopwatch.communication():
            while self._next < len(self.buckets):
                self._send_next()
            self._carrier.finish()
        self._sending = False

    def _fold_residuals(self) -> None:
        if self._compressor.residuals is not None:
            for bucket in self.buckets:
                self._compressor.residuals.fold_into_gradients(bucket)

    def norm(self) -> Tensor:
        """Euclidean norm over all gradients, a scalar."""
        if not self.buckets:
            return torch.zeros(())
        norms: list[Tensor] = [torch.linalg.vector_norm(bucket.flat) for bucket in self.buckets]
        total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return total

    def scale(self, factor: Tensor) -> None:
        """Multiplies all gradients, in place, by a scalar."""
        for bucket in self.buckets:
            bucket.flat.mul_(factor)

    def _ready_hook(self, index: int) -> Callable[[Tensor], None]:
        def hook(_: Tensor) -> None:
            if self._sending:
                self._missing[index] -= 1
                # In order, so that all ranks issue the same collectives whichever bucket is complete first.
                while self._next < len(self.buckets) and self._missing[self._next] == 0:
                    self._send_next()

        return hook

    def _send_next(self) -> None:
        assert self._carrier is not None, "a bucket is sent without other ranks"
        self._carrier.start(self.buckets[self._next])
        self._next += 1


def split_into_buckets(
    parameters: list[tuple[str, nn.Parameter]], first_bytes: float, other_bytes: float, last_bytes: float = 0
) -> list[list[tuple[str, nn.Parameter]]]:
    """Splits a sequence of parameters into parts of one bucket each.

    Args:
        parameters: ``(name, parameter)`` pairs in the order in which their gradients are sent.
        first_bytes: Limit for the size of the first part.
        other_bytes: Limit for the size of each other part; a larger parameter is a part by itself.
        last_bytes: As many of the last parameters as fit into this size form a part of their own, if others precede
            them.

    Returns:
        The parts; the parameters of each have one dtype and device.
    """
    parts: list[list[tuple[str, nn.Parameter]]] = []
    filled = float("inf")
    left = sum(_bytes(parameter) for _, parameter in parameters)
    in_last = False
    for name, parameter in parameters:
        size = _bytes(parameter)
        limit = first_bytes if len(parts) == 1 else other_bytes
        previous = parts[-1][-1][1] if parts else None
        alike = previous is not None and (previous.dtype, previous.device) == (parameter.dtype, parameter.device)
        last_begins = left <= last_bytes and not in_last
        in_last = in_last or last_begins
        left -= size
        # If everything fits into the first bucket, there is no second one.
        all_in_first = filled + left + size <= limit and len(parts) == 1
        if not alike or filled + size > limit or (last_begins and not all_in_first):
            parts.append([])
            filled = 0
        parts[-1].append((name, parameter))
        filled += size
    return parts


def _bytes(parameter: nn.Parameter) -> int:
    return parameter.numel() * parameter.element_size()


def make_bucket(parameters: list[tuple[str, nn.Parameter]], compressor: Compressor) -> Bucket:
    """A bucket of zeros with one tensor per parameter, in the order that a compressor needs.

    Args:
        parameters: ``(name, parameter)`` pairs of one dtype and device.
        compressor: Decides the order and which tensors it compresses.
    """
    first = parameters[0][1]
    flat = torch.zeros(sum(p.numel() for _, p in parameters), dtype=first.dtype, device=first.device)
    tensors, offset = {}, 0
    for name, parameter in sorted(parameters, key=lambda pair: compressor.bucket_order(pair[1])):
        # The parameter's own strides (channels-last weights), so that fused optimizers see one layout. A parameter that
        # is a view with gaps gets the strides of a copy, since a bucket has no gaps.
        strides = torch.empty_like(parameter, device="meta").stride()
        tensors[name] = flat.as_strided(parameter.size(), strides, offset)
        offset += parameter.numel()
    return Bucket(flat, tensors, sum(p.numel() for _, p in parameters if not compressor.compresses(p)))
