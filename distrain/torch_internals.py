"""What distrain uses of torch without torch having promised it: names that a release may move, rename or take away.

Each function works without the private name too, then more slowly or less precisely, as its docstring says. No other
module of distrain uses a private name of torch.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

if TYPE_CHECKING:
    from torch.nn.modules.batchnorm import _BatchNorm
    from torch.nn.modules.conv import _ConvNd
    from torch.nn.modules.dropout import _DropoutNd
    from torch.nn.modules.instancenorm import _InstanceNorm

    BatchNorm: TypeAlias = _BatchNorm
    Convolution: TypeAlias = _ConvNd
    Dropout: TypeAlias = _DropoutNd
    InstanceNorm: TypeAlias = _InstanceNorm
else:
    # The base classes of all batch normalisations, of all convolutions, and so on.
    BatchNorm = nn.BatchNorm1d.__mro__[1]
    Convolution = nn.Conv1d.__mro__[1]
    Dropout = nn.Dropout.__mro__[1]
    InstanceNorm = nn.InstanceNorm1d.__mro__[1]

try:
    from torch.utils._python_dispatch import TorchDispatchMode

    class DispatchMode(TorchDispatchMode):
        """Base class of what sees every operation inside a block."""

        def __init_subclass__(cls, **options: Any) -> None:
            """Leaves out what torch puts around the method: its compiler, whose import takes a second, shall skip it.

            Where the compiler was imported already, it still does.
            """
            plain = cls.__dict__.get("__torch_dispatch__")
            super().__init_subclass__(**options)  # type: ignore[no-untyped-call]
            skipped = cls.__dict__.get("__torch_dispatch__")
            if plain is None or skipped is None:
                return

            def dispatch(self: Any, *args: Any, **kwargs: Any) -> Any:
                called = skipped if "torch._dynamo" in sys.modules else plain
                return called(self, *args, **kwargs)

            cls.__torch_dispatch__ = dispatch  # type: ignore[method-assign]

        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]

except ImportError:

    class DispatchMode:  # type: ignore[no-redef]
        """Base class of what sees every operation inside a block; fallback: it sees none."""

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            pass


#: torch's own default for gloo's collectives, in seconds.
_DEFAULT_TIMEOUT_SECONDS = 1800.0


# --- tensors ---------------------------------------------------------------------------------------------------------


def foreach_lerp(tensors: list[Tensor], ends: list[Tensor], weight: float) -> None:
    """Moves each tensor towards its end by a share of the difference, in place; fallback: one kernel for each."""
    if hasattr(torch, "_foreach_lerp_"):
        torch._foreach_lerp_(tensors, ends, weight)
        return
    for tensor, end in zip(tensors, ends, strict=True):
        tensor.lerp_(end, weight)


def foreach_copy(tensors: list[Tensor], sources: list[Tensor]) -> None:
    """Copies each source into its tensor; fallback: one kernel for each."""
    if hasattr(torch, "_foreach_copy_"):
        torch._foreach_copy_(tensors, sources)
        return
    for tensor, source in zip(tensors, sources, strict=True):
        tensor.copy_(source)


def foreach(operation: str, tensors: Sequence[Tensor], *others: Any, **options: Any) -> list[Tensor]:
    """An operation on each of several tensors; fallback: one kernel for each.

    Args:
        operation: Name of a method of a tensor, such as ``mul`` or ``mul_``.
        tensors: The tensors.
        *others: Further arguments of the operation: a list has one for each tensor, anything else is that of all.
        **options: Keyword arguments, those of all.

    Returns:
        The results; for an operation in place the tensors.
    """
    kernel = getattr(torch, f"_foreach_{operation}", None)
    if kernel is not None:
        results = kernel(tensors, *others, **options)
        return list(tensors if results is None else results)
    columns = [other if isinstance(other, list) else [other] * len(tensors) for other in others]
    rows = zip(*columns, strict=True) if columns else [()] * len(tensors)
    return [getattr(tensor, operation)(*row, **options) for tensor, row in zip(tensors, rows, strict=True)]


def write_count(tensor: Tensor) -> int:
    """A number that changes when the tensor is written to; fallback: a hash of its values."""
    if hasattr(tensor, "_version"):
        return tensor._version
    return 0 if tensor.is_meta else hash(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())


def is_view(tensor: Tensor) -> bool:
    """Whether autograd knows the tensor as a view of another one; fallback: whether it may be one."""
    return tensor._is_view() if hasattr(tensor, "_is_view") else not tensor.is_leaf


def storage_id(tensor: Tensor) -> int:
    """Identifies the memory that a tensor shares with others; fallback: its address, which meta tensors don't have."""
    storage = tensor.untyped_storage()
    if hasattr(storage, "_cdata"):
        return cast(int, storage._cdata)
    return storage.data_ptr() or id(tensor)


