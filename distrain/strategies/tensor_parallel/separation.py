"""Tries whether modules of unknown classes keep channels apart, so that each rank can run them on its own channels."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distrain import torch_internals

#: Differences of results that are rounding in float64.
_ROUNDING = 1e-9
#: What a module is tried on has as many channels, and three values in other dimensions.
_CHANNELS, _SIZE = 4, 3


def parts_compute_the_whole(whole: nn.Module, parts: Sequence[nn.Module], pieces: Sequence[Tensor], dim: int) -> bool:
    """Whether what modules give of pieces of a tensor is what one gives of all of it, in training and in evaluation.

    The random draws must be the same too, those that follow included.

    Args:
        whole: For all channels, in float64.
        parts: For some channels each.
        pieces: The input of each part.
        dim: The dimension of the channels.

    Raises:
        Exception: Whatever the modules raise.
    """
    for mode in (True, False):
        results, states = [], []
        for module, given in [(whole, torch.cat(list(pieces), dim)), *zip(parts, pieces, strict=True)]:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.default_generator.manual_seed(0)
                results.append(module.train(mode)(given.clone()))
                states.append(torch.random.get_rng_state())
        expected, *found = results
        same = torch.allclose(torch.cat(found, dim), expected, rtol=_ROUNDING, atol=_ROUNDING)
        if not same or any(not torch.equal(state, states[0]) for state in states):
            return False
    return True


def keeps_channels_apart(module: nn.Module, dims: int, dim: int) -> bool:
    """Whether a module without state gives a tensor of the same shape, in which each channel comes from itself alone.

    That is so for activation functions of a user's own, or of timm.

    Args:
        module: The module; the trial runs a copy of it.
        dims: Number of dimensions of its input.
        dim: The dimension of the channels.
    """
    has_state = bool([*module.parameters(), *module.buffers()]) or not torch_internals.has_plain_state(module)
    if has_state or torch_internals.has_hooks(module):
        return False
    shape = [_SIZE] * dims
    shape[dim] = _CHANNELS
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pieces = inputs.split(_CHANNELS // 2, dim)
    try:
        trial = copy.deepcopy(module)
        with torch.random.fork_rng(devices=[]):
            same_shape = all(trial.train(mode)(inputs.clone()).shape == inputs.shape for mode in (True, False))
        return same_shape and parts_compute_the_whole(trial, [trial, trial], pieces, dim)
    except Exception:  # a user's module may raise anything
        return False
