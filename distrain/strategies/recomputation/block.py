"""A block that keeps its inputs instead of its activations, and is computed again when the backward pass needs these.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (arXiv 1604.06174). The second computation gives the
same bits and leaves no trace: it draws the same random numbers, reads buffers as they were, and what it writes to
buffers and attributes (BatchNorm's running statistics, for example) is taken back.

``torch.utils.checkpoint`` does not restore buffers and attributes, nor the draws of Python and NumPy; it computes a
block twice where a backward pass comes in two halves; and its first call imports torch's compiler, for seconds.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from distrain import torch_internals
from distrain.runtime.device import RandomState
from distrain.strategies.trial_copy import restored_attributes
from distrain.torch_internals import tensors_in


@dataclass
class BlockState:
    """What a block that is computed again knows besides its module's own attributes.

    Attributes:
        name: The block's name in the model.
        written: The buffers that a forward pass writes to, as pairs of a module and a name; ``None`` before the first.
        before: Called with the block before each second computation; a strategy that has moved parameters away brings
            them back.
    """

    name: str
    written: list[tuple[nn.Module, str]] | None = None
    before: Callable[[nn.Module], None] | None = None


class RecomputedBlock(nn.Module):
    """A class for blocks that are computed again; :func:`recompute` derives one from a block's own class."""

    recomputation: BlockState

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block's own class computes."""
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        return _Recomputation(self, super().forward).run(args, kwargs)


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def recompute(name: str, block: nn.Module) -> None:
    """Makes a block, in place, keep its inputs instead of its activations; names, hooks and identity stay.

    Args:
        name: Its name in the model.
        block: May have been made so before.
    """
    if isinstance(block, RecomputedBlock):
        return
    own = type(block)
    if own not in _CLASSES:
        # The own class's name, since messages show it.
        attributes = {"__module__": own.__module__, "__qualname__": own.__qualname__}
        _CLASSES[own] = cast(type[nn.Module], type(own.__name__, (RecomputedBlock, own), attributes))
    block.__class__ = _CLASSES[own]
    cast(RecomputedBlock, block).recomputation = BlockState(name)


def recomputed_blocks(model: nn.Module) -> Iterator[RecomputedBlock]:
    """The blocks of a model that are computed again."""
    return (module for module in model.modules() if isinstance(module, RecomputedBlock))


class _Slot:
    """What autograd holds in place of a tensor that a block would keep.

    It lives as long as the graph needs the tensor, and holds the tensor once it was computed again.
    """

    __slots__ = ("__weakref__", "recomputation", "value")

    def __init__(self, recomputation: _Recomputation) -> None:
        self.recomputation = recomputation
        self.value: Tensor | None = None


class _Complete(BaseException):
    """All that is needed was computed; what the block computes after that would be thrown away.

    No :class:`Exception`, so that no ``except`` clause of a user's model catches it.
    """


