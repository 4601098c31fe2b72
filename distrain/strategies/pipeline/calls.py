"""What a forward pass consists of: calls of modules and functions, with references to the tensors between them."""

from __future__ import annotations

import enum
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class Untraceable(Exception):
    """A module does something that no record of calls can repeat.

    Attributes:
        place: ``file:line`` of the user's code; empty if unknown.
        module: Name of the innermost module that was being recorded; empty for the model itself, ``None`` if unknown.
    """

    def __init__(self, problem: str, place: str = "", module: str | None = None) -> None:
        super().__init__(problem)
        self.problem, self.place, self.module = problem, place, module


@dataclass(frozen=True)
class Value:
    """A tensor that the forward pass has computed, by its number; 0 is the model's input."""

    number: int


@dataclass(frozen=True)
class State:
    """A parameter or buffer, by its name in the model."""

    name: str


@dataclass(frozen=True, eq=False)
class Fixed:
    """A tensor that a module holds as a plain attribute."""

    tensor: Tensor


@dataclass(frozen=True)
class Size:
    """An integer that grows with the number of samples: ``per_sample * samples + constant``."""

    per_sample: int
    constant: int


@dataclass
class Call:
    """One call of a module or function.

    Attributes:
        target: The module's name in the model, or the function.
        within: Name of the module whose ``forward`` makes the call; empty for the model itself.
        arguments: ``(args, kwargs)`` with references in place of tensors; ``None`` if they hold objects that can't be
            repeated, which matters only if the call is.
        results: For each tensor in the result, in the order of :func:`tensors_of`, the number of its value; ``None``
            for one that is a parameter or buffer.
        records_gradient: Whether autograd was switched on.
        place: ``file:line`` of the user's code.
        calls: What a module did in its ``forward``, if it was recorded.
        writes: Memory, by id, that a function or module that was not recorded has written into.
    """

    target: str | Callable[..., Any]
    within: str
    arguments: Any
    results: list[int | None]
    records_gradient: bool
    place: str
    calls: list[Call] | None = None
    writes: frozenset[int] = frozenset()

    @property
    def label(self) -> str:
        """The module's name, or that of the function behind the name of the module that calls it."""
        if isinstance(self.target, str):
            return self.target
        return f"{self.within}.{function_name(self.target)}".lstrip(".")


@dataclass(frozen=True)
class ValueInfo:
    """What is known of a value.

    Attributes:
        shape: As it was computed, for some number of samples.
        dtype: Data type.
        memory: Id of its memory, which views share.
        needs_input: Whether it was computed from the model's input, from parameters, from buffers, or drawn; other
            values are the same in each forward pass with as many samples.
    """

    shape: torch.Size
    dtype: torch.dtype
    memory: int
    needs_input: bool


@dataclass
class Trace:
    """A forward pass.

    Attributes:
        root: The call of the model.
        output: What the training loss depends on, with references in place of tensors.
        values: Of each value, by number.
        closed: Why a module that has submodules was not recorded but called as a whole, by its name.
    """

    root: Call
    output: Any
    values: list[ValueInfo]
    closed: dict[str, str] = field(default_factory=dict)


def function_name(function: Callable[..., Any]) -> str:
    """A function's name as users write it; that of the attribute for what reads an attribute."""
    name = str(getattr(function, "__name__", function))
    if name == "__get__":
        name = str(getattr(getattr(function, "__self__", None), "__name__", name))
    return name.strip("_") if name.startswith("__") else name


# --- arguments and results -------------------------------------------------------------------------------------------


def map_leaves(value: Any, function: Callable[[Any], Any]) -> Any:
    """Applies a function to all that a nested value holds; tuples, lists, dictionaries and slices are rebuilt."""
    if isinstance(value, tuple):
        items = [map_leaves(item, function) for item in value]
        if hasattr(value, "_fields"):
            return type(value)(*items)
        # torch.Size and the results of torch's functions hold numbers or tensors only, not references to them.
        return tuple(items)
    if isinstance(value, list):
        return [map_leaves(item, function) for item in value]
    if isinstance(value, Mapping):
        items_ = {key: map_leaves(item, function) for key, item in value.items()}
        return items_ if type(value) is dict else type(value)(items_)  # type: ignore[call-arg]
    if isinstance(value, slice):
        return slice(*(map_leaves(item, function) for item in (value.start, value.stop, value.step)))
    return function(value)


def leaves_of(value: Any) -> Iterator[Any]:
    """All that a nested value holds, in the order of :func:`map_leaves`."""
    if isinstance(value, tuple | list):
        for item in value:
            yield from leaves_of(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from leaves_of(item)
    elif isinstance(value, slice):
        yield from leaves_of((value.start, value.stop, value.step))
    else:
        yield value


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in a nested value."""
    return [leaf for leaf in leaves_of(value) if isinstance(leaf, Tensor)]


def values_in(value: Any) -> set[int]:
    """Numbers of the values that a nested value refers to."""
    return {leaf.number for leaf in leaves_of(value) if isinstance(leaf, Value)}


def states_in(value: Any) -> set[str]:
    """Names of the parameters and buffers that a nested value refers to."""
    return {leaf.name for leaf in leaves_of(value) if isinstance(leaf, State)}


_PLAIN = (
    int, float, complex, bool, str, bytes, type(None), type(...), type, enum.Enum, range,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.finfo, torch.iinfo,
)  # fmt: skip


def is_plain(value: Any) -> bool:
    """Whether a value that is no container and no tensor means the same in the next forward pass."""
    if isinstance(value, types.FunctionType):
        return value.__closure__ is None
    return isinstance(value, (*_PLAIN, types.BuiltinFunctionType))


# --- forward passes of two sizes -------------------------------------------------------------------------------------


def generalise(first: Any, second: Any, sizes: tuple[int, int]) -> Any:
    """What two nested values of forward passes with ``sizes`` samples have in common, with :class:`Size` for integers.

    Raises:
        ValueError: They have nothing in common.
    """
    if type(first) is not type(second):
        raise ValueError(f"{_shown(first)} with {sizes[0]} samples and {_shown(second)} with {sizes[1]}")
    if isinstance(first, tuple | list):
        if len(first) != len(second):
            raise ValueError(f"{len(first)} items with {sizes[0]} samples and {len(second)} with {sizes[1]}")
        items = [generalise(*pair, sizes) for pair in zip(first, second, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    if isinstance(first, Mapping):
        if list(first) != list(second):
            raise ValueError(f"other keys with {sizes[0]} samples than with {sizes[1]}")
        merged = {key: generalise(first[key], second[key], sizes) for key in first}
        return merged if type(first) is dict else type(first)(merged)  # type: ignore[call-arg]
    if isinstance(first, slice):
        here, there = ((part.start, part.stop, part.step) for part in (first, second))
        return slice(*generalise(here, there, sizes))
    if isinstance(first, Fixed):
        if first.tensor is not second.tensor:
            raise ValueError("another tensor")
        return first
    if type(first) is int and first != second:
        per_sample, rest = divmod(second - first, sizes[1] - sizes[0])
        if rest:
            raise ValueError(f"{first} with {sizes[0]} samples and {second} with {sizes[1]}")
        return Size(per_sample, first - per_sample * sizes[0])
    # NaN is not equal to itself.
    if first is second or first == second or repr(first) == repr(second):
        return first
    raise ValueError(f"{_shown(first)} with {sizes[0]} samples and {_shown(second)} with {sizes[1]}")


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, bool | int | float | str) else f"a {type(value).__name__}"
