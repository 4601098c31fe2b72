"""What is known of a model's blocks without timing them: sizes, operations, and where a pipeline may be cut."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import flop_registry
from typing_extensions import override

from distrain.communication.collectives import Communicator
from distrain.errors import ConfigError, first_line
from distrain.models.meta_device import fast_meta_passes
from distrain.runtime.live_memory import LiveMemory
from distrain.strategies.pipeline import split
from distrain.strategies.pipeline.blocks import named_blocks, trace_blocks
from distrain.strategies.pipeline.options import PipelineConfig
from distrain.strategies.precision import Precision
from distrain.strategies.trial_copy import trial_copy
from distrain.tools.planning.workload import BlockMemory, BlockProfile
from distrain.torch_internals import BatchNorm, DispatchMode, storage_id, tensors_in

log = logging.getLogger(__name__)

_ModuleT = TypeVar("_ModuleT", bound=nn.Module)
_ResultT = TypeVar("_ResultT")


@dataclass(frozen=True)
class BlockStructure:
    """One block of a model.

    Attributes:
        gradients: Bytes of the gradient of each trained parameter, in the model's order.
        state_bytes: Bytes of all its parameters and buffers, also of those that are not trained.
        flops: Floating-point operations of a forward pass of one sample.
        saved_bytes: What autograd saves for a backward pass of one sample. What several blocks save counts for the
            first one.
        batchnorms: BatchNorm layers.
        kernels: Operations of a forward pass that compute something, each of which is a kernel on a GPU.
        extra_bytes: Most bytes that are held during the block's passes, of all samples, beyond what it and the blocks
            before it have saved: outputs and gradients on their way.
        saves_output: Whether its output is among what it saves, and not among what the next block does.
        saves_input: Whether its input is among what it saves, and not among what blocks before do.
        extra_bytes_at_end: As ``extra_bytes``, if its output and its gradient are held during its whole backward pass.
        batchnorm_gradients: For each trained BatchNorm layer, which of ``gradients`` is its first one.
    """

    gradients: tuple[int, ...]
    state_bytes: int
    flops: float
    saved_bytes: float
    batchnorms: int
    kernels: int
    extra_bytes: int = 0
    saves_output: bool = False
    saves_input: bool = False
    extra_bytes_at_end: int = 0
    batchnorm_gradients: tuple[int, ...] = ()

    @classmethod
    def of_plain(cls, values: Mapping[str, Any]) -> BlockStructure:
        """A block from its attributes as JSON holds them, without tuples."""
        own: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**own)

    def profile(
        self, name: str, forward: Mapping[int, float], backward: Mapping[int, float], memory: Mapping[str, BlockMemory]
    ) -> BlockProfile:
        """The block with what was measured of it, but without what it hands over.

        Args:
            name: Its name in the model.
            forward: Seconds of a forward pass by number of samples.
            backward: Seconds of a backward pass by number of samples.
            memory: As :func:`memory_of` returns it.
        """
        return BlockProfile(
            name,
            self.gradients,
            forward,
            backward,
            self.saved_bytes,
            flops=self.flops,
            batchnorms=self.batchnorms,
            state_bytes=self.state_bytes,
            kernels=self.kernels,
            saves_output=self.saves_output,
            saves_input=self.saves_input,
            memory=memory,
            batchnorm_gradients=self.batchnorm_gradients,
        )


class _FlopCounter(DispatchMode):
    """Counts floating-point operations by torch's formulas; torch's own counter imports the compiler."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch instead of each operation."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        return result


class _KernelCounter(TorchFunctionMode):
    """Counts functions whose result is a tensor in new memory: about as many kernels run on a device."""

    count = 0

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage_id(tensor) for tensor in args if isinstance(tensor, Tensor)}
        self.count += isinstance(result, Tensor) and storage_id(result) not in given
        return result


def structures(
    sequence: nn.Sequential,
    inputs: Tensor,
    precision: Precision,
    change: Callable[[nn.Module], object] | None = None,
    *,
    needs_values: bool = True,
) -> list[BlockStructure]:
    """Runs a forward and a backward pass of a copy of the model, and looks at each block.

    Args:
        sequence: The model as a sequence of blocks.
        inputs: The model's inputs, ``[N, …]``; blocks may write into them.
        precision: Of the forward pass.
        change: Changes the copy before.
        needs_values: Whether tensors have values. Without them nothing is computed, which saves seconds where passes
            are long; a model that then fails is given values.
    """

    def look(model: nn.Module, given: Tensor) -> list[BlockStructure]:
        with trial_copy(model) as trial:
            return _structures(cast(nn.Sequential, trial), given, precision, change, inputs.device)

    return looked_at(sequence, inputs, precision, look, needs_values=needs_values)


