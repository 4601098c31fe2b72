"""Whether a divided model computes what it computed before."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distrain.communication.collectives import Communicator
from distrain.runtime.device import RandomState, float64_device, seed_everything
from distrain.strategies.buffer_snapshot import BufferSnapshot
from distrain.strategies.tensor_parallel.agreement import Apart, WatchedRun
from distrain.strategies.tensor_parallel.layer_group import LayerGroup
from distrain.torch_internals import BatchNorm

#: Samples to run.
SAMPLES = 4
#: The largest difference, relative to the largest number, that may be rounding.
_ROUNDING = 5e-3
#: The same of a gradient's norm, relative to itself, and to the largest one: a gradient may be nothing but rounding.
_ROUNDING_OF_NORM, _ROUNDING_OF_NORMS = 5e-2, 1e-3


class _Results(NamedTuple):
    """What a model computes.

    Attributes:
        outputs: The tensors that matter, in training and in evaluation mode.
        squares: Of each trained parameter the sum of the squared elements of its gradient, by name.
    """

    outputs: list[list[Tensor]]
    squares: dict[str, float]


class Trial:
    """The outputs of a model in training and in evaluation mode, and its gradients; the model stays as it is.

    In training mode BatchNorm uses its running statistics: those of a few samples would enlarge rounding.

    Args:
        model: The model, or a part of it, before it is divided.
        run: Runs it on a few samples, always the same ones, and returns the tensors that matter.
    """

    def __init__(self, model: nn.Module, run: Callable[[nn.Module], Sequence[Tensor]]) -> None:
        self._run_once = run
        self._before = self._run(model)

    def difference(self, model: nn.Module, divided: Collection[str], group: LayerGroup, device: torch.device) -> str:
        """What the divided model does differently; empty if nothing. All ranks call it together.

        Args:
            model: The divided model.
            divided: Names of the parameters of which this rank has a part.
            group: The ranks.
            device: On which they communicate.
        """
        try:
            with group.watched(WatchedRun(group.communicator, device)) as watched:
                after = watched.run(lambda: self._run(model))
        except Apart as problem:
            return f"the divided model fails {problem}"
        # Before anything is returned: results that are not whole may differ on one rank only.
        squares = _summed(after.squares, divided, group.communicator, device)
        for mode, own, other in zip(("training", "evaluation"), self._before.outputs, after.outputs, strict=True):
            if len(own) != len(other) or not all(map(_nearly_equal, own, other)):
                return f"the divided model gives other outputs in {mode}"
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
                        outputs = self._run_once(model)
                    if mode:
                        results.squares.update(_squared_gradients(model, outputs))
                    results.outputs.append([tensor.detach().clone() for tensor in outputs])
        finally:
            buffers.restore()
            random_state.restore()
        return results


def _summed(
    squares: Mapping[str, float], divided: Collection[str], group: Communicator, device: torch.device
) -> dict[str, float]:
    """The same of whole parameters, from those of the parts of which ranks have one each."""
    parts = {name: square for name, square in squares.items() if name in divided}
    if not parts:
        return dict(squares)
    sums = torch.tensor(list(parts.values()), dtype=torch.float64, device=float64_device(device))
    return {**squares, **dict(zip(parts, group.all_reduce(sums).tolist(), strict=True))}


def _nearly_equal(before: Tensor, after: Tensor) -> bool:
    if before.shape != after.shape or not before.is_floating_point():
        return torch.equal(before, after)
    scale = float(before.abs().max()) if before.numel() else 0.0
    return torch.allclose(before, after, rtol=0, atol=_ROUNDING * scale, equal_nan=True)


def _squared_gradients(model: nn.Module, outputs: Sequence[Tensor]) -> dict[str, float]:
    """For a sum of the outputs that are weighted differently, or their gradients might cancel each other."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    roots = [tensor for tensor in outputs if tensor.requires_grad]
    if not (trained and roots):
        return {}
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(root.shape, generator=generator).to(root) for root in roots]
    found: tuple[Tensor | None, ...] = torch.autograd.grad(roots, list(trained.values()), weights, allow_unused=True)
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
