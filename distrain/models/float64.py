"""Finds float64 in a model's forward pass, for devices that have none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from distrain.errors import ConfigError

_DOUBLE = (torch.float64, torch.complex128)


def refuse_float64(target: str, model: nn.Module, images: Tensor) -> None:
    """Refuses a model that makes float64 tensors of its inputs or parameters, by running it.

    What it computes of numbers that are float64 from their beginning is left alone: that may well be on the CPU.

    Args:
        target: How the configuration names the model.
        model: In float32; it may be on the meta device.
        images: Images that it can run.

    Raises:
        ConfigError: The message names the function that makes the first such tensor.
    """
    watch = _Watch()
    with torch.no_grad(), watch:
        model(images)
    if watch.found:
        problem = f"makes a float64 tensor in its forward pass ({watch.found}), and an Apple GPU has no float64"
        raise ConfigError("model._target_", target, f"{problem}; compute in float32, or use runtime.device=cpu")


class _Watch(TorchFunctionMode):
    """Remembers the first function that gives float64 for tensors of another floating-point format."""

    def __init__(self) -> None:
        super().__init__()
        self.found = ""

    @override
    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.found and isinstance(result, Tensor) and result.dtype in _DOUBLE:
            given = (each for each in args if isinstance(each, Tensor) and each.dim())
            if any((each.is_floating_point() or each.is_complex()) and each.dtype not in _DOUBLE for each in given):
                self.found = getattr(func, "__name__", str(func))
        return result
