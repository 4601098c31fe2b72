"""Whether a divided model computes what it computed before."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distrain.models.outputs import logits_of
from distrain.runtime.device import RandomState, float64_device, seed_everything
from distrain.strategies.buffer_snapshot import BufferSnapshot
from distrain.strategies.pipeline.traced_model import images_like
from distrain.strategies.tensor_parallel.agreement import Apart, WatchedRun
from distrain.strategies.tensor_parallel.layer_group import LayerGroup
from distrain.torch_internals import BatchNorm

#: Samples that are run, and the largest difference, relative to the largest number, that may be rounding.
_SAMPLES, _ROUNDING = 4, 5e-3
#: The same of a gradient's norm, relative to itself, and to the largest one: a gradient may be nothing but rounding.
_ROUNDING_OF_NORM, _ROUNDING_OF_NORMS = 5e-2, 1e-3


class _Results(NamedTuple):
    """What a model computes.

    Attributes:
        outputs: In training and in evaluation mode.
        squares: Of each trained parameter the sum of the squared elements of its gradient, by name.
    """

    outputs: list[Tensor]
    squares: dict[str, float]


class Trial:
    """The outputs of a model in training and in evaluation mode, and its gradients; the model stays as it is.

    In training mode BatchNorm uses its running statistics: those of a few samples would enlarge rounding.

    Args:
        model: The model before it is divided.
        example: Inputs ``[N, …]``.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self._images = images_like(example, _SAMPLES)
        self._before = self._run(model)

    def difference(self, model: nn.Module, divided: Collection[str], group: LayerGroup) -> str:
        """What the divided model does differently; empty if nothing. All ranks call it together.

        Args:
            model: The divided model.
            divided: Names of the parameters of which this rank has a part.
            group: The ranks.
        """
        device = self._images.device
        try:
            with group.watched(WatchedRun(group.communicator, device)) as watched:
                after = watched.run(lambda: self._run(model))
        except Apart as problem:
            return f"the divided model fails {problem}"
        for mode, own, other in zip(("training", "evaluation"), self._before.outputs, after.outputs, strict=True):
            scale = float(own.abs().max()) if own.numel() else 0.0
            same = own.shape == other.shape and torch.allclose(
                own, other, rtol=0, atol=_ROUNDING * scale, equal_nan=True
            )
            if not same:
                return f"the divided model gives other outputs in {mode}"
        parts = [name for name in after.squares if name in divided]
        sums = torch.tensor([after.squares[name] for name in parts], dtype=torch.float64, device=float64_device(device))
        squares = {**after.squares, **dict(zip(parts, group.communicator.all_reduce(sums).tolist(), strict=True))}
        return self._difference_of_gradients(squares)

    def _difference_of_gradients(self, squares: dict[str, float]) -> str:
        norms = {name: math.sqrt(square) for name, square in self._before.squares.items()}
        largest = max(norms.values(), default=0.0)
        for name, norm in norms.items():
            difference = abs(math.sqrt(squares[name]) - norm)
            if difference > _ROUNDING_OF_NORM * norm + _ROUNDING_OF_NORMS * largest:
                return f"the divided model gives another gradient of {name}"
        return ""

    def _run(self, model: nn.Module) -> _Results:
        random_state, buffers = RandomState.now(), BufferSnapshot([model])
        buffers.take()
        results = _Results([], {})
        try:
            with _modes(model):
                for mode in (True, False):
                    model.train(mode)
                    for module in model.modules():
                        if isinstance(module, BatchNorm):
                            module.training = False
                    seed_everything(0)
                    with torch.set_grad_enabled(mode):
                        outputs = logits_of(model(self._images))
                    if mode:
                        results.squares.update(_squared_gradients(model, outputs))
                    results.outputs.append(outputs.detach().clone())
        finally:
            buffers.restore()
            random_state.restore()
        return results


def _squared_gradients(model: nn.Module, outputs: Tensor) -> dict[str, float]:
    """For a sum of the outputs that are weighted differently, or their gradients might cancel each other."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not (trained and outputs.requires_grad):
        return {}
    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0)).to(outputs)
    found: tuple[Tensor | None, ...] = torch.autograd.grad(
        (outputs * weights).sum(), list(trained.values()), allow_unused=True
    )
    return {
        name: 0.0 if gradient is None else float(torch.linalg.vector_norm(gradient.abs().float())) ** 2
        for name, gradient in zip(trained, found, strict=True)
    }


@contextlib.contextmanager
def _modes(model: nn.Module) -> Iterator[None]:
    """Afterwards each module has the mode that it has now."""
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode
