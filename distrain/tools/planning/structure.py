"""What is known of a model's blocks without timing them: sizes, operations, and where a pipeline may be cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import override

from distrain.errors import ConfigError
from distrain.strategies.pipeline import split
from distrain.strategies.pipeline.blocks import named_blocks, trace_blocks
from distrain.strategies.pipeline.options import PipelineConfig
from distrain.strategies.precision import Precision
from distrain.torch_internals import BatchNorm


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
    """

    gradients: tuple[int, ...]
    state_bytes: int
    flops: float
    saved_bytes: float
    batchnorms: int
    kernels: int


class _KernelCounter(TorchFunctionMode):
    """Counts functions whose result is a tensor in new memory: about as many kernels run on a device."""

    count = 0

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, Tensor)}
        self.count += isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in given
        return result


def structures(sequence: nn.Sequential, inputs: Tensor, precision: Precision) -> list[BlockStructure]:
    """Runs a forward pass, which changes running statistics, and looks at each block.

    Args:
        sequence: The model as a sequence of blocks.
        inputs: The model's inputs, ``[N, …]``; blocks may write into them.
        precision: Of the forward pass.
    """
    # Tensors by identity and memory by address: blocks may share both. The graph keeps what is saved alive, so no
    # address is used twice.
    seen: set[int] = set()
    storages = {tensor.untyped_storage().data_ptr() for tensor in (*sequence.parameters(), *sequence.buffers())}
    found = []
    value: Any = inputs
    for _, block in named_blocks(sequence):
        own = {id(tensor): tensor for tensor in (*block.parameters(), *block.buffers()) if id(tensor) not in seen}
        seen |= own.keys()
        saved = 0

        def record(tensor: Tensor) -> Tensor:
            nonlocal saved
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in storages:
                storages.add(storage.data_ptr())
                saved += storage.nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor)
        kernels = _KernelCounter()
        with hooks, precision.autocast(), kernels, FlopCounterMode(display=False) as counter:
            value = block(value)
        trained = [tensor for tensor in own.values() if tensor.requires_grad]
        found.append(
            BlockStructure(
                tuple(_bytes(tensor) for tensor in trained),
                sum(_bytes(tensor) for tensor in own.values()),
                counter.get_total_flops() / len(inputs),
                saved / len(inputs),
                sum(isinstance(layer, BatchNorm) for layer in block.modules()),
                kernels.count,
            )
        )
    return found


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
