"""Whether a divided model computes what it computed before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from distrain.runtime.device import RandomState, seed_everything
from distrain.strategies.buffer_snapshot import BufferSnapshot
from distrain.torch_internals import BatchNorm

#: Samples to run.
SAMPLES = 4
#: The largest difference, relative to the largest number, that may be rounding.
_ROUNDING = 5e-3


class Trial:
    """The outputs of a model in training and in evaluation mode; the model stays as it is.

    In training mode BatchNorm uses its running statistics: those of a few samples would enlarge rounding.

    Args:
        model: The model, or a part of it, before it is divided.
        run: Runs it on a few samples, always the same ones, and returns the tensors that matter.
    """

    def __init__(self, model: nn.Module, run: Callable[[nn.Module], Sequence[Tensor]]) -> None:
        self._run_once = run
        self._outputs = self._run(model)

    def difference(self, model: nn.Module) -> str:
        """What the divided model does differently; empty if nothing. All ranks call it together."""
        try:
            outputs = self._run(model)
        except Exception as error:  # a user's forward may raise anything
            return f"the divided model fails ({type(error).__name__}: {error})"
        for mode, before, after in zip(("training", "evaluation"), self._outputs, outputs, strict=True):
            if len(before) != len(after) or not all(map(_nearly_equal, before, after)):
                return f"the divided model gives other outputs in {mode}"
        return ""

    @torch.no_grad()
    def _run(self, model: nn.Module) -> list[list[Tensor]]:
        outputs, random_state, buffers = [], RandomState.now(), BufferSnapshot([model])
        buffers.take()
        with _modes(model):
            for mode in (True, False):
                model.train(mode)
                for module in model.modules():
                    if isinstance(module, BatchNorm):
                        module.training = False
                seed_everything(0)
                outputs.append([tensor.detach().clone() for tensor in self._run_once(model)])
        buffers.restore()
        random_state.restore()
        return outputs


def _nearly_equal(before: Tensor, after: Tensor) -> bool:
    if before.shape != after.shape or not before.is_floating_point():
        return torch.equal(before, after)
    scale = float(before.abs().max()) if before.numel() else 0.0
    return torch.allclose(before, after, rtol=0, atol=_ROUNDING * scale, equal_nan=True)


@contextlib.contextmanager
def _modes(model: nn.Module) -> Iterator[None]:
    """Afterwards each module has the mode that it has now."""
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode
