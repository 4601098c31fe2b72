"""A model's blocks, and what each hands to the next one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distrain import torch_internals
from distrain.errors import ConfigError
from distrain.strategies.pipeline.program import Segment, owned_names
from distrain.strategies.pipeline.traced_model import TracedModel
from distrain.strategies.precision import Precision
from distrain.strategies.trial_copy import trial_copy


def named_blocks(model: nn.Sequential) -> list[tuple[str, nn.Module]]:
    """The blocks in order; one that the model uses twice is there twice, unlike in ``named_children()``."""
    if isinstance(model, TracedModel):
        return list(zip(model.block_names, model, strict=True))
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name and "." not in name]
    return list(zip(names, model, strict=True))


def part_of(model: nn.Sequential, start: int, stop: int) -> nn.Module:
    """The blocks from ``start`` to before ``stop`` as a module that has their state under the model's names."""
    if isinstance(model, TracedModel):
        return model.part(start, stop)
    part = nn.Sequential()
    for name, block in named_blocks(model)[start:stop]:
        part.add_module(name, block)
    return part


def state_names(part: nn.Module) -> list[str]:
    """Names, or beginnings of names, of the entries that a part has in the model's ``state_dict()``."""
    return owned_names(part) if isinstance(part, Segment) else [name for name, _ in part.named_children()]


@dataclass(frozen=True)
class ActivationSpec:
    """Shape and format of a tensor that a stage sends to the next one, and of its gradient.

    Sender and receiver both know it, since the backend does not check messages.

    Attributes:
        shape: Shape of one sample.
        dtype: Data type under the run's precision.
        channels_last: The memory layout is ``[N, H, W, C]``.
        requires_grad: Its gradient is sent back.
    """

    shape: torch.Size
    dtype: torch.dtype
    channels_last: bool
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> ActivationSpec:
        """The specification of a tensor ``[N, …]``."""
        channels_last = tensor.dim() == 4 and not tensor.is_contiguous()
        channels_last = channels_last and tensor.is_contiguous(memory_format=torch.channels_last)
        return cls(tensor.shape[1:], tensor.dtype, channels_last, tensor.requires_grad)

    def empty_message(self, size: int, device: torch.device) -> Tensor:
        """Contiguous memory for a message of ``size`` samples."""
        shape = tuple(self.shape)
        if self.channels_last:
            shape = (shape[1], shape[2], shape[0])
        return torch.empty((size, *shape), dtype=self.dtype, device=device)

    def to_message(self, tensor: Tensor) -> Tensor:
        """The tensor as it is sent, contiguous.

        Raises:
            ValueError: The tensor does not match the specification.
        """
        if tensor.dtype != self.dtype or tensor.shape[1:] != self.shape:
            raise ValueError(f"a stage sends {tensor.dtype} {list(tensor.shape[1:])}, but the next one expects {self}")
        return (tensor.permute(0, 2, 3, 1) if self.channels_last else tensor).contiguous()

    def from_message(self, message: Tensor) -> Tensor:
        """The message as a tensor of the original shape, in the same memory."""
        return message.permute(0, 3, 1, 2) if self.channels_last else message


@dataclass(frozen=True)
class HandOver:
    """What a block hands to the next one: a tensor, or a tuple or list of tensors.

    Attributes:
        container: ``tuple`` or ``list``; ``None`` for a tensor alone.
        tensors: Of each tensor.
    """

    container: type | None
    tensors: tuple[ActivationSpec, ...]

    @property
    def sample_bytes(self) -> int:
        """Size of one sample of all tensors."""
        return sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in self.tensors)

    def shapes_and_types(self) -> tuple[Any, ...]:
        """What sender and receiver must agree on in evaluation too."""
        return self.container, [(spec.shape, spec.dtype) for spec in self.tensors]

    def unflatten(self, tensors: Sequence[Tensor]) -> Any:
        """The value that these tensors make."""
        return tensors[0] if self.container is None else self.container(tensors)