def looked_at(
    model: _ModuleT,
    inputs: Tensor,
    precision: Precision,
    look: Callable[[_ModuleT, Tensor], _ResultT],
    *,
    needs_values: bool,
) -> _ResultT:
    """What is found out by passes of a model, in which nothing need be computed.

    Args:
        model: The model.
        inputs: Its inputs, ``[N, …]``.
        precision: Of the passes.
        look: Runs them and leaves the model as it is; called again where it fails without values.
        needs_values: As for :func:`structures`.
    """
    # Autocast goes by a tensor's device, and one without values has none.
    if not needs_values and precision.name in ("fp32", "fp64"):
        try:
            # Not the model itself, whose values would be lost.
            with fast_meta_passes():
                return look(copy.deepcopy(model).to("meta"), inputs.to("meta"))
        except Exception as error:  # a user's model may depend on values anywhere
            log.debug("the model is looked at with values: %s", first_line(error))
    return look(model, inputs)


def shared_looks(
    count: int, look: Callable[[int], list[BlockStructure]], everyone: Communicator, device: torch.device
) -> list[list[BlockStructure]]:
    """Looks at a model in several ways. Ranks share the work, since all of them would find the same.

    Args:
        count: Number of ways.
        look: Looks in one of them.
        everyone: All ranks, which call it together.
        device: Of this rank.

    Returns:
        The blocks as each way shows them.
    """
    mine = {
        str(index): [dataclasses.asdict(block) for block in look(index)]
        for index in range(everyone.rank, count, everyone.size)
    }
    rows = everyone.all_gather_json(mine, device)
    return [
        [BlockStructure.of_plain(block) for block in rows[index % everyone.size][str(index)]] for index in range(count)
    ]


def _structures(
    trial: nn.Sequential,
    inputs: Tensor,
    precision: Precision,
    change: Callable[[nn.Module], object] | None,
    device: torch.device,
) -> list[BlockStructure]:
    """As :func:`structures`, of a model that may be changed; ``device`` is that of a training."""
    if change is not None:
        change(trial)
    for parameter in trial.parameters():
        # As in a training, where gradients have their memory all the time.
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    return _Passes(trial, inputs, precision, device).structures()


class _Passes:
    """A forward and a backward pass, in which each block is looked at."""

    def __init__(self, sequence: nn.Sequential, inputs: Tensor, precision: Precision, device: torch.device) -> None:
        self._blocks = [block for _, block in named_blocks(sequence)]
        self._inputs, self._precision = inputs, precision
        #: Memory of parameters and buffers, and what autograd has saved so far. The graph keeps that alive, so none is
        #: taken for another.
        self._storages = {storage_id(tensor) for tensor in (*sequence.parameters(), *sequence.buffers())}
        self._live = LiveMemory(device)
        #: By block: what autograd saves, and the most memory that was held during its passes.
        self._saved = [0] * len(self._blocks)
        self._peaks = [0] * len(self._blocks)
        #: The same, as if the block's output and its gradient were held during its whole backward pass.
        self._peaks_at_end = [0] * len(self._blocks)
        #: Memory of the outputs that are among what their blocks save, which autograd holds until then.
        self._outputs: list[set[int]] = [set() for _ in self._blocks]
        #: Blocks from this one on are in their backward passes.
        self._block = len(self._blocks)

    def structures(self) -> list[BlockStructure]:
        # By identity, since blocks may share parameters.
        seen: set[int] = set()
        found = []
        value: Any = self._inputs
        for index, block in enumerate(self._blocks):
            own = {id(tensor): tensor for tensor in (*block.parameters(), *block.buffers()) if id(tensor) not in seen}
            seen |= own.keys()
            kernels = _KernelCounter()
            given = {storage_id(tensor) for tensor in tensors_in(value)} - self._storages
            hooks = torch.autograd.graph.saved_tensors_hooks(
                functools.partial(self._save, index), lambda tensor: tensor
            )
            with hooks, self._precision.autocast(), kernels, self._live, _FlopCounter() as counter:
                value = block(value)
            self._peaks[index] = self._peaks_at_end[index] = self._live.restart_peak()
            saves_output = all(storage_id(one) in self._storages for one in tensors_in(value))
            if saves_output:
                self._outputs[index] = {storage_id(tensor) for tensor in tensors_in(value)}
            for tensor in tensors_in(value):
                if tensor.requires_grad:
                    # Called when the gradient of this block's output is complete.
                    tensor.register_hook(functools.partial(self._begin_backward, index))
            trained = [tensor for tensor in own.values() if tensor.requires_grad]
            found.append(
                BlockStructure(
                    tuple(_bytes(tensor) for tensor in trained),
                    sum(_bytes(tensor) for tensor in own.values()),
                    counter.flops / len(self._inputs),
                    self._saved[index] / len(self._inputs),
                    sum(isinstance(layer, BatchNorm) for layer in block.modules()),
                    kernels.count,
                    batchnorm_gradients=_first_of_batchnorms(block, trained),
                    saves_output=saves_output,
                    saves_input=bool(given) and given <= self._storages,
                )
            )
        self._backward(value)
        return [
            dataclasses.replace(
                one,
                extra_bytes=self._extra(index, self._peaks[index]),
                extra_bytes_at_end=self._extra(index, self._peaks_at_end[index]),
            )
            for index, one in enumerate(found)
        ]

    def _save(self, index: int, tensor: Tensor) -> Tensor:
        key = storage_id(tensor)
        if key not in self._storages:
            self._storages.add(key)
            self._saved[index] += tensor.untyped_storage().nbytes()
        return tensor

    def _backward(self, value: Any) -> None:
        roots = [tensor for tensor in tensors_in(value) if tensor.requires_grad]
        if roots:
            with self._live:
                # Gradients of ones, which take no memory.
                torch.stack([root.sum() for root in roots]).sum().backward()
            self._end_backward()

    def _begin_backward(self, index: int, gradient: Tensor) -> None:
        if index < self._block:
            self._end_backward()
            self._block = index
            self._live.keep(self._outputs[index])
        if index == self._block:
            self._live.keep([storage_id(gradient)])

    def _end_backward(self) -> None:
        kept_peak = self._live.kept_peak
        peak = self._live.restart_peak()
        if self._block < len(self._blocks):
            self._peaks[self._block] = max(self._peaks[self._block], peak)
            self._peaks_at_end[self._block] = max(self._peaks_at_end[self._block], kept_peak)

    def _extra(self, index: int, peak: int) -> int:
        """Bytes that are held during a block's passes, beyond what it and those before it save."""
        # The inputs were there before; they count for the block that saves them.
        given = self._inputs.untyped_storage().nbytes() if storage_id(self._inputs) in self._storages else 0
        held = peak + given
        return max(held - sum(self._saved[: index + 1]), 0)


