"""The blocks of a model that can be computed again, and what each keeps and takes, seen while the model runs.

The blocks of a sequence are those at which a pipeline splits it; of other models, the layers (modules in lists and
sequences) that ``optimizer.layer_decay`` counts.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distrain import torch_internals
from distrain.errors import ConfigError
from distrain.models.base import is_sequence
from distrain.models.layers import layer_modules
from distrain.runtime.device import RandomState, seed_everything, synchronize
from distrain.runtime.live_memory import LiveMemory
from distrain.strategies.trial_copy import restored
from distrain.torch_internals import tensors_in

Autocast = Callable[[], AbstractContextManager[Any]]

#: Forward passes that are timed.
_REPEATS = 3
#: A block that keeps less than this share of what it gets, beyond what it gets and returns, is not worth it.
_LEAST_SHARE = 1 / 16


@dataclass
class Passage:
    """A call of a block, or what runs between two such calls.

    Attributes:
        name: The block's name; empty for what is outside of blocks, which is never computed again.
        given: Size of each storage that the call gets.
        kept: Size of each storage that autograd keeps for its backward pass.
        returned: The storages of its result.
        writes_input: Whether the call, or what comes after it, writes to what it gets.
        seconds: Of its forward pass.
        extra: Most bytes that are held during its passes, beyond what it and the calls before it keep or get.
    """

    name: str
    given: dict[int, int] = field(default_factory=dict)
    kept: dict[int, int] = field(default_factory=dict)
    returned: set[int] = field(default_factory=set)
    writes_input: bool = False
    seconds: float = 0.0
    extra: float = 0.0

    @property
    def saves(self) -> bool:
        """Whether less memory is held if it is computed again."""
        more = sum(self.kept[storage] for storage in self.kept.keys() - self.given.keys() - self.returned)
        return bool(self.name) and not self.writes_input and more > _LEAST_SHARE * sum(self.given.values())


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks by name, in the model's order; one that the model uses twice is there once."""
    found = dict(model.named_children()) if is_sequence(model) else layer_modules(model)
    # A module of TorchScript has no class of its own.
    return {name: block for name, block in found.items() if not isinstance(block, torch.jit.ScriptModule)}


def examine(model: nn.Module, inputs: Tensor, autocast: Autocast) -> list[Passage]:
    """Runs a forward pass in training mode; the model stays as it is.

    Args:
        model: The model.
        inputs: ``[N, …]``; at least two samples, which BatchNorm needs.
        autocast: Context of the pass.

    Returns:
        The calls of blocks, and what is between them, in their order.
    """
    with _trial(model) as trial:
        return _Structure(trial, inputs).run(autocast)


def examine_costs(model: nn.Module, few: Tensor, many: Tensor, autocast: Autocast, samples: int) -> list[Passage]:
    """As :func:`examine`, with times and with sizes for a number of samples.

    Args:
        model: The model.
        few: Inputs of a few samples.
        many: Inputs of more samples; their passes are timed.
        autocast: Context of the passes.
        samples: Of the passes for which sizes are wanted.
    """
    with _trial(model) as trial:
        passages = _Structure(trial, many).run(autocast)
        runs = [_Times(trial, many).seconds(autocast) for _ in range(_REPEATS)]
        peaks = {len(inputs): _Peaks(trial, inputs).peaks(autocast) for inputs in (few, many)}
    if {*map(len, runs), *map(len, peaks.values())} != {len(passages)}:
        problem = "the model calls other blocks in one forward pass than in another, so their costs can't be measured"
        raise ConfigError("model.checkpoint_activations", "auto", problem, ["none", "all", "a number N"])
    held = sizes_held(passages, frozenset())
    extras = {
        size: [max(peak - size / len(many) * share, 0.0) for peak, share in zip(of_size, held, strict=True)]
        for size, of_size in peaks.items()
    }
    for index, passage in enumerate(passages):
        # Other work on the machine makes single calls longer, and none shorter.
        passage.seconds = min(seconds[index] for seconds in runs) * samples / len(many)
        passage.extra = _line({size: extra[index] for size, extra in extras.items()}, samples)
        for sizes in (passage.given, passage.kept):
            for storage, size in sizes.items():
                sizes[storage] = round(size * samples / len(many))
    return passages


def _line(values: Mapping[int, float], at: int) -> float:
    """The value at some number, on the line through two others; not below 0."""
    (low, first), (high, last) = min(values.items()), max(values.items())
    slope = (last - first) / (high - low) if high > low else first / low
    return max(first + slope * (at - low), 0.0)


@contextlib.contextmanager
def _trial(model: nn.Module) -> Iterator[nn.Module]:
    """A copy of the model in training mode, with buffers of its own and the model's parameters, with gradients."""
    state = RandomState.now()
    try:
        trial = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
        keep: AbstractContextManager[Any] = contextlib.nullcontext()
    except Exception:  # copying a user's module may raise anything
        trial, keep = model, restored(model)
    with keep:
        # As in a training, where gradients have their memory all the time.
        gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
        for parameter, _ in gradients:
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        try:
            yield trial.train()
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            state.restore()


