"""Passes of models on torch's meta device without what makes them slow.

Of some operations, torch finds the shapes of results there by code of its compiler. For BatchNorm layers that takes
nine tenths of a pass of ResNet-50. For random numbers it imports the compiler, which takes a second.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from distrain.torch_internals import DispatchMode

#: What fills a tensor with random numbers.
_DRAWS = frozenset((Tensor.normal_, Tensor.uniform_))
_BATCHNORM = torch.ops.aten.native_batch_norm.default
_BATCHNORM_BACKWARD = torch.ops.aten.native_batch_norm_backward.default


@contextlib.contextmanager
def fast_meta_passes() -> Iterator[None]:
    """Makes models and their passes on the meta device fast inside this block; other devices are as always."""
    with _NoDraws(), _BatchNormShapes():
        yield


class _NoDraws(TorchFunctionMode):
    """Leaves out random values of tensors that have none."""

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DRAWS and args and args[0].device.type == "meta":
            return args[0]
        return func(*args, **(kwargs or {}))


class _BatchNormShapes(DispatchMode):
    """Makes the results of BatchNorm layers without asking torch for their shapes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch instead of each operation."""
        if not kwargs and func is _BATCHNORM and args[0].is_meta:
            return _batchnorm(*args)
        if not kwargs and func is _BATCHNORM_BACKWARD and args[0].is_meta:
            return _batchnorm_backward(*args)
        return func(*args, **(kwargs or {}))


def _batchnorm(inputs: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs, and the means and standard deviations ``[C]`` that the backward pass needs."""
    halves = (torch.float16, torch.bfloat16)
    dtype = torch.float32 if inputs.dtype in halves else inputs.dtype
    mean, deviation = (inputs.new_empty(inputs.shape[1], dtype=dtype) for _ in range(2))
    return torch.empty_like(inputs), mean, deviation


def _batchnorm_backward(
    gradient: Tensor, inputs: Tensor, weight: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of the inputs, and of weight and bias ``[C]`` as far as they are asked for."""
    wanted: Sequence[bool] = others[-1]
    dtype = inputs.dtype if weight is None else weight.dtype
    of_weight, of_bias = (inputs.new_empty(inputs.shape[1], dtype=dtype) if each else None for each in wanted[1:])
    return torch.empty_like(inputs), of_weight, of_bias