def observe_operations(note: Callable[[Tensor], None]) -> AbstractContextManager[Any]:
    """Inside this context ``note`` is called with each tensor that an operation gets.

    Operations are observed below autograd, so that none behaves differently for it.

    Raises:
        NotImplementedError: This torch can't observe them; its users then do without.
    """
    if not hasattr(DispatchMode, "__torch_dispatch__"):
        raise NotImplementedError(f"torch {torch.__version__} can't observe operations")

    class Observing(DispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            for tensor in tensors_in((args, kwargs)):
                note(tensor)
            return func(*args, **(kwargs or {}))

    return Observing()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in lists, tuples and dictionaries, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def operation_name(operation: Any) -> str:
    """Name of what a :class:`DispatchMode` sees, without namespace and overload; fallback: its text."""
    schema = getattr(operation, "_schema", None)
    return str(operation) if schema is None else str(schema.name).partition("::")[2]


def takes_device(operation: Any) -> bool:
    """Whether what a :class:`DispatchMode` sees can be told a device; fallback: it can't."""
    schema = getattr(operation, "_schema", None)
    return schema is not None and any(argument.name == "device" for argument in schema.arguments)


def returns_view(operation: Any) -> bool:
    """Whether what a :class:`DispatchMode` sees gives other views of the memory of its arguments; fallback: no."""
    schema = getattr(operation, "_schema", None)
    aliases = [] if schema is None else [result.alias_info for result in schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def changed_tensors(operation: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> list[Tensor]:
    """The arguments that what a :class:`DispatchMode` sees writes to; fallback: all of them, as far as one knows."""
    schema = getattr(operation, "_schema", None)
    if schema is None:
        return list(tensors_in((arguments, options)))
    found: list[Tensor] = []
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += tensors_in(arguments[position] if position < len(arguments) else options.get(argument.name))
    return found


# --- modules ---------------------------------------------------------------------------------------------------------


def own_parameter(module: nn.Module, name: str) -> nn.Parameter:
    """A parameter of a module, also where its class has a property of that name; fallback: found in a new list."""
    known = getattr(module, "_parameters", None)
    parameter: nn.Parameter = (known or dict(module.named_parameters(recurse=False)))[name]
    return parameter


def apply_to_tensors(model: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    """Replaces every parameter and buffer by the function's result; parameters stay the same objects.

    Fallback: modules that keep other tensors, or other references to their parameters, are not told.
    """
    if hasattr(model, "_apply"):
        model._apply(function)
        return
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = function(parameter.data)
            if parameter.grad is not None:
                parameter.grad.data = function(parameter.grad.data)
        for module in model.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, function(buffer))


def registered_names(module: nn.Module) -> list[str]:
    """Names of the parameters and buffers that a module holds itself; fallback: only those that are not ``None``."""
    if hasattr(module, "_parameters") and hasattr(module, "_buffers"):
        return [*module._parameters, *module._buffers]
    named = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return [name for name, _ in named]


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module runs more than its ``forward``; fallback: no hook is noticed."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name, None) for name in names)


def loads_in_its_own_way(module: nn.Module) -> bool:
    """Whether hooks or methods of the user's may rename, reshape or add what is loaded; fallback: it is assumed."""
    methods = (getattr(type(module), "_load_from_state_dict", None), type(module).load_state_dict)
    names = ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
    return any(getattr(module, name, True) for name in names) or any(
        method is None or method.__module__.partition(".")[0] != "torch" for method in methods
    )


def has_plain_state(module: nn.Module) -> bool:
    """Whether a module's own state is its parameters and buffers alone, under their names; fallback: it isn't."""
    hooks = ("_state_dict_hooks", "_state_dict_pre_hooks")
    if any(getattr(module, name, True) for name in hooks) or loads_in_its_own_way(module):
        return False
    own, methods = type(module), ("state_dict", "_save_to_state_dict", "get_extra_state")
    return all(getattr(own, name, None) is getattr(nn.Module, name, None) for name in methods)


def set_state_version(module: nn.Module, model: nn.Module) -> None:
    """Gives a module the version that another one's ``state_dict()`` has; fallback: torch's usual one."""
    if hasattr(model, "_version"):
        module._version = model._version


def changes_saved_tensors() -> bool:
    """Whether hooks change what autograd saves, as checkpointing of activations does; fallback: no hook is noticed."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(True) is not None


def state_metadata(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The entries that modules left in a ``state_dict()`` about its format; fallback: none."""
    metadata: Mapping[str, Mapping[str, Any]] = getattr(state, "_metadata", {})
    return {name: dict(entry) for name, entry in metadata.items()}


def set_state_metadata(state: Any, metadata: dict[str, dict[str, Any]]) -> None:
    """Gives a dictionary such entries, for ``load_state_dict()``; a torch that knows none ignores them."""
    state._metadata = metadata


# --- the backward pass in two parts ----------------------------------------------------------------------------------


class SplitBackward:
    """A backward pass in two parts, which goes through the graph for the inputs and once more for the parameters."""

    def stage_backward_input(
        self,
        stage_outputs_or_loss: list[Tensor],
        output_grads: list[Tensor] | None,
        input_values: list[Tensor],
        weights: Iterable[nn.Parameter],
    ) -> tuple[Sequence[Tensor | None], list[dict[str, Any]]]:
        """Returns the inputs' gradients, and what :meth:`stage_backward_weight` needs."""
        gradients = torch.autograd.grad(
            stage_outputs_or_loss, input_values, output_grads, retain_graph=True, allow_unused=True
        )
        return gradients, [{"outputs": stage_outputs_or_loss, "gradients": output_grads}]

    def stage_backward_weight(self, weights: Iterable[nn.Parameter], param_groups: list[dict[str, Any]]) -> None:
        """Adds the parameters' gradients."""
        if parameters := list(weights):
            for group in param_groups:
                torch.autograd.backward(group["outputs"], group["gradients"], inputs=parameters)


class TorchSplitBackward(SplitBackward):
    """Torch's functions of these names, which keep what both parts need; also for a parameter that is used twice.

    Args:
        functions: Torch's module with these functions.
    """

    def __init__(self, functions: Any) -> None:
        self._functions = functions

    @override
    def stage_backward_input(
        self,
        stage_outputs_or_loss: list[Tensor],
        output_grads: list[Tensor] | None,
        input_values: list[Tensor],
        weights: Iterable[nn.Parameter],
    ) -> tuple[Sequence[Tensor | None], list[dict[str, Any]]]:
        found: tuple[Sequence[Tensor | None], list[dict[str, Any]]] = self._functions.stage_backward_input(
            stage_outputs_or_loss, output_grads, input_values, weights
        )
        return found

    @override
    def stage_backward_weight(self, weights: Iterable[nn.Parameter], param_groups: list[dict[str, Any]]) -> None:
        # The way from one use of a parameter to an earlier one goes through what other groups need too. All of the
        # earlier one's gradient is known, so what comes that way must not be added (old releases of torch do).
        several = [group for group in param_groups if len(group["intermediates"]) > 1]
        uses = [use for group in several for use in zip(group["intermediates"], group["grads"], strict=True)]
        handles = [node.register_prehook(lambda _, known=gradients: known) for node, gradients in uses]
        try:
            self._functions.stage_backward_weight(weights, param_groups, retain_graph=bool(several))
        finally:
            for handle in handles:
                handle.remove()


def split_backward() -> SplitBackward:
    """Returns torch's functions of these names; fallback: :class:`SplitBackward`.

    Importing torch's takes a second, since it imports all of torch's pipelining with compiler and export.
    """
    try:
        from torch.distributed.pipelining import _backward
    except ImportError:
        return SplitBackward()
    known = hasattr(_backward, "stage_backward_input") and hasattr(_backward, "stage_backward_weight")
    return TorchSplitBackward(_backward) if known else SplitBackward()


# --- process groups --------------------------------------------------------------------------------------------------


def group_store(group: dist.ProcessGroup) -> Any:
    """The store of a process group.

    Raises:
        OSError: This torch does not tell it; its users then do without.
    """
    get: Callable[[dist.ProcessGroup], Any] | None = getattr(dist.distributed_c10d, "_get_process_group_store", None)
    if get is None:
        raise OSError(f"torch {torch.__version__} does not tell the store of a process group")
    return get(group)


def group_timeout(group: dist.ProcessGroup) -> float:
    """Timeout of the group's collectives on the CPU, in seconds; fallback: torch's default."""
    options = None
    if hasattr(group, "_get_backend"):
        options = getattr(group._get_backend(torch.device("cpu")), "options", None)
    timeout = getattr(options, "_timeout", None)
    return timeout.total_seconds() if isinstance(timeout, datetime.timedelta) else _DEFAULT_TIMEOUT_SECONDS


# --- data loading ----------------------------------------------------------------------------------------------------


def loader_processes(iterator: Any) -> list[Any]:
    """The worker processes of a data loader's iterator; fallback: none, so that one that dies is not explained."""
    return list(getattr(iterator, "_workers", ()))
