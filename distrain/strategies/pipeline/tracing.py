"""Records what a model's forward pass does, so that it can be repeated in parts.

The model runs for real, in its own mode, on a few samples. A module is *opened* if what its ``forward`` does is
recorded: which submodules and functions of torch it calls with which tensors. Any other module is called as a whole, by
its own code. That is the case for modules without submodules, for torch's layers, and for each module that does what a
record can't repeat: it decides by values (``if x.sum() > 0``), changes its attributes or buffers, draws numbers by
Python, or uses what torch's functions don't show (``torch.autograd.Function``, say).

Shapes, types and numbers that the forward pass computes from them are those of the samples. Two records with different
numbers of samples show which integers depend on that number.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from distrain import torch_internals
from distrain.models.outputs import trained_outputs
from distrain.strategies.pipeline.calls import (
    Call,
    Fixed,
    State,
    Trace,
    Untraceable,
    Value,
    ValueInfo,
    function_name,
    generalise,
    is_plain,
    leaves_of,
    map_leaves,
    tensors_of,
)
from distrain.strategies.pipeline.watched_modes import watched_modes

#: Layers of torch with submodules that users think of as models.
_OPENED: tuple[type[nn.Module], ...] = (
    nn.Sequential, nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder, nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)  # fmt: skip
#: Functions whose results depend on a tensor's values and are no tensors.
_READING = {
    "bool", "item", "tolist", "numpy", "int", "float", "index", "complex", "array", "contains", "equal", "allclose",
    "is_nonzero",
}  # fmt: skip
#: What may be asked of a tensor, since it depends on shapes and formats alone; so do all names with ``is_``.
_ASKING = {
    "shape", "size", "dim", "ndim", "ndimension", "numel", "nelement", "stride", "dtype", "device", "layout", "len",
    "requires_grad", "element_size", "itemsize", "nbytes", "storage_offset", "get_device", "names", "grad_fn", "type",
    "_version", "hash", "repr", "format", "str", "dir", "grad", "sizeof", "result_type", "can_cast", "broadcast_shapes",
    "get_default_dtype", "name",
}  # fmt: skip
_DRAWING = ("rand", "bernoulli", "normal", "multinomial", "poisson", "empty", "uniform", "exponential", "geometric",
            "cauchy", "log_normal", "dropout", "alpha_dropout", "feature_", "gumbel", "rrelu")  # fmt: skip
#: Where lines of code are that a user can't change.
_NOT_USERS = (torch.__path__[0], str(Path(__file__).parents[2]), "<")
#: Most modules that are found to be untraceable before this gives up.
_MOST_ATTEMPTS = 200


def record(
    model: nn.Module, images: tuple[Tensor, Tensor], closed: dict[str, str], still: Set[str], *, auxiliary: bool
) -> Trace:
    """Records forward passes over two numbers of samples, in the mode in which the model is.

    Args:
        model: The model; a copy, since the passes may change its buffers.
        images: Two inputs, with different numbers of samples.
        closed: Why modules must not be opened, by name; what is found out is added.
        still: Names of modules whose mode may differ from the model's; they are not opened if their mode is looked at.
        auxiliary: Whether outputs of auxiliary heads are needed besides the logits.

    Returns:
        What both have in common. Shapes are those of the first.

    Raises:
        Untraceable: The model's own ``forward`` can't be repeated.
    """
    sizes = (len(images[0]), len(images[1]))
    for _ in range(_MOST_ATTEMPTS):
        try:
            first, second = (_Recorder(model, closed, still).run(each, auxiliary) for each in images)
            trace = _common(first, second, sizes)
            trace.closed = closed
            return trace
        except Untraceable as error:
            if not error.module:
                raise
            close(model, closed, error.module, f"{error.problem}{error.place and ' at '}{error.place}")
    raise Untraceable(f"more than {_MOST_ATTEMPTS} of its modules can't be traced")


def close(model: nn.Module, closed: dict[str, str], name: str, reason: str) -> None:
    """Notes that a module is to be called as a whole, and so are all others of its class."""
    kind = type(model.get_submodule(name))
    for other, module in model.named_modules():
        if other and type(module) is kind and kind is not nn.Sequential:
            closed.setdefault(other, reason)
    closed.setdefault(name, reason)


class _Recorder(TorchFunctionMode):
    """Records one forward pass."""

    def __init__(self, model: nn.Module, closed: dict[str, str], still: Set[str]) -> None:
        super().__init__()
        self._model, self._closed, self._still = model, closed, still
        self._names = {id(module): name for name, module in model.named_modules()}
        named = [*model.named_parameters(), *model.named_buffers()]
        self._states = {id(tensor): name for name, tensor in named}
        self._fixed = _attribute_tensors(model)
        saved = model.state_dict()
        self._constants = {*self._fixed, *(id(buffer) for name, buffer in model.named_buffers() if name not in saved)}
        # All tensors are kept, so that no other one gets their ids; a forward pass may replace a buffer.
        self._states_kept = [tensor for _, tensor in named]
        self._kept: list[Tensor] = []
        self._numbers: dict[int, int] = {}
        self._infos: list[ValueInfo] = []
        self._open: list[Call] = []
        self._paused = False
        self._thread = threading.get_ident()
        self._ambient: tuple[Any, ...] = ()

    def run(self, images: Tensor, auxiliary: bool) -> Trace:
        """Runs the model."""
        self._new_value(images, needs_input=True)
        self._ambient = _surroundings(images)
        modes = watched_modes(self._refuse_mode) if self._still else contextlib.nullcontext()
        with self._observing(), modes, self:
            result = self._model(images)
        return Trace(self._root, self._encode(trained_outputs(result, auxiliary=auxiliary)), self._infos)

    @contextlib.contextmanager
    def _observing(self) -> Iterator[None]:
        """Calls of modules and of the user's autograd functions, which no mode sees, come to this recorder."""
        call, function = nn.Module.__call__, torch.autograd.Function
        apply = vars(function)["apply"]

        def observed_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self._call_module(call, module, args, kwargs)

        def observed_apply(kind: type, *args: Any, **kwargs: Any) -> Any:
            if self._is_recording():
                raise Untraceable(f"{kind.__name__} is an autograd.Function", _users_line())
            return apply.__get__(None, kind)(*args, **kwargs)

        nn.Module.__call__ = observed_call  # type: ignore[method-assign]
        function.apply = classmethod(observed_apply)  # type: ignore[assignment]
        try:
            yield
        finally:
            nn.Module.__call__ = call  # type: ignore[method-assign]
            function.apply = apply  # type: ignore[method-assign]

    def _refuse_mode(self, module: nn.Module) -> None:
        if self._is_recording() and self._names.get(id(module)) in self._still:
            raise Untraceable("it looks at the mode (training) of a module that is frozen", _users_line())

    def _is_recording(self) -> bool:
        """Whether code of an opened module runs, in the thread that records."""
        return not self._paused and bool(self._open) and threading.get_ident() == self._thread

    # --- modules -----------------------------------------------------------------------------------------------------

    def _call_module(self, call: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        name = self._names.get(id(module))
        if self._paused or threading.get_ident() != self._thread or name is None:
            return call(module, *args, **kwargs)
        # What this class does with tensors is no part of the record.
        self._paused = True
        try:
            if not name or self._opens(module, name):
                return self._call_opened(call, module, name, args, kwargs)
            place = _users_line()
            self._check_surroundings(place)
            encoded, counts = self._encode((args, kwargs)), _write_counts((args, kwargs))
            result = call(module, *args, **kwargs)
            self._add(name, encoded, result, place, _written(counts), needs_input=True)
            return result
        finally:
            self._paused = False

    def _opens(self, module: nn.Module, name: str) -> bool:
        if name in self._closed:
            return False
        if next(module.children(), None) is None or hasattr(module, "parametrizations"):
            return False
        if type(module).__module__.startswith("torch.nn.") and type(module) not in _OPENED:
            return False
        if isinstance(module, torch.jit.ScriptModule):
            return False
        problem = ""
        if torch_internals.has_hooks(module):
            problem = "it has hooks"
        elif not torch_internals.has_plain_state(module):
            problem = "it loads or saves its state in its own way"
        if problem:
            self._closed[name] = problem
        return not problem

    def _call_opened(self, call: Callable[..., Any], module: nn.Module, name: str, args: Any, kwargs: Any) -> Any:
        within = str(self._open[-1].target) if self._open else ""
        self._check_surroundings(_users_line())
        frame = Call(name, within, None, [], torch.is_grad_enabled(), _users_line(), calls=[])
        with contextlib.suppress(Untraceable):
            # What it does with them is recorded; if it does what can't be, this fails there.
            frame.arguments = self._encode((args, kwargs))
        before, drawn = _Attributes(module), _python_draws()
        self._open.append(frame)
        try:
            result = self._observed(call, module, args, kwargs)
            if changed := before.changed():
                raise Untraceable(f"its forward changes its own {changed}", _forward_of(module))
            if _python_draws() != drawn:
                raise Untraceable("its forward draws numbers by Python's or numpy's generator", _forward_of(module))
        except Untraceable as error:
            error.module = name if error.module is None else error.module
            raise
        except Exception as error:  # a user's forward may not stand being observed
            problem = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise Untraceable(problem, _place_of(error), name) from error
        finally:
            self._open.pop()
        frame.results = [self._numbers.get(id(tensor)) for tensor in tensors_of(result)]
        if self._open:
            parent = self._open[-1].calls
            assert parent is not None
            parent.append(frame)
        else:
            self._root = frame
        return result

    def _observed(self, call: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        self._paused = False
        try:
            return call(module, *args, **kwargs)
        finally:
            self._paused = True

    # --- functions ---------------------------------------------------------------------------------------------------

    @override
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._is_recording():
            return func(*args, **kwargs)
        name = function_name(func)
        given = tensors_of((args, kwargs))
        if name in _READING and any(self._needs_input(tensor) for tensor in given):
            written = {"bool": "a decision depends on", "contains": "a decision depends on"}
            raise Untraceable(f"{written.get(name, f'{name}() reads')} a tensor's values", _users_line())
        counts = _write_counts((args, kwargs))
        result = func(*args, **kwargs)
        written_to = _written(counts)
        results = tensors_of(result)
        if not results and not written_to and not (name.startswith("_assert") and given):
            if result is not None and given and not self._may_ask(name, given):
                raise Untraceable(f"{name}() returns a {type(result).__name__}, not a tensor", _users_line())
            return result
        place = _users_line()
        self._check_surroundings(place)
        needs_input = name.lstrip("_").startswith(_DRAWING) or any(self._needs_input(tensor) for tensor in given)
        self._add(func, self._encode((args, kwargs)), result, place, written_to, needs_input=needs_input)
        return result

    def _may_ask(self, name: str, given: list[Tensor]) -> bool:
        return name in _ASKING or name.startswith("is_") or not any(self._needs_input(tensor) for tensor in given)

    def _needs_input(self, tensor: Tensor) -> bool:
        if id(tensor) in self._constants:
            return False
        number = self._numbers.get(id(tensor))
        return number is None or self._infos[number].needs_input

    def _check_surroundings(self, place: str) -> None:
        if _surroundings(self._kept[0]) != self._ambient:
            raise Untraceable("it changes autocast, or what is saved for the backward pass (checkpoint)", place)

    # --- values ------------------------------------------------------------------------------------------------------

    def _add(
        self,
        target: str | Callable[..., Any],
        arguments: Any,
        result: Any,
        place: str,
        writes: frozenset[int],
        *,
        needs_input: bool,
    ) -> None:
        numbers: list[int | None] = []
        for tensor in tensors_of(result):
            if id(tensor) in self._states or id(tensor) in self._fixed:
                numbers.append(None)
                continue
            # An operation in place, or one with nothing to do, returns what it was given.
            if id(tensor) not in self._numbers:
                self._new_value(tensor, needs_input=needs_input)
            numbers.append(self._numbers[id(tensor)])
        if needs_input and writes:
            # What was the same in each forward pass is so no longer.
            for number, info in enumerate(self._infos):
                if info.memory in writes and not info.needs_input:
                    self._infos[number] = ValueInfo(info.shape, info.dtype, info.memory, needs_input=True)
        frame = self._open[-1]
        assert isinstance(frame.target, str) and frame.calls is not None
        gradient = torch.is_grad_enabled()
        frame.calls.append(Call(target, frame.target, arguments, numbers, gradient, place, writes=writes))

    def _new_value(self, tensor: Tensor, *, needs_input: bool) -> None:
        self._kept.append(tensor)
        self._numbers[id(tensor)] = len(self._infos)
        memory = torch_internals.storage_id(tensor)
        self._infos.append(ValueInfo(tensor.shape, tensor.dtype, memory, needs_input))

    def _encode(self, value: Any) -> Any:
        """The nested value with references in place of tensors.

        Raises:
            Untraceable: It holds a tensor of unknown origin, or an object that may be another one in the next pass.
        """

        def encoded(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                if id(leaf) in self._numbers:
                    return Value(self._numbers[id(leaf)])
                if id(leaf) in self._states:
                    return State(self._states[id(leaf)])
                if id(leaf) in self._fixed:
                    return Fixed(leaf)
                raise Untraceable("it uses a tensor that no function of torch has made", _users_line())
            if not is_plain(leaf):
                raise Untraceable(f"it passes on a {type(leaf).__name__}, which may hold tensors", _users_line())
            return leaf

        return map_leaves(value, encoded)


def _surroundings(tensor: Tensor) -> tuple[Any, ...]:
    """What a ``with`` statement of the user's may change besides the recording of gradients."""
    kind = tensor.device.type
    enabled = kind != "meta" and torch.is_autocast_enabled(kind)
    return enabled, torch.get_autocast_dtype(kind) if enabled else None, torch_internals.changes_saved_tensors()


def _write_counts(value: Any) -> list[tuple[Tensor, int]]:
    return [(tensor, torch_internals.write_count(tensor)) for tensor in tensors_of(value)]


def _written(counts: list[tuple[Tensor, int]]) -> frozenset[int]:
    changed = (tensor for tensor, count in counts if torch_internals.write_count(tensor) != count)
    return frozenset(torch_internals.storage_id(tensor) for tensor in changed)


def _attribute_tensors(model: nn.Module) -> dict[int, Tensor]:
    """Tensors that modules hold as plain attributes, also in containers, by id."""
    values = (value for module in model.modules() for key, value in vars(module).items() if not key.startswith("_"))
    found: dict[int, Tensor] = {}
    for value in values:
        for leaf in leaves_of(value):
            if isinstance(leaf, Tensor):
                found[id(leaf)] = leaf
    return found


class _Attributes:
    """A module's attributes, parameters and buffers at a moment; not those of its submodules."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._before = self._now()
        # Kept, so that no other object gets their ids.
        self._kept = list(leaves_of(vars(module)))

    def _now(self) -> dict[str, Any]:
        now: dict[str, Any] = {}
        for name, value in vars(self._module).items():
            registered = name in ("_parameters", "_buffers", "_modules")
            now |= {key: _identity(item) for key, item in (value.items() if registered else [(name, value)])}
        return now

    def changed(self) -> str:
        """The first attribute that is another one now; empty if none is."""
        now = self._now()
        return next((name for name in {**self._before, **now} if self._before.get(name) != now.get(name)), "")


def _identity(value: Any) -> Any:
    """What differs once a value, or what a container holds, is another one or is written into."""
    if isinstance(value, Tensor):
        return id(value), torch_internals.write_count(value)
    if isinstance(value, dict):
        return {key: _identity(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_identity(item) for item in value]
    return value if isinstance(value, bool | int | float | str) else id(value)


def _python_draws() -> int:
    numpy = sys.modules.get("numpy")
    state = numpy.random.get_state()[1:3] if numpy is not None else ()
    return hash((random.getstate(), *((state[0].tobytes(), state[1]) if state else ())))


# --- lines of the user's code ----------------------------------------------------------------------------------------


def _users_line() -> str:
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(_NOT_USERS):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else ""


def _place_of(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_NOT_USERS)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def _forward_of(module: nn.Module) -> str:
    code = getattr(type(module).forward, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else ""


# --- two sizes -------------------------------------------------------------------------------------------------------


def _common(first: Trace, second: Trace, sizes: tuple[int, int]) -> Trace:
    root = _common_call(first.root, second.root, sizes, "")
    try:
        output = generalise(first.output, second.output, sizes)
    except ValueError as error:
        raise Untraceable(f"its output has {error}", root.place) from error
    values = [_with_batch(*pair, sizes) for pair in zip(first.values, second.values, strict=True)]
    return Trace(root, output, values)


def _with_batch(first: ValueInfo, second: ValueInfo, sizes: tuple[int, int]) -> ValueInfo:
    """The first; without a shape if not its first dimension, and that alone, is the number of samples."""
    by_sample = first.shape[:1] == sizes[:1] and second.shape[:1] == sizes[1:] and first.shape[1:] == second.shape[1:]
    return first if by_sample else ValueInfo(torch.Size(), first.dtype, first.memory, first.needs_input)


def _common_call(first: Call, second: Call, sizes: tuple[int, int], within: str) -> Call:
    """The calls of two passes in one.

    Raises:
        Untraceable: They do different things; it names the innermost module whose ``forward`` does.
    """

    def differs(problem: object, module: str) -> Untraceable:
        return Untraceable(f"it depends on the number of samples: {problem}", first.place, module)

    if first.target != second.target or (first.calls is None) != (second.calls is None):
        raise differs(f"{first.label} with {sizes[0]} and {second.label} with {sizes[1]}", within)
    name = within if first.calls is None else str(first.target)
    common = Call(first.target, first.within, None, first.results, first.records_gradient, first.place)
    common.writes = first.writes
    if first.calls is not None and second.calls is not None:
        for pair in zip(first.calls, second.calls, strict=False):
            inner = _common_call(*pair, sizes, name)
            common.calls = [*(common.calls or []), inner]
        if len(first.calls) != len(second.calls):
            raise differs("it calls more functions with more samples", name)
        common.calls = common.calls or []
    if first.results != second.results or first.records_gradient != second.records_gradient:
        raise differs(first.label, name)
    try:
        common.arguments = generalise(first.arguments, second.arguments, sizes)
    except ValueError as error:
        if first.calls is None:
            raise differs(error, name) from error
    return common
