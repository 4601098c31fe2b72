"""What a model returns: the logits, alone or among other outputs such as those of auxiliary heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

#: Names of the logits in a dictionary or an object: transformers' and most others', and that of torchvision's
#: segmentation models.
_NAMES = ("logits", "out")


class NoLogits(TypeError):
    """None of a model's outputs is known to be the logits; the message says what it returns."""


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returns.

    Args:
        output: A tensor; a tuple or list, whose first tensor is taken; or a dictionary, a named tuple or another object
            with ``logits`` or ``out``, or with a single tensor.

    Raises:
        NoLogits: It is something else.
    """
    return output if isinstance(output, Tensor) else _divide(output)[0]


def auxiliary_logits(output: Any) -> dict[str, Tensor]:
    """Outputs of auxiliary heads by name: those other than the logits that have the same shape."""
    if isinstance(output, Tensor):
        return {}
    logits, others = _divide(output)
    return {name: tensor for name, tensor in others.items() if tensor.shape == logits.shape}


def trained_outputs(output: Any, *, auxiliary: bool) -> Any:
    """What the training loss depends on: the logits, or a dictionary of them and of those of auxiliary heads."""
    return {"logits": logits_of(output), **auxiliary_logits(output)} if auxiliary else logits_of(output)


def other_outputs(output: Any) -> list[str]:
    """Names of the tensors that a model returns besides the logits."""
    return [] if isinstance(output, Tensor) else list(_divide(output)[1])


def _divide(output: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits, and the other tensors by name."""
    tensors = {name: value for name, value in _named(output).items() if isinstance(value, Tensor)}
    has_names = isinstance(output, Mapping) or not isinstance(output, tuple | list)
    chosen = next((name for name in _NAMES if name in tensors), None)
    if chosen is None and tensors and (len(tensors) == 1 or not has_names):
        chosen = next(iter(tensors))
    if chosen is None:
        kind = f"a {type(output).__name__}"
        if isinstance(output, tuple | list):
            raise NoLogits(f"{kind} without a tensor")
        raise NoLogits(f"{kind} with {', '.join(tensors)}, none of them logits" if tensors else kind)
    logits = tensors.pop(chosen)
    return logits, tensors


def _named(output: Any) -> dict[str, Any]:
    if isinstance(output, Mapping):
        return {str(name): value for name, value in output.items()}
    if isinstance(output, tuple | list):
        names = getattr(output, "_fields", None) or range(len(output))
        return {str(name): value for name, value in zip(names, output, strict=True)}
    return dict(getattr(output, "__dict__", {}))
