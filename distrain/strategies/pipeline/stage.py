"""One stage of a pipeline: a slice of the model, its passes over microbatches, and what it keeps between them."""

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
class _Kept:
    """What a stage keeps of a microbatch from its forward to its backward pass."""

    input: Tensor
    output: Tensor
    groups: list[dict[str, Any]] = field(default_factory=list)
    gradient: Tensor | None = None
    bytes: int = 0


class Stage:
    """A slice of the model on one rank.

    Args:
        index: Position in the pipeline.
        module: The slice.
        is_last: It ends in the loss.
        task: Gives the loss and metrics of the last stage's outputs.
        precision: What passes run in.
        splits_backward: Backward passes come in two halves.
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
            # Imported here: with it comes all of torch's pipelining, its compiler and export, a second of start-up.
            from torch.distributed.pipelining import _backward

            self._halves = _backward
        self._task = task
        self._precision = precision
        self._kept: dict[int, _Kept] = {}
        #: Counts the bytes of activations while it is set; a little slower.
        self.counts_memory = False
        self.peak_activation_bytes = 0

    def forward(self, microbatch: int, x: Tensor, targets: Targets, global_count: int) -> tuple[Tensor, Tensor]:
        """Runs the slice and keeps what the backward pass needs.

        Returns:
            What the next stage gets, or of the last stage the model's outputs; and the sum of the losses, which only
            the last stage knows.
        """
        if not self.is_first:
            x = x.detach().requires_grad_()
        seen: dict[int, int] = {}
        with self._counted(seen) if self.counts_memory else nullcontext(), self._precision.autocast():
            output = self.module(x)
            loss_sum = self._task.loss(output, targets)[0] if self.is_last else output.new_zeros(())
        kept = self._precision.scale(loss_sum / global_count) if self.is_last else output
        if self.splits_backward and kept._is_view():
            # The split backward pass detaches the output in place, which a view (of a flatten, say) doesn't allow.
            kept = kept.clone()
        self._kept[microbatch] = _Kept(x, kept, bytes=sum(seen.values()))
        self.peak_activation_bytes = max(self.peak_activation_bytes, sum(each.bytes for each in self._kept.values()))
        return output.detach(), loss_sum.detach()

    def backward(self, microbatch: int, gradient: Tensor | None) -> Tensor | None:
        """The whole backward pass; returns the input's gradient for the stage before."""
        kept = self._kept.pop(microbatch)
        torch.autograd.backward(kept.output, gradient)
        return kept.input.grad

    def backward_input(self, microbatch: int, gradient: Tensor | None) -> Tensor | None:
        """The half that the stage before waits for; the first stage, for which nobody waits, does all in the other."""
        kept = self._kept[microbatch]
        kept.gradient = gradient
        if self.is_first:
            return None
        gradients = None if gradient is None else [gradient]
        inputs, kept.groups = self._halves.stage_backward_input(
            [kept.output], gradients, [kept.input], self.module.parameters()
        )
        found = inputs[0]
        assert found is not None
        return found

    def backward_weight(self, microbatch: int) -> None:
        """The half that nobody waits for: the parameters' gradients."""
        kept = self._kept.pop(microbatch)
        if self.is_first:
            torch.autograd.backward(kept.output, kept.gradient)
        else:
            self._halves.stage_backward_weight(self.module.parameters(), kept.groups)

    def _counted(self, seen: dict[int, int]) -> AbstractContextManager[Any]:
        """Notes the size of each piece of memory that autograd keeps, parameters left out."""
        own = {parameter.untyped_storage().data_ptr() for parameter in self.module.parameters()}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
