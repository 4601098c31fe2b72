"""The memory that a rank holds all the time, by what it is for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distrain import torch_internals
from distrain.config.schema import Config
from distrain.runtime.device import RandomState
from distrain.torch_internals import tensors_in

#: Kinds of what is held between steps; a tensor that is of several kinds counts for the first one.
KINDS = ("parameters", "gradients", "optimizer", "buckets")
#: Longest side of the parameters with which an optimizer is tried.
_SIDE = 3
#: Tensors of a parameter's size that Adam keeps: taken of an optimizer that can't be tried.
_USUAL_STATE = 2


def bytes_by_kind(tensors: Mapping[str, Iterable[Tensor]]) -> dict[str, int]:
    """Bytes of each kind; memory that tensors share counts once.

    Args:
        tensors: By kind.
    """
    seen: set[int] = set()
    sizes = dict.fromkeys(KINDS, 0)
    for kind in KINDS:
        for tensor in tensors.get(kind, ()):
            if tensor.layout == torch.strided and (storage := torch_internals.storage_id(tensor)) not in seen:
                seen.add(storage)
                sizes[kind] += tensor.untyped_storage().nbytes()
    return sizes


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """The tensors of an optimizer's state."""
    return tensors_in([*optimizer.state.values()])


def copies_of_parameters(config: Config) -> int:
    """How often a run holds its parameters besides: as averages, and as what a sharpness-aware step comes back to."""
    keys = (config.trainer.ema.decay, config.trainer.swa.from_epoch, config.optimizer.sam_rho)
    return sum(key is not None for key in keys)


def expected_optimizer_bytes(
    make_optimizer: Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer],
    named: Iterable[tuple[str, nn.Parameter]],
) -> int:
    """Bytes of the state that an optimizer will have after its first update, known from an update of small parameters.

    Args:
        make_optimizer: Makes it.
        named: Its parameters by name.
    """
    parameters = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    small = [
        (name, nn.Parameter(torch.zeros([min(side, _SIDE) for side in parameter.shape], dtype=parameter.dtype)))
        for name, parameter in parameters
    ]
    state = RandomState.now()
    try:
        optimizer = make_optimizer(small)
        for _, parameter in small:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    except Exception:  # a user's optimizer may need the true sizes
        return sum(_USUAL_STATE * parameter.nbytes for _, parameter in parameters)
    finally:
        state.restore()
    return sum(
        _scaled_bytes(optimizer.state.get(tried, {}), tried, parameter)
        for (_, tried), (_, parameter) in zip(small, parameters, strict=True)
    )


def _scaled_bytes(state: Mapping[str, Any], tried: Tensor, parameter: Tensor) -> int:
    """Bytes of a parameter's state, from that of the small one in its place."""
    factor = parameter.numel() / max(tried.numel(), 1)
    return sum(
        round(tensor.nbytes * (factor if tensor.numel() == tried.numel() else 1))
        for tensor in tensors_in([*state.values()])
    )
