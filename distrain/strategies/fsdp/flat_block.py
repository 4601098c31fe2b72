"""Parameters in one flat buffer that is cut into equal parts, one for each rank of a shard group."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distrain.communication.collectives import Communicator
from distrain.communication.types import Pending
from distrain.files import mapped_memory


class Slice(NamedTuple):
    """The part of one parameter that this rank keeps.

    Attributes:
        parameter: The parameter's index in its block.
        start: Its first element, counted in the parameter's memory order.
        size: Number of elements, at least 1.
        offset: Where it begins in this rank's part of the block.
    """

    parameter: int
    start: int
    size: int
    offset: int


class FlatBlock:
    """Some parameters, one after the other in a flat buffer, of which each rank keeps an equal part.

    A parameter has the memory layout in the buffer that it had before (channels-last weights). Zeros at the end fill up
    the last part.

    Args:
        named: ``(name, parameter)`` pairs of one dtype and device.
        group: The ranks that share the block.

    Attributes:
        names: The parameters' names.
        parameters: The parameters; see :meth:`attach`.
        shapes: Their shapes.
        strides: Their strides in the flat buffer.
        part_size: Elements of a rank's part.
        part: This rank's part, ``[part_size]``; ``None`` before :meth:`keep_whole` or :meth:`keep_part`.
        slices: This rank's slices of parameters.
        gradient: This rank's part of the gradients, ``[part_size]``; ``None`` while the parameters are not trained.
    """

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], group: Communicator) -> None:
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self._group = group
        # A parameter that is a view with gaps gets the strides of a copy, since a flat buffer has no gaps.
        self.strides = [torch.empty_like(parameter, device="meta").stride() for parameter in self.parameters]
        self.shapes = [parameter.shape for parameter in self.parameters]
        self._offsets = [0]
        for parameter in self.parameters:
            self._offsets.append(self._offsets[-1] + parameter.numel())
        self.part_size = max(1, math.ceil(self._offsets[-1] / group.size))
        self.slices = self._slices()
        self.gradient: Tensor | None = None
        self.part: Tensor | None = None
        self._flat: Tensor | None = None
        self._pending: Pending | None = None
        self._sent: Tensor | None = None
        self.is_attached = False
        first = self.parameters[0].detach()
        self._like = first.new_empty(0)

    @property
    def numel(self) -> int:
        """Elements of all parameters."""
        return self._offsets[-1]

    @property
    def bytes(self) -> int:
        """Size of the flat buffer, in bytes."""
        return self.part_bytes * self._group.size

    @property
    def part_bytes(self) -> int:
        """Size of a rank's part, in bytes."""
        return self.part_size * self._like.element_size()

    @property
    def is_trained(self) -> bool:
        """Whether the parameters need gradients; they all do, or none does."""
        return self.parameters[0].requires_grad

    def _slices(self) -> list[Slice]:
        begin = self._group.rank * self.part_size
        end = begin + self.part_size
        found = []
        for index, (start, stop) in enumerate(zip(self._offsets, self._offsets[1:], strict=False)):
            first, last = max(start, begin), min(stop, end)
            if first < last:
                found.append(Slice(index, first - start, last - first, first - begin))
        return found

    def new_flat(self) -> Tensor:
        """A flat buffer for the block, not initialised but for the zeros at its end."""
        flat = self._like.new_empty(self.part_size * self._group.size)
        flat[self.numel :].zero_()
        return flat

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parameters in a flat buffer."""
        layouts = zip(self.shapes, self.strides, self._offsets, strict=False)
        return [flat.as_strided(shape, strides, offset) for shape, strides, offset in layouts]

    def in_memory_order(self, index: int, tensor: Tensor) -> Tensor:
        """The elements of a tensor of a parameter's shape, ``[numel]``, in the parameter's memory order."""
        shape, strides = self.shapes[index], self.strides[index]
        if tensor.stride() == strides:
            return tensor.detach().as_strided((tensor.numel(),), (1,))
        copy = torch.empty_strided(shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
        return copy.as_strided((tensor.numel(),), (1,))

    def in_shape(self, index: int, elements: Tensor) -> Tensor:
        """The tensor of a parameter's shape whose elements, in the parameter's memory order, are given."""
        return elements.as_strided(self.shapes[index], self.strides[index])

    # --- what this rank keeps ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def keep_whole(self) -> None:
        """Moves the parameters into a flat buffer that stays; this rank's part is a view of it."""
        self._flat = flat = self.new_flat()
        for view, parameter in zip(self.views(flat), self.parameters, strict=True):
            view.copy_(parameter)
        self._set_data(self.views(flat))
        self.part = self._own_part(flat)
        self.is_attached = True

    @torch.no_grad()
    def keep_part(self, value_of: Callable[[Tensor], Tensor], new_part: Callable[[int, Tensor], Tensor]) -> None:
        """Keeps a copy of this rank's part, and lets go of the parameters' values.

        Args:
            value_of: Gives the value of a parameter, one after the other.
            new_part: See :meth:`distrain.strategies.fsdp.offload.Offload.new_part`.
        """
        self.part = new_part(self.part_size, self._like)
        for each in self.slices:
            whole = self.in_memory_order(each.parameter, value_of(self.parameters[each.parameter]))
            self.part[each.offset : each.offset + each.size] = whole[each.start : each.start + each.size]
        mapped_memory.release(self.part)
        self._make_empty()

    def _own_part(self, flat: Tensor) -> Tensor:
        return flat[self._group.rank * self.part_size : (self._group.rank + 1) * self.part_size]

    @torch.no_grad()
    def take_part_again(self) -> None:
        """Copies this rank's part out of the attached parameters, which were written to."""
        assert self._flat is not None and self.part is not None
        self.part.copy_(self._own_part(self._flat))
        mapped_memory.release(self.part)

    # --- gathering ---------------------------------------------------------------------------------------------------

    @property
    def is_started(self) -> bool:
        """Whether the parameters are being gathered, or are attached."""
        return self._flat is not None

    def start_gathering(self) -> None:
        """Starts to gather all ranks' parts, unless that was done; all ranks of the group start it."""
        if self._flat is None:
            assert self.part is not None
            self._flat = self.new_flat()
            # A part that is not on the device is copied there, and the copy lives until it is sent.
            self._sent = self.part.to(self._like.device, non_blocking=True)
            self._pending = self._group.start_all_gather_into(self._flat, self._sent)

    @torch.no_grad()
    def refresh(self) -> Pending:
        """Starts to gather all ranks' updated parts into the buffer of :meth:`keep_whole`."""
        assert self._flat is not None and self.part is not None
        return self._group.start_all_gather_into(self._flat, self.part)

    @torch.no_grad()
    def attach(self) -> None:
        """Gives the parameters their values, as soon as these are gathered."""
        if not self.is_attached:
            self.start_gathering()
            self._wait()
            assert self._flat is not None
            self._set_data(self.views(self._flat))
            self.is_attached = True

    @torch.no_grad()
    def detach(self) -> None:
        """Lets go of the gathered values; the parameters are empty until they are attached again.

        Tensors that autograd still holds keep the memory alive. So this is never wrong, only early or late.
        """
        self._wait()
        self._flat = None
        if self.is_attached:
            self._make_empty()

    def _make_empty(self) -> None:
        # Empty, so that whoever uses a parameter outside of its module gets an error instead of old values.
        self._set_data([self._like] * len(self.parameters))
        self.is_attached = False

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.wait()
            self._pending = self._sent = None
            if self.part is not None:
                mapped_memory.release(self.part)

    def _set_data(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.data = value

    @property
    def storage(self) -> Tensor | None:
        """The attached buffer; ``None`` while the parameters are empty."""
        return self._flat if self.is_attached else None
