"""One stage of a pipeline: a part of the model, with its forward and backward passes over microbatches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distrain import torch_internals
from distrain.data.batch import Targets
from distrain.models.outputs import logits_of
from distrain.strategies.pipeline.blocks import HandOver, flatten
from distrain.strategies.precision import Precision
from distrain.tasks.base import Task
from distrain.tasks.training_loss import training_loss


@dataclass
class _SavedMicrobatch:
    """What a stage saves of a microbatch from its forward to its backward pass.

    Attributes:
        inputs: Inputs of the stage whose gradients the previous stage needs.
        roots: Tensors from which the backward pass starts; none if there is nothing to train up to here.
        parameter_groups: Of a split backward pass: what its second half needs.
        output_gradients: Of a split backward pass: the gradients of the roots.
        activation_bytes: Size of what autograd saves, if it is measured.
    """

    inputs: list[Tensor]
    roots: list[Tensor]
    parameter_groups: list[dict[str, Any]] = field(default_factory=list)
    output_gradients: list[Tensor] | None = None
    activation_bytes: int = 0


class Stage:
    """A part of the model on one rank.

    Args:
        index: Position in the pipeline.
        module: The part.
        is_last: Whether it ends in the loss.
        task: Computes the loss of the last stage's outputs.
        precision: Of forward and backward passes.
        input: What the previous stage hands over; ``None`` for the first stage.
        changes_input: Whether the part may write into its input.
        splits_backward: Whether backward passes come in two halves.
        auxiliary_weight: Weight of the loss of each auxiliary head of the model.

    Attributes:
        before_pass: Called before each forward pass, which needs the part's parameters.
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
        input: HandOver | None,
        *,
        changes_input: bool,
        splits_backward: bool,
        auxiliary_weight: float = 0.0,
    ) -> None:
        self.index = index
        self.module = module
        self.is_first = input is None
        self._input = input
        self._changes_input = changes_input
        self.is_last = is_last
        self.splits_backward = splits_backward
        if splits_backward:
            self._split_backward = torch_internals.split_backward()
        self._task = task
        self._precision = precision
        self._auxiliary_weight = auxiliary_weight
        self._saved: dict[int, _SavedMicrobatch] = {}
        self.before_pass: Callable[[], None] = lambda: None
        self.measures_memory = True
        self.peak_activation_bytes = 0

    def forward(
        self, microbatch: int, inputs: Sequence[Tensor], targets: Targets, global_count: int
    ) -> tuple[list[Tensor], Tensor]:
        """Runs the forward pass and saves what the backward pass needs.

        Args:
            microbatch: Index of the microbatch.
            inputs: The tensors that the stage gets, each ``[N, …]``.
            targets: Of the microbatch's samples.
            global_count: What the sum of losses is divided by.

        Returns:
            The tensors of the output (of the last stage, the logits), and the sum of the losses, which is 0 except on
            the last stage.
        """
        self.before_pass()
        leaves = []
        if self._input is not None:
            pairs = zip(inputs, self._input.tensors, strict=True)
            inputs = [tensor.detach().requires_grad_(spec.requires_grad) for tensor, spec in pairs]
            leaves = [tensor for tensor in inputs if tensor.requires_grad]
        storage_bytes: dict[int, int] = {}
        hooks = self._record_saved_storages(storage_bytes) if self.measures_memory else nullcontext()
        with hooks, self._precision.autocast():
            value = self._run(inputs)
            if self.is_last:
                logits, loss_sum, _ = training_loss(self._task, value, targets, self._auxiliary_weight)
                outputs = [logits]
            else:
                outputs = flatten(value)
                loss_sum = outputs[0].new_zeros(())
        roots = [self._precision.scale(loss_sum / global_count)] if self.is_last else outputs
        roots = [root for root in roots if root.requires_grad]
        self._saved[microbatch] = _SavedMicrobatch(leaves, roots, activation_bytes=sum(storage_bytes.values()))
        held_bytes = sum(saved.activation_bytes for saved in self._saved.values())
        self.peak_activation_bytes = max(self.peak_activation_bytes, held_bytes)
        return [output.detach() for output in outputs], loss_sum.detach()

    def expect(self, input: HandOver | None) -> None:
        """Says what the previous stage hands over from now on: other tensors may need a gradient."""
        self._input = input

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Runs the part on the tensors that the previous stage hands over.

        Returns:
            The output's tensors; of the last stage, the logits.
        """
        self.before_pass()
        value = self._run(inputs)
        return [logits_of(value)] if self.is_last else flatten(value)

    def _run(self, inputs: Sequence[Tensor]) -> Any:
        if self._input is None:
            # Microbatches are parts of one batch. Autograd would take a change of one, in place, for a change of all of
            # them; `data` is the same memory, but its changes are counted by themselves.
            return self.module(inputs[0].data)
        # Autograd forbids writing into a leaf, and a stage of the same rank may still need what it handed over.
        given = [tensor.clone() for tensor in inputs] if self._changes_input else inputs
        return self.module(self._input.unflatten(given))

    def backward(self, microbatch: int, output_gradients: list[Tensor] | None) -> list[Tensor]:
        """Runs the whole backward pass.

        Args:
            microbatch: Index of the microbatch.
            output_gradients: Of the output's tensors that need one; ``None`` on the last stage.

        Returns:
            Gradients of the inputs that need one.
        """
        saved = self._saved.pop(microbatch)
        if saved.roots:
            torch.autograd.backward(saved.roots, output_gradients)
        return [_gradient(tensor) for tensor in saved.inputs]

    def backward_input(self, microbatch: int, output_gradients: list[Tensor] | None) -> list[Tensor]:
        """Computes the gradients of the stage's inputs, which the previous stage waits for.

        A stage whose inputs need none runs its whole backward pass in :meth:`backward_weight`.
        """
        saved = self._saved[microbatch]
        saved.output_gradients = output_gradients
        if not saved.inputs or not saved.roots:
            return [_gradient(tensor) for tensor in saved.inputs]
        root, gradients = _one_root(saved.roots, output_gradients)
        saved.roots = [root]
        input_gradients, saved.parameter_groups = self._split_backward.stage_backward_input(
            saved.roots, gradients, saved.inputs, self._trained()
        )
        pairs = zip(saved.inputs, input_gradients, strict=True)
        return [torch.zeros_like(tensor) if gradient is None else gradient for tensor, gradient in pairs]

    def backward_weight(self, microbatch: int) -> None:
        """Computes the gradients of the parameters, which no other stage waits for."""
        saved = self._saved.pop(microbatch)
        if not saved.roots:
            return
        if saved.inputs:
            for parameter in self._trained():
                # Torch would take what it computes as the first gradient, which two parameters may share memory of,
                # and add to it in place.
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            self._split_backward.stage_backward_weight(self._trained(), saved.parameter_groups)
        else:
            torch.autograd.backward(saved.roots, saved.output_gradients)

    def _trained(self) -> Iterator[nn.Parameter]:
        return (parameter for parameter in self.module.parameters() if parameter.requires_grad)

    def _record_saved_storages(self, storage_bytes: dict[int, int]) -> AbstractContextManager[Any]:
        """Records the size of each storage that autograd saves, by address; those of parameters are left out."""
        parameters = {parameter.untyped_storage().data_ptr() for parameter in self.module.parameters()}

        def record(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                storage_bytes[storage.data_ptr()] = storage.nbytes()
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor)


def _one_root(roots: Sequence[Tensor], gradients: Sequence[Tensor] | None) -> tuple[Tensor, list[Tensor] | None]:
    """A tensor that all roots of a backward pass lead to, and its gradient; it is no view, and may be detached.

    With several roots, torch's split backward pass misses the parameters that one of them depends on without depending
    on the inputs.
    """
    if len(roots) > 1:
        assert gradients is not None, "the loss is a single root"
        return torch.cat([root.flatten() for root in roots]), [torch.cat([each.flatten() for each in gradients])]
    (root,) = roots
    is_own = not torch_internals.is_view(root) and not root.is_leaf
    return root if is_own else root.clone(), None if gradients is None else list(gradients)


def _gradient(tensor: Tensor) -> Tensor:
    """The gradient of an input; zeros if the output does not depend on it."""
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
