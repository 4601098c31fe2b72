"""Gradients in flat buckets that are exchanged while the backward pass still runs.

Every strategy that reduces gradients among replicas uses this one part: ddp over all ranks, a pipeline stage over its
replicas, and one process over nobody. Buckets are made at set-up, in the reverse order of the model's parameters (about
the order in which the backward pass finishes them), so they are the same on every rank and in every step, and a
compressor may store by parameter name (Li et al. 2020, arXiv 2006.15704, §3.2, without the rebuilding). How large they
are is for :mod:`distrain.gradients.bucket_sizes` to say; a single one leaves after the backward pass, without hooks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from distrain.communication.collectives import Communicator, ring_all_reduce_bytes
from distrain.compression.autotune import advice
from distrain.compression.base import Compressor
from distrain.compression.bucket import Bucket
from distrain.gradients.clip import ScalableGradients
from distrain.gradients.exchange import Exchanges
from distrain.reporting.metrics import Stopwatch

MB = 1024 * 1024


class Carrier(Protocol):
    """Takes complete buckets away."""

    def begin_last_backward(self) -> None:
        """The last backward pass of a step begins."""

    def start(self, bucket: Bucket) -> None:
        """Takes a bucket, in the same order in every step."""

    def finish(self) -> None:
        """Called after the last bucket of a step."""


class Reduced(ScalableGradients, Protocol):
    """Gradients that are zeroed, accumulated and reduced together; see :class:`Gradients`."""

    buckets: list[Bucket]

    @property
    def bytes_per_step(self) -> int:
        """Bytes this rank sends in a step, uncompressed."""

    def zero(self) -> None:
        """Starts a new sum."""

    def begin_last_backward(self) -> None:
        """The last backward pass of a step comes."""

    def finish(self) -> None:
        """That was it."""


class Gradients:
    """The gradients of a set of parameters: zeroed, accumulated, reduced, measured and clipped together.

    ``parameter.grad`` of each is a view into a bucket and stays so.

    Args:
        parameters: ``(name, parameter)`` pairs in the model's order; those that need no gradient are left out.
        communicator: The replicas to reduce among.
        compressor: How the buckets travel.
        stopwatch: Where the exposed communication is booked.
        first_bucket_mb: Size at which the first bucket is closed, in MiB; without limits there is one bucket a dtype.
        bucket_mb: The same for the others.
        last_bucket_mb: What comes last travels apart, if it is no more than this in MiB: nothing hides the last bucket.
        carrier: Takes the buckets instead of exchanges among the replicas.
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
        carrier: Carrier | None = None,
    ) -> None:
        self._communicator = communicator
        self._compressor = compressor
        if advice.wanted(compressor, communicator):
            advice.Advisor(compressor)
        self._exchanges = carrier
        if carrier is None and communicator.size > 1:
            self._exchanges = Exchanges(compressor, communicator, stopwatch)
        self._stopwatch = stopwatch
        self._armed = False
        self._next = 0
        self.buckets: list[Bucket] = []
        self._missing: list[int] = []
        self._handles: list[RemovableHandle] = []
        self._trained = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
        self.rebuild_buckets(first_bucket_mb, bucket_mb, last_bucket_mb)

    def rebuild_buckets(self, first_bucket_mb: float, bucket_mb: float, last_bucket_mb: float) -> None:
        """Cuts the gradients anew, which become zero; never amid a step. Sizes are those of the class."""
        for handle in self._handles:
            handle.remove()
        parts = partition(self._trained[::-1], first_bucket_mb * MB, bucket_mb * MB, last_bucket_mb * MB)
        self.buckets = [make_bucket(part, self._compressor) for part in parts]
        self._missing = [0] * len(parts)
        self._handles = []
        # A single bucket is complete when the backward pass is over, so nobody need count its gradients.
        overlaps = self._exchanges is not None and len(parts) > 1
        for index, (part, bucket) in enumerate(zip(parts, self.buckets, strict=True)):
            for name, parameter in part:
                parameter.grad = bucket.tensors[name]
                if overlaps:
                    self._handles.append(parameter.register_post_accumulate_grad_hook(self._ready_hook(index)))

    @property
    def bytes(self) -> int:
        """Size of all gradients."""
        return sum(bucket.bytes for bucket in self.buckets)

    @property
    def bytes_per_step(self) -> int:
        """Bytes this rank sends to reduce all buckets once, uncompressed."""
        return sum(ring_all_reduce_bytes(bucket.bytes, self._communicator.size) for bucket in self.buckets)

    def zero(self) -> None:
        """Starts a new sum; call before the first backward pass of a step."""
        for bucket in self.buckets:
            bucket.flat.zero_()

    def begin_last_backward(self) -> None:
        """From now on a bucket is sent off as soon as it is complete; call before the last backward pass of a step."""
        self._armed = True
        if self._exchanges is not None:
            self._exchanges.begin_last_backward()
        self._next = 0
        for index, bucket in enumerate(self.buckets):
            self._missing[index] = len(bucket.tensors)

    def finish(self) -> None:
        """Sends what the backward pass did not complete (unused parameters, an empty share) and waits for all."""
        if self._exchanges is None:
            self._settle()
            return
        with self._stopwatch.communication():
            while self._next < len(self.buckets):
                self._launch()
            self._exchanges.finish()
        self._armed = False

    def _settle(self) -> None:
        if self._compressor.residuals is not None:
            for bucket in self.buckets:
                self._compressor.residuals.fold_into_gradients(bucket)

    def norm(self) -> Tensor:
        """Euclidean norm over all gradients, a scalar."""
        norms: list[Tensor] = [torch.linalg.vector_norm(bucket.flat) for bucket in self.buckets]
        whole: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return whole

    def scale(self, factor: Tensor) -> None:
        """Multiplies all gradients by a scalar."""
        for bucket in self.buckets:
            bucket.flat.mul_(factor)

    def _ready_hook(self, index: int) -> Callable[[Tensor], None]:
        def hook(_: Tensor) -> None:
            if self._armed:
                self._missing[index] -= 1
                # In order, so that all ranks issue the same collectives whatever their backward passes finish first.
                while self._next < len(self.buckets) and self._missing[self._next] == 0:
                    self._launch()

        return hook

    def _launch(self) -> None:
        assert self._exchanges is not None, "buckets are sent without anybody to send them to"
        self._exchanges.start(self.buckets[self._next])
        self._next += 1