class _Inputs(torch.autograd.Function):
    """Keeps tensors as autograd keeps what it saves, so that hooks on saved tensors see them."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise AssertionError("nothing depends on this")


class _Draws:
    """Where the generators of random numbers are."""

    def __init__(self, device: torch.device) -> None:
        self._host, self.device = RandomState.now(), device
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        self._host.restore()
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self.device)

    def equal(self, other: _Draws) -> bool:
        pairs = ((self._cuda, other._cuda), (self._host.of_mps, other._host.of_mps))
        return self._host.draws_equal(other._host) and all(
            a is None or b is None or torch.equal(a, b) for a, b in pairs
        )


class _Recomputation:
    """A forward pass of a block, and its second computation.

    Args:
        block: The block.
        forward: What its own class computes.
    """

    def __init__(self, block: RecomputedBlock, forward: Callable[..., Any]) -> None:
        self._block, self._forward = block, forward
        self._slots: list[weakref.ref[_Slot]] = []
        self._kinds: list[tuple[torch.Size, torch.dtype]] = []
        self._draws: _Draws | None = None

    # --- the first computation ---------------------------------------------------------------------------------------

    def run(self, args: Any, kwargs: Any) -> Any:
        """Computes the block."""
        tensors = list(tensors_in((args, kwargs)))
        device = tensors[0].device if tensors else torch.device("cpu")
        self._keep_inputs(args, kwargs, tensors)
        before = _Draws(device)
        buffers = self._buffers()
        counts = [torch_internals.write_count(buffer) for _, _, buffer, _ in buffers]
        self._autocasts = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in dict.fromkeys((device.type, "cpu"))
        ]
        with torch.autograd.graph.saved_tensors_hooks(self._save, _value_of):
            result = self._forward(*args, **kwargs)
        if not before.equal(_Draws(device)):
            self._draws = before
        state = self._block.recomputation
        if state.written is None:
            state.written = [
                (module, name)
                for (module, name, buffer, values), count in zip(buffers, counts, strict=True)
                # Some kernels don't count their writes, and a layer may be in evaluation mode now and not later.
                if isinstance(module, torch_internals.BatchNorm)
                or torch_internals.write_count(buffer) != count
                or not torch.equal(buffer, values)
            ]
        self._written = [
            (module, name, values) for module, name, _, values in buffers if (module, name) in state.written
        ]
        return result

    def _keep_inputs(self, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
        numbers = {id(tensor): index for index, tensor in enumerate(tensors)}
        self._arguments = _mapped((args, kwargs), Tensor, lambda tensor: _Place(numbers[id(tensor)]))
        self._need_gradients = [tensor.requires_grad for tensor in tensors]
        counts = map(torch_internals.write_count, tensors)
        self._places = [(tensor.data_ptr(), count) for tensor, count in zip(tensors, counts, strict=True)]
        # Detached, so that the graph behind them is not kept alive for longer.
        anchor = torch.empty(0, requires_grad=True)
        self._kept: Any = _Inputs.apply(anchor, *(tensor.detach() for tensor in tensors))  # type: ignore[no-untyped-call]

    def _buffers(self) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
        """The buffers that the pass may write to, and copies of them."""
        written = self._block.recomputation.written
        if written is None:
            written = [
                (module, name)
                for module in self._block.modules()
                for name, _ in module.named_buffers(recurse=False, remove_duplicate=False)
            ]
        found = [(module, name, getattr(module, name)) for module, name in written]
        return [(module, name, buffer, buffer.detach().clone()) for module, name, buffer in found]

    def _save(self, tensor: Tensor) -> _Slot:
        slot = _Slot(self)
        self._slots.append(weakref.ref(slot))
        self._kinds.append((tensor.shape, tensor.dtype))
        return slot

    # --- the second computation --------------------------------------------------------------------------------------

    def compute_again(self) -> None:
        """Computes the block again, and gives each slot that still lives its tensor."""
        tensors = self._inputs()
        args, kwargs = _mapped(self._arguments, _Place, lambda place: tensors[place.number])
        if self._block.recomputation.before is not None:
            self._block.recomputation.before(self._block)
        self._index = 0
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self._autocasts:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(self._state_of_then())
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._fill, lambda tensor: tensor))
            stack.enter_context(contextlib.suppress(_Complete))
            self._forward(*args, **kwargs)
        if self._index < len(self._slots):
            raise self._differs(f"keeps {self._index} tensors instead of {len(self._slots)}")
        # Every slot has its tensor, so this is never computed a third time.
        self._kept = self._arguments = None

    def _inputs(self) -> list[Tensor]:
        inputs = []
        written = f"{self._name} can't be computed again: its input was written to after its pass"
        try:
            saved = self._kept.grad_fn.saved_tensors
        except RuntimeError as error:
            if "inplace" not in str(error):
                raise
            raise RuntimeError(written) from error
        # Where hooks replace what is saved, torch doesn't look.
        for tensor, needs_gradient, (place, count) in zip(saved, self._need_gradients, self._places, strict=True):
            in_place = tensor.data_ptr() == place
            if in_place and torch_internals.write_count(tensor) != count:
                raise RuntimeError(written)
            inputs.append(tensor.detach().requires_grad_(needs_gradient))
        return inputs

    def _fill(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if self._index == len(self._slots):
            raise self._differs(f"keeps more than {len(self._slots)} tensors")
        kind = (tensor.shape, tensor.dtype)
        if kind != self._kinds[self._index]:
            raise self._differs(f"keeps {kind} in place of {self._kinds[self._index]}")
        slot = self._slots[self._index]()
        if slot is not None:
            slot.value = tensor
        self._index += 1
        if self._index == len(self._slots):
            raise _Complete
        return tensor

    @property
    def _name(self) -> str:
        return f"model.checkpoint_activations: block {self._block.recomputation.name}"

    def _differs(self, how: str) -> RuntimeError:
        return RuntimeError(f"{self._name} computes something else the second time: it {how}")

    @contextlib.contextmanager
    def _state_of_then(self) -> Iterator[None]:
        """Inside, generators and buffers are as they were in the first computation; afterwards all is as it is now."""
        now = None if self._draws is None else _Draws(self._draws.device)
        present = [(module, name, getattr(module, name)) for module, name, _ in self._written]
        try:
            with restored_attributes(self._block):
                for module, name, values in self._written:
                    setattr(module, name, values)
                if self._draws is not None:
                    self._draws.restore()
                yield
        finally:
            for module, name, buffer in present:
                setattr(module, name, buffer)
            if now is not None:
                now.restore()


@dataclass(frozen=True)
class _Place:
    """A tensor among a block's arguments, by its number."""

    number: int


def _mapped(value: Any, kind: type[Any], function: Callable[[Any], Any]) -> Any:
    """A nest of tuples, lists and dictionaries with other values in place of those of a kind."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, list | tuple):
        items = [_mapped(item, kind, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: _mapped(item, kind, function) for key, item in value.items()}
    return value


def _value_of(slot: _Slot) -> Tensor:
    if slot.value is None:
        slot.recomputation.compute_again()
    assert slot.value is not None
    return slot.value
