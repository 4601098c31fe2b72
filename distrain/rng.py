"""Random draws as a pure function of what they are for: a counter-based hash instead of a generator's state.

A draw that depends on (seed, epoch, sample index) alone is the same on every rank, for any number of ranks, in any
order of evaluation, after any resume, on CPU and on CUDA. The mixer is the finaliser of splitmix64 (Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", 2014), in integers that wrap at 64 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


def key(*parts: int) -> int:
    """A 64-bit key (as a signed integer) of the integers that name a family of draws, in their order."""
    state = 0
    for part in parts:
        state = (state + (part & _MASK) + _GOLDEN) & _MASK
        state = ((state ^ (state >> 30)) * _FIRST) & _MASK
        state = ((state ^ (state >> 27)) * _SECOND) & _MASK
        state ^= state >> 31
    return _signed(state)


def bits(family: int, counters: Tensor) -> Tensor:
    """64 random bits for each counter.

    Args:
        family: From :func:`key`.
        counters: int64, any shape, any device.

    Returns:
        int64 of the same shape; all 64 bits are random, so half of the values are negative.
    """
    state = (counters + 1) * _signed(_GOLDEN) + family
    state = (state ^ _shift(state, 30)) * _signed(_FIRST)
    state = (state ^ _shift(state, 27)) * _signed(_SECOND)
    return state ^ _shift(state, 31)


def below(limit: int, random_bits: Tensor) -> Tensor:
    """Uniform integers in ``[0, limit)`` from the upper 31 of 64 random bits; limit is at most 2**31."""
    return (_shift(random_bits, 33) * limit) >> 31


def permutation(family: int, count: int) -> Tensor:
    """A random permutation of ``count`` positions, int64 [count]: the positions sorted by their random bits."""
    return torch.argsort(bits(family, torch.arange(count)), stable=True)


def _shift(values: Tensor, places: int) -> Tensor:
    # torch shifts signed integers arithmetically; the mask clears the copies of the sign.
    return (values >> places) & ((1 << (64 - places)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
