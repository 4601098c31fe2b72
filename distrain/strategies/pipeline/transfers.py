"""What stages hand each other: activations on the way there, gradients on the way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distrain.communication.collectives import Communicator
from distrain.communication.types import Pending
from distrain.reporting.metrics import Stopwatch
from distrain.strategies.pipeline.schedule import Work
from distrain.strategies.pipeline.timeline import SpanRecorder


@dataclass(frozen=True)
class Handed:
    """What a stage hands to the next for each sample; both sides know it, since the backend checks nothing.

    Attributes:
        shape: Of one sample.
        dtype: Under the run's precision.
        channels_last: It lies in memory as ``[H, W, C]``.
    """

    shape: torch.Size
    dtype: torch.dtype
    channels_last: bool

    def buffer(self, size: int, device: torch.device) -> Tensor:
        """Memory for ``size`` samples, contiguous, as it travels."""
        shape = tuple(self.shape)
        if self.channels_last:
            shape = (shape[1], shape[2], shape[0])
        return torch.empty((size, *shape), dtype=self.dtype, device=device)

    def pack(self, tensor: Tensor) -> Tensor:
        """The tensor as it travels."""
        if tensor.dtype != self.dtype or tensor.shape[1:] != self.shape:
            raise ValueError(f"a stage hands over {tensor.dtype} {list(tensor.shape[1:])}, announced was {self}")
        return (tensor.permute(0, 2, 3, 1) if self.channels_last else tensor).contiguous()

    def unpack(self, buffer: Tensor) -> Tensor:
        """The tensor in its own shape, in the same memory."""
        return buffer.permute(0, 3, 1, 2) if self.channels_last else buffer


class Mail:
    """One step's messages of one rank: posted as soon as they are there, asked for before they are needed.

    Args:
        where: The pipeline rank of each stage.
        handed: What each stage but the last hands over.
        sizes: Samples of each microbatch.
        forward_line: Carries activations.
        backward_line: Carries gradients.
        device: Where buffers lie.
        recorder: Takes the waits.
        stopwatch: Takes them too.
    """

    def __init__(
        self,
        where: Sequence[int],
        handed: Sequence[Handed],
        sizes: Sequence[int],
        forward_line: Communicator,
        backward_line: Communicator,
        device: torch.device,
        recorder: SpanRecorder,
        stopwatch: Stopwatch,
    ) -> None:
        self._where = where
        self._handed = handed
        self._sizes = sizes
        self._lines = (forward_line, backward_line)
        self._device = device
        self._recorder = recorder
        self._stopwatch = stopwatch
        self._expected: dict[Work, tuple[Pending, Tensor]] = {}
        self._local: dict[Work, Tensor] = {}
        self._sent: list[tuple[Pending, Tensor]] = []

    def expect(self, works: Sequence[Work]) -> None:
        """Starts receiving for the next few pieces of work."""
        for work in works:
            source = self._source(work)
            if source is None or work in self._expected or self._where[source] == self._line(work).rank:
                continue
            handed = self._handed_to(work)
            buffer = handed.buffer(self._sizes[work.microbatch], self._device)
            pending = self._line(work).start_receive(buffer, self._where[source], self._tag(work))
            self._expected[work] = (pending, handed.unpack(buffer))

    def take(self, work: Work) -> Tensor:
        """What this work begins with; waits for it."""
        if work in self._local:
            return self._local.pop(work)
        pending, tensor = self._expected.pop(work)
        with self._stopwatch.communication(), self._recorder.span("wait", work.stage, work.microbatch):
            pending.wait()
        return tensor

    def post(self, work: Work, tensor: Tensor) -> None:
        """Hands ``tensor`` to the work that begins with it, on this rank or another."""
        line, owner = self._line(work), self._where[work.stage]
        if owner == line.rank:
            self._local[work] = tensor
            return
        with self._recorder.span("send", work.stage, work.microbatch):
            packed = self._handed_to(work).pack(tensor)
            self._sent.append((line.start_send(packed, owner, self._tag(work)), packed))

    def wait(self) -> None:
        """Waits until all that was sent has left."""
        with self._stopwatch.communication():
            for pending, _ in self._sent:
                pending.wait()
        self._sent.clear()

    def _source(self, work: Work) -> int | None:
        """The stage that hands over what this work begins with."""
        if work.kind == "forward":
            return work.stage - 1 if work.stage else None
        if work.kind == "weight" or work.stage == len(self._where) - 1:
            return None
        return work.stage + 1

    def _line(self, work: Work) -> Communicator:
        return self._lines[work.kind != "forward"]

    def _handed_to(self, work: Work) -> Handed:
        # A forward pass begins with what the stage before gives, a backward pass with the gradient of what this gives.
        return self._handed[work.stage - 1 if work.kind == "forward" else work.stage]

    def _tag(self, work: Work) -> int:
        return work.stage * len(self._sizes) + work.microbatch
