"""Counts the memory of the tensors that are made and not yet freed."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from distrain.torch_internals import DispatchMode, storage_id, tensors_in


class LiveMemory(DispatchMode):
    """Follows the memory of tensors that are made inside this block, also by autograd, until it is freed.

    On CPUs this agrees with what torch's allocator reports. What an operation needs only while it runs is not seen: it
    is much for convolutions alone, and counted for them.

    Args:
        device: Where the operations of a training run; here tensors may have no values.

    Attributes:
        held: Bytes that are held now.
        peak: Most bytes that were held since the last :meth:`restart_peak`.
        kept_peak: The same, as if the memory of :meth:`keep` were not freed meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self.held = self.peak = self.kept_peak = 0
        #: Memory that counts as held after it is freed, and the bytes of it that were freed.
        self._keep: set[int] = set()
        self._kept = 0
        #: Memory that is counted, or was there before.
        self._known: set[int] = set()

    def restart_peak(self) -> int:
        """Returns the peak, and begins a new one."""
        peak, self.peak = self.peak, self.held
        self.kept_peak, self._kept = self.held, 0
        self._keep.clear()
        return peak

    def keep(self, storages: Iterable[int]) -> None:
        """Counts memory, by :func:`storage_id`, in ``kept_peak`` until the next :meth:`restart_peak`."""
        self._keep.update(storages)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch instead of each operation."""
        kwargs = kwargs or {}
        self._known.update(storage_id(tensor) for tensor in _with_storage((args, kwargs)))
        result = func(*args, **kwargs)
        for tensor in _with_storage(result):
            key = storage_id(tensor)
            if key not in self._known:
                self._known.add(key)
                storage = tensor.untyped_storage()
                size = storage.nbytes()
                self.held += size
                self._raise_peaks(self.held)
                # Autograd may keep it for longer than any tensor of Python does.
                weakref.finalize(storage, self._free, key, size)
        if func is torch.ops.aten.convolution_backward.default and self._device.type == "cpu":
            output_gradient, inputs, weight = args[:3]
            self._raise_peaks(self.held + _reordered_bytes(output_gradient, inputs, weight, result[1]))
        return result

    def _raise_peaks(self, needed: int) -> None:
        self.peak = max(self.peak, needed)
        self.kept_peak = max(self.kept_peak, needed + self._kept)

    def _free(self, key: int, size: int) -> None:
        self.held -= size
        if key in self._keep:
            self._keep.discard(key)
            self._kept += size
        self._known.discard(key)


def _reordered_bytes(output_gradient: Tensor, inputs: Tensor, weight: Tensor, weight_gradient: Tensor | None) -> int:
    """Bytes of the copies in layouts of its own that oneDNN, on CPUs, makes in a convolution's backward pass."""
    if weight_gradient is None or weight.shape[2:].numel() == 1:
        return 0
    if weight.dim() == 4 and not weight.is_contiguous():
        # In channels-last only the gradient of the weight is copied, twice.
        return 2 * weight_gradient.nbytes
    return weight_gradient.nbytes + inputs.nbytes + output_gradient.nbytes


def _with_storage(value: Any) -> Iterator[Tensor]:
    """The tensors in a nest that have memory of their own: sparse ones have none."""
    return (tensor for tensor in tensors_in(value) if tensor.layout == torch.strided)
