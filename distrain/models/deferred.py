"""A model that is built without its large tensors, and then filled with the very values that it would have had.

While the model is built, every operation on tensors is seen. Instead of a large tensor the model gets a *hollow* one,
which has a shape and a device but takes no memory, and what is done to it is written down. Random numbers for it are
drawn and thrown away, one operation at a time, so that all later draws are those of a model that is built as usual; the
generator's state before each draw is kept. Later the value of each tensor is computed by itself, when and where it is
needed. Small tensors are made as usual, so that code which looks at their values works.

Hollow tensors are not on the meta device, because torch's initialisers leave tensors on that device out.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from distrain import torch_internals
from distrain.checkpoint.saved_tensors import is_dense
from distrain.communication.collectives import digest
from distrain.errors import described
from distrain.models.tensors import named_tensors
from distrain.torch_internals import storage_id, tensors_in

log = logging.getLogger(__name__)

#: Smaller tensors are made as usual.
_LEAST_BYTES = 1 << 12
#: Operations that replace all elements of their first argument, whatever these were.
_DRAWN = ("normal_", "uniform_", "log_normal_", "exponential_", "cauchy_", "geometric_", "random_")
_FILLS = frozenset((*_DRAWN, "zero_", "fill_", "copy_"))
#: Operations that give a tensor other memory.
_RESIZES = frozenset(("set_", "resize_", "resize_as_"))
#: Functions that read a tensor's memory without an operation.
_READERS = frozenset(("numpy", "__array__", "tolist", "data_ptr", "__dlpack__"))
#: Where a module keeps what it has registered.
_REGISTERED = ("_parameters", "_buffers", "_modules")
_META = torch.device("meta")


class CannotDefer(Exception):
    """Something of a model can't be computed later; the message says what."""


