"""A stand-in for an Apple GPU, for machines without one.

Tensors of the fake device are CPU tensors whose memory is marked. While the fake is active, torch says of them that
their device is ``mps``; what is computed from them is marked too. As on an Apple GPU, it is an error to make a float64
tensor there, to compute with tensors of both devices, or to look at its memory from NumPy.

What this shows: which tensors distrain puts on the device, of which types, and where it copies them. What it can't
show: that torch's kernels for Apple's GPUs compute the right numbers, or exist at all.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MPS = torch.device("mps")
_NO_DOUBLE = "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
#: Outside of autograd an operation is seen before it is taken apart.
_CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.conv2d.default)
_MISSING = (torch.float64, torch.complex128)


class FakeMps:
    """The device: which memory is its own.

    Attributes:
        calls: How often each function of ``torch.mps`` was called.
        operations: How often each operation made a tensor there.
        layouts: Memory layouts of the images and weights of convolutions.
    """

    def __init__(self) -> None:
        # A weak reference keeps the identity of a storage from being used again.
        self._storages: dict[int, StorageWeakRef] = {}
        self._functions, self._operations = _Functions(self), _Operations(self)
        self.calls: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()
        self.layouts: set[torch.memory_format] = set()
        self.state = torch.zeros(44, dtype=torch.uint8)

    def __enter__(self) -> FakeMps:
        self._modes = contextlib.ExitStack()
        self._modes.enter_context(self._functions)
        self._modes.enter_context(self._operations)
        return self

    def __exit__(self, *error: object) -> None:
        self._modes.close()

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor is on the device."""
        with torch._C.DisableTorchFunction():
            return tensor.device.type == "cpu" and tensor.untyped_storage()._cdata in self._storages

    def take(self, tensor: Tensor, operation: str) -> None:
        """Marks a tensor's memory as the device's.

        Raises:
            TypeError: An Apple GPU lacks the tensor's type.
        """
        if tensor.dtype in _MISSING:
            raise TypeError(f"{_NO_DOUBLE} ({operation})")
        with torch._C.DisableTorchFunction():
            if tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = StorageWeakRef(storage)
        self.operations[operation] += 1


class _Functions(TorchFunctionMode):
    """What names a device in Python: ``device=``, ``to``, ``cpu`` and the attribute ``device``."""

    def __init__(self, fake: FakeMps) -> None:
        super().__init__()
        self._fake = fake

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        fake, name = self._fake, getattr(func, "__name__", "")
        owner = getattr(func, "__self__", None)
        on_device = bool(args) and isinstance(args[0], Tensor) and fake.holds(args[0])
        if name == "__get__" and owner is Tensor.device:
            return MPS if on_device else func(*args, **kwargs)
        if name == "__get__" and getattr(owner, "__name__", "") == "is_mps":
            return on_device
        if on_device and name in ("numpy", "__array__", "data_ptr"):
            raise TypeError(f"can't convert mps:0 device type tensor to numpy ({name})")
        if name in ("cpu", "to") and isinstance(args[0], Tensor):
            return self._moved(args[0], func, args, kwargs, on_device)
        named = kwargs.get("device")
        if named is None:
            return func(*args, **kwargs)
        target = torch.device(named)
        if target.type == "mps":
            kwargs["device"] = torch.device("cpu")
            result = func(*args, **kwargs)
            # A new tensor like one of the device's is marked by its operation.
            fake.take(result, name)
            return result
        result = func(*args, **kwargs)
        if on_device and target.type == "cpu":
            result = _unmarked_copy(result)
        return result

    def _moved(
        self, tensor: Tensor, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], on_device: bool
    ) -> Any:
        if func.__name__ == "cpu":
            return _unmarked_copy(tensor) if on_device else tensor
        other = next((each for each in args[1:] if isinstance(each, Tensor)), None)
        named: Any
        if other is not None:
            named, dtype, hurried, layout = other.device, other.dtype, False, None
        else:
            named, dtype, hurried, layout = torch._C._nn._parse_to(
                *args[1:], **{key: value for key, value in kwargs.items() if key != "copy"}
            )
        assert not (on_device and hurried), "the copy may not be complete when it is read"
        rest = {"dtype": dtype, "memory_format": layout, "copy": kwargs.get("copy")}
        rest = {key: value for key, value in rest.items() if value is not None}
        target = named if named is not None else (MPS if on_device else tensor.device)
        converted = func(tensor, **rest) if rest else tensor
        if target.type == "mps" and not on_device:
            result = _unmarked_copy(converted)
            self._fake.take(result, "to")
            return result
        return _unmarked_copy(converted) if target.type == "cpu" and on_device else converted


class _Operations(TorchDispatchMode):
    """What operations make of the device's tensors, in the backward pass too."""

    def __init__(self, fake: FakeMps) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fake = fake

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _CONVOLUTIONS and self._fake.holds(args[0]):
            for each in args[:2]:
                is_contiguous = each.is_contiguous()
                self._fake.layouts.add(torch.contiguous_format if is_contiguous else torch.channels_last)
        result = func(*args, **kwargs)
        inputs = [each for each in tree_leaves((args, dict(kwargs))) if isinstance(each, Tensor)]
        held = [self._fake.holds(each) for each in inputs]
        if not any(held) or func is torch.ops.aten.copy_.default:
            return result
        elsewhere = [list(each.shape) for each, here in zip(inputs, held, strict=True) if not here and each.dim()]
        if elsewhere:
            raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got {elsewhere} on the CPU")
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self._fake.take(each, str(func))
        return result


def _unmarked_copy(tensor: Tensor) -> Tensor:
    """The same values in memory that is not the device's; no part of a graph of autograd."""
    with torch._C.DisableTorchFunction():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor.detach())


def pretend(monkeypatch: pytest.MonkeyPatch, *, built: bool = True, available: bool = True, macos: int = 15) -> FakeMps:
    """Makes torch say that there is an Apple GPU, and replaces ``torch.mps``."""
    fake = FakeMps()

    def counted(name: str, function: Callable[..., Any]) -> None:
        def call(*args: Any) -> Any:
            fake.calls[name] += 1
            return function(*args)

        monkeypatch.setattr(torch.mps, name, call)

    def set_state(state: Tensor) -> None:
        fake.state = state.clone()

    counted("synchronize", lambda: None)
    counted("manual_seed", lambda seed: set_state(torch.full((44,), seed % 251, dtype=torch.uint8)))
    counted("get_rng_state", lambda: fake.state.clone())  # noqa: PLW0108 - the state of then
    counted("set_rng_state", set_state)
    counted("driver_allocated_memory", lambda: 3 << 20)
    counted("recommended_max_memory", lambda: 1 << 30)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: built)
    monkeypatch.setattr(torch.backends.mps, "is_available", functools.cache(lambda: built and available))
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", functools.cache(lambda major, minor: macos >= major))
    return fake