def flatten(value: Any) -> list[Tensor]:
    """The tensors of a value that a block hands over.

    Raises:
        TypeError: It is neither a tensor nor a tuple or list of tensors.
    """
    if isinstance(value, Tensor):
        return [value]
    if type(value) in (tuple, list) and value and all(isinstance(item, Tensor) for item in value):
        return list(value)
    raise TypeError(f"a {type(value).__name__}, which is neither a tensor nor a tuple or list of tensors")


@dataclass(frozen=True)
class TracedBlock:
    """What running a block has shown.

    Attributes:
        name: The block's name in the model.
        changes_input: This block, or a later one, writes into this block's input.
        output: What it hands over; ``None`` if that can't be sent to another rank.
        problem: Why not.
    """

    name: str
    changes_input: bool
    output: HandOver | None
    problem: str


def trace_blocks(model: nn.Sequential, example: Tensor, precision: Precision) -> list[TracedBlock]:
    """Runs two samples through the model, in training and in evaluation mode, and leaves the model as it was.

    Args:
        model: The whole model.
        example: Inputs ``[N, …]``, of which only shape and format matter.
        precision: Of forward passes.

    Raises:
        ConfigError: A block fails.
    """
    traced = _run_blocks(model, example, precision, training=True)
    evaluated = _run_blocks(model, example, precision, training=False)
    return [_in_both_modes(*blocks) for blocks in zip(traced, evaluated, strict=True)]


def _run_blocks(model: nn.Sequential, example: Tensor, precision: Precision, *, training: bool) -> list[TracedBlock]:
    """As :func:`trace_blocks`, in one of the modes."""
    # The same images on all ranks, as different ones as usual: zeros may be a special case for a block.
    images = torch.randn((2, *example.shape[1:]), generator=torch.Generator().manual_seed(0))
    channels_last = example.dim() == 4 and example.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last and not example.is_contiguous() else torch.contiguous_format
    value: Any = images.to(example.device, example.dtype, memory_format=layout)
    inputs: list[list[tuple[Tensor, int]]] = []
    outputs: list[tuple[str, HandOver | None, str]] = []
    with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(training), precision.autocast():
        for name, block in named_blocks(model):
            tensors = [value] if isinstance(value, Tensor) else list(value) if isinstance(value, tuple | list) else []
            inputs.append([(item, torch_internals.write_count(item)) for item in tensors if isinstance(item, Tensor)])
            with trial_copy(block) as trial:
                try:
                    value = trial.train(training)(value)
                except Exception as error:  # a user's forward may raise anything
                    reason = f"{type(error).__name__}: {error}".partition("\n")[0]
                    mode = "" if training else " in evaluation mode"
                    raise ConfigError("model", name, f"this block fails on two images{mode} ({reason})") from error
            outputs.append((name, *_hand_over(value)))
    changed = [any(torch_internals.write_count(tensor) != version for tensor, version in block) for block in inputs]
    return [
        TracedBlock(name, changes_input, output, problem)
        for changes_input, (name, output, problem) in zip(changed, outputs, strict=True)
    ]


def _in_both_modes(trained: TracedBlock, evaluated: TracedBlock) -> TracedBlock:
    """What holds of a block in training and in evaluation."""
    changes_input = trained.changes_input or evaluated.changes_input
    output, problem = trained.output, trained.problem
    if output is not None and (
        evaluated.output is None or output.shapes_and_types() != evaluated.output.shapes_and_types()
    ):
        output, problem = None, "hands over other tensors in evaluation than in training"
    return TracedBlock(trained.name, changes_input, output, problem)


def _hand_over(value: Any) -> tuple[HandOver | None, str]:
    try:
        tensors = flatten(value)
    except TypeError as error:
        return None, f"hands over {error}"
    for tensor in tensors:
        if not tensor.dim() or len(tensor) != 2:
            return None, f"hands over {list(tensor.shape)} for two images; the first dimension must be the image"
    container = None if isinstance(value, Tensor) else type(value)
    return HandOver(container, tuple(ActivationSpec.of(tensor) for tensor in tensors)), ""
