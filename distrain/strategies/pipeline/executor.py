"""Executes a rank's actions of a schedule: forward and backward passes, and the transfers between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from distrain.data.batch import Targets
from distrain.gradients.buckets import ReducedGradients
from distrain.strategies.pipeline.options import PipelineConfig
from distrain.strategies.pipeline.schedule import SCHEDULES, Action, actions_of_ranks
from distrain.strategies.pipeline.stage import Stage
from distrain.strategies.pipeline.timeline import SpanRecorder
from distrain.strategies.pipeline.transfers import StageTransfers
from distrain.strategies.precision import Precision
from distrain.tasks.base import Task

#: Receives are started for this many actions ahead, so that messages arrive while the rank computes.
RECEIVES_AHEAD = 3


class ScheduleExecutor:
    """Executes one rank's part of each step.

    Args:
        options: The strategy's keys.
        rank: This rank in the pipeline.
        stages: This rank's stages by index.
        gradients: Their gradients.
        task: Measures the model's outputs.
        precision: Of forward passes in evaluation.
        make_transfers: Makes the transfers of a step from the sizes of its microbatches.
        recorder: Records the actions.
        device: Of the results.
    """

    def __init__(
        self,
        options: PipelineConfig,
        rank: int,
        stages: Mapping[int, Stage],
        gradients: Mapping[int, ReducedGradients],
        task: Task,
        precision: Precision,
        make_transfers: Callable[[list[int]], StageTransfers],
        recorder: SpanRecorder,
        device: torch.device,
    ) -> None:
        self._options = options
        self._rank = rank
        self._stages = stages
        self._gradients = gradients
        self._task = task
        self._precision = precision
        self._make_transfers = make_transfers
        self._recorder = recorder
        self._device = device
        self._actions: dict[int, list[Action]] = {}

    def no_sums(self) -> tuple[Tensor, Tensor]:
        """Sums of the loss and of the task's metrics over no samples."""
        zeros = torch.zeros(1 + len(self._task.metrics), dtype=torch.float64, device=self._device)
        return zeros[0], zeros[1:]

    def train(self, microbatches: Sequence[tuple[Tensor, Targets]], global_count: int) -> tuple[Tensor, Tensor]:
        """Executes this rank's actions of a training step.

        Args:
            microbatches: Inputs and targets of each one.
            global_count: What the sum of losses is divided by.

        Returns:
            Sums of the loss and of the task's metrics; zeros on ranks without the last stage.
        """
        actions = self._training_actions(len(microbatches))
        transfers = self._make_transfers([len(inputs) for inputs, _ in microbatches])
        loss, metric_sums = self.no_sums()
        backwards_left = {
            index: sum(action.stage == index and action.kind in ("backward", "weight") for action in actions)
            for index in self._stages
        }
        for position, action in enumerate(actions):
            transfers.start_receives(actions[position : position + RECEIVES_AHEAD])
            stage, m = self._stages[action.stage], action.microbatch
            if action.kind == "forward":
                inputs, targets = microbatches[m]
                received = [inputs] if stage.is_first else transfers.receive(action)
                with self._recorder.span(*action):
                    outputs, loss_sum = stage.forward(m, received, targets, global_count)
                if stage.is_last:
                    loss += loss_sum
                    metric_sums += self._task.measure(outputs[0], targets)
                else:
                    transfers.send(Action("forward", action.stage + 1, m), outputs)
                continue
            if action.kind in ("backward", "weight"):
                backwards_left[action.stage] -= 1
                # With several stages per rank, replicas with fewer microbatches might complete the stages' gradients in
                # another order, and their collectives would not match. Then gradients are sent after all actions.
                if not backwards_left[action.stage] and len(self._stages) == 1:
                    self._gradients[action.stage].begin_last_backward()
            if action.kind == "weight":
                with self._recorder.span(*action):
                    stage.backward_weight(m)
                continue
            output_gradients = None if stage.is_last else transfers.receive(action)
            backward = stage.backward if action.kind == "backward" else stage.backward_input
            with self._recorder.span(*action):
                input_gradients = backward(m, output_gradients)
            if not stage.is_first:
                transfers.send(Action(action.kind, action.stage - 1, m), input_gradients)
        transfers.wait_for_sends()
        return loss, metric_sums

    def _training_actions(self, microbatches: int) -> list[Action]:
        if microbatches not in self._actions:
            options = self._options
            schedule = SCHEDULES[options.schedule]
            of_ranks = actions_of_ranks(schedule, options.ranks, options.stages_per_rank, microbatches)
            self._actions[microbatches] = of_ranks[self._rank]
        return self._actions[microbatches]

    def evaluate(self, microbatches: Sequence[Tensor]) -> Tensor:
        """Runs forward passes only.

        Args:
            microbatches: The model's inputs.

        Returns:
            The model's outputs on the rank with the last stage, a zero elsewhere.
        """
        transfers = self._make_transfers([len(inputs) for inputs in microbatches])
        actions = [Action("forward", stage, m) for m in range(len(microbatches)) for stage in self._stages]
        outputs = []
        for position, action in enumerate(actions):
            transfers.start_receives(actions[position : position + RECEIVES_AHEAD])
            stage = self._stages[action.stage]
            if stage.module.training:
                stage.module.eval()
            received = [microbatches[action.microbatch]] if stage.is_first else transfers.receive(action)
            with self._precision.autocast():
                sent = stage.run(received)
            if stage.is_last:
                outputs.append(sent[0])
            else:
                transfers.send(Action("forward", action.stage + 1, action.microbatch), sent)
        transfers.wait_for_sends()
        return torch.cat(outputs) if outputs else torch.zeros((), device=self._device)
