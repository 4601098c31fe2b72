"""Experiments on single modules and on the loss, with the inputs that they had in the step where runs part."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distrain.data.batch import Batch, Targets, slice_targets
from distrain.runtime.device import RandomState
from distrain.strategies.base import StepResult
from distrain.strategies.pipeline.calls import map_leaves, tensors_of
from distrain.strategies.precision import Precision
from distrain.training.trainer import Trainer
from distrain.verification.recorder import replace_method
from distrain.verification.trace import samples_of

#: Differences above this, relative to the largest number, are no rounding: those of float64, and of shorter formats.
_NO_ROUNDING = {torch.float64: 1e-9}
_NO_ROUNDING_ELSE = 1e-2


@dataclass
class ModuleFindings:
    """What experiments say of a module.

    Attributes:
        name: Of the module.
        kind: Its class.
        draws: It draws random numbers.
        repeats: It gives the same again for the same inputs and random numbers.
        mixes: A sample's output depends on the samples beside it, or on their number.
        buffers: Names of buffers that a forward pass in training mode changes.
        backward_depends: A sample's gradient depends on the samples beside it, or on their number.
    """

    name: str
    kind: str
    draws: bool = False
    repeats: bool = True
    mixes: bool = False
    buffers: list[str] = field(default_factory=list)
    backward_depends: bool = False


@dataclass
class LossFindings:
    """What experiments say of the loss.

    Attributes:
        additive: The loss of a batch is the sum of those of its samples, and so is its gradient.
        is_mean: It is their mean instead.
    """

    additive: bool = True
    is_mean: bool = False


class Probe:
    """Keeps the inputs of modules and of the loss in one step of the serial run.

    Args:
        trainer: Of the serial run, before its first step.
        step: The step.
        names: Modules whose inputs are kept.
    """

    def __init__(self, trainer: Trainer, step: int, names: Sequence[str]) -> None:
        self._trainer, self._step = trainer, step
        self._active, self._root = False, trainer.strategy.own_modules()[0]
        self._copy: nn.Module | None = None
        self._inputs: dict[str, tuple[Any, Any, RandomState]] = {}
        self._loss: tuple[Tensor, Targets] | None = None
        self._losses = trainer.task.loss
        self._precision = Precision(trainer.config.trainer.precision, trainer.runtime.device)
        self._train_step = trainer.strategy.train_step
        replace_method(trainer.strategy, "train_step", self._probed_step)
        replace_method(trainer.task, "loss", self._probed_loss)
        modules = dict(self._root.named_modules())
        for name in names:
            if name in modules:
                modules[name].register_forward_pre_hook(self._keeper(name), with_kwargs=True)

    def _probed_step(self, batch: Batch) -> StepResult:
        self._active = self._trainer.progress.step + 1 == self._step
        if self._active:
            # As it is before the step; hooks go with it, and do nothing there.
            self._copy = copy.deepcopy(self._root)
        try:
            return self._train_step(batch)
        finally:
            self._active = False

    def _probed_loss(self, outputs: Tensor, targets: Targets) -> tuple[Tensor, int]:
        if self._active and self._loss is None:
            self._loss = outputs.detach().clone(), targets
        return self._losses(outputs, targets)

    def _keeper(self, name: str) -> Callable[..., None]:
        # A function of its own, not a method: a copy of the model would copy the object of a method.
        def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self._active and name not in self._inputs:
                kept = map_leaves(args, lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf)
                self._inputs[name] = kept, kwargs, RandomState.now()

        return keep

    # --- experiments -------------------------------------------------------------------------------------------------

    def examine(self, name: str) -> ModuleFindings | None:
        """Experiments on a module; ``None`` if the step didn't run it."""
        if name not in self._inputs or self._copy is None:
            return None
        with self._precision.autocast():
            return self._examine(name)

    def _examine(self, name: str) -> ModuleFindings:
        assert self._copy is not None, "the step was taken"
        module = self._copy.get_submodule(name) if name else self._copy
        args, kwargs, random_state = self._inputs[name]
        findings = ModuleFindings(name, type(module).__name__)
        count = samples_of((args, kwargs))
        whole = _Run(module, args, kwargs, random_state)
        findings.draws, findings.buffers = whole.drew, whole.buffers
        findings.repeats = _equal(whole.outputs, _Run(module, args, kwargs, random_state).outputs)
        if count < 2 or not findings.repeats:
            return findings
        # Shares of different sizes: what divides by a size shows.
        cut = max(count // 3, 1)
        parts = []
        for start, stop in ((0, cut), (cut, count)):
            own_args, own_kwargs = _rows((args, kwargs), count, start, stop)
            parts.append(_Run(module, own_args, own_kwargs, random_state))
        joined = [torch.cat(pair) for pair in zip(*(part.outputs for part in parts), strict=True)]
        findings.mixes = not findings.draws and not _equal(whole.outputs, joined)
        if findings.mixes or findings.draws:
            return findings
        for_whole = whole.gradients([_cotangent(output) for output in whole.outputs])
        for_parts = [
            part.gradients([_cotangent(output)[start:stop] for output in whole.outputs])
            for part, (start, stop) in zip(parts, ((0, cut), (cut, count)), strict=True)
        ]
        inputs = [torch.cat(pair) for pair in zip(*(part[0] for part in for_parts), strict=True)]
        parameters = [first + second for first, second in zip(*(part[1] for part in for_parts), strict=True)]
        findings.backward_depends = not (_equal(for_whole[0], inputs) and _equal(for_whole[1], parameters))
        return findings

    def examine_loss(self) -> LossFindings:
        """Experiments on the loss."""
        if self._loss is None or len(self._loss[0]) < 2:
            return LossFindings()
        with self._precision.autocast():
            return self._examine_loss(*self._loss)

    def _examine_loss(self, outputs: Tensor, targets: Targets) -> LossFindings:
        whole, gradient = self._loss_of(outputs, targets)
        single = [
            self._loss_of(outputs[index : index + 1], slice_targets(targets, index, index + 1))
            for index in range(len(outputs))
        ]
        total, gradients = sum(value for value, _ in single), torch.cat([each for _, each in single])
        additive = _close(whole, total, outputs.dtype) and _equal([gradient], [gradients])
        return LossFindings(additive, not additive and _close(whole * len(outputs), total, outputs.dtype))

    def _loss_of(self, outputs: Tensor, targets: Targets) -> tuple[float, Tensor]:
        outputs = outputs.detach().clone().requires_grad_()
        with torch.enable_grad():
            loss, _ = self._losses(outputs, targets)
        (gradient,) = torch.autograd.grad(loss, [outputs])
        return float(loss.detach()), gradient


class _Run:
    """One forward pass of a copy of a module."""

    def __init__(self, module: nn.Module, args: Any, kwargs: Any, random_state: RandomState) -> None:
        self._module = copy.deepcopy(module)
        self._args = map_leaves(args, _fresh)
        before = {name: buffer.clone() for name, buffer in self._module.named_buffers()}
        now = RandomState.now()
        random_state.restore()
        try:
            with torch.enable_grad():
                self._results = [
                    each for each in tensors_of(self._module(*self._args, **kwargs)) if each.is_floating_point()
                ]
            self.drew = not RandomState.now().draws_equal(random_state)
        finally:
            now.restore()
        after = dict(self._module.named_buffers())
        self.buffers = [name for name, value in before.items() if not torch.equal(value, after[name])]
        self.outputs = [each.detach() for each in self._results]

    def gradients(self, cotangents: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of inputs and of parameters, for gradients of the outputs."""
        pairs = [
            (result, cotangent)
            for result, cotangent in zip(self._results, cotangents, strict=True)
            if result.requires_grad
        ]
        inputs = [leaf for leaf in tensors_of(self._args) if leaf.requires_grad]
        parameters = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
        if not pairs or not (inputs or parameters):
            return [], []
        found = torch.autograd.grad(
            [result for result, _ in pairs],
            [*inputs, *parameters],
            [cotangent for _, cotangent in pairs],
            allow_unused=True,
            materialize_grads=True,
        )
        return list(found[: len(inputs)]), list(found[len(inputs) :])


def _fresh(leaf: Any) -> Any:
    return leaf.clone().requires_grad_(leaf.is_floating_point()) if isinstance(leaf, Tensor) else leaf


def _rows(tree: Any, count: int, start: int, stop: int) -> Any:
    def rows(leaf: Any) -> Any:
        return leaf[start:stop] if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == count else leaf

    return map_leaves(tree, rows)


def _cotangent(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(output.numel())
    return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.device, output.dtype)


def _equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether tensors differ by rounding at most."""
    for mine, theirs in zip(first, second, strict=True):
        if mine.shape != theirs.shape:
            return False
        scale = max(float(mine.abs().max()), float(theirs.abs().max())) if mine.numel() else 0.0
        limit = _NO_ROUNDING.get(mine.dtype, _NO_ROUNDING_ELSE)
        if scale and not float((mine - theirs).abs().max()) <= limit * scale:
            return False
    return True


def _close(first: float, second: float, dtype: torch.dtype) -> bool:
    return abs(first - second) <= _NO_ROUNDING.get(dtype, _NO_ROUNDING_ELSE) * max(abs(first), abs(second), 1e-12)