def possible_starts(sequence: nn.Sequential, inputs: Tensor, precision: Precision) -> tuple[set[int], str]:
    """The blocks that a stage of a pipeline may begin with.

    Args:
        sequence: The model as a sequence of blocks.
        inputs: As for :func:`structures`; they stay as they are.
        precision: Of forward passes.

    Returns:
        Their indices; and why there are none, if so.
    """
    try:
        traced = trace_blocks(sequence, inputs, precision)
        return set(split.possible_cuts(sequence, traced, pipeline_options(2))), ""
    except ConfigError as error:
        return set(), str(error)


def _first_of_batchnorms(block: nn.Module, trained: Sequence[Tensor]) -> tuple[int, ...]:
    """For each BatchNorm layer that has trained parameters, the index of the first of them."""
    place = {id(parameter): index for index, parameter in enumerate(trained)}
    layers = [layer for layer in block.modules() if isinstance(layer, BatchNorm)]
    own = [[place[id(one)] for one in layer.parameters() if id(one) in place] for layer in layers]
    return tuple(sorted(min(indices) for indices in own if indices))


def pipeline_options(stages: int) -> PipelineConfig:
    """Keys of a pipeline of so many stages."""
    return PipelineConfig(
        name="pipeline",
        stages=stages,
        schedule="1f1b",
        microbatches=4,
        virtual_stages=None,
        boundaries=[],
        batchnorm="deferred",
        first_bucket_mb=None,
        bucket_mb=None,
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def memory_of(
    index: int, plain: Mapping[int, Sequence[BlockStructure]], changed: Mapping[str, Sequence[BlockStructure]]
) -> dict[str, BlockMemory]:
    """What a block holds in its passes, by the kind of its BatchNorm layers.

    Args:
        index: Of the block.
        plain: The blocks as they were found with some numbers of samples.
        changed: The blocks with other kinds of BatchNorm layers, with the smallest of these numbers.
    """
    extra = {size: float(found[index].extra_bytes) for size, found in plain.items()}
    at_end = {size: float(found[index].extra_bytes_at_end) for size, found in plain.items()}
    memory = {"plain": BlockMemory(plain[max(plain)][index].saved_bytes, extra, at_end)}
    small = min(plain)
    for kind, blocks in changed.items():
        own = _with_more(extra, blocks[index].extra_bytes - extra[small])
        own_at_end = _with_more(at_end, blocks[index].extra_bytes_at_end - at_end[small])
        memory[kind] = BlockMemory(blocks[index].saved_bytes, own, own_at_end)
    return memory


def _with_more(held: Mapping[int, float], more: float) -> dict[int, float]:
    """Bytes by number of samples, with more at the smallest one, and in proportion to the samples at the others."""
    smallest = min(held)
    return {size: value + more * size / smallest for size, value in held.items()}
