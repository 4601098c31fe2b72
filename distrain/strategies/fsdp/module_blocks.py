"""Which modules use which parameters, and the blocks of modules whose parameters are gathered together.

A module's parameters are not always used by the module: a parent reads ``self.embedding.weight``, an attention layer
uses its projection's weight without calling it, a layer is called twice. So the model is observed while it runs. A
parameter belongs to the smallest call of a module that contains all uses of it, and is gathered during that call.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distrain import torch_internals
from distrain.communication.collectives import Communicator
from distrain.errors import described
from distrain.gradients.bucket_sizes import MIB
from distrain.models.meta_device import fast_meta_passes
from distrain.runtime.device import RandomState

log = logging.getLogger(__name__)

#: Samples of the forward pass in which the uses of parameters are observed; BatchNorm needs two.
OBSERVED_SAMPLES = 2
#: Unless it is configured, a block has this part of the model's parameters, and at least so many MiB.
_BLOCK_PART, _LEAST_BLOCK_MB = 1 / 16, 1.0


@dataclass
class Call:
    """A call of a module in the observed passes.

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


def block_limit(block_mb: float | None, model_bytes: float) -> float:
    """Most bytes of a block.

    Args:
        block_mb: As ``strategy.block_mb``.
        model_bytes: Size of all parameters.
    """
    return max(_LEAST_BLOCK_MB * MIB, _BLOCK_PART * model_bytes) if block_mb is None else block_mb * MIB


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


def blocks_of_model(model: nn.Module, root: Call, block_mb: float | None) -> list[ModuleBlock]:
    """Divides a model into blocks.

    Args:
        model: The model.
        root: Its call, as :func:`observe` returns it.
        block_mb: As ``strategy.block_mb``.
    """
    bytes_of = {name: each.numel() * each.element_size() for name, each in model.named_parameters()}
    return choose_blocks(root, bytes_of, block_limit(block_mb, sum(bytes_of.values())))


def agreed(blocks: Sequence[ModuleBlock], ranks: Communicator, device: torch.device) -> list[ModuleBlock]:
    """The blocks of the first rank, since the model may have run in another way on another one.

    Args:
        blocks: This rank's.
        ranks: Those that use the same blocks; they call it together.
        device: On which they communicate.
    """
    plain = {"blocks": [[block.modules, block.parameters] for block in blocks]}
    of_first = ranks.all_gather_json(plain, device)[0]["blocks"]
    return [ModuleBlock(tuple(modules), tuple(parameters)) for modules, parameters in of_first]


def warn_if(problem: str) -> None:
    """Says that a model is one block, if :func:`observe` had a problem."""
    if problem:
        log.warning("the whole model is gathered at once, since a pass of it could not be observed: %s", problem)


def observe(model: nn.Module, inputs: Tensor, *, shapes_only: bool = False) -> tuple[Call, str]:
    """Runs a copy of the model, in training and in evaluation mode, and notes which call uses which parameter.

    A parameter that is not used, because a pass depends on the data, belongs to the call of the model.

    Args:
        model: Its buffers and the generators of random numbers stay as they are.
        inputs: What the model is called with.
        shapes_only: Run the copy on the meta device, since the model has no values.

    Returns:
        The call of the model; and why it could not be observed, in which case all parameters belong to it.
    """
    names = [name for name, _ in model.named_parameters()]
    random_state = RandomState.now()
    try:
        # The copy has buffers of its own and the model's own parameters.
        shared: dict[int, Tensor] = {id(parameter): parameter for parameter in model.parameters()}
        if shapes_only:
            shared = {id(each): _without_values(each) for each in (*model.parameters(), *model.buffers())}
            inputs = inputs.to("meta")
        observed = copy.deepcopy(model, shared)
        observer = _Observer(observed)
        with torch.no_grad(), fast_meta_passes(), torch_internals.observe_operations(observer.note):
            for training in (True, False):
                observer.begin_pass()
                observed.train(training)(inputs.clone())
        return observer.root_call(names), ""
    except Exception as error:  # a user's model may raise anything
        return Call("", parameters=names), described(error)
    finally:
        random_state.restore()


def _without_values(tensor: Tensor) -> Tensor:
    """A tensor on the meta device instead of another one."""
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


class _Observer:
    """Notes uses of parameters while a model runs."""

    def __init__(self, model: nn.Module) -> None:
        # An operation may get a view of a parameter, and several parameters may be views of one tensor.
        self._names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters():
            self._names.setdefault(torch_internals.storage_id(parameter), []).append(name)
        #: The calls that a parameter's uses have in common, from the model's on.
        self._common: dict[str, list[Call]] = {}
        self._root = Call("")
        self._stack: list[Call] = []
        for name, module in model.named_modules():
            module.register_forward_pre_hook(self._begin(name), prepend=True)
            module.register_forward_hook(self._end)

    def begin_pass(self) -> None:
        """Another pass begins, whose calls are those of the pass before where the names of the modules agree."""
        self._stack.clear()
        self._seen: Counter[tuple[int, str]] = Counter()

    def _begin(self, name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            self._stack.append(self._call(self._stack[-1], name) if self._stack else self._root)

        return hook

    def _call(self, parent: Call, name: str) -> Call:
        key = (id(parent), name)
        known = [call for call in parent.calls if call.module == name]
        self._seen[key] += 1
        if self._seen[key] > len(known):
            parent.calls.append(Call(name))
            return parent.calls[-1]
        return known[self._seen[key] - 1]

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._stack.pop()

    def note(self, tensor: Tensor) -> None:
        """The call under way uses a tensor."""
        for name in self._names.get(torch_internals.storage_id(tensor), ()):
            known = self._common.setdefault(name, list(self._stack))
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