def hollow(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor that takes no memory: on the CPU it can be read, as zeros, and not be written; elsewhere neither."""
    if device.type != "cpu":
        tensor = torch.empty_strided(shape, strides, dtype=dtype, device=device)
        tensor.untyped_storage().resize_(0)
        return tensor
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    size = 0 if 0 in shape else (last + 1) * dtype.itemsize
    # Addresses alone, which no limit but that of addresses counts. Without any, views could not be made.
    if sys.platform == "win32":
        memory = mmap.mmap(-1, max(1, size), access=mmap.ACCESS_READ)
    else:
        memory = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        flat = torch.frombuffer(memory, dtype=torch.uint8)
    return torch.empty(0, dtype=dtype).set_(flat.untyped_storage(), 0, tuple(shape), tuple(strides))


@dataclass(frozen=True, eq=False)
class _Operation:
    """An operation on hollow tensors.

    Attributes:
        function: Of torch.
        arguments: By position.
        options: By keyword.
        results: The hollow tensors that it returned.
        reads: Storages whose values it needs.
        writes: Storages that it makes or changes.
        replaces: Whether what it writes does not depend on what was there before.
        generator_state: Of the generator, before it drew from it; ``None`` if it draws nothing.
    """

    function: Any
    arguments: Sequence[Any]
    options: Mapping[str, Any]
    results: Sequence[Tensor]
    reads: frozenset[int]
    writes: frozenset[int]
    replaces: bool
    generator_state: Tensor | None


class DeferredTensors:
    """The values of hollow tensors, as operations that compute them."""

    def __init__(self) -> None:
        self._operations: list[_Operation] = []
        #: Indices of the operations that write each hollow tensor's storage, and the bytes that it should have.
        self._writers: dict[int, list[int]] = defaultdict(list)
        self._bytes: dict[int, int] = {}
        #: Where numbers are drawn for nothing, inside of :meth:`building`.
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def is_hollow(self, tensor: Tensor) -> bool:
        """Whether a tensor, or what it is a view of, is one of these."""
        return tensor.layout == torch.strided and storage_id(tensor) in self._bytes

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """Inside this block large tensors that are made become hollow."""
        try:
            with _Readers(self), _Operations(self):
                yield
        finally:
            self._scratch = torch.empty(0, dtype=torch.uint8)

    # --- writing down ------------------------------------------------------------------------------------------------

    def run(self, operation: Any, args: Sequence[Any], options: Mapping[str, Any]) -> Any:
        """Runs an operation if it concerns no hollow tensor, and writes it down otherwise."""
        tensors = list(tensors_in((args, options)))
        name = torch_internals.operation_name(operation)
        if not any(map(self.is_hollow, tensors)):
            if tensors or not _makes_large_tensors(operation, args, options):
                return operation(*args, **options)
        elif name == "_local_scalar_dense":
            # A number that the model's code asks for.
            return self.value(tensors[0]).item()
        elif torch_internals.returns_view(operation) or torch.Tag.inplace_view in operation.tags:
            # It touches no memory.
            return operation(*args, **options)
        if name in _RESIZES:
            raise CannotDefer(f"{name} gives a tensor other memory")
        return self._write_down(operation, args, options)

    def _write_down(self, operation: Any, args: Sequence[Any], options: Mapping[str, Any]) -> Any:
        changed = torch_internals.changed_tensors(operation, args, options)
        if not all(map(self.is_hollow, changed)):
            name = torch_internals.operation_name(operation)
            raise CannotDefer(f"{name} changes a small tensor by a large one")
        given = {storage_id(each) for each in tensors_in((args, options)) if self.is_hollow(each)}
        written = {storage_id(each) for each in changed}
        replaces = not changed or self._fills(operation, args)
        # As they are now: the layout of a tensor, and the values of a small one, may change later.
        kept_args, kept_options = _mapped(
            lambda each: each.detach() if self.is_hollow(each) else each.clone(), args, options
        )
        state = self._draw(operation, args, options) if _draws(operation) else None
        results = changed[0] if changed else self._hollow_results(operation, args, options)
        made = [] if changed else [each.detach() for each in tensors_in(results)]
        writes = written | {storage_id(each) for each in made}
        reads = given - written if replaces else given
        for storage in writes:
            self._writers[storage].append(len(self._operations))
        self._operations.append(
            _Operation(operation, kept_args, kept_options, made, frozenset(reads), frozenset(writes), replaces, state)
        )
        return results

    def _hollow_results(self, operation: Any, args: Sequence[Any], options: Mapping[str, Any]) -> Any:
        """What a new tensor is made by an operation: found on the meta device."""
        meta_args, meta_options = _mapped(
            lambda each: torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device=_META), args, options
        )
        first = next(tensors_in((args, options)), None)
        device = torch.device(options.get("device") or ("cpu" if first is None else first.device))
        if "device" in options or first is None:
            meta_options["device"] = _META

        def made(result: Tensor) -> Tensor:
            tensor = hollow(result.shape, result.stride(), result.dtype, device)
            self._bytes[storage_id(tensor)] = result.untyped_storage().nbytes()
            return tensor

        return _mapped(made, (operation(*meta_args, **meta_options),), {})[0][0]

    def _fills(self, operation: Any, args: Sequence[Any]) -> bool:
        """Whether an operation replaces all elements of its first argument, whatever these were."""
        if torch_internals.operation_name(operation) not in _FILLS:
            return False
        first, *others = tensors_in(args)
        whole = first.numel() * first.element_size() == self._bytes[storage_id(first)]
        is_alone = all(storage_id(other) != storage_id(first) for other in others)
        return whole and is_alone and is_dense(first.shape, first.stride())

    def _draw(self, operation: Any, args: Sequence[Any], options: Mapping[str, Any]) -> Tensor:
        """Draws what an operation draws, for nothing, and returns the generator's state before."""
        if any(each.device.type != "cpu" for each in tensors_in((args, options))):
            raise CannotDefer("random numbers for a large tensor are drawn on another device than the CPU")
        state: Tensor = (options.get("generator") or torch.default_generator).get_state()
        reads_nothing = torch_internals.operation_name(operation) in _FILLS

        def scratch(tensor: Tensor) -> Tensor:
            if not self.is_hollow(tensor):
                return tensor
            if not reads_nothing:
                return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).zero_()
            # The same memory for all: small objects would else take the place of what is freed, and more be needed.
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            if self._scratch.nbytes < (last + 1) * tensor.element_size():
                self._scratch = torch.empty((last + 1) * tensor.element_size(), dtype=torch.uint8)
            return torch.empty(0, dtype=tensor.dtype).set_(
                self._scratch.untyped_storage(), 0, tensor.shape, tensor.stride()
            )

        real_args, real_options = _mapped(scratch, args, options)
        operation(*real_args, **real_options)
        return state

    # --- computing ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def value(self, tensor: Tensor) -> Tensor:
        """The value of a tensor; itself if it is not hollow."""
        if not self.is_hollow(tensor):
            return tensor.detach()
        target = storage_id(tensor)
        chosen = self._needed_for(target)
        last_use: dict[int, int] = {}
        for index in chosen:
            operation = self._operations[index]
            last_use |= dict.fromkeys(operation.reads | operation.writes, index)
        storages: dict[int, Any] = {}
        for index in chosen:
            self._compute(self._operations[index], storages)
            for storage, last in last_use.items():
                if last == index and storage != target:
                    storages.pop(storage, None)
        return _view(storages[target], tensor)

    def _needed_for(self, storage: int) -> list[int]:
        """Indices of the operations that a storage's value depends on, in order."""
        chosen: set[int] = set()
        pending = [(storage, len(self._operations))]
        while pending:
            wanted, before = pending.pop()
            for index in reversed(self._writers[wanted]):
                if index >= before:
                    continue
                operation = self._operations[index]
                if index not in chosen:
                    chosen.add(index)
                    others = operation.reads if operation.replaces else operation.reads | operation.writes
                    pending += [(each, index) for each in others if each != wanted]
                if operation.replaces:
                    break
        return sorted(chosen)

    def _compute(self, operation: _Operation, storages: dict[int, Any]) -> None:
        def real(tensor: Tensor) -> Tensor:
            if not self.is_hollow(tensor):
                return tensor
            key = storage_id(tensor)
            if key not in storages:
                # It is about to be filled, so what made it did not run.
                new = torch.empty(self._bytes[key], dtype=torch.uint8, device=tensor.device)
                storages[key] = new.untyped_storage()
            return _view(storages[key], tensor)

        args, options = _mapped(real, operation.arguments, operation.options)
        if operation.generator_state is None:
            results = operation.function(*args, **options)
        else:
            generator = options.get("generator") or torch.default_generator
            before = generator.get_state()
            generator.set_state(operation.generator_state)
            try:
                results = operation.function(*args, **options)
            finally:
                generator.set_state(before)
        for made, expected in zip(tensors_in(results) if operation.results else (), operation.results, strict=True):
            if made.stride() != expected.stride():
                raise RuntimeError(f"{operation.function} has made a tensor of another layout than on the meta device")
            storages[storage_id(expected)] = made.untyped_storage()

    def check(self, model: nn.Module) -> None:
        """Checks that nothing of a model but its parameters and buffers is hollow.

        Raises:
            CannotDefer: Something is; the message names it.
        """
        for path, module in model.named_modules():
            for name, value in vars(module).items():
                if name not in _REGISTERED and any(map(self.is_hollow, tensors_in(value))):
                    raise CannotDefer(f"{path or type(module).__name__} keeps tensors in {name}, which is no buffer")

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Gives tensors their values, on this rank; they stay the same objects.

        Args:
            tensors: By name.
        """
        for tensor in tensors.values():
            tensor.data = self.value(tensor)

    def summary(self) -> Tensor:
        """A hash of all draws, which is equal on two ranks that have drawn the same."""
        return digest([each.generator_state for each in self._operations if each.generator_state is not None])


class _Operations(torch_internals.DispatchMode):
    """Gives each operation inside of the context to the deferred tensors."""

    def __init__(self, deferred: DeferredTensors) -> None:
        super().__init__()
        self._deferred = deferred

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch with each operation."""
        return self._deferred.run(func, args, kwargs or {})


