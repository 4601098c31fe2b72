"""Which modules use which parameters, and the blocks of modules whose parameters are gathered together.

A module's parameters are not always used by the module: a parent reads ``self.embedding.weight``, an attention layer
uses its projection's weight without calling it, a layer is called twice. So one forward pass is observed. A parameter
belongs to the smallest call of a module that contains all uses of it, and is gathered during that call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from distrain.errors import described
from distrain.runtime.device import RandomState

#: What is asked of a tensor without using its values.
_FACTS = tuple(getattr(torch.Tensor, name) for name in ("dtype", "device", "requires_grad", "is_cuda", "layout"))


@dataclass
class Call:
    """A call of a module in the observed forward pass.

    Attributes:
        module: The module's name.
        calls: The calls within it, in their order.
        parameters: Names of the parameters whose smallest call is this one.
    """

    module: str
    calls: list[Call] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)

    def all_parameters(self) -> list[str]:
        """Names of the parameters of this call and all calls within it."""
        return [*self.parameters, *(name for call in self.calls for name in call.all_parameters())]


@dataclass(frozen=True)
class ModuleBlock:
    """Parameters that are gathered together.

    Attributes:
        modules: Names of the modules that use them, in the order in which they are called; the empty name is the
            model's.
        parameters: Their names.
    """

    modules: tuple[str, ...]
    parameters: tuple[str, ...]


def choose_blocks(root: Call, bytes_of: Mapping[str, int], limit: float) -> list[ModuleBlock]:
    """Divides a model into blocks of at most ``limit`` bytes where its modules allow that.

    A module that is too large is divided into the modules that it calls. Small ones that are called one after the other
    form a block.

    Args:
        root: The call of the model.
        bytes_of: Size of each parameter.
        limit: Bytes of a block.

    Returns:
        The blocks in the order of their first use.
    """

    def size(names: Sequence[str]) -> int:
        return sum(bytes_of[name] for name in names)

    blocks: list[ModuleBlock] = []

    def divide(call: Call) -> None:
        inside = [each for each in call.calls if each.all_parameters()]
        if not inside or size(call.all_parameters()) <= limit:
            blocks.append(ModuleBlock((call.module,), tuple(call.all_parameters())))
            return
        if call.parameters:
            blocks.append(ModuleBlock((call.module,), tuple(call.parameters)))
        together: list[Call] = []

        def close() -> None:
            if together:
                names = [name for each in together for name in each.all_parameters()]
                blocks.append(ModuleBlock(tuple(each.module for each in together), tuple(names)))
                together.clear()

        for each in inside:
            held = [name for other in together for name in other.all_parameters()]
            if size([*held, *each.all_parameters()]) > limit:
                close()
            if size(each.all_parameters()) > limit:
                divide(each)
            else:
                together.append(each)
        close()

    divide(root)
    return blocks


def observe(model: nn.Module, inputs: Tensor) -> tuple[Call, str]:
    """Runs a forward pass of a copy of the model, and notes which call of a module uses which parameter.

    A parameter that is not used, because the pass depends on the data or the mode, belongs to the call of the model.

    Args:
        model: In training mode. Its buffers and the generators of random numbers stay as they are.
        inputs: What the model is called with.

    Returns:
        The call of the model; and why it could not be observed, in which case all parameters belong to it.
    """
    names = [name for name, _ in model.named_parameters()]
    random_state = RandomState.now()
    try:
        # The copy has buffers of its own and the model's own parameters.
        observed = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()}).train()
        observer = _Observer(observed)
        with torch.no_grad(), observer:
            observed(inputs)
        return observer.root_call(names), ""
    except Exception as error:  # a user's model may raise anything
        return Call("", parameters=names), described(error)
    finally:
        random_state.restore()


class _Observer(TorchFunctionMode):
    """Notes uses of parameters while a model runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        #: The calls that a parameter's uses have in common, from the model's on.
        self._common: dict[str, list[Call]] = {}
        self._root = Call("")
        self._stack: list[Call] = []
        for name, module in model.named_modules():
            module.register_forward_pre_hook(self._begin(name), prepend=True)
            module.register_forward_hook(self._end)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        asked = getattr(func, "__self__", None)
        if not any(asked is fact for fact in _FACTS):
            for tensor in _tensors((args, kwargs or {})):
                if (name := self._names.get(id(tensor))) is not None:
                    self._note(name)
        return func(*args, **(kwargs or {}))

    def _begin(self, name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            call = Call(name) if self._stack else self._root
            if self._stack:
                self._stack[-1].calls.append(call)
            self._stack.append(call)

        return hook

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._stack.pop()

    def _note(self, name: str) -> None:
        known = self._common.get(name)
        if known is None:
            self._common[name] = list(self._stack)
            return
        shared = 0
        while shared < min(len(known), len(self._stack)) and known[shared] is self._stack[shared]:
            shared += 1
        del known[shared:]

    def root_call(self, names: Sequence[str]) -> Call:
        """The call of the model, with all parameters assigned to their calls."""
        for name in names:
            calls = self._common.get(name) or [self._root]
            calls[-1].parameters.append(name)
        return self._root


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
