"""A model's forward pass recorded as a program, which needs Python's interpreter at its beginning and its end only.

Threads of Python take turns with the interpreter. A model's own forward pass waits for it at each operation, as long as
another thread is busy; a program doesn't.
"""

from __future__ import annotations

import logging
import warnings

import torch
from torch import Tensor, nn
from typing_extensions import override

from distrain.models.outputs import logits_of

log = logging.getLogger(__name__)

#: A program is compared with its model on batches of so many samples.
_SIZES = (1, 3)


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        return logits_of(self.model(inputs))


@torch.no_grad()
def record(model: nn.Module, example: Tensor) -> nn.Module:
    """A program that computes a model's logits; the model itself if a program would not be sure to.

    That is so where the forward pass can't be recorded, depends on values or on the number of samples, or draws random
    numbers.

    Args:
        model: In evaluation mode.
        example: Inputs ``[2, …]`` like those that it will get.
    """
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            traced = torch.jit.trace(_Logits(model).eval(), example, check_trace=False)
            # Without changes of the numbers, such as merging BatchNorm into convolutions.
            program: nn.Module = torch.jit.freeze(traced, optimize_numerics=False)
        problem = next((str(each.message) for each in caught if each.category.__name__ == "TracerWarning"), "")
        if not problem and not all(_agree(model, program, example, size) for size in _SIZES):
            problem = "it computes something else"
    except Exception as error:  # whatever a model's forward pass does that can't be recorded
        problem = f"{type(error).__name__}: {error}"
    if problem:
        log.info("the model runs operation by operation, since it can't be recorded: %s", problem.partition("\n")[0])
        return model
    return program


def _agree(model: nn.Module, program: nn.Module, example: Tensor, size: int) -> bool:
    generator = torch.Generator().manual_seed(size)
    inputs = torch.randn((size, *example.shape[1:]), generator=generator).to(example)
    inputs = inputs.contiguous(memory_format=_format(example))
    expected, found = logits_of(model(inputs.clone())), program(inputs.clone())
    return expected.shape == found.shape and torch.allclose(expected, found, rtol=1e-5, atol=1e-6, equal_nan=True)


def _format(example: Tensor) -> torch.memory_format:
    is_last = example.dim() == 4 and not example.is_contiguous()
    return torch.channels_last if is_last else torch.contiguous_format
