"""One stage of a pipeline: a part of the model, with its forward and backward passes over microbatches."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distrain.data.batch import Targets
from distrain.strategies.precision import Precision
from distrain.tasks.base import Task


@dataclass
class _SavedMicrobatch:
    """What a stage saves of a microbatch from its forward to its backward pass.

    Attributes:
        input: Input of the stage.
        output: Tensor from which the backward pass starts.
        parameter_groups: Of a split backward pass: what its second half needs.
        output_gradient: Of a split backward pass: the gradient of the output.
        activation_bytes: Size of what autograd saves, if it is measured.
    """

    input: Tensor
    output: Tensor
    parameter_groups: list[dict[str, Any]] = field(default_factory=list)
    output_gradient: Tensor | None = None
    activation_bytes: int = 0


class Stage:
    """A part of the model on one rank.

    Args:
        index: Position in the pipeline.
        module: The part.
        is_last: Whether it ends in the loss.
        task: Computes the loss of the last stage's outputs.
        precision: Of forward and backward passes.
        splits_backward: Whether backward passes come in two halves.

    Attributes:
        measures_memory: Whether forward passes measure the size of activations, which takes a little time.
        peak_activation_bytes: Largest size measured of all activations held at once.
    """

    def __init__(
        self,
        index: int,
        module: nn.Module,
        is_last: bool,
        task: Task,
        precision: Precision,
        *,
        splits_backward: bool,
    ) -> None:
        self.index = index
        self.module = module
        self.is_first = index == 0
        self.is_last = is_last
        self.splits_backward = splits_backward
        if splits_backward:
            # Imported here, since it imports all of torch's pipelining with compiler and export, which takes a second.
            from torch.distributed.pipelining import _backward

            self._split_backward = _backward
        self._task = task
        self._precision = precision
        self._saved: dict[int, _SavedMicrobatch] = {}
        self.measures_memory = True
        self.peak_activation_bytes = 0

    def forward(self, microbatch: int, x: Tensor, targets: Targets, global_count: int) -> tuple[Tensor, Tensor]:
        """Runs the forward pass and saves what the backward pass needs.

        Args:
            microbatch: Index of the microbatch.
            x: Input of the stage, ``[N, …]``.
            targets: Of the microbatch's samples.
            global_count: What the sum of losses is divided by.

        Returns:
            The output (of the last stage, the model's), and the sum of the losses, which is 0 except on the last stage.
        """
        if not self.is_first:
            x = x.detach().requires_grad_()
        storage_bytes: dict[int, int] = {}
        hooks = self._record_saved_storages(storage_bytes) if self.measures_memory else nullcontext()
        with hooks, self._precision.autocast():
            output = self.module(x)
            loss_sum = self._task.loss(output, targets)[0] if self.is_last else output.new_zeros(())
        root = self._precision.scale(loss_sum / global_count) if self.is_last else output
        if self.splits_backward and root._is_view():
            # The split backward pass detaches the output in place, which views (of a flatten, for example) don't allow.
            root = root.clone()
        self._saved[microbatch] = _SavedMicrobatch(x, root, activation_bytes=sum(storage_bytes.values()))
        held_bytes = sum(saved.activation_bytes for saved in self._saved.values())
        self.peak_activation_bytes = max(self.peak_activation_bytes, held_bytes)
        return output.detach(), loss_sum.detach()

    def backward(self, microbatch: int, output_gradient: Tensor | None) -> Tensor | None:
        """Runs the whole backward pass; returns the gradient of the stage's input."""
        saved = self._saved.pop(microbatch)
        torch.autograd.backward(saved.output, output_gradient)
        return saved.input.grad

    def backward_input(self, microbatch: int, output_gradient: Tensor | None) -> Tensor | None:
        """Computes the gradient of the stage's input, which the previous stage waits for.

        The first stage has no previous one: it runs its whole backward pass in :meth:`backward_weight`.
        """
        saved = self._saved[microbatch]
        saved.output_gradient = output_gradient
        if self.is_first:
            return None
        gradients = None if output_gradient is None else [output_gradient]
        input_gradients, saved.parameter_groups = self._split_backward.stage_backward_input(
            [saved.output], gradients, [saved.input], self.module.parameters()
        )
        input_gradient = input_gradients[0]
        assert input_gradient is not None
        return input_gradient

    def backward_weight(self, microbatch: int) -> None:
        """Computes the gradients of the parameters, which no other stage waits for."""
        saved = self._saved.pop(microbatch)
        if self.is_first:
            torch.autograd.backward(saved.output, saved.output_gradient)
        else:
            self._split_backward.stage_backward_weight(self.module.parameters(), saved.parameter_groups)

    def _record_saved_storages(self, storage_bytes: dict[int, int]) -> AbstractContextManager[Any]:
        """Records the size of each storage that autograd saves, by address; those of parameters are left out."""
        parameters = {parameter.untyped_storage().data_ptr() for parameter in self.module.parameters()}

        def record(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                storage_bytes[storage.data_ptr()] = storage.nbytes()
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor)