class _Readers(TorchFunctionMode):
    """Refuses what would read the memory of a hollow tensor, which has none."""

    def __init__(self, deferred: DeferredTensors) -> None:
        super().__init__()
        self._deferred = deferred

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch with each function of its interface."""
        name = getattr(func, "__name__", "")
        if name in _READERS and any(map(self._deferred.is_hollow, tensors_in(args))):
            raise CannotDefer(f"{name} reads the memory of a large tensor")
        return func(*args, **(kwargs or {}))


def build(make: Callable[[], nn.Module]) -> tuple[nn.Module, DeferredTensors | None]:
    """Builds a model without its large tensors.

    Args:
        make: Makes the model; it seeds what it draws from.

    Returns:
        The model, whose large tensors are hollow, and what computes their values; or a whole model and ``None``, if it
        has no large tensors, or one that can't be computed later, which the log says.
    """
    deferred = DeferredTensors()
    try:
        with deferred.building():
            model = make()
        deferred.check(model)
    except Exception as error:  # a user's model may do anything
        log.info("each rank builds the whole model, since parts of it can't be built alone: %s", described(error))
        return make(), None
    return model, deferred if any(deferred.is_hollow(tensor) for _, tensor in named_tensors(model)) else None


def _draws(operation: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in operation.tags


def _makes_large_tensors(operation: Any, args: Sequence[Any], options: Mapping[str, Any]) -> bool:
    """Whether an operation without tensors as arguments makes one on the CPU that is worth deferring."""
    if not torch_internals.takes_device(operation) or torch.device(options.get("device") or "cpu").type != "cpu":
        return False
    found = tensors_in(operation(*args, **{**options, "device": _META}))
    return sum(each.numel() * each.element_size() for each in found) >= _LEAST_BYTES


def _mapped(
    function: Callable[[Tensor], Tensor], args: Sequence[Any], options: Mapping[str, Any]
) -> tuple[Sequence[Any], dict[str, Any]]:
    """Arguments with the function's result in place of each tensor."""
    return _mapped_value(function, tuple(args)), {name: _mapped_value(function, each) for name, each in options.items()}


def _mapped_value(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    # Not inside of another function, which would refer to itself and keep tensors until garbage is collected.
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)(_mapped_value(function, each) for each in value)
    return value


def _view(storage: Any, tensor: Tensor) -> Tensor:
    """A tensor on a storage, laid out as another one."""
    made = torch.empty(0, dtype=tensor.dtype, device=storage.device)
    return made.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
