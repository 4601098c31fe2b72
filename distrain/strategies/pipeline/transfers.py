"""Transfers between stages: activations in forward passes, their gradients in backward passes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distrain.communication.collectives import Communicator
from distrain.communication.types import Pending
from distrain.reporting.metrics import Stopwatch
from distrain.strategies.pipeline.blocks import ActivationSpec, HandOver
from distrain.strategies.pipeline.schedule import Action
from distrain.strategies.pipeline.timeline import SpanRecorder


class StageTransfers:
    """One rank's transfers in one step: receives start before they are needed, sends as soon as the data exist.

    Each transfer is identified by the action that needs it.

    Args:
        rank_of_stage: The pipeline rank of each stage.
        outputs: What each stage but the last sends.
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
        outputs: Sequence[HandOver],
        sizes: Sequence[int],
        forward_group: Communicator,
        backward_group: Communicator,
        device: torch.device,
        recorder: SpanRecorder,
        stopwatch: Stopwatch,
    ) -> None:
        self._rank_of_stage = rank_of_stage
        self._outputs = outputs
        # Tensors of one action have consecutive tags.
        self._width = max((len(output.tensors) for output in outputs), default=1)
        self._sizes = sizes
        self._groups = (forward_group, backward_group)
        self._device = device
        self._recorder = recorder
        self._stopwatch = stopwatch
        self._receives: dict[Action, list[tuple[Pending, Tensor]]] = {}
        # From one stage of this rank to another one.
        self._local: dict[Action, list[Tensor]] = {}
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
            receives = self._receives[action] = []
            for tag, spec in enumerate(self._specs(action), self._first_tag(action)):
                message = spec.empty_message(self._sizes[action.microbatch], self._device)
                receives.append((group.start_receive(message, source_rank, tag), spec.from_message(message)))

    def receive(self, action: Action) -> list[Tensor]:
        """Waits for the tensors that an action needs, and returns them."""
        if action in self._local:
            return self._local.pop(action)
        receives = self._receives.pop(action)
        if receives:
            with self._stopwatch.communication(), self._recorder.span("wait", action.stage, action.microbatch):
                for pending, _ in receives:
                    pending.wait()
        return [tensor for _, tensor in receives]

    def send(self, action: Action, tensors: Sequence[Tensor]) -> None:
        """Starts to send the tensors that an action, on this rank or another, needs."""
        group, rank = self._group(action), self._rank_of_stage[action.stage]
        if rank == group.rank:
            self._local[action] = list(tensors)
            return
        for tag, (spec, tensor) in enumerate(zip(self._specs(action), tensors, strict=True), self._first_tag(action)):
            with self._recorder.span("send", action.stage, action.microbatch):
                message = spec.to_message(tensor)
                self._sends.append((group.start_send(message, rank, tag), message))

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

    def _specs(self, action: Action) -> list[ActivationSpec]:
        # A forward pass needs the previous stage's output, a backward pass the gradients of its own stage's output.
        if action.kind == "forward":
            return list(self._outputs[action.stage - 1].tensors)
        return [spec for spec in self._outputs[action.stage].tensors if spec.requires_grad]

    def _first_tag(self, action: Action) -> int:
        return (action.stage * len(self._sizes) + action.microbatch) * self._width