class _Watched:
    """A model whose blocks say when they are called."""

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        self._model, self._inputs = model, inputs
        self._hooks: list[Any] = []

    def begin(self, name: str, given: list[Tensor]) -> None:
        """A block is called."""

    def end(self, returned: list[Tensor]) -> None:
        """It has returned."""

    def forward(self, autocast: Autocast) -> Any:
        """Runs the model on a copy of the inputs, into which it may write."""
        inputs = self._inputs.clone()
        # A model that leaves out blocks by chance leaves out the same ones in each pass.
        seed_everything(0)
        try:
            for name, block in blocks_of(self._model).items():
                before = block.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: self.begin(name, list(tensors_in((args, kwargs)))),
                    with_kwargs=True,
                )
                after = block.register_forward_hook(lambda _, args, result: self.end(list(tensors_in(result))))
                self._hooks += [before, after]
            with autocast(), torch.enable_grad():
                return self._model(inputs)
        finally:
            for hook in self._hooks:
                hook.remove()


class _Structure(_Watched):
    """What blocks get and keep."""

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        super().__init__(model, inputs)
        self._passages = [Passage("")]
        #: Memory that is there without any pass.
        self._known = {torch_internals.storage_id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._given: list[tuple[Passage, list[tuple[Tensor, int]]]] = []

    def run(self, autocast: Autocast) -> list[Passage]:
        """The calls in their order."""
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
            result = self.forward(autocast)
        for passage, given in self._given:
            passage.writes_input = any(torch_internals.write_count(tensor) != count for tensor, count in given)
        # The graph has kept all storages until here, so that no two have the same id.
        del result
        return self._passages

    def begin(self, name: str, given: list[Tensor]) -> None:
        passage = Passage(name, self._sizes(given))
        self._given.append((passage, [(tensor, torch_internals.write_count(tensor)) for tensor in given]))
        self._passages.append(passage)

    def end(self, returned: list[Tensor]) -> None:
        self._passages[-1].returned = set(self._sizes(returned))
        self._passages.append(Passage(""))

    def _keep(self, tensor: Tensor) -> Tensor:
        self._passages[-1].kept |= self._sizes([tensor])
        return tensor

    def _sizes(self, tensors: list[Tensor]) -> dict[int, int]:
        sizes = {
            torch_internals.storage_id(each): each.untyped_storage().nbytes()
            for each in tensors
            if each.layout == torch.strided
        }
        return {storage: size for storage, size in sizes.items() if storage not in self._known}


class _Peaks(_Watched):
    """The most memory that is held during each call's passes."""

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        super().__init__(model, inputs)
        self._live = LiveMemory(inputs.device)
        self._peaks = [0]
        #: The call whose forward or backward pass is under way.
        self._current = 0

    def peaks(self, autocast: Autocast) -> list[int]:
        """Bytes, by the number of the call."""
        with self._live:
            result = self.forward(autocast)
            roots = [tensor for tensor in tensors_in(result) if tensor.requires_grad]
            self._move(len(self._peaks) - 1)
            torch.stack([root.float().sum() for root in roots]).sum().backward()
            self._move(0)
        return self._peaks

    def begin(self, name: str, given: list[Tensor]) -> None:
        self._open()

    def end(self, returned: list[Tensor]) -> None:
        index = self._current
        for tensor in returned:
            if tensor.requires_grad:
                # Called when the gradient of this call's result is complete.
                tensor.register_hook(lambda _: self._move(index))
        self._open()

    def _open(self) -> None:
        self._peaks.append(0)
        self._move(len(self._peaks) - 1)

    def _move(self, index: int) -> None:
        self._peaks[self._current] = max(self._peaks[self._current], self._live.restart_peak())
        self._current = index


class _Times(_Watched):
    """When calls of blocks begin and end."""

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        super().__init__(model, inputs)
        self._seconds = [0.0]

    def seconds(self, autocast: Autocast) -> list[float]:
        """Of each call's forward pass; 0 for what is between calls."""
        self.forward(autocast)
        return self._seconds

    def begin(self, name: str, given: list[Tensor]) -> None:
        self._begun = self._now()

    def end(self, returned: list[Tensor]) -> None:
        self._seconds += [self._now() - self._begun, 0.0]

    def _now(self) -> float:
        synchronize(self._inputs.device)
        return time.perf_counter()


def sizes_held(passages: list[Passage], recomputed: frozenset[str]) -> list[int]:
    """Bytes that are held while the backward pass of each call begins, without what it needs in passing.

    Args:
        passages: The calls.
        recomputed: Names of the blocks that are computed again.
    """
    held: set[int] = set()
    size, found = 0, []
    for passage in passages:
        again = passage.name in recomputed
        # In its own backward pass a block that is computed again holds what it would have kept.
        whole = passage.kept if not again else {**passage.given, **passage.kept}
        found.append(size + sum(bytes_ for storage, bytes_ in whole.items() if storage not in held))
        for storage, bytes_ in (passage.given if again else passage.kept).items():
            if storage not in held:
                held.add(storage)
                size += bytes_
    return found


def peak_of(passages: list[Passage], recomputed: frozenset[str]) -> float:
    """Most bytes that are held during a forward and a backward pass; arguments as for :func:`sizes_held`."""
    held = sizes_held(passages, recomputed)
    return max(size + passage.extra for size, passage in zip(held, passages, strict=True))