def partition(
    parameters: list[tuple[str, nn.Parameter]], first_bytes: float, bytes_: float, last_bytes: float = 0
) -> list[list[tuple[str, nn.Parameter]]]:
    """Cuts a row of parameters into parts for one bucket each.

    Args:
        parameters: ``(name, parameter)`` pairs in the order in which they travel.
        first_bytes: Size at which the first part is closed.
        bytes_: The same for the others; a larger parameter is a part by itself.
        last_bytes: As many of the last parameters as fit in this size are a part by themselves, if others come before.

    Returns:
        The parts; the parameters of each have one dtype and device.
    """
    parts: list[list[tuple[str, nn.Parameter]]] = []
    filled = float("inf")
    left = sum(_bytes(parameter) for _, parameter in parameters)
    tail = False
    for name, parameter in parameters:
        size = _bytes(parameter)
        limit = first_bytes if len(parts) == 1 else bytes_
        last = parts[-1][-1][1] if parts else None
        alike = last is not None and (last.dtype, last.device) == (parameter.dtype, parameter.device)
        tail_begins = left <= last_bytes and not tail
        tail = tail or tail_begins
        left -= size
        # What fits into the first bucket as a whole needs no second one.
        whole = filled + left + size <= limit and len(parts) == 1
        if not alike or filled + size > limit or (tail_begins and not whole):
            parts.append([])
            filled = 0
        parts[-1].append((name, parameter))
        filled += size
    return parts


def _bytes(parameter: nn.Parameter) -> int:
    return parameter.numel() * parameter.element_size()


def make_bucket(part: list[tuple[str, nn.Parameter]], compressor: Compressor) -> Bucket:
    """A bucket of zeros for what has the shapes of parameters of one dtype and device, laid out for a compressor."""
    plain = [pair for pair in part if not compressor.compresses(pair[1])]
    first = part[0][1]
    flat = torch.zeros(sum(p.numel() for _, p in part), dtype=first.dtype, device=first.device)
    tensors, offset = {}, 0
    for name, parameter in sorted(part, key=lambda pair: compressor.bucket_order(pair[1])):
        # The parameter's own strides (channels-last weights), so that fused optimizers see one layout; those of a
        # copy where it is a view with gaps, which the bucket has not.
        strides = torch.empty_like(parameter, device="meta").stride()
        tensors[name] = flat.as_strided(parameter.size(), strides, offset)
        offset += parameter.numel()
    return Bucket(flat, tensors, sum(p.numel() for _, p in plain))
