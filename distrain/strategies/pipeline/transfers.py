"""Transfers between stages: activations in forward passes, their gradients in backward passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distrain.communication.collectives import Communicator
from distrain.communication.types import Pending
from distrain.reporting.metrics import Stopwatch
from distrain.strategies.pipeline.schedule import Action
from distrain.strategies.pipeline.timeline import SpanRecorder
from distrain.strategies.precision import Precision


@dataclass(frozen=True)
class ActivationSpec:
    """Shape and format of the activations that a stage sends to the next one, and of their gradients.

    Sender and receiver both know it, since the backend does not check messages.

    Attributes:
        shape: Shape of one sample.
        dtype: Data type under the run's precision.
        channels_last: The memory layout is ``[N, H, W, C]``.
    """

    shape: torch.Size
    dtype: torch.dtype
    channels_last: bool

    def empty_message(self, size: int, device: torch.device) -> Tensor:
        """Contiguous memory for a message of ``size`` samples."""
        shape = tuple(self.shape)
        if self.channels_last:
            shape = (shape[1], shape[2], shape[0])
        return torch.empty((size, *shape), dtype=self.dtype, device=device)

    def to_message(self, tensor: Tensor) -> Tensor:
        """The tensor as it is sent, contiguous.

        Raises:
            ValueError: The tensor does not match the specification.
        """
        if tensor.dtype != self.dtype or tensor.shape[1:] != self.shape:
            raise ValueError(f"a stage sends {tensor.dtype} {list(tensor.shape[1:])}, but the next one expects {self}")
        return (tensor.permute(0, 2, 3, 1) if self.channels_last else tensor).contiguous()

    def from_message(self, message: Tensor) -> Tensor:
        """The message as a tensor of the original shape, in the same memory."""
        return message.permute(0, 3, 1, 2) if self.channels_last else message


def find_activation_specs(
    model: nn.Sequential, example: Tensor, starts: Sequence[int], precision: Precision
) -> list[ActivationSpec]:
    """Runs the model on two samples to find what each stage but the last sends.

    Args:
        model: The whole model.
        example: Inputs.
        starts: Index of each stage's first block.
        precision: Of forward passes.
    """
    training = model.training
    model.eval()
    specs = []
    with torch.no_grad(), precision.autocast():
        x = example[:2]
        for index, block in enumerate(model.children()):
            x = block(x)
            if index + 1 in starts:
                channels_last = x.dim() == 4 and not x.is_contiguous()
                channels_last = channels_last and x.is_contiguous(memory_format=torch.channels_last)
                specs.append(ActivationSpec(x.shape[1:], x.dtype, channels_last))
    model.train(training)
    return specs


class StageTransfers:
    """One rank's transfers in one step: receives start before they are needed, sends as soon as the data exist.

    Each transfer is identified by the action that needs it.

    Args:
        rank_of_stage: The pipeline rank of each stage.
        specs: What each stage but the last sends.
        sizes: Samples of each microbatch.
        forward_group: The pipeline's ranks, for activations.
        backward_group: The same ranks, for gradients.
        device: Device of the buffers.
        recorder: Records sends and waits.
        stopwatch: Records waits.
    """

    def __init__(
        self,
        rank_of_stage: Sequence[int],
        specs: Sequence[ActivationSpec],
        sizes: Sequence[int],
        forward_group: Communicator,
        backward_group: Communicator,
        device: torch.device,
        recorder: SpanRecorder,
        stopwatch: Stopwatch,
    ) -> None:
        self._rank_of_stage = rank_of_stage
        self._specs = specs
        self._sizes = sizes
        self._groups = (forward_group, backward_group)
        self._device = device
        self._recorder = recorder
        self._stopwatch = stopwatch
        self._receives: dict[Action, tuple[Pending, Tensor]] = {}
        # From one stage of this rank to another one.
        self._local: dict[Action, Tensor] = {}
        # Messages must be kept alive until they are sent.
        self._sends: list[tuple[Pending, Tensor]] = []

    def start_receives(self, actions: Sequence[Action]) -> None:
        """Starts to receive what these actions need from other ranks."""
        for action in actions:
            source = self._source_stage(action)
            if source is None or action in self._receives:
                continue
            group, source_rank = self._group(action), self._rank_of_stage[source]
            if source_rank == group.rank:
                continue
            spec = self._spec(action)
            message = spec.empty_message(self._sizes[action.microbatch], self._device)
            pending = group.start_receive(message, source_rank, self._tag(action))
            self._receives[action] = (pending, spec.from_message(message))

    def receive(self, action: Action) -> Tensor:
        """Waits for what an action needs, and returns it."""
        if action in self._local:
            return self._local.pop(action)
        pending, tensor = self._receives.pop(action)
        with self._stopwatch.communication(), self._recorder.span("wait", action.stage, action.microbatch):
            pending.wait()
        return tensor

    def send(self, action: Action, tensor: Tensor) -> None:
        """Starts to send what an action, on this rank or another, needs."""
        group, rank = self._group(action), self._rank_of_stage[action.stage]
        if rank == group.rank:
            self._local[action] = tensor
            return
        with self._recorder.span("send", action.stage, action.microbatch):
            message = self._spec(action).to_message(tensor)
            self._sends.append((group.start_send(message, rank, self._tag(action)), message))

    def wait_for_sends(self) -> None:
        """Waits until everything is sent."""
        with self._stopwatch.communication():
            for pending, _ in self._sends:
                pending.wait()
        self._sends.clear()

    def _source_stage(self, action: Action) -> int | None:
        """The stage whose output, or input gradient, an action needs."""
        if action.kind == "forward":
            return action.stage - 1 if action.stage else None
        if action.kind == "weight" or action.stage == len(self._rank_of_stage) - 1:
            return None
        return action.stage + 1

    def _group(self, action: Action) -> Communicator:
        return self._groups[action.kind != "forward"]

    def _spec(self, action: Action) -> ActivationSpec:
        # A forward pass needs the output of the previous stage, a backward pass the gradient of its own stage's output.
        return self._specs[action.stage - 1 if action.kind == "forward" else action.stage]

    def _tag(self, action: Action) -> int:
        return action.stage * len(self._sizes) + action.microbatch
