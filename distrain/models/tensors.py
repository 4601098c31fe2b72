"""Memory layout and number formats of a model's parameters and buffers, as training needs them.

Fused optimizers and flat gradient buckets read a tensor as one dense block of memory. So a parameter with gaps is moved
to a block of its own, and tensors that share memory in any other way than as the same object are refused.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from distrain import torch_internals
from distrain.checkpoint.saved_tensors import is_dense
from distrain.errors import ConfigError

#: The complex format with the precision of each floating-point format that a run may have.
_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, each once, by name."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def parameter_bytes(model: nn.Module) -> int:
    """Size of a model's parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def lay_out_densely(target: str, model: nn.Module) -> None:
    """Gives parameters and buffers that have gaps in memory a dense layout, in place, and refuses what can't have one.

    Args:
        target: How the configuration names the model.
        model: May be on the meta device.

    Raises:
        ConfigError: A tensor is lazy, no ordinary dense tensor or complex and trained, its elements share memory, or it
            shares memory with another one.
    """
    by_storage: dict[int, list[tuple[str, Tensor]]] = defaultdict(list)
    for name, tensor in named_tensors(model):
        if problem := _why_untrainable(tensor):
            raise ConfigError("model._target_", target, f"{name} {problem}")
        by_storage[torch_internals.storage_id(tensor)].append((name, tensor))
    for sharing in by_storage.values():
        if len(sharing) > 1 or not _is_dense(sharing[0][1]):
            _refuse_overlaps(target, sharing)
    for _, tensor in named_tensors(model):
        if not _is_dense(tensor) or tensor.is_conj() or tensor.is_neg():
            # The tensor stays the same object: it may be tied, or be known elsewhere in the model.
            tensor.data = tensor.data.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)


def _why_untrainable(tensor: Tensor) -> str:
    if is_lazy(tensor):
        return "is lazy, and has no values before a forward pass; give every layer its input size"
    if tensor.layout is not torch.strided or tensor.is_quantized:
        kind = "quantized" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
        return f"is a {kind} tensor; make it an ordinary one, for example by to_dense() or dequantize()"
    if type(tensor.data) is not Tensor:
        return f"is a {type(tensor.data).__name__}; make it an ordinary torch.Tensor"
    if tensor.is_complex() and tensor.requires_grad:
        return (
            f"is a complex parameter ({_short(tensor.dtype)}), which is not trained; make torch.view_as_real(…) of it "
            "the parameter, and use torch.view_as_complex(…) of that in forward"
        )
    return ""


def _is_dense(tensor: Tensor) -> bool:
    return is_dense(tensor.shape, tensor.stride())


def _refuse_overlaps(target: str, sharing: list[tuple[str, Tensor]]) -> None:
    """Refuses tensors of one storage if an element of it is used twice."""
    # Bytes, since tensors of different formats may share memory.
    used = torch.zeros(sharing[0][1].untyped_storage().nbytes(), dtype=torch.bool, device="cpu")
    owners: list[str] = []
    for name, tensor in sharing:
        width = tensor.element_size()
        strides = [stride * width for stride in tensor.stride()]
        mine = used.as_strided([*tensor.shape, width], [*strides, 1], tensor.storage_offset() * width)
        if mine.any():
            problem = f"{name} shares memory with {' or '.join(owners)}, so that training one would change the other"
            way_out = "use the same nn.Parameter in both places to tie them, or make one a copy by .clone()"
            raise ConfigError("model._target_", target, f"{problem}; {way_out}")
        before = int(used.sum())
        mine.fill_(True)
        if int(used.sum()) - before != math.prod(tensor.shape) * width:
            problem = f"elements of {name} are one and the same in memory, as after expand()"
            raise ConfigError("model._target_", target, f"{problem}; make it a copy by .clone()")
        owners.append(name)


# --- number formats --------------------------------------------------------------------------------------------------


def convert(model: nn.Module, dtype: torch.dtype, device: torch.device | None = None) -> nn.Module:
    """Moves a model to a device and a floating-point format, in place.

    ``nn.Module.to`` would make complex tensors real. Here they become complex numbers of that format. Whole numbers
    and truth values stay what they are.

    Args:
        model: Returned again.
        dtype: ``torch.float32`` or ``torch.float64``.
        device: Where to; ``None``: the tensors stay where they are.
    """

    def converted(tensor: Tensor) -> Tensor:
        # The format first: a device may lack the one that the tensor has.
        if tensor.is_complex():
            tensor = tensor.to(_COMPLEX[dtype])
        elif tensor.is_floating_point():
            tensor = tensor.to(dtype)
        return tensor.to(device)

    torch_internals.apply_to_tensors(model, converted)
    return model


def cast_tensors(model: nn.Module, dtype: torch.dtype) -> dict[str, list[str]]:
    """Names of the parameters and buffers that :func:`convert` would give another format, by their present format."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, tensor in named_tensors(model):
        expected = _COMPLEX[dtype] if tensor.is_complex() else dtype
        if (tensor.is_complex() or tensor.is_floating_point()) and tensor.dtype != expected:
            found[_short(tensor.dtype)].append(name)
    return found


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
