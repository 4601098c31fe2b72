"""A part of a recorded forward pass as a module: it takes the tensors that cross into it, and returns what leaves."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from distrain import torch_internals
from distrain.strategies.pipeline.calls import Fixed, Size, State, Value, map_leaves, tensors_of


@dataclass(frozen=True)
class Step:
    """A call to repeat.

    Attributes:
        target: The name of a module in the model, or a function.
        arguments: ``(args, kwargs)`` with references in place of tensors.
        results: Numbers of the values in the result; see :class:`~distrain.strategies.pipeline.calls.Call`.
        without_gradient: The call is made under ``torch.no_grad()``.
        last_uses: Numbers of the values that nothing needs after this call.
    """

    target: str | Callable[..., Any]
    arguments: Any
    results: tuple[int | None, ...]
    without_gradient: bool
    last_uses: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """Calls to repeat in their order, in one of the modes.

    Attributes:
        inputs: Numbers of the values that are given.
        steps: The calls.
        output: What is returned, with references in place of tensors.
    """

    inputs: tuple[int, ...]
    steps: tuple[Step, ...]
    output: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        # Nothing in it changes, and functions of torch can't all be copied.
        return self

    def run(self, given: Sequence[Tensor], module: Callable[[str], nn.Module], state: Callable[[str], Tensor]) -> Any:
        """Makes the calls.

        Args:
            given: The inputs, each ``[N, …]``.
            module: Finds a module by its name.
            state: Finds a parameter or buffer by its name.
        """
        values = dict(zip(self.inputs, given, strict=True))
        samples = len(given[0])

        def decoded(leaf: Any) -> Any:
            if isinstance(leaf, Value):
                return values[leaf.number]
            if isinstance(leaf, State):
                return state(leaf.name)
            if isinstance(leaf, Size):
                return leaf.per_sample * samples + leaf.constant
            return leaf.tensor if isinstance(leaf, Fixed) else leaf

        for step in self.steps:
            call = module(step.target) if isinstance(step.target, str) else step.target
            args, kwargs = map_leaves(step.arguments, decoded)
            if step.without_gradient:
                with torch.no_grad():
                    result = call(*args, **kwargs)
            else:
                result = call(*args, **kwargs)
            if step.results:
                pairs = zip(step.results, tensors_of(result), strict=True)
                values.update((number, tensor) for number, tensor in pairs if number is not None)
            del result, args, kwargs
            for number in step.last_uses:
                values.pop(number, None)
        return map_leaves(self.output, decoded)


class Segment(nn.Module):
    """A part of a model. Its modules, parameters and buffers have the names that they have in the model.

    Args:
        model: The whole model, some of whose modules this takes over.
        training: What to do in training mode.
        evaluation: What to do in evaluation mode.
        modules: Names of modules that belong to this part as a whole.
        states: Names of further parameters and buffers that belong to it.
        constants: Buffers by name that it reads, which belong to no part and are in no checkpoint.
        modes: For each mode, modules that are in the other one, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        training: Program,
        evaluation: Program,
        modules: Collection[str],
        states: Collection[str],
        constants: Mapping[str, Tensor],
        modes: Mapping[bool, Collection[str]],
    ) -> None:
        super().__init__()
        self._programs = {True: training, False: evaluation}
        self._constants = dict(constants)
        torch_internals.set_state_version(self, model)
        #: Names, or beginnings of names, of the entries that it has in the model's ``state_dict()``.
        self._owned: list[str] = []
        for name in sorted(modules):
            if not self._has(name):
                self._owned.append(name)
                self._place_of(model, name).add_module(name.rpartition(".")[2], model.get_submodule(name))
        saved = model.state_dict()
        for name in states:
            if not self._has(name):
                self._owned.append(name)
                holder, key, tensor = self._place_of(model, name), name.rpartition(".")[2], _state_of(model, name)
                if isinstance(tensor, nn.Parameter):
                    holder.register_parameter(key, tensor)
                else:
                    holder.register_buffer(key, tensor, persistent=name in saved)
        own = dict(self.named_modules())
        self._other_modes = {
            mode: [own[name] for name in sorted(names) if name in own] for mode, names in modes.items()
        }

    def _has(self, name: str) -> bool:
        return any(name == owned or name.startswith(f"{owned}.") for owned in self._owned)

    def _place_of(self, model: nn.Module, name: str) -> nn.Module:
        """Where a module or tensor of this name is to be; what holds it is made, without anything else."""
        place: nn.Module = self
        parts = name.split(".")[:-1]
        for count, part in enumerate(parts, 1):
            if part not in dict(place.named_children()):
                holder = nn.Module()
                torch_internals.set_state_version(holder, model.get_submodule(".".join(parts[:count])))
                place.add_module(part, holder)
            place = place.get_submodule(part)
        return place

    @override
    def train(self, mode: bool = True) -> Segment:
        super().train(mode)
        # What a train() of the model's own does, which may keep a part in evaluation mode.
        for module in self._other_modes[mode]:
            module.training = not mode
        return self

    def forward(self, given: Any) -> Any:
        """Maps a tensor, or a tuple of tensors, each ``[N, …]``, to what leaves this part."""
        tensors = [given] if isinstance(given, Tensor) else list(given)
        return self._programs[self.training].run(tensors, self.get_submodule, self._state)

    def _state(self, name: str) -> Tensor:
        return self._constants[name] if name in self._constants else _state_of(self, name)


def _state_of(model: nn.Module, name: str) -> Tensor:
    holder, _, key = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(holder), key)
    return tensor


def owned_names(segment: Segment) -> list[str]:
    """Names, or beginnings of names, of the entries that a segment has in the model's ``state_dict()``."""
    return segment._owned
